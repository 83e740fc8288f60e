"""Change weights for the length of a block: take a direction out of attention heads, or scale what one task needs.

`project_out` removes what chosen heads write along a direction (ThinkEdit, arXiv 2503.22048); `heads` finds such heads
and says which architectures have them. `isolate` finds weights that matter for one kind of text and not for another, by
forward passes only (MathNeuro, arXiv 2410.16930; the score is Wanda's, arXiv 2306.11695). Biases, embeddings, the
language-model head and experts that share one tensor are left alone; 4-bit weights are refused.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.files import content_key
from workbench.interventions.concept import Intervention, check_layers, check_origin
from workbench.interventions.heads import gains_of, heads_of, heads_writing, plain_weight, refuse_split, units_of
from workbench.interventions.residual import Residual
from workbench.models import LM, ModelError
from workbench.turns import in_turn

__all__ = ["Weights", "changed", "heads_writing", "isolate", "project_out"]


@dataclass(frozen=True, eq=False)
class Weights(Intervention):
    """Which weights change and how; all rows of a forward share them, as with an adapter.

    heads, directions: W_o[:, head] <- (I - strength v v^T) W_o[:, head] for each (layer, head), v the layer's unit
    direction. chosen: flat places in the weight of each named module, multiplied by 1 + strength (factor - 1); shapes
    are those weights' own. Strength 0 is the identity. Several of these are made one after the other.
    """

    directions: dict[int, Float[Tensor, " d_model"]] = field(default_factory=dict)
    heads: tuple[tuple[int, int], ...] = ()
    chosen: dict[str, Int[Tensor, " _"]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    factor: float = 0.0
    strength: float = 1.0
    model: str = ""
    revision: str = ""
    details: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", tuple((int(layer), int(head)) for layer, head in self.heads))
        object.__setattr__(self, "shapes", {name: tuple(shape) for name, shape in self.shapes.items()})

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for two that make the same change with the same tensors: `x` and `0.5 * (2 * x)`, say."""
        tensors = (*self.directions.items(), *self.chosen.items())
        return (*((name, id(tensor)) for name, tensor in tensors), self.heads, self.factor, self.strength)

    def scale(self, factor: float) -> "Weights":
        return replace(self, strength=self.strength * factor)

    def prune(self) -> "Weights":
        """The chosen weights set to zero."""
        return self.multiplied(0.0)

    def multiplied(self, factor: float) -> "Weights":
        """The chosen weights times `factor`: MathNeuro strengthens an ability with about 1.1."""
        return replace(self, factor=float(factor))

    def random(self, seed: int = 0) -> "Weights":
        """The control: random directions for the same heads, as many random places in the same matrices."""
        stream = torch.Generator().manual_seed(seed)
        noise = {layer: torch.randn(len(v), generator=stream) for layer, v in self.directions.items()}
        places = {
            name: torch.randperm(torch.Size(self.shapes[name]).numel(), generator=stream)[: len(places)].int()
            for name, places in self.chosen.items()
        }
        return replace(self, directions={layer: v / v.norm() for layer, v in noise.items()}, chosen=places)

    def check(self, lm: LM) -> None:
        check_origin(self, lm)
        check_layers([*self.directions, *(layer for layer, _ in self.heads)], lm)
        for layer, head in self.heads:
            output = heads_of(lm, layer)
            if layer not in self.directions or len(self.directions[layer]) != len(output.weight):
                known = {number: len(v) for number, v in self.directions.items()}
                raise ModelError(
                    f"Head {head} of layer {layer} needs a direction of width {len(output.weight)}; there are "
                    f"directions of (layer: width) {known}. Make them with project_out(lm, direction, heads)."
                )
            if not 0 <= head < output.heads:
                raise ModelError(f"Layer {layer} of {lm.name!r} has heads 0 to {output.heads - 1}; got {head}.")
        matrices = _matrices(lm) if self.chosen else {}
        for name in self.chosen:
            shape = tuple(plain_weight(matrices[name], name).shape) if name in matrices else None
            if shape != self.shapes.get(name):
                raise ModelError(
                    f"Weights of {name} were chosen in shape {self.shapes.get(name)}, but {lm.name!r} has "
                    f"{shape or 'no such matrix'}. Choose them on this model: isolate(lm, task_texts, other_texts)."
                )

    def made(self, lm: LM) -> Iterator[tuple[nn.Module, Tensor]]:
        """Each module that changes, and its new weight, made from the one it has now."""
        for layer, direction in self.directions.items():
            picked = [head for number, head in self.heads if number == layer]
            output = heads_of(lm, layer)
            new = output.module.get_parameter("weight").detach().clone()
            view = output.split(new)
            old, v = view[:, picked].float(), direction.to(new.device, torch.float32)
            view[:, picked] = (old - self.strength * torch.einsum("d,e,ehk->dhk", v, v, old)).to(new.dtype)
            yield output.module, new
        matrices = _matrices(lm) if self.chosen else {}
        for name, places in self.chosen.items():
            new = matrices[name].get_parameter("weight").detach().clone(memory_format=torch.contiguous_format)
            at = places.to(new.device, torch.long)
            new.view(-1)[at] *= 1 + self.strength * (self.factor - 1)
            yield matrices[name], new


