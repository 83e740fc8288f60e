"""No spread, one label, all pairs alike, other units: what must not look like certainty."""

import math

import numpy as np
import pytest
from scipy import stats

from workbench.evaluation.stored import g_pass_k, pass_k
from workbench.statistics import cohen_kappa, crossed_difference, crossed_interval, paired_difference, tango
from workbench.statistics.paired import sign_test


def test_a_rater_with_one_label_has_no_limits():
    """Kappa is then 0 whatever the other says and its error 0: limits without a width would look certain."""
    found = cohen_kappa(["a"] * 20, ["a"] * 12 + ["b"] * 8)
    assert found.estimate == 0 and math.isnan(found.low) and math.isnan(found.high) and "single label" in found.note
    apart = cohen_kappa(list("aabb"), list("bbaa"))
    assert apart.estimate == -1 and math.isnan(apart.low) and apart.note


def test_no_spread_over_questions_is_no_certainty():
    found = crossed_interval([[1, 0], [0, 1], [1, 0]])
    assert found.low == found.high == 0.5 and "no spread seen" in found.note and found.p_value == 0.25
    every = crossed_difference([[0, 0]] * 5, [[1, 1]] * 5)
    flips = np.array(np.meshgrid(*[[-1, 1]] * 5)).reshape(5, -1).sum(0)
    assert every.p_value == (abs(flips) >= 5).mean()


def test_all_pairs_won_in_clusters_keep_a_width():
    won, lost = ([False] * 8, [True] * 8), ([True] * 8, [False] * 8)
    for (a, b), limits in ((won, tango(0, 4, 4)), (lost, tango(4, 0, 4))):
        found = paired_difference(a, b, clusters=list("aabbccdd"))
        assert (found.low, found.high) == limits and "one direction" in found.note


def test_sign_flips_do_not_depend_on_the_unit():
    rng = np.random.default_rng(0)
    values = rng.normal(0.5, 1, 30)
    wanted = paired_difference(np.zeros(30), values).p_value
    assert wanted < 0.2
    for unit in (1e-15, 1e-6, 1e9):
        assert paired_difference(np.zeros(30), values * unit).p_value == wanted


def test_midp_passes_the_level_where_all_pairs_differ():
    """Sums over every outcome: below 5 % where at most 7 pairs in 10 differ, 7.7 % where all of 16 do."""
    sizes = np.arange(61)
    rejected = np.zeros(61)
    for pairs in sizes[1:]:
        won = np.arange(pairs + 1)
        rejected[pairs] = stats.binom.pmf(won, pairs, 0.5)[sign_test(won, pairs - won, mid=True) <= 0.05].sum()
    assert rejected[16] == pytest.approx(0.0768, abs=1e-4)
    for n in range(5, 61):
        for rate in np.linspace(0.05, 0.7, 14):
            assert stats.binom.pmf(sizes, n, rate) @ rejected < 0.05


def test_the_smallest_share_of_samples_is_one_sample():
    assert g_pass_k(8, 2, 4, 1e-12) == pass_k(8, 2, 4) < 1
