"""repeng beside the workbench: the same directions where it reads blocks, and the reasons where it does not."""

from pathlib import Path

import pytest
import torch

from bench.outside.program import Program
from tests.outside.conftest import Saved
from tests.outside.test_steering_vectors import MODELS, SIDES
from tests.test_extract import PAIRS
from workbench.interventions import extract, read_pairs
from workbench.interventions.interchange import from_gguf, to_gguf
from workbench.prompts import contrast
from workbench.tasks import Task

NORMS = {"gpt2": "ln_f"}  # the final norm's name in the model below the head


def similar(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    """Cosine but for the sign, which is a convention for principal directions."""
    return torch.cosine_similarity(mine, theirs, dim=0).abs().item()


def principal(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svd(rows, full_matrices=False).Vh[0]


@pytest.mark.parametrize("model", MODELS)
def test_both_read_the_same_tokens(repeng: Program, saved: Saved, model: str) -> None:
    lm, folder = saved(model)
    texts = [*PAIRS.positive, *PAIRS.negative]
    found, _ = repeng.ask("ids", folder, texts=texts)
    assert [found[str(number)].tolist() for number in range(len(texts))] == [lm.encode(text) for text in texts]


@pytest.mark.parametrize("model", MODELS)
def test_the_pairwise_direction_is_theirs_below_the_last_layer(repeng: Program, saved: Saved, model: str) -> None:
    lm, folder = saved(model)
    mine, (theirs, _) = (
        extract(lm, PAIRS, method="pca_pairwise").vectors,
        repeng.train(folder, **SIDES, method="pca_center"),
    )
    *below, last = sorted(mine)
    assert sorted(theirs) == [*below[1:], last]  # their default leaves the first block out
    assert min(similar(mine[layer], theirs[layer]) for layer in below[1:]) > 0.9999
    assert similar(mine[last], theirs[last]) < 0.999


@pytest.mark.parametrize("model", MODELS)
def test_their_last_layer_is_our_state_behind_the_final_norm(repeng: Program, saved: Saved, model: str) -> None:
    lm, folder = saved(model)
    theirs, _ = repeng.train(folder, **SIDES, method="pca_center")
    last = len(lm.blocks) - 1
    with torch.no_grad():
        normed = getattr(lm.base, NORMS.get(model, "norm"))(read_pairs(lm, PAIRS, kv=False).states[last])
    assert similar(principal(normed[0] - normed[1]), theirs[last]) > 0.9999


def test_their_default_centres_the_mean_difference_away_and_ours_keeps_it(
    repeng: Program, saved: Saved, word_problems: Task
) -> None:
    lm, folder = saved("lab")
    pairs = contrast(word_problems, shots=2, n=20, lm=lm)
    theirs, _ = repeng.train(folder, positive=pairs.positive, negative=pairs.negative)
    reading = read_pairs(lm, pairs, kv=False)
    mean, mine = reading.vector("mean_diff").vectors, reading.vector("pca").vectors
    for layer in sorted(theirs)[:-1]:
        differences = reading.states[layer][0] - reading.states[layer][1]
        assert similar(principal(differences - differences.mean(0)), theirs[layer]) > 0.9999
        assert similar(mine[layer], mean[layer]) > 0.99
        assert similar(theirs[layer], mean[layer]) < 0.9  # 0.34 to 0.85: what is left of it after centring


def test_left_padded_batches_move_their_learned_positions_and_not_ours(repeng: Program, saved: Saved) -> None:
    lm, folder = saved("gpt2", padding_side="left")
    alone, _ = repeng.train(folder, **SIDES, method="pca_center", batch_size=1)
    batched, _ = repeng.train(folder, **SIDES, method="pca_center")
    mine = extract(lm, PAIRS, method="pca_pairwise", batch_size=8).vectors
    assert similar(alone[1], mine[1]) > 0.9999
    assert similar(batched[1], alone[1]) < 0.99  # no position ids are passed: a shorter row starts at a later position


def test_gguf_files_go_both_ways(repeng: Program, saved: Saved, tmp_path: Path) -> None:
    lm, folder = saved("llama")
    vector = 2.0 * extract(lm, PAIRS).at(layers=[1, 2], positions="all")
    file = to_gguf(vector, tmp_path / "ours.gguf", model_hint="llama")
    theirs, _ = repeng.ask("gguf", folder, file=str(file), to=str(tmp_path / "theirs.gguf"))
    assert sorted(theirs) == ["1", "2"]
    again = from_gguf(tmp_path / "theirs.gguf", lm)
    for layer in (1, 2):
        torch.testing.assert_close(torch.from_numpy(theirs[str(layer)]), 2.0 * vector.vectors[layer])
        torch.testing.assert_close(again.strength * again.vectors[layer], 2.0 * vector.vectors[layer])
