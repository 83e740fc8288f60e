"""Fine-tunes over a grid of settings: all of them for a short while, the best ones to the end; one table of all.

Successive halving with one rung (arXiv 1502.07943): every point is trained to the same share of its steps, the best
share of the points by held-out loss goes on, the others stay paused. Points that a later grid adds to the folder are
ranked with those that are there, and more may go on then, as in ASHA (arXiv 1810.05934). At the rung the learning rate
is still high, so a rate that would win in the end can be stopped there: a larger `rung` or `keep` costs more and errs
less. A point's folder is that of `finetune`. Not covered: several points at once, other searches than a grid.
"""

import gc
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.files import write_atomic
from workbench.runs.points import combinations

if TYPE_CHECKING:
    import pandas as pd

    from workbench.interventions import Adapter
    from workbench.models import LM
    from workbench.synthesis.records import Data, Record

INDEX = "sweep.json"
LAST = 5  # steps whose mean is called the training loss: a single step's depends on its few records
Facts = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder, whole or not yet; all that is told is read from its files."""

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        if not (self.folder / INDEX).is_file():
            raise ValueError(f"{self.folder} holds no sweep ({INDEX}). Start one: wb.sweep(lm, data, out, grid, ...).")

    def table(self) -> "pd.DataFrame":
        """A row a point: its settings, steps, tokens, loss, held_out_loss (nats a token), stopped, reason, seconds
        (of training), adapter (folder), and what `measure` gave.

        Finished points come first, then stopped ones, whose losses are those at the rung, then failed ones; each by
        held-out loss, or by training loss (mean of the last steps) where nothing was held out.
        """
        import pandas as pd

        index, ranking, chosen = _read(self.folder / INDEX), self.ranking(), self.chosen()
        ranked = all(name in ranking or _failure(self.folder / name) for name in index["points"])
        rows = []
        for name, point in index["points"].items():
            place = list(ranking).index(name) + 1 if name in ranking else None
            said = f"place {place} of {len(index['points'])} at step {ranking[name]['steps']}" if place else "not begun"
            settings = {field: point["values"].get(field, point["recipe"][field]) for field in index["names"]}
            rows.append(settings | _row(self.folder / name, said, place, len(chosen) if ranked else None))
        rows.sort(key=lambda row: (row["order"], *_loss_of(row)))
        return pd.DataFrame(rows).drop(columns="order")

    def best(self) -> "Adapter":
        """The adapter of the finished point with the lowest held-out loss."""
        from workbench.interventions import Adapter

        for folder in self.table()["adapter"]:
            if folder and _finished(Path(folder)):
                return Adapter(Path(folder))
        raise ValueError(f"no point of {self.folder} is finished; table() says why. Call wb.sweep again to go on.")

    @property
    def saved(self) -> float:
        """Share of the steps of all points, failed ones left out, that early stopping did not run."""
        ranked = {name: rung for name, rung in self.ranking().items() if not _failure(self.folder / name)}
        run = sum(_curve(self.folder / name)[-1]["step"] for name in ranked)
        return 1 - run / sum(rung["total_steps"] for rung in ranked.values()) if ranked else 0.0

    def ranking(self) -> dict[str, Facts]:
        """What each point had reached at the rung, the best first; one that failed before has no place."""
        found = {name: _read(self.folder / name / "rung.json") for name in _read(self.folder / INDEX)["points"]}
        return dict(sorted(((name, rung) for name, rung in found.items() if rung), key=lambda item: _loss_of(item[1])))

    def chosen(self) -> list[str]:
        """The points that are trained to the end: the best share of all, failed ones counted, one at least."""
        index = _read(self.folder / INDEX)
        count = max(1, math.floor(index["keep"] * len(index["points"]) + 1e-9))  # 0.29 * 100 is 28.999999999999996
        return list(self.ranking())[:count]


def sweep(
    lm: "LM",
    data: "Data | str | Path | list[Record]",
    out: str | Path,
    grid: Mapping[str, Sequence[Any]],
    *,
    held_out: "Data | str | Path | list[Record] | None",
    keep: float = 0.5,
    rung: float = 0.15,
    measure: "Callable[[Adapter], Mapping[str, float]] | None" = None,
    **settings: Any,
) -> Sweep:
    """Fine-tune over all combinations of `grid`, stopping the worse ones early; a folder a point under `out`.

    grid: arguments of `finetune` and their values, for example {"learning_rate": [1e-3, 3e-3], "rank": [4, 16]}.
        Another grid in the same folder adds its points; those that are there are not trained again.
    held_out: records that points are ranked by, none of them trained on or of a test split. None ranks by the
        training loss (mean of the last steps), which prefers what overfits.
    rung, keep: after this share of its steps a point is ranked; this share of all points goes on to the end.
    measure: numbers of a finished point for the table, made from its adapter and kept in its folder.
    settings: further arguments of `finetune`, the same for all points.

    The same call goes on after a kill and repeats nothing finished; on a CPU an adapter has the bytes of a plain
    `finetune`. A point that diverges or lacks memory is told in the table and stops no other; one that lacked memory
    is tried again by the next call. Raises ValueError, before any training, for settings that can't be trained with.
    """
    from workbench.finetuning.grids import RECIPE

    home = Path(out)
    (home / "cancel").unlink(missing_ok=True)
    index = _begin(lm, data, home, grid, held_out, keep, rung, settings)

    def go_on(names: Sequence[str], until: float) -> None:
        others = {name: value for name, value in settings.items() if name == "start" or name not in RECIPE}
        for number, name in enumerate(names, start=1):
            if _read(home / name / "failed.json").get("final"):
                continue
            print(f"sweep: {name}, to {until:.0%} of its steps ({number} of {len(names)})")
            recipe = {field: value for field, value in index["points"][name]["recipe"].items() if field != "start"}
            _train(lm, data, home / name, until, held_out=held_out, **recipe, **others)

    found = Sweep(home)
    go_on([name for name in index["points"] if not (home / name / "rung.json").exists()], rung)
    go_on(found.chosen(), 1.0)
    if measure:
        _measure(found, measure)
    return found


def _begin(
    lm: "LM", data: Any, home: Path, grid: Mapping[str, Sequence[Any]], held_out: Any, keep: float, rung: float,
    settings: Facts,
) -> Facts:  # fmt: skip
    """The index of all points, written after everything that could be wrong has been looked at."""
    from workbench.finetuning.grids import check_names, recipe_of, with_points
    from workbench.finetuning.options import held_out_records
    from workbench.finetuning.recipe import kept_records, records_key
    from workbench.synthesis.records import claim_folder

    if not 0 < keep <= 1 or not 0 < rung < 1:
        raise ValueError(f"keep={keep} and rung={rung} are shares: keep above 0 and at most 1, rung between 0 and 1.")
    records, _ = kept_records(data)
    scored = None if held_out is None else held_out_records(*kept_records(held_out), records)
    check_names(grid, settings)
    points = {
        name: {"values": values, "recipe": recipe_of(lm, name, settings | values, rung)}
        for name, values in combinations(grid).items()
    }
    index = with_points(_read(home / INDEX) or {"names": [], "points": {}}, list(grid), points) | {"keep": keep}
    shared: Facts = {"base": {"name": lm.name, "revision": lm.revision}, "records": records_key(records)}
    shared |= {"held_out": scored and records_key(scored), "rung": rung}
    claim_folder(home, shared, "sweep")
    write_atomic(home / INDEX, json.dumps(index, indent=2))
    return index


def _train(lm: "LM", data: Any, folder: Path, until: float, **arguments: Any) -> None:
    """One point to the rung or to the end; writes rung.json, or failed.json for what ends only this point."""
    from workbench.finetuning import finetune
    from workbench.finetuning.microbatch import is_out_of_memory
    from workbench.finetuning.options import Diverged, ShortOfMemory
    from workbench.finetuning.watching import check_loss

    failure: Facts = {}
    try:
        finetune(lm, data, folder, until=until, **arguments)
        last = _curve(folder)[-1]
        check_loss("held-out loss", last.get("eval_loss", 0.0), int(last["step"]), arguments["learning_rate"])
    except Exception as error:
        if not isinstance(error, Diverged | ShortOfMemory) and not is_out_of_memory(error):
            raise
        failure = {"reason": str(error), "final": isinstance(error, Diverged)}
    if failure:
        gc.collect()  # out here, where the error holds no more frames with their tensors
        print(f"sweep: failed: {failure['reason']}")
        write_atomic(folder / "failed.json", json.dumps(failure))
        return
    (folder / "failed.json").unlink(missing_ok=True)
    if until < 1:
        states = [_read(path) for path in folder.glob("checkpoints/*/trainer_state.json")]
        steps = _read(folder / "training.json").get("steps") or max(state["max_steps"] for state in states)
        found = _reached(_curve(folder))
        held_out = None if math.isnan(found["held_out_loss"]) else found["held_out_loss"]
        write_atomic(folder / "rung.json", json.dumps({**found, "held_out_loss": held_out, "total_steps": steps}))


def _measure(found: Sweep, measure: "Callable[[Adapter], Mapping[str, float]]") -> None:
    from workbench.interventions import Adapter

    for name in _read(found.folder / INDEX)["points"]:
        folder = found.folder / name
        if _finished(folder) and not (folder / "measured.json").exists():
            numbers = {what: float(value) for what, value in measure(Adapter(folder)).items()}
            write_atomic(folder / "measured.json", json.dumps(numbers))


def _row(folder: Path, said: str, place: int | None, going: int | None) -> Facts:
    """A point's part of the table; `going`: how many go on, None where not all points are ranked yet."""
    curve, failure, done = _curve(folder), _failure(folder), _finished(folder)
    stopped = not (done or failure) and place is not None and going is not None and place > going
    if curve and "eval_loss" not in curve[-1]:
        said += ", by training loss"
    if stopped:
        said += f": the best {going} went on"
    elif not done and place:
        said += ": not trained to the end yet"
    return {
        **_reached(curve), "stopped": stopped, "reason": failure or said,
        "seconds": sum(line["seconds"] for line in _lines(folder / "speed.jsonl")),
        "adapter": str(folder) if (folder / "adapter_model.safetensors").exists() else "",
        **_read(folder / "measured.json"), "order": 3 if failure else 0 if done else 1 if place else 2,
    }  # fmt: skip


def _reached(curve: list[Facts]) -> Facts:
    """Steps, tokens and losses so far; nan for what was not measured."""
    last = curve[-1] if curve else {}
    losses = [line["loss"] for line in curve[-LAST:]] or [math.nan]
    held_out = last.get("eval_loss", math.nan)
    return {
        "steps": int(last.get("step", 0)), "tokens": int(last.get("tokens", 0)),
        "loss": sum(losses) / len(losses), "held_out_loss": held_out,
    }  # fmt: skip


def _loss_of(row: Facts) -> tuple[float, ...]:
    """What points are ordered by: held-out loss, then training loss; one without a number comes last."""
    return tuple(
        math.inf if value is None or math.isnan(value) else value for value in (row["held_out_loss"], row["loss"])
    )


def _finished(folder: Path) -> bool:
    return (folder / "training.json").exists() and not _failure(folder)


def _failure(folder: Path) -> str:
    return str(_read(folder / "failed.json").get("reason", ""))


def _curve(folder: Path) -> list[Facts]:
    return _lines(folder / "losses.jsonl")


def _lines(file: Path) -> list[Facts]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def _read(file: Path) -> Facts:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
