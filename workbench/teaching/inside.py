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

__all__ = ["Stream", "residual_stream", "whole_matrix", "writing_matrix"]


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


def writing_matrix(lm: LM, layer: int) -> tuple[str, nn.Module]:
    """Name (in `lm.model`) and module of the last matrix of a decoder block that writes into the stream.

    Covers nn.Linear, its 4-bit kin and GPT-2's Conv1D; raises ModelError where a block has none with d_model outputs.
    """
    found = [module for module in lm.blocks[layer].modules() if _sizes(module)[1] == lm.d_model]
    if not found:
        raise ModelError(f"Layer {layer} of {type(lm.model).__name__} has no linear layer that writes into the stream.")
    return next((name, module) for name, module in lm.model.named_modules() if module is found[-1])


def whole_matrix(lm: LM, module: nn.Module) -> Float[Tensor, "outputs inputs"]:
    """The matrix W of a linear layer, float32 on the CPU, found by what it does to each unit vector.

    So it is the same for plain and for 4-bit weights, and no format has to be known.
    """
    inputs, _ = _sizes(module)
    shift, columns = None, []
    with torch.no_grad():
        for start in range(0, inputs, 1024):
            units = torch.zeros(min(1024, inputs - start), inputs, dtype=lm.model.dtype, device=lm.device)
            shift = module(units[:1]) if shift is None else shift
            units[:, start:].fill_diagonal_(1.0)
            columns.append((module(units) - shift).float().cpu())
    return torch.cat(columns).T.contiguous()


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; of anything else zero."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (0, 0)


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
