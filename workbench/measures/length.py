"""How long answers are, whether they were cut off or go in circles, and a comparison at equal length.

`at_equal_length` regresses the paired difference of two conditions on their difference in length: what is left where
that is 0 is the difference at equal length, as in length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475).
Length is an outcome itself: if a condition is better *because* it writes more, this takes its merit away. So it stands
beside the plain difference, never for it.

Does not cover: judges that prefer long answers (`workbench.judging`), the cost of tokens (`results.table`).
Sources: limits from leaving out one cluster at a time (CV3), MacKinnon, Nielsen and Webb 2023, Journal of Applied
Econometrics 38:671-694; repeated 4-grams, Welleck et al. 2019 (arXiv 1908.04319).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import stats

from workbench.statistics import Comparison, Interval, beta_binomial_interval, bootstrap_mean, paired_difference, wilson
from workbench.statistics.samples import tail_share

if TYPE_CHECKING:
    from workbench.models import LM


@dataclass(frozen=True)
class EqualLength:
    """A paired difference b - a at equal length, beside the plain one.

    per_token: what one more token (or word) goes with, in the unit of the score; with `saturating`, what a difference
    of many standard deviations does. lengths: mean difference in length, b - a.
    """

    difference: float
    low: float
    high: float
    p_value: float
    per_token: float
    per_token_low: float
    per_token_high: float
    lengths: float
    n: int
    plain: Comparison
    note: str = ""


def length_table(rows: pd.DataFrame, lm: "LM | None" = None, *, level: float = 0.95) -> pd.DataFrame:
    """One row a condition: tokens, words, share cut off, share of repeated 4-grams, each with limits over questions.

    Args:
        rows: id, condition, output, tokens_out; `finished` where there is one (nan without: a solver's last text).
        lm: whose tokens 4-grams are made of; None for words.

    Returns:
        n, tokens, words, truncated (not `finished`: stopped at the limit), repeated, each with _low and _high;
        right_truncated, right_finished (accuracy of both kinds, nan where there are none).
    """
    from workbench.divergence import repeated

    lines = []
    for name, group in rows.groupby("condition", sort=False):
        owners = group.id.astype(str).tolist() if group.id.duplicated().any() else None
        words = [str(text).split() for text in group.output]
        pieces = (
            words if lm is None else [lm.tokenizer(str(t), add_special_tokens=False)["input_ids"] for t in group.output]
        )
        found: dict[str, Any] = {"tokens": bootstrap_mean(group.tokens_out.tolist(), level=level, clusters=owners)}
        found["words"] = bootstrap_mean([float(len(each)) for each in words], level=level, clusters=owners)
        found["repeated"] = bootstrap_mean([repeated(each) for each in pieces], level=level, clusters=owners)
        ended = (group.finished if "finished" in group else pd.Series(dtype=float)).dropna().astype(float)
        found["truncated"] = _share(1 - ended, None if owners is None else group.id[ended.index].tolist(), level)
        line: dict[str, Any] = {"condition": str(name), "n": len(group)}
        for key, value in found.items():
            line |= {key: value.estimate, f"{key}_low": value.low, f"{key}_high": value.high}
        right = group.correct[ended.index]
        lines.append(line | {"right_truncated": right[ended < 1].mean(), "right_finished": right[ended == 1].mean()})
    return pd.DataFrame(lines)


def _share(cut: "pd.Series[float]", owners: list[str] | None, level: float) -> Any:
    """A mean of yes and no, or of shares where a solver drew several samples a row."""
    if not len(cut):
        return Interval(math.nan, math.nan, math.nan, 0, "no row says whether it was finished")
    if not cut.isin([0, 1]).all():
        return bootstrap_mean(cut.tolist(), level=level, clusters=owners)
    if owners is None:
        return wilson(int(cut.sum()), len(cut), level)
    return beta_binomial_interval(cut.tolist(), owners, level)


def at_equal_length(
    rows: pd.DataFrame,
    a: str,
    b: str,
    *,
    score: str = "correct",
    length: str = "tokens_out",
    saturating: bool = False,
    clusters: str | None = None,
    level: float = 0.95,
) -> EqualLength:
    """The paired difference in `score` of two conditions, b - a, where both wrote equally much.

    Ordinary least squares of the question's difference on its difference in length; Student's t with clusters - 2
    degrees of freedom, errors from leaving out one question (or cluster) at a time.

    Args:
        rows: id, condition, and the columns named by score and length; one row a question and condition.
        saturating: tanh of the length difference in standard deviations, as AlpacaEval has it, so that very long
            answers don't rule the slope.
        clusters: column of related questions; None takes each question as one of its own.

    Raises:
        ValueError: an unknown condition or column, other questions in the two, fewer than 5 independent units.

    >>> rows = pd.DataFrame({"id": list("abcdef") * 2, "condition": ["x"] * 6 + ["y"] * 6})
    >>> rows = rows.assign(correct=[0] * 9 + [1] * 3, tokens_out=[5] * 6 + [5, 6, 5, 9, 9, 8])
    >>> found = at_equal_length(rows, "x", "y")
    >>> round(found.plain.difference, 2), round(found.difference, 2), round(found.per_token, 2)
    (0.5, -0.06, 0.28)
    """
    first, second = _paired(rows, a, b, [score, length, *([clusters] if clusters else [])])
    gap = second[score].to_numpy(float) - first[score].to_numpy(float)
    longer = second[length].to_numpy(float) - first[length].to_numpy(float)
    own = first[clusters].astype(str).tolist() if clusters else None
    before, after = first[score].tolist(), second[score].tolist()
    plain = paired_difference(before, after, level, clusters=own)
    units = np.unique(first.index if own is None else own, return_inverse=True)[1]
    count = int(units.max()) + 1
    if count < 5:
        raise ValueError(f"{count} independent questions are too few for a regression on length. Take 5 or more.")
    spread = float(longer.std())
    lengths = float(longer.mean())
    if spread == 0:
        note = "the length difference is the same everywhere: what it does can't be told from what the condition does"
        shown = (plain.difference, plain.low, plain.high, plain.p_value) if lengths == 0 else (math.nan,) * 4
        note = "both are equally long everywhere" if lengths == 0 else note
        return EqualLength(*shown, math.nan, math.nan, math.nan, lengths, len(gap), plain, note)
    x = np.tanh(longer / spread) if saturating else longer
    design = np.column_stack([np.ones_like(x), x])
    fitted, error = _least_squares(design, gap, units)
    half = stats.t.isf(tail_share(level), count - 2) * error
    p_value = float(2 * stats.t.sf(abs(fitted[0]) / error[0], count - 2)) if error[0] > 0 else math.nan
    shortest, longest = np.quantile(longer, [0.05, 0.95])
    note = (
        ""
        if shortest <= 0 <= longest
        else "hardly any pair is of equal length: this is read off the line beyond its points"
    )
    (level_at, slope), (low, slope_low), (high, slope_high) = (
        map(float, each) for each in (fitted, fitted - half, fitted + half)
    )
    return EqualLength(level_at, low, high, p_value, slope, slope_low, slope_high, lengths, len(gap), plain, note)


def _paired(rows: pd.DataFrame, a: str, b: str, columns: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    known = list(dict.fromkeys(rows.condition))
    missing = [name for name in (a, b) if name not in known] or [name for name in columns if name not in rows.columns]
    if missing:
        raise ValueError(
            f"{missing[0]!r} is neither a condition ({', '.join(map(str, known))}) nor a column "
            f"({', '.join(map(str, rows.columns))}) of these rows."
        )
    first, second = (rows[rows.condition == name].set_index("id") for name in (a, b))
    if set(first.index) != set(second.index) or first.index.has_duplicates or second.index.has_duplicates:
        raise ValueError(
            f"{a!r} has {len(first)} rows and {b!r} {len(second)}: each needs one row of the same questions. Evaluate "
            "both in one call, and average several samples of a question first."
        )
    return first, second.loc[first.index]


def _least_squares(design: np.ndarray, y: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and their errors from leaving out one unit at a time (CV3; for single rows nearly HC3)."""
    gram, moment = design.T @ design, design.T @ y
    fitted = np.linalg.solve(gram, moment)
    count = int(units.max()) + 1
    apart = np.empty((count, 2))
    for unit in range(count):
        part = units == unit
        less = gram - design[part].T @ design[part]
        apart[unit] = np.linalg.lstsq(less, moment - design[part].T @ y[part], rcond=None)[0]
    variance = (count - 1) / count * ((apart - fitted) ** 2).sum(0)
    return fitted, np.sqrt(variance)
