"""How far raters agree beyond chance (Krippendorff's alpha, missing ratings allowed), and how right reviewers are.

alpha = 1 - observed / expected disagreement, both from the coincidence matrix (K. Krippendorff 2011, "Computing
Krippendorff's alpha-reliability", University of Pennsylvania; Content Analysis, 2004, ch. 11). 1 is perfect agreement,
0 what chance gives, below 0 is systematic disagreement. Levels: nominal, ordinal, interval. Not covered: ratio and
circular data, weights for raters. The interval draws whole units (or clusters of units) with replacement (Zapf et al.
2016, BMC Medical Research Methodology 16:93), which is not the bootstrap of Krippendorff's own macro.
"""

import math
from collections.abc import Hashable, Sequence
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from workbench.statistics import Interval, wilson
from workbench.synthesis.sampling import Attempt

__all__ = ["krippendorff", "krippendorff_interval", "review_report"]

Level = Literal["nominal", "ordinal", "interval"]
Ratings = Sequence[Sequence[Any]]


def krippendorff(ratings: Ratings, level: Level = "nominal") -> float:
    """Alpha of `ratings[rater][unit]`; None where a rater said nothing. nan where it is undefined.

    It is undefined when no unit has two ratings or when all ratings that can be paired are equal: with no variation,
    nothing could have disagreed. Nominal ratings are any values that can be compared for equality, the others numbers.
    Raises ValueError for raters of unequal length, an unknown level, or ratings that are no finite numbers.

    >>> round(krippendorff([[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]]), 3)
    0.095
    >>> krippendorff([["a", "b", None], ["a", "b", "c"]])
    1.0
    """
    units, scale = _coincidences(ratings, level)
    return _alpha(units.sum(0), scale, level)


def krippendorff_interval(
    ratings: Ratings,
    level: Level = "nominal",
    *,
    resamples: int = 1000,
    seed: int = 0,
    clusters: Sequence[Hashable] | None = None,
) -> Interval:
    """Alpha with its 95 % bootstrap interval over units; n counts the units that have two ratings or more.

    clusters: one label a unit, such as its question: units of one cluster are drawn together. Draws in which alpha is
    undefined are left out, and `note` says how many. Errors as for `krippendorff`.
    """
    if resamples < 1:
        raise ValueError(f"resamples is a whole number from 1, such as 1000; got {resamples}.")
    units, scale = _coincidences(ratings, level)
    estimate, n = _alpha(units.sum(0), scale, level), int((units.sum((1, 2)) > 0).sum())
    if clusters is not None:
        if len(clusters) != len(units):
            raise ValueError(f"{len(clusters)} clusters for {len(units)} units. Give one label a unit.")
        places = {label: place for place, label in enumerate(dict.fromkeys(clusters))}
        grouped = np.zeros((len(places), *units.shape[1:]))
        np.add.at(grouped, [places[label] for label in clusters], units)
        units = grouped
    if math.isnan(estimate):
        return Interval(estimate, math.nan, math.nan, n, "no two ratings differ, or none can be paired: undefined")
    rng = np.random.default_rng(seed)
    drawn = [
        _alpha(units[rng.integers(0, len(units), len(units))].sum(0), scale, level) for _ in range(resamples)
    ]  # fmt: skip
    known = [value for value in drawn if not math.isnan(value)]
    low, high = np.percentile(known, [2.5, 97.5]) if known else (math.nan, math.nan)
    left_out = resamples - len(known)
    notes = ["no unit differs: no width means no spread seen, not certainty"] if low == high else []
    notes += [f"{left_out} draws without variation"] if left_out else []
    return Interval(estimate, float(low), float(high), n, "; ".join(notes))


