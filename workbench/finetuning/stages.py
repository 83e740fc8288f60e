"""Train on one thing after another, and measure after each what was learnt and what was forgotten.

sequential  one adapter, which goes on to the next stage's data
merged      each stage's adapter is merged into the weights, and the next stage trains a new one on top
phased      one run over all data in the order of the stages; the learning-rate schedule goes on through all of them

Forgetting on a task is the best accuracy at any earlier point minus the one now (as in arXiv 1801.10112), with a paired
interval against that point. What is done is not done again after a kill. Not covered: replay of earlier data, which is
a stage whose data holds it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from workbench.files import content_key, write_atomic
from workbench.finetuning import finetune
from workbench.finetuning.card import add_measured
from workbench.finetuning.merging import merge
from workbench.finetuning.recipe import kept_records
from workbench.interventions import Adapter
from workbench.models import LM, load_model
from workbench.synthesis.records import Data, Record, claim_folder

if TYPE_CHECKING:
    from workbench.results import Results
    from workbench.tasks import Task

Mode = Literal["sequential", "merged", "phased"]


@dataclass(frozen=True)
class Stage:
    """One thing to learn: its name, its data, and settings of `finetune` that differ from those of all stages."""

    name: str
    data: Data | str | Path | list[Record]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Staged:
    """What came out: the last adapter (its base is `lm`), and an entry a measured point and task, as in stages.json.

    An entry: after, task, n, accuracy, low, high (95 %, Wilson), forgotten (best earlier accuracy minus this one), and
    best, difference, difference_low, difference_high: that earlier point and the paired change since then.
    """

    adapter: Adapter
    lm: LM
    measured: list[dict[str, Any]]


@dataclass(frozen=True)
class _Exam:
    """Which tasks are asked, and how."""

    tasks: Mapping[str, "Task"]
    asked: Mapping[str, Any]
    out: Path


def finetune_stages(
    lm: LM,
    stages: Sequence[Stage],
    out: str | Path,
    *,
    mode: Mode = "sequential",
    measure: "Mapping[str, Task] | None" = None,
    n: int | None = 100,
    measure_seed: int = 0,
    split: str = "test",
    max_new_tokens: int = 256,
    **settings: Any,
) -> Staged:
    """Train through the stages in order; `settings` are those of `finetune` for all of them.

    measure: name -> task, asked (n questions of the split) before the first stage and after each; with "phased", whose
    stages are one run, before and after it. out: a folder a stage, the answers under measured/, and stages.json.
    With "merged" the result's `lm` is the model that the last stage was trained on, and `adapter` goes on top of it.

    Raises ValueError for stages of equal names, and for settings that a mode has no use for.
    """
    _check(stages, mode, settings)
    out = Path(out)
    exam = _Exam(measure or {}, {"n": n, "seed": measure_seed, "split": split, "max_new_tokens": max_new_tokens}, out)
    contents = [content_key(records=[one["messages"] for one in kept_records(stage.data)[0]]) for stage in stages]
    claim_folder(out, {"mode": mode, "stages": [stage.name for stage in stages], "data": contents}, "finetune_stages")
    points: list[tuple[str, dict[str, Results]]] = [("before", _ask(lm, None, "before", exam))]
    if mode == "phased":
        adapter = _train(lm, _phases(stages, settings), out / "phased", {**settings, "epochs": 1})
        points.append((stages[-1].name, _ask(lm, adapter, "phased", exam)))
        measured = _write(out, mode, stages, points)
        _note(adapter, measured, stages[-1].name)
        return Staged(adapter, lm, measured)
    last: Adapter | None = None
    for number, stage in enumerate(stages, start=1):
        folder, chosen = out / f"{number}-{stage.name}", {**settings, **stage.settings}
        if mode == "merged" and last is not None:
            merged = merge(lm, last, out / f"{number - 1}-{stages[number - 2].name}-merged")
            lm, last = load_model(merged, dtype=lm.model.dtype, device=lm.device), None
        last = _train(lm, stage.data, folder, {**chosen, "start": last} if last is not None else chosen)
        points.append((stage.name, _ask(lm, last, folder.name, exam)))
        measured = _write(out, mode, stages, points)
        _note(last, measured, stage.name)
    assert last is not None  # there is at least one stage
    return Staged(last, lm, measured)


def _train(lm: LM, data: Any, folder: Path, settings: Mapping[str, Any]) -> Adapter:
    result = finetune(lm, data, folder, **settings)
    assert isinstance(result, Adapter)  # method="full" was refused
    return result


def _check(stages: Sequence[Stage], mode: str, settings: Mapping[str, Any]) -> None:
    names = [stage.name for stage in stages]
    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r} is not known. Choose one of: {', '.join(get_args(Mode))}.")
    if not stages or len(set(names)) < len(names) or not all(re.fullmatch(r"[\w-]+", name) for name in names):
        raise ValueError(
            f"The stages are named {names}. Give one stage or more, each with a name of its own made of letters, "
            "digits, - and _."
        )
    for stage in stages:
        chosen = {**settings, **stage.settings}
        if "start" in chosen:
            raise ValueError("start= is what the stages hand on themselves. Leave it out.")
        if chosen.get("method") == "full" or (mode == "merged" and chosen.get("method") in ("prompt", "prefix")):
            raise ValueError(
                f"method={chosen['method']!r} and mode={mode!r} do not go together: stages hand on an adapter"
                f"{', which is merged into the weights' if mode == 'merged' else ''}. Use method='lora' or 'dora'."
            )
        odd = sorted(set(stage.settings) - {"epochs"})
        if mode == "phased" and (odd or float(chosen.get("epochs", 2)) != int(chosen.get("epochs", 2))):
            raise ValueError(
                f"mode='phased' is one run: stage {stage.name!r} may differ in its data and in whole epochs alone "
                f"(epochs={chosen.get('epochs', 2)}, other settings: {', '.join(odd) or 'none'})."
            )


def _phases(stages: Sequence[Stage], settings: Mapping[str, Any]) -> list[Record]:
    """All records, each epoch of each stage a phase of its own: phases are shuffled and packed apart."""
    ordered: list[Record] = []
    phase = 0
    for stage in stages:
        records, _ = kept_records(stage.data)
        for _ in range(int({"epochs": 2, **settings, **stage.settings}["epochs"])):
            phase += 1
            ordered += [{**record, "phase": phase} for record in records]
    return ordered


def _ask(lm: LM, adapter: Adapter | None, point: str, exam: _Exam) -> "dict[str, Results]":
    """Results by task at one point; what lies in the folder already is not asked again."""
    from workbench.evaluation import evaluate

    condition = [] if adapter is None else [adapter]
    return {
        name: evaluate(lm, task, {point: condition}, out=exam.out / "measured" / point / name, **exam.asked)
        for name, task in exam.tasks.items()
    }


def _note(adapter: Adapter, measured: Sequence[Mapping[str, Any]], after: str) -> None:
    """What was measured with an adapter, into its card."""
    said = {
        one["task"]: f"accuracy {one['accuracy']:.3f} ({one['low']:.3f} to {one['high']:.3f}, n={one['n']})"
        for one in measured
        if one["after"] == after
    }
    if said:
        add_measured(adapter.path, said)


def _write(
    out: Path, mode: str, stages: Sequence[Stage], points: "Sequence[tuple[str, dict[str, Results]]]"
) -> list[dict[str, Any]]:
    """Everything measured so far, also in stages.json."""
    from workbench.statistics import paired_difference

    measured: list[dict[str, Any]] = []
    for place, (after, results) in enumerate(points):
        for task, result in results.items():
            line = result.table().iloc[0]
            entry = {"after": after, "task": task, "n": int(line["n"])}
            entry |= {name: float(line[name]) for name in ("accuracy", "low", "high")}
            earlier = [(name, there[task].correct(there[task].conditions[0])) for name, there in points[:place]]
            if earlier:
                name, best = max(earlier, key=lambda point: float(point[1].mean()))
                now = result.correct(result.conditions[0]).loc[best.index]
                change = paired_difference(best.tolist(), now.tolist())
                entry |= {"best": name, "forgotten": float(best.mean() - now.mean())}
                found = asdict(change)
                entry |= {"difference": found["difference"]}
                entry |= {"difference_low": found["low"], "difference_high": found["high"]}
            measured.append(entry)
    about = {"mode": mode, "stages": [stage.name for stage in stages], "measured": measured}
    write_atomic(out / "stages.json", json.dumps(about, indent=2))
    return measured
