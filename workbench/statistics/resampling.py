"""Draw again from the data: bootstrap limits of a mean, and the sign-flip test of a mean of 0.

Whole clusters of related rows are drawn (or flipped) together. Not covered: intervals corrected for skewness.
Source: Efron and Tibshirani 1993, chapters 13 and 15.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from workbench.statistics.estimates import Interval
from workbench.statistics.samples import StatisticsError, as_numbers, check_pairs, cluster_totals, tail_share

CHUNK = 2_000_000  # resampled indices held at once: 16 MB, so that 10,000 resamples of 5,000 rows do not need 400 MB


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


def sign_flip(sums: np.ndarray, seed: int = 0, resamples: int = 10_000, mid: bool = False) -> np.ndarray:
    """Two-sided p-values of means of 0 when each sum could as well have the other sign; sums are [..., units].

    mid: other arrangements that give the very same total count half. Counts of right and wrong tie often, so that the
    full count rejects 2 to 4 % at 5 %; numbers that never tie get the same p-value either way.
    """
    rng = np.random.default_rng(seed)
    observed = np.abs(sums.sum(-1))[..., None]
    slack = 1e-12 * np.abs(sums).sum(-1)[..., None]  # rounding of a sum, whatever the unit
    moves = (sums != 0).astype(float)
    reached = np.zeros(sums.shape[:-1])
    for size in _chunks(resamples, max(sums.shape[-1], reached.size)):
        signs = rng.integers(0, 2, size=(size, sums.shape[-1])) * 2.0 - 1
        totals = np.abs(sums @ signs.T)
        reached = reached + (totals >= observed - slack).sum(-1)
        if mid:
            own = np.abs(moves @ signs.T) == moves.sum(-1)[..., None]  # the data themselves or their mirror: in full
            reached = reached - ((np.abs(totals - observed) <= slack) & ~own).sum(-1) / 2
    return (reached + 1) / (resamples + 1)  # counts the data itself as one draw: never 0 (Phipson and Smyth 2010)


def _chunks(resamples: int, width: int) -> list[int]:
    if resamples < 1:
        raise StatisticsError(f"resamples is a whole number >= 1, e.g. 10000; got {resamples}.")
    step = max(1, CHUNK // width)
    return [min(step, resamples - start) for start in range(0, resamples, step)]
