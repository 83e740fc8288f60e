"""Extraction against loops written from the definition: one text at a time, no padding."""

from types import SimpleNamespace

import pytest
import torch
from transformers import StaticCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from tests.tiny import ARCHITECTURES, tiny_lm
from workbench.interventions import KV, Adapter, Residual, extract, random_like
from workbench.interventions.kv import plain_layer
from workbench.interventions.rotary import rotary_of
from workbench.models import LM, ModelError

PAIRS = SimpleNamespace(
    positive=["one two three:", "abc def ghi jkl mno:", "k:", "steps and more steps:"],
    negative=["one three:", "a much longer negative text:", "nine:", "no:"],
)


def states(lm: LM, text: str) -> dict[int, torch.Tensor]:
    """The last token's output of every block, read one text at a time."""
    kept: dict[int, torch.Tensor] = {}
    handles = [
        block.register_forward_hook(lambda module, inputs, output, layer=layer: kept.update({layer: output[0, -1]}))
        for layer, block in enumerate(lm.blocks)
    ]
    with torch.no_grad():
        lm.model(torch.tensor([lm.encode(text)]))
    for handle in handles:
        handle.remove()
    return kept


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_mean_difference_is_the_definition(architecture: str, batch_size: int | None) -> None:
    lm = tiny_lm(architecture)
    v = extract(lm, PAIRS, batch_size=batch_size)
    sides = [[states(lm, text) for text in side] for side in (PAIRS.positive, PAIRS.negative)]
    assert sorted(v.vectors) == list(range(len(lm.blocks)))
    for layer, vector in v.vectors.items():
        positive, negative = (torch.stack([state[layer] for state in side]).mean(0) for side in sides)
        torch.testing.assert_close(vector, positive - negative, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_kv_is_the_definition(architecture: str, batch_size: int | None) -> None:
    lm = tiny_lm(architecture)
    kv = extract(lm, PAIRS, site="kv", batch_size=batch_size)
    text_config = lm.model.config.get_text_config()
    for layer in range(len(lm.blocks)):
        key, value = 0, 0
        for sign, texts in ((1, PAIRS.positive), (-1, PAIRS.negative)):
            for text in texts:
                ids = torch.tensor([lm.encode(text)[:-1]])  # what is cached when the last token starts generation
                with torch.no_grad():
                    entry = lm.model(ids, use_cache=True).past_key_values.layers[layer]
                cached = entry.keys[:, :, -1:]
                if architecture != "gpt2":  # turn back by hand: rotate by the negative angle
                    kind = (text_config.layer_types[layer],) if architecture == "gemma3" else ()
                    place = torch.tensor([[ids.shape[1] - 1]])
                    cos, sin = lm.base.rotary_emb(cached, place, *kind)
                    cached = apply_rotary_pos_emb(cached, cached, cos, -sin)[1]
                key = key + sign * cached[0, :, 0] / 4
                value = value + sign * entry.values[0, :, -1] / 4
        torch.testing.assert_close(kv.keys[layer], key, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(kv.values[layer], value, atol=1e-4, rtol=1e-4)
    assert kv.rotated == (() if architecture == "gpt2" else tuple(range(len(lm.blocks))))


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "mistral"])
def test_unrotated_keys_do_not_know_their_position(architecture: str) -> None:
    lm = tiny_lm(architecture)
    rotary = rotary_of(lm)
    ids = torch.tensor([lm.encode("same text")] * 2)
    places = torch.arange(ids.shape[1]).repeat(2, 1) + torch.tensor([[0], [100]])
    with torch.no_grad():
        cache = lm.base(ids, attention_mask=torch.ones_like(ids), position_ids=places, use_cache=True).past_key_values
    for layer in range(len(lm.blocks)):
        keys = cache.layers[layer].keys[:, :, -1]
        assert (keys[0] - keys[1]).norm() > 0.05 * keys[0].norm()
        back = rotary.turn(keys, places[:, -1], layer, back=True)
        torch.testing.assert_close(back[0], back[1], atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(rotary.turn(back, places[:, -1], layer), keys, atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(cache.layers[layer].values[0], cache.layers[layer].values[1], atol=2e-4, rtol=1e-3)


def test_attention_scaling_is_taken_off_with_the_rotation() -> None:
    lm = tiny_lm("llama")
    rotary = rotary_of(lm)
    keys, places = torch.randn(3, 2, 16), torch.tensor([0, 5, 90])
    before = rotary.module.attention_scaling
    try:
        rotary.module.attention_scaling = 1.3
        turned = rotary.turn(keys, places, 0)
        torch.testing.assert_close(turned.norm(dim=-1), 1.3 * keys.norm(dim=-1))
        torch.testing.assert_close(rotary.turn(turned, places, 0, back=True), keys)
    finally:
        rotary.module.attention_scaling = before


def test_pca_is_the_first_uncentred_direction_on_the_mean_s_side() -> None:
    lm = tiny_lm("llama")
    mean, pca = extract(lm, PAIRS), extract(lm, PAIRS, method="pca")
    for layer in mean.vectors:
        pairs = zip(PAIRS.positive, PAIRS.negative, strict=True)
        rows = torch.stack([states(lm, a)[layer] - states(lm, b)[layer] for a, b in pairs])
        first = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]
        found = pca.vectors[layer]
        assert torch.cosine_similarity(found, first, dim=0).abs() > 0.999
        assert found @ mean.vectors[layer] > 0
        torch.testing.assert_close(found.norm(), mean.vectors[layer].norm())


def test_logistic_separates_the_sides() -> None:
    lm = tiny_lm("llama")
    probe = extract(lm, PAIRS, method="logistic")
    for layer, direction in probe.vectors.items():
        positive = torch.stack([states(lm, text)[layer] for text in PAIRS.positive]) @ direction
        negative = torch.stack([states(lm, text)[layer] for text in PAIRS.negative]) @ direction
        assert positive.min() > negative.max()


def test_random_like_has_equal_norms_and_another_direction() -> None:
    lm = tiny_lm("llama")
    v, kv = extract(lm, PAIRS), extract(lm, PAIRS, site="kv")
    control = random_like(v + kv, seed=1)
    same, other = random_like(v, 1), random_like(v, 2)
    for layer, vector in v.vectors.items():
        twin = control.parts[0].vectors[layer]
        torch.testing.assert_close(twin.norm(), vector.norm())
        assert torch.cosine_similarity(twin, vector, dim=0).abs() < 0.6
        assert torch.equal(same.vectors[layer], twin)
        assert not torch.equal(other.vectors[layer], twin)
        torch.testing.assert_close(control.parts[1].keys[layer].norm(dim=-1), kv.keys[layer].norm(dim=-1))
    with pytest.raises(ModelError, match="no random"):
        random_like(object.__new__(Adapter))


def test_extraction_leaves_no_hooks_and_notes_its_origin() -> None:
    lm = tiny_lm("llama")
    before = [len(module._forward_hooks) for module in lm.model.modules()]
    v, kv = extract(lm, PAIRS), extract(lm, PAIRS, site="kv")
    assert [len(module._forward_hooks) for module in lm.model.modules()] == before
    assert isinstance(v, Residual)
    assert isinstance(kv, KV)
    assert (v.model, v.revision) == (kv.model, kv.revision) == (lm.name, lm.revision)
    assert kv.chosen == (1, 2)


def test_caches_that_are_not_plain_are_refused_by_name() -> None:
    lm = tiny_lm("llama")
    static = StaticCache(config=lm.model.config, max_cache_len=8)
    with pytest.raises(ModelError, match="Layer 1 keeps a StaticLayer"):
        plain_layer(static, 1)
    with torch.no_grad():
        cache = lm.model(torch.tensor([[5, 6]]), use_cache=True).past_key_values
    with pytest.raises(ModelError, match="shares another layer"):
        plain_layer(cache, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"site": "weights"}, "site='weights'"),
        ({"method": "svm"}, "mean_diff, pca, logistic"),
        ({"site": "kv", "method": "pca"}, "site='kv' with mean_diff"),
    ],
)
def test_unknown_sites_and_methods_are_explained(arguments: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        extract(tiny_lm("llama"), PAIRS, **arguments)


def test_unequal_sides_are_refused() -> None:
    with pytest.raises(ModelError, match="1 positive and 2 negative"):
        extract(tiny_lm("llama"), SimpleNamespace(positive=["a"], negative=["b", "c"]))
