"""Operations on a filled cache against masked forwards, recomputation, and selections written as loops."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from tests.tiny import ARCHITECTURES, FAMILIES, greedy, make_tiny, tiny_lm
from workbench.cache import GrowingLayer, new_cache
from workbench.interventions import KV, extract, load_intervention
from workbench.interventions.kv_blocks import prefix_of, splice, take
from workbench.interventions.kv_compress import SCORES, compress
from workbench.interventions.kv_layers import describe_cache, placement
from workbench.interventions.kv_ops import drop, mask_after_drop, replace, scale
from workbench.interventions.kv_quantize import quantize
from workbench.interventions.kv_queries import watch_queries
from workbench.interventions.rotary import rotary_of
from workbench.models import LM, ModelError, load_model

TEXT = "<|user|>What is 2+3?<|end|><|assistant|>\nabc"
PAIRS = SimpleNamespace(positive=["one two three:", "abc def:", "k:"], negative=["one:", "a longer text:", "nine:"])
KINDS = {"transformers": lambda lm: DynamicCache(config=lm.model.config), "workbench": new_cache}
STEPS = 30  # more than the tiny Gemma's window of 24
ROTARY = [name for name in ARCHITECTURES if name != "gpt2"]


def ids_of(lm: LM, *texts: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Left-padded ids, mask and padding."""
    rows = [lm.encode(text) for text in texts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids, mask, [width - len(row) for row in rows]


@torch.no_grad()
def filled(lm: LM, *texts: str, kind: str = "workbench", start: int = 0) -> DynamicCache:
    ids, mask, _ = ids_of(lm, *texts)
    cache = KINDS[kind](lm)
    places = (mask.cumsum(1) - 1).clamp(min=0) + start
    lm.base(ids, attention_mask=None if mask.all() else mask, position_ids=places, past_key_values=cache)
    return cache


@torch.no_grad()
def go_on(lm: LM, cache: DynamicCache, mask: torch.Tensor | None = None, steps: int = STEPS) -> list:
    """Logits of greedy tokens after a fixed first one; positions are left to the model where nothing is padded."""
    rows = cache.layers[0].keys.shape[0]
    token, logits = torch.full((rows, 1), 70), []
    for _ in range(steps):
        options: dict = {}
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            options = {"attention_mask": mask, "position_ids": mask.cumsum(1)[:, -1:] - 1}
        logits.append(lm.model(token, past_key_values=cache, **options).logits[:, -1])
        token = logits[-1].argmax(-1, keepdim=True)
    return logits


@torch.no_grad()
def masked(lm: LM, cache: DynamicCache, gone: Sequence[Sequence[int]], length: int, steps: int = STEPS) -> list:
    """The reference of drop: a whole cache, the dropped columns masked out, positions given by hand."""
    mask = torch.ones(len(gone), length, dtype=torch.long)
    for row, columns in enumerate(gone):
        mask[row, list(columns)] = 0
    token, logits = torch.full((len(gone), 1), 70), []
    for step in range(steps):
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        places = torch.full_like(token, length + step)
        output = lm.model(token, past_key_values=cache, attention_mask=mask, position_ids=places)
        logits.append(output.logits[:, -1])
        token = logits[-1].argmax(-1, keepdim=True)
    return logits


def assert_close(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor], tolerance: float = 1e-4) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=tolerance * other.abs().max().item(), rtol=tolerance)


def edit(lm: LM, strength: float = 8.0) -> KV:
    return extract(lm, PAIRS, site="kv").scaled(strength, strength)


