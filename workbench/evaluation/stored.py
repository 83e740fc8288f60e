"""What k samples would have given, estimated from the samples that a condition stored; nothing is asked again.

Every function takes the rows of one condition, `results.rows[results.rows.condition == NAME]`, whose solver kept
samples (`solvers.Samples`, `SelfConsistency`, `BestOf`), and returns a table over k: k, n (questions), samples (the
fewest a question), estimate, low, high, tokens_in, tokens_out (means a question at that k), method. The estimate is
the mean over questions of the expectation over all subsets of k of a question's samples, exact unless method says
otherwise. Intervals are bootstraps over questions (over `cluster`s, where rows have them): samples of one question
are not independent. Not covered: comparing two conditions (pair the values of `per_question`).
"""

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations
from math import ceil, comb
from typing import Any

import numpy as np
import pandas as pd

from workbench.statistics import Interval, bootstrap_mean, wilson

__all__ = [
    "average_at",
    "ballot",
    "best_of_at",
    "elected",
    "g_pass_at",
    "g_pass_k",
    "majority_at",
    "mg_pass_at",
    "pass_at",
    "pass_k",
]

ENUMERATED = 5000  # subsets of a question's samples; where there are more, as many are drawn instead
Sample = dict[str, Any]  # output, extracted, correct


def pass_k(n: int, c: int, k: int) -> float:
    """Chance that a subset of k of n samples, c of them right, holds a right one (arXiv 2107.03374, equation 1).

    >>> round(pass_k(10, 3, 2), 4)
    0.5333
    """
    _check_counts(n, c, k)
    return 1.0 - comb(n - c, k) / comb(n, k)


def g_pass_k(n: int, c: int, k: int, tau: float) -> float:
    """Chance that at least the share `tau` of a subset of k of n samples is right (arXiv 2412.13147, equation 3).

    >>> g_pass_k(4, 2, 2, 1.0) == 1 / 6, g_pass_k(4, 2, 2, 0.5) == pass_k(4, 2, 2)
    (True, True)
    """
    _check_counts(n, c, k)
    if not 0 < tau <= 1:
        raise ValueError(f"tau={tau}: the share of right samples, above 0 to 1.")
    need = max(1, ceil(tau * k - 1e-9))  # 0.7 * 10 is 7.000000000000001 - or less
    return sum(comb(c, j) * comb(n - c, k - j) for j in range(need, min(c, k) + 1)) / comb(n, k)


def pass_at(rows: pd.DataFrame, ks: Sequence[int] = (1,), level: float = 0.95) -> pd.DataFrame:
    """pass@k: how often at least one of k samples is right; what an oracle that picks could reach."""
    return _table(rows, ks, lambda row, k: pass_k(len(row["samples"]), _right(row), k), level)


def average_at(rows: pd.DataFrame, ks: Sequence[int] = (1,), level: float = 0.95) -> pd.DataFrame:
    """avg@k: the share of right samples among a question's first k, as a run with k samples would have reported it."""

    def share(row: dict[str, Any], k: int) -> float:
        return sum(bool(each["correct"]) for each in row["samples"][:k]) / k

    return _table(rows, ks, share, level, "the first k samples")


def g_pass_at(rows: pd.DataFrame, ks: Sequence[int] = (1,), tau: float = 1.0, level: float = 0.95) -> pd.DataFrame:
    """G-Pass@k: how often at least the share `tau` of k samples is right; near 0 it is pass@k, at 1 all must be."""
    return _table(rows, ks, lambda row, k: g_pass_k(len(row["samples"]), _right(row), k, tau), level)


def mg_pass_at(rows: pd.DataFrame, ks: Sequence[int] = (2,), level: float = 0.95) -> pd.DataFrame:
    """mG-Pass@k: twice the area under G-Pass@k for shares from 0.5 to 1, as arXiv 2412.13147 sums it."""

    def area(row: dict[str, Any], k: int) -> float:
        n, c = len(row["samples"]), _right(row)
        return 2 / k * sum(g_pass_k(n, c, k, right / k) for right in range(ceil(k / 2) + 1, k + 1))

    return _table(rows, ks, area, level)


