"""Bootstrap limits for a statistic that is no mean: whole clusters of rows are drawn, the statistic is computed anew.

Means, shares and paired differences have intervals of their own in `workbench.statistics`.
"""

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from workbench.statistics import Interval

RESAMPLES = 1000


def bootstrap_statistics(
    statistics: Callable[[np.ndarray], Sequence[float]],
    n: int,
    clusters: Sequence[Hashable] | None = None,
    *,
    centre: Sequence[float] | None = None,
    pivotal: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = 0.95,
) -> list[Interval]:
    """Intervals of several statistics of the same rows, over rows or over whole clusters.

    Args:
        statistics: takes row numbers (with repeats) and gives one number each; nan where they can't be computed.
        n: rows.
        centre: what the statistics of a resample are estimates of; None for the statistics of all rows.
        pivotal: turn the limits around the estimate (the basic bootstrap), which takes the bias of a statistic that
            is always positive out of its limits. Else percentiles.

    Source: Efron and Tibshirani 1993, chapter 13 (percentile); Davison and Hinkley 1997, 3.8 (clusters), 5.2 (basic).
    """
    labels = list(clusters) if clusters is not None else list(range(n))
    if len(labels) != n or not n:
        raise ValueError(f"Got {len(labels)} cluster labels for {n} rows: give one a row, and at least one row.")
    code = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    codes = np.array([code[label] for label in labels])
    order = np.argsort(codes, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(codes))[:-1])
    found = np.array(statistics(np.arange(n)), dtype=float)
    if len(members) == 1:
        return [Interval(value, math.nan, math.nan, n, "one independent value: no spread known") for value in found]
    rng = np.random.default_rng(seed)
    draws = np.empty((resamples, len(found)))
    for number in range(resamples):
        picked = rng.integers(0, len(members), len(members))
        rows = picked if clusters is None else np.concatenate([members[pick] for pick in picked])
        draws[number] = statistics(rows)
    return _limits(found, draws, np.array(found if centre is None else centre, dtype=float), n, pivotal, level)


def _limits(
    found: np.ndarray, draws: np.ndarray, centre: np.ndarray, n: int, pivotal: bool, level: float
) -> list[Interval]:
    tails = [(1 - level) / 2, (1 + level) / 2]
    intervals = []
    for value, column, middle in zip(found, draws.T, centre, strict=True):
        usable = column[np.isfinite(column)]
        if not math.isfinite(value) or len(usable) < len(column) / 2:
            intervals.append(Interval(float(value), math.nan, math.nan, n, "not defined in most resamples"))
            continue
        low, high = np.quantile(usable, tails)
        if pivotal:
            low, high = value + middle - high, value + middle - low
        lost = len(column) - len(usable)
        note = f"not defined in {lost} of {len(column)} resamples, which were left out" if lost else ""
        if usable.min() == usable.max():
            note = "all resamples are alike: no width means no spread seen, not certainty"
        intervals.append(Interval(float(value), float(low), float(high), n, note))
    return intervals
