r"""Verifiers: whether the answer that a text gives is the gold answer, by kind of answer.

`verify` reads the answer (`answers`) and compares: numbers as numbers, lists of numbers in order, option letters,
text after normalising, LaTeX by math-verify in a process that can be killed (`latex`). No answer found is *unparsed*,
`Verdict.extracted` None, which is not the same as wrong.

An order and a span of text (`credit`) also have a score for what is right in part.

Does not cover: running model-written code (kind "code" needs its row's tests: `unit_tests`), judging by another model.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from workbench.tasks import credit
from workbench.tasks.answers import KINDS, LONGEST, READERS, normalise, numbers, read
from workbench.tasks.latex import same

__all__ = ["KINDS", "Verdict", "extract", "verify", "verify_many"]


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and what was read as the answer; None means that nothing could be read.

    score: how much of it is right, 0 to 1, for the kinds that know partial credit; None for all others.
    """

    correct: bool
    extracted: str | None
    score: float | None = field(default=None, repr=False)

    @property
    def unparsed(self) -> bool:
        """True when no answer was found, which is not the same as a wrong one."""
        return self.extracted is None


def verify(kind: str, gold: Any, text: str) -> Verdict:
    r"""Judge a text against the gold answer.

    Raises:
        ValueError: kind "code" or unknown, or a gold answer that isn't of its kind.

    >>> verify("number", 1234, r"It is \boxed{\$1{,}234.00}"), verify("list", "3, 7", "The answer is 7, 3.").correct
    (Verdict(correct=True, extracted='1234'), False)
    """
    if kind == "ordering":
        order, score = credit.ordering(gold, text)
        right = order is not None and order == credit.gold_items(gold)
        return Verdict(right, ", ".join(order) if order else None, score)
    if kind == "span":
        said, right, score = credit.span(gold, text)
        return Verdict(right, said, score)
    extracted = extract(kind, text, gold)
    if extracted is None:
        return Verdict(False, None)
    if kind == "number":
        return Verdict(_equal(_only_number(gold), extracted), extracted)
    if kind == "latex":
        return Verdict(same(str(gold), extracted), extracted)
    if kind == "option":
        return Verdict(str(gold).strip("() .").upper() == extracted, extracted)
    if kind == "text":
        return Verdict(normalise(str(gold)) == normalise(extracted), extracted)
    wanted = [
        _only_number(item) for item in (gold if isinstance(gold, list | tuple) else str(gold).strip("[] ").split(","))
    ]
    given = extracted.split(", ")
    return Verdict(len(given) == len(wanted) and all(map(_equal, wanted, given)), extracted)


def extract(kind: str, text: str, gold: Any = "") -> str | None:
    """The answer that a text gives, in canonical form, or None.

    Args:
        kind: one of `KINDS` but "code".
        gold: only its *form* is used, by kind "text" (a gold answer "Yes" says that answers are yes or no) and by
            "ordering" (its items are those that an order must name).

    >>> extract("number", "16 - 3 - 4 = 9 eggs, so 9 * 2 = $18 a day.\\n#### 18"), extract("option", "I don't know.")
    ('18', None)
    """
    if kind == "ordering":
        order, _ = credit.ordering(gold, text)
        return ", ".join(order) if order else None
    if kind == "span":
        return credit.span(gold, text)[0]
    if kind not in ("text", *READERS):
        raise ValueError(_no_reader(kind))
    return read(kind, text, gold)


def verify_many(kind: str, golds: Iterable[Any], texts: Iterable[str]) -> list[Verdict]:
    """`verify` for many answers, in order."""
    return [verify(kind, gold, text) for gold, text in zip(golds, texts, strict=True)]


def _no_reader(kind: str) -> str:
    if kind == "code":
        return (
            "Answers of kind 'code' are judged by the unit tests of their question, run in a sandbox, so a gold answer "
            "alone is not enough. Next: task.verify(row, text), with a row that has entry_point and test."
        )
    return f"No verifier reads answers of kind {kind!r}. Kinds: {', '.join(KINDS)}."


def _only_number(gold: Any) -> str:
    found = numbers(str(gold))
    if len(found) != 1:
        raise ValueError(
            f"The gold answer {gold!r} is not one number. Give the task's kind: load_task(..., kind='text')."
        )
    return found[0]


def _equal(gold: str, given: str) -> bool:
    """Exact for whole numbers; within 1e-9 of the gold value where a decimal or a fraction is involved."""
    if max(len(gold), len(given)) > LONGEST:
        return gold == given
    a, b = Fraction(gold), Fraction(given)
    return a == b or (a.denominator, b.denominator) != (1, 1) and abs(a - b) <= abs(a) * Fraction(1, 10**9)