def kv_loop(lm: LM, prompt: str, parts: Sequence[KV], tokens: int = 10) -> list[int]:
    """KV from its definition: cache all but the last token, add head by head at one place, go on; batch 1."""
    ids = torch.tensor([lm.encode(prompt)])
    cache, rotary, new = DynamicCache(config=lm.model.config), rotary_of(lm), []
    with torch.no_grad():
        lm.model(ids[:, :-1], past_key_values=cache)
        for x in parts:
            for layer in x.chosen:
                entry, place = cache.layers[layer], ids.shape[1] + x.position
                change = x.keys[layer][None]
                if rotary is not None:
                    change = rotary.turn(change, torch.tensor([place]), layer)
                for head in range(change.shape[1]) if x.heads is None else x.heads:
                    entry.keys[0, head, x.position + 1] += x.key_strength * change[0, head]
                    entry.values[0, head, x.position + 1] += x.value_strength * x.values[layer][head]
        token = ids[:, -1:]
        while len(new) < tokens and 1 not in new:
            token = lm.model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            new.append(int(token))
    return new


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heads_and_positions_are_the_definition(architecture: str, tmp_path: Path) -> None:
    lm = tiny_lm(architecture)
    x = edit(lm)
    prompts = [TEXT, "x y z w", "abcdefgh " * 5]
    plain = [row.token_ids for row in lm.generate(prompts, max_new_tokens=10)]
    parts = [
        [x.at(heads=1)],
        [x.at(position=-4).scaled(2, 3)],
        [x.at([0, 1], heads=[0], position=-3)],
        [x.at(1, heads=0).scaled(0, 2), x.at(2, heads=1, position=-4).scaled(3, 0), x.at(2)],
    ]
    seen = []
    for choice in parts:
        together = sum(choice)
        expected = [kv_loop(lm, prompt, choice) for prompt in prompts]
        assert [row.token_ids for row in lm.generate(prompts, together, max_new_tokens=10)] == expected
        with lm.apply(together):
            assert [greedy(lm, prompt, 10) for prompt in prompts] == expected
        assert [row.token_ids for row in lm.generate(prompts, 0 * together, max_new_tokens=10)] == plain
        back = load_intervention(together.save(tmp_path / "x.safetensors"))
        assert [row.token_ids for row in lm.generate(prompts, back, max_new_tokens=10)] == expected
        seen.append(expected)
    assert all(expected != plain for expected in seen)
    rows = [None, sum(parts[1]), sum(parts[3])]
    mixed = [row.token_ids for row in lm.generate(prompts, rows, max_new_tokens=10)]
    assert mixed == [plain[0], seen[1][1], seen[3][2]]


