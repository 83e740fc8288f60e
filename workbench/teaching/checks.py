"""Exercises that answer back: an answer beside what was expected, with a reason in words where they differ.

A blank answer is `...`, as the exercise cells leave it: it is told the hint and is no error, so a notebook with blank
answers runs to its end. What is expected is computed from the notebook's own results, so that it holds for any model.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

__all__ = ["Checked", "check", "check_prediction"]


@dataclass(frozen=True)
class Checked:
    """What was found: `right` is None while the answer is blank; shown as one line of text at the end of a cell."""

    right: bool | None
    said: str

    def __repr__(self) -> str:
        return self.said


def check(
    answer: Any,
    expected: Any,
    *,
    near: float = 0.0,
    because: str = "",
    wrong: Mapping[Any, str] | None = None,
    hint: str = "",
) -> Checked:
    """Whether an answer is right, and if not why.

    Args:
        answer: what the person gave; `...` is blank. Text is compared without case and outer spaces.
        expected: the right value; a set of values that are all right; or a function of the answer that returns True,
            or a sentence that says what is wrong with it. A function's own errors count as a wrong answer, with words.
        near: largest difference of a number that still counts as right.
        because: said with a right answer.
        wrong: reasons by wrong answers that people give.
        hint: said with a blank answer and with a wrong one that has no reason of its own.

    >>> check(..., 3, hint="count the layers")
    Not answered yet: put your answer in place of `...`. Hint: count the layers
    >>> check(0.52, 0.5, near=0.05, because="half of them")
    Right: half of them
    >>> check("last", "generated", wrong={"last": "that is one token only"})
    Not yet: that is one token only
    """
    if answer is ...:
        return Checked(
            None, "Not answered yet: put your answer in place of `...`." + (f" Hint: {hint}" if hint else "")
        )
    found, reason = _fits(answer, expected, near)
    if found:
        return Checked(True, f"Right: {because}" if because else "Right.")
    if wrong and not reason:
        reason = next((said for known, said in wrong.items() if _equal(answer, known, near)), "")
    if not reason:
        reason = f"{answer!r} is not it." + (f" Hint: {hint}" if hint else "")
    return Checked(False, f"Not yet: {reason}")


def check_prediction(guess: Any, measured: Any, *, near: float = 0.0, because: str = "") -> Checked:
    """A prediction made before a cell ran, beside what was then measured; neither is a fault.

    guess: `...` is none. measured: a set where several tie, any of which is met. near: largest difference of a number
    that counts as met. because: why it came out so.

    >>> check_prediction("middle", "early", because="the style is read at once")
    You said 'middle', measured was 'early': the style is read at once
    >>> check_prediction(0.5, 0.523, near=0.1)
    As you said: 0.523
    >>> check_prediction("star", {"star", "oracle"})
    As you said: 'oracle' or 'star'
    """
    shown = _shown(measured)
    reason = f": {because}" if because else ""
    if guess is ...:
        return Checked(None, f"No prediction made; measured was {shown}{reason}")
    if _fits(guess, measured, near)[0]:
        return Checked(True, f"As you said: {shown}{reason}")
    return Checked(False, f"You said {guess!r}, measured was {shown}{reason}")


def _shown(measured: Any) -> str:
    if isinstance(measured, set | frozenset):
        return " or ".join(sorted(_shown(one) for one in measured)) or "none"
    return f"{measured:.3g}" if isinstance(measured, float) else repr(measured)


def _fits(answer: Any, expected: Any, near: float) -> tuple[bool, str]:
    """Whether it is right, and a reason if a function gave one."""
    if callable(expected):
        return _judged(answer, expected)
    if isinstance(expected, set | frozenset) and not isinstance(answer, set | frozenset):
        return any(_equal(answer, one, near) for one in expected), ""
    return _equal(answer, expected, near), ""


def _judged(answer: Any, judge: Callable[[Any], Any]) -> tuple[bool, str]:
    try:
        found = judge(answer)
    except Exception as error:
        return False, f"looking at your answer raised {type(error).__name__}: {error}"
    if isinstance(found, str):
        return False, found
    return bool(found), ""


def _equal(a: Any, b: Any, near: float) -> bool:
    if isinstance(a, str) and isinstance(b, str):
        return a.strip().casefold() == b.strip().casefold()
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, Real) and isinstance(b, Real):
        return a == b or math.isclose(a, b, rel_tol=1e-9, abs_tol=near)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(one, other, near) for one, other in zip(a, b, strict=True))
    if isinstance(a, Iterable) and isinstance(b, Iterable) and type(a) is type(b):
        return bool(a == b)
    return type(a) is type(b) and bool(a == b)
