"""Predict the memory of a LoRA fine-tune before its base is loaded, and choose 4 bits and checkpointing by it.

Predicted is the growth of memory at its peak between the moment before the base is loaded again for training and the
end of training: on a GPU of what torch has allocated, on a CPU of the process's resident set. It is made of the
base's weights, the adapter with gradients and Adam's moments, what the forward pass keeps for the backward pass, the
output head's buffers and the largest of the rest. What a token keeps is counted on the loaded model itself, so it
holds for any architecture. Not covered: full-weight training, memory that other processes take meanwhile.
"""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

SHARE = 0.7  # of free memory that a plan may use before it saves memory at the price of time
LIMIT = 0.9  # of free memory that a plan may need at most; the rest is for the error of the prediction
NF4_BYTES = 0.53  # a weight: 4 bits and its share of double-quantised scales (QLoRA, arXiv 2305.14314, section 3)
ADAPTER_BYTES = 16  # float32 weight, gradient and two Adam moments
HEAD_TOKENS, HEAD_WORDS = 4096, 32768  # TRL 1.16 scores tiles of at most so many tokens and words of the vocabulary
HEAD_BUFFERS = 8  # float32 tiles alive at once in its backward pass on a CPU; on a GPU a kernel needs one
PROBE = (16, 64)  # tokens that are run through the model to count what it keeps


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for its backward pass: `a_token` for each, `a_pair` for each two of one row.

    `boundary` is what a token keeps with checkpointing, at the borders of the blocks; `layers` the number of blocks.
    """

    a_token: float
    a_pair: float
    boundary: float
    layers: int

    def bytes(self, tokens: int, row: int, checkpointing: bool) -> int:
        """For `tokens` tokens in rows of `row`."""
        whole = tokens * (self.a_token + self.a_pair * row)
        return int(tokens * self.boundary + whole / self.layers) if checkpointing else int(whole)


@dataclass(frozen=True)
class Plan:
    """What a fine-tune will need, in bytes, and the choices made from it, each with its reason."""

    quantization: Literal["nf4"] | None
    checkpointing: bool
    bytes_needed: int
    bytes_free: int
    adapter_parameters: int
    reasons: dict[str, str]
    parts: dict[str, int]


def plan(
    model: PreTrainedModel,
    rank: int,
    targets: str | list[str],
    tokens: int,
    wanted: str,
    *,
    row: int | None = None,
    checkpointing: bool | None = None,
    free: int | None = None,
    activations: Activations | None = None,
) -> Plan:
    """Memory for training `model` with adapters of `rank` on `tokens` tokens at once, in rows of `row` tokens.

    wanted: "auto", "nf4" or "none". With "auto", a model that is loaded in 4 bits stays so, and another one is
    quantised only when its weights in their own dtype do not fit. checkpointing: None switches it on where memory is
    short. free: bytes that may be used; what is free now unless given. activations: what `count_activations` said.
    """
    chosen, layers = linear_layers(model, targets)
    adapter = rank * sum(sum(widths(m)) for m in chosen)
    number = model.dtype.itemsize if model.dtype.is_floating_point else 2
    total = sum(_numbers(module) for module in model.modules())
    total -= _tied(model)
    linear = sum(widths(m)[0] * widths(m)[1] for m in layers)
    kept = activations or count_activations(model, chosen)
    kept = replace(kept, a_token=kept.a_token + 4 * rank * len(chosen))
    free = free_memory(model.device) if free is None else free
    head = _head_bytes(model, tokens)
    weights = {None: total * number, "nf4": int(linear * NF4_BYTES) + (total - linear) * number}
    # a 4-bit layer is unpacked for each product
    largest = {None: 0, "nf4": max(widths(m)[0] * widths(m)[1] for m in layers) * number}
    fixed = adapter * ADAPTER_BYTES + head
    least = kept.bytes(tokens, row or tokens, checkpointing is not False)
    quantization, reason = _quantization(model, weights[None] + fixed + least, free, wanted)
    before = weights[quantization] + largest[quantization] + fixed
    whole = kept.bytes(tokens, row or tokens, False)
    asked = checkpointing is not None
    on = bool(checkpointing) if asked else before + whole > SHARE * free
    most = kept.bytes(tokens, row or tokens, on)
    why = "asked for" if asked else f"activations need about {_gb(most)}"
    reasons = {"quantization": reason, "checkpointing": f"{'on' if on else 'off'}: {why}"}
    parts = {
        "weights": weights[quantization], "unpacked": largest[quantization], "adapter": adapter * ADAPTER_BYTES,
        "activations": most, "head": head,
    }  # fmt: skip
    return Plan(quantization, on, sum(parts.values()), free, adapter, reasons, parts)


def count_activations(model: PreTrainedModel, adapted: list[nn.Module]) -> Activations:
    """Count what a forward pass keeps, with adapters on the layers `adapted`, by running a few tokens through `model`.

    Kept is what autograd saves and the input of each adapted layer, in float32: a copy where the model's dtype is
    another. Two lengths tell what grows with a row's tokens from what grows with their square (attention scores).
    """
    few, many = (_kept_bytes(model, adapted, tokens) for tokens in PROBE)
    short, long = PROBE
    a_pair = max(0.0, (many / long - few / short) / (long - short))
    config = model.config.get_text_config()
    boundary = config.num_hidden_layers * config.hidden_size * model.dtype.itemsize
    return Activations(many / long - a_pair * long, a_pair, boundary, config.num_hidden_layers)


def _kept_bytes(model: PreTrainedModel, adapted: list[nn.Module], tokens: int) -> int:
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, torch.Tensor] = {}
    copies = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "meta" and tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no address comes twice
        return tensor

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal copies
        if inputs[0].dtype == torch.float32:
            keep(inputs[0])
        else:
            copies += inputs[0].numel() * 4

    handles = [module.register_forward_pre_hook(enter) for module in adapted]
    table = model.get_input_embeddings()
    ids = torch.arange(tokens, device=model.device)[None] % table.weight.shape[0]
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            start = table(ids).detach().requires_grad_()
            output = model.base_model(inputs_embeds=start, position_ids=ids, use_cache=False)
            del output
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return copies + sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def _head_bytes(model: PreTrainedModel, tokens: int) -> int:
    """The output head's buffers in TRL's loss: on a CPU float32 tiles of all tokens, on a GPU one full tile."""
    words = model.config.get_text_config().vocab_size
    rows = min(tokens, HEAD_TOKENS)
    if model.device.type == "cuda":
        return rows * HEAD_WORDS * model.dtype.itemsize
    return HEAD_BUFFERS * 4 * rows * min(words, HEAD_WORDS)


def linear_layers(model: PreTrainedModel, targets: str | list[str]) -> tuple[list[nn.Module], list[nn.Module]]:
    """The linear layers that get an adapter, and all of them; the output head is neither."""
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    layers = [(name, module) for name, module in modules if "lm_head" not in name]
    chosen = [m for name, m in layers if targets == "all-linear" or name.split(".")[-1] in targets]
    if not chosen:
        names = ", ".join(sorted({name.split(".")[-1] for name, _ in layers}))
        raise ValueError(f"targets={targets!r} matches no linear layer. Choose 'all-linear' or names among: {names}.")
    return chosen, [module for _, module in layers]


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


def _numbers(module: nn.Module) -> int:
    """Weights that a module itself holds, those of packed 4-bit layers counted one by one."""
    own = dict(module.named_parameters(recurse=False))
    if isinstance(module, nn.Linear):
        bias = own.get("bias")
        return module.in_features * module.out_features + (0 if bias is None else bias.numel())
    return sum(weight.numel() for weight in own.values())


def _tied(model: PreTrainedModel) -> int:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    return table.weight.numel() if head is not None and head.weight is table.weight else 0


def widths(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, 4-bit layers included (their weight tensor is flat)."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    assert isinstance(layer, nn.Linear)  # Linear4bit is one too
    return layer.in_features, layer.out_features


def free_memory(device: torch.device) -> int:
    """Bytes that can be had now on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def trim() -> None:
    """Give freed memory back to the system where the C library keeps it for later (glibc)."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextmanager
def growth(device: torch.device) -> Iterator[Any]:
    """Call what is given to get the bytes by which memory grew at most in the block, as the module defines it."""
    from workbench.evaluation import peak_memory

    trim()  # else freed memory is used again and hides what is taken anew
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else psutil.Process().memory_info().rss
    with peak_memory(device) as peak:
        yield lambda: int(peak() * 2**20) - before


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