def test_impossible_edits_are_explained() -> None:
    lm = tiny_lm("llama")
    x = edit(lm)
    for arguments, message in (
        ({"heads": 2}, "heads 0 to 1"),
        ({"heads": []}, "heads=\\[\\]"),
        ({"position": -1}, "position=-1.*-2"),
        ({"position": 0}, "position=0"),
    ):
        with pytest.raises(ModelError, match=message):
            x.at(**arguments)
    with pytest.raises(ModelError, match=r"position -5 needs prompts of 5 tokens; one has 4"):
        lm.generate(["abcdef", "abcd"], x.at(position=-5), max_new_tokens=2)
    with pytest.raises(ModelError, match="position=-1"):
        lm.generate(["abcdef"], KV(x.keys, x.values, position=-1), max_new_tokens=2)
    assert lm.generate(["abcdef", "abcd"], [x.at(position=-5), None], max_new_tokens=2)
    gemma = tiny_lm("gemma3")
    with pytest.raises(ModelError, match=r"Layer 0 .DynamicSlidingWindowLayer. stores 23 of 53"):
        gemma.generate(["abcdefgh " * 6], edit(gemma).at(0, position=-40), max_new_tokens=2)
    assert gemma.generate(["abcdefgh " * 6], edit(gemma).at(1, position=-40), max_new_tokens=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replace_and_scale_are_loops(architecture: str, kind: str) -> None:
    lm = tiny_lm(architecture)
    texts = ("abcdefgh", "xyz uvw")
    padding = ids_of(lm, *texts)[2]
    for layer in (0, 1):
        cache, plain = (filled(lm, *texts, kind=kind) for _ in range(2))
        old = plain.layers[layer]
        keys = torch.randn(2, old.keys.shape[1], 3, old.keys.shape[3], generator=torch.Generator().manual_seed(0))
        replace(cache, layer, [0, 2, -1], keys, None, padding=padding)
        replace(cache, layer, [1], None, keys[:1, :, :1], padding=padding)
        scale(cache, layer, slice(-3, -1), keys=0.5, values=-2.0, padding=padding)
        wanted_keys, wanted_values = old.keys.clone(), old.values.clone()
        for row in range(2):
            size = 8 - padding[row]
            for number, place in enumerate((0, 2, size - 1)):
                wanted_keys[row, :, padding[row] + place] = keys[row, :, number]
            wanted_values[row, :, padding[row] + 1] = keys[0, :, 0]
            for place in (size - 3, size - 2):
                wanted_keys[row, :, padding[row] + place] *= 0.5
                wanted_values[row, :, padding[row] + place] *= -2.0
        torch.testing.assert_close(cache.layers[layer].keys, wanted_keys, atol=0, rtol=0)
        torch.testing.assert_close(cache.layers[layer].values, wanted_values, atol=0, rtol=0)
        for other in set(range(len(lm.blocks))) - {layer}:
            assert torch.equal(cache.layers[other].keys, plain.layers[other].keys)
    cache, plain = filled(lm, TEXT, kind=kind), filled(lm, TEXT, kind=kind)
    scale(cache, 0, [0, 1])
    replace(cache, 1, [3], plain.layers[1].keys[:, :, 3:4], plain.layers[1].values[:, :, 3:4])
    for ours, theirs in zip(go_on(lm, cache, steps=3), go_on(lm, plain, steps=3), strict=True):
        assert torch.equal(ours, theirs)  # coefficient 1 and the same entries are nothing


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*((name, "transformers") for name in (*ARCHITECTURES, "mistral_sliding", "smollm3", "gemma2", "falcon")),
     ("llama", "workbench"), ("gemma3", "workbench")],
)  # fmt: skip
def test_dropped_tokens_are_as_if_masked_out(architecture: str, kind: str) -> None:
    lm = tiny_lm(architecture)
    sliding = any(isinstance(layer, DynamicSlidingWindowLayer) for layer in new_cache(lm).layers)
    steps = 26 if sliding else 5  # windows are 12 and 24
    for text in ("abcdefghij", TEXT + "x" * 30) if sliding else (TEXT,):
        length = len(lm.encode(text))
        for positions in ([2, 3, 7], [-1, 0], slice(1, -1, 3)):
            cache = filled(lm, text, kind=kind)
            drop(cache, positions)
            assert cache.get_seq_length() == length
            chosen = range(length)[positions] if isinstance(positions, slice) else [p % length for p in positions]
            expected = masked(lm, filled(lm, text, kind="transformers"), [list(chosen)], length, steps)
            assert_close(go_on(lm, cache, steps=steps), expected)


def test_a_row_drops_its_own_tokens_whatever_the_padding() -> None:
    for architecture in ("llama", "gpt2", "qwen3"):
        lm = tiny_lm(architecture)
        texts = (TEXT, "abcdef", "abcdefgh " * 3)
        _, mask, padding = ids_of(lm, *texts)
        cache = filled(lm, *texts)
        drop(cache, [1, 2, -2], padding=padding)
        together = go_on(lm, cache, mask_after_drop(mask, 3), steps=8)
        for row, text in enumerate(texts):
            alone = filled(lm, text)
            drop(alone, [1, 2, -2])
            assert_close([step[row : row + 1] for step in together], go_on(lm, alone, steps=8))
    lm = tiny_lm("gemma3")  # sliding: the same columns in all rows
    _, mask, padding = ids_of(lm, "abcdefgh", "xyz uvw")
    cache = filled(lm, "abcdefgh", "xyz uvw")
    with pytest.raises(ModelError, match=r"Layer 0 .DynamicSlidingWindowLayer.*same columns"):
        drop(cache, [1, 2], padding=padding)
    assert cache.layers[0].keys.shape[2] == cache.layers[1].keys.shape[2] == 8  # nothing half done
    drop(cache, [-2, -3], padding=padding)
    together = go_on(lm, cache, mask_after_drop(mask, 2))
    for row, text in enumerate(("abcdefgh", "xyz uvw")):
        alone = filled(lm, text)
        drop(alone, [-2, -3])
        assert_close([step[row : row + 1] for step in together], go_on(lm, alone))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
