"""Sixteen families of decoders: interventions against the definition, each row alone, coefficient zero and NF4."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from tests.test_interventions import PAIRS, assert_same, cache_edit, fingerprint, vector
from tests.tiny import FAMILIES, greedy, make_tiny, tiny_lm
from workbench.interventions import KV, Intervention, Residual, extract
from workbench.interventions.rotary import rotary_of
from workbench.models import LM, ModelError, load_model

PROMPTS = ["<|user|>What is 2+3?<|end|><|assistant|>\n", "x y z", "abcdefgh " * 4]  # longer than the tiny windows
TOKENS = 6
LINEAR = "qwen3_next"  # its first and last layer keep a state, no keys and values
WITH_KV = tuple(family for family in FAMILIES if family != LINEAR)
# A left-padded row without any intervention is 1.6e-5 off there: transformers sums the padding's decay too, in float32.
PLAIN = (1, 2)  # layers of qwen3_next that do keep keys and values


def tokens(lm: LM, prompts: list[str], x: object = None, **options: object) -> list[list[int]]:
    return [row.token_ids for row in lm.generate(prompts, x, max_new_tokens=TOKENS, **options)]


def edit(lm: LM) -> KV:
    """An extracted KV edit; where extraction refuses the model, random keys and values for its plain layers."""
    if lm is not tiny_lm(LINEAR):
        return cache_edit(lm)
    noise = torch.Generator().manual_seed(0)
    keys, values = ({layer: torch.randn(2, 16, generator=noise) for layer in PLAIN} for _ in range(2))
    return KV(keys, values, rotated=PLAIN, model=lm.name, revision=lm.revision).scaled(4.0, 4.0)


def rotated_layers(lm: LM) -> tuple[int, ...]:
    """Layers with a rotary embedding, as the configuration says."""
    config = lm.model.config
    if config.model_type in ("gpt2", "opt"):
        return ()
    layers = range(len(lm.blocks))
    if config.model_type == "smollm3":
        return tuple(layer for layer in layers if config.no_rope_layers[layer])
    return tuple(layer for layer in layers if lm is not tiny_lm(LINEAR) or layer in PLAIN)


def hidden(output: torch.Tensor | tuple) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output  # Falcon's blocks return a tuple


@contextmanager
def outputs_of(lm: LM) -> Iterator[list[torch.Tensor]]:
    """What the blocks put out, in order of their calls."""
    outputs: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, inputs, output: outputs.append(hidden(output)))
        for block in lm.blocks
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def added(lm: LM, x: Residual, places: list[int]) -> Iterator[None]:
    """The definition: after its block, add the vector at these columns."""
    (layer, direction), *_ = x.vectors.items()

    def add(module: object, inputs: object, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        states = hidden(output).clone()
        states[0, [place for place in places if place < states.shape[1]]] += x.strength * direction
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = lm.blocks[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def recomputed(lm: LM, prompt: str, x: Residual) -> list[int]:
    """Batch 1, no cache: the whole text again for every token."""
    ids = lm.encode(prompt)
    length = len(ids)
    places = {"last": [length - 1], "generated": list(range(length, 999)), "all": list(range(999))}[x.positions]
    with added(lm, x, places), torch.no_grad():
        while len(ids) < length + TOKENS and 1 not in ids[length:]:
            ids.append(int(lm.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[length:]


@contextmanager
def rotations(lm: LM) -> Iterator[dict[int, tuple]]:
    """By layer, the arguments of the model's own rotary function in the last forward: keys before it, cos, sin."""
    source, calls, kept = sys.modules[type(lm.blocks[0]).__module__], [], {}
    original = getattr(source, "apply_rotary_pos_emb", None)

    def spy(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: object) -> tuple:
        kept[rotated_layers(lm)[len(calls) % len(rotated_layers(lm))]] = (key, cos, sin, original)
        calls.append(key)
        return original(query, key, cos, sin, *rest)

    if original is None:
        yield kept
        return
    source.apply_rotary_pos_emb = spy
    try:
        yield kept
    finally:
        source.apply_rotary_pos_emb = original


