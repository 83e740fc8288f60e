"""Estimate the memory of a LoRA fine-tune before anything is loaded, and choose 4-bit weights only where it is short.

An estimate, not a measurement: weights, adapter with its optimiser, activations, and logits of the learnt tokens. It
leaves out fragmentation and library overhead, which is what the unused share of free memory is for.
"""

from dataclasses import dataclass
from typing import Literal

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

SHARE = 0.7  # of free memory that a plan may use
NF4_BYTES = 0.53  # a weight: 4 bits and its share of double-quantised scales (QLoRA, arXiv 2305.14314, section 3)
ADAPTER_BYTES = 16  # float32 weight, gradient and two Adam moments
LOGIT_ROWS = 1024  # TRL's fused loss builds the logits of about this many tokens at once


@dataclass(frozen=True)
class Plan:
    """What a fine-tune will need, in bytes, and the choices made from it, each with its reason."""

    quantization: Literal["nf4"] | None
    checkpointing: bool
    bytes_needed: int
    bytes_free: int
    adapter_parameters: int
    reasons: dict[str, str]


def plan(model: PreTrainedModel, rank: int, targets: str | list[str], tokens: int, wanted: str) -> Plan:
    """Memory for training `model` with adapters of `rank` on `tokens` tokens a step.

    wanted: "auto", "nf4" or "none". With "auto", a model that is loaded in 4 bits stays so, and another one is
    quantised only when its weights in their own dtype do not fit.
    """
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    layers = [(name, module) for name, module in modules if "lm_head" not in name]
    chosen = [m for name, m in layers if targets == "all-linear" or name.split(".")[-1] in targets]
    if not chosen:
        names = ", ".join(sorted({name.split(".")[-1] for name, _ in layers}))
        raise ValueError(f"targets={targets!r} matches no linear layer. Choose 'all-linear' or names among: {names}.")
    adapter = rank * sum(sum(widths(m)) for m in chosen)
    number = model.dtype.itemsize if model.dtype.is_floating_point else 2
    total = model.num_parameters()
    linear = sum(widths(m)[0] * widths(m)[1] for _, m in layers)
    config = model.config.get_text_config()
    # 34 bytes a token, layer and channel at two bytes a number (Korthikanti et al. 2022, arXiv 2205.05198, section 4)
    activations = 17 * number * tokens * config.num_hidden_layers * config.hidden_size
    fixed = adapter * ADAPTER_BYTES + 4 * 2 * min(tokens, LOGIT_ROWS) * config.vocab_size
    on_gpu = model.device.type == "cuda"
    free = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
    weights = {None: total * number, "nf4": int(linear * NF4_BYTES) + (total - linear) * number}
    quantization, reason = _quantization(model, weights[None] + fixed + activations // 10, free, wanted)
    checkpointing = weights[quantization] + fixed + activations > SHARE * free
    activations //= config.num_hidden_layers // 2 if checkpointing and config.num_hidden_layers > 3 else 1
    reasons = {
        "quantization": reason,
        "checkpointing": f"{'on' if checkpointing else 'off'}: activations need about {_gb(activations)}",
    }
    need = weights[quantization] + fixed + activations
    return Plan(quantization, checkpointing, need, free, adapter, reasons)


def _quantization(model: PreTrainedModel, need: int, free: int, wanted: str) -> tuple[Literal["nf4"] | None, str]:
    if wanted == "nf4":
        return "nf4", "nf4: asked for"
    if wanted == "none":
        return None, "none: asked for"
    if wanted != "auto":
        raise ValueError(f"quantization={wanted!r} is not known. Choose 'auto', 'nf4' or 'none'.")
    if getattr(model, "is_loaded_in_4bit", False):
        return "nf4", "nf4: the model is loaded in 4 bits, so the adapter is trained on what it will be used with"
    if need > SHARE * free:
        return "nf4", f"nf4: full weights would need about {_gb(need)} of {_gb(free)} free"
    return None, f"none: about {_gb(need)} of {_gb(free)} free suffice, and 4-bit weights would only be slower"


def widths(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, 4-bit layers included (their weight tensor is flat)."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    assert isinstance(layer, nn.Linear)  # Linear4bit is one too
    return layer.in_features, layer.out_features


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
