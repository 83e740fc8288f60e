"""Quantised caches against rounding in loops, error bounds, each row alone, and transformers' own quantised layers."""

from collections.abc import Sequence

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer, QuantizedLayer

from tests.test_interventions import PROMPTS, assert_same, cache_edit, fingerprint, vector
from tests.test_kv import TEXT, assert_close, filled, go_on, ids_of
from tests.tiny import tiny_lm
from workbench.cache import new_cache
from workbench.interventions.kv_blocks import take
from workbench.interventions.kv_compress import compress
from workbench.interventions.kv_ops import drop, scale
from workbench.interventions.kv_quantize import GROUP, FewBitsLayer, pack, quantize, stored_bytes
from workbench.models import LM, ModelError

LONG = TEXT + "abcdefgh " * 6  # more than two groups of tokens


def read(layer: FewBitsLayer) -> list[torch.Tensor]:
    """What the next forward sees of the packed tokens."""
    return [part.unpack() for part in layer.packed]


def half_steps(entries: torch.Tensor, bits: int, by_channel: bool) -> torch.Tensor:
    """From the definition: half of (largest - least) / (2^bits - 1) of each entry's group; one head, (tokens, size)."""
    tokens, size = entries.shape
    bound = torch.zeros(tokens, size)
    for token in range(tokens):
        late = (tokens - 1 - token) // GROUP  # whole groups between this one and the end
        for column in range(size):
            rows = entries[max(0, tokens - GROUP * (late + 1)) : tokens - GROUP * late, column]
            group = rows if by_channel else entries[token]
            bound[token, column] = (group.max() - group.min()) / (2**bits - 1) / 2
    return bound


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 70])
def test_no_entry_is_off_by_more_than_half_a_step(bits: int, tokens: int) -> None:
    stream = torch.Generator().manual_seed(tokens)
    for size, shift in ((16, 0.0), (7, 300.0), (8, -3.0)):
        entries = torch.randn(2, 1, tokens, size, generator=stream) * torch.rand(size, generator=stream) * 9 + shift
        entries[0, 0] = shift  # groups without any spread
        for group in (GROUP, None):
            packed = pack(entries, bits, group)
            error = (packed.unpack() - entries).abs()
            allowed = torch.stack([half_steps(row[0], bits, group is not None)[None] for row in entries])
            # half precision moves the least value by up to 2^-10 of it, and widens the step by as much
            assert (error <= allowed * 1.01 + entries.abs() * 2.0**-9 / (2**bits - 1) + 1e-4).all()
            assert packed.codes.shape[-1] == (size if bits == 8 else -(-size // 2))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "falcon", "gemma3"])
def test_generation_goes_on_from_the_rounded_entries(architecture: str, bits: int) -> None:
    """The reference is a plain cache that holds what the quantised one says."""
    lm = tiny_lm(architecture)
    cache, plain = filled(lm, LONG), filled(lm, LONG)
    quantize(cache, bits)
    changed = 0
    for entry, exact in zip(cache.layers, plain.layers, strict=True):
        if isinstance(entry, DynamicSlidingWindowLayer):
            assert torch.equal(entry.keys, exact.keys)
            continue
        rounded = read(entry)
        for old, new in zip((exact.keys, exact.values), rounded, strict=True):
            assert (new - old).norm() < (0.01 if bits == 8 else 0.15) * old.norm()
        changed += not torch.equal(rounded[0], exact.keys)
        exact.keys, exact.values = rounded
    assert changed
    assert cache.get_seq_length() == plain.get_seq_length() == len(lm.encode(LONG))
    assert_close(go_on(lm, cache), go_on(lm, plain), 1e-5)
    assert cache.get_seq_length() == plain.get_seq_length()


def test_rows_are_rounded_as_if_alone_whatever_the_padding() -> None:
    lm, texts = tiny_lm("llama"), (LONG, "abcdef", TEXT)
    _, mask, padding = ids_of(lm, *texts)
    for bits in (8, 4):
        cache, chosen = filled(lm, *texts), filled(lm, *texts)
        exact = [[entry.keys.clone(), entry.values.clone()] for entry in cache.layers]
        quantize(cache, bits, padding=padding)
        quantize(chosen, bits, padding=padding)
        for row in range(len(texts)):
            for layer, sides in enumerate(exact):
                for part, side, group in zip(read(cache.layers[layer]), sides, (GROUP, None), strict=True):
                    alone = pack(side[row : row + 1, :, padding[row] :], bits, group).unpack()
                    assert torch.equal(part[row : row + 1, :, padding[row] :], alone)
        whole, order = read(cache.layers[1]), torch.tensor([2, 0, 2])
        chosen.reorder_cache(order)
        assert all(torch.equal(part, old[order]) for part, old in zip(read(chosen.layers[1]), whole, strict=True))
        assert_close(go_on(lm, chosen, mask[order], steps=4), [x[order] for x in go_on(lm, cache, mask, steps=4)])
        chosen.batch_repeat_interleave(2)
        chosen.batch_select_indices(torch.tensor([1, 2]))
        assert torch.equal(read(chosen.layers[1])[0], whole[0][torch.tensor([2, 0])])
        assert chosen.layers[1].keys.shape == (2, 2, 4, 16)


def test_a_cache_that_lost_tokens_keeps_its_length_and_bytes_shrink() -> None:
    lm = tiny_lm("llama")
    tokens, heads, size = len(lm.encode(LONG)) - 3, 2, 16
    for bits in (8, 4):
        cache, plain = filled(lm, LONG), filled(lm, LONG)
        for each in (cache, plain):
            drop(each, [3, 4, 5])
        assert stored_bytes(cache) == 3 * 2 * heads * tokens * size * 4
        quantize(cache, bits)
        codes = 2 * heads * tokens * size * bits // 8
        scales = 2 * 2 * heads * (-(-tokens // GROUP) * size + tokens)  # two numbers of two bytes a group
        assert stored_bytes(cache) == 3 * (codes + scales)
        assert cache.get_seq_length() == plain.get_seq_length() == len(lm.encode(LONG))
        for layer, exact in zip(cache.layers, plain.layers, strict=True):
            exact.keys, exact.values = read(layer)
        assert_close(go_on(lm, cache, steps=5), go_on(lm, plain, steps=5), 1e-5)
        assert stored_bytes(cache) == 3 * (codes + scales + 2 * heads * 5 * size * 4)  # later tokens as they are
        cache.layers[0].reset()
        assert cache.layers[0].get_seq_length() == 0


def test_half_precision_models_read_their_own_dtype() -> None:
    keys, new = torch.randn(1, 2, 40, 8).bfloat16(), torch.zeros(1, 2, 1, 8, dtype=torch.bfloat16)
    cache = DynamicCache()
    cache.update(keys, -keys, 0)
    quantize(cache, 8)
    found, values = cache.update(new, new, 0)
    assert found.dtype == values.dtype == torch.bfloat16
    assert (found[:, :, :40] - keys).abs().max() < 0.05
    assert torch.equal(found[:, :, 40:], new)


class Elsewhere(QuantizedLayer):
    """A backend of transformers' quantised layer, as quanto and hqq are; it rounds to eighths."""

    def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return (tensor * 8).round()

    def _dequantize(self, quantised: torch.Tensor) -> torch.Tensor:
        return quantised / 8


def foreign(lm: LM, layers: Sequence[int] = (0, 1, 2)) -> DynamicCache:
    cache = new_cache(lm)
    for layer in layers:
        cache.layers[layer] = Elsewhere(residual_length=4)
    return cache


def test_edits_of_quantised_caches_are_refused_by_name() -> None:
    lm = tiny_lm("llama")
    ids, before = torch.tensor([lm.encode(PROMPTS[2])]), fingerprint(lm)
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 5}
    for arguments, name in (
        ({"past_key_values": foreign(lm)}, "Elsewhere"),
        ({"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}, "Fp8QuantizedLayer"),
    ):
        with pytest.raises(ModelError, match=f"Layer 1 keeps a {name}.*cannot be edited"), lm.apply(cache_edit(lm)):
            lm.model.generate(ids, **options, **arguments)
        assert_same(before, fingerprint(lm))
    cache = filled(lm, TEXT)
    quantize(cache)
    for act in (
        lambda: quantize(cache),
        lambda: drop(cache, [1]),
        lambda: scale(cache, 0, 1, 2.0),
        lambda: compress(cache, 4),
        lambda: take(cache, 0, 2, lm),
    ):
        with pytest.raises(ModelError, match="Layer 0 keeps a FewBitsLayer"):
            act()


def test_what_cannot_be_quantised_is_explained() -> None:
    lm = tiny_lm("llama")
    mixed = foreign(lm, [1])
    with torch.no_grad():
        lm.base(ids_of(lm, TEXT)[0], past_key_values=mixed)
    with pytest.raises(ModelError, match="Layer 1 keeps a Elsewhere"):
        quantize(mixed)
    assert not any(isinstance(layer, FewBitsLayer) for layer in mixed.layers)  # nothing half done
    with pytest.raises(ModelError, match=r"bits=2.*8, 4"):
        quantize(filled(lm, TEXT), 2)
    with pytest.raises(ModelError, match="sliding windows"):
        quantize(filled(tiny_lm("mistral_sliding"), TEXT))
    with pytest.raises(ModelError, match="Layer 0 keeps a LinearAttentionLayer"):
        quantize(filled(tiny_lm("qwen3_next"), TEXT))
    huge = filled(lm, TEXT)
    huge.layers[1].keys = huge.layers[1].keys * 1e6
    with pytest.raises(ModelError, match="Layer 1 holds keys or values beyond"):
        quantize(huge)


def test_residual_steering_runs_on_a_quantised_cache() -> None:
    lm, x = tiny_lm("llama"), vector(tiny_lm("llama"), 1, "generated")
    cache, plain = filled(lm, LONG), filled(lm, LONG)
    quantize(cache)
    for layer, exact in zip(cache.layers, plain.layers, strict=True):
        exact.keys, exact.values = read(layer)
    with lm.apply(x, prompt_lengths=[len(lm.encode(LONG))]):
        assert_close(go_on(lm, cache, steps=4), go_on(lm, plain, steps=4), 1e-5)


def test_eight_bits_keep_the_lab_models_tokens(lab: LM) -> None:
    prompt = lab.render([{"role": "user", "content": "Tom has 3 apples and buys 14 more. How many does he have?"}]) * 3
    cache, plain = filled(lab, prompt), filled(lab, prompt)
    before = stored_bytes(cache)
    quantize(cache, 8)
    assert stored_bytes(cache) < 0.35 * before  # of float32
    ours, theirs = go_on(lab, cache, steps=12), go_on(lab, plain, steps=12)
    assert [int(step.argmax()) for step in ours] == [int(step.argmax()) for step in theirs]
