"""Attention heads as writers: which of them write along a direction (ThinkEdit, arXiv 2503.22048).

Covers heads that are joined in front of an `o_proj` (Llama and its kin), `c_proj` (GPT-2) or `dense` (GPT-NeoX,
Falcon); linear attention, other names and quantised weights are refused by name. Changing heads is `weights`' matter.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.interventions.residual import Positions, Residual, normal_positions, span_mask
from workbench.models import LM, ModelError
from workbench.turns import in_turn

PROJECTIONS = ("o_proj", "c_proj", "dense")
PLAIN = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@in_turn
def heads_writing(
    lm: LM,
    direction: Residual | dict[int, Tensor],
    *,
    prompts: Sequence[str | list[dict[str, str]]] | None = None,
    positions: Positions = "all",
) -> pd.DataFrame:
    """How much every head writes along the direction of its own layer: one row a layer that has a direction, and head.

    score: |v^T W_o[:, head]| / |W_o[:, head]|, from 0 to 1; a random direction gives about 1 / sqrt(d_model).
    norm: |W_o[:, head]|, the Frobenius norm. contribution, with `prompts`: the component along v of what the head
    writes, averaged over each prompt's `positions`, then over prompts; in units of the residual stream, before a
    constant multiplier (Granite). Where a norm follows the projection (Gemma, OLMo 2), its gain is counted in.
    For one direction at all layers give {layer: vector for layer in range(len(lm.blocks))}.

    >>> from workbench.models import load_model
    >>> lm = load_model("lab-small")
    >>> heads_writing(lm, {1: torch.ones(lm.d_model)}).columns.tolist()
    ['layer', 'head', 'score', 'norm']
    """
    written = {}
    rows: list[dict[str, float]] = []
    gains = gains_of(lm)
    for layer, v in units_of(lm, direction).items():
        output = heads_of(lm, layer)
        weight = output.weight.detach().float().cpu() * gains.get(layer, torch.ones(len(v)))[:, None, None]
        along, sizes = torch.einsum("d,dhk->hk", v, weight), weight.norm(dim=(0, 2))
        written[layer] = (output, along.to(output.weight.device), layer in gains)
        scores = along.norm(dim=1) / sizes.clamp(min=1e-12)
        columns = zip(scores.tolist(), sizes.tolist(), strict=True)
        rows += [
            {"layer": layer, "head": head, "score": score, "norm": size} for head, (score, size) in enumerate(columns)
        ]
    table = pd.DataFrame(rows)
    if prompts is not None:
        table["contribution"] = torch.cat(_contributions(lm, written, prompts, positions)).tolist()
    return table


@dataclass(frozen=True, eq=False)
class HeadOutput:
    """The projection from a layer's attention heads to the residual stream, and how many heads share its input."""

    module: nn.Module
    heads: int

    @property
    def weight(self) -> Shaped[Tensor, "d_model heads head_dim"]:
        """Column blocks of W_o, one a head."""
        return self.split(self.module.get_parameter("weight"))

    def split(self, weight: Shaped[Tensor, "rows columns"]) -> Shaped[Tensor, "d_model heads head_dim"]:
        """A view of a weight of this projection, head by head; Conv1D keeps it transposed."""
        return (weight.t() if isinstance(self.module, Conv1D) else weight).unflatten(1, (self.heads, -1))


def heads_of(lm: LM, layer: int) -> HeadOutput:
    """The output projection of a layer's attention, found by structure; other architectures are refused by name.

    head_dim is the projection's width divided by the number of heads: it need not be d_model / heads (Qwen 3).
    """
    named = dict(lm.blocks[layer].named_modules())
    found = [
        name
        for name in named
        if name.rpartition(".")[2] in PROJECTIONS
        and "attention" in type(named[name.rpartition(".")[0]]).__name__.lower()
    ]
    if len(found) != 1:
        kinds = ", ".join(f"{name} ({type(child).__name__})" for name, child in lm.blocks[layer].named_children())
        raise ModelError(
            f"Layer {layer} of {type(lm.model).__name__} has no attention with one output projection named "
            f"{', '.join(PROJECTIONS)}; it has {kinds}. Choose other layers."
        )
    inner = getattr(named[found[0]], "base_layer", None)
    module = inner if isinstance(inner, nn.Module) else named[found[0]]  # under a LoRA adapter: the weight it adds to
    weight, heads = (
        plain_weight(module, f"{found[0]} of layer {layer}"),
        lm.model.config.get_text_config().num_attention_heads,
    )
    width = weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]
    if width % heads:
        raise ModelError(f"Layer {layer}: {found[0]} has {width} inputs, no multiple of {heads} heads.")
    return HeadOutput(module, heads)


@contextmanager
def unsteered(lm: LM) -> Iterator[None]:
    """Forwards inside the block run without the states' and caches' changes of an enclosing one; weights stay."""
    from workbench.interventions.session import ACTIVE

    sessions = [session for session in ACTIVE.get(lm.model, ())[-1:] if not session.paused]
    for session in sessions:
        session.paused = True
    try:
        yield
    finally:
        for session in sessions:
            session.paused = False


