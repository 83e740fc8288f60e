"""Clusters, seeds, families, raters and power against statsmodels, scipy and the same sums done by hand."""

import math

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.formula.api import ols
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.inter_rater import cohens_kappa
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower
from statsmodels.stats.proportion import proportion_confint

from workbench.statistics import (
    StatisticsError,
    benjamini_hochberg,
    beta_binomial_interval,
    clustered_interval,
    cohen_kappa,
    crossed_difference,
    crossed_interval,
    holm,
    mcnemar_exact,
    mcnemar_midp,
    mcnemar_power,
    mean_power,
    minimum_detectable_effect,
    questions_needed,
    sampling_variance,
    sequential_difference,
    sequential_mean,
    wilson,
)
from workbench.statistics.clustered import bell_mccaffrey, share_limits

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def uneven(rng: np.random.Generator, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Values that are related within clusters of 1 to 9 rows, in mixed order."""
    sizes = rng.integers(1, 10, clusters)
    labels = rng.permutation(np.repeat(np.arange(clusters), sizes))
    return rng.normal(size=clusters)[labels] + rng.normal(size=len(labels)), labels


@pytest.mark.parametrize("seed", range(8))
def test_cluster_robust_error_agrees_with_least_squares_on_a_constant(seed):
    rng = np.random.default_rng(seed)
    values, labels = uneven(rng, int(rng.integers(3, 40)))
    theirs = sm.OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": labels}, use_t=True)
    ours = clustered_interval(values, labels, 0.9, correction="CR1")
    np.testing.assert_allclose(ours.standard_error, theirs.bse[0], **TIGHT)
    np.testing.assert_allclose([ours.low, ours.high], theirs.conf_int(0.1)[0], **TIGHT)


def test_clusters_of_one_row_give_the_t_interval():
    values = np.random.default_rng(0).gamma(2.0, size=30)
    low, high = stats.t.interval(0.95, 29, values.mean(), stats.sem(values))
    for correction in ("CR1", "CR2"):
        found = clustered_interval(values, range(30), correction=correction)
        np.testing.assert_allclose([found.low, found.high, found.design_effect], [low, high, 1.0], **TIGHT)
        assert math.isnan(found.icc)


@pytest.mark.parametrize("seed", range(6))
def test_cr2_and_its_degrees_of_freedom_agree_with_the_matrices_written_out(seed):
    rng = np.random.default_rng(seed)
    values, labels = uneven(rng, int(rng.integers(3, 12)))
    n, groups = len(values), np.unique(labels)
    annihilator = np.eye(n) - np.full((n, n), 1 / n)
    found = clustered_interval(values, labels)
    rho = max(found.icc, 0.0)
    working = np.where(labels[:, None] == labels, rho, 0.0) + (1 - rho) * np.eye(n)
    rows, variance = [], 0.0
    for group in groups:
        own = labels == group
        # adjustment of Bell and McCaffrey: the inverse square root of the cluster's block of I - H
        size, vectors = np.linalg.eigh(annihilator[np.ix_(own, own)])
        root = vectors @ np.diag(size**-0.5) @ vectors.T
        residual = (values - values.mean())[own]
        variance += (root @ residual).sum() ** 2 / n**2
        rows.append((root @ annihilator[own]).sum(axis=0) / n)
    weights = np.array(rows) @ working @ np.array(rows).T
    np.testing.assert_allclose(found.standard_error, math.sqrt(variance), **TIGHT)
    np.testing.assert_allclose(found.df, np.trace(weights) ** 2 / (weights**2).sum(), **TIGHT)
    half = stats.t.ppf(0.975, found.df) * found.standard_error
    np.testing.assert_allclose([found.low, found.high], [values.mean() - half, values.mean() + half], **TIGHT)


def test_equal_clusters_have_one_degree_of_freedom_less_than_clusters_whatever_their_correlation():
    for icc in (0.0, 0.3, 0.9):
        np.testing.assert_allclose(bell_mccaffrey(np.full(7, 5.0), np.array(icc)), 6.0, **TIGHT)
    assert bell_mccaffrey(np.array([50.0, 2, 2, 2]), np.array(0.5)) < 2


def test_intraclass_correlation_agrees_with_an_analysis_of_variance_and_finds_the_truth():
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(400), 6)
    values = math.sqrt(0.3) * rng.normal(size=400)[labels] + math.sqrt(0.7) * rng.normal(size=2400)
    found = clustered_interval(values, labels)
    assert found.icc == pytest.approx(0.3, abs=0.05)
    assert found.design_effect == pytest.approx(1 + 5 * found.icc, rel=0.01)  # Kish's formula, sizes being equal
    table = anova_lm(ols("y ~ C(g)", pd.DataFrame({"y": values[:300], "g": labels[:300]})).fit()).mean_sq
    between, within = table.iloc[0], table.iloc[1]
    icc = (between - within) / (between + 5 * within)
    np.testing.assert_allclose(clustered_interval(values[:300], labels[:300]).icc, icc, **TIGHT)


def test_beta_binomial_interval_has_the_variance_of_beta_binomial_counts():
    """The effective number of rows is the one at which a binomial share varies as much as the counts' share."""
    rng = np.random.default_rng(4)
    sizes, share, rho = rng.integers(3, 9, 60), 0.7, 0.25
    scale = 1 / rho - 1
    law = stats.betabinom(sizes, share * scale, (1 - share) * scale)
    counts = law.rvs(random_state=rng)
    values = [i < count for size, count in zip(sizes, counts, strict=True) for i in range(size)]
    found = beta_binomial_interval(values, np.repeat(np.arange(60), sizes))
    fitted, extra = found.estimate, 1 / found.icc - 1
    exact = stats.betabinom(sizes, fitted * extra, (1 - fitted) * extra).var().sum() / sizes.sum() ** 2
    np.testing.assert_allclose(found.standard_error**2, exact, **TIGHT)
    assert found.icc == pytest.approx(rho, abs=0.12)
    t = stats.t.isf(0.025, 59)
    rows = found.estimate * (1 - found.estimate) / exact
    low, high = proportion_confint(found.estimate * rows, rows, alpha=2 * stats.norm.sf(t), method="wilson")
    np.testing.assert_allclose([found.low, found.high], [low, high], **TIGHT)


def test_beta_binomial_interval_keeps_a_width_where_all_are_right():
    found = beta_binomial_interval([True] * 40, np.repeat(np.arange(10), 4))
    assert (found.estimate, found.high) == (1.0, 1.0) and "10 clusters" in found.note
    assert found.low < wilson(10, 10).low  # t on nine degrees of freedom, not z
    nearly = beta_binomial_interval([False] + [True] * 39, np.repeat(np.arange(10), 4))
    assert 0 < nearly.low < nearly.high < 1
    many, low, high = share_limits(np.array([[4.0] * 10, [3.0] + [4.0] * 9]), np.full(10, 4.0), 0.025)
    np.testing.assert_allclose([low[0], high[0], low[1]], [found.low, found.high, nearly.low], **TIGHT)
    assert many[0] == 10


@pytest.mark.parametrize("seed", range(5))
def test_families_agree_with_statsmodels_ties_and_all(seed):
    rng = np.random.default_rng(seed)
    p = np.round(rng.random(int(rng.integers(1, 40))) ** 3, 2)
    np.testing.assert_allclose(benjamini_hochberg(p), multipletests(p, method="fdr_bh")[1], **TIGHT)
    np.testing.assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p), **TIGHT)
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1], **TIGHT)
    assert (np.array(benjamini_hochberg(p)) <= np.array(holm(p)) + 1e-15).all()