def review_report(attempts: Sequence[Attempt]) -> dict[str, int | Interval]:
    """What the reviewers of `reviewed` were worth, against the task's verifier, each share with a 95 % interval.

    answers, accepted, right, adjudicated: counts, of finished answers that the verifier judged. precision: right among
    accepted; recall: accepted among right; base: right among all (Wilson intervals, which take answers to one
    question as independent). gain: precision - base, bootstrapped over questions. alpha: Krippendorff's, ordinal, of
    the reviewers' grades, bootstrapped over questions. A share of nothing, and the alpha of one reviewer, are left out.
    """
    found = [
        (attempt["row_id"], sample)
        for attempt in attempts
        for sample in attempt["samples"]
        if sample["finished"] and sample["verified"] is not None
    ]
    accepted, right, both = (
        sum(test(sample) for _, sample in found)
        for test in (lambda s: s["correct"], lambda s: s["verified"], lambda s: s["correct"] and s["verified"])
    )
    report: dict[str, int | Interval] = {
        "answers": len(found), "accepted": accepted, "right": right,
        "adjudicated": sum("adjudicated" in sample for _, sample in found),
    }  # fmt: skip
    for name, part, whole in (("precision", both, accepted), ("recall", both, right), ("base", right, len(found))):
        if whole:
            report[name] = wilson(part, whole)
    if accepted:
        report["gain"] = _gain(found)
    if found and len(found[0][1]["grades"]) > 1:
        ratings = list(zip(*(sample["grades"] for _, sample in found), strict=True))
        report["alpha"] = krippendorff_interval(ratings, "ordinal", clusters=[row_id for row_id, _ in found])
    return report


def _gain(found: list[tuple[str, dict[str, Any]]], resamples: int = 2000) -> Interval:
    """Share right of the accepted answers minus that of all, with a bootstrap over questions."""
    counts: dict[str, np.ndarray] = {}
    for row_id, sample in found:
        kept, right = bool(sample["correct"]), bool(sample["verified"])
        counts[row_id] = counts.get(row_id, np.zeros(4)) + np.array([kept and right, kept, right, 1])
    table = np.array(list(counts.values()))
    rng = np.random.default_rng(0)
    drawn = table[rng.integers(0, len(table), (resamples, len(table)))].sum(1)
    drawn = drawn[drawn[:, 1] > 0]
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1] - drawn[:, 2] / drawn[:, 3], [2.5, 97.5])
    total = table.sum(0)
    return Interval(float(total[0] / total[1] - total[2] / total[3]), float(low), float(high), len(table))


def _coincidences(ratings: Ratings, level: Level) -> tuple[Float[np.ndarray, "units k k"], list[Any]]:
    """Each unit's own coincidence matrix, and the values that its rows and columns stand for, in order.

    A unit with m ratings adds each ordered pair of them with the weight 1 / (m - 1), so m in all; a lone one nothing.
    """
    if level not in get_args(Level):
        raise ValueError(f"level={level!r} is not known. Use one of: {', '.join(get_args(Level))}.")
    lengths = {len(row) for row in ratings}
    if len(ratings) < 2 or len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"ratings[rater][unit] needs two raters or more and the same number of units for each; got "
            f"{len(ratings)} raters with {sorted(lengths)} units. Write None where a rating is missing."
        )
    values = list(dict.fromkeys(value for row in ratings for value in row if value is not None))
    if any(value != value for value in values):
        raise ValueError("A rating is nan. Write None where a rating is missing.")
    if level != "nominal":
        wrong = [value for value in values if not isinstance(value, Real) or not math.isfinite(value)]
        if wrong:
            raise ValueError(f"{level} ratings are finite numbers, or None; got {wrong[0]!r}. Use level='nominal'.")
        values.sort()
    place = {value: number for number, value in enumerate(values)}
    counts = np.zeros((lengths.pop(), len(values)))
    for row in ratings:
        for unit, value in enumerate(row):
            if value is not None:
                counts[unit, place[value]] += 1
    pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(len(values))
    return pairs / np.maximum(counts.sum(1) - 1, 1)[:, None, None], values


def _alpha(matrix: Float[np.ndarray, "k k"], scale: list[Any], level: Level) -> float:
    """Alpha of one coincidence matrix; nan where the expected disagreement is zero."""
    totals = matrix.sum(0)
    apart = _squared_distance(totals, scale, level)
    expected = float(totals @ apart @ totals)
    if not expected:
        return math.nan
    return 1 - (float(totals.sum()) - 1) * float((matrix * apart).sum()) / expected


def _squared_distance(totals: Float[np.ndarray, " k"], scale: list[Any], level: Level) -> Float[np.ndarray, "k k"]:
    if level == "nominal":
        return 1 - np.eye(len(scale))
    # ordinal: the ratings that lie between two values, the two themselves by half
    position = np.array(scale, dtype=float) if level == "interval" else totals.cumsum() - totals / 2
    return (position[:, None] - position[None, :]) ** 2