def test_generate_goes_on_from_a_thinned_cache(architecture: str) -> None:
    lm = tiny_lm(architecture)
    ids, length = ids_of(lm, TEXT)[0], len(lm.encode(TEXT))
    cache = filled(lm, TEXT)
    drop(cache, [3, 4, 5])
    expected = [int(step.argmax()) for step in masked(lm, filled(lm, TEXT), [[3, 4, 5]], length, steps=12)]
    whole = torch.cat([ids, torch.tensor([[70]])], dim=1)
    new = lm.model.generate(
        whole, attention_mask=torch.ones_like(whole), past_key_values=cache, do_sample=False, max_new_tokens=12
    )[0, length + 1 :].tolist()
    assert new == expected[: len(new)]
    assert len(new) == 12 or new[-1] == 1


def test_many_tokens_at_once_after_a_drop() -> None:
    lm, more = tiny_lm("llama"), torch.tensor([[70, 71, 72, 73]])
    length = len(lm.encode(TEXT))
    cache, mask = filled(lm, TEXT), torch.ones(1, length + 4, dtype=torch.long)
    drop(cache, [5, 6])
    mask[0, [5, 6]] = 0
    with torch.no_grad():
        expected = lm.model(
            more, past_key_values=filled(lm, TEXT), attention_mask=mask, position_ids=length + torch.arange(4)[None]
        ).logits
        assert_close([lm.model(more, past_key_values=cache).logits], [expected])
        gemma = tiny_lm("gemma3")
        cache = filled(gemma, TEXT)
        drop(cache, [-1])
        with pytest.raises(ModelError, match="one token a forward"):
            gemma.model(torch.tensor([[70] * 9]), past_key_values=cache)


@pytest.mark.parametrize("architecture", [*ROTARY, "smollm3", "phi3"])
def test_a_moved_block_is_the_block_computed_there(architecture: str) -> None:
    lm = tiny_lm(architecture)
    block = take(filled(lm, "abcdef"), 0, 6, lm)
    cache, old = filled(lm, TEXT), filled(lm, TEXT)
    length = len(lm.encode(TEXT))
    splice(cache, block, lm)
    there = filled(lm, "abcdef", start=length)  # nothing before it: its states do not depend on where it stands
    window = [entry.keys.shape[2] for entry in cache.layers]
    for layer, entry in enumerate(cache.layers):
        both = [torch.cat([getattr(old.layers[layer], name), getattr(there.layers[layer], name)], 2)
                for name in ("keys", "values")]  # fmt: skip
        assert_close([entry.keys, entry.values], [tensor[:, :, -window[layer] :] for tensor in both])
    assert cache.get_seq_length() == length + 6
    reference = DynamicCache(config=lm.model.config)
    for layer, entry in enumerate(cache.layers):
        reference.update(*(torch.cat([getattr(source.layers[layer], name) for source in (old, there)], 2)
                           for name in ("keys", "values")), layer)  # fmt: skip
        if isinstance(entry, DynamicSlidingWindowLayer):
            reference.layers[layer].cumulative_length = length + 6
    assert_close(go_on(lm, cache), go_on(lm, reference))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ROTARY)
def test_an_inserted_block_pushes_the_rest_up(architecture: str, kind: str) -> None:
    lm = tiny_lm(architecture)
    text, at = "abcdefghijkl", 5
    block = take(filled(lm, "uvw"), 0, 3, lm)
    cache = filled(lm, text, kind=kind)
    splice(cache, block, lm, at)
    assert cache.get_seq_length() == 15
    before, behind = filled(lm, text), filled(lm, text, start=3)  # a text moved as a whole only turns its keys
    there = filled(lm, "uvw", start=at)
    for layer, entry in enumerate(cache.layers):
        for name in ("keys", "values"):
            one, two, three = (getattr(source.layers[layer], name) for source in (before, there, behind))
            assert_close([getattr(entry, name)], [torch.cat([one[:, :, :at], two, three[:, :, at:]], dim=2)])
    assert go_on(lm, cache, steps=3)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_block_behind_a_thinned_cache(architecture: str) -> None:
    lm = tiny_lm(architecture)
    block, thin, whole = take(filled(lm, "uvw"), 0, 3, lm), filled(lm, "abcdefgh"), filled(lm, "abcdefgh")
    drop(thin, [2, 3])
    for cache in (thin, whole):
        splice(cache, block, lm)
    assert thin.get_seq_length() == 11
    assert_close(go_on(lm, thin), masked(lm, whole, [[2, 3]], 11))
    with pytest.raises(ModelError, match="has lost tokens"):
        splice(thin, block, lm, at=1)