@contextmanager
def changed(lm: LM, edits: Sequence[Weights]) -> Iterator[None]:
    """Make the edits, in their order, for the length of the block; then the original tensors are back, the same ones.

    Nested blocks add up and may be left in any order: what is left is as if the others had been alone. Raises
    ModelError, with nothing changed, where an edit doesn't fit the model.
    """
    for edit in edits:
        edit.check(lm)
    stack, mine = MADE.setdefault(lm.model, []), _Made([edit for edit in edits if edit.strength != 0])
    stack.append(mine)
    try:
        mine.make(lm)
        yield
    finally:
        later = stack[stack.index(mine) + 1 :]
        for each in (*reversed(later), mine):
            each.undo()
        stack.remove(mine)
        for each in later:
            each.make(lm)


@dataclass(eq=False)
class _Made:
    """A block's edits, and the tensors that they replaced."""

    edits: list[Weights]
    kept: list[tuple[nn.Module, nn.Parameter]] = field(default_factory=list)

    def make(self, lm: LM) -> None:
        for edit in self.edits:
            for module, new in edit.made(lm):
                old = module.get_parameter("weight")
                self.kept.append((module, old))
                module.weight = nn.Parameter(new, requires_grad=old.requires_grad)

    def undo(self) -> None:
        while self.kept:
            module, old = self.kept.pop()
            module.weight = old


MADE: WeakKeyDictionary[nn.Module, list[_Made]] = WeakKeyDictionary()  # by model, the blocks in force, outermost first


def project_out(lm: LM, direction: Residual | dict[int, Tensor], heads: Sequence[tuple[int, int]]) -> Weights:
    """Keep the chosen (layer, head) from writing along the direction of their layer.

    `s * project_out(...)` removes the share s: 0 is the identity, 1 removes all, up to the rounding of the weights'
    dtype. A projection's bias belongs to no head and stays. Where a norm follows the projection, the direction is
    seen through its gain, so that nothing along it reaches the residual stream.

    >>> from workbench.models import load_model
    >>> lm = load_model("lab-small")
    >>> project_out(lm, {1: torch.ones(lm.d_model)}, heads=[(1, 0), (1, 2)]).heads
    ((1, 0), (1, 2))
    """
    wanted = tuple(sorted({(int(layer), int(head)) for layer, head in heads}))
    units, gains = units_of(lm, direction), gains_of(lm)
    missing = sorted({layer for layer, _ in wanted} - set(units))
    if missing or not wanted:
        raise ModelError(
            f"heads={list(heads)}: give (layer, head) pairs, and a direction for each layer. There are directions for "
            f"layers {sorted(units)}, none for {missing}."
        )
    seen = {layer: units[layer] * gains.get(layer, 1.0) for layer, _ in wanted}
    directions = {layer: v / v.norm() for layer, v in seen.items()}
    origin = direction.details if isinstance(direction, Residual) else {}
    details = {**origin, "method": "project_out"}
    made = Weights(directions, wanted, model=lm.name, revision=lm.revision, details=details)
    made.check(lm)
    return made


