"""Sums in a written answer that don't hold, for reading what a verifier of final answers alone can't see.

Two numbers a sum, as in "3+4=7"; longer sums, and words, are passed over. Division is exact: "7/2=3" does not hold.
"""

import re
from fractions import Fraction

__all__ = ["false_sums"]

_NUMBER = r"\d+(?:\.\d+)?"
_SUM = re.compile(rf"(?<![\d.*/+-])({_NUMBER}) ?([-+*/]) ?({_NUMBER}) ?= ?(-?{_NUMBER})")


def false_sums(text: str) -> list[str]:
    """The sums of two numbers in a text that don't hold, in order.

    >>> false_sums("10*2=20. 20-31=1. 1+4=5. 9/2=4. The answer is 5.")
    ['20-31=1', '9/2=4']
    """
    return [f"{a}{sign}{b}={c}" for a, sign, b, c in _SUM.findall(text) if not _holds(a, sign, b, c)]


def _holds(a: str, sign: str, b: str, c: str) -> bool:
    first, second, result = Fraction(a), Fraction(b), Fraction(c)
    if sign == "/":
        return second != 0 and first / second == result
    return {"+": first + second, "-": first - second, "*": first * second}[sign] == result
