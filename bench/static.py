"""Steered decoding with a static cache, compiled, beside the same steering as a plain hook in `generate`.

`lm.apply` around transformers' `generate(cache_implementation="static")`: on a GPU that compiles the decode step and
replays it as a CUDA graph, the intervention inside. Models of real shapes with random weights, made on the device.
Seconds a token are those of a long answer minus those of a short one, so that prefill and compilation are out of it.
"""

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from bench.steering import hook, now
from workbench.interventions import Residual
from workbench.models import LM, find_blocks

SHORT, PROMPT = 8, 32  # tokens
GOALS = {1: ">= 4", 64: ">= 2"}
# The shapes of Qwen2.5-0.5B, SmolLM2-1.7B and Llama-3.1-8B, from their config.json
SHAPES: dict[str, Callable[[], tuple[type[PreTrainedModel], Any]]] = {
    "0.5B": lambda: (Qwen2ForCausalLM, Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151_936, tie_word_embeddings=True,
    )),
    "1.7B": lambda: (LlamaForCausalLM, LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=49_152, tie_word_embeddings=True,
    )),
    "8B": lambda: (LlamaForCausalLM, LlamaConfig(
        hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128_256,
    )),
}  # fmt: skip


def random_model(name: str, tokenizer: Any, device: torch.device, dtype: torch.dtype, **shape: int) -> LM:
    """A model of that shape with random weights; `shape` overrides parts of it."""
    kind, config = SHAPES[name]()
    for key, value in shape.items():
        setattr(config, key, value)
    config.eos_token_id, config.pad_token_id = None, 0
    torch.manual_seed(0)
    with torch.device(device):
        model = kind(config).to(dtype).eval().requires_grad_(False)
    return LM(f"random {name}", model, tokenizer, find_blocks(model), "", {})


def lines(
    tokenizer: Any, names: tuple[str, ...] = tuple(SHAPES), batches: tuple[int, ...] = (1, 64), tokens: int = 128,
    device: str = "cuda", **shape: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Table rows for every shape and batch size."""
    place = torch.device(device)
    speed = bandwidth(place)
    found = []
    for name in names:
        lm = random_model(name, tokenizer, place, torch.bfloat16 if place.type == "cuda" else torch.float32, **shape)
        size = sum(each.nbytes for each in lm.model.parameters())  # tied ones come once
        found += [measure(lm, rows, tokens, size / speed) for rows in batches]
        del lm
        gc.collect()
        torch.cuda.empty_cache()
    return found


def measure(lm: LM, rows: int, tokens: int, least: float) -> dict[str, Any]:
    """One row: a hook in plain `generate` against a steered, compiled one. least: seconds to read the weights once."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(lm.d_model, generator=generator) * 0.02
    layer = len(lm.blocks) // 2
    ids = torch.randint(5, 600, (rows, PROMPT), generator=generator).to(lm.device)
    by_hand = partial(hook, lm, layer, v, False)
    steered = partial(lm.apply, Residual({layer: v}, "generated"))
    hooked, first = seconds_a_token(lm, ids, by_hand, tokens)
    plain, _ = seconds_a_token(lm, ids, nullcontext, tokens)
    static, second = seconds_a_token(lm, ids, steered, tokens, cache_implementation="static")
    equal = int((first == second).all(1).sum())
    return {
        "what": f"steered decoding, static cache, {lm.name}, batch {rows}", "compared with": "a hook in generate",
        "that, ms a step": 1000 * hooked, "plain generate, ms": 1000 * plain, "workbench, ms": 1000 * static,
        "ratio": hooked / static, "goal": GOALS.get(rows, ""), "share of the bandwidth limit": least / static,
        "same result": f"{equal} of {rows} rows",
    }  # fmt: skip


def seconds_a_token(
    lm: LM, ids: Tensor, block: Callable[[], AbstractContextManager[Any]], tokens: int, **options: Any
) -> tuple[float, Tensor]:
    """Of one decode step of all rows; and the longer answer."""
    times = []
    with block(), torch.no_grad():
        for count in (SHORT, tokens, SHORT, tokens):  # the first two also compile
            began = now(lm)
            found = lm.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count, min_new_tokens=count,
                **options,
            )  # fmt: skip
            times.append(now(lm) - began)
    return (times[3] - times[2]) / (tokens - SHORT), found[:, ids.shape[1] :]


def bandwidth(device: torch.device, size: int = 2**28) -> float:
    """Bytes a second that the device reads, by summing a tensor."""
    data = torch.ones(size if device.type == "cuda" else size // 8, device=device)
    best = 0.0
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        float(data.sum())
        best = max(best, data.nbytes / (time.perf_counter() - began))
    return best
