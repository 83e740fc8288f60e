"""Does the model know when it is right? Calibration error, Brier score, ranking and selective prediction.

All take confidences between 0 and 1 and right/wrong rows; where confidences come from is `elicitation`'s matter.
Does not cover: recalibration (temperature scaling), and calibration of whole distributions over answers.

Sources: expected calibration error, Guo et al. 2017 (arXiv 1706.04599); equal-mass bins and the correction of the bias,
Kumar et al. 2019 (arXiv 1909.10155) and Roelofs et al. 2022 (arXiv 2012.08668); decomposition, Murphy 1973, with the
within-bin terms of Stephenson, Coelho and Jolliffe 2008 (Weather and Forecasting 23:752-757); risk and coverage,
Geifman and El-Yaniv 2017 (arXiv 1705.08500).
"""

from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd
from scipy import special

from workbench.measures.resampling import bootstrap_statistics
from workbench.statistics import Interval, wilson
from workbench.statistics.samples import as_booleans, as_numbers, check_pairs

BINS = 10


def reliability_table(
    confidence: Sequence[float], correct: Sequence[bool], *, bins: int = BINS, adaptive: bool = False
) -> pd.DataFrame:
    """One row a bin that holds anything: its edges, n, mean confidence, accuracy with its Wilson interval, gap.

    Args:
        bins: number of bins.
        adaptive: bins of equal mass (quantiles; equal confidences stay together) instead of equal width.

    >>> reliability_table([0.15, 0.95, 0.95], [False, True, True])[["low", "high", "n", "accuracy"]].values.tolist()
    [[0.1, 0.2, 1.0, 0.0], [0.9, 1.0, 2.0, 1.0]]
    """
    p, right = _checked(confidence, correct)
    edges = _edges(p, bins, adaptive)
    numbers = _assigned(p, edges)
    lines = []
    for number in np.unique(numbers):
        inside = numbers == number
        share = wilson(int(right[inside].sum()), int(inside.sum()))
        line = {"low": edges[number], "high": edges[number + 1], "n": int(inside.sum())}
        line |= {"confidence": float(p[inside].mean()), "accuracy": share.estimate}
        line |= {"accuracy_low": share.low, "accuracy_high": share.high}
        lines.append(line | {"gap": line["accuracy"] - line["confidence"]})
    return pd.DataFrame(lines)


