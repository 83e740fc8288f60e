"""Make training records with a checker in the loop: answer, verify, edit, select, remove repeats and leaks.

The steps of one call, in order:

1. a **recipe** answers questions (`recipes`, `roles`, `questions`, `programs`: one function each, with its paper);
2. **edits** change the answers (`edits`): rendered as equations, made compact, rewritten for the student;
3. **selection** chooses among a question's answers (`selection`), wrong ones too where negative data is wanted;
4. **filters** drop what overlaps with test questions or repeats an earlier record (`overlap`).

Steps 1 and 2 may call a model, so they are saved in chunks (`stages`): a killed run goes on from its last chunk and
ends in the same bytes, and another setting redoes its own step and what follows. Steps 3 and 4 take seconds and are
always done anew. Times, which never repeat, are in the card and not in the records. Mixing finished sets under one
budget is in `mixing`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from workbench.aside import write_aside
from workbench.files import content_key
from workbench.synthesis import overlap, programs, questions, recipes, roles
from workbench.synthesis.card import make_card, write_records
from workbench.synthesis.records import Data, load_data
from workbench.synthesis.sampling import Attempt, Edit, Recipe, Row, Settings
from workbench.synthesis.selection import Dedup, Select, drop_leaks, drop_repeats, exam_questions, make_records
from workbench.synthesis.stages import described, in_chunks, plain, plain_json

if TYPE_CHECKING:
    from workbench.models import LM
    from workbench.prompts import Strategy
    from workbench.tasks import Task

FileFormat = Literal["jsonl", "parquet"]


def synthesize(
    lm: "LM",
    task: "Task",
    recipe: str | Recipe = "rejection",
    n: int = 500,
    seed: int = 0,
    *,
    out: str | Path,
    split: str = "train",
    edits: Sequence[Edit] = (),
    select: Select = "shortest",
    chains: int = 1,
    negatives: int = 0,
    dedup: Dedup = "weighted",
    threshold: float = 0.8,
    max_overlap: float = 0.05,
    chunk_size: int = 50,
    file_format: FileFormat = "jsonl",
    strategy: "Strategy | None" = None,
    evaluation: "Task | Sequence[Task] | None" = None,
    **settings: Any,
) -> Data:
    """Records for `n` questions of `task`, written to the folder `out` with a card; a second call resumes or reloads.

    Args:
        recipe: a function of `recipes`, or its name; `functools.partial(recipe, name=value)` sets what is its own.
        n: questions asked: fewer become records, and `data.card["counts"]` says why.
        edits: functions of `edits` (or partials of them) that change the sampled answers, in order.
        select: which of a question's usable answers is taken; `chains` distinct ones at most.
        negatives: wrong chains a question that are recorded too, marked and not kept (`data.negatives`).
        dedup, threshold: by which measure and from which similarity on a record repeats an earlier one (`overlap`).
        max_overlap: share of verified records that may overlap with the test questions of `evaluation` (one task or
            several; default: `task`) before the set is refused.
        settings: the fields of `Settings`: `samples`, `temperature`, `top_p`, `max_new_tokens`, `style` (oracle),
            `batch_size`.

    Raises:
        ValueError: settings that can't work, or a leaking set.
    """
    chosen = Settings(strategy=strategy, seed=seed, **_known(settings))
    make = _recipe(recipe)
    numbers = {"n": n, "samples": chosen.samples, "max_new_tokens": chosen.max_new_tokens, "chains": chains}
    _check(make, numbers | {"chunk_size": chunk_size}, chosen, max_overlap, negatives)
    overlap.check_threshold(threshold)
    _check_choices(select=(select, Select), dedup=(dedup, Dedup), file_format=(file_format, FileFormat))
    out = Path(out)
    exams = [task] if evaluation is None else list(evaluation) if isinstance(evaluation, Sequence) else [evaluation]
    rows = task.rows(split=split, n=n, seed=seed)
    sampling = _sampling(make, lm, task, chosen)
    asked = {"questions": content_key(rows=plain_json(rows)), "n": len(rows)}
    exam = exam_questions(exams)
    finishing = {
        "split": split, "edits": [described(edit) for edit in edits], "select": select, "chains": chains,
        "negatives": negatives, "dedup": dedup, "threshold": threshold, "max_overlap": max_overlap,
        "evaluation": {name: content_key(questions=found)[:12] for name, found in exam.items()},
    }  # fmt: skip
    key = content_key(sampling=sampling, asked=asked, finishing=finishing | {"file_format": file_format})
    if not _finished(out, key):
        attempts, costs = _attempts(make, edits, lm, task, rows, chosen, sampling, chunk_size, out)
        records = make_records(attempts, sampling | {"edits": finishing["edits"]}, task.name, select, chains, negatives)
        shared = drop_leaks(records, exam, max_overlap)
        drop_repeats(records, threshold, dedup)
        file = write_records(out, records, file_format)
        parameters = sampling | asked | finishing
        make_card(out, file, records, len(attempts), key=key, parameters=parameters, costs=costs, overlap=shared)
    write_aside(out, task.bad)
    return load_data(out)


def _attempts(
    make: Recipe,
    edits: Sequence[Edit],
    lm: "LM",
    task: "Task",
    rows: list[Row],
    chosen: Settings,
    sampling: dict[str, Any],
    size: int,
    out: Path,
) -> tuple[list[Attempt], dict[str, dict[str, float]]]:
    """The recipe's attempts after all edits, and what each step cost."""
    costs: dict[str, dict[str, float]] = {}
    name = sampling["recipe"]
    attempts, costs[name] = in_chunks(out, name, sampling, rows, lambda part: make(lm, task, part, chosen), size)
    for number, edit in enumerate(edits, start=1):
        step = described(edit) | {"model": plain(lm), "task": plain(task), "seed": chosen.seed}
        work = partial(edit, lm, task, settings=chosen)
        name = f"{number}-{step['name']}"
        attempts, costs[name] = in_chunks(out, name, step, attempts, work, size)
    return attempts, costs


