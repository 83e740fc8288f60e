"""Look at the results after every question and stop when they suffice: bounds that stay valid however often one looks.

For each possible mean m a gambler bets on the next value being above or below m; a fair game cannot multiply the stake
by 1/alpha with a chance above alpha, *ever* (Ville's inequality). The wealth against the null is the e-value; the means
whose wealth is below 1/alpha are the confidence sequence. The stake is spread over fixed bet sizes, half on each side
("hedged grid Kelly": Waudby-Smith and Ramdas 2020, arXiv 2010.09686), so the order of the values does not matter, and
the bounds are an interval: wealth is log-convex in m. Values must lie in 0..1 and have one expectation given the past;
give one mean a cluster where questions share a passage. Not covered: unbounded values, and stopping for futility.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize
from scipy.special import logsumexp

from workbench.statistics.samples import StatisticsError, as_numbers, check_pairs, is_dichotomous, tail_share

BETS = np.linspace(0.02, 0.98, 24)  # shares of the most that can be bet; the best is about effect / variance


@dataclass(frozen=True)
class Sequential:
    """The values so far: estimate, limits and e-value that hold at every look, and whether they say stop.

    1 / e_value is a p-value that may be read after every question. `stop`: the null is excluded at the level, or the
    interval is as narrow as asked.
    """

    estimate: float
    low: float
    high: float
    e_value: float
    stop: bool
    n: int
    note: str = ""

    def __str__(self) -> str:
        return f"{self.estimate:.2f} [{self.low:.2f}, {self.high:.2f}]"


def sequential_mean(
    values: Sequence[float] | np.ndarray, null: float = 0.5, level: float = 0.95, width: float | None = None
) -> Sequential:
    """Bounds of the mean of values in 0..1 that hold at every look, and the e-value against `null`.

    width: stop also when high - low is at most this. Raises StatisticsError for values outside 0..1.

    >>> found = sequential_mean([True] * 37 + [False] * 3, null=0.7)
    >>> print(found, round(found.e_value, 1), found.stop)
    0.93 [0.74, 1.00] 81.9 True
    """
    numbers = as_numbers(values, "values")
    outside = (numbers < 0) | (numbers > 1)
    if outside.any():
        place = int(np.flatnonzero(outside)[0])
        raise StatisticsError(
            f"values[{place}] is {numbers[place]}: bets need values in 0..1; divide by the largest possible."
        )
    if not 0 < null < 1:
        raise StatisticsError(f"null is a mean strictly between 0 and 1; got {null}.")
    limit = -math.log(2 * tail_share(level))
    points, counts = np.unique(numbers, return_counts=True)
    low, high = _limits(counts, points, limit)
    gained = float(log_wealth(counts, points, null))
    narrow = width is not None and high - low <= width
    note = "all values are equal" if len(points) == 1 else ""
    e_value = math.exp(min(gained, 700.0))
    return Sequential(float(numbers.mean()), low, high, e_value, gained >= limit or narrow, len(numbers), note)


def sequential_difference(
    a: Sequence[Any], b: Sequence[Any], level: float = 0.95, width: float | None = None
) -> Sequential:
    """Paired difference b - a of right/wrong answers so far, with bounds that hold at every look, against 0.

    >>> found = sequential_difference([False] * 60, [True] * 12 + [False] * 48)
    >>> print(found, found.stop)
    0.20 [0.06, 0.39] True
    """
    for name, rows in (("a", a), ("b", b)):
        for place, value in enumerate(rows):
            if not is_dichotomous([value]):
                raise StatisticsError(
                    f"{name}[{place}] is {value!r}: right/wrong rows hold True or False (or 1 and 0)."
                )
    first, second = as_numbers(a, "a"), as_numbers(b, "b")
    check_pairs(first, second)
    found = sequential_mean((second - first + 1) / 2, 0.5, level, None if width is None else width / 2)
    note = "" if (first != second).any() else "no pair differs"
    low, high, mean = 2 * found.low - 1, 2 * found.high - 1, float((second - first).mean())
    return Sequential(mean, low, high, found.e_value, found.stop, found.n, note)


def log_wealth(counts: np.ndarray, points: np.ndarray, mean: float) -> np.ndarray:
    """Log of what the stake has become against `mean`, for counts [..., points] of each value in `points`."""
    up = np.log1p(BETS * (points[:, None] / mean - 1))
    down = np.log1p(BETS * ((1 - points[:, None]) / (1 - mean) - 1))
    return logsumexp(counts @ np.concatenate([up, down], axis=1), axis=-1) - math.log(2 * len(BETS))


def _limits(counts: np.ndarray, points: np.ndarray, limit: float) -> tuple[float, float]:
    """The two means at which the wealth reaches the limit; 0 or 1 where it never does."""
    estimate = float(counts @ points / counts.sum())
    tiny = 1e-9
    middle = min(max(estimate, tiny), 1 - tiny)

    def off(mean: float) -> float:
        return float(log_wealth(counts, points, mean)) - limit

    low = optimize.brentq(off, tiny, middle) if estimate > tiny and off(tiny) > 0 else 0.0
    high = optimize.brentq(off, middle, 1 - tiny) if estimate < 1 - tiny and off(1 - tiny) > 0 else 1.0
    return float(low), float(high)
