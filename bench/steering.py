"""What steering costs a token: the same decode loop over transformers' cache, with and without an intervention.

Every variant decodes the same fixed tokens behind the same prompts, in turns of a few steps and random order, so that
what else the machine does falls on all alike. A turn's first steps are not timed: putting hooks in place is no cost a
token. The overhead is the median of paired ratios, turn by turn, with a bootstrap interval. Not covered: prefill.
Before anything is timed, greedy tokens are compared with a hook or a cache edit written by hand.
"""

import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

import workbench as wb
from workbench.interventions import KV, Residual
from workbench.interventions.fold import folded
from workbench.models import LM, find_blocks

WARM, TIMED = 3, 5  # steps of a turn
TOKENS = 64
RESAMPLES = 2000
# As Qwen2.5-0.5B (hidden 896, 24 layers, 14 and 2 heads, feed-forward 4864; its config.json) with 32,000 tokens
REAL = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 32_000, "tie_word_embeddings": True,
}  # fmt: skip
Block = Callable[[], AbstractContextManager[Any]]


@dataclass
class Variant:
    """Something to be timed: a block around forwards, the same by hand, and the share of a step that it may cost."""

    name: str
    block: Block
    by_hand: Block
    compared: str
    limit: float
    edit: Callable[[DynamicCache], None] | None = None  # by hand, of a cache that lacks the last prompt token


