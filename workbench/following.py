"""What a training, a sweep or a run is doing now, read from its files alone: it may be of another process, or over.

Leans on the report that a training keeps beside its checkpoints (`finetuning.reporting`), on `sweeps` and on
`runs.status`. Nothing here writes or starts anything. How it looks, and the button that cancels, is in
`widgets.following`.
"""

import json
import math
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.finetuning.reporting import FILE, read_report
from workbench.runs import OWN
from workbench.runs.heartbeats import duration
from workbench.runs.processes import is_alive

if TYPE_CHECKING:
    import pandas as pd

RECENT = 20  # steps whose mean time is taken for the ones to come
NUMBERS = {
    "loss": "loss (nats a token)", "eval_loss": "held-out loss", "eval_accuracy": "held-out accuracy",
    "grad_norm": "gradient norm", "tokens_per_second": "tokens a second", "mfu": "MFU",
}  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """The state of a folder: `kind` is nothing, training, sweep or run; `over` when nothing more will come.

    rows: the curve of the training that is going on. table: points of a sweep, or stages of a run. left: seconds, as
    far as the last steps tell. age: seconds since the last sign of life. stop_at: where a request to cancel belongs.
    """

    folder: Path
    kind: str
    said: str
    over: bool = False
    stage: str = ""
    step: int = 0
    total: int = 0
    rows: tuple[dict[str, Any], ...] = ()
    left: float | None = None
    age: float | None = None
    table: "pd.DataFrame | None" = None
    names: tuple[str, ...] = ()
    stop_at: Path | None = None

    @property
    def numbers(self) -> dict[str, float]:
        """The newest value of each number of the curve, by what it is called."""
        return {
            words: next(row[name] for row in reversed(self.rows) if name in row)
            for name, words in NUMBERS.items()
            if any(name in row for row in self.rows)
        }


def look(folder: str | Path) -> Seen:
    """The state of a folder that a training, a sweep or a run writes, or that nothing has written yet."""
    home = Path(folder)
    if (home / "sweep.json").exists():
        return _sweep(home)
    if (home / OWN).is_dir():
        return _run(home)
    if (home / "training.json").exists():
        return _finished(home)
    if lines := read_report(home):
        return _training(home, lines)
    return Seen(home, "nothing", f"There is no training, sweep or run in {home} yet; waiting for it.")


def _finished(home: Path) -> Seen:
    report = json.loads((home / "training.json").read_text(encoding="utf-8"))
    fast = {row["step"]: row for row in _lines(home / "speed.jsonl")}
    rows = tuple({**row, **fast.get(row["step"], {})} for row in _lines(home / "losses.jsonl"))
    said, steps = f"Finished: {report['steps']} steps in {duration(report['seconds'])}.", int(report["steps"])
    return Seen(home, "training", said, True, "finished", steps, steps, rows)


def _training(home: Path, lines: list[dict[str, Any]]) -> Seen:
    first, last = lines[0], lines[-1]
    rows = tuple(line for line in lines[1:] if "loss" in line)
    step, total = int(rows[-1]["step"]) if rows else 0, int(first["total"])
    age = max(0.0, time.time() - last.get("time", first["time"]))
    over, said = "ended" in last, f"{first['doing'].capitalize()}."
    if over:
        said = f"Ended: {last['ended']}"
    elif first["host"] == socket.gethostname() and not is_alive(first["process"]):
        over, said = True, "Ended without a word: its process is gone. Run the same call to go on."
    left = None if over else _left(rows, total)
    return Seen(home, "training", said, over, first["stage"], step, total, rows, left, age,
                stop_at=None if over else home)  # fmt: skip


def _left(rows: tuple[dict[str, Any], ...], total: int) -> float | None:
    """Seconds to the end, by the time between the last steps of this process."""
    timed = [row for row in rows if "time" in row][-RECENT:]
    if len(timed) < 2:
        return None
    each = (timed[-1]["time"] - timed[0]["time"]) / (timed[-1]["step"] - timed[0]["step"])
    return float(max(0.0, each * (total - timed[-1]["step"])))


def _inside(home: Path) -> Seen | None:
    """The training in a folder's folders that was heard of last."""
    files = [file for pattern in ("*", "*/*") for file in home.glob(f"{pattern}/checkpoints/{FILE}")]
    newest = max(files, key=_written, default=None)
    lines = read_report(newest.parents[1]) if newest else []
    return _training(newest.parents[1], lines) if newest and lines else None


def _sweep(home: Path) -> Seen:
    from workbench.sweeps import Sweep

    found, index = Sweep(home), json.loads((home / "sweep.json").read_text(encoding="utf-8"))
    table = found.table()
    failed = [name for name in index["points"] if (home / name / "failed.json").exists()]
    ranked = all(name in found.ranking() or name in failed for name in index["points"])
    done = [name for name in found.chosen() if (home / name / "training.json").exists() or name in failed]
    over = ranked and len(done) == len(found.chosen())
    now = None if over else _inside(home)
    words = f"{len(found.ranking())} of {len(index['points'])} points have reached the rung, {len(done)} are finished."
    if now is None:
        return Seen(home, "sweep", words, over, table=table, names=tuple(index["names"]))
    ended = now.over and "process is gone" in now.said or "Cancelled" in now.said or "KeyboardInterrupt" in now.said
    return Seen(
        home, "sweep", f"{words} Now: {now.folder.name}. {now.said}", ended, now.stage, now.step, now.total, now.rows,
        now.left, now.age, table, tuple(index["names"]), None if ended else home,
    )  # fmt: skip


def _run(home: Path) -> Seen:
    import pandas as pd

    from workbench.runs.status import status

    found = status(home)
    columns = {"stage": "stage", "state": "state", "detail": "detail", "seconds": "seconds"}
    table = pd.DataFrame([{name: getattr(stage, field) for name, field in columns.items()} for stage in found.stages])
    over = found.owner is None
    said = "Nothing works on this run now." if over else f"Worked on by {found.owner}."
    now = None if over else _inside(home)
    if now is None or now.over:
        return Seen(home, "run", said, over, table=table)
    return Seen(
        home, "run", f"{said} {now.said}", over, now.stage, now.step, now.total, now.rows, now.left, now.age, table,
        stop_at=now.stop_at,
    )  # fmt: skip


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _written(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # gone meanwhile
        return -math.inf