@in_turn
def isolate(lm: LM, task_texts: Sequence[str], other_texts: Sequence[str], share: float = 0.05) -> Weights:
    """The weights that matter for the task and not for the other texts; used as it is, they are pruned.

    Score of a weight: |W| times the norm of its input over a text's tokens, summed over texts. In each matrix of the
    decoder blocks: those in the top `share` for the task that aren't in the top `share` for the others. `.prune()`
    sets them to zero, `.multiplied(1.1)` strengthens them.

    >>> from workbench.models import load_model
    >>> isolate(load_model("lab-small"), ["3 + 4 = 7"], ["a cat sat"], share=0.01).multiplied(1.1).factor
    1.1
    """
    if not 0 < share < 1 or not task_texts or not other_texts or isinstance(task_texts, str):
        raise ModelError(
            f"share={share}, {len(task_texts)} task texts, {len(other_texts)} other texts: share lies between 0 and 1, "
            "and both sides are lists with at least one text."
        )
    task, other = _input_norms(lm, task_texts), _input_norms(lm, other_texts)
    chosen, shapes = {}, {}
    for name, module in _matrices(lm).items():
        if name not in task:  # never called
            continue
        mine = _top(module, task[name], share)
        places = (mine & ~_top(module, other[name], share) if name in other else mine).nonzero().flatten()
        if len(places):
            chosen[name], shapes[name] = places.int().cpu(), tuple(module.get_parameter("weight").shape)
    if not chosen:
        raise ModelError(
            f"No weight is in the top {share:.2%} for the task and not for the other texts. Give texts that differ "
            "more, or a larger share."
        )
    details = {"method": "isolate", "share": str(share), "weights": str(sum(map(len, chosen.values())))}
    details["data_sha256"] = content_key(task=list(task_texts), other=list(other_texts))
    return Weights(chosen=chosen, shapes=shapes, model=lm.name, revision=lm.revision, details=details)


def _matrices(lm: LM) -> dict[str, nn.Module]:
    """Weight matrices of the decoder blocks by their name in the model; the name is the same under an adapter."""
    inside = {id(module) for block in lm.blocks for module in block.modules()}
    return {
        name.removesuffix(".base_layer"): module
        for name, module in lm.model.named_modules()
        if id(module) in inside and (isinstance(module, (nn.Linear, Conv1D))) and ".lora_" not in name
    }


def _input_norms(lm: LM, texts: Sequence[str]) -> dict[str, Float[Tensor, " inputs"]]:
    """For every matrix: the norm of each input over a text's tokens, summed over texts."""
    sums: dict[str, Tensor] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].float().flatten(0, -2).norm(dim=0)

        return hook

    refuse_split(lm)
    with ExitStack() as hooks, torch.no_grad():
        for name, module in _matrices(lm).items():
            plain_weight(module, name)
            hooks.callback(module.register_forward_pre_hook(hook_of(name)).remove)
        for text in texts:
            lm.base(input_ids=torch.tensor([lm.encode(text)], device=lm.device), use_cache=False)
    return sums


def _top(module: nn.Module, norms: Float[Tensor, " inputs"], share: float) -> Bool[Tensor, " size"]:
    """Which places of the flat weight are in the top share of their matrix; a score of zero never is."""
    weight = module.get_parameter("weight")
    inputs = norms[:, None] if isinstance(module, Conv1D) else norms
    score = (weight.detach().float().abs() * inputs).flatten()
    top = torch.zeros_like(score, dtype=torch.bool)
    top[score.topk(int(share * len(score))).indices] = True
    return top & (score > 0)
