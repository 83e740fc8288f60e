"""Say how sure a number is: intervals, paired tests, correction for many tests, and the smallest effect n could see.

Everything here compares conditions on the *same* questions, because pairing removes the difficulty of the questions
from the noise (Miller 2024, arXiv 2411.00640). Not covered: models of several sources of variation, Bayesian estimates,
and sequential testing; a p-value read after every batch of questions is no p-value.
Leans on numpy and scipy; the tests hold the results against statsmodels.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

from workbench.statistics.power import mcnemar_power, minimum_detectable_effect
from workbench.statistics.samples import (
    StatisticsError,
    as_booleans,
    as_numbers,
    check_pairs,
    cluster_totals,
    is_dichotomous,
    tail_share,
)

__all__ = [
    "Comparison",
    "Interval",
    "McNemar",
    "StatisticsError",
    "bootstrap_mean",
    "holm",
    "mcnemar_exact",
    "mcnemar_power",
    "minimum_detectable_effect",
    "paired_bootstrap",
    "paired_difference",
    "tango",
    "wilson",
]

CHUNK = 2_000_000  # resampled indices held at once: 16 MB, so that 10,000 resamples of 5,000 rows do not need 400 MB


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence limits, in the unit of the data; `note` says when the limits need a caution."""

    estimate: float
    low: float
    high: float
    n: int
    note: str = ""

    def __str__(self) -> str:
        return f"{self.estimate:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class McNemar:
    """Two-sided exact p-value, and how many pairs only the first (`only_a`) or only the second (`only_b`) got right."""

    p_value: float
    only_a: int
    only_b: int
    n: int


@dataclass(frozen=True)
class Comparison:
    """A paired difference b - a in the unit of the data; `discordant` counts the pairs that differ."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int
    discordant: int
    method: str = ""
    note: str = ""


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Score interval of a proportion; stays inside 0..1 and keeps a width at 0 of n and n of n.

    Source: Wilson 1927, JASA 22:209-212; recommended for small n by Brown, Cai and DasGupta 2001.

    >>> print(wilson(43, 100))
    0.43 [0.34, 0.53]
    >>> print(wilson(0, 20))
    0.00 [0.00, 0.16]
    """
    if n < 1 or not 0 <= successes <= n or successes != int(successes):
        raise StatisticsError(f"wilson needs whole successes between 0 and n, and n >= 1; got {successes} of {n}.")
    z2 = _z(level) ** 2
    share = successes / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * n)) / n) / (1 + z2 / n)
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high, n)


