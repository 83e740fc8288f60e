"""What an answer cost: model calls, tokens, floating-point operations by formula, seconds, peak memory.

Operations are those of the row computed alone, a multiplication and an addition counted as two: 2 for every weight that
a token passes through (embeddings looked up are free, the language-model head counts where logits are needed), and
4 x heads x head size for every earlier token that a token attends to, in every layer. This is the forward part of
Kaplan et al. 2020 (arXiv 2001.08361, table 1) with the attention term summed over positions. Work that rows of a batch
share (common prefixes) is not taken off: that shows in the seconds. Models that an intervention on logits asks beside
the own one count like it. Not covered: training (`finetuning.memory`).
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch

from workbench.interventions import Intervention, Logits
from workbench.models import LM

__all__ = ["Cost", "companions", "forward_flops", "peak_memory"]


@dataclass
class Cost:
    """What was spent on one question; `add` counts a generation or a scored text of the model `lm`."""

    calls: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    forward_passes: int = 0
    seconds: float = 0.0
    flops: float = 0.0

    def add(
        self,
        lm: LM,
        tokens_in: int,
        tokens_out: int,
        forward_passes: int,
        seconds: float,
        logits: int,
        beside: Sequence[LM] = (),
    ) -> None:
        """Count one call; `logits` is the number of positions whose next-token logits were needed.

        Where there are any, the last token is predicted and never read. beside: models that read the same tokens
        (`companions`), which add operations.
        """
        self.calls += 1
        self.tokens_in += tokens_in
        self.tokens_out += tokens_out
        self.forward_passes += forward_passes
        self.seconds += seconds
        read = tokens_in + tokens_out - bool(logits)
        self.flops += sum(forward_flops(model, read, logits) for model in (lm, *beside))


def companions(change: Intervention | None) -> list[LM]:
    """The other models that an intervention on logits asks at every token, each once."""
    parts = change.parts if change is not None else ()
    found = [other for part in parts if isinstance(part, Logits) and part.strength for other in part.others]
    return list({id(other.model): other for other in found}.values())


def forward_flops(lm: LM, tokens: int, logits: int) -> float:
    """Operations of one forward over a text of `tokens` tokens, with next-token logits at `logits` of them.

    Weights of experts count by the share of experts that a token is sent to. Layers without attention over the past
    (linear attention) are counted as if they had it, sliding windows up to their width.
    """
    if lm.model not in _SIZES:
        _SIZES[lm.model] = sizes(lm.model)
    weights, head, per_pair, windows = _SIZES[lm.model]
    pairs = sum(_pairs(tokens, window) for window in windows)
    return 2.0 * weights * tokens + 2.0 * head * logits + per_pair * pairs


def _pairs(tokens: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, itself included."""
    if window is None or tokens <= window:
        return tokens * (tokens + 1) // 2
    return window * (window + 1) // 2 + (tokens - window) * window


Sizes = tuple[float, int, int, tuple[int | None, ...]]
_SIZES: WeakKeyDictionary[Any, Sizes] = WeakKeyDictionary()  # by model, for as long as it lives


def sizes(model: Any) -> Sizes:
    """Weights that a token passes below the head, the head's, operations a pair of tokens, and each layer's window."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight
    embeddings = {id(head), id(model.get_input_embeddings().weight)}
    embeddings |= {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }  # positions too
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    used = getattr(config, "num_experts_per_tok", None)
    share = used / experts if experts and used else 1.0
    below = sum(
        _numbers(weight) * (share if ".experts" in name else 1.0)
        for name, weight in model.named_parameters()
        if id(weight) not in embeddings
    )
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    windows = tuple(window if "sliding" in kind else None for kind in kinds)
    vocabulary, width = config.vocab_size, config.hidden_size
    return below, vocabulary * width, 4 * heads * size, windows


def _numbers(weight: Any) -> int:
    """Weights in a parameter; two to a byte where bitsandbytes packed them."""
    return 2 * weight.numel() if weight.dtype == torch.uint8 else weight.numel()


@contextmanager
def peak_memory(device: torch.device, every: float = 0.02) -> Iterator[Callable[[], float]]:
    """Megabytes at the peak while the block runs: of the GPU's allocator, or of this process (sampled) on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) / 2**20
        return
    process, over = psutil.Process(), threading.Event()
    most = [process.memory_info().rss]

    def watch() -> None:
        while not over.wait(every):
            most[0] = max(most[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: most[0] / 2**20
    finally:
        over.set()
        watcher.join()
