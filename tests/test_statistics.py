"""Statistics against statsmodels, published numbers, exact enumeration and seeded simulation."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from workbench.statistics import (
    StatisticsError,
    bootstrap_mean,
    holm,
    mcnemar_exact,
    mcnemar_power,
    minimum_detectable_effect,
    paired_bootstrap,
    paired_difference,
    tango,
    wilson,
)


def pairs(only_a: int, only_b: int, both: int = 0, neither: int = 0) -> tuple[list[bool], list[bool]]:
    a = [True] * only_a + [False] * only_b + [True] * both + [False] * neither
    b = [False] * only_a + [True] * only_b + [True] * both + [False] * neither
    return a, b


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("successes, n", [(0, 1), (1, 1), (0, 20), (20, 20), (43, 100), (7, 1319)])
def test_wilson_agrees_with_statsmodels(successes, n, level):
    ours = wilson(successes, n, level)
    low, high = proportion_confint(successes, n, alpha=1 - level, method="wilson")
    assert ours.estimate == successes / n
    assert abs(ours.low - low) < 1e-10
    assert abs(ours.high - high) < 1e-10


def test_wilson_covers_the_truth_about_as_often_as_it_says():
    n, truths = 40, np.linspace(0.05, 0.95, 19)
    limits = np.array([[(i := wilson(k, n)).low, i.high] for k in range(n + 1)])
    coverage = []
    for truth in truths:  # exact: sums the binomial over every possible count
        inside = (limits[:, 0] <= truth) & (truth <= limits[:, 1])
        coverage.append(stats.binom.pmf(np.arange(n + 1)[inside], n, truth).sum())
    assert 0.94 < np.mean(coverage) < 0.965
    assert min(coverage) > 0.90


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (0, 1), (1, 9), (9, 1), (5, 5), (12, 30), (40, 41)])
def test_mcnemar_agrees_with_statsmodels(only_a, only_b):
    a, b = pairs(only_a, only_b, both=6, neither=4)
    ours = mcnemar_exact(a, b)
    theirs = mcnemar([[6, only_a], [only_b, 4]], exact=True)
    assert abs(ours.p_value - theirs.pvalue) < 1e-10
    assert (ours.only_a, ours.only_b, ours.n) == (only_a, only_b, 10 + only_a + only_b)


def test_mcnemar_false_alarms_stay_below_five_percent():
    rng = np.random.default_rng(0)
    base = rng.random((1000, 80)) < 0.5
    flip_a, flip_b = rng.random(base.shape) < 0.15, rng.random(base.shape) < 0.15
    alarms = [mcnemar_exact(x, y).p_value <= 0.05 for x, y in zip(base ^ flip_a, base ^ flip_b, strict=True)]
    assert 0.005 < np.mean(alarms) <= 0.05


def test_sign_flip_false_alarms_stay_near_five_percent_on_skewed_numbers():
    rng = np.random.default_rng(1)
    draws = rng.exponential(size=(120, 2, 25))
    alarms = [paired_difference(a, b).p_value <= 0.05 for a, b in draws]
    assert np.mean(alarms) <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 120)


def test_tango_matches_the_published_example_and_the_wilson_limit_without_discordant_pairs():
    low, high = tango(7, 1, 21)  # Fagerland et al. 2014, airway data: -0.517 to -0.026
    assert (round(low, 3), round(high, 3)) == (-0.517, -0.026)
    low, high = tango(0, 0, 50)
    assert abs(high - wilson(0, 50).high) < 1e-10
    assert abs(low + high) < 1e-10


@pytest.mark.parametrize("only_a, only_b, n", [(3, 11, 60), (1, 0, 10), (20, 22, 50)])
def test_tango_limits_solve_the_score_equation_with_a_numerical_maximum(only_a, only_b, n):
    z2 = stats.chi2.ppf(0.95, 1)
    for delta in tango(only_a, only_b, n):

        def loss(q, delta=delta):  # multinomial log likelihood under p_b - p_a = delta, q = P(only a)
            return -(
                only_a * np.log(q) + only_b * np.log(q + delta) + (n - only_a - only_b) * np.log(1 - 2 * q - delta)
            )

        bounds = (max(0.0, -delta) + 1e-12, (1 - delta) / 2 - 1e-12)
        q = optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        score2 = (only_b - only_a - n * delta) ** 2 / (n * (2 * q + delta - delta**2))
        assert abs(score2 - z2) < 1e-3


def test_tango_covers_the_truth_about_as_often_as_it_says():
    n, (p_a, p_b) = 30, (0.08, 0.22)
    covered = 0.0
    for only_a in range(n + 1):
        for only_b in range(n + 1 - only_a):
            chance = stats.multinomial.pmf([only_a, only_b, n - only_a - only_b], n, [p_a, p_b, 1 - p_a - p_b])
            if chance > 1e-6:
                low, high = tango(only_a, only_b, n)
                covered += chance * (low <= p_b - p_a <= high)
    assert 0.93 < covered < 0.98


def test_tango_edges_reach_minus_one_and_one():
    assert tango(5, 0, 5)[0] == -1.0
    assert tango(0, 5, 5)[1] == 1.0
    assert tango(0, 5, 5)[0] > 0


def test_paired_difference_of_right_and_wrong_rows():
    a, b = pairs(3, 14, both=20, neither=13)
    result = paired_difference(a, b)
    assert result.difference == pytest.approx(11 / 50)
    assert result.p_value == mcnemar_exact(a, b).p_value
    assert (result.low, result.high) == tango(3, 14, 50)
    assert (result.n, result.discordant) == (50, 17)
    swapped = paired_difference(b, a)
    assert swapped.low == pytest.approx(-result.high)
    assert swapped.p_value == result.p_value


def test_no_discordant_pair_keeps_a_width_and_says_why():
    a, b = pairs(0, 0, both=30, neither=10)
    result = paired_difference(a, b)
    assert (result.difference, result.p_value, result.discordant) == (0.0, 1.0, 0)
    assert result.low < -0.05 and result.high > 0.05
    assert "no pair differs" in result.note
    grouped = paired_difference(a, b, clusters=np.arange(40) // 4)
    assert grouped.high > result.high  # ten clusters know less than forty rows
    assert "10 clusters" in grouped.note


def test_zeros_and_ones_and_series_count_as_right_and_wrong():
    a, b = pairs(3, 14, both=20, neither=13)
    expected = paired_difference(a, b)
    assert paired_difference([int(x) for x in a], [int(x) for x in b]) == expected
    assert paired_difference(pd.Series(a), pd.Series(b, index=range(100, 150))) == expected
    assert paired_difference(pd.Series(a, dtype=object), np.array(b)) == expected


def test_bootstrap_agrees_with_scipy_and_is_reproducible():
    rng = np.random.default_rng(2)
    a, b = rng.gamma(2.0, 10.0, 60), rng.gamma(2.0, 12.0, 60)
    ours = paired_bootstrap(a, b)
    theirs = stats.bootstrap((b - a,), np.mean, n_resamples=10_000, method="percentile", rng=3).confidence_interval
    width = theirs.high - theirs.low
    assert ours.estimate == pytest.approx(np.mean(b - a))
    assert abs(ours.low - theirs.low) < 0.03 * width
    assert abs(ours.high - theirs.high) < 0.03 * width
    assert paired_bootstrap(a, b) == ours
    assert paired_bootstrap(a, b, seed=1) != ours


def test_bootstrap_chunks_do_not_change_the_answer(monkeypatch):
    values = np.arange(50.0)
    whole = bootstrap_mean(values, resamples=500)
    monkeypatch.setattr("workbench.statistics.resampling.CHUNK", 50 * 7)
    assert bootstrap_mean(values, resamples=500) == whole


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(4)
    hits = [(i := bootstrap_mean(rng.normal(3.0, 1.0, 40), resamples=500)).low <= 3.0 <= i.high for _ in range(300)]
    assert 0.90 < np.mean(hits) < 0.98


def test_clusters_widen_the_interval_of_related_rows():
    rng = np.random.default_rng(5)
    values = np.repeat(rng.normal(size=20), 8) + rng.normal(scale=0.1, size=160)
    labels = [f"passage {i // 8}" for i in range(160)]
    naive, grouped = bootstrap_mean(values), bootstrap_mean(values, clusters=labels)
    assert naive.estimate == pytest.approx(grouped.estimate)
    assert (grouped.high - grouped.low) > 2 * (naive.high - naive.low)
    alone = bootstrap_mean(values, clusters=range(160))
    assert (alone.low, alone.high) == (naive.low, naive.high)


def test_degenerate_samples_say_so():
    equal = bootstrap_mean([5.0] * 9)
    assert (equal.low, equal.high) == (5.0, 5.0) and "not certainty" in equal.note
    single = bootstrap_mean([5.0])
    assert math.isnan(single.low) and "one independent value" in single.note
    shifted = paired_difference([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])
    assert shifted.note and shifted.difference == 0.5


def test_holm_agrees_with_statsmodels_in_any_order():
    rng = np.random.default_rng(6)
    for size in (1, 2, 7, 30):
        p = rng.random(size) ** 3
        np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1], atol=1e-10)
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_detectable_effect_is_detected_as_often_as_promised():
    n, rate = 150, 0.25
    effect = minimum_detectable_effect(n, discordant_rate=rate)
    rng = np.random.default_rng(7)
    counts = rng.multinomial(n, [(rate - effect) / 2, (rate + effect) / 2, 1 - rate], size=4000)
    found = [2 * stats.binom.cdf(min(a, b), a + b, 0.5) <= 0.05 for a, b, _ in counts]
    assert abs(np.mean(found) - 0.8) < 3 * math.sqrt(0.8 * 0.2 / 4000)


def test_detectable_effect_from_a_baseline_is_detected_as_often_as_promised():
    n, baseline = 200, 0.6
    effect = minimum_detectable_effect(n, baseline=baseline)
    rng = np.random.default_rng(8)
    a, b = rng.random((1500, n)) < baseline, rng.random((1500, n)) < baseline + effect
    found = [mcnemar_exact(x, y).p_value <= 0.05 for x, y in zip(a, b, strict=True)]
    assert abs(np.mean(found) - 0.8) < 3 * math.sqrt(0.8 * 0.2 / 1500)


def test_detectable_effect_behaves():
    sizes = [minimum_detectable_effect(n, discordant_rate=0.3) for n in (50, 100, 400, 1600)]
    assert sizes == sorted(sizes, reverse=True)
    assert minimum_detectable_effect(100, 0.2) < minimum_detectable_effect(100, 0.4)
    assert minimum_detectable_effect(10, discordant_rate=0.1) == math.inf
    assert minimum_detectable_effect(100, discordant_rate=0.0) == math.inf
    assert minimum_detectable_effect(50, baseline=0.99) == math.inf
    approximate = (1.96 + 0.8416) * math.sqrt(0.2 / 400)  # the textbook formula for a small difference
    assert minimum_detectable_effect(400, 0.2) == pytest.approx(approximate, rel=0.1)


def test_power_at_no_effect_is_the_false_alarm_rate():
    assert mcnemar_power(300, 0.1, 0.1) <= 0.05
    assert mcnemar_power(5, 0.5, 0.5) == 0.0  # five pairs never reach p = 0.05


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: wilson(5, 0), "5 of 0"),
        (lambda: wilson(6, 5), "6 of 5"),
        (lambda: wilson(1, 5, level=95), "95"),
        (lambda: mcnemar_exact([], []), "a is empty"),
        (lambda: mcnemar_exact([True], [True, False]), "a has 1, b has 2"),
        (lambda: mcnemar_exact([True, 0.5], [True, True]), r"a\[1\] is 0.5"),
        (lambda: mcnemar_exact([True], [None]), r"b\[0\] is None"),
        (lambda: paired_difference([1.0, None], [1.0, 2.0]), "a holds a value"),
        (lambda: paired_difference([1.0, math.nan], [1.0, 2.0]), r"a\[1\] is nan"),
        (lambda: bootstrap_mean([]), "values is empty"),
        (lambda: bootstrap_mean([1.0, 2.0], clusters=["x"]), "1 labels for 2 rows"),
        (lambda: bootstrap_mean([1.0, 2.0], resamples=0), "resamples"),
        (lambda: holm([0.1, 1.2]), "1.2"),
        (lambda: tango(4, 4, 6), "4, 4, n = 6"),
        (lambda: minimum_detectable_effect(100), "exactly one"),
        (lambda: minimum_detectable_effect(100, 0.2, baseline=0.5), "exactly one"),
        (lambda: minimum_detectable_effect(100, 0.2, power=1.0), "1.0"),
        (lambda: mcnemar_power(10, 0.6, 0.6), "sum <= 1"),
    ],
)
def test_errors_name_the_value(call, words):
    with pytest.raises(StatisticsError, match=words):
        call()