def mcnemar_exact(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """Exact McNemar test of paired right/wrong answers: a sign test on the pairs in which exactly one is right.

    Source: McNemar 1947, Psychometrika 12:153-157; binomial form, statsmodels' `mcnemar(exact=True)`.

    >>> mcnemar_exact([True, False, False, False], [True, True, True, True])
    McNemar(p_value=0.25, only_a=0, only_b=3, n=4)
    """
    first, second = as_booleans(a, "a"), as_booleans(b, "b")
    check_pairs(first, second)
    only_a, only_b = int((first & ~second).sum()), int((~first & second).sum())
    tail = float(stats.binom.cdf(min(only_a, only_b), only_a + only_b, 0.5))
    return McNemar(min(1.0, 2 * tail), only_a, only_b, len(first))


def paired_bootstrap(
    a: Sequence[float],
    b: Sequence[float],
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Percentile bootstrap of the mean of b - a over questions, or over whole `clusters` of related questions.

    Rows that share a passage or template belong to one cluster; treating them as independent can make the interval
    three times too narrow (Miller 2024, arXiv 2411.00640). Source: Efron and Tibshirani 1993, chapter 13.

    >>> print(paired_bootstrap([1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 5.0, 5.0]))
    1.00 [0.25, 1.75]
    """
    first, second = as_numbers(a, "a"), as_numbers(b, "b")
    check_pairs(first, second)
    return bootstrap_mean(second - first, resamples, seed, level, clusters)


def bootstrap_mean(
    values: Sequence[float] | np.ndarray,
    resamples: int = 10_000,
    seed: int = 0,
    level: float = 0.95,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Percentile bootstrap of the mean of a continuous measure (tokens, seconds), in the measure's unit.

    With fewer than about 20 values the interval is somewhat too narrow. Equal values give no width, one value gives
    limits of nan, and both say so in `note`.

    >>> print(bootstrap_mean([10.0, 12.0, 14.0, 30.0]))
    16.50 [11.00, 25.50]
    """
    sums, sizes = cluster_totals(as_numbers(values, "values"), clusters)
    mean, n, k = float(sums.sum() / sizes.sum()), int(sizes.sum()), len(sums)
    tail = 100 * tail_share(level)
    if k == 1:
        return Interval(mean, math.nan, math.nan, n, "one independent value: its spread cannot be known")
    if np.ptp(sums / sizes) == 0:
        return Interval(mean, mean, mean, n, "all values are equal: no width means no spread seen, not certainty")
    rng = np.random.default_rng(seed)
    means = []
    for size in _chunks(resamples, k):
        picked = rng.integers(0, k, size=(size, k))
        means.append(sums[picked].sum(axis=1) / sizes[picked].sum(axis=1))
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Interval(mean, float(low), float(high), n)


def paired_difference(
    a: Sequence[Any],
    b: Sequence[Any],
    level: float = 0.95,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Comparison:
    """Compare two conditions on the same questions, row i of `a` beside row i of `b`: b - a, interval, p-value.

    Right/wrong rows: exact McNemar test and Tango's score interval, which keeps its width when no pair differs. The
    exact test is the more careful of the two: near p = 0.05 an interval may exclude 0 while p is above 0.05.
    Numbers, or any rows with `clusters`: bootstrap interval and sign-flip permutation test, 10,000 draws each.

    Source: Tango 1998, Statistics in Medicine 17:891-908; Fagerland et al. 2014, Statistics in Medicine 33:2850-2875.

    >>> c = paired_difference([True, False] * 10, [True] * 20)
    >>> round(c.difference, 2), round(c.low, 2), round(c.high, 2), round(c.p_value, 4), c.n, c.discordant
    (0.5, 0.26, 0.7, 0.002, 20, 10)
    """
    proportions = is_dichotomous(a) and is_dichotomous(b)
    first, second = as_numbers(a, "a"), as_numbers(b, "b")
    check_pairs(first, second)
    difference = second - first
    discordant = int(np.count_nonzero(difference))
    if proportions and clusters is None:
        test = mcnemar_exact(a, b)
        low, high = tango(test.only_a, test.only_b, test.n, level)
        method = "exact McNemar test, Tango score interval"
        note = "" if discordant else "no pair differs: the interval rests on n alone"
        return Comparison(float(difference.mean()), low, high, test.p_value, test.n, discordant, method, note)
    interval = bootstrap_mean(difference, seed=seed, level=level, clusters=clusters)
    low, high, note = interval.low, interval.high, interval.note
    if proportions and not discordant:
        independent = len(cluster_totals(difference, clusters)[0])
        low, high = tango(0, 0, independent, level)
        note = f"no pair differs: score interval over {independent} clusters"
    p_value = _sign_flip(cluster_totals(difference, clusters)[0], seed=seed)
    method = "sign-flip permutation test, bootstrap interval" + (" over clusters" if clusters is not None else "")
    return Comparison(interval.estimate, low, high, p_value, interval.n, discordant, method, note)


def tango(only_a: int, only_b: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score limits of the paired difference of proportions (b - a) from the two discordant counts and n.

    The limits are the differences that a score test, with the other probability re-estimated under that difference,
    just fails to reject. Source: Tango 1998, Statistics in Medicine 17:891-908, equations 10-12.

    >>> [round(x, 3) for x in tango(7, 1, 21)]
    [-0.517, -0.026]
    """
    if n < 1 or min(only_a, only_b) < 0 or only_a + only_b > n:
        raise StatisticsError(f"tango needs counts >= 0 with only_a + only_b <= n; got {only_a}, {only_b}, n = {n}.")
    z, estimate = _z(level), (only_b - only_a) / n

    def score(delta: float) -> float:
        linear = (2 * n - only_b + only_a) * delta - only_a - only_b
        root = math.sqrt(max(0.0, linear * linear + 8 * n * only_a * delta * (1 - delta)))
        nuisance = (root - linear) / (4 * n)
        variance = n * (2 * nuisance + delta * (1 - delta))
        distance = only_b - only_a - n * delta
        if variance <= 0:
            return 0.0 if distance == 0 else math.copysign(math.inf, distance)
        return distance / math.sqrt(variance)

    def solve(target: float, low: float, high: float) -> float:
        def off(delta: float) -> float:
            return max(-1e9, min(score(delta), 1e9)) - target  # root finders take no infinity

        return float(optimize.root_scalar(off, bracket=(low, high), method="brentq", xtol=1e-12).root)

    low = -1.0 if estimate == -1 else solve(z, -1.0, estimate)
    high = 1.0 if estimate == 1 else solve(-z, estimate, 1.0)
    return low, high


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust a family of p-values so that the chance of *any* false claim stays below the level; keeps the order given.

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65-70.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p = as_numbers(p_values, "p_values")
    if ((p < 0) | (p > 1)).any():
        raise StatisticsError(f"p-values lie between 0 and 1; got {p[(p < 0) | (p > 1)][0]}.")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1.0, stepped)
    return adjusted.tolist()


def _z(level: float) -> float:
    return float(stats.norm.isf(tail_share(level)))


def _chunks(resamples: int, width: int) -> list[int]:
    if resamples < 1:
        raise StatisticsError(f"resamples is a whole number >= 1, e.g. 10000; got {resamples}.")
    step = max(1, CHUNK // width)
    return [min(step, resamples - start) for start in range(0, resamples, step)]


def _sign_flip(sums: np.ndarray, seed: int, resamples: int = 10_000) -> float:
    """Two-sided p-value of a mean of 0 when every difference could as well have had the other sign."""
    rng, observed, reached = np.random.default_rng(seed), abs(sums.sum()), 0
    for size in _chunks(resamples, len(sums)):
        signs = rng.integers(0, 2, size=(size, len(sums))) * 2 - 1
        reached += int((np.abs(signs @ sums) >= observed - 1e-12 * max(1.0, observed)).sum())
    return (reached + 1) / (resamples + 1)  # counts the data itself as one draw: never 0 (Phipson and Smyth 2010)
