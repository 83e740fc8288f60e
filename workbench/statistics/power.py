"""Say before (or after) a run what its number of questions could have shown, and how many questions an effect needs.

Two conditions on the same questions. Answered right or wrong once: power of the exact McNemar test. Scores, or several
samples a question: power of the paired t test on each question's mean, from the variance between questions and within
them (`sampling_variance` measures both; Miller 2024, arXiv 2411.00640, section on power). Clusters count by their
design effect 1 + (m - 1) icc (Kish 1965). Leans on scipy; tests check it against statsmodels and by simulation.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import optimize, stats

from workbench.statistics.samples import StatisticsError, tail_share


def mcnemar_power(n: int, only_a: float, only_b: float, alpha: float = 0.05) -> float:
    """Chance that the exact McNemar test on n pairs rejects, given the two discordant probabilities.

    Exact, no normal approximation: sums the sign test's power over every possible number of discordant pairs.
    Source: Duffy 1984, Biometrics 40:1005-1015.

    >>> round(mcnemar_power(100, only_a=0.05, only_b=0.20), 2)
    0.84
    """
    rate = only_a + only_b
    if n < 1 or min(only_a, only_b) < 0 or rate > 1:
        raise StatisticsError(
            f"mcnemar_power needs n >= 1 and probabilities with sum <= 1; got {n}, {only_a}, {only_b}."
        )
    if rate == 0:
        return 0.0
    # counts of discordant pairs that happen at all: others have chances that vanish in a float
    pairs = np.arange(stats.binom.ppf(1e-18, n, rate), stats.binom.isf(1e-18, n, rate) + 1)
    # largest count k with 2 * P(X <= k) <= alpha; ppf may land one too high
    edge = stats.binom.ppf(alpha / 2, pairs, 0.5)
    edge = np.where(2 * stats.binom.cdf(edge, pairs, 0.5) > alpha * (1 + 1e-9), edge - 1, edge)
    share = only_b / rate
    reject = stats.binom.cdf(edge, pairs, share) + stats.binom.cdf(edge, pairs, 1 - share)
    return float(np.sum(stats.binom.pmf(pairs, n, rate) * reject))


def mean_power(
    n: int,
    effect: float,
    between: float,
    within: float = 0.0,
    samples: int = 1,
    *,
    cluster_size: float = 1.0,
    icc: float = 0.0,
    alpha: float = 0.05,
) -> float:
    """Chance that a two-sided t test on n questions' paired differences rejects when the true mean is `effect`.

    between: variance over questions of the true difference; within: variance of one sampled difference about it (the
    sum of both conditions' variances); samples: answers a question and condition. With clusters the test has as many
    degrees of freedom as clusters less one, and `icc` is the correlation of the true differences in a cluster.

    >>> [round(mean_power(200, 0.05, between=0.02, within=0.3, samples=k), 2) for k in (1, 4, 16)]
    [0.24, 0.63, 0.95]
    """
    _check_design(n, samples, cluster_size, icc)
    tail = tail_share(1 - alpha)
    if between < 0 or within < 0 or between + within == 0 or not math.isfinite(between + within + effect):
        raise StatisticsError(f"variances are finite, >= 0 and not both 0; got between = {between}, within = {within}.")
    df = n / cluster_size - 1
    if df <= 0:
        return 0.0
    error = math.sqrt((between * (1 + (cluster_size - 1) * icc) + within / samples) / n)
    edge, shift = stats.t.isf(tail, df), abs(effect) / error
    if shift > 37:  # beyond this the noncentral t runs out of digits
        return 1.0
    return float(np.nan_to_num(stats.nct.sf(edge, df, shift)) + np.nan_to_num(stats.nct.cdf(-edge, df, shift)))


def minimum_detectable_effect(
    n: int,
    discordant_rate: float | None = None,
    *,
    baseline: float | None = None,
    between: float | None = None,
    within: float = 0.0,
    samples: int = 1,
    cluster_size: float = 1.0,
    icc: float = 0.0,
    power: float = 0.8,
    alpha: float = 0.05,
) -> float:
    """Smallest paired difference (0..1 for accuracy) that n questions show with probability `power`; inf if none would.

    Give `discordant_rate`, the share of questions on which the two conditions differ; or, before any run, `baseline`,
    the first condition's accuracy: then the answers count as independent, which is careful, since answers to the same
    question mostly agree. For scores, or several `samples` a question, give `between` and `within` (see `mean_power`).
    Source: Duffy 1984, Biometrics 40:1005-1015, solved for the difference.

    >>> round(minimum_detectable_effect(200, discordant_rate=0.2), 3)
    0.091
    >>> round(minimum_detectable_effect(200, baseline=0.5), 3)
    0.143
    >>> round(minimum_detectable_effect(200, discordant_rate=0.2, cluster_size=5, icc=0.2), 3)
    0.122
    >>> [round(minimum_detectable_effect(200, between=0.02, within=0.3, samples=k), 3) for k in (1, 10)]
    [0.113, 0.045]
    """
    chance, largest = _design(discordant_rate, baseline, between, within, samples, cluster_size, icc, alpha)
    _check_design(n, samples, cluster_size, icc)
    tail_share(power)
    if between is not None:
        largest = math.sqrt(between + within)
        while largest < 1e12 and chance(n, largest) < power:
            largest *= 4
    if chance(n, largest) < power:
        return math.inf
    found = optimize.root_scalar(
        lambda effect: chance(n, effect) - power, bracket=(0.0, largest), method="brentq", xtol=1e-9
    )
    return float(found.root)


def questions_needed(
    effect: float,
    discordant_rate: float | None = None,
    *,
    baseline: float | None = None,
    between: float | None = None,
    within: float = 0.0,
    samples: int = 1,
    cluster_size: float = 1.0,
    icc: float = 0.0,
    power: float = 0.8,
    alpha: float = 0.05,
) -> int:
    """Fewest questions with which a paired difference of `effect` is shown with probability `power`.

    The other arguments are those of `minimum_detectable_effect`. The exact test's power has small teeth in n: the
    answer has the power and one question fewer has not. Raises StatisticsError beyond a million questions.

    >>> questions_needed(0.05, discordant_rate=0.2), questions_needed(0.1, discordant_rate=0.2)
    (658, 168)
    >>> [questions_needed(0.05, between=0.02, within=0.3, samples=k) for k in (1, 2, 4, 16)]
    [1007, 536, 301, 124]
    """
    chance, largest = _design(discordant_rate, baseline, between, within, samples, cluster_size, icc, alpha)
    _check_design(1, samples, cluster_size, icc)
    tail_share(power)
    if not 0 < effect <= largest:
        raise StatisticsError(f"effect is above 0 and at most {largest:g}, given the other arguments; got {effect}.")
    low, high = 0, 8
    while chance(high, effect) < power:
        low, high = high, high * 2
        if high > 1_000_000:
            raise StatisticsError(f"an effect of {effect} needs over a million questions; ask for a larger one.")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if chance(middle, effect) >= power else (middle, high)
    return high


def _check_design(n: int, samples: int, cluster_size: float, icc: float) -> None:
    if n < 1 or samples < 1 or cluster_size < 1 or not 0 <= icc <= 1:
        raise StatisticsError(
            "a design has n, samples and cluster_size >= 1 and an icc between 0 and 1; "
            f"got n = {n}, samples = {samples}, cluster_size = {cluster_size}, icc = {icc}."
        )


def _design(
    discordant_rate: float | None, baseline: float | None, between: float | None,
    within: float, samples: int, cluster_size: float, icc: float, alpha: float,
) -> tuple[Callable[[int, float], float], float]:  # fmt: skip
    """Power as a function of questions and effect, and the largest effect that can be."""
    given = [rate for rate in (discordant_rate, baseline) if rate is not None]
    if len(given) + (between is not None) != 1 or any(not 0 <= rate <= 1 for rate in given):
        raise StatisticsError(
            "give exactly one of discordant_rate and baseline (between 0 and 1) and between (a variance); "
            f"got discordant_rate = {discordant_rate}, baseline = {baseline}, between = {between}."
        )
    tail_share(1 - alpha)
    if between is not None:
        variance = between

        def of_means(n: int, effect: float) -> float:
            return mean_power(n, effect, variance, within, samples, cluster_size=cluster_size, icc=icc, alpha=alpha)

        return of_means, math.inf
    if within or samples != 1:
        raise StatisticsError(
            f"samples = {samples} and within = {within} need `between`, the variance of questions' true differences."
        )
    rate, inflation = given[0], 1 + (cluster_size - 1) * icc

    def of_answers(n: int, effect: float) -> float:
        if discordant_rate is not None:
            only_a, only_b = (rate - effect) / 2, (rate + effect) / 2
        else:
            only_a, only_b = rate * (1 - rate - effect), (rate + effect) * (1 - rate)
        alone = int(n / inflation + 1e-9)
        return mcnemar_power(alone, max(0.0, only_a), only_b, alpha) if alone else 0.0

    return of_answers, rate if discordant_rate is not None else 1 - rate
