"""Every kind of intervention on every family: right in batches, with and without a cache, or refused by name.

`python -m tests.test_kinds` prints the table, `python -m tests.test_kinds nf4` that over 4-bit weights. What a kind has
to do in itself is tested against definitions elsewhere.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

from tests.test_adapter import make_adapter
from tests.test_cache_edits import block_of
from tests.test_interventions import PAIRS, assert_same, fingerprint
from tests.test_low_rank import low_rank
from tests.test_trained import SFT
from tests.tiny import FAMILIES, greedy, make_tiny
from workbench.interventions import (
    KV,
    CompressCache,
    DropTokens,
    Gate,
    Intervention,
    Logits,
    QuantizeCache,
    ReplaceTokens,
    Residual,
    ScaleTokens,
    SpliceBlock,
    extract,
    isolate,
    project_out,
    train_vector,
)
from workbench.interventions.fold import folded
from workbench.interventions.gate import last_states
from workbench.interventions.kv_layers import describe_cache
from workbench.models import LM, ModelError, load_model

PROMPTS = ["<|user|>What is 2+3?<|end|>", "<|user|>Hi you", "abcdefgh" * 3, "seven and 8 is"]  # ragged
TOKENS = 6
WORKS = "works"
ALONE = "works, but not for rows of different lengths in one batch"
TIES = "works, but keys of equal length tie, and a batch rounds their lengths otherwise"


@cache
def models(family: str, quantization: str | None = None) -> tuple[LM, LM, Path]:
    """A tiny model of a family, another with the same vocabulary, and a folder of their own."""
    folder = Path(mkdtemp(prefix="kinds-"))
    lm = load_model(make_tiny(family, folder / "one"), quantization=quantization)
    return lm, load_model(make_tiny(family, folder / "other", seed=3)), folder


def noise(lm: LM, size: float = 4.0) -> torch.Tensor:
    v = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(5))
    states = last_states(lm, PROMPTS, [1])[1]
    return size * states.norm(dim=-1).mean() * v / v.norm()


def residual(lm: LM, positions: object = "all") -> Residual:
    return Residual({1: noise(lm)}, positions, 1.0, lm.name, lm.revision)


def edit(lm: LM) -> KV:
    """Random keys and values for every layer that says that it takes them."""
    table = describe_cache(lm)
    able = table[table["add"]]
    draws = torch.Generator().manual_seed(0)
    keys, values = (
        {
            int(row.layer): torch.randn(int(row.kv_heads), int(row.head_dim), generator=draws)
            for row in able.itertuples()
        }
        for _ in "kv"
    )
    rotated = tuple(int(row.layer) for row in able.itertuples() if row.rotated)
    return KV(keys, values, rotated=rotated, model=lm.name, revision=lm.revision).scaled(3.0, 3.0)


def gated(lm: LM) -> Intervention:
    states = last_states(lm, PROMPTS, [1])[1]
    gate = Gate(states[0] - states[1], states.mean(0), 1, 0.0, "cosine", lm.name, lm.revision)
    return residual(lm).when(gate)


KINDS: dict[str, Callable[[LM, LM, Path], Intervention]] = {
    "add": lambda lm, other, folder: residual(lm, "generated"),
    "ablate": lambda lm, other, folder: residual(lm).ablate(),
    "clamp": lambda lm, other, folder: residual(lm, "last").clamp(1.5),
    "fold": lambda lm, other, folder: residual(lm),
    "low rank": lambda lm, other, folder: low_rank(lm, "generated"),
    "gate": lambda lm, other, folder: gated(lm),
    "KV add": lambda lm, other, folder: edit(lm),
    "scale": lambda lm, other, folder: ScaleTokens(slice(-5, None), keys=0.5, values=-3.0),
    "replace": lambda lm, other, folder: ReplaceTokens(block_of(lm, stop=2), at=-4),
    "drop": lambda lm, other, folder: DropTokens(slice(-6, None)),
    "splice": lambda lm, other, folder: SpliceBlock(block_of(lm)),
    "prefix": lambda lm, other, folder: SpliceBlock(block_of(lm), at="start"),
    "compress, knorm": lambda lm, other, folder: CompressCache(2),
    "compress, streaming": lambda lm, other, folder: CompressCache(2, "streaming"),
    "compress, snapkv": lambda lm, other, folder: CompressCache(2, "snapkv", window=2),
    "quantise": lambda lm, other, folder: QuantizeCache(4),
    "project heads out": lambda lm, other, folder: 5 * project_out(lm, {1: noise(lm)}, [(1, 0), (1, 1)]),
    "isolate weights": lambda lm, other, folder: isolate(lm, PROMPTS[:2], PROMPTS[2:], share=0.2),
    "logits": lambda lm, other, folder: Logits(expert=other, strength=1.0),
    "adapter": lambda lm, other, folder: make_adapter(lm, folder / "adapter"),
}
READ = {
    "read residual": lambda lm: extract(lm, PAIRS),
    "read KV": lambda lm: extract(lm, PAIRS, site="kv"),
    "train": lambda lm: train_vector(lm, SFT[:4], 1, steps=3),
}


def tokens(lm: LM, prompts: list[str], x: object = None, **options: object) -> list[list[int]]:
    return [row.token_ids for row in lm.generate(prompts, x, max_new_tokens=TOKENS, **options)]


@contextmanager
def in_force(lm: LM, x: Intervention, kind: str) -> Iterator[None]:
    with folded(lm, x) if kind == "fold" else lm.apply(x):
        yield


def moves(lm: LM, x: Intervention, kind: str) -> bool:
    """Whether the logits behind a prompt change, where no token does."""
    ids = torch.tensor([lm.encode(PROMPTS[0])])
    with torch.no_grad():
        plain = lm.model(ids).logits[0, -1]
        with in_force(lm, x, kind):
            return not torch.equal(plain, lm.model(ids).logits[0, -1])


def verdict(kind: str, family: str, quantization: str | None = None) -> str:
    """`WORKS`, `ALONE`, `TIES` or the words of the refusal; raises AssertionError where it does something wrong."""
    lm, other, folder = models(family, quantization)
    before, plain = fingerprint(lm), [tokens(lm, [prompt])[0] for prompt in PROMPTS]
    try:
        if kind in READ:
            found = READ[kind](lm)
            tensors = found.values if isinstance(found, KV) else found.vectors
            assert all(tensor.isfinite().all() for tensor in tensors.values())
            return WORKS
        x = KINDS[kind](lm, other, folder)
        with in_force(lm, x, kind):
            alone = [tokens(lm, [prompt])[0] for prompt in PROMPTS]
    except ModelError as refusal:
        assert_same(before, fingerprint(lm))
        return str(refusal)
    assert alone != plain or moves(lm, x, kind)
    said = WORKS
    with in_force(lm, x, kind):
        assert [greedy(lm, prompt, TOKENS) for prompt in PROMPTS] == alone
        try:
            together = tokens(lm, PROMPTS)
        except ModelError:
            said, together = ALONE, alone
        assert [greedy(lm, prompt, TOKENS, use_cache=False) for prompt in PROMPTS] == alone
        if kind == "compress, knorm" and together != alone and hasattr(lm.blocks[-1].self_attn, "k_norm"):
            said, together = TIES, alone
        assert together == alone
    assert [tokens(lm, [prompt], 0 * x)[0] for prompt in PROMPTS] == plain
    assert_same(before, fingerprint(lm))
    assert [tokens(lm, [prompt])[0] for prompt in PROMPTS] == plain
    return said


REFUSED = {  # the kinds that a family refuses, and a part of the reason
    "gpt2": {"replace": "learned embeddings", "splice": "learned embeddings"},
    "mistral_sliding": dict.fromkeys(
        ("compress, knorm", "compress, streaming", "compress, snapkv", "quantise"), "All layers .* are sliding windows"
    ),
    "gemma2": {"fold": "block 1 .*its branch is normalised"},
    "gemma3": {"fold": "block 1 .*its branch is normalised"},
    "olmo2": {"fold": "block 1 .*its branch is normalised"},
    "mixtral": {"fold": "block 1 .*spread over experts"},
    "falcon": {"compress, snapkv": "shows no queries"},
    "qwen3_next": dict.fromkeys(
        ("read KV", "scale", "replace", "drop", "splice", "prefix", "compress, knorm", "compress, streaming",
         "compress, snapkv", "quantise"),
        "Layer 0 keeps a LinearAttentionLayer",
    ),
}  # fmt: skip
NO_NF4 = dict.fromkeys(("project heads out", "isolate weights"), "keeps quantised weights")
PARTLY = {
    **{(family, "prefix"): ALONE for family in ("mistral_sliding", "gemma2", "gemma3")},
    **{(family, "compress, knorm"): TIES for family in ("qwen3", "gemma3")},
}


# PEFT's advice on making an adapter for GPT-2 and for experts that sit in one tensor
QUIET = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")


@QUIET
@pytest.mark.parametrize("kind", [*READ, *KINDS])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_is_right_or_refused_by_name(family: str, kind: str) -> None:
    found, reason = verdict(kind, family), REFUSED.get(family, {}).get(kind)
    if reason is None:  # how ties fall is a matter of the processor
        expected = PARTLY.get((family, kind), WORKS)
        assert found in ((WORKS, TIES) if expected == TIES else (expected,))
    else:
        assert re.search(reason, found)


@QUIET
@pytest.mark.parametrize("kind", [*READ, *KINDS])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "qwen3_next"])
def test_over_four_bit_weights_too(family: str, kind: str) -> None:
    found, reason = verdict(kind, family, "nf4"), NO_NF4.get(kind) or REFUSED.get(family, {}).get(kind)
    if reason is None:
        assert found in (WORKS, PARTLY.get((family, kind)))
    else:
        assert re.search(reason, found)


def main(quantization: str | None = None) -> None:
    """Print the table: a line a kind, a column a family, reasons below."""
    reasons: dict[str, str] = {}
    print("| |", " | ".join(FAMILIES), "|\n|---|", "---|" * len(FAMILIES), sep="")
    for kind in [*READ, *KINDS]:
        cells = []
        for family in FAMILIES:
            found = verdict(kind, family, quantization)
            letter = reasons.setdefault(found, chr(ord("a") + len(reasons))) if found != WORKS else "yes"
            cells.append(letter)
        print(f"| {kind} |", " | ".join(cells), "|", flush=True)
    print(*(f"{letter}: {reason}" for reason, letter in reasons.items()), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
