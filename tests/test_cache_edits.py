"""Cache edits inside a generation against the same operations on a cache in hand, masks by hand, and each row alone."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from transformers import DynamicCache

from tests.test_interventions import assert_same, fingerprint
from tests.tiny import ARCHITECTURES, FAMILIES, greedy, make_tiny, tiny_lm
from workbench.cache import new_cache
from workbench.interventions import (
    CompressCache,
    DropTokens,
    Intervention,
    QuantizeCache,
    ReplaceTokens,
    Residual,
    ScaleTokens,
    SpliceBlock,
    extract,
    load_intervention,
)
from workbench.interventions.kv_blocks import Block, prefix_of, splice, take
from workbench.interventions.kv_compress import compress
from workbench.interventions.kv_ops import replace, scale
from workbench.interventions.kv_quantize import quantize, stored_bytes
from workbench.interventions.kv_queries import watch_queries
from workbench.models import LM, ModelError, load_model

PROMPTS = ["<|user|>What is 2+3?<|end|><|assistant|>\n", "x y z w", "abcdefgh " * 5, "<|user|>Hi<|end|><|assistant|>\n"]
PAIRS = SimpleNamespace(positive=["one two three:", "abc def:", "k:"], negative=["one:", "a longer text:", "nine:"])
TOKENS = 10


def block_of(lm: LM, text: str = "Take this. ", start: int = 0, stop: int = 4) -> Block:
    cache = new_cache(lm)
    with torch.no_grad():
        lm.base(torch.tensor([lm.encode(text)]), past_key_values=cache, use_cache=True)
    return take(cache, start, stop, lm)


def edits(lm: LM) -> dict[str, Intervention]:
    """One of each kind."""
    block = block_of(lm)
    return {
        "drop": DropTokens((1, -3)),
        "scale": ScaleTokens(slice(-5, None), keys=0.5, values=-2.0),
        "replace": ReplaceTokens(block_of(lm, stop=2), at=-4),
        "splice": SpliceBlock(block),
        "splice at": SpliceBlock(block, at=2),
        "prefix": SpliceBlock(block, at="start"),
        "knorm": CompressCache(0.5),
        "streaming": CompressCache(5, "streaming"),
        "snapkv": CompressCache(0.6, "snapkv", window=3),
        "quantize": QuantizeCache(4),
    }


def tokens(lm: LM, prompts: list[str], x: object = None, **options: object) -> list[list[int]]:
    return [row.token_ids for row in lm.generate(prompts, x, max_new_tokens=TOKENS, **options)]


def by_hand(lm: LM, prompt: str, x: Intervention) -> list[int]:
    """All but the last token cached, the operation done to the cache in hand, then a token a time, positions given."""
    ids = torch.tensor([lm.encode(prompt)])
    cached, cache, new = ids.shape[1] - 1, new_cache(lm), []
    moved = len(x.block) if isinstance(x, SpliceBlock) else 0
    start = moved if moved and x.at == "start" else 0
    mask = torch.ones(1, cached + moved, dtype=torch.long)
    with torch.no_grad():
        if start:
            splice(cache, x.block, lm)
        window = x.window if isinstance(x, CompressCache) else 1
        places = torch.arange(start, start + cached)[None]
        with watch_queries(lm, window) as queries:
            lm.base(ids[:, :-1], past_key_values=cache, position_ids=places)
        if isinstance(x, DropTokens):
            mask[0, [place + len(ids[0]) if place < 0 else place for place in x.positions]] = 0
        elif isinstance(x, ScaleTokens):
            for layer in range(len(lm.blocks)):
                scale(cache, layer, range(cached)[x.positions.start + 1 :], x.keys, x.values)
        elif isinstance(x, ReplaceTokens):
            target = range(cached + 1 + x.at, cached + 1 + x.at + len(x.block))
            other = new_cache(lm)  # the block at its new place, from the tested operation
            if target.start:
                lm.base(ids[:, : target.start], past_key_values=other)
            splice(other, x.block, lm)
            for layer in range(len(lm.blocks)):
                keys, values = (
                    getattr(other.layers[layer], name)[:, :, -len(x.block) :] for name in ("keys", "values")
                )
                replace(cache, layer, target, keys, values)
        elif isinstance(x, SpliceBlock) and x.at != "start":
            splice(cache, x.block, lm, x.at)
        elif isinstance(x, CompressCache):
            keep = -int(-x.keep * cached // 1) if x.keep < 1 else int(x.keep)
            compress(cache, keep, x.score, queries=queries if x.score == "snapkv" else None)
        elif isinstance(x, QuantizeCache):
            quantize(cache, x.bits)
        token = ids[:, -1:]
        while len(new) < TOKENS and 1 not in new:
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            places = torch.tensor([[cached + moved + len(new)]])
            output = lm.model(token, past_key_values=cache, attention_mask=mask, position_ids=places)
            token = output.logits[:, -1:].argmax(-1)
            new.append(int(token))
    return new


def or_refused(work: Callable[[], object]) -> object:
    """What came out, or the first words of the refusal."""
    try:
        return work()
    except ModelError as error:
        return f"refused: {error}"


@pytest.mark.parametrize(
    "kind", ["drop", "scale", "replace", "splice", "splice at", "prefix", "knorm", "streaming", "snapkv", "quantize"]
)
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "gpt2"])  # qwen3's keys are all of one norm
def test_edits_are_the_operations_on_a_cache_in_hand(architecture: str, kind: str) -> None:
    lm = tiny_lm(architecture)
    x = edits(lm)[kind]
    if architecture == "gpt2" and kind in ("replace", "splice", "splice at"):
        with pytest.raises(ModelError, match="cannot move"):
            tokens(lm, PROMPTS, x)
        return
    expected = [by_hand(lm, prompt, x) for prompt in PROMPTS]
    before = fingerprint(lm)
    plain = tokens(lm, PROMPTS)
    assert tokens(lm, PROMPTS, x) == expected
    assert tokens(lm, PROMPTS, x, batch_size=1) == expected
    assert expected != plain
    mixed = tokens(lm, [p for p in PROMPTS for _ in "12"], [x, None] * len(PROMPTS))
    assert mixed[::2] == expected and mixed[1::2] == plain
    with lm.apply(x):
        assert [greedy(lm, prompt, TOKENS) for prompt in PROMPTS] == expected
        assert [greedy(lm, prompt, TOKENS, use_cache=False) for prompt in PROMPTS] == expected
    assert tokens(lm, PROMPTS, 0 * x) == plain
    assert_same(before, fingerprint(lm))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_works_on_a_row_or_is_refused_by_name(family: str) -> None:
    lm = tiny_lm(family)
    prompt = PROMPTS[0][:20] if family in ("gemma2", "gemma3", "mistral_sliding") else PROMPTS[0]
    if family == "qwen3_next":  # blocks cannot be taken from it
        x: Intervention = DropTokens((1, 2))
        for x in (DropTokens((1, 2)), CompressCache(0.5), ScaleTokens((1,), values=2.0)):
            with pytest.raises(ModelError, match=r"Layer 0 .*LinearAttention"):
                tokens(lm, [prompt], x)
        partly = ScaleTokens(slice(0, -1), values=-3.0, layers=(1, 2))
        assert tokens(lm, [prompt], partly) != tokens(lm, [prompt])
        return
    for kind, x in edits(lm).items():
        ours = or_refused(lambda x=x: tokens(lm, [prompt], x)[0])
        if isinstance(ours, str):
            reason = {"gpt2": "cannot move", "falcon": "shows no queries"}.get(family, "sliding window")
            assert family in ("gpt2", "falcon", "gemma2", "gemma3", "mistral_sliding"), (kind, ours)
            assert reason in ours, (kind, ours)
        else:
            assert ours == by_hand(lm, prompt, x), kind


@pytest.mark.parametrize("architecture", ["gemma3", "mistral_sliding"])
def test_rows_with_sliding_windows_equal_each_alone_or_are_refused(architecture: str) -> None:
    lm = tiny_lm(architecture)
    for kind, x in edits(lm).items():
        alone = [or_refused(lambda x=x, p=p: tokens(lm, [p], x)[0]) for p in PROMPTS]
        together = or_refused(lambda x=x: tokens(lm, PROMPTS, x))
        assert together == alone or (isinstance(together, str) and "sliding" in together), kind
    assert tokens(lm, PROMPTS, edits(lm)["drop"]) != tokens(lm, PROMPTS)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("kind", ["drop", "scale", "replace", "knorm", "streaming", "snapkv", "quantize"])
def test_padded_batches_equal_single_rows(kind: str, padding: str) -> None:
    lm = tiny_lm("llama")
    x = edits(lm)[kind]
    ids = [lm.encode(prompt) for prompt in PROMPTS]
    width = max(map(len, ids))
    rows, masks = [], []
    for row in ids:
        pad = [0] * (width - len(row))
        rows.append(pad + row if padding == "left" else row + pad)
        masks.append([0] * len(pad) + [1] * len(row) if padding == "left" else [1] * len(row) + [0] * len(pad))
    mask = torch.tensor(masks)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with lm.apply(x), torch.no_grad():
        logits = lm.model(torch.tensor(rows), attention_mask=mask, position_ids=places).logits
        for number, row in enumerate(ids):
            alone = lm.model(torch.tensor([row])).logits[0, -1]
            ours = logits[number, -1 if padding == "left" else len(row) - 1]
            torch.testing.assert_close(ours, alone, atol=1e-5 * alone.abs().max().item(), rtol=0)


def test_a_splice_under_right_padding_is_refused() -> None:
    lm = tiny_lm("llama")
    ids = torch.tensor([[10, 11, 12, 13], [10, 11, 12, 0]])
    with lm.apply(SpliceBlock(block_of(lm))), pytest.raises(ModelError, match="on the left"):
        lm.model(ids, attention_mask=(ids > 0).long())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prefix_before_the_text_is_prefix_tuning(architecture: str, tmp_path: Path) -> None:
    lm = load_model(make_tiny(architecture, tmp_path / "model"))
    torch.manual_seed(0)
    tuned = get_peft_model(lm.model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))
    tuned.save_pretrained(tmp_path / "prefix")
    tuned.eval()
    expected = []
    for prompt in PROMPTS:
        ids = lm.encode(prompt)
        length = len(ids)
        for _ in range(TOKENS):  # recomputed for every token
            batch = torch.tensor([ids])
            with torch.no_grad():
                ids.append(int(tuned(input_ids=batch, attention_mask=torch.ones_like(batch)).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
        expected.append(ids[length:])
    lm = load_model(tmp_path / "model")
    assert tokens(lm, PROMPTS, SpliceBlock(prefix_of(tmp_path / "prefix", lm), at="start")) == expected
    assert tokens(lm, PROMPTS) != expected


def test_parts_of_a_row_come_in_one_order_whatever_their_sum() -> None:
    lm = tiny_lm("llama")
    kinds = edits(lm)
    kv = extract(lm, PAIRS, site="kv").scaled(2.0, 8.0)
    noise = Residual({1: torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))}, "generated")
    parts = [kinds["drop"], kinds["scale"], kinds["replace"], kv, noise, kinds["splice at"]]
    there, back = sum(parts), sum(reversed(parts))
    assert tokens(lm, PROMPTS, there) == tokens(lm, PROMPTS, back)
    assert tokens(lm, PROMPTS, there) == [tokens(lm, [p], there)[0] for p in PROMPTS]
    outer, inner = sum(parts[:3]), sum(parts[3:])
    with lm.apply(outer):
        nested = tokens(lm, PROMPTS, inner)
    assert nested == tokens(lm, PROMPTS, there)


def test_the_definition_of_drop_and_compress_together() -> None:
    """Where nothing is left to choose, compressing what remains changes nothing; what is dropped is never kept."""
    lm = tiny_lm("llama")
    x = DropTokens((0, 2, 3))
    assert tokens(lm, PROMPTS, x + CompressCache(1000)) == tokens(lm, PROMPTS, x)
    both = x + CompressCache(3, "streaming")  # sinks are tokens 0 to 3: of them only 1 is left, then the last two
    for prompt in PROMPTS:
        length = len(lm.encode(prompt))
        kept = {1, length - 2, length - 3} - set(x.positions)
        only = DropTokens(tuple(place for place in range(length - 1) if place not in kept))
        assert tokens(lm, [prompt], both) == tokens(lm, [prompt], only)
    assert tokens(lm, PROMPTS, both) == [tokens(lm, [p], both)[0] for p in PROMPTS]


def test_dropping_equals_a_masked_recomputation() -> None:
    """Without any cache: queries from the last prompt token on do not see the dropped keys."""
    lm = tiny_lm("llama")
    x = DropTokens((1, 4, -2))
    for prompt in PROMPTS:
        ids, new = lm.encode(prompt), []
        length = len(ids)
        gone = [1, 4, length - 2]
        while len(new) < TOKENS and 1 not in new:
            total = len(ids)
            seen = torch.ones(total, total, dtype=torch.bool).tril()
            for place in gone:
                seen[length - 1 :, place] = False
            mask = torch.zeros(1, 1, total, total).masked_fill(~seen, torch.finfo(torch.float32).min)
            with torch.no_grad():
                ids.append(
                    int(lm.model(torch.tensor([ids]), attention_mask=mask, use_cache=False).logits[0, -1].argmax())
                )
            new.append(ids[-1])
        assert tokens(lm, [prompt], x)[0] == new


def test_memory_is_freed_where_all_rows_are_compressed() -> None:
    lm = tiny_lm("llama")
    cache = DynamicCache(config=lm.model.config)
    ids = torch.tensor([lm.encode(PROMPTS[0])])
    with lm.apply(CompressCache(4)), torch.no_grad():
        lm.model(ids, past_key_values=cache)
    assert [entry.keys.shape[2] for entry in cache.layers] == [5] * len(lm.blocks)
    assert cache.get_seq_length() == ids.shape[1]
    few = DynamicCache(config=lm.model.config)
    with lm.apply(CompressCache(4) + QuantizeCache(4)), torch.no_grad():
        lm.model(ids, past_key_values=few)
    assert few.get_seq_length() == ids.shape[1] and stored_bytes(few) < stored_bytes(cache)


def test_strengths_between() -> None:
    lm = tiny_lm("llama")
    x = ScaleTokens((1, 2), keys=0.0, values=3.0)
    assert tokens(lm, PROMPTS, 0.5 * x) == tokens(lm, PROMPTS, ScaleTokens((1, 2), keys=0.5, values=2.0))
    block = block_of(lm)
    own = ReplaceTokens(block, at=1)
    for prompt in PROMPTS[:1]:
        ids = torch.tensor([lm.encode(prompt)])
        caches = []
        for strength in (0.0, 0.25, 1.0):
            cache = DynamicCache(config=lm.model.config)
            with lm.apply(strength * own), torch.no_grad():
                lm.model(ids, past_key_values=cache)
            caches.append(cache.layers[1].values[0, :, 1:5])
        torch.testing.assert_close(caches[1], 0.75 * caches[0] + 0.25 * caches[2])
    assert tokens(lm, PROMPTS, 1 * DropTokens((1,))) == tokens(lm, PROMPTS, DropTokens((1,)))


def test_saved_edits_do_the_same(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    for kind, x in edits(lm).items():
        again = load_intervention(x.save(tmp_path / kind))
        assert tokens(lm, PROMPTS, again) == tokens(lm, PROMPTS, x), kind


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda lm: 0.5 * DropTokens((1,)), "done or not done"),
        (lambda lm: DropTokens((-1,)), "not cached yet"),
        (lambda lm: DropTokens(()), "not cached yet"),
        (lambda lm: DropTokens((999,)), "0 to "),
        (lambda lm: CompressCache(0), "keep is a share"),
        (lambda lm: CompressCache(1.5), "keep is a share"),
        (lambda lm: CompressCache(4, "magic"), "knorm, streaming, snapkv"),
        (lambda lm: ScaleTokens((1,), layers=(9,)), "layers 0 to 2"),
        (lambda lm: ScaleTokens((1,), heads=(5,)), "heads 0 to 1"),
        (lambda lm: CompressCache(4) + SpliceBlock(block_of(lm)), "does neither"),
        (lambda lm: QuantizeCache(4) + QuantizeCache(8), "quantises once"),
        (lambda lm: QuantizeCache(3), "allowed are 8, 4"),
        (lambda lm: SpliceBlock(block_of(tiny_lm("mistral"))), "was made on"),
        (lambda lm: SpliceBlock(block_of(lm), at="end"), "'start'"),
    ],
)
def test_impossible_edits_are_explained(make: Callable[[LM], Intervention], message: str) -> None:
    lm = tiny_lm("llama")
    before = fingerprint(lm)
    with pytest.raises(ModelError, match=message):
        tokens(lm, PROMPTS, make(lm))
    assert_same(before, fingerprint(lm))


def test_a_gate_decides_over_cache_edits() -> None:
    lm = tiny_lm("llama")
    from workbench.interventions import fit_gate

    texts = [f"{letter} {number}" for letter in "ab" for number in range(8)]
    gate = fit_gate(lm, texts[:8], texts[8:])
    x = DropTokens((0, 1)).when(gate)
    fired = [bool(gate.fires(states)) for states in (_last_state(lm, text, gate.layer) for text in texts)]
    assert any(fired) and not all(fired)
    expected = [tokens(lm, [t], DropTokens((0, 1)) if fire else None)[0] for t, fire in zip(texts, fired, strict=True)]
    assert tokens(lm, texts, x) == expected


def _last_state(lm: LM, text: str, layer: int) -> torch.Tensor:
    from workbench.interventions.gate import last_states

    return last_states(lm, [text], [layer])[layer]


def test_rows_that_end_early_take_their_edits_along() -> None:
    """Rows leave the batch as they finish; the rest keep their own masks and positions."""
    lm = tiny_lm("llama")
    kinds = list(edits(lm).values())
    rows = [kinds[number % len(kinds)] for number in range(16)]
    prompts = [PROMPTS[number % 4] + "ab"[number % 2] * (number // 4) for number in range(16)]
    together = lm.generate(prompts, rows, max_new_tokens=40)
    assert len({len(row.token_ids) for row in together}) > 1, "some rows must end before others"
    alone = [lm.generate([p], x, max_new_tokens=40)[0].token_ids for p, x in zip(prompts, rows, strict=True)]
    assert [row.token_ids for row in together] == alone


def some_edit(lm: LM, rng: random.Random, blocks: list[Block], kv: Intervention) -> Intervention | None:
    """A random sum of kinds, at random positions; now and then at strength 0, or nothing at all."""
    low, high = rng.randrange(5), rng.randrange(-5, 0)
    makers: list[Callable[[], Intervention]] = [
        lambda: DropTokens((low, rng.randrange(6))),
        lambda: DropTokens(slice(low, high)),
        lambda: ScaleTokens((low, -2), rng.choice([0.0, 0.5, -1.0]), rng.choice([0.0, 2.0])),
        lambda: ReplaceTokens(rng.choice(blocks), rng.choice([0, 1, -7])),
        lambda: kv,
    ]
    few = rng.choice([None, None, None, 4, 8])
    parts = [make() for make in makers if rng.random() < 0.25]
    last = rng.random()
    if last < 0.25:
        parts.append(SpliceBlock(rng.choice(blocks), rng.choice([None, 0, 2, -2, "start"])))
    elif last < 0.55:
        score = rng.choice(["knorm", "streaming", "snapkv"])
        parts.append(CompressCache(rng.choice([0.3, 0.6, 1, 4, 20]), score, rng.choice([1, 3, 8])))
    if few and not last < 0.25:
        parts.append(QuantizeCache(few))
    return rng.choice([1, 1, 1, 0]) * sum(parts[1:], parts[0]) if parts else None


@pytest.mark.parametrize("seed", range(10))
def test_any_rows_side_by_side_equal_each_alone(seed: int) -> None:
    lm, rng = tiny_lm("llama"), random.Random(seed)
    blocks = [block_of(lm, stop=size) for size in (1, 2, 5)]
    kv = extract(lm, PAIRS, site="kv").scaled(2.0, 8.0).at(position=rng.choice([-2, -9]))
    prompts = ["".join(rng.choices("abcdefgh", k=rng.randrange(9, 40))) for _ in range(6)]
    prompts = [["a beginning that all of them share. " + p for p in prompts], prompts, prompts[:1] * 6][seed % 3]
    rows = [some_edit(lm, rng, blocks, kv) for _ in prompts]
    alone = [tokens(lm, [prompt], x)[0] for prompt, x in zip(prompts, rows, strict=True)]
    assert tokens(lm, prompts, rows) == alone


def test_an_early_position_behind_a_shared_beginning() -> None:
    """Prompts of other lengths that begin alike: padding must not come between an edit and its token."""
    lm = tiny_lm("llama")
    x = extract(lm, PAIRS, site="kv").scaled(2.0, 8.0).at(position=-30)
    prompts = ["a beginning that all of them share. " + end for end in ("abc", "abcdefghijk", "x y z")]
    assert tokens(lm, prompts, x) == [tokens(lm, [prompt], x)[0] for prompt in prompts]
    assert tokens(lm, prompts, x) != tokens(lm, prompts)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_damage_reads_cache_edits(architecture: str) -> None:
    import workbench as wb

    lm = tiny_lm(architecture)
    free = wb.damage(lm, 0 * DropTokens((1,)), PROMPTS, max_new_tokens=6)
    cut = wb.damage(lm, DropTokens(slice(0, -3)), PROMPTS, max_new_tokens=6)
    assert free["kl"].estimate == 0 < cut["kl"].estimate
