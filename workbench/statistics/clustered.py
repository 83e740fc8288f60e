"""Means of rows that are related: questions about one passage, problems from one template, samples of one question.

Rows of a cluster repeat each other, so that counting them as independent makes intervals too narrow, by a factor of
three in published evaluations (Miller 2024, arXiv 2411.00640). Limits here are Student's t over a cluster-robust error
that keeps its coverage with few and unequal clusters: CR2 with degrees of freedom by Bell and McCaffrey (2002, Survey
Methodology 28:169-181), under rows correlated as measured (Imbens and Kolesár 2016, Review of Economics and Statistics
98:701-712). For a mean both have a closed form. Not covered: clusters that cross each other (`crossed`), regression.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from workbench.statistics.samples import (
    StatisticsError,
    as_booleans,
    as_numbers,
    cluster_totals,
    is_dichotomous,
    tail_share,
)


@dataclass(frozen=True)
class ClusteredInterval:
    """A mean of related rows with its limits, in the unit of the data.

    icc: correlation of two rows of one cluster (analysis of variance; may be below 0; nan where no cluster has two
    rows). design_effect: how many times the variance of the mean is that of independent rows. df: degrees of freedom.
    """

    estimate: float
    low: float
    high: float
    n: int
    clusters: int
    standard_error: float
    df: float
    icc: float
    design_effect: float
    note: str = ""

    def __str__(self) -> str:
        return f"{self.estimate:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Spread:
    """What clusters say about a mean; arrays where many data sets were given at once."""

    mean: np.ndarray
    variance: np.ndarray
    df: np.ndarray
    icc: np.ndarray
    variance_alone: np.ndarray


def clustered_interval(
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable],
    level: float = 0.95,
    correction: Literal["CR2", "CR1"] = "CR2",
) -> ClusteredInterval:
    """Interval of the mean over rows when rows of one cluster are related; for a paired difference give b - a.

    correction: "CR2" as this file's head says; "CR1" is the sandwich times G / (G - 1) with t on G - 1 degrees of
    freedom, the usual `cov_type="cluster"`. With equal cluster sizes both are one. Fewer than 2 clusters give nan and a
    note.

    >>> found = clustered_interval([1, 1, 1, 0, 0, 0, 1, 0], ["a", "a", "a", "b", "b", "b", "c", "c"])
    >>> print(found, round(found.icc, 2), round(found.design_effect, 2))
    0.50 [-1.09, 2.09] 0.71 3.15
    """
    if correction not in ("CR2", "CR1"):
        raise StatisticsError(f'correction is "CR2" or "CR1"; got {correction!r}.')
    numbers = as_numbers(values, "values")
    tail = tail_share(level)
    sums, sizes = cluster_totals(numbers, clusters)
    mean, n, k = float(numbers.mean()), len(numbers), len(sums)
    if k == 1:
        nan = math.nan
        return ClusteredInterval(mean, nan, nan, n, 1, nan, 0.0, nan, nan, "one cluster: its spread cannot be known")
    found = spread(sums, sizes, cluster_totals(numbers**2, clusters)[0], correction)
    error, df, alone = math.sqrt(float(found.variance)), float(found.df), float(found.variance_alone)
    half = float(stats.t.isf(tail, df)) * error
    note = "" if k >= 10 else f"{k} clusters: limits are right only if clusters are about normal"
    if is_dichotomous(numbers.tolist()) and not 0.2 <= mean <= 0.8:
        note = "a share near 0 or 1: beta_binomial_interval keeps its coverage there, these limits do not"
    if np.ptp(numbers) == 0:
        note = "all values are equal: no width means no spread seen, not certainty"
    effect = error**2 / alone if alone > 0 else math.nan
    return ClusteredInterval(mean, mean - half, mean + half, n, k, error, df, float(found.icc), effect, note)


def beta_binomial_interval(
    values: Sequence[Any], clusters: Sequence[Hashable], level: float = 0.95
) -> ClusteredInterval:
    """Interval of a share of right answers in related rows; stays inside 0..1, and keeps a width when all are right.

    A Wilson interval at the effective number of rows under beta-binomial counts, whose correlation is estimated by
    analysis of variance and taken as 0 where it comes out below; t on G - 1 degrees of freedom stands for z. With all
    rows alike the correlation is unknown and the number of clusters counts as n. Source: Franco, Little, Louis and Slud
    2019, Journal of Survey Statistics and Methodology, who take the effective number from a model of the clusters and
    recommend Wilson's form; before them Dean and Pagano 2015, 3:484-503 of the same; counts: Williams 1975, Biometrics
    31:949-952.

    >>> print(beta_binomial_interval([1, 1, 1, 0, 0, 1, 1, 1], list("aabbccdd")))
    0.75 [0.26, 0.96]
    """
    right = as_booleans(values, "values").astype(float)
    tail = tail_share(level)
    sums, sizes = cluster_totals(right, clusters)
    n, k, share = len(right), len(sums), float(right.mean())
    if k == 1:
        nan = math.nan
        return ClusteredInterval(share, nan, nan, n, 1, nan, 0.0, nan, nan, "one cluster: its spread cannot be known")
    icc = float(spread(sums, sizes, sums).icc)
    rows, low, high = (float(x) for x in share_limits(sums, sizes, tail))
    alike = share in (0.0, 1.0)
    note = f"all values are equal: the interval counts {k} clusters as {k} rows" if alike else ""
    error = math.sqrt(share * (1 - share) / rows)
    return ClusteredInterval(share, low, high, n, k, error, k - 1, icc, n / rows, note)


def share_limits(sums: np.ndarray, sizes: np.ndarray, tail: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Effective rows, low and high of the beta-binomial interval, for counts of right answers [..., clusters]."""
    n, k = sizes.sum(), len(sizes)
    share = sums.sum(-1) / n
    icc = np.clip(np.nan_to_num(spread(sums, sizes, sums).icc), 0.0, 1.0)[..., None]
    rows = n**2 / (sizes * (1 + (sizes - 1) * icc)).sum(-1)
    rows = np.where((share == 0) | (share == 1), float(k), rows)
    t2 = float(stats.t.isf(tail, k - 1)) ** 2
    centre = (share + t2 / (2 * rows)) / (1 + t2 / rows)
    half = np.sqrt(t2 * (share * (1 - share) + t2 / (4 * rows)) / rows) / (1 + t2 / rows)
    return rows, np.where(share == 0, 0.0, centre - half), np.where(share == 1, 1.0, centre + half)


