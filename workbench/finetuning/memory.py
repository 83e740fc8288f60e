"""Predict the memory of a LoRA fine-tune before its base is loaded, and choose 4 bits and checkpointing by it.

Predicted is the growth of memory at its peak between the moment before the base is loaded again for training and the
end of training: on a GPU of what torch has allocated, on a CPU of the process's resident set while freed memory goes
back to the system at once. It is made of the base's weights, the adapter with gradients and Adam's moments, what the
forward pass keeps for the backward pass, the larger of the output head's buffers and those of one block's backward
pass, and what the libraries load late. What a token keeps is counted on the loaded model itself, so it holds for any
architecture. Not covered: full-weight training, an adapter's own dropout, memory that other processes take meanwhile.

Measured on a CPU with Linux (bench/finetuning.py, six runs of 4M to 57M parameters): from 12 % below the truth to none
above it; the part of a run below 200 MB that the libraries take varies most. Where a block that is made anew outweighs
the head (two runs), up to 11 % above. Not measured: GPUs, macOS, Windows, preference training.

Left alone, glibc keeps freed memory for later, and a run is resident with up to 2.7 times what it uses (see
`TIGHT`). Giving it back costs time, so `growth` asks for that only where memory is short.
"""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from mmap import PAGESIZE
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
HEAD_TILES = 7  # float32 tiles alive at once in its backward pass on a CPU; on a GPU a kernel overwrites its one
BLOCK_TILES = 3  # as many for the widest layer in a block's: the gradients of a product and of its two factors
PROBE = (16, 64)  # tokens that are run through the model to count what it keeps
TIGHT = 0.35  # of free memory; a run that needs more gives freed memory back at once, at the price of time
KEPT, MMAP_THRESHOLD, TRIM_THRESHOLD = 2**17, -3, -1  # glibc's smallest block for mmap at first, names in its malloc.h
GROWN = 2**25  # up to which glibc lets that threshold grow
LIBRARIES = 23_000_000  # that they load late, on a CPU; measured 20 to 27 MB with a model of 0.1M parameters


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass keeps for its backward pass: `a_token` for each, `a_pair` for each two of one row.

    `boundary` is what a token keeps with checkpointing, at the borders of the blocks; `layers` the number of blocks,
    one of which at a time is run again.
    """

    a_token: float
    a_pair: float
    boundary: float
    layers: int

    def bytes(self, tokens: int, row: int, checkpointing: bool) -> int:
        """Kept from the forward to the backward pass, for `tokens` tokens in rows of `row`."""
        return int(tokens * (self.boundary if checkpointing else self.a_token + self.a_pair * row))

    def again(self, tokens: int, row: int, checkpointing: bool) -> int:
        """Made anew in the backward pass, a block at a time."""
        return self.bytes(tokens, row, False) // self.layers if checkpointing else 0


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

    @property
    def tight(self) -> bool:
        """Whether memory is so short that freed memory must go back to the system at once, see `growth`."""
        return self.bytes_needed > TIGHT * self.bytes_free


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
    kept = activations or count_activations(model, chosen)
    kept = replace(kept, a_token=kept.a_token + 4 * rank * len(chosen))
    free = free_memory(model.device) if free is None else free
    weights, largest = _weight_bytes(model, layers)
    head = _head_bytes(model, tokens)
    block = BLOCK_TILES * 4 * tokens * max(max(widths(m)) for m in layers)
    row = row or tokens

    def parts(bits: Literal["nf4"] | None, on: bool) -> dict[str, int]:
        return {
            "weights": weights[bits], "adapter": adapter * ADAPTER_BYTES, "activations": kept.bytes(tokens, row, on),
            "buffers": max(head, block + largest[bits] + kept.again(tokens, row, on)),
            "libraries": LIBRARIES if model.device.type == "cpu" else 0,
        }  # fmt: skip

    least = sum(parts(None, checkpointing is not False).values())
    quantization, reason = _quantization(model, least, free, wanted)
    asked = checkpointing is not None
    on = bool(checkpointing) if asked else sum(parts(quantization, False).values()) > SHARE * free
    found = parts(quantization, on)
    why = "asked for" if asked else f"activations need about {_gb(found['activations'])}"
    reasons = {"quantization": reason, "checkpointing": f"{'on' if on else 'off'}: {why}"}
    return Plan(quantization, on, sum(found.values()), free, adapter, reasons, found)


def _weight_bytes(
    model: PreTrainedModel, layers: list[nn.Module]
) -> tuple[dict[str | None, int], dict[str | None, int]]:
    """Bytes of all weights by quantisation, and of the layer that is unpacked for its product: a 4-bit one."""
    number = model.dtype.itemsize if model.dtype.is_floating_point else 2
    total = sum(_numbers(module) for module in model.modules()) - _tied(model)
    sizes = [widths(layer)[0] * widths(layer)[1] for layer in layers]
    four_bit = int(sum(sizes) * NF4_BYTES) + (total - sum(sizes)) * number
    return {None: total * number, "nf4": four_bit}, {None: 0, "nf4": max(sizes) * number}


def count_activations(model: PreTrainedModel, adapted: list[nn.Module]) -> Activations:
    """Count what a forward pass keeps, with adapters on the layers `adapted`, by running a few tokens through `model`.

    Kept is what autograd saves and the input of each adapted layer, in float32: a copy where the model's dtype is
    another. Two lengths tell what grows with a row's tokens from what grows with their square: attention scores, and
    the mask of padding and packing, which each layer keeps in float32 on a CPU.
    """
    few, many = (_kept_bytes(model, adapted, tokens) for tokens in PROBE)
    short, long = PROBE
    a_pair = max(0.0, (many / long - few / short) / (long - short))
    config = model.config.get_text_config()
    boundary = (config.num_hidden_layers + 1) * config.hidden_size * model.dtype.itemsize
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
    ids = torch.arange(tokens, device=model.device)[None]
    was_training = model.training
    model.train()  # the masks of a model's own dropout are kept too
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            start = table(ids % table.weight.shape[0]).detach().requires_grad_()
            output = model.base_model(
                inputs_embeds=start, position_ids=ids, attention_mask=(ids != ids[0, -1]).long(), use_cache=False
            )  # a mask with a hole, because without one attention takes another path, which keeps less
            del output
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return copies + sum(tensor.untyped_storage().nbytes() for tensor in seen.values())


def _head_bytes(model: PreTrainedModel, tokens: int) -> int:
    """The output head's buffers in TRL's loss, in the backward pass.

    A buffer of whole tiles in the model's dtype, hidden states and their float32 gradients; on a CPU float32 tiles of
    all tokens and a boolean one besides. Of a buffer's row only the pages are resident that hold words.
    """
    config = model.config.get_text_config()
    words, rows, size = min(config.vocab_size, HEAD_WORDS), min(tokens, HEAD_TOKENS), model.dtype.itemsize
    hidden = tokens * config.hidden_size * (size + 4)
    if model.device.type == "cuda":
        return hidden + rows * HEAD_WORDS * size
    tiles = HEAD_TILES + (getattr(config, "final_logit_softcapping", None) is not None)
    row = min(HEAD_WORDS * size, -(-words * size // PAGESIZE) * PAGESIZE)
    return hidden + rows * (row + words * (4 * tiles + 1))


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
def growth(device: torch.device, tight: bool = False) -> Iterator[Any]:
    """Call what is given to get the bytes by which memory grew at most in the block, as the module defines it.

    tight: on Linux have glibc give back each block of 128 KB or more as soon as it is freed. Else it keeps more and
    more of them for later, and the number is larger than what is predicted. After the block it may keep them again.
    """
    from workbench.evaluation import peak_memory

    trim()  # else freed memory is used again and hides what is taken anew
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else psutil.Process().memory_info().rss
    tight = tight and not cuda
    if tight:
        _keep_freed(KEPT)
    try:
        with peak_memory(device) as peak:
            yield lambda: int(peak() * 2**20) - before
    finally:
        if tight:
            _keep_freed(GROWN)


def _keep_freed(size: int) -> None:
    """Have glibc keep freed blocks smaller than `size` bytes for later, and give back larger ones."""
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            library = ctypes.CDLL("libc.so.6")
            library.mallopt(MMAP_THRESHOLD, size)
            library.mallopt(TRIM_THRESHOLD, 2 * size)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
