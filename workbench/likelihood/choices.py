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
from workbench.turns import in_turn

STYLES = ("text", "letter")
UNCONDITIONAL = "Answer:"


@dataclass(frozen=True)
class Choice:
    """One question: which option was chosen, and by how much.

    scores: of all options, normalised. margin: the right option's score minus the best other one's. confidence: share
    of the chosen option in a softmax over the options' summed log-probabilities. alone: what "unconditional" ran
    besides.
    """

    id: str
    prompt: str
    options: tuple[str, ...]
    gold: int
    chosen: int
    correct: bool
    scores: tuple[float, ...]
    margin: float
    confidence: float
    scored: tuple[Scored, ...]
    alone: tuple[Scored, ...] = ()


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


def is_lettered(row: Mapping[str, Any], options: Sequence[str]) -> bool:
    """Whether a row's gold answer is an option's letter, bare or in brackets, and not its text."""
    gold = str(row["answer"]).strip()
    letter = re.fullmatch(r"\(?([A-Z])\)?", gold)
    return letter is not None and ord(letter[1]) - 65 < len(options)


def gold_place(row: Mapping[str, Any], options: Sequence[str]) -> int:
    """Which option is right: by its letter, else by its text."""
    gold = str(row["answer"]).strip()
    if is_lettered(row, options):
        return ord(gold.strip("()")) - 65
    if gold in options:
        return list(options).index(gold)
    raise ModelError(f"Row {row.get('id')!r}: the answer {gold!r} is none of its {len(options)} options.")


def bare_question(row: Mapping[str, Any]) -> str:
    """A row's question without the list of its options.

    >>> bare_question({"question": "How many?\\nOptions:\\n(A) 1\\n(B) 2"})
    'How many?'
    """
    return str(row["question"]).partition("\nOptions:")[0]


@in_turn
def multiple_choice(
    lm: LM,
    rows: Sequence[Mapping[str, Any]],
    interventions: Intervention | Sequence[Intervention | None] | None = None,
    *,
    style: str = "text",
    normalisation: str = "sum",
    prompt: Callable[[Mapping[str, Any]], str] | None = None,
    unconditional: str = UNCONDITIONAL,
    special: bool | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Choice]:
    """Which option of each row the model holds most likely.

    style: "text" scores " TEXT" behind the bare question, "letter" scores " A", " B", ... behind the question with its
    options; " (A)", where the gold answer is written so. prompt: a row's context; None is "Question: ...", a line break
    and "Answer:". interventions: one for all rows, or one (or None) a row. normalisation: see
    `workbench.likelihood.normalised`; "unconditional" runs every option once more behind `unconditional`. special: see
    `loglikelihoods`. Options that are equal to 4 decimals are a tie, and the first wins.
    """
    if style not in STYLES:
        raise ModelError(f"style={style!r} is unknown. Allowed: {', '.join(STYLES)}.")
    check_normalisation(normalisation)
    options = [option_texts(row) for row in rows]
    golds = [gold_place(row, own) for row, own in zip(rows, options, strict=True)]
    said = options if style == "text" else [_letters(row, own) for row, own in zip(rows, options, strict=True)]
    contexts = [(prompt or (lambda row: _context(row, style)))(row) for row in rows]
    requests = [(context, f" {text}") for context, own in zip(contexts, said, strict=True) for text in own]
    changes = one_each(interventions, [len(own) for own in said])
    alone: list[Scored] = []
    if normalisation == "unconditional":
        bare = [(unconditional, text) for _, text in requests]
        alone = loglikelihoods(lm, bare, changes, special=special, batch_size=batch_size)
    scored = loglikelihoods(lm, requests, changes, special=special, batch_size=batch_size, progress=progress)
    found, start = [], 0
    for row, context, own, gold in zip(rows, contexts, said, golds, strict=True):
        place = slice(start, start := start + len(own))
        found.append(_choice(row, context, own, gold, normalisation, scored[place], alone[place]))
    return found


def one_each(interventions: Any, counts: Sequence[int]) -> Any:
    """Interventions of rows as those of their requests, `counts[i]` for row i; one for all stays."""
    if not isinstance(interventions, Sequence):
        return interventions
    if len(interventions) != len(counts):
        raise ModelError(f"{len(interventions)} interventions for {len(counts)} rows. Give one for all, or one a row.")
    return [x for x, count in zip(interventions, counts, strict=True) for _ in range(count)]


def _choice(
    row: Mapping[str, Any],
    context: str,
    options: Sequence[str],
    gold: int,
    how: str,
    scored: Sequence[Scored],
    alone: Sequence[Scored],
) -> Choice:
    free: Sequence[Scored | None] = alone or [None] * len(options)
    scores = [normalised(one, how, text, other) for one, text, other in zip(scored, options, free, strict=True)]
    chosen = best(scores)
    most = max(one.logprob for one in scored)
    shares = [math.exp(one.logprob - most) for one in scored]
    others = [score for place, score in enumerate(scores) if place != gold]
    return Choice(
        str(row.get("id", "")), context, tuple(options), gold, chosen, chosen == gold, tuple(scores),
        scores[gold] - max(others), shares[chosen] / sum(shares), tuple(scored), tuple(alone),
    )  # fmt: skip


def _letters(row: Mapping[str, Any], options: Sequence[str]) -> list[str]:
    form = "({})" if str(row["answer"]).strip().startswith("(") and is_lettered(row, options) else "{}"
    return [form.format(chr(65 + place)) for place in range(len(options))]


def _context(row: Mapping[str, Any], style: str) -> str:
    return f"Question: {bare_question(row) if style == 'text' else row['question']}\nAnswer:"
