"""Conditional steering: a gate looks at each prompt once and decides for its row whether an intervention acts.

The gate reads the plain model's state at the last prompt token after one block, in a forward of its own over the prompt
(so it costs one more prefill), and compares a score with a threshold: the cosine with a direction, much as conditional
activation steering does (CAST, arXiv 2409.05907, without its centre), or the projection on a logistic probe's normal.
Rows are decided one by one; generated text is never looked at. Not covered: gates on adapters and on other models'
logits, which act on whole batches or have caches of their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from workbench.interventions.cache_edits import CacheEdit
from workbench.interventions.concept import Intervention, check_layers, check_origin
from workbench.interventions.heads import unsteered
from workbench.interventions.kv import KV
from workbench.interventions.low_rank import LowRank
from workbench.interventions.residual import Residual
from workbench.models import LM, ModelError
from workbench.turns import in_turn

Measure = Literal["cosine", "probe"]
FOLDS = 8  # of the prompts that fit a gate: each is scored by one that did not see it


@dataclass(frozen=True, eq=False)
class Gate:
    """Fires for a row whose state h, after block `layer` at the last prompt token, scores at least `threshold`.

    cosine: cos(h - centre, direction), from -1 to 1; probe: (h - centre) . direction / |direction|, in units of the
    state. details: what `fit_gate` measured on prompts that the gate was not fitted on.
    """

    direction: Float[Tensor, " d_model"]
    centre: Float[Tensor, " d_model"]
    layer: int
    threshold: float
    measure: Measure = "cosine"
    model: str = ""
    revision: str = ""
    details: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.measure not in get_args(Measure):
            raise ModelError(f"measure={self.measure!r} is unknown. Allowed: {', '.join(get_args(Measure))}.")
        if self.direction.shape != self.centre.shape or self.direction.ndim != 1:
            raise ModelError(
                f"direction {tuple(self.direction.shape)} and centre {tuple(self.centre.shape)} must both have the "
                "shape (d_model,)."
            )

    def score(self, states: Float[Tensor, "rows d_model"]) -> Float[Tensor, " rows"]:
        """How strongly each state points the gate's way."""
        moved = states.float() - self.centre.to(states.device).float()
        unit = self.direction.to(states.device).float() / self.direction.float().norm().clamp(min=1e-12)
        along = moved @ unit
        return along / moved.norm(dim=1).clamp(min=1e-12) if self.measure == "cosine" else along

    def fires(self, states: Float[Tensor, "rows d_model"]) -> Bool[Tensor, " rows"]:
        """Which rows it lets the intervention act on."""
        return self.score(states) >= self.threshold


@dataclass(frozen=True, eq=False)
class Conditional(Intervention):
    """Residual vectors, edits of the cache or sums of them, at work on the rows for which a gate fires."""

    inner: Intervention
    gate: Gate

    def __post_init__(self) -> None:
        wrong = [part for part in self.inner.parts if not isinstance(part, Residual | LowRank | KV | CacheEdit)]
        if wrong:
            raise ModelError(
                f"A gate decides row by row, which a {type(wrong[0]).__name__} can't follow. Gate residual vectors and "
                "edits of the cache."
            )

    def scale(self, factor: float) -> "Conditional":
        return replace(self, inner=self.inner.scale(factor))

    def rebind(self, lm: LM) -> "Conditional":
        gate = replace(self.gate, model=lm.name, revision=lm.revision)
        return replace(self, inner=self.inner.rebind(lm), gate=gate)

    def check(self, lm: LM) -> None:
        for part in self.inner.parts:
            part.check(lm)
        check_layers([self.gate.layer], lm)
        check_origin(self.gate, lm)
        if len(self.gate.direction) != lm.d_model:
            raise ModelError(
                f"The gate's direction has width {len(self.gate.direction)}, but {lm.name!r} has a residual stream of "
                f"width {lm.d_model}. Fit it on this model: fit_gate(lm, fire, rest)."
            )


def gates_of(rows: Sequence[Sequence[Intervention]]) -> list[Gate]:
    """The distinct gates of all rows."""
    return list({id(p.gate): p.gate for row in rows for p in row if isinstance(p, Conditional)}.values())


def resolved(row: Sequence[Intervention], answers: dict[Gate, bool]) -> list[Intervention]:
    """A row's parts with each conditional one replaced by what it holds, or left out where its gate didn't fire."""
    found: list[Intervention] = []
    for part in row:
        if not isinstance(part, Conditional):
            found.append(part)
        elif answers.get(part.gate, False):
            found += part.inner.parts
    return found