@pytest.mark.parametrize("seed", range(6))
def test_shares_and_mcnemar_agree_with_statsmodels_on_random_counts(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 3000))
    k = int(rng.integers(0, n + 1))
    found = wilson(k, n, 0.9)
    np.testing.assert_allclose([found.low, found.high], proportion_confint(k, n, 0.1, method="wilson"), **TIGHT)
    a, b = rng.random(200) < 0.6, rng.random(200) < 0.7
    table = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
    np.testing.assert_allclose(mcnemar_exact(a, b).p_value, mcnemar(table, exact=True).pvalue, **TIGHT)


def test_midp_is_the_chance_of_more_extreme_results_and_half_that_of_equal_ones():
    for only_a, only_b in [(0, 0), (0, 1), (2, 2), (3, 9), (9, 3), (0, 6), (20, 33)]:
        a = [True] * only_a + [False] * (only_b + 5)
        b = [False] * only_a + [True] * only_b + [False] * 5
        gap, chance = abs(only_a - only_b), stats.binom(only_a + only_b, 0.5).pmf
        outcomes = [(abs(2 * k - only_a - only_b), chance(k)) for k in range(only_a + only_b + 1)]
        by_hand = sum(p for g, p in outcomes if g > gap) + sum(p for g, p in outcomes if g == gap) / 2
        expected = by_hand if only_a + only_b else 1.0
        np.testing.assert_allclose(mcnemar_midp(a, b).p_value, expected, **TIGHT)


