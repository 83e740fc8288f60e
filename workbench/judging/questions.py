"""Whose answers to which questions are put side by side: two conditions of `Results`, matched by question.

The question's own text comes from the caller, from a `question` column, or else from the prompt.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.results import Results

if TYPE_CHECKING:
    from workbench.tasks import Task

_MARK = re.compile(r"<\|[^|<>]*\|>")


@dataclass(frozen=True)
class Duel:
    """One question with the answers of two conditions; `right_a` and `right_b` are the verifier's."""

    id: str
    question: str
    text_a: str
    text_b: str
    right_a: bool
    right_b: bool


def duels(
    results: Results, a: str, b: str, questions: "Mapping[str, str] | Task | None", n: int | None, seed: int
) -> list[Duel]:
    """All questions that both conditions answered (or n drawn by `seed`), in the order of condition `a`.

    Raises ValueError for unknown or equal conditions, repeated questions, questions that one condition lacks, or n
    out of range.
    """
    if a == b:
        raise ValueError(f"Both conditions are {a!r}. Name two of: {', '.join(results.conditions)}.")
    sides = [_side(results, name) for name in (a, b)]
    first, second = sides
    if set(first.index) != set(second.index):
        alone = [*first.index.difference(second.index)[:3], *second.index.difference(first.index)[:3]]
        raise ValueError(
            f"{a!r} and {b!r} do not answer the same questions: {len(first.index.intersection(second.index))} shared, "
            f"{len(first)} and {len(second)} in all; alone stand for example {', '.join(map(str, alone))}."
        )
    texts = question_texts(results, questions)
    other = {str(row.id): row for row in second.reset_index().itertuples()}
    found = []
    for row in first.reset_index().itertuples():
        key = str(row.id)
        beside = other[key]
        answers = (str(row.output), str(beside.output), bool(row.correct), bool(beside.correct))
        found.append(Duel(key, texts[key], *answers))
    if n is None:
        return found
    if not 1 <= n <= len(found):
        raise ValueError(f"n={n} is out of range: there are {len(found)} questions. Give 1 to {len(found)}, or None.")
    chosen = set(Random(f"duels/{seed}").sample(range(len(found)), n))
    return [duel for place, duel in enumerate(found) if place in chosen]


def question_texts(results: Results, questions: "Mapping[str, str] | Task | None" = None) -> dict[str, str]:
    """Question by id: from `questions` (a mapping, or the task), a `question` column, or the shortest prompt."""
    rows = results.rows
    ids = [str(key) for key in rows.id.unique()]
    if questions is None and "question" in rows:
        given: Mapping[str, str] = dict(zip(rows.id.astype(str), rows.question, strict=True))
    elif questions is None:
        prompts: dict[str, str] = {}
        for key, prompt in zip(rows.id.astype(str), rows.prompt.astype(str), strict=True):
            if key not in prompts or len(prompt) < len(prompts[key]):
                prompts[key] = prompt  # conditions may put examples before the question
        return {key: _MARK.sub(" ", prompt).strip() for key, prompt in prompts.items()}
    elif isinstance(questions, Mapping):
        given = questions
    else:
        about: dict[str, Any] = results.about
        asked = questions.rows(about.get("split", "test"), n=about.get("n"), seed=about.get("seed", 0))
        given = {str(row["id"]): row["question"] for row in asked}
    missing = [key for key in ids if not isinstance(given.get(key), str)]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(ids)} questions have no text, for example {missing[0]!r}. Give questions= as a "
            "mapping from id to text, or the task that was evaluated."
        )
    return {key: given[key] for key in ids}


def _side(results: Results, condition: str) -> pd.DataFrame:
    if condition not in results.conditions:
        raise ValueError(f"No condition {condition!r} in these results. Conditions: {', '.join(results.conditions)}.")
    side = results.rows[results.rows.condition == condition].set_index("id")
    if not side.index.is_unique:
        twice = side.index[side.index.duplicated()][0]
        raise ValueError(
            f"Condition {condition!r} answers question {twice!r} more than once. Keep one answer a question first."
        )
    return side
