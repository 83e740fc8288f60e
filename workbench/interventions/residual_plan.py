"""The changes of the residual stream that a batch needs, as tensors: every row's own, in one product a layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.interventions.low_rank import LowRank
from workbench.interventions.residual import Positions, Residual
from workbench.models import LM


@dataclass
class MapPlan:
    """A map of low rank in one layer and every row's strength of it."""

    down: Float[Tensor, "rank d_model"]
    bias: Float[Tensor, " rank"]
    up: Float[Tensor, "rank d_model"]
    strengths: Float[Tensor, " rows"]
    span: int

    @classmethod
    def of(
        cls, x: LowRank, layer: int, shares: Mapping[int, float], span: int, rows: int, device: torch.device
    ) -> "MapPlan":
        """On the layer's device, in float32."""
        strengths = torch.zeros(rows)
        strengths[list(shares)] = torch.tensor(list(shares.values()), dtype=torch.float32)
        down, bias, up = (part[layer].to(device).float() for part in (x.down, x.bias, x.up))
        return cls(down, bias, up, strengths.to(device), span)

    def change(
        self,
        hidden: Float[Tensor, "rows seq d_model"],
        masks: Bool[Tensor, "rows seq spans"],
        rows: Int[Tensor, " rows"],
    ) -> Float[Tensor, "rows seq d_model"]:
        """What is added to these states."""
        share = self.strengths[rows][:, None] * masks[:, :, self.span]
        return share[..., None] * ((hidden @ self.down.T + self.bias) @ self.up)


@dataclass
class ResidualPlan:
    """All rows' changes of one layer: `atoms` distinct (vector, span) pairs, and every row's share in each.

    A change is additions * v - removals * (h . u) u, and what maps of low rank add to it.
    """

    vectors: Float[Tensor, "atoms d_model"]
    additions: Float[Tensor, "rows atoms"]
    removals: Float[Tensor, "rows atoms"] | None  # None where nothing but addition is asked for
    spans: list[int]  # per atom, an index into the session's list of spans
    maps: list[MapPlan] = field(default_factory=list)

    @property
    def constant(self) -> bool:
        """Whether a change is the same whatever the state is."""
        return self.removals is None and not self.maps

    def change(
        self,
        hidden: Float[Tensor, "rows seq d_model"],
        masks: Bool[Tensor, "rows seq spans"],
        rows: Int[Tensor, " rows"],
    ) -> Float[Tensor, "rows seq d_model"]:
        """Hidden states with every row's changes; sums run in float32."""
        inside = masks[:, :, self.spans]
        total = (self.additions[rows][:, None, :] * inside) @ self.vectors
        if self.removals is not None:
            units = self.vectors / self.vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
            total = total - (self.removals[rows][:, None, :] * inside * (hidden.float() @ units.T)) @ units
        for each in self.maps:
            total = total + each.change(hidden.float(), masks, rows)
        return hidden + total.to(hidden.dtype)


def plan_residual(
    rows: Sequence[Sequence[Residual | LowRank]], lm: LM
) -> tuple[dict[int, ResidualPlan], list[Positions]]:
    """Tensors for a batch: one plan a layer, and the distinct spans they refer to. Zero strengths leave no trace."""
    spans: list[Positions] = []
    maps: dict[tuple[int, int, int], tuple[LowRank, dict[int, float]]] = {}
    atoms: dict[int, dict[tuple[int, int], tuple[Tensor, dict[int, tuple[float, float]]]]] = {}
    for number, row in enumerate(rows):
        for part in row:
            if part.strength == 0.0:
                continue
            if part.positions not in spans:
                spans.append(part.positions)
            span = spans.index(part.positions)
            if isinstance(part, LowRank):
                for layer in part.down:
                    _, own = maps.setdefault((layer, id(part.down[layer]), span), (part, {}))
                    own[number] = own.get(number, 0.0) + part.strength
                continue
            addition, removal = _coefficients(part)
            for layer, vector in part.vectors.items():
                _, shares = atoms.setdefault(layer, {}).setdefault((id(vector), span), (vector, {}))
                before = shares.get(number, (0.0, 0.0))
                shares[number] = (before[0] + addition, before[1] + removal)
    plans = {}
    for layer in sorted({*atoms, *(layer for layer, *_ in maps)}):
        device = next(lm.blocks[layer].parameters()).device
        plan = _constants(atoms.get(layer, {}), len(rows), lm.d_model, device)
        plan.maps = [
            MapPlan.of(part, layer, shares, span, len(rows), device)
            for (place, _, span), (part, shares) in maps.items()
            if place == layer
        ]
        plans[layer] = plan
    return plans, spans


def _constants(
    entries: Mapping[tuple[int, int], tuple[Tensor, Mapping[int, tuple[float, float]]]],
    rows: int,
    d_model: int,
    device: torch.device,
) -> ResidualPlan:
    """One layer's plan without its maps; by (vector, span), every row's additions and removals."""
    table = torch.zeros(2, rows, len(entries))
    for column, (_, shares) in enumerate(entries.values()):
        table[:, list(shares), column] = torch.tensor(list(shares.values()), dtype=torch.float32).T
    vectors = [vector.float() for vector, _ in entries.values()]
    stacked = (torch.stack(vectors) if vectors else torch.zeros(0, d_model)).to(device)
    removals = table[1].to(device) if table[1].any() else None
    return ResidualPlan(stacked, table[0].to(device), removals, [span for _, span in entries])


def _coefficients(part: Residual) -> tuple[float, float]:
    """How much of v a part adds, and how much of the component along u it removes."""
    if part.operation == "add":
        return part.strength, 0.0
    return (part.strength * part.level if part.operation == "clamp" else 0.0), part.strength
