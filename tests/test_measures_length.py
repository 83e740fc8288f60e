"""Length counted by hand, and a planted gain that is all length, or none of it."""

import math

import numpy as np
import pandas as pd
import pytest

import workbench as wb
from workbench.divergence import repeated
from workbench.measures.length import at_equal_length, length_table

sm = pytest.importorskip("statsmodels.api", reason="the errors are held against its HC3")


def two(n: int, gain: float, per_token: float, seed: int, groups: int | None = None) -> pd.DataFrame:
    """Scores of a are noise; those of b are higher by `gain`, and by `per_token` for each token that b writes more."""
    rng = np.random.default_rng(seed)
    short, more = rng.integers(20, 60, n), rng.integers(-20, 60, n)
    score = rng.normal(size=n)
    shared = 0.0 if groups is None else rng.normal(size=groups)[np.arange(n) % groups]
    later = score + gain + per_token * more + rng.normal(0, 0.5, n) + shared
    rows = {"id": list(range(n)) * 2, "condition": ["a"] * n + ["b"] * n, "correct": [*score, *later]}
    frame = pd.DataFrame(rows | {"tokens_out": [*short, *(short + more)]})
    return frame.assign(group=frame.id % (groups or n))


def test_a_planted_gain_is_found_beside_what_length_does():
    inside, plain_inside, slopes = 0, 0, 0
    for seed in range(60):
        found = at_equal_length(two(60, 0.1, 0.02, seed), "a", "b")
        inside += found.low <= 0.1 <= found.high
        slopes += found.per_token_low <= 0.02 <= found.per_token_high
        plain_inside += found.plain.low <= 0.1 <= found.plain.high
    assert inside >= 52 and slopes >= 52 and plain_inside <= 3
    whole = at_equal_length(two(400, 0.0, 0.02, 1), "a", "b")
    assert whole.low < 0 < whole.high and whole.plain.low > 0.2 and whole.p_value > 0.01
    assert whole.plain.difference == pytest.approx(whole.difference + whole.per_token * whole.lengths)


def test_limits_against_statsmodels():
    rows = two(80, 0.3, 0.01, 3)
    found = at_equal_length(rows, "a", "b")
    first, second = (rows[rows.condition == name] for name in "ab")
    gap = second.correct.to_numpy() - first.correct.to_numpy()
    longer = second.tokens_out.to_numpy() - first.tokens_out.to_numpy()
    fit = sm.OLS(gap, sm.add_constant(longer)).fit(cov_type="HC3", use_t=True)
    assert (found.difference, found.per_token) == pytest.approx(tuple(fit.params))
    # HC3 is the sum of squared changes by leaving out one row; CV3 has (n - 1) / n of it
    low, high = fit.params[0] + (fit.conf_int()[0] - fit.params[0]) * math.sqrt(79 / 80)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-6)


def test_related_questions_widen_the_limits():
    rows = two(120, 0.0, 0.01, 4, groups=12)
    alone, together = (at_equal_length(rows, "a", "b", clusters=name) for name in (None, "group"))
    assert alone.difference == together.difference
    assert together.high - together.low > 1.5 * (alone.high - alone.low)
    capped = at_equal_length(rows, "a", "b", saturating=True)
    assert capped.difference != alone.difference and math.isfinite(capped.low)


def test_where_length_says_nothing():
    rows = two(30, 0.5, 0.0, 5)
    equal = at_equal_length(rows.assign(tokens_out=9), "a", "b")
    assert equal.difference == equal.plain.difference and "equally long" in equal.note
    longer = rows.assign(tokens_out=np.where(rows.condition == "a", 9, 30))
    assert math.isnan(at_equal_length(longer, "a", "b").difference)
    far = rows.assign(tokens_out=rows.tokens_out + np.where(rows.condition == "a", 0, 300))
    assert "beyond its points" in at_equal_length(far, "a", "b").note
    with pytest.raises(ValueError, match="'c' is neither"):
        at_equal_length(rows, "a", "c")
    with pytest.raises(ValueError, match="one row of the same questions"):
        at_equal_length(rows.iloc[1:], "a", "b")
    with pytest.raises(ValueError, match="too few"):
        at_equal_length(rows[rows.id < 4], "a", "b")


def test_a_table_counted_by_hand():
    rows = pd.DataFrame(
        {"id": ["1", "2", "3", "4"], "condition": "x", "output": ["a b c d a b c d", "a b", "", "a b c"]}
    )
    rows = rows.assign(tokens_out=[8, 2, 0, 3], correct=[False, True, True, True], finished=[False, True, True, None])
    found = length_table(rows).iloc[0]
    assert (found.tokens, found.words) == (13 / 4, 13 / 4)
    assert found.repeated == pytest.approx(repeated(list("abcdabcd")) / 4) == pytest.approx(0.05)
    assert found.truncated == pytest.approx(1 / 3) and found.truncated_high < 1
    assert (found.right_truncated, found.right_finished) == (0, 1)
    assert length_table(rows.assign(finished=[0.5, 1.0, 0.0, 1.0])).truncated[0] == 0.375
    assert math.isnan(length_table(rows.drop(columns="finished")).truncated[0])
    twice = length_table(pd.concat([rows, rows]).reset_index(drop=True)).iloc[0]  # each question twice says no more
    assert twice.tokens_high - twice.tokens_low == pytest.approx(found.tokens_high - found.tokens_low, rel=0.1)


def test_of_the_lab_model(lab, word_problems):
    """Cut off after four tokens: nothing is finished, and no answer is that long."""
    rows = wb.evaluate(lab, word_problems, {"plain": []}, n=4, max_new_tokens=4).rows
    found = length_table(rows, lab).iloc[0]
    assert found.truncated == 1 and found.tokens == 4 and found.repeated == 0
