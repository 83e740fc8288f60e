"""Adjust the p-values of a family of tests: for any false claim (Holm), or for the share of false claims.

Not covered: families whose tests are known to depend on each other in a way that could be used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from workbench.statistics.samples import StatisticsError, as_numbers


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust a family of p-values so that the chance of *any* false claim stays below the level; keeps the order given.

    Source: Holm 1979, Scandinavian Journal of Statistics 6:65-70.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p = _as_p_values(p_values)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return _in_order(np.minimum(1.0, stepped), order)


def benjamini_hochberg(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values so that, of the claims made at a level, at most that share is false on average; keeps the order.

    Finds more than `holm` and promises less: for screening many settings, not for the claim of a report. Holds for
    tests that are independent or positively related. Source: Benjamini and Hochberg 1995, JRSS B 57:289-300.

    >>> benjamini_hochberg([0.01, 0.04, 0.03, 0.005])
    [0.02, 0.04, 0.04, 0.02]
    """
    p = _as_p_values(p_values)
    order = np.argsort(p, kind="stable")
    stepped = np.minimum.accumulate((p[order] * len(p) / np.arange(1, len(p) + 1))[::-1])[::-1]
    return _in_order(np.minimum(1.0, stepped), order)


def _as_p_values(p_values: Sequence[float]) -> np.ndarray:
    p = as_numbers(p_values, "p_values")
    outside = (p < 0) | (p > 1)
    if outside.any():
        place = int(np.flatnonzero(outside)[0])
        raise StatisticsError(f"p-values lie between 0 and 1; p_values[{place}] is {p[place]}.")
    return p


def _in_order(adjusted: np.ndarray, order: np.ndarray) -> list[float]:
    placed = np.empty_like(adjusted)
    placed[order] = adjusted
    return placed.tolist()
