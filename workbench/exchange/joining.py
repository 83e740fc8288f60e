"""Results of several sources on the same questions, as one `Results` whose comparisons are paired."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd

from workbench.judging.questions import question_texts
from workbench.results import Results

if TYPE_CHECKING:
    from workbench.tasks import Task


def joined(
    results: Results,
    *others: Results,
    on: str = "id",
    shared_only: bool = False,
    questions: "Mapping[str, str] | Task | None" = None,
) -> Results:
    """The conditions of all, on the same questions; `compare` then pairs an own run with a foreign file.

    Args:
        others: each with conditions of other names than those before it.
        on: 'id', or 'question' where sources number the same questions differently: their texts are compared without
            regard to spacing and case, and the ids of `results` are taken over.
        shared_only: keep the questions that all have, and count the others in `about["left_out"]`; without it, any
            difference is an error.
        questions: with on='question', the texts of `results`, see `judging.questions`.

    Raises ValueError for names that occur twice, repeated questions, and questions that differ, with examples.
    """
    if on not in ("id", "question"):
        raise ValueError(f"on={on!r} is not known. Use 'id' or 'question'.")
    if not others:
        raise ValueError("There is nothing to join. Give one Results more: joined(results, other).")
    parts = [results.rows.assign(id=results.rows.id.astype(str))]
    costs, about = dict(results.costs), dict(results.about)
    key_of = _by_text(results, questions) if on == "question" else {}
    for other in others:
        twice = sorted(costs.keys() & other.costs.keys())
        if twice:
            raise ValueError(f"Both have a condition {twice[0]!r}. Read the file with another name: condition='NAME'.")
        rows = other.rows.assign(id=other.rows.id.astype(str))
        parts.append(rows.assign(id=_own_ids(other, key_of)) if on == "question" else rows)
        costs |= other.costs
        foreign = {**about.get("foreign", {}), **other.about.get("foreign", {})}
        about |= {"foreign": foreign} if foreign else {}
    sets = {name: set(part.id[part.condition == name]) for part in parts for name in part.condition.unique()}
    shared = set.intersection(*sets.values())
    _check_questions(sets, shared, shared_only)
    table = pd.concat([part[part.id.isin(shared)] for part in parts], ignore_index=True)
    for name in table.columns[[dtype == "object" for dtype in table.dtypes]]:
        table[name] = pd.Series(table[name].where(table[name].notna(), None), dtype=object)
    left_out = {name: len(ids - shared) for name, ids in sets.items() if ids - shared}
    about |= {"n": len(shared)} | ({"left_out": left_out} if left_out else {})
    return Results(table, costs, about)


def _check_questions(sets: Mapping[str, set[str]], shared: set[str], shared_only: bool) -> None:
    alone = {name: sorted(ids - shared) for name, ids in sets.items() if ids - shared}
    if not shared or (alone and not shared_only):
        examples = "; ".join(f"{name!r} alone has {len(ids)}, as {', '.join(ids[:3])}" for name, ids in alone.items())
        hint = (
            "Keep those that all have: shared_only=True."
            if shared
            else "If they only differ in their ids: on='question'."
        )
        raise ValueError(f"The questions differ: {len(shared)} are shared by all conditions; {examples}. {hint}")


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().casefold()


def _by_text(results: Results, questions: "Mapping[str, str] | Task | None") -> dict[str, str]:
    texts = question_texts(results, questions)
    found = {_plain(text): key for key, text in texts.items()}
    if len(found) < len(texts):
        raise ValueError(f"{len(texts) - len(found)} questions have the text of another one. Join by on='id'.")
    return found


def _own_ids(other: Results, key_of: Mapping[str, str]) -> pd.Series:
    texts = question_texts(other)
    own = {key: key_of.get(_plain(text), f"{key} (no such text)") for key, text in texts.items()}
    if len(set(own.values())) < len(own):
        raise ValueError("Two ids of one file have the same question text. Join by on='id', or remove the repeats.")
    return other.rows.id.astype(str).map(own)
