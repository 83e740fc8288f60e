"""How far a stage is: a bar in a notebook, a line now and then on a terminal, a small file in a run.

In a run the environment variable WORKBENCH_HEARTBEAT names the folder for `heartbeat.json`; `status` reads it, and the
runner prints it, so that the executed notebook is not filled with progress lines.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from workbench.files import to_json, write_atomic

Item = TypeVar("Item")
FOLDER = "WORKBENCH_HEARTBEAT"
FILE_EVERY = 0.5  # seconds between two writes of the file
LINE_EVERY = 5.0  # seconds between two lines on a terminal


@dataclass
class Clock:
    """When a stage of this process began and when it last reported."""

    began: float
    first: int
    reported: float = 0.0
    bar: Any = None


CLOCKS: dict[str, Clock] = {}


def heartbeat(stage: str, step: int, total: int, **numbers: float) -> None:
    """Report that `step` of `total` steps of `stage` are done, with some numbers (a loss, a rate).

    Cheap enough for every step: only the first, the last and one report every few seconds are shown. Works in child
    processes of a run too. A full disk does not stop the work that is being reported.
    """
    now = time.time()
    clock = CLOCKS.get(stage)
    if clock is None or step < clock.first:
        clock = CLOCKS[stage] = Clock(now, step)
    due = LINE_EVERY if not os.environ.get(FOLDER) else FILE_EVERY
    if in_notebook() and not os.environ.get(FOLDER):
        show_bar(clock, stage, step, total, numbers)
    elif step >= total or now - clock.reported >= due:
        clock.reported = now
        left = (now - clock.began) / (step - clock.first) * (total - step) if step > clock.first else None
        beat = {
            "stage": stage,
            "step": step,
            "total": total,
            "numbers": plain_numbers(numbers),
            "time": now,
            "left": left,
        }
        report(beat)
    if step >= total:
        CLOCKS.pop(stage, None)


def forget(stage: str) -> None:
    """The stage was broken off: its bar stands still, and the next report of this name begins anew."""
    clock = CLOCKS.pop(stage, None)
    if clock is not None and clock.bar is not None:
        clock.bar.close()


def report(beat: dict[str, Any]) -> None:
    """Write a beat to the run's file, or to standard error outside a run."""
    if folder := os.environ.get(FOLDER):
        with contextlib.suppress(OSError):
            write_atomic(Path(folder) / "heartbeat.json", to_json(beat))
    else:
        print(line(beat), file=sys.stderr, flush=True)


def line(beat: dict[str, Any]) -> str:
    """Return a beat as one line for a person.

    >>> line({"stage": "train", "step": 3, "total": 9, "numbers": {"loss": 0.51234}, "left": 61})
    'train 3/9 loss 0.5123, about 1 min 1 s left'
    """
    words = [f"{beat.get('stage')} {beat.get('step')}/{beat.get('total')}"]
    words += [f"{name} {value:.4g}" for name, value in (beat.get("numbers") or {}).items() if value is not None]
    left = beat.get("left")
    ending = "" if not left or left < 1 else f", about {duration(left)} left"
    return " ".join(words) + ending


def duration(seconds: float) -> str:
    """Return a duration in the unit a person would choose.

    >>> duration(4.2), duration(130), duration(1900), duration(7300)
    ('4.2 s', '2 min 10 s', '32 min', '2.0 h')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if seconds < 600:
        return f"{minutes} min {rest} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def read_beat(folder: Path) -> dict[str, Any] | None:
    """Return the last heartbeat written to a folder, or None."""
    try:
        found = json.loads((folder / "heartbeat.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def progress(iterable: Iterable[Item], stage: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items of an iterable and report after each; `total` is needed where it has no length."""
    count = total if total is not None else len(iterable) if isinstance(iterable, Sized) else 0
    for step, item in enumerate(iterable, start=1):
        yield item
        heartbeat(stage, step, max(count, step))


def plain_numbers(numbers: dict[str, Any]) -> dict[str, float | None]:
    """Turn numbers, NumPy's and torch's included, into JSON values; not-a-number becomes null."""
    values = {name: float(value) for name, value in numbers.items()}
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def show_bar(clock: Clock, stage: str, step: int, total: int, numbers: dict[str, float]) -> None:
    """Move the notebook's progress bar; the plain one where widgets are not installed."""
    before = next((other for name, other in CLOCKS.items() if follows(stage, name) and other.bar is not None), None)
    if clock.bar is None and before is not None and before.bar.total == total and step >= before.bar.n:
        clock.bar, before.bar = before.bar, None  # the next condition of one count: one bar for all of them
        clock.bar.set_description(stage, refresh=False)
    if clock.bar is None:
        from tqdm.auto import tqdm

        clock.bar = tqdm(total=total, desc=stage, initial=max(step - 1, 0))
    if numbers:
        clock.bar.set_postfix(plain_numbers(numbers), refresh=False)
    clock.bar.update(step - clock.bar.n)
    if step >= total:
        clock.bar.close()


def follows(stage: str, other: str) -> bool:
    """Tell if two stages are parts of one piece of work: `evaluate plain`, `evaluate tuned`."""
    return stage != other and stage.partition(" ")[0] == other.partition(" ")[0]


def in_notebook() -> bool:
    """Tell if this process is a notebook's kernel."""
    shell = sys.modules.get("IPython")
    found = shell.get_ipython() if shell else None
    return found is not None and hasattr(found, "kernel")