def refuse_split(lm: LM) -> None:
    """Refuse to count over a prompt that an enclosing block runs in two parts (an edited cache) or twice (a gate)."""
    from workbench.interventions.session import ACTIVE

    if any(session.kv or session.edits or session.gates for session in ACTIVE.get(lm.model, ())[-1:]):
        raise ModelError(
            "What a prompt's tokens bring cannot be summed under an edit of the cache or a gate, which run it in two "
            "parts or twice. Leave its block."
        )


def plain_weight(module: nn.Module, name: str) -> Tensor:
    """A weight that can be read and changed; quantised ones can't without rounding all of their block anew."""
    weight = module.get_parameter("weight")
    if weight.dtype not in PLAIN:
        raise ModelError(
            f"{name} keeps quantised weights ({type(weight).__name__}, {weight.dtype}); a change would round its "
            "neighbours anew. Load the model without quantization, or use a Residual, which works over 4-bit weights."
        )
    return weight


def units_of(lm: LM, direction: Residual | dict[int, Tensor]) -> dict[int, Float[Tensor, " d_model"]]:
    """Unit directions on the CPU, one a layer."""
    given = direction if isinstance(direction, Residual) else Residual(dict(direction))
    given.check(lm)
    empty = sorted(layer for layer, v in given.vectors.items() if not v.float().norm() > 0)
    if empty or not given.vectors:
        raise ModelError(f"The direction has no length at layers {empty or 'none given'}. Give one vector a layer.")
    return {layer: v.float().cpu() / v.float().cpu().norm() for layer, v in sorted(given.vectors.items())}


def _norms_after(lm: LM) -> dict[int, nn.Module]:
    """The norms that attention's output runs through before it is added to the stream (Gemma, OLMo 2), found by a run.

    A module counts if it is given the very tensor that a layer's attention returned.
    """
    written: dict[int, Tensor] = {}
    found: dict[int, nn.Module] = {}

    def remember(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            written[layer] = output[0] if isinstance(output, tuple) else output

        return hook

    def compare(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and inputs[0] is written.get(layer) and not isinstance(module, nn.Dropout):
                found[layer] = module

        return hook

    with ExitStack() as hooks, torch.no_grad(), unsteered(lm):
        for layer, block in enumerate(lm.blocks):
            for child in block.children():
                if "attention" in type(child).__name__.lower():
                    hooks.callback(child.register_forward_hook(remember(layer)).remove)
                hooks.callback(child.register_forward_pre_hook(compare(layer)).remove)
        lm.base(input_ids=torch.tensor([lm.encode("a")], device=lm.device), use_cache=False)
    return found


def gains_of(lm: LM) -> dict[int, Float[Tensor, " d_model"]]:
    """For layers with an RMS norm between attention and stream: what it multiplies each coordinate by, on the CPU."""
    gains = {}
    for layer, norm in _norms_after(lm).items():
        weight = next(norm.parameters())
        sample = torch.linspace(-1, 2, lm.d_model, device=weight.device)
        gain = norm(torch.ones_like(sample, dtype=weight.dtype)).float()
        expected, got = gain * sample / sample.square().mean().sqrt(), norm(sample.to(weight.dtype)).float()
        if not torch.allclose(got, expected, rtol=0.02, atol=0.02 * float(gain.abs().max())):  # bfloat16 keeps 8 bits
            raise ModelError(
                f"Layer {layer} sends its attention's output through a {type(norm).__name__}, which is no RMS norm; "
                "what a single head writes can't be told behind it. Use a Residual at this layer instead."
            )
        gains[layer] = gain.cpu()
    return gains


def _contributions(
    lm: LM, written: dict[int, tuple[HeadOutput, Tensor, bool]], prompts: Sequence[Any], positions: Positions
) -> list[Float[Tensor, " heads"]]:
    """Mean component along each layer's direction of what its heads write, in one pass over the prompts."""
    sums = {layer: torch.zeros(output.heads) for layer, (output, _, _) in written.items()}
    mask = torch.empty(0)

    def hook_of(layer: int) -> Callable[..., None]:
        output, along, normed = written[layer]

        def hook(module: nn.Module, inputs: tuple[Any, ...], result: Tensor) -> None:
            amount = (inputs[0][0].float().unflatten(-1, (output.heads, -1)) * along).sum(-1)  # tokens, heads
            if normed:
                amount = amount / result[0].float().square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)
            sums[layer] += amount.cpu()[mask].mean(0) / len(prompts)

        return hook

    span = normal_positions(positions)
    refuse_split(lm)
    with ExitStack() as hooks, torch.no_grad():
        for layer, (output, _, _) in written.items():
            hooks.callback(output.module.register_forward_hook(hook_of(layer)).remove)
        for prompt in prompts:
            ids = torch.tensor([lm.encode(prompt)], device=lm.device)
            mask = span_mask(span, torch.arange(ids.shape[1])[None], torch.tensor([ids.shape[1]]))[0]
            if not mask.any():
                raise ModelError(f"positions={positions!r} names no token of the prompt {prompt!r}.")
            lm.base(input_ids=ids, use_cache=False)
    return list(sums.values())