def test_a_block_goes_out_and_in_again() -> None:
    for architecture in ("llama", "gemma3", "gpt2"):
        lm = tiny_lm(architecture)
        texts = ("abcdefgh", "xyz uvw")
        _, mask, padding = ids_of(lm, *texts)
        cache = filled(lm, *texts)
        block = take(cache, -2, 8, lm, padding=padding)
        assert block.positions.tolist() == [[6, 7], [5, 6]]
        shorter = filled(lm, *(text[:-2] for text in texts))
        splice(shorter, block, lm, padding=padding)
        for layer, entry in enumerate(cache.layers):
            real = [slice(start, None) for start in padding]
            for row in range(2):
                assert_close([shorter.layers[layer].keys[row, :, real[row]]], [entry.keys[row, :, real[row]]])
        assert_close(go_on(lm, shorter, mask, steps=4), go_on(lm, cache, mask, steps=4))
        empty = new_cache(lm)
        splice(empty, take(filled(lm, "abcdefgh"), 0, 8, lm), lm)
        assert_close(go_on(lm, empty, steps=4), go_on(lm, filled(lm, "abcdefgh"), steps=4))
        one = take(filled(lm, *texts), 0, 2, lm, padding=padding).row(1)
        assert len(one) == 2 and one.positions.tolist() == [[0, 1]]


def test_impossible_blocks_are_explained(tmp_path: Path) -> None:
    llama, gemma, gpt2 = (tiny_lm(name) for name in ("llama", "gemma3", "gpt2"))
    block = take(filled(gpt2, "abcd"), 0, 3, gpt2)
    with pytest.raises(ModelError, match="learned embeddings"):
        splice(filled(gpt2, "abcd"), block, gpt2)
    with pytest.raises(ModelError, match="learned embeddings"):
        splice(filled(gpt2, "abcd"), block, gpt2, at=0)
    with pytest.raises(ModelError, match=r"Layer 0 .DynamicSlidingWindowLayer.*last 23 of 40"):
        take(filled(gemma, "x" * 40), 0, 20, gemma)
    with pytest.raises(ModelError, match=r"revision.*rebind"):
        splice(filled(gemma, "abcd"), take(filled(llama, "abcd"), 0, 2, llama), gemma)
    with pytest.raises(ModelError, match=r"Layer 3 .*takes keys of shape .1, 2, 2, 16.*has None"):
        splice(filled(gemma, "abcd"), take(filled(llama, "abcd"), 0, 2, llama).rebind(gemma), gemma)
    other = load_model(make_tiny("llama", tmp_path / "other", seed=1))
    splice(filled(other, "abcd"), take(filled(llama, "abcd"), 0, 2, llama).rebind(other), other)
    thin = filled(llama, "abcdefgh")
    drop(thin, [2])
    for act in (lambda: take(thin, 0, 2, llama), lambda: drop(thin, [1]), lambda: scale(thin, 0, 1, 2.0)):
        with pytest.raises(ModelError, match=r"Layer 0 .GrowingLayer. has lost tokens"):
            act()
    with pytest.raises(ModelError, match="8 cached tokens"):
        drop(filled(llama, "abcdefgh"), [8])
    with pytest.raises(ModelError, match="twice"):
        drop(filled(llama, "abcdefgh"), [1, -7])
    with pytest.raises(ModelError, match="shape"):
        replace(filled(llama, "abcd"), 1, [0], torch.zeros(1, 2, 2, 16), None)
    with pytest.raises(ModelError, match=r"Layer 0 .DynamicSlidingWindowLayer.*have left"):
        scale(filled(gemma, "x" * 40), 0, [3], 2.0)


