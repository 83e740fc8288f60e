"""Score limits of a share, and of the difference of two shares measured on the same questions.

Questions count as independent; `clustered` is for those that share a passage. Not covered: Clopper-Pearson and Jeffreys
limits, which add nothing to a score interval at the sizes of an evaluation (Brown, Cai and DasGupta 2001).
"""

from __future__ import annotations

import math

from scipy import optimize, stats

from workbench.statistics.estimates import Interval
from workbench.statistics.samples import StatisticsError, tail_share


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
    z2 = _normal(level) ** 2
    share = successes / n
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * n)) / n) / (1 + z2 / n)
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(share, low, high, n)


def tango(only_a: int, only_b: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score limits of the paired difference of proportions (b - a) from the two discordant counts and n.

    The limits are the differences that a score test, with the other probability re-estimated under that difference,
    just fails to reject. Source: Tango 1998, Statistics in Medicine 17:891-908.

    >>> [round(x, 3) for x in tango(7, 1, 21)]
    [-0.517, -0.026]
    """
    if n < 1 or min(only_a, only_b) < 0 or only_a + only_b > n:
        raise StatisticsError(f"tango needs counts >= 0 with only_a + only_b <= n; got {only_a}, {only_b}, n = {n}.")
    z, estimate = _normal(level), (only_b - only_a) / n

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


def _normal(level: float) -> float:
    return float(stats.norm.isf(tail_share(level)))
