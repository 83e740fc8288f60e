"""A change of the residual stream that reads the state: h <- h + strength * up^T (down h + bias), after a block.

With rank r, `down` reads r numbers off the state and `up` writes r directions; down = 0, bias = 1 and r = 1 is one
vector added. It is DiReFT of representation fine-tuning (arXiv 2404.03592). `train_vector(rank=r)` fits it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from workbench.interventions.concept import Intervention, check_layers, check_origin
from workbench.interventions.residual import Positions, normal_positions
from workbench.models import LM, ModelError


@dataclass(frozen=True, eq=False)
class LowRank(Intervention):
    """One map of low rank a layer, at work after that block at `positions` (as `Residual`'s), `strength` times."""

    down: dict[int, Float[Tensor, "rank d_model"]]
    bias: dict[int, Float[Tensor, " rank"]]
    up: dict[int, Float[Tensor, "rank d_model"]]
    positions: Positions = "all"
    strength: float = 1.0
    model: str = ""
    revision: str = ""
    details: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", normal_positions(self.positions))
        for layer in sorted({*self.down, *self.bias, *self.up}):
            shapes = [tuple(part[layer].shape) if layer in part else None for part in (self.down, self.bias, self.up)]
            if None in shapes or shapes[0] != shapes[2] or shapes[1] != shapes[0][:1]:  # type: ignore[index]
                raise ModelError(
                    f"Layer {layer} has down, bias and up of shapes {shapes}; (rank, d_model), (rank,) and "
                    "(rank, d_model) are needed."
                )

    def at(self, layers: Iterable[int] | int | None = None, positions: Positions | None = None) -> "LowRank":
        """The same maps at fewer layers or at other positions."""
        chosen = list(self.down) if layers is None else [layers] if isinstance(layers, int) else list(layers)
        missing = [layer for layer in chosen if layer not in self.down]
        if missing or not chosen:
            raise ModelError(f"layers={chosen} asked for; there are maps for layers {sorted(self.down)}.")
        kept = ({layer: part[layer] for layer in chosen} for part in (self.down, self.bias, self.up))
        down, bias, up = kept
        where = self.positions if positions is None else positions
        return replace(self, down=down, bias=bias, up=up, positions=where)

    def scale(self, factor: float) -> "LowRank":
        return replace(self, strength=self.strength * factor)

    def check(self, lm: LM) -> None:
        for layer, part in self.down.items():
            if part.shape[1] != lm.d_model:
                raise ModelError(
                    f"The map of layer {layer} has width {part.shape[1]}, but {lm.name!r} has a residual stream of "
                    f"width {lm.d_model}: it was made on another model ({self.model or 'unnamed'}). Train it again "
                    "on this one."
                )
        check_layers(self.down, lm)
        check_origin(self, lm)