@pytest.mark.parametrize("seed", range(5))
def test_kappa_and_its_error_agree_with_statsmodels(seed):
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 4, 80)
    second = np.where(rng.random(80) < 0.6, first, rng.integers(0, 4, 80))
    theirs = cohens_kappa(pd.crosstab(first, second).reindex(index=range(4), columns=range(4), fill_value=0).to_numpy())
    ours = cohen_kappa(first, second, 0.9)
    half = stats.norm.ppf(0.95) * theirs.std_kappa / (1 - theirs.kappa)  # the error of log(1 - kappa)
    expected = [theirs.kappa, *(1 - (1 - theirs.kappa) * np.exp([half, -half]))]
    np.testing.assert_allclose([ours.estimate, ours.low, ours.high], expected, **TIGHT)
    assert cohen_kappa(second, first).estimate == pytest.approx(ours.estimate)


def test_kappa_says_when_it_is_undefined_or_rests_on_n_alone():
    one = cohen_kappa(["yes"] * 5, ["yes"] * 5)
    assert math.isnan(one.estimate) and "one label" in one.note
    full = cohen_kappa(["yes", "no"] * 10, ["yes", "no"] * 10)
    assert (full.estimate, full.high) == (1.0, 1.0)
    assert 0.6 < full.low < 0.8 and "n alone" in full.note


@pytest.mark.parametrize("seed", range(4))
def test_crossed_components_agree_with_a_two_way_analysis_of_variance(seed):
    rng = np.random.default_rng(seed)
    q, s = int(rng.integers(5, 30)), int(rng.integers(2, 6))
    table = rng.normal(size=(q, 1)) + 0.7 * rng.normal(size=(1, s)) + rng.normal(size=(q, s))
    long = pd.DataFrame({"y": table.ravel(), "q": np.repeat(range(q), s), "s": list(range(s)) * q})
    squares = anova_lm(ols("y ~ C(q) + C(s)", long).fit()).mean_sq
    by_q, by_s, rest = squares["C(q)"], squares["C(s)"], squares["Residual"]
    found = crossed_interval(table)
    np.testing.assert_allclose(found.residual_variance, rest, **TIGHT)
    np.testing.assert_allclose(found.question_variance, max(by_q - rest, 0) / s, **TIGHT)
    np.testing.assert_allclose(found.seed_variance, max(by_s - rest, 0) / q, **TIGHT)
    error = math.sqrt((by_q + max(by_s - rest, 0)) / (q * s))
    np.testing.assert_allclose(found.standard_error, error, **TIGHT)
    touching = crossed_interval(table, level=1 - found.p_value)
    assert min(abs(touching.low), abs(touching.high)) < 1e-7  # the p-value is the level that just reaches 0


def test_without_seed_effects_the_crossed_interval_is_the_t_interval_over_questions():
    rng = np.random.default_rng(1)
    table = np.repeat(rng.normal(size=(40, 1)), 4, axis=1)  # every seed gives the same scores
    low, high = stats.t.interval(0.95, 39, table.mean(), stats.sem(table[:, 0]))
    for found in (crossed_interval(table), crossed_interval(table[:, :1])):
        np.testing.assert_allclose([found.low, found.high], [low, high], **TIGHT)
        np.testing.assert_allclose(found.p_value, stats.ttest_1samp(table[:, 0], 0).pvalue, rtol=1e-7)
    assert "one seed" in crossed_interval(table[:, :1]).note