def variants(lm: LM, rows: int, length: int) -> list[Variant]:
    """One residual vector as a hook and as a bias, a KV edit, and a strength of its own for each row."""
    generator = torch.Generator().manual_seed(0)
    layer = len(lm.blocks) // 2
    config = lm.model.config.get_text_config()
    v = torch.randn(lm.d_model, generator=generator)
    shape = (config.num_key_value_heads, getattr(config, "head_dim", None) or lm.d_model // config.num_attention_heads)
    values = {place: torch.randn(shape, generator=generator) for place in range(1, len(lm.blocks))}
    one, own = Residual({layer: v}, "generated", 0.5), [0.1 * (row + 1) for row in range(rows)]
    edit = KV({place: torch.zeros(shape) for place in values}, values)
    lengths = [length] * rows

    def apply(x: Any) -> Block:
        return partial(lm.apply, x, prompt_lengths=lengths)

    def edited(cache: DynamicCache) -> None:
        for place, value in values.items():
            cache.layers[place].values[:, :, -1] += value.to(lm.device, lm.model.dtype)

    found = [
        Variant("one vector, hook", apply(one), partial(hook, lm, layer, 0.5 * v, False), "a hook by hand", 0.02),
        Variant(
            "one vector, folded", partial(folded, lm, one.at(positions="all")), partial(hook, lm, layer, 0.5 * v, True),
            "a hook by hand", 0.005,
        ),
        Variant("KV edit", apply(edit), nullcontext, "an edit by hand", 0.005, edited),
    ]  # fmt: skip
    if rows > 1:
        each = torch.tensor(own)[:, None, None] * v
        by_hand = partial(hook, lm, layer, each, False)
        steered = [strength * replaced(one, 1.0) for strength in own]
        found.append(Variant("a strength a row, hook", apply(steered), by_hand, "a hook by hand", 0.04))
    return found


def replaced(x: Residual, strength: float) -> Residual:
    """The same vectors at this strength."""
    return Residual(x.vectors, x.positions, strength)


@contextmanager
def hook(lm: LM, layer: int, change: Tensor, prompt: bool) -> Iterator[None]:
    """A vector added after a block, to the generated tokens or to the prompt too, without the workbench."""
    change = change.to(lm.device, lm.model.dtype)

    def add(module: Any, inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[1] > 1 and not prompt:
            return output
        return (hidden + change, *output[1:]) if isinstance(output, tuple) else hidden + change

    handle = lm.blocks[layer].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def greedy(lm: LM, ids: Tensor, block: Block, tokens: int, edit: Callable[[DynamicCache], None] | None) -> Tensor:
    """The likeliest tokens, one forward each, with no regard to end tokens."""
    cache, found = DynamicCache(config=lm.model.config), []
    with block():
        if edit is not None:
            lm.model(input_ids=ids[:, :-1], past_key_values=cache)
            edit(cache)
            ids = ids[:, -1:]
        for _ in range(tokens):
            ids = lm.model(input_ids=ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            found.append(ids)
    return torch.cat(found, dim=1)


@torch.no_grad()
def one_round(
    lm: LM, ids: Tensor, blocks: dict[str, Block], tokens: int, order: random.Random
) -> dict[str, list[float]]:
    """Seconds a step of every turn of every variant, in one decoded text."""
    caches = {name: DynamicCache(config=lm.model.config) for name in blocks}
    times: dict[str, list[float]] = {name: [] for name in blocks}
    for name, block in blocks.items():
        with block():
            lm.model(input_ids=ids, past_key_values=caches[name])
    names, new = list(blocks), ids[:, :1].clone()
    for _ in range(tokens // (WARM + TIMED)):
        order.shuffle(names)
        for name in names:
            with blocks[name]():
                for _ in range(WARM):
                    lm.model(input_ids=new, past_key_values=caches[name])
                began = now(lm)
                for _ in range(TIMED):
                    lm.model(input_ids=new, past_key_values=caches[name])
                times[name].append((now(lm) - began) / TIMED)
    return times


def now(lm: LM) -> float:
    """Seconds on the wall clock, after whatever a GPU still had to do."""
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
    return time.perf_counter()


def verdict(low: float, high: float, limit: float) -> str:
    """What an interval of overheads says about a limit."""
    return "within" if high <= limit else "above" if low > limit else "not resolved"


def measure(lm: LM, where: str, ids: Tensor, rounds: int, tokens: int, checked: int = 16) -> list[dict[str, Any]]:
    """A table row for every variant on these prompts, all of one length; `checked` greedy tokens are compared."""
    rows, length = ids.shape
    tried = variants(lm, rows, length)
    same = {}
    for each in tried:
        wanted = greedy(lm, ids, each.by_hand, checked, each.edit)
        found = greedy(lm, ids, each.block, checked, None)
        same[each.name] = f"{int((wanted == found).all(1).sum())} of {rows} rows as {each.compared}"
    blocks: dict[str, Block] = {"plain": nullcontext, **{each.name: each.block for each in tried}}
    order = random.Random(0)
    one_round(lm, ids, blocks, WARM + TIMED, order)  # first calls are slower
    texts = [one_round(lm, ids, blocks, tokens, order) for _ in range(rounds)]
    times = {name: np.array([step for text in texts for step in text[name]]) for name in blocks}
    lines = []
    for each in tried:
        ratios = times[each.name] / times["plain"] - 1
        drawn = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
        low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
        lines.append({
            "what": f"{each.name}, {where}, batch {rows}", "compared with": "the same loop without it",
            "plain, ms a step": 1000 * float(np.median(times["plain"])), "turns": len(ratios),
            "overhead, %": f"{100 * np.median(ratios):+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]",
            "limit, %": 100 * each.limit, "verdict": verdict(low, high, each.limit), "same result": same[each.name],
        })  # fmt: skip
    return lines


def real_shape(tokenizer: Any, **shape: int) -> LM:
    """A random float32 model of the shape of a small published one; `shape` overrides parts of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(Qwen2Config(**{**REAL, **shape})).eval()
    return LM("random", model, tokenizer, find_blocks(model), "", {})


def lines(
    lm: LM, task: wb.Task, n: int, repeats: int, *, tokens: int = TOKENS, real: dict[str, int] | None = None
) -> list[dict[str, Any]]:
    """Table rows at batch 1 and 16, and at batch 1 on a random model of a real shape.

    n: prompts to draw from, cut to one length. repeats: decoded texts are 12 times that at batch 1, 6 times at 16.
    real: overrides parts of the real shape.
    """
    texts = [lm.encode(task.messages(row)) for row in task.rows("tuning", n=n)]
    length = min(map(len, texts))
    ids = torch.tensor([text[-length:] for text in texts], device=lm.device)
    found = measure(lm, lm.name, ids[:1], 12 * repeats, tokens)
    found += measure(lm, lm.name, ids[:16], 6 * repeats, tokens)
    big = real_shape(lm.tokenizer, **(real or {}))
    million = sum(each.numel() for each in big.model.parameters()) / 1e6
    return found + measure(big, f"random {million:.0f}M", ids[:1].cpu(), max(repeats, 1), tokens // 2, 4)