def _sampling(make: Recipe, lm: "LM", task: "Task", settings: Settings) -> dict[str, Any]:
    """What the sampled text depends on besides the questions, as plain JSON values."""
    recipe = described(make)
    values = {"recipe": recipe.pop("name"), "task": task.name, "kind": task.kind, "model": plain(lm)}
    values |= asdict(settings)
    values.pop("batch_size")  # rows are independent of the batch around them, so it may change between two starts
    return json.loads(json.dumps(values | ({"own": recipe} if recipe else {})))


def _recipe(recipe: str | Recipe) -> Recipe:
    """A recipe by its name: a public function of one of the modules that hold recipes."""
    if not isinstance(recipe, str):
        return recipe
    names = {name: getattr(module, name) for module in (recipes, roles, questions, programs) for name in module.__all__}
    if recipe not in names:
        raise ValueError(f"recipe={recipe!r} is not known. Choose one of {', '.join(names)}, or pass a function.")
    return names[recipe]


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    names = [field.name for field in fields(Settings) if field.name not in ("strategy", "seed")]
    unknown = ", ".join(sorted(settings.keys() - set(names)))
    if unknown:
        raise ValueError(f"synthesize() got the unknown setting {unknown}. Settings are: {', '.join(names)}.")
    return settings


def _check_choices(**choices: tuple[str, Any]) -> None:
    for name, (value, allowed) in choices.items():
        if value not in get_args(allowed):
            raise ValueError(f"{name}={value!r} is not known. Choose one of {', '.join(get_args(allowed))}.")


def _check(make: Recipe, numbers: dict[str, int], settings: Settings, limit: float, negatives: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number} is too small: give 1 or more.")
    if negatives < 0:
        raise ValueError(f"negatives={negatives} is too small: give 0 for none, or how many wrong chains a question.")
    if not 0 <= limit <= 1:
        raise ValueError(f"max_overlap={limit} is no share: give a number from 0 to 1, such as 0.05.")
    if make is not recipes.oracle and settings.temperature == 0 and settings.samples > 1:
        raise ValueError(
            f"samples={settings.samples} with temperature=0 gives {settings.samples} equal answers a question. "
            "Pass samples=1, or a temperature such as 0.8."
        )


def _finished(out: Path, key: str) -> bool:
    if not (out / "card.json").exists():
        return False
    card = json.loads((out / "card.json").read_text(encoding="utf-8"))
    return card["key"] == key and (out / card["records"]["file"]).exists()
