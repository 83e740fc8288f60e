"""Directions and held-out AUROCs against numpy, scipy and the conditions that define them."""

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from workbench.interventions.gate import auroc
from workbench.interventions.probes import _components, _probe, direction_of, held_out_auroc


def states(pairs: int, width: int, seed: int = 0, shift: float = 0.7) -> torch.Tensor:
    """Pairs whose members share much, and differ along the first axis."""
    stream = torch.Generator().manual_seed(seed)
    both = torch.randn(1, pairs, width, generator=stream) * 2 + torch.randn(2, pairs, width, generator=stream)
    both[0, :, 0] += shift
    return both


@pytest.mark.parametrize(("pairs", "width"), [(40, 8), (6, 32)])
def test_directions_are_the_definitions(pairs: int, width: int) -> None:
    both = states(pairs, width, shift=2.0)
    difference = (both[0] - both[1]).double().numpy()
    mean = difference.mean(0)
    np.testing.assert_allclose(direction_of(both, "mean_diff").numpy(), mean, atol=1e-5)
    wanted = np.linalg.eigh(difference.T @ difference)[1][:, -1]  # not centred
    for method in ("pca", "pca_pairwise"):
        found = direction_of(both, method).double().numpy()
        assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(mean), rel=1e-4)
        assert abs(found @ wanted) / np.linalg.norm(found) == pytest.approx(1, abs=1e-5)
        assert found @ mean > 0
        assert direction_of(-both, method) @ torch.tensor(mean).float() < 0


def test_the_mean_difference_is_not_centred_away() -> None:
    both = states(50, 16)
    both[0, :, 0] = both[1, :, 0] + 6 + 0.1 * torch.randn(50, generator=torch.Generator().manual_seed(2))
    found = direction_of(both, "pca")
    assert found[0] / found.norm() > 0.9  # centred, this axis would have next to no variance


def test_the_probe_is_where_the_penalised_likelihood_has_no_slope() -> None:
    both = states(30, 6)
    weights, centre = _probe(both, penalty=1e-2)
    rows = both.flatten(0, 1).double()
    inputs = (rows - rows.mean(0)).numpy()
    inputs /= np.linalg.norm(inputs, axis=1).mean()
    labels = np.r_[np.ones(30), np.zeros(30)]
    w = weights.double().numpy()
    np.testing.assert_allclose(centre.numpy(), both.flatten(0, 1).mean(0).numpy(), atol=1e-6)
    low, high = -10.0, 10.0  # the intercept by bisection: mean prediction = share of ones
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 / (1 + np.exp(-(inputs @ w + middle)))).mean() < 0.5 else (low, middle)
    error = 1 / (1 + np.exp(-(inputs @ w + low))) - labels
    slope = inputs.T @ error / len(labels) + 2 * 1e-2 * w
    assert np.abs(slope).max() < 1e-4


def test_auroc_is_mann_whitneys_count() -> None:
    stream = np.random.default_rng(0)
    for ties in (False, True):
        first, second = stream.normal(0.5, 1, 37), stream.normal(0, 1, 23)
        if ties:
            first, second = first.round(), second.round()
        wanted = mannwhitneyu(first, second).statistic / (37 * 23)
        assert auroc(torch.tensor(first), torch.tensor(second)) == pytest.approx(wanted, rel=1e-6)
        scores = torch.tensor(np.stack([first[:23], second])).float()
        wanted = mannwhitneyu(first[:23], second).statistic / 23**2
        assert _components(scores).mean().item() == pytest.approx(wanted, rel=1e-6)


def test_no_signal_is_near_a_half_however_wide_the_states() -> None:
    """A probe parts 20 pairs of 200 numbers perfectly; held out, it knows nothing."""
    found = [held_out_auroc(torch.randn(2, 20, 200, generator=torch.Generator().manual_seed(s)), 5) for s in range(8)]
    assert 0.4 < np.mean([each.estimate for each in found]) < 0.6
    assert sum(each.low <= 0.5 <= each.high for each in found) >= 6
