"""Compare two conditions on the same questions: McNemar's test of right and wrong, and the paired difference of
anything.

Pairing removes the difficulty of the questions from the noise (Miller 2024, arXiv 2411.00640). Not covered: several
seeds a question (`crossed`), and looking before the end (`sequential`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from workbench.statistics.clustered import clustered_interval
from workbench.statistics.estimates import Comparison
from workbench.statistics.proportions import tango
from workbench.statistics.resampling import bootstrap_mean, sign_flip
from workbench.statistics.samples import as_booleans, as_numbers, check_pairs, cluster_totals, is_dichotomous


@dataclass(frozen=True)
class McNemar:
    """Two-sided exact p-value, and how many pairs only the first (`only_a`) or only the second (`only_b`) got right."""

    p_value: float
    only_a: int
    only_b: int
    n: int


def mcnemar_exact(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """Exact McNemar test of paired right/wrong answers: a sign test on the pairs in which exactly one is right.

    Source: McNemar 1947, Psychometrika 12:153-157; binomial form, statsmodels' `mcnemar(exact=True)`.

    >>> mcnemar_exact([True, False, False, False], [True, True, True, True])
    McNemar(p_value=0.25, only_a=0, only_b=3, n=4)
    """
    first, second = as_booleans(a, "a"), as_booleans(b, "b")
    check_pairs(first, second)
    only_a, only_b = int((first & ~second).sum()), int((~first & second).sum())
    return McNemar(float(sign_test(np.array(only_a), np.array(only_b))), only_a, only_b, len(first))


def mcnemar_midp(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """McNemar's test with the mid-p value: the result at hand counts half, so that false alarms come near the level.

    The exact test's stay well below it (2 to 4 % at 5 %). Mid-p gives no guarantee: the source met none above the level
    in its 9,595 settings, and sums over all outcomes for 5 to 100 questions find none where at most 7 pairs in 10
    differ, but 7.7 % where all of 16 do. Source: Fagerland, Lydersen and Laake 2013, BMC Medical Research Methodology
    13:91.

    >>> mcnemar_midp([True, False, False, False], [True, True, True, True])
    McNemar(p_value=0.125, only_a=0, only_b=3, n=4)
    """
    found = mcnemar_exact(a, b)
    p_value = float(sign_test(np.array(found.only_a), np.array(found.only_b), mid=True))
    return McNemar(p_value, found.only_a, found.only_b, found.n)


def sign_test(only_a: np.ndarray, only_b: np.ndarray, mid: bool = False) -> np.ndarray:
    """Two-sided exact (or mid-p) values of a sign test, elementwise; 1 where no pair differs."""
    fewer, pairs = np.minimum(only_a, only_b), only_a + only_b
    p_values = np.minimum(1.0, 2 * stats.binom.cdf(fewer, pairs, 0.5))
    if not mid:
        return p_values
    chance = stats.binom.pmf(fewer, pairs, 0.5)  # both tails hold it once, but with equal counts it is one outcome
    return np.where(pairs == 0, 1.0, p_values - np.where(only_a == only_b, chance / 2, chance))


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
    Numbers: bootstrap interval and sign-flip permutation test, 10,000 draws each. Any rows with `clusters`: sign flips
    of whole clusters, with the mid-p value, and `clustered_interval`'s limits, which keep their coverage with few
    clusters.

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
    if clusters is None:
        interval = bootstrap_mean(difference, seed=seed, level=level)
        p_value = float(sign_flip(difference, seed))
        method, low, high = "sign-flip permutation test, bootstrap interval", interval.low, interval.high
        return Comparison(interval.estimate, low, high, p_value, interval.n, discordant, method, interval.note)
    return _clustered_difference(difference, clusters, proportions, level, seed)


def _clustered_difference(
    difference: np.ndarray, clusters: Sequence[Hashable], proportions: bool, level: float, seed: int
) -> Comparison:
    found = clustered_interval(difference, clusters, level)
    low, high, note = found.low, found.high, found.note
    discordant = int(np.count_nonzero(difference))
    if proportions and np.ptp(difference) == 0:
        k, side = found.clusters, float(difference[0])
        low, high = tango(k if side < 0 else 0, k if side > 0 else 0, k, level)
        said = "all pairs differ in one direction" if discordant else "no pair differs"
        note = f"{said}: score interval over {k} clusters"
    elif proportions:
        low, high = max(low, -1.0), min(high, 1.0)  # nan, of one cluster, stays
    p_value = float(sign_flip(cluster_totals(difference, clusters)[0], seed, mid=True))
    method = "sign-flip permutation test (mid-p), cluster-robust t interval (CR2)"
    return Comparison(found.estimate, low, high, p_value, found.n, discordant, method, note)