def majority_at(
    rows: pd.DataFrame, ks: Sequence[int] = (1,), weights: str | None = None, level: float = 0.95, seed: int = 0
) -> pd.DataFrame:
    """maj@k: how often the answer with most votes is right, ties to the first seen, samples without an answer silent.

    weights: a column with a number a sample (`scores` of `BestOf`): votes weigh that much. Exact over all subsets, in
    their order, up to `ENUMERATED` of them; beyond, over as many drawn at random with `seed`.
    """

    def won(row: dict[str, Any], k: int) -> float:
        samples, drawn = row["samples"], list(subsets(len(row["samples"]), k, seed))
        extracted, given = [each["extracted"] for each in samples], None if weights is None else _column(row, weights)
        hits = 0
        for places in drawn:
            weighed = None if given is None else [given[place] for place in places]
            hits += bool(samples[places[elected([extracted[place] for place in places], weighed)]]["correct"])
        return hits / len(drawn)

    most = max(map(len, _samples(rows)), default=0)
    many = [k for k in ks if comb(most, k) > ENUMERATED]
    return _table(rows, ks, won, level, lambda k: f"{ENUMERATED} subsets, seed {seed}" if k in many else "exact")


def best_of_at(
    rows: pd.DataFrame, ks: Sequence[int] = (1,), score: str | Callable[[Sample], float] = "scores", level: float = 0.95
) -> pd.DataFrame:
    """How often the sample with the highest score of k is right; ties to the first drawn.

    score: a column with a number a sample (`scores` of `BestOf`), or a function of a stored sample.
    """

    def best(row: dict[str, Any], k: int) -> float:
        samples = row["samples"]
        scores = _column(row, score) if isinstance(score, str) else [score(each) for each in samples]
        order = sorted(range(len(samples)), key=lambda place: -scores[place])  # stable: of equals the first
        # the sample of rank r is the best of a subset when the k - 1 others all come behind it
        ways = [comb(len(samples) - 1 - rank, k - 1) for rank in range(len(samples))]
        hits = sum(way for way, place in zip(ways, order, strict=True) if samples[place]["correct"])
        return hits / comb(len(samples), k)

    return _table(rows, ks, best, level)


def per_question(rows: pd.DataFrame, value: Callable[[dict[str, Any], int], float], k: int) -> list[float]:
    """`value(row, k)` of every row, in order: what the tables average, and what pairs two conditions."""
    records: list[Any] = rows.to_dict("records")
    return [float(value(row, k)) for row in records]


def subsets(n: int, k: int, seed: int = 0) -> list[tuple[int, ...]]:
    """All ways to take k of n places, in rising order; `ENUMERATED` of them at random where there are more."""
    if comb(n, k) <= ENUMERATED:
        return list(combinations(range(n), k))
    generator = np.random.default_rng(seed)
    return [tuple(sorted(generator.choice(n, k, replace=False).tolist())) for _ in range(ENUMERATED)]


def ballot(extracted: str) -> str:
    """What two extracted answers have in common when they count as the same: the number, else the words.

    >>> ballot("0.5") == ballot("1/2"), ballot("x  + 1") == ballot("x + 1"), ballot("A") == ballot("B")
    (True, True, False)
    """
    number = re.fullmatch(r"-?\d{1,1000}(?:\.\d{1,1000}|/0*[1-9]\d{0,999})?", extracted.strip(), re.ASCII)
    if not number:
        return " ".join(extracted.split())
    return str(Fraction(number[0])) if len(number[0]) < 2000 else number[0]


