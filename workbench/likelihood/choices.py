"""Multiple choice by log-likelihood: the options of a task's questions scored, one choice a question.

Two styles: the option's text continues the question (cloze), or its letter does, with the options listed. Does not
read answers out of generated text (`workbench.evaluation`).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.interventions.concept import Intervention
from workbench.likelihood.normalising import best, check_normalisation, normalised
from workbench.likelihood.scoring import Scored, loglikelihoods
from workbench.models import LM, ModelError

STYLES = ("text", "letter")
UNCONDITIONAL = "Answer:"


@dataclass(frozen=True)
class Choice:
    """One question: which option was chosen, and by how much.

    scores: of all options, normalised. margin: the right option's score minus the best other one's. confidence: share
    of the chosen option in a softmax over the options' summed log-probabilities.
    """

    id: str
    options: tuple[str, ...]
    gold: int
    chosen: int
    correct: bool
    scores: tuple[float, ...]
    margin: float
    confidence: float
    scored: tuple[Scored, ...]


def option_texts(row: Mapping[str, Any]) -> list[str]:
    """The options of a row without their letters.

    >>> option_texts({"options": ["(A) 12", "(B) 14"]})
    ['12', '14']
    """
    if isinstance(row.get("option_texts"), list):
        return list(row["option_texts"])
    listed = row.get("options")
    if isinstance(listed, str) or listed is None:
        listed = re.findall(r"^\([A-Z]\) .+$", str(row.get("question", "")), flags=re.MULTILINE)
    found = [re.sub(r"^\([A-Z]\)\s*", "", str(option)).strip() for option in listed]
    if len(found) < 2:
        raise ModelError(
            f"Row {row.get('id')!r} has no options to choose from. A row needs options=[...], as those of "
            "load_task('aqua'), or a question that lists them as lines '(A) ...'."
        )
    return found


def gold_place(row: Mapping[str, Any], options: Sequence[str]) -> int:
    """Which option is right: by its letter, else by its text."""
    gold = str(row["answer"]).strip()
    letter = re.fullmatch(r"\(?([A-Z])\)?", gold)
    if gold in options and not (letter and len(options) > ord(letter[1]) - 65 >= 0):
        return list(options).index(gold)
    if letter and ord(letter[1]) - 65 < len(options):
        return ord(letter[1]) - 65
    raise ModelError(f"Row {row.get('id')!r}: the answer {gold!r} is none of its {len(options)} options.")


def multiple_choice(
    lm: LM,
    rows: Sequence[Mapping[str, Any]],
    interventions: Intervention | Sequence[Intervention | None] | None = None,
    *,
    style: str = "text",
    normalisation: str = "sum",
    prompt: Callable[[Mapping[str, Any]], str] | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Choice]:
    """Which option of each row the model holds most likely.

    style: "text" scores " TEXT" behind the bare question, "letter" scores " A", " B", ... behind the question with its
    options. prompt: a row's context; None is "Question: ...", a line break and "Answer:". interventions: one for all
    rows, or one (or None) a row. normalisation: see `workbench.likelihood.normalised`; "unconditional" runs every
    option once more behind "Answer:". Options that are equal to 4 decimals are a tie, and the first wins.
    """
    if style not in STYLES:
        raise ModelError(f"style={style!r} is unknown. Allowed: {', '.join(STYLES)}.")
    check_normalisation(normalisation)
    options = [option_texts(row) for row in rows]
    golds = [gold_place(row, own) for row, own in zip(rows, options, strict=True)]
    context = prompt or (lambda row: _context(row, style))
    said = [own if style == "text" else [chr(65 + place) for place in range(len(own))] for own in options]
    requests = [(context(row), f" {text}") for row, own in zip(rows, said, strict=True) for text in own]
    if isinstance(interventions, Sequence):
        if len(interventions) != len(rows):
            raise ModelError(
                f"{len(interventions)} interventions for {len(rows)} rows. Give one for all, or one a row."
            )
        changes: Any = [x for x, own in zip(interventions, said, strict=True) for _ in own]
    else:
        changes = interventions
    free: list[Scored | None] = [None] * len(requests)
    if normalisation == "unconditional":
        bare = [(UNCONDITIONAL, text) for _, text in requests]
        free = [*loglikelihoods(lm, bare, changes, batch_size=batch_size)]
    scored = loglikelihoods(lm, requests, changes, batch_size=batch_size, progress=progress)
    found, start = [], 0
    for row, own, gold in zip(rows, said, golds, strict=True):
        place = slice(start, start := start + len(own))
        parts = zip(scored[place], [normalisation] * len(own), own, free[place], strict=True)
        scores = [normalised(*each) for each in parts]
        found.append(_choice(row, own, gold, scores, scored[place]))
    return found


def _choice(
    row: Mapping[str, Any], options: Sequence[str], gold: int, scores: Sequence[float], scored: Sequence[Scored]
) -> Choice:
    chosen = best(scores)
    most = max(one.logprob for one in scored)
    shares = [math.exp(one.logprob - most) for one in scored]
    others = [score for place, score in enumerate(scores) if place != gold]
    return Choice(
        str(row.get("id", "")), tuple(options), gold, chosen, chosen == gold, tuple(scores),
        scores[gold] - max(others), shares[chosen] / sum(shares), tuple(scored),
    )  # fmt: skip


def _context(row: Mapping[str, Any], style: str) -> str:
    question = str(row["question"])
    return f"Question: {question.partition(chr(10) + 'Options:')[0] if style == 'text' else question}\nAnswer:"