def test_crossed_difference_is_the_crossed_interval_of_differences():
    rng = np.random.default_rng(2)
    a, b = rng.random((2, 30, 3)) < 0.6
    found = crossed_difference(a, b)
    assert found == crossed_interval(b.astype(float) - a)
    swapped = crossed_difference(pd.DataFrame(b), pd.DataFrame(a))
    assert swapped.low == pytest.approx(-found.high) and swapped.p_value == pytest.approx(found.p_value)
    flat = crossed_interval(np.full((5, 3), 0.25))
    assert (flat.low, flat.high, flat.seed_variance) == (0.25, 0.25, 0.0) and "not certainty" in flat.note
    assert math.isnan(crossed_interval([[0.0, 1.0]]).low)


def test_sampling_variance_finds_both_parts_and_predicts_the_error_of_other_designs():
    rng = np.random.default_rng(5)
    truth = rng.beta(2, 2, size=3000)
    found = sampling_variance(rng.random((3000, 4)) < truth[:, None])
    assert found.between == pytest.approx(0.05, rel=0.15)  # Beta(2, 2): variance 1/20, mean of p (1 - p) 1/5
    assert found.within == pytest.approx(0.20, rel=0.05)
    assert found.standard_error() == pytest.approx(math.sqrt((found.between + found.within / 4) / 3000))
    means = [(rng.random((50, 16)) < rng.beta(2, 2, size=(50, 1))).mean() for _ in range(2000)]
    assert found.standard_error(questions=50, samples=16) == pytest.approx(np.std(means), rel=0.08)
    table = rng.random((20, 1)) + rng.random((20, 3))
    means_error = stats.sem(table.mean(axis=1))
    np.testing.assert_allclose(sampling_variance(table).standard_error(), means_error, **TIGHT)


@pytest.mark.parametrize("n, effect", [(10, 0.9), (40, 0.3), (200, 0.1), (500, 0.02)])
def test_power_of_means_agrees_with_statsmodels(n, effect):
    theirs = TTestPower().power(effect / 1.3, n, 0.05)
    np.testing.assert_allclose(mean_power(n, effect, between=1.69), theirs, **TIGHT)
    np.testing.assert_allclose(mean_power(n, effect, between=0.69, within=4.0, samples=4), theirs, **TIGHT)
    smallest = minimum_detectable_effect(n, between=1.69)
    assert TTestPower().power(smallest / 1.3, n, 0.05) == pytest.approx(0.8, abs=1e-7)
    needed = questions_needed(effect, between=1.69)
    assert needed == math.ceil(TTestPower().solve_power(effect / 1.3, alpha=0.05, power=0.8) - 1e-9)


def test_power_of_mcnemar_is_the_sum_over_every_count_of_discordant_pairs():
    for n, only_a, only_b in [(7, 0.3, 0.5), (60, 0.05, 0.3), (300, 0.1, 0.17)]:
        chance = 0.0
        for pairs in range(n + 1):
            fewer = np.arange(pairs + 1)
            p = [mcnemar([[0, k], [pairs - k, 0]], exact=True).pvalue for k in fewer] if pairs else [1.0]
            law = stats.binom.pmf(fewer, pairs, only_a / (only_a + only_b))
            chance += stats.binom.pmf(pairs, n, only_a + only_b) * law[np.array(p) <= 0.05].sum()
            if n > 60 and pairs > 130:
                break
        np.testing.assert_allclose(mcnemar_power(n, only_a, only_b), chance, rtol=1e-9)


def test_questions_needed_and_the_detectable_effect_are_each_others_inverse():
    for settings in (
        {"discordant_rate": 0.25},
        {"baseline": 0.6},
        {"discordant_rate": 0.3, "cluster_size": 4, "icc": 0.2},
    ):
        n = questions_needed(0.1, **settings)
        assert minimum_detectable_effect(n, **settings) <= 0.1 + 1e-9 < minimum_detectable_effect(n - 1, **settings)
    assert mcnemar_power(questions_needed(0.1, 0.25), 0.075, 0.175) >= 0.8
    alone, grouped = questions_needed(0.1, 0.3), questions_needed(0.1, 0.3, cluster_size=5, icc=0.5)
    assert grouped == pytest.approx(3 * alone, rel=0.01)  # design effect 1 + 4 * 0.5


