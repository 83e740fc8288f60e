"""Say before (or after) a run what its number of questions could have shown: power of the exact McNemar test.

Covers two conditions answered right or wrong on the same questions; not continuous measures, not clustered questions
(use the number of clusters for `n` there, which is careful). Leans on scipy; tests check it by simulation.
"""

from __future__ import annotations

import math

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
    pairs = np.arange(n + 1)
    # largest count k with 2 * P(X <= k) <= alpha; ppf may land one too high
    edge = stats.binom.ppf(alpha / 2, pairs, 0.5)
    edge = np.where(2 * stats.binom.cdf(edge, pairs, 0.5) > alpha * (1 + 1e-9), edge - 1, edge)
    share = only_b / rate
    reject = stats.binom.cdf(edge, pairs, share) + stats.binom.cdf(edge, pairs, 1 - share)
    return float(np.sum(stats.binom.pmf(pairs, n, rate) * reject))


def minimum_detectable_effect(
    n: int,
    discordant_rate: float | None = None,
    *,
    baseline: float | None = None,
    power: float = 0.8,
    alpha: float = 0.05,
) -> float:
    """Smallest paired difference in accuracy (0..1) that n questions show with probability `power`; inf if none would.

    Give `discordant_rate`, the share of questions on which the two conditions differ; or, before any run, `baseline`,
    the first condition's accuracy: then the answers count as independent, which is careful, since answers to the same
    question mostly agree. Source: Duffy 1984, Biometrics 40:1005-1015, solved for the difference.

    >>> round(minimum_detectable_effect(200, discordant_rate=0.2), 3)
    0.091
    >>> round(minimum_detectable_effect(200, baseline=0.5), 3)
    0.143
    """
    given = [rate for rate in (discordant_rate, baseline) if rate is not None]
    if n < 1 or len(given) != 1 or not 0 <= given[0] <= 1:
        raise StatisticsError(
            "minimum_detectable_effect needs n >= 1 and exactly one of discordant_rate and baseline, between 0 and 1; "
            f"got n = {n}, discordant_rate = {discordant_rate}, baseline = {baseline}."
        )
    tail_share(1 - alpha)
    tail_share(power)

    def shortfall(effect: float) -> float:
        if discordant_rate is not None:
            only_a, only_b = (discordant_rate - effect) / 2, (discordant_rate + effect) / 2
        else:
            only_a, only_b = given[0] * (1 - given[0] - effect), (given[0] + effect) * (1 - given[0])
        return mcnemar_power(n, max(0.0, only_a), only_b, alpha) - power

    largest = discordant_rate if discordant_rate is not None else 1 - given[0]
    if shortfall(largest) < 0:
        return math.inf
    return float(optimize.root_scalar(shortfall, bracket=(0.0, largest), method="brentq", xtol=1e-9).root)
