"""Questions and seeds both drawn by chance: intervals for the score that other questions *and* other seeds would give.

An interval over questions alone answers for these seeds only. Here a table question x seed is split into questions,
seeds and the rest (two-way analysis of variance, one value a cell, both effects random), and the two errors are added
in squares, each times its own t quantile: the rule of Zou and Donner 2008 (Statistics in Medicine 27:1693-1702). In
simulation with normal seeds it rejects 3.5 to 6 % at 3 to 10 seeds, one t on Satterthwaite's degrees of freedom up to
7.5 %, the pigeonhole bootstrap (Owen 2007, arXiv 0712.1111) 18 % at 3 seeds. Three seeds that differ much bring it
to 9 % where their effects are far from normal, five to 7 %. Also here: how much of the noise is the sampling of
answers. Not covered: tables with holes, different questions for each seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

from workbench.statistics.samples import StatisticsError, as_table, tail_share


@dataclass(frozen=True)
class CrossedInterval:
    """A mean over questions and seeds with its limits, in the unit of the data, and the variance that each brings.

    A variance is of one question, one seed, one cell; components below 0 are reported as 0. p_value is against 0.
    """

    estimate: float
    low: float
    high: float
    p_value: float
    questions: int
    seeds: int
    standard_error: float
    question_variance: float
    seed_variance: float
    residual_variance: float
    note: str = ""

    def __str__(self) -> str:
        return f"{self.estimate:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class SamplingVariance:
    """Variance of one question's true score (`between`) and of one sampled answer about it (`within`)."""

    estimate: float
    between: float
    within: float
    questions: int
    samples: int

    def standard_error(self, questions: int | None = None, samples: int | None = None) -> float:
        """Error of the mean over `questions` questions with `samples` answers each; as measured unless said."""
        n, k = self.questions if questions is None else questions, self.samples if samples is None else samples
        if min(n, k) < 1:
            raise StatisticsError(f"a standard error needs 1 question and 1 sample at least; got {n} and {k}.")
        return math.sqrt((self.between + self.within / k) / n)


def crossed_interval(scores: Sequence[Sequence[float]] | np.ndarray, level: float = 0.95) -> CrossedInterval:
    """Interval of the mean of scores [question, seed] that counts questions and seeds as random.

    One seed leaves its part of the noise unknown: the limits are then over questions alone, and `note` says so.

    >>> scores = [[1, 1, 0], [0, 1, 0], [1, 1, 1], [0, 0, 0], [1, 1, 0], [1, 0, 1]]
    >>> found = crossed_interval(scores)
    >>> print(found, round(found.question_variance, 2), round(found.seed_variance, 2))
    0.56 [0.19, 0.92] 0.04 0.0
    """
    table = as_table(scores, "scores")
    tail = tail_share(level)
    questions, seeds = table.shape
    mean = float(table.mean())
    if questions == 1:
        nan = math.nan
        return CrossedInterval(
            mean, nan, nan, nan, 1, seeds, nan, nan, nan, nan, "one question: its spread cannot be known"
        )
    note = "" if seeds > 1 else "one seed: the limits are over questions alone, other seeds may differ by more"
    if np.ptp(table) == 0:
        note = "all values are equal: no width means no spread seen, not certainty"
    by_question, by_seed, rest = (float(x) for x in mean_squares(table))
    half = float(half_width(by_question, by_seed, rest, questions, seeds, tail))
    if half <= 1e-12 * abs(mean) and not note:
        note = "all questions have the same mean: no width means no spread seen, not certainty"
    error = math.sqrt((by_question + max(by_seed - rest, 0.0)) / (questions * seeds))
    return CrossedInterval(
        mean, mean - half, mean + half, _p_value(mean, by_question, by_seed, rest, questions, seeds), questions, seeds,
        error, max(by_question - rest, 0.0) / seeds, max(by_seed - rest, 0.0) / questions, rest, note,
    )  # fmt: skip