def ask(
    lm: LM, gates: Sequence[Gate], run: Callable[[], Any], last: Bool[Tensor, "rows seq"]
) -> dict[Gate, Bool[Tensor, " rows"]]:
    """What every gate says of every row, from one forward; `last` marks each row's last prompt token."""
    states: dict[int, Tensor] = {}
    column = last.int().argmax(1)

    def keep(layer: int) -> Callable[..., None]:
        def take(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            states[layer] = hidden[torch.arange(len(hidden), device=hidden.device), column.to(hidden.device)]

        return take

    handles = [lm.blocks[layer].register_forward_hook(keep(layer)) for layer in {gate.layer for gate in gates}]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {gate: gate.fires(states[gate.layer]).cpu() for gate in gates}


@in_turn
def fit_gate(
    lm: LM,
    fire: Sequence[Any],
    rest: Sequence[Any],
    *,
    layers: Sequence[int] | None = None,
    measure: Measure = "cosine",
    false_fires: float = 0.05,
) -> Gate:
    """A gate that fires on prompts like `fire` and not on prompts like `rest` (strings or chat messages).

    Every second prompt of both sides fits it: the layer by AUROC and the threshold that lets at most `false_fires` of
    the rest through, each prompt scored by a gate fitted without it (a direction always parts the few prompts it was
    made from). The prompts between them measure it: `details` holds auroc, and fire_rate and false_fire_rate with their
    95 % intervals. So don't list variants of one prompt side by side. Raises ModelError for fewer than 8 a side.
    """
    if min(len(fire), len(rest)) < 8:
        raise ModelError(f"{len(fire)} and {len(rest)} prompts: give at least 8 a side; half of them only measure.")
    if not 0 < false_fires < 1:
        raise ModelError(f"false_fires={false_fires} is no share: give a number between 0 and 1, such as 0.05.")
    wanted = list(range(len(lm.blocks))) if layers is None else list(layers)
    check_layers(wanted, lm)
    on, off = (last_states(lm, prompts, wanted) for prompts in (fire, rest))
    scores = {layer: _held_out(on[layer][::2], off[layer][::2], layer, measure, lm) for layer in wanted}
    layer = max(wanted, key=lambda number: auroc(*scores[number]))
    gate = _fit(on[layer][::2], off[layer][::2], layer, measure, lm)
    gate = replace(gate, threshold=_threshold(*scores[layer], false_fires))
    return replace(gate, details=_measured(gate, on[layer][1::2], off[layer][1::2]))


@in_turn
def last_states(lm: LM, prompts: Sequence[Any], layers: Sequence[int]) -> dict[int, Float[Tensor, "prompts d_model"]]:
    """The plain model's state at the last token of each prompt after each of these blocks, float32 on the CPU."""
    kept: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    handles = [
        lm.blocks[layer].register_forward_hook(
            lambda module, inputs, output, layer=layer: kept[layer].append(
                (output[0] if isinstance(output, tuple) else output)[0, -1].float().cpu()
            )
        )
        for layer in layers
    ]
    try:
        with torch.no_grad(), unsteered(lm):
            for prompt in prompts:
                lm.base(torch.tensor([lm.encode(prompt)], device=lm.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {layer: torch.stack(states) for layer, states in kept.items()}


def auroc(positive: Float[Tensor, " p"], negative: Float[Tensor, " n"]) -> float:
    """Chance that a positive's score is above a negative's, ties counted half (the area under the ROC curve).

    >>> auroc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))
    0.875
    """
    above = (positive[:, None] > negative).float() + 0.5 * (positive[:, None] == negative).float()
    return above.mean().item()


def _fit(on: Tensor, off: Tensor, layer: int, measure: Measure, lm: LM) -> Gate:
    from workbench.interventions.probes import direction_of

    centre = (on.mean(0) + off.mean(0)) / 2
    direction = on.mean(0) - off.mean(0)
    if measure == "probe":
        even = min(len(on), len(off))
        direction = direction_of(torch.stack([on[:even], off[:even]]), "logistic")
    return Gate(direction, centre, layer, 0.0, measure, lm.name, lm.revision)


def _held_out(on: Tensor, off: Tensor, layer: int, measure: Measure, lm: LM) -> tuple[Tensor, Tensor]:
    """Scores of both sides, each prompt's from a gate that was fitted on the other folds."""
    folds = min(FOLDS, len(on), len(off))
    scores = (torch.empty(len(on)), torch.empty(len(off)))
    for number in range(folds):
        others = [side[torch.arange(len(side)) % folds != number] for side in (on, off)]
        gate = _fit(others[0], others[1], layer, measure, lm)
        for side, found in zip((on, off), scores, strict=True):
            found[number::folds] = gate.score(side[number::folds])
    return scores


def _threshold(on: Float[Tensor, " p"], off: Float[Tensor, " n"], false_fires: float) -> float:
    """Above all but at most `false_fires` of the rest, and midway to the next score, so that rounding moves nothing."""
    edge = off.sort(descending=True).values[int(false_fires * len(off))]
    above = torch.cat([on, off])
    above = above[above > edge]
    return float((edge + above.min()) / 2 if len(above) else edge + 1e-3 * edge.abs().clamp(min=1e-3))


def _measured(gate: Gate, on: Tensor, off: Tensor) -> dict[str, float]:
    from workbench.statistics import wilson

    hits, false = (wilson(int(gate.fires(side).sum()), len(side)) for side in (on, off))
    return {
        "auroc": auroc(gate.score(on), gate.score(off)), "n_fire": len(on), "n_rest": len(off),
        "fire_rate": hits.estimate, "fire_rate_low": hits.low, "fire_rate_high": hits.high,
        "false_fire_rate": false.estimate, "false_fire_rate_low": false.low, "false_fire_rate_high": false.high,
    }  # fmt: skip