def elected(extracted: Sequence[str | None], weights: Sequence[float] | None = None) -> int:
    """The place of the first sample that gives the answer with most votes (or weight); 0 when none gives an answer.

    >>> elected(["3", None, "5", "5.0"]), elected(["3", "5", "5"], [0.9, 0.2, 0.3])
    (2, 0)
    """
    totals: dict[str, float] = {}
    for each, weight in zip(extracted, weights or [1.0] * len(extracted), strict=True):
        if each is not None:
            totals[ballot(each)] = totals.get(ballot(each), 0.0) + weight
    if not totals:
        return 0
    most = max(totals, key=lambda answer: totals[answer])  # the first of equals, in the order seen
    return next(place for place, each in enumerate(extracted) if each is not None and ballot(each) == most)


def _table(
    rows: pd.DataFrame,
    ks: Sequence[int],
    value: Callable[[dict[str, Any], int], float],
    level: float,
    method: str | Callable[[int], str] = "exact",
) -> pd.DataFrame:
    sizes = np.array([len(samples) for samples in _samples(rows)])
    lines = []
    for k in ks:
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= sizes.min():
            raise ValueError(
                f"k={k!r} with {sizes.min()} samples a question: give whole numbers from 1 to {sizes.min()}, or "
                "sample more: evaluate(..., {'samples': [Samples(k)]})."
            )
        found = _interval(per_question(rows, value, int(k)), rows, level)
        line = {"k": int(k), "n": len(rows), "samples": int(sizes.min()), "estimate": found.estimate}
        line |= {"low": found.low, "high": found.high}
        line |= {name: float((rows[name].to_numpy(float) * k / sizes).mean()) for name in ("tokens_in", "tokens_out")}
        lines.append(line | {"method": method if isinstance(method, str) else method(int(k))})
    return pd.DataFrame(lines)


def _interval(values: list[float], rows: pd.DataFrame, level: float) -> Interval:
    """Bootstrap over questions or clusters; Wilson's limits where all are 0 or all are 1, which has no spread."""
    given = "cluster" in rows and rows["cluster"].notna().all() and rows["cluster"].nunique() > 1  # as in `Results`
    clusters = rows["cluster"].tolist() if given else None
    if set(values) in ({0.0}, {1.0}):
        count = len(values) if clusters is None else len(set(clusters))
        sure = wilson(int(values[0]) * count, count, level)
        return Interval(values[0], sure.low, sure.high, len(values), "no spread: Wilson's limits")
    return bootstrap_mean(values, level=level, clusters=clusters)


def _samples(rows: pd.DataFrame) -> list[list[Sample]]:
    """The stored samples; raises ValueError for rows of several conditions, of none, or without samples."""
    names = rows["condition"].unique().tolist() if "condition" in rows else [""]
    if len(names) != 1 or not len(rows):
        raise ValueError(
            f"The rows are of the conditions {', '.join(map(str, names)) or 'none'}; give those of one: "
            "results.rows[results.rows.condition == NAME]."
        )
    held = rows["samples"].tolist() if "samples" in rows else []
    if not held or not all(isinstance(each, list) and each for each in held):
        raise ValueError(
            f"Condition {names[0]!r} stored no samples. Give it a solver that does: [Samples(8)], [SelfConsistency(8)]."
        )
    return held


def _right(row: dict[str, Any]) -> int:
    return sum(bool(each["correct"]) for each in row["samples"])


def _column(row: dict[str, Any], name: str) -> list[float]:
    held = row.get(name)
    if not isinstance(held, list) or len(held) != len(row["samples"]):
        raise ValueError(
            f"Row {row.get('id')} has no column {name!r} with a number a sample. BestOf stores one, 'scores'; or give "
            "best_of_at a function: score=lambda sample: -len(sample['output'])."
        )
    return held


def _check_counts(n: int, c: int, k: int) -> None:
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"n={n} samples, c={c} right, k={k}: give 0 <= c <= n and 1 <= k <= n.")