def crossed_difference(
    a: Sequence[Sequence[float]] | np.ndarray, b: Sequence[Sequence[float]] | np.ndarray, level: float = 0.95
) -> CrossedInterval:
    """Paired difference b - a of two tables [question, seed] with the same questions; column s of a beside s of b.

    Seeds that share nothing may be paired in any order fixed before the scores are seen.

    >>> print(crossed_difference([[0, 0], [1, 0], [0, 1], [0, 0]], [[1, 1], [1, 1], [0, 1], [1, 0]]))
    0.50 [-0.15, 1.15]
    """
    first, second = as_table(a, "a"), as_table(b, "b")
    if first.shape != second.shape:
        raise StatisticsError(
            f"a and b are tables [question, seed] of one shape: a has {first.shape}, b has {second.shape}. Join them "
            "on the question's id, and keep equally many seeds of each."
        )
    return crossed_interval(second - first, level)


def sampling_variance(scores: Sequence[Sequence[float]] | np.ndarray) -> SamplingVariance:
    """Split the noise of scores [question, sample], K >= 2 independent answers to each question, into its two parts.

    `within / K` is what more samples a question can still take away; `between` only more questions can. Source: Miller
    2024, arXiv 2411.00640, section on resampling; unbiased one-way analysis of variance, `between` cut at 0.

    >>> found = sampling_variance([[1, 1], [0, 1], [1, 1], [0, 0]])
    >>> round(found.between, 3), found.within, round(found.standard_error(samples=10), 3)
    (0.167, 0.125, 0.212)
    """
    table = as_table(scores, "scores")
    questions, samples = table.shape
    if min(questions, samples) < 2:
        raise StatisticsError(f"sampling_variance needs 2 questions and 2 samples each; got a table {table.shape}.")
    within = float(table.var(axis=1, ddof=1).mean())
    between = float(table.mean(axis=1).var(ddof=1)) - within / samples
    return SamplingVariance(float(table.mean()), max(between, 0.0), within, questions, samples)


def mean_squares(table: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean squares of questions, seeds and the rest, for tables [..., question, seed]; one seed: last two 0."""
    questions, seeds = table.shape[-2:]
    mean = table.mean((-1, -2), keepdims=True)
    by_question, by_seed = table.mean(-1, keepdims=True) - mean, table.mean(-2, keepdims=True) - mean
    rows = seeds * (by_question**2).sum((-1, -2)) / (questions - 1)
    if seeds == 1:
        return rows, np.zeros_like(rows), np.zeros_like(rows)
    columns = questions * (by_seed**2).sum((-1, -2)) / (seeds - 1)
    rest = ((table - mean - by_question - by_seed) ** 2).sum((-1, -2)) / ((questions - 1) * (seeds - 1))
    return rows, columns, rest


def half_width(by_question: Any, by_seed: Any, rest: Any, questions: int, seeds: int, tail: float) -> np.ndarray:
    """Half the interval's width: both errors in squares, each with the t quantile of its own degrees of freedom."""
    t_questions = stats.t.isf(tail, questions - 1)
    t_seeds = stats.t.isf(tail, seeds - 1) if seeds > 1 else 0.0
    part = t_questions**2 * by_question + t_seeds**2 * np.maximum(by_seed - rest, 0.0)
    return np.sqrt(part / (questions * seeds))


def _p_value(mean: float, by_question: float, by_seed: float, rest: float, questions: int, seeds: int) -> float:
    """The two-sided level whose interval just touches 0; without any spread that of a sign flip over questions."""
    if mean == 0:
        return 1.0
    if half_width(by_question, by_seed, rest, questions, seeds, 0.025) <= 1e-12 * abs(mean):
        return 0.5 ** (questions - 1)

    def off(log_tail: float) -> float:
        return float(half_width(by_question, by_seed, rest, questions, seeds, math.exp(log_tail))) - abs(mean)

    lowest = math.log(1e-100)  # squares of smaller tails' quantiles overflow
    if off(lowest) < 0:
        return 0.0
    return min(1.0, 2 * math.exp(optimize.root_scalar(off, bracket=(lowest, math.log(0.5)), xtol=1e-12).root))