def selection(keys: torch.Tensor, keep: int, score: str, attention: torch.Tensor | None) -> list[list[int]]:
    """Which columns each head keeps, in loops; keys (heads, seq, dim), attention (query heads, window, seq)."""
    heads, length, _ = keys.shape
    kept = []
    for head in range(heads):
        if score == "knorm":
            order = sorted(range(length), key=lambda place: float(keys[head, place].norm()))
        elif score == "streaming":
            order = [*range(min(4, length)), *range(length - 1, 3, -1)]
        else:
            group, window = attention.shape[0] // heads, attention.shape[1]
            points = []
            for place in range(length - window):
                near = [p for p in range(place - 2, place + 3) if 0 <= p < length - window]
                rows = attention[head * group : (head + 1) * group]
                points.append(sum(float(row[p]) for queries in rows for row in queries for p in near))
            order = [*range(length - 1, length - window - 1, -1)]
            order += sorted(range(length - window), key=lambda place: -points[place])
        kept.append(sorted(order[:keep]))
    return kept


def compressed(lm: LM, texts: Sequence[str], keep: int, score: str, window: int = 6) -> DynamicCache:
    _, _, padding = ids_of(lm, *texts)
    with watch_queries(lm, window) as queries:
        cache = filled(lm, *texts)
    compress(cache, keep, score, queries=queries if score == "snapkv" else None, padding=padding)
    return cache


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gemma2", "falcon"])
def test_compression_keeps_what_the_definition_keeps(architecture: str, score: str, tmp_path: Path) -> None:
    lm, eager = tiny_lm(architecture), load_model(make_tiny(architecture, tmp_path))
    if (architecture, score) == ("falcon", "snapkv"):  # computes attention without transformers' function
        with pytest.raises(ModelError, match="attention function of its own"):
            compressed(lm, [TEXT], 9, score)
        return
    if score == "snapkv":
        eager.model.set_attn_implementation("eager")  # returns attention maps
    whole, keep, ids = filled(lm, TEXT), 9, ids_of(lm, TEXT)[0]
    with torch.no_grad():
        maps = eager.model(ids, output_attentions=True).attentions if score == "snapkv" else None
    cache = compressed(lm, [TEXT], keep, score)
    for layer, entry in enumerate(cache.layers):
        old = whole.layers[layer]
        if isinstance(old, DynamicSlidingWindowLayer):
            assert torch.equal(entry.keys, old.keys)
            continue
        kept = selection(old.keys[0], keep, score, maps[layer][0, :, -6:] if maps else None)
        for head, columns in enumerate(kept):
            assert torch.equal(entry.keys[0, head], old.keys[0, head, columns])
            assert torch.equal(entry.values[0, head], old.values[0, head, columns])
    assert cache.get_seq_length() == ids.shape[1]
    for keep in (ids.shape[1], 10_000):
        ours, theirs = (go_on(lm, x, steps=4) for x in (compressed(lm, [TEXT], keep, score), filled(lm, TEXT)))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_decoding_goes_on_at_the_right_positions(architecture: str) -> None:
    """Streaming keeps the same tokens in each layer and head: a masked forward is its reference."""
    lm = tiny_lm(architecture)
    length = len(lm.encode(TEXT))
    gone = list(range(4, length - 5))
    expected = masked(lm, filled(lm, TEXT), [gone], length, steps=10)
    assert_close(go_on(lm, compressed(lm, [TEXT], 9, "streaming"), steps=10), expected)


@pytest.mark.parametrize(
    ("architecture", "score"),
    [(name, score) for name in ("llama", "gemma3", "gpt2") for score in SCORES if (name, score) != ("gemma3", "knorm")],
)  # the tiny Gemma's normalised keys are equally long up to rounding
def test_compressed_rows_equal_each_row_alone(architecture: str, score: str) -> None:
    lm = tiny_lm(architecture)
    texts = (TEXT, "abcdef", "abcdefgh ij")
    mask = ids_of(lm, *texts)[1]
    together = go_on(lm, compressed(lm, texts, 8, score), mask, steps=8)
    for row, text in enumerate(texts):
        alone = go_on(lm, compressed(lm, [text], 8, score), steps=8)
        assert_close([step[row : row + 1] for step in together], alone)


def test_watching_leaves_no_trace_and_reads_what_attention_uses() -> None:
    lm = tiny_lm("qwen3")  # normalises its queries
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    before = dict(functions._local_mapping)
    ids = ids_of(lm, TEXT)[0]
    with torch.no_grad(), watch_queries(lm, 5) as outer, watch_queries(lm, 3) as inner:
        watched = lm.model(ids).logits
    assert functions._local_mapping == before
    with pytest.raises(ZeroDivisionError), watch_queries(lm):
        1 / 0
    assert functions._local_mapping == before
    with torch.no_grad():
        assert torch.equal(watched, lm.model(ids).logits)
    assert all(torch.equal(outer[layer].queries[:, :, -3:], inner[layer].queries) for layer in range(3))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "granite", "phi3", "opt", "gpt_oss", "gemma2"])
