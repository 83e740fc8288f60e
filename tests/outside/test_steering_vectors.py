"""steering-vectors beside the workbench: the same vectors, layer by layer, and where it differs, why."""

import numpy as np
import pytest
import torch

from bench.outside.program import Program
from tests.outside.conftest import Saved
from tests.test_extract import PAIRS
from workbench.interventions import extract
from workbench.prompts import contrast
from workbench.tasks import Task

MODELS = ("llama", "gpt2", "qwen2", "lab")
SIDES = {"positive": PAIRS.positive, "negative": PAIRS.negative}


def cosines(mine: dict[int, torch.Tensor], theirs: dict[int, torch.Tensor]) -> list[float]:
    assert sorted(mine) == sorted(theirs)
    return [torch.cosine_similarity(mine[layer], theirs[layer], dim=0).item() for layer in sorted(mine)]


@pytest.mark.parametrize("model", MODELS)
def test_both_read_the_same_tokens(steering_vectors: Program, saved: Saved, model: str) -> None:
    lm, folder = saved(model)
    texts = [*PAIRS.positive, *PAIRS.negative]
    found, _ = steering_vectors.ask("ids", folder, texts=texts)
    assert [found[str(number)].tolist() for number in range(len(texts))] == [lm.encode(text) for text in texts]


@pytest.mark.parametrize("model", MODELS)
def test_the_mean_difference_is_theirs_in_every_layer(steering_vectors: Program, saved: Saved, model: str) -> None:
    lm, folder = saved(model)
    mine, (theirs, _) = extract(lm, PAIRS).vectors, steering_vectors.train(folder, **SIDES)
    assert min(cosines(mine, theirs)) > 0.9999  # they hook the blocks too, so their last layer is before the norm
    for layer, vector in theirs.items():
        torch.testing.assert_close(mine[layer], vector, rtol=1e-4, atol=1e-4 * vector.abs().max().item())


@pytest.mark.parametrize("model", MODELS)
def test_the_first_principal_direction_is_theirs_sign_included(
    steering_vectors: Program, saved: Saved, model: str
) -> None:
    lm, folder = saved(model)
    theirs, _ = steering_vectors.train(folder, **SIDES, method="pca")
    for method in ("pca", "pca_pairwise"):
        assert min(cosines(extract(lm, PAIRS, method=method).vectors, theirs)) > 0.9999


def test_on_few_shot_pairs_of_the_lab_model_too(steering_vectors: Program, saved: Saved, word_problems: Task) -> None:
    lm, folder = saved("lab")
    pairs = contrast(word_problems, shots=2, n=12, lm=lm)
    for method, theirs in (("mean_diff", "mean"), ("pca", "pca")):
        found, _ = steering_vectors.train(folder, positive=pairs.positive, negative=pairs.negative, method=theirs)
        assert min(cosines(extract(lm, pairs, method=method).vectors, found)) > 0.9999


def test_left_padded_batches_move_their_learned_positions_and_not_ours(steering_vectors: Program, saved: Saved) -> None:
    lm, folder = saved("gpt2", padding_side="left")
    alone, _ = steering_vectors.train(folder, **SIDES)
    batched, _ = steering_vectors.train(folder, **SIDES, batch_size=4)
    assert max(cosines(batched, alone)) < 0.99  # no position ids are passed: a shorter row starts at a later position
    assert min(cosines(extract(lm, PAIRS, batch_size=4).vectors, alone)) > 0.9999


def test_with_a_cache_their_later_tokens_are_never_steered_and_ours_are(
    steering_vectors: Program, saved: Saved
) -> None:
    lm, folder = saved("llama")
    text, layer, tokens = "abc def ghi:", 1, 12
    steer = 4.0 * extract(lm, PAIRS).at(layers=[layer], positions="generated")
    vector = (4.0 * steer.vectors[layer]).tolist()
    where = {"text": text, "layer": layer, "tokens": tokens, "min_token_index": len(lm.encode(text))}
    cached, whole, plain = (
        steering_vectors.ask("generate", folder, **{**where, **each})[0]["ids"].tolist()
        for each in (
            {"vector": vector, "cached": True},
            {"vector": vector, "cached": False},
            {"vector": np.zeros(lm.d_model).tolist(), "cached": True},
        )
    )
    assert cached == plain  # tokens are counted in the current forward, which holds one token
    assert whole != plain
    (mine,) = lm.generate([text], interventions=steer, max_new_tokens=tokens)
    assert mine.token_ids == whole[: len(mine.token_ids)]
    assert len(mine.token_ids) > 4


@pytest.mark.parametrize("model", MODELS)
def test_keys_and_values_are_those_of_a_loop_in_transformers_4(
    steering_vectors: Program, saved: Saved, model: str
) -> None:
    lm, folder = saved(model)
    mine = extract(lm, PAIRS, site="kv")
    theirs, _ = steering_vectors.ask("kv", folder, **SIDES, token=-2)
    for name, tensors in (("key", mine.keys), ("value", mine.values)):
        for layer, tensor in tensors.items():
            wanted = torch.from_numpy(theirs[f"{name} {layer}"]).float()
            assert (tensor - wanted).abs().max() <= 1e-4 * wanted.abs().max().clamp(min=1e-3)