def calibration_error(
    confidence: Sequence[float],
    correct: Sequence[bool],
    *,
    bins: int = BINS,
    adaptive: bool = False,
    debiased: bool = False,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> Interval:
    """Expected calibration error: mean over rows of |accuracy - confidence| of their bin, with bootstrap limits.

    The plain estimate is too large, most of all with many bins and few rows; `debiased` takes off, bin by bin, what
    |gap| is expected to gain from the sampling error of the bin's accuracy (normal approximation), and stops at 0; of a
    perfectly calibrated model's excess about half goes. The limits are turned around the estimate, so that they are of
    the true error, not of the inflated one: they may lie below the plain estimate. Edges of adaptive bins are found
    once and kept.

    >>> round(calibration_error([0.9] * 10, [True] * 6 + [False] * 4).estimate, 3)
    0.3
    """
    p, right = _checked(confidence, correct)
    numbers = _assigned(p, _edges(p, bins, adaptive))

    def both(rows: np.ndarray) -> tuple[float, float]:
        held = np.bincount(numbers[rows])
        some = held > 0
        weight = held[some] / len(rows)
        accuracy = np.bincount(numbers[rows], right[rows])[some] / held[some]
        gap = np.abs(accuracy - np.bincount(numbers[rows], p[rows])[some] / held[some])
        error = np.sqrt(np.maximum(accuracy * (1 - accuracy), 1e-12) / np.maximum(held[some] - 1, 1))
        folded = error * np.sqrt(2 / np.pi) * np.exp(-((gap / error) ** 2) / 2) + gap * special.erf(
            gap / error / 2**0.5
        )
        return float(weight @ gap), max(0.0, float(weight @ (2 * gap - folded)))

    every = np.arange(len(p))
    plain = both(every)[0]
    pick = 1 if debiased else 0
    (found,) = bootstrap_statistics(
        lambda rows: [both(rows)[pick]], len(p), clusters, centre=[plain], pivotal=True, level=level
    )
    low, high = np.maximum(0.0, [found.low, found.high])  # nan, of one cluster, stays
    return Interval(found.estimate, float(low), float(high), found.n, found.note)


def brier(
    confidence: Sequence[float],
    correct: Sequence[bool],
    *,
    bins: int = BINS,
    adaptive: bool = False,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> dict[str, Interval]:
    """Brier score and its parts: score = reliability - resolution + uncertainty + within_variance - within_covariance.

    The sum is exact for any bins: without the two within-bin terms it holds only where all confidences of a bin are
    equal. Percentile bootstrap limits; those of reliability and resolution share the upward bias of their estimates.

    >>> parts = brier([0.2, 0.4, 0.9, 0.8], [False, True, True, True], bins=2)
    >>> round(parts["score"].estimate, 4), round(parts["uncertainty"].estimate, 4)
    (0.1125, 0.1875)
    """
    p, right = _checked(confidence, correct)
    numbers = _assigned(p, _edges(p, bins, adaptive))

    def parts(rows: np.ndarray) -> list[float]:
        f, o, bin_of = p[rows], right[rows], numbers[rows]
        held = np.maximum(np.bincount(bin_of), 1)
        mean_f, mean_o = np.bincount(bin_of, f)[bin_of] / held[bin_of], np.bincount(bin_of, o)[bin_of] / held[bin_of]
        base = o.mean()
        found = [((f - o) ** 2).mean(), ((mean_f - mean_o) ** 2).mean(), ((mean_o - base) ** 2).mean()]
        found += [base * (1 - base), ((f - mean_f) ** 2).mean(), 2 * ((f - mean_f) * (o - mean_o)).mean()]
        return [float(value) for value in found]

    names = ("score", "reliability", "resolution", "uncertainty", "within_variance", "within_covariance")
    return dict(zip(names, bootstrap_statistics(parts, len(p), clusters, level=level), strict=True))


def auroc(
    confidence: Sequence[float],
    correct: Sequence[bool],
    *,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> Interval:
    """How often a right answer has more confidence than a wrong one (ties half); 0.5 is chance, nan without both.

    Source: Hanley and McNeil 1982, Radiology 143:29-36.

    >>> auroc([0.9, 0.8, 0.7, 0.6], [True, True, False, True]).estimate
    0.6666666666666666
    """
    p, right = _checked(confidence, correct)
    rank = np.unique(p, return_inverse=True)[1]

    def area(rows: np.ndarray) -> list[float]:
        good = np.bincount(rank[rows], right[rows], minlength=rank.max() + 1)
        poor = np.bincount(rank[rows], 1 - right[rows], minlength=rank.max() + 1)
        pairs = good.sum() * poor.sum()
        return [float(good @ (np.cumsum(poor) - poor / 2) / pairs) if pairs else np.nan]

    return bootstrap_statistics(area, len(p), clusters, level=level)[0]


def risk_coverage(confidence: Sequence[float], correct: Sequence[bool]) -> pd.DataFrame:
    """Accuracy of what is answered when only confidences of at least `threshold` are: one row a distinct confidence."""
    p, right = _checked(confidence, correct)
    lines = []
    for threshold in np.unique(p)[::-1]:
        answered = p >= threshold
        share = wilson(int(right[answered].sum()), int(answered.sum()))
        line = {"threshold": float(threshold), "coverage": float(answered.mean()), "n": share.n}
        line |= {"accuracy": share.estimate, "accuracy_low": share.low, "accuracy_high": share.high}
        lines.append(line | {"risk": 1 - share.estimate})
    return pd.DataFrame(lines)


def risk_coverage_area(
    confidence: Sequence[float],
    correct: Sequence[bool],
    *,
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
) -> Interval:
    """Mean share of errors among the k most confident answers, over k = 1 to n: lower is better; ties in any order.

    A confidence that says nothing gives the error rate. Source: Geifman et al. 2019 (arXiv 1805.08206), AURC.
    """
    p, right = _checked(confidence, correct)

    def area(rows: np.ndarray) -> list[float]:
        group = np.unique(-p[rows], return_inverse=True)[1]
        wrong = np.bincount(group, 1 - right[rows]) / np.bincount(group)  # equal confidences share their errors
        return [float((np.cumsum(wrong[np.sort(group)]) / np.arange(1, len(rows) + 1)).mean())]

    return bootstrap_statistics(area, len(p), clusters, level=level)[0]


def confidence_table(rows: pd.DataFrame, *, bins: int = BINS, clusters: str = "id") -> pd.DataFrame:
    """One row a condition: n, rows without a confidence, and every number of this module with its limits.

    Args:
        rows: condition, correct, confidence (nan where there is none: counted in `missing`), and the cluster column.
    """
    _columns(rows, ("condition", "correct", "confidence", clusters))
    lines = []
    for name, group in rows.groupby("condition", sort=False):
        known = group[group.confidence.notna()]
        line: dict[str, float | str] = {"condition": str(name), "n": len(known), "missing": len(group) - len(known)}
        if len(known):
            p, right, own = known.confidence.astype(float).tolist(), known.correct.tolist(), known[clusters].tolist()
            found = {"ece": calibration_error(p, right, bins=bins, clusters=own)}
            found["ece_debiased"] = calibration_error(p, right, bins=bins, adaptive=True, debiased=True, clusters=own)
            found |= {"brier": brier(p, right, bins=bins, clusters=own)["score"]}
            found |= {"auroc": auroc(p, right, clusters=own), "aurc": risk_coverage_area(p, right, clusters=own)}
            for key, value in found.items():
                line |= {key: value.estimate, f"{key}_low": value.low, f"{key}_high": value.high}
        lines.append(line)
    return pd.DataFrame(lines)


def _columns(rows: pd.DataFrame, wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in rows.columns]
    if missing:
        raise ValueError(
            f"The rows have no column {missing[0]!r} (they have: {', '.join(map(str, rows.columns))}). Add it, for "
            "example rows.assign(confidence=elicitation.answer_confidence(lm, rows.prompt, rows.output).mean_p.values)."
        )


def _checked(confidence: Sequence[float], correct: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    p, right = as_numbers(confidence, "confidence"), as_booleans(correct, "correct").astype(float)
    check_pairs(p, right)
    outside = np.flatnonzero((p < 0) | (p > 1))
    if len(outside):
        raise ValueError(
            f"confidence[{outside[0]}] is {p[outside[0]]}: confidences lie between 0 and 1 (85 % is 0.85)."
        )
    return p, right


def _edges(p: np.ndarray, bins: int, adaptive: bool) -> np.ndarray:
    if not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins={bins!r} is no number of bins. Give a whole number from 1, such as 10.")
    if not adaptive:
        return np.arange(bins + 1) / bins  # linspace gives 0.30000000000000004, and 30 % falls a bin too low
    starts = np.unique(np.quantile(p, np.arange(bins) / bins, method="higher"))
    return np.append(starts, p.max())


def _assigned(p: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """The bin of each confidence: an edge belongs to the bin above it, the last edge to the last bin."""
    return np.searchsorted(edges[:-1], p, side="right") - 1
