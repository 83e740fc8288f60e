"""Foreign rows as `Results`: right or wrong read strictly, repeated questions dealt with, what is missing written down.

A result file of another tool says less than `evaluate`: tokens and seconds that it lacks are nan in the rows, which
tables show as –, and `results.about["foreign"]` names the columns that it lacks altogether.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import pandas as pd

from workbench.results import Results, shows_steps

Repeats = Literal["refuse", "first", "majority", "keep"]
Line = dict[str, Any]
COSTS = ("tokens_in", "tokens_out", "seconds", "forward_passes")
COLUMNS: dict[str, Any] = {"prompt": "", "output": "", "answer": "", **dict.fromkeys(COSTS, math.nan)}
_WORDS = {
    "true": True, "yes": True, "c": True, "correct": True, "right": True, "1": True, "1.0": True, "pass": True,
    "false": False, "no": False, "i": False, "n": False, "incorrect": False, "wrong": False, "0": False, "0.0": False,
    "fail": False,
}  # fmt: skip


def as_right(value: Any, where: str, threshold: float | None = None) -> bool:
    """Whether a foreign score means right; a number between 0 and 1 needs a `threshold`, and other values an error.

    >>> [as_right(value, "row 1") for value in (True, 1.0, "C", "false", 0)]
    [True, True, True, False, False]
    """
    if isinstance(value, str) and value.strip().lower() in _WORDS:
        return _WORDS[value.strip().lower()]
    number = _number(value)
    if number is not None and threshold is not None:
        return number >= threshold
    if number in (0.0, 1.0):
        return number == 1.0
    raise ValueError(
        f"{where}: {value!r} is neither right nor wrong. Values may be true/false, 1/0, C/I; for a score with values "
        "between, say from where it counts as right: threshold=0.5. Another column: correct='NAME' (tables) or "
        "score='NAME' (logs, samples)."
    )


def assembled(
    lines: Sequence[Line], repeats: Repeats, source: str, task: str, costs: Mapping[str, Mapping[str, float]],
    about: Mapping[str, Any],
) -> Results:  # fmt: skip
    """Results of lines that hold id, condition, correct and what else the source gave.

    repeats: what to do where a condition answers a question several times: 'refuse' (the default of all readers),
    'first', 'majority' (right when more than half are; the first such answer stands) or 'keep' (an `epoch` column).
    Lines that are equal in everything are dropped and counted by the first two, and are answers of their own to the
    other two.
    """
    if repeats not in get_args(Repeats):
        raise ValueError(f"repeats={repeats!r} is not known. Use one of: {', '.join(get_args(Repeats))}.")
    if not lines:
        raise ValueError(f"{source} holds no answers. Give a file with one row an answered question.")
    # where repeats count, equal answers are votes and not a file joined twice
    unique, copies = (list(lines), 0) if repeats in ("majority", "keep") else _without_copies(lines)
    kept = _one_a_question(unique, repeats, source)
    missing = [name for name in COLUMNS if not any(name in line for line in kept)]
    rows = []
    for line in kept:
        filled = {**COLUMNS, "extracted": None, "task": task, **{k: v for k, v in line.items() if v is not None}}
        filled |= {"id": str(line["id"]), "correct": bool(line["correct"])}
        filled.setdefault("unparsed", False)
        filled.setdefault("steps", shows_steps(str(filled["output"])))
        rows.append(filled)
    table = pd.DataFrame(rows)
    table["extracted"] = pd.Series([row["extracted"] for row in rows], dtype=object)
    names = list(dict.fromkeys(line["condition"] for line in kept))
    nothing = {"seconds": math.nan, "peak_memory_mb": math.nan, "model_calls": math.nan}
    foreign = {"source": source, "missing": missing, "copies_dropped": copies, "repeats": repeats}
    asked = {"task": task, "n": int(table.id.nunique()), **about, "foreign": dict.fromkeys(names, foreign)}
    return Results(table, {name: {**nothing, **costs.get(name, {})} for name in names}, asked)


def pick(names: Sequence[str], wanted: Sequence[str], given: str | None, what: str, source: str) -> str:
    """The column `given`, or the first of `wanted` that is there; an error lists what is there."""
    if given is not None and given in names:
        return given
    lowered = {name.lower(): name for name in reversed(names)}
    found = next((lowered[name] for name in wanted if name in lowered), None) if given is None else None
    if found is None:
        asked = f"no {given!r}" if given is not None else f"none of {', '.join(wanted)}"
        raise ValueError(
            f"{source} has {asked} to take {what} from. It has: {', '.join(names) or 'nothing'}. Name one."
        )
    return found


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _without_copies(lines: Sequence[Line]) -> tuple[list[Line], int]:
    """Lines that differ in something, and how many exact copies were left out (files joined twice)."""
    seen: dict[str, Line] = {}
    for line in lines:
        seen.setdefault(repr(sorted(line.items(), key=lambda item: item[0])), line)
    return list(seen.values()), len(lines) - len(seen)


def _one_a_question(lines: Sequence[Line], repeats: Repeats, source: str) -> list[Line]:
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["condition"], str(line["id"])), []).append(line)
    several = [key for key, group in groups.items() if len(group) > 1]
    if several and repeats == "refuse":
        condition, key = several[0]
        raise ValueError(
            f"{source}: {len(several)} questions are answered more than once, for example {key!r} "
            f"({len(groups[several[0]])} times by {condition!r}). Choose repeats='first', 'majority' or 'keep'."
        )
    if repeats == "keep":
        return [{"epoch": place, **line} for group in groups.values() for place, line in enumerate(group, start=1)]
    if repeats == "majority":
        return [_majority(group) for group in groups.values()]
    return [{key: value for key, value in group[0].items() if key != "epoch"} for group in groups.values()]


def _majority(group: list[Line]) -> Line:
    right = 2 * sum(line["correct"] for line in group) > len(group)
    chosen = next(line for line in group if line["correct"] == right)
    return {key: value for key, value in chosen.items() if key != "epoch"}
