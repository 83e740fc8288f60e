"""A forward pass taken apart for a first look: what embedding, attention and MLP add to the residual stream.

Nothing here goes by a model's name: hooks on a block's children see what each returned, and the two whose outputs add
up to the block's change are its attention and its MLP. A block that does something else on the way (a multiplier as in
Granite) is kept whole. For heads, and for directions, see `workbench.head_attribution`. The picture of blocks that add
to a stream is that of transformer-circuits.pub/2021/framework.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.models import LM, ModelError

__all__ = ["Stream", "first_linear", "residual_stream", "whole_matrix"]


@dataclass(frozen=True, eq=False)
class Stream:
    """What was added to the residual stream, in order of layers: one (tokens, d_model) tensor a part.

    parts: "embedding", then "attention 0", "MLP 0", "attention 1", ...; "block 1" for a layer that can't be split.
    states: the stream after each block, read off the block itself.
    """

    parts: dict[str, Float[Tensor, "seq d_model"]]
    states: list[Float[Tensor, "seq d_model"]]

    @property
    def unsplit(self) -> list[int]:
        """Layers whose attention and MLP could not be told apart."""
        return [int(name.split()[1]) for name in self.parts if name.startswith("block")]

    def norms(self, position: int = -1) -> list[dict[str, Any]]:
        """Length of every part, and of the stream behind it, at one token: rows of layer, part, norm, stream."""
        rows = []
        total = torch.zeros_like(self.states[0][position])
        for name, written in self.parts.items():
            kind, _, layer = name.partition(" ")
            total = total + written[position]
            row = {"layer": int(layer) if layer else None, "part": kind, "norm": float(written[position].norm())}
            rows.append(row | {"stream": float(total.norm())})
        return rows


def residual_stream(lm: LM, prompt: str | list[dict[str, str]]) -> Stream:
    """Run a prompt once and keep what each part wrote, in float32 on the CPU.

    The parts add up to the last state to rounding: 1e-3 of its length, or 16 steps of the model's own precision.

    >>> from workbench.models import load_model
    >>> stream = residual_stream(load_model("lab-small"), "2+3=")
    >>> list(stream.parts)[:3], bool(torch.allclose(sum(stream.parts.values()), stream.states[-1], atol=1e-4))
    (['embedding', 'attention 0', 'MLP 0'], True)
    """
    ids = torch.tensor([lm.encode(prompt)], device=lm.device)
    before: dict[int, Tensor] = {}
    after: dict[int, Tensor] = {}
    inner: dict[int, list[Tensor]] = {layer: [] for layer in range(len(lm.blocks))}

    def entering(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            before[layer] = _plain(args[0] if args else kwargs["hidden_states"])

        return hook

    def leaving(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            after[layer] = _plain(output)

        return hook

    def child(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            written = _plain(output)
            if written is not None and written.numel() == before[layer].numel():
                inner[layer].append(written.reshape(before[layer].shape))

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for layer, block in enumerate(lm.blocks):
            hooks.callback(block.register_forward_pre_hook(entering(layer), with_kwargs=True).remove)
            for module in block.children():
                hooks.callback(module.register_forward_hook(child(layer)).remove)
            hooks.callback(block.register_forward_hook(leaving(layer)).remove)
        lm.base(input_ids=ids, use_cache=False)
    close = max(1e-3, 16 * torch.finfo(lm.model.dtype).eps)
    parts = {"embedding": before[0]}
    for layer in range(len(lm.blocks)):
        parts |= _written(layer, after[layer] - before[layer], inner[layer], close)
    return Stream(parts, [after[layer] for layer in range(len(lm.blocks))])


def first_linear(lm: LM, layer: int) -> tuple[str, nn.Module]:
    """Name (in `lm.model`) and module of the first matrix in a decoder block: what reads the stream.

    Raises ModelError where a block has none. Covers nn.Linear, its 4-bit kin and GPT-2's Conv1D.
    """
    names = {id(module): name for name, module in lm.model.named_modules()}
    for module in lm.blocks[layer].modules():
        if isinstance(module, nn.Linear | Conv1D):
            return names[id(module)], module
    raise ModelError(f"Layer {layer} of {type(lm.model).__name__} has no linear layer. Choose another one.")


def whole_matrix(lm: LM, module: nn.Module) -> Float[Tensor, "outputs inputs"]:
    """The matrix W of a linear layer, float32 on the CPU, found by what it does to each unit vector.

    The same for plain and for 4-bit weights; W takes inputs x outputs numbers, 64 MB for a model of width 4096.
    """
    inputs = module.in_features if isinstance(module, nn.Linear) else module.get_parameter("weight").shape[0]
    units = torch.eye(int(inputs), dtype=lm.model.dtype, device=lm.device)
    with torch.no_grad():
        shift = module(torch.zeros_like(units[:1]))
        return (module(units) - shift).float().cpu().T.contiguous()


def _written(layer: int, change: Tensor, inner: list[Tensor], close: float) -> dict[str, Tensor]:
    """The two outputs of children that make up a block's change; the change itself where none do."""
    size = float(change.norm())
    best = min(combinations(inner, 2), key=lambda pair: float((pair[0] + pair[1] - change).norm()), default=None)
    if best is None or float((best[0] + best[1] - change).norm()) > close * size:
        return {f"block {layer}": change}
    return {f"attention {layer}": best[0], f"MLP {layer}": best[1]}


def _plain(output: Any) -> Any:
    """The tensor of a module's output, its one row, in float32 on the CPU; None where there is none."""
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor):
        return None
    return (first[0] if first.ndim == 3 else first).detach().float().cpu().clone()
