"""Change the residual stream along a vector v, after decoder block l, at chosen token positions; u = v / |v|.

    add      h <- h + strength * v                        activation addition (arXiv 2308.10248, 2312.06681)
    ablate   h <- h - strength * (h . u) u                directional ablation (arXiv 2406.11717)
    clamp    h <- h + strength * (level * |v| - h . u) u  the component along u is set, as feature clamping does

Strength 0 is the identity for each; ablate and clamp are whole at strength 1. Layer l is the output of decoder block l,
before the final norm. Several changes at one layer all read the state as the block left it: their order is no matter.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.interventions.concept import Intervention, check_layers, check_origin
from workbench.models import LM, ModelError

SPANS = ("last", "prompt", "generated", "all")
Positions = str | int | slice | Sequence[int]
Operation = Literal["add", "ablate", "clamp"]


@dataclass(frozen=True, eq=False)
class Residual(Intervention):
    """One vector a layer, at work at `positions` of each row's own text, `strength` times.

    positions: "last" (the last prompt token), "prompt", "generated", "all", an int, several ints, or a slice. Negative
    numbers count from the end of the prompt; a slice with an open end goes on into the generated text. operation: see
    the head of this module; level is clamp's, in lengths of v.
    """

    vectors: dict[int, Float[Tensor, " d_model"]]
    positions: Positions = "all"
    strength: float = 1.0
    model: str = ""
    revision: str = ""
    details: dict[str, str] = field(default_factory=dict)
    operation: Operation = "add"
    level: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", normal_positions(self.positions))
        if self.operation not in get_args(Operation):
            raise ModelError(
                f"operation={self.operation!r} is unknown. Allowed: {', '.join(get_args(Operation))}; write v.ablate() "
                "or v.clamp(1.0)."
            )
        for layer, vector in self.vectors.items():
            if vector.ndim != 1:
                raise ModelError(
                    f"The vector of layer {layer} has shape {tuple(vector.shape)}; one of shape (d_model,) is needed."
                )

    def at(self, layers: Iterable[int] | int | None = None, positions: Positions | None = None) -> "Residual":
        """The same vectors at fewer layers or at other positions.

        >>> v = Residual({0: torch.ones(4), 1: torch.ones(4)})
        >>> sorted(v.at(layers=[1], positions="generated").vectors)
        [1]
        """
        chosen = list(self.vectors) if layers is None else [layers] if isinstance(layers, int) else list(layers)
        missing = [layer for layer in chosen if layer not in self.vectors]
        if missing or not chosen:
            raise ModelError(f"layers={chosen} asked for; there are vectors for layers {sorted(self.vectors)}.")
        kept = {layer: self.vectors[layer] for layer in chosen}
        return replace(self, vectors=kept, positions=self.positions if positions is None else positions)

    def ablate(self) -> "Residual":
        """Take the component along each vector out of the state; at strength 1 nothing of it is left."""
        return replace(self, operation="ablate", strength=1.0)

    def clamp(self, level: float = 1.0) -> "Residual":
        """Set the component along each vector to `level` times the vector's length; 0 is the same as `ablate`."""
        return replace(self, operation="clamp", strength=1.0, level=level)

    def scale(self, factor: float) -> "Residual":
        return replace(self, strength=self.strength * factor)

    def check(self, lm: LM) -> None:
        for layer, vector in self.vectors.items():
            if len(vector) != lm.d_model:
                raise ModelError(
                    f"The vector of layer {layer} has width {len(vector)}, but {lm.name!r} has a residual stream of "
                    f"width {lm.d_model}: it was made on another model ({self.model or 'unnamed'}). Extract it again "
                    "on this one."
                )
        check_layers(self.vectors, lm)
        check_origin(self, lm)


def normal_positions(positions: Positions) -> str | slice | tuple[int, ...]:
    """One of the named spans, a slice or a tuple of ints; refuses the rest."""
    if isinstance(positions, str):
        if positions not in SPANS:
            raise ModelError(f"positions={positions!r} is unknown. Allowed: {', '.join(SPANS)}, ints, or a slice.")
        return positions
    if isinstance(positions, slice):
        if positions.step is not None and positions.step < 1:
            raise ModelError(f"positions={positions} has a step below 1.")
        return positions
    return (positions,) if isinstance(positions, int) else tuple(int(position) for position in positions)


def span_mask(
    positions: Positions, text: Int[Tensor, "rows seq"], lengths: Int[Tensor, " rows"]
) -> Bool[Tensor, "rows seq"]:
    """Where `positions` falls in a forward whose tokens stand at `text` positions of their own row (-1 = padding).

    >>> text = torch.tensor([[-1, 0, 1, 2], [0, 1, 2, 3]])
    >>> span_mask("last", text, torch.tensor([2, 4])).int().tolist()
    [[0, 0, 1, 0], [0, 0, 0, 1]]
    """
    length = lengths[:, None]
    real = text >= 0
    if positions == "all":
        return real
    if positions == "prompt":
        return real & (text < length)
    if positions == "last":
        return real & (text == length - 1)
    if positions == "generated":
        return real & (text >= length)
    if isinstance(positions, slice):
        start = _from_end(positions.start or 0, length)
        inside = real & (text >= start)
        if positions.stop is not None:
            inside &= text < _from_end(positions.stop, length)
        return inside & ((text - start.clamp(min=0)) % (positions.step or 1) == 0)
    chosen = torch.zeros_like(real)
    places = (positions,) if isinstance(positions, int) else positions
    for position in places:
        chosen |= text == _from_end(int(position), length)
    return chosen & real


def _from_end(position: int, length: Int[Tensor, "rows 1"]) -> Int[Tensor, "rows 1"]:
    return length + position if position < 0 else torch.full_like(length, position)
