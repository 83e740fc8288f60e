"""The trace of cache edits: dropped tokens against attention, compressed ones against the score, refusals by name."""

import pytest
import torch

from tests.test_interventions import PROMPTS, assert_same, fingerprint, vector
from tests.test_readouts import NEW, PROMPT, run
from tests.tiny import tiny_lm
from workbench.interventions import CompressCache, DropTokens, QuantizeCache, ScaleTokens, SpliceBlock
from workbench.interventions.kv_blocks import take
from workbench.models import ModelError
from workbench.readouts import attention_to, trace


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_dropped_tokens_are_those_that_the_last_one_does_not_see(name: str, use_cache: bool) -> None:
    lm = tiny_lm(name)
    x = DropTokens((1, -3))
    table = trace(lm, PROMPT, x + vector(lm, 1, "last"), NEW, use_cache=use_cache)
    dropped = table[table.kind == "dropped"]
    length = len(lm.encode(PROMPT))
    assert set(zip(dropped.position, dropped.layer, strict=True)) == {
        (place, layer) for place in (1, length - 3) for layer in range(len(lm.blocks))
    }
    assert set(dropped.amount) == {1.0}
    with lm.apply(x):
        seen = {place: attention_to(lm, PROMPT, place).weight.max() for place in (0, 1, length - 3, length - 2)}
    assert seen[1] == seen[length - 3] == 0 < min(seen[0], seen[length - 2])
    assert set(table[table.kind == "residual"].position) == {length - 1}


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no_cache"])
def test_compressed_entries_are_shown_head_by_head(use_cache: bool) -> None:
    lm = tiny_lm("llama")
    length = len(lm.encode(PROMPT))
    table = trace(lm, PROMPT, CompressCache(4, "knorm"), NEW, use_cache=use_cache)
    cache = run(lm, PROMPT, use_cache=True).past_key_values
    for layer, entry in enumerate(cache.layers):
        norms = entry.keys[0, :, :-1].norm(dim=-1)  # the score: small keys stay
        gone = torch.ones_like(norms).scatter(1, norms.topk(4, largest=False).indices, 0.0).mean(0)
        own = table[table.layer == layer]
        found = torch.zeros(length - 1)
        found[own.position.tolist()] = torch.tensor(own.amount.tolist())
        assert found.sum() == gone.sum() == length - 1 - 4
        if layer:  # in the first one, a token that comes twice has two keys of one length
            torch.testing.assert_close(found, gone)
    assert set(table.kind) == {"dropped"}
    assert trace(lm, PROMPT, CompressCache(length), NEW).empty  # all stay
    table = trace(lm, PROMPT, CompressCache(6, "streaming"), NEW, use_cache=use_cache)  # the first four, the latest two
    assert set(table.position) == set(range(4, length - 3)) and set(table.amount) == {1.0}


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_is_shown_as_a_change_of_every_cached_token(bits: int) -> None:
    lm = tiny_lm("llama")
    length = len(lm.encode(PROMPT))
    table = trace(lm, PROMPT, QuantizeCache(bits), NEW)
    assert set(table.kind) == {"kv"} and set(table.position) == set(range(length - 1))


def test_what_has_no_positions_in_the_text_is_refused_by_a_trace() -> None:
    lm = tiny_lm("llama")
    cache = run(lm, PROMPTS[1], use_cache=True).past_key_values
    block = take(cache, 0, 3, lm)
    before = fingerprint(lm)
    for at in ("start", None, 2):
        with pytest.raises(ModelError, match="spliced"):
            trace(lm, PROMPT, SpliceBlock(block, at), NEW)
    with pytest.raises(ModelError, match="one by one"):
        trace(lm, PROMPT, CompressCache(4) + ScaleTokens(slice(None), values=0.5), NEW)
    assert_same(before, fingerprint(lm))