def cached_by_hand(lm: LM, ids: torch.Tensor) -> tuple[DynamicCache, dict[int, torch.Tensor], dict[int, tuple]]:
    """A filled cache, each layer's last key before its rotation, and the rotations."""
    cache = DynamicCache(config=lm.model.config)
    with rotations(lm) as calls, torch.no_grad():
        lm.model(ids, past_key_values=cache)
    keys = {}
    for layer, entry in enumerate(cache.layers):
        if lm is tiny_lm(LINEAR) and layer not in PLAIN:
            continue
        keys[layer] = entry.keys[0, :, -1].clone()
        if layer in calls:
            before = calls[layer][0][0, :, -1]  # of StableLM's keys only the rotated part is passed
            keys[layer] = torch.cat([before, keys[layer][:, before.shape[-1] :]], dim=-1)
    return cache, keys, calls


def kv_by_hand(lm: LM, prompt: str, x: KV) -> list[int]:
    """Cache prompt[:-1], add to the un-rotated last keys, rotate them again, go on with prompt[-1]; batch 1."""
    ids, new = torch.tensor([lm.encode(prompt)]), []
    cache, before, calls = cached_by_hand(lm, ids[:, :-1])
    for layer in x.chosen:
        key = (before[layer] + x.key_strength * x.keys[layer])[None, :, None]
        if layer in calls:
            old, cos, sin, rotate = calls[layer]
            width = old.shape[-1]
            turned = rotate(key[..., :width], key[..., :width], cos[:, -1:], sin[:, -1:])[1]
            key = torch.cat([turned, key[..., width:]], dim=-1)
        cache.layers[layer].keys[:, :, -1:] = key
        cache.layers[layer].values[0, :, -1] += x.value_strength * x.values[layer]
    token = ids[:, -1:]
    with torch.no_grad():
        while len(new) < TOKENS and 1 not in new:
            token = lm.model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            new.append(int(token))
    return new


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_in_order_and_are_the_residual_stream(family: str) -> None:
    lm = tiny_lm(family)
    with outputs_of(lm) as outputs, torch.no_grad():
        states = lm.model(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
    assert len(outputs) == len(lm.blocks) == lm.model.config.num_hidden_layers
    assert all(torch.equal(output, state) for output, state in zip(outputs[:-1], states[1:-1], strict=True))
    assert not torch.equal(outputs[-1], states[-1])  # the library's last one is after the final norm


@pytest.mark.parametrize("family", [*WITH_KV, "opt", "gpt_oss", "gemma4", LINEAR])
def test_residual_is_the_definition(family: str) -> None:
    lm = tiny_lm(family)
    plain = tokens(lm, PROMPTS)
    for span in ("last", "generated", "all"):
        x = vector(lm, 1, span)
        expected = [recomputed(lm, prompt, x) for prompt in PROMPTS]
        assert tokens(lm, PROMPTS, x) == expected != plain
        with lm.apply(x):
            assert [greedy(lm, prompt, TOKENS) for prompt in PROMPTS] == expected
            assert greedy(lm, PROMPTS[1], TOKENS, use_cache=False) == expected[1]


@pytest.mark.parametrize("family", [*FAMILIES, "opt", "gpt_oss"])
def test_kv_is_the_definition(family: str) -> None:
    lm = tiny_lm(family)
    for x in (edit(lm), edit(lm).scaled(keys=0.0), edit(lm).scaled(values=0.0)):
        expected = [kv_by_hand(lm, prompt, x) for prompt in PROMPTS]
        assert tokens(lm, PROMPTS, x) == expected
        with lm.apply(x):
            assert [greedy(lm, prompt, TOKENS) for prompt in PROMPTS] == expected
            assert greedy(lm, PROMPTS[1], TOKENS, use_cache=False) == expected[1]
    assert tokens(lm, PROMPTS, edit(lm)) != tokens(lm, PROMPTS)


def test_layers_without_keys_and_values_are_refused_by_name() -> None:
    lm = tiny_lm(LINEAR)
    with pytest.raises(ModelError, match="Layer 0 keeps a LinearAttentionLayer"):
        extract(lm, PAIRS, site="kv")
    x = KV({3: torch.zeros(2, 16)}, {3: torch.ones(2, 16)})
    with pytest.raises(ModelError, match="Layer 3 keeps a LinearAttentionLayer"):
        lm.generate(PROMPTS, x, max_new_tokens=2)
    with pytest.raises(ModelError, match="Layer 3 keeps a LinearAttentionLayer"), lm.apply(x):
        greedy(lm, PROMPTS[0], 2)


def test_caches_that_are_no_keys_and_values_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="GPTJAttention rotates its keys in a way of its own"):
        extract(tiny_lm("gptj"), PAIRS, site="kv")
    with pytest.raises(ModelError, match="Layer 2 keeps a DummyLayer"):
        extract(tiny_lm("gemma4"), PAIRS, site="kv")
    with pytest.raises(ModelError, match="DeepseekV3ForCausalLM caches compressed latents"):
        extract(tiny_lm("deepseek_v3"), PAIRS, site="kv")
    with pytest.raises(ModelError, match="Mamba2ForCausalLM keeps a recurrent state"):
        load_model(make_tiny("mamba2", tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficient_zero_is_plain_generation(family: str) -> None:
    lm = tiny_lm(family)
    plain = [greedy(lm, prompt, TOKENS) for prompt in PROMPTS]
    x = vector(lm) + edit(lm)
    for zero in (0 * vector(lm), 0 * edit(lm)):
        assert tokens(lm, PROMPTS, zero) == plain
        with lm.apply(zero):
            assert greedy(lm, PROMPTS[0], TOKENS) == plain[0]
        assert tokens(lm, PROMPTS * 2, [zero] * 3 + [x] * 3)[:3] == plain  # also beside rows that are steered


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_comes_back_bit_for_bit(family: str) -> None:
    lm = tiny_lm(family)
    before, plain = fingerprint(lm), tokens(lm, PROMPTS)
    for x in (vector(lm), edit(lm)):
        with lm.apply(x), lm.apply(2 * x):
            tokens(lm, PROMPTS, x)
        with pytest.raises(ZeroDivisionError), lm.apply(x), lm.apply(x):
            tokens(lm, PROMPTS, x)[1 // 0]
        with pytest.raises(ModelError), lm.apply(x), lm.apply([x, x, x]):
            lm.model(torch.tensor([[5, 6, 7]] * 2))
        assert_same(before, fingerprint(lm))
    assert tokens(lm, PROMPTS) == plain


def batch(lm: LM, rows: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, mask and positions, padded on one side."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids, mask, (mask.cumsum(1) - 1).clamp(min=0)


@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_a_batch_equal_each_row_alone(family: str, side: str) -> None:
    lm = tiny_lm(family)
    texts = [lm.encode(prompt)[: 28 - 5 * number] for number, prompt in enumerate((PROMPTS[2], *PROMPTS))]
    texts = [text[:5] for text in texts] if side == "none" else texts
    changes: list[Intervention | None] = [
        edit(lm), vector(lm, 1, "last"), None, vector(lm, 0, slice(1, 3)) + 0.5 * edit(lm)
    ]  # fmt: skip
    alone = []
    for text, x in zip(texts, changes, strict=True):
        with lm.apply([x]), torch.no_grad():
            alone.append(lm.model(torch.tensor([text])).logits[0])
    for count in (1, 4, 32):
        ids, mask, places = batch(lm, [texts[row % 4] for row in range(count)], side)
        if count == 1 and side != "none":  # padding beside a single row
            empty = torch.zeros(1, 3, dtype=torch.long)
            order = [empty, None] if side == "left" else [None, empty]
            ids, mask, places = (
                torch.cat([part if other is None else other for other in order], dim=1) for part in (ids, mask, places)
            )
        for use_cache in (True, False) if count == 4 else (True,):
            with lm.apply([changes[row % 4] for row in range(count)]), torch.no_grad():
                logits = lm.model(ids, attention_mask=mask, position_ids=places, use_cache=use_cache).logits
            for row in range(count):
                gap = (logits[row][mask[row] > 0] - alone[row % 4]).abs().max() / alone[row % 4].abs().max()
                assert gap <= (5e-5 if family == LINEAR else 1e-5), (count, row, use_cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_thirty_two_mixed_rows_equal_each_row_alone(family: str) -> None:
    lm = tiny_lm(family)
    changes = [None, vector(lm, 0, "generated"), edit(lm), 0.5 * edit(lm) - vector(lm, 1, "last")]
    pairs = [(prompt, x) for prompt in PROMPTS for x in changes]
    alone = [tokens(lm, [prompt], x)[0] for prompt, x in pairs]
    order = [row % len(pairs) for row in range(32)]
    together = tokens(lm, [pairs[row][0] for row in order], [pairs[row][1] for row in order])
    assert together == [alone[row] for row in order]


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_extraction_is_the_definition(family: str) -> None:
    lm = tiny_lm(family)
    total = {layer: torch.zeros(64) for layer in range(len(lm.blocks))}
    for sign, texts in ((1, PAIRS.positive), (-1, PAIRS.negative)):
        for text in texts:
            with outputs_of(lm) as outputs, torch.no_grad():
                lm.model(torch.tensor([lm.encode(text)]))
            for layer, output in enumerate(outputs):
                total[layer] += sign * output[0, -1] / len(texts)
    for batch_size in (1, None):
        v = extract(lm, PAIRS, batch_size=batch_size)
        assert sorted(v.vectors) == list(total)
        for layer, expected in total.items():
            torch.testing.assert_close(v.vectors[layer], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", WITH_KV)
def test_kv_extraction_is_the_definition(family: str) -> None:
    lm = tiny_lm(family)
    for batch_size in (1, None):
        kv = extract(lm, PAIRS, site="kv", batch_size=batch_size)
        assert kv.rotated == rotated_layers(lm)
        for layer in range(len(lm.blocks)):
            key, value = torch.zeros(()), torch.zeros(())
            for sign, texts in ((1, PAIRS.positive), (-1, PAIRS.negative)):
                for text in texts:
                    cache, before, _ = cached_by_hand(lm, torch.tensor([lm.encode(text)[:-1]]))
                    key = key + sign * before[layer] / len(texts)
                    value = value + sign * cache.layers[layer].values[0, :, -1] / len(texts)
            torch.testing.assert_close(kv.keys[layer], key, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(kv.values[layer], value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])  # learned positions
def test_unrotated_keys_do_not_know_their_position(family: str) -> None:
    lm = tiny_lm(family)
    rotary = rotary_of(lm)
    ids = torch.tensor([lm.encode("same text")] * 2)
    places = torch.arange(ids.shape[1]).repeat(2, 1) + torch.tensor([[0], [100]])
    with torch.no_grad():
        cache = lm.base(ids, attention_mask=torch.ones_like(ids), position_ids=places, use_cache=True).past_key_values
    for layer in range(len(lm.blocks)):
        if family == LINEAR and layer not in PLAIN:
            continue
        keys, values = cache.layers[layer].keys[:, :, -1], cache.layers[layer].values
        back = rotary.turn(keys, places[:, -1], layer, back=True) if layer in rotated_layers(lm) else keys
        assert layer not in rotated_layers(lm) or (keys[0] - keys[1]).norm() > 0.02 * keys[0].norm()
        torch.testing.assert_close(back[0], back[1], atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(values[0], values[1], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_nf4(family: str, tmp_path: Path) -> None:
    folder = make_tiny(family, tmp_path)
    if family == "falcon":
        with pytest.raises(ModelError, match=r"FalconForCausalLM.*no linear layer that bitsandbytes can hold"):
            load_model(folder, quantization="nf4")
        return
    lm = load_model(folder, quantization="nf4")
    before, plain = fingerprint(lm), [greedy(lm, prompt, TOKENS) for prompt in PROMPTS]
    direction = 4 * vector(tiny_lm(family)).vectors[1]
    x = Residual({1: direction}, "generated", 1.0, lm.name, lm.revision)
    expected = [recomputed(lm, prompt, x) for prompt in PROMPTS]
    for batch_size in (1, None):
        assert tokens(lm, PROMPTS, 0 * x, batch_size=batch_size) == plain
        assert tokens(lm, PROMPTS, x, batch_size=batch_size) == expected != plain
    assert_same(before, fingerprint(lm))
    assert tokens(lm, PROMPTS) == plain