def test_watched_queries_give_the_models_own_attention(architecture: str, implementation: str, tmp_path: Path) -> None:
    """Of layers that see everything; scaled logits, soft caps and sinks, where a share of attention leads nowhere."""
    lm = load_model(make_tiny(architecture, tmp_path))
    for name, parameter in lm.model.named_parameters():
        if name.endswith("sinks"):
            parameter.data = torch.linspace(-2, 4, len(parameter))
    ids, mask, padding = ids_of(lm, TEXT, "abcdefgh")
    places = (mask.cumsum(1) - 1).clamp(min=0)
    lm.model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = lm.model(ids, attention_mask=mask, position_ids=places, output_attentions=True).attentions
    if implementation == "eager" or architecture not in ("gpt_oss", "gemma2"):  # those have no other
        lm.model.set_attn_implementation(implementation)
    cache = new_cache(lm)
    with torch.no_grad(), watch_queries(lm, 6) as queries:
        lm.base(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
    seen = 0
    for layer, entry in enumerate(cache.layers):
        if not isinstance(entry, DynamicSlidingWindowLayer):
            weights = queries[layer].weights(entry.keys, torch.tensor(padding))
            torch.testing.assert_close(weights, maps[layer][:, :, -6:], atol=1e-5, rtol=1e-4)
            seen += 1
    assert seen


def test_looking_at_a_models_cache_leaves_an_enclosing_block_aside() -> None:
    lm = tiny_lm("llama")
    table, where, block = describe_cache(lm), placement(lm), take(filled(lm, "abcdef"), 1, 4, lm)
    cache = filled(lm, "abcdef")
    with lm.apply(edit(lm)):
        assert describe_cache(lm).equals(table)
        assert placement(lm) == where
        assert torch.equal(take(cache, 1, 4, lm).keys[1], block.keys[1])


def test_impossible_compressions_are_explained() -> None:
    lm = tiny_lm("llama")
    for arguments, message in (
        ((0,), "keep=0"),
        ((5, "best"), "score='best'.*knorm, streaming, snapkv"),
        ((5, "snapkv"), "snapkv needs them"),
    ):
        with pytest.raises(ModelError, match=message):
            compress(filled(lm, TEXT), *arguments)
    with pytest.raises(ModelError, match="no queries for layer 0"):
        compress(filled(lm, TEXT), 5, "snapkv", queries={})
    sliding = tiny_lm("mistral_sliding")
    with pytest.raises(ModelError, match="sliding windows"):
        compress(filled(sliding, TEXT), 5)


def test_other_caches_are_refused_by_number_and_type() -> None:
    llama = tiny_lm("llama")
    for cache, name in (
        (QuantizedCache("fp8", llama.model.config), "Fp8QuantizedLayer"),
        (StaticCache(llama.model.config, max_cache_len=64), "StaticLayer"),
    ):
        with torch.no_grad():
            llama.base(ids_of(llama, TEXT)[0], past_key_values=cache)
        for act in (
            lambda cache=cache: drop(cache, [1]),
            lambda cache=cache: scale(cache, 0, [1], 2.0),
            lambda cache=cache: compress(cache, 4),
            lambda cache=cache: take(cache, 0, 2, llama),
            lambda cache=cache: splice(cache, take(filled(llama, "ab"), 0, 2, llama), llama),
        ):
            with pytest.raises(ModelError, match=f"Layer 0 keeps a {name}"):
                act()
    hybrid = tiny_lm("qwen3_next")
    cache = filled(hybrid, TEXT)
    for act in (lambda: drop(cache, [1]), lambda: compress(cache, 4), lambda: take(cache, 0, 2, hybrid)):
        with pytest.raises(ModelError, match="Layer 0 keeps a LinearAttentionLayer"):
            act()
    scale(cache, 1, [2], values=0.0)  # a layer with plain entries can be changed by itself
    assert not cache.layers[1].values[:, :, 2].any()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_prefix_does_what_peft_does(architecture: str, tmp_path: Path) -> None:
    lm = load_model(make_tiny(architecture, tmp_path / "model"))
    torch.manual_seed(0)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    ids = ids_of(lm, TEXT)[0].expand(2, -1)
    before = [tensor.clone() for tensor in lm.model.state_dict().values()]
    tuned = get_peft_model(lm.model, config)
    tuned.save_pretrained(tmp_path / "prefix")
    tuned.eval()
    with torch.no_grad():
        expected = tuned(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    lm = load_model(tmp_path / "model")
    block, cache = prefix_of(tmp_path / "prefix", lm), new_cache(lm)
    splice(cache, block, lm)
    cache.batch_repeat_interleave(2)
    with torch.no_grad():
        assert_close([lm.model(ids, past_key_values=cache).logits], [expected])
        assert (lm.model(ids).logits - expected).abs().max() > 1e-2
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.state_dict().values(), strict=True))
    with pytest.raises(ModelError, match="adapter_config"):
        prefix_of(tmp_path, lm)