def test_clustered_power_is_reached_by_simulated_clusters():
    clusters, size, icc = 40, 5, 0.4
    effect = minimum_detectable_effect(200, between=1.0, cluster_size=size, icc=icc)
    rng = np.random.default_rng(6)
    shared = math.sqrt(icc) * rng.normal(size=(4000, clusters, 1))
    rows = effect + shared + math.sqrt(1 - icc) * rng.normal(size=(4000, clusters, size))
    found = stats.ttest_1samp(rows.mean(axis=2), 0, axis=1).pvalue <= 0.05
    assert abs(found.mean() - 0.8) < 3 * math.sqrt(0.16 / 4000)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: clustered_interval([1.0, math.nan], "ab"), r"values\[1\] is nan"),
        (lambda: clustered_interval([1.0, 2.0], ["a", None]), r"clusters\[1\] is None"),
        (lambda: clustered_interval([1.0, 2.0], [1.0, math.nan]), r"clusters\[1\] is nan"),
        (lambda: clustered_interval([1.0, 2.0], "a"), "1 labels for 2 rows"),
        (lambda: clustered_interval([1.0, 2.0], "ab", correction="CR3"), "CR3"),
        (lambda: clustered_interval([1.0, 2.0], "ab", 95), "95"),
        (lambda: beta_binomial_interval([1, 0.5], "ab"), r"values\[1\] is 0.5"),
        (lambda: benjamini_hochberg([0.1, -0.2]), r"p_values\[1\] is -0.2"),
        (lambda: crossed_interval([[1, 2], [1]]), r"scores\[1\] has 1 values where scores\[0\] has 2"),
        (lambda: crossed_interval([[1, 2], [1, math.nan]]), r"scores\[1\]\[1\] is nan"),
        (lambda: crossed_interval([1.0, 2.0]), r"scores\[0\] is no list"),
        (lambda: crossed_interval([]), "scores is empty"),
        (lambda: crossed_difference([[1, 2]], [[1, 2, 3]]), r"a has \(1, 2\), b has \(1, 3\)"),
        (lambda: sampling_variance([[1], [0]]), r"\(2, 1\)"),
        (lambda: sampling_variance([[1, 0], [0, 1]]).standard_error(samples=0), "got 2 and 0"),
        (lambda: cohen_kappa(["a"], ["a", "b"]), "a has 1 labels, b has 2"),
        (lambda: cohen_kappa(["a", None], ["a", "b"]), r"a\[1\] is None"),
        (lambda: sequential_mean([0.5, 1.5]), r"values\[1\] is 1.5"),
        (lambda: sequential_mean([0.5], null=1.0), "null"),
        (lambda: sequential_difference([True, 0.3], [True, True]), r"a\[1\] is 0.3"),
        (lambda: sequential_difference([True], [True, False]), "a has 1, b has 2"),
        (lambda: minimum_detectable_effect(100, 0.2, samples=4), "need `between`"),
        (lambda: minimum_detectable_effect(100, 0.2, icc=2.0), "icc = 2.0"),
        (lambda: mean_power(100, 0.1, between=-1.0), "between = -1.0"),
        (lambda: questions_needed(0.3, discordant_rate=0.2), "at most 0.2"),
        (lambda: questions_needed(1e-4, between=1.0), "over a million"),
    ],
)
def test_errors_name_the_value(call, words):
    with pytest.raises(StatisticsError, match=words):
        call()


def test_degenerate_clusters_say_so():
    alone = clustered_interval([1.0, 2.0], ["x", "x"])
    assert math.isnan(alone.low) and "one cluster" in alone.note
    assert math.isnan(beta_binomial_interval([1, 0], "xx").high)
    equal = clustered_interval([2.0] * 6, "aabbcc")
    assert (equal.low, equal.high) == (2.0, 2.0) and "not certainty" in equal.note
    assert "3 clusters" in clustered_interval([1, 2, 3, 4, 5, 7], "aabbcc").note