def spread(
    sums: np.ndarray, sizes: np.ndarray, squares: np.ndarray, correction: Literal["CR2", "CR1"] = "CR2"
) -> Spread:
    """Mean, its robust variance, degrees of freedom and ICC from each cluster's sum, size and sum of squares.

    sums and squares are [..., clusters], sizes [clusters], with at least 2 clusters.
    """
    n, k = sizes.sum(), len(sizes)
    weight = sizes / n
    mean = sums.sum(-1) / n
    residual = sums - sizes * mean[..., None]
    between = (residual**2 / sizes).sum(-1) / (k - 1)
    within = np.maximum(squares.sum(-1) - (sums**2 / sizes).sum(-1), 0.0)
    usual = (n - (sizes**2).sum() / n) / (k - 1)  # rows of a usual cluster
    if n > k:
        within = within / (n - k)
        total = between + (usual - 1) * within
        icc = np.where(total > 0, (between - within) / np.where(total > 0, total, 1.0), np.nan)
    else:
        icc = np.full(mean.shape, np.nan)
    alone = np.maximum(squares.sum(-1) - n * mean**2, 0.0) / (n - 1) / n
    if correction == "CR1":
        variance = k / (k - 1) * (residual**2).sum(-1) / n**2
        return Spread(mean, variance, np.full(mean.shape, k - 1.0), icc, alone)
    variance = (residual**2 / (1 - weight)).sum(-1) / n**2
    return Spread(mean, variance, bell_mccaffrey(sizes, icc), icc, alone)


def bell_mccaffrey(sizes: np.ndarray, icc: np.ndarray) -> np.ndarray:
    """Degrees of freedom of the CR2 variance of a mean; G - 1 for equal sizes, fewer the more unequal they are.

    The variance is a sum of squares of the clusters' adjusted residual totals; with M the covariance of those totals
    under rows of correlation `icc`, the degrees of freedom are (tr M)^2 / tr M^2.
    """
    weight = sizes / sizes.sum()
    c = 1 / (1 - weight)
    rho = np.clip(np.nan_to_num(icc), 0.0, 1.0)[..., None]
    v = sizes * (1 + (sizes - 1) * rho)  # variance of a cluster's total, in units of a row's
    u = v - weight * v.sum(-1, keepdims=True)
    own = weight * (v + u)  # M = c (diag(v) - v w' - w u') c, its two rank-one parts kept apart
    trace = (c * (v - own)).sum(-1)
    cross = (c * v**2).sum(-1) * (c * weight**2).sum(-1) + (c * weight**2).sum(-1) * (c * u**2).sum(-1)
    cross = cross + 2 * (c * v * weight).sum(-1) * (c * weight * u).sum(-1)
    squared = (c**2 * v**2).sum(-1) - 2 * (c**2 * v * own).sum(-1) + cross
    return trace**2 / squared