@pytest.mark.parametrize("family", [*FAMILIES, "mistral"])
def test_describe_cache_says_what_can_be_done(family: str) -> None:
    lm = tiny_lm(family)
    table = describe_cache(lm)
    assert list(table["layer"]) == list(range(len(lm.blocks)))
    block, cache = None, filled(lm, "abcdefgh")
    for row in table.itertuples():
        entry = cache.layers[row.layer]
        try:
            scale(cache, row.layer, [1], 1.0)
            assert row.scale and row.replace and row.add
            assert (row.kv_heads, row.head_dim) == (entry.keys.shape[1], entry.keys.shape[3])
            assert (row.cache == "sliding") == isinstance(entry, DynamicSlidingWindowLayer)
        except ModelError:
            assert not row.scale and not row.replace and not row.add and row.cache == "linear"
    for name, act in (
        ("drop", lambda: drop(filled(lm, "abcdefgh"), [1])),
        ("compress", lambda: compress(filled(lm, "abcdefgh"), 3)),
        ("quantize", lambda: quantize(filled(lm, "abcdefgh"), 8)),
        ("splice", lambda: splice(filled(lm, "abcdefgh"), block or take(filled(lm, "abc"), 0, 3, lm), lm)),
    ):
        try:
            act()
            assert table[name].any()
        except ModelError:
            assert not table[name].any()
    expected = {"gpt2": [False] * 3, "smollm3": [True, False, True, False],
                "qwen3_next": [False, True, True, False]}  # fmt: skip
    assert list(table["rotated"]) == expected.get(family, [True] * len(lm.blocks))
    assert bool(placement(lm).fixed) == (family == "gpt2")


def test_describe_cache_finds_shared_layers() -> None:
    from transformers import AutoModelForCausalLM, Gemma3nTextConfig

    config = Gemma3nTextConfig(
        vocab_size=128, vocab_size_per_layer_input=128, hidden_size=64, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, hidden_size_per_layer_input=8, laurel_rank=4,
        num_kv_shared_layers=2, sliding_window=12, altup_num_inputs=2, activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    llama = tiny_lm("llama")
    lm = LM("shared", model, llama.tokenizer, list(model.model.layers), "0", {})
    table = describe_cache(lm)
    assert list(table["cache"]) == ["sliding", "plain", "shared", "shared"]
    assert table["shared_with"].tolist()[2:] == [0, 1]
    assert table["window"].tolist()[0] == 12
    cache, length = filled(lm, TEXT), len(llama.encode(TEXT))
    drop(cache, [-2, -5])
    expected = masked(lm, filled(lm, TEXT, kind="transformers"), [[length - 2, length - 5]], length, steps=20)
    assert_close(go_on(lm, cache, steps=20), expected)


def test_growing_layers_count_what_is_gone() -> None:
    layer = GrowingLayer()
    assert layer.get_seq_length() == 0 and layer.get_mask_sizes(3) == (3, 0)
    layer.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4))
    layer.gone = 3
    assert layer.get_seq_length() == 8 and layer.get_mask_sizes(1) == (6, 3)
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.gone == 0
