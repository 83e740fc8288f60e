"""Choose the strength of an intervention that spends a given KL budget, and say what an intervention damages.

Strengths of different kinds, layers and vectors compare only at equal damage. Damage is KL(plain || changed) in nats a
token, on the plain model's own greedy answers, both models scoring the same tokens; calibrating its 95th percentile
over tokens to a budget follows the practice of steering-lite (github.com/wassname/steering-lite). The KL need not grow
with the strength everywhere: the search takes the first crossing that it sees and shows all that it tried.
Does not choose layers, vectors or a budget, and never reads a test split. What is measured: `divergence`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from workbench.divergence import WORST, PlainAnswers, damage, damage_beside
from workbench.files import content_key
from workbench.grid import grid
from workbench.interventions import KV, Intervention, LowRank, Residual, random_like
from workbench.models import LM, ModelError
from workbench.tasks import Task

LADDER = (1 / 16, 1 / 4, 1.0, 4.0)  # strengths of the first evaluation, where rows may differ in strength
TOLERANCE = 0.05  # relative distance from the budget that counts as there
NOISE = 1e-6  # nats; float32 rounding of two equal models stays below
ROWS = (Residual, LowRank, KV)  # kinds whose strength may differ from row to row of one forward
__all__ = ["Calibrated", "behaviour_and_damage", "calibrate", "compare_at_budget", "damage"]


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A strength that spends the budget: `intervention` is `strength` times what was given.

    kl: the percentile over tokens, in nats, at `strength`. converged: within 5 % of the budget; else `strength` is the
    largest tried one up to which nothing tried exceeded the budget. table: strength, kl, kl_mean, evaluation. The
    intervention's own `calibration` says all but the table, and a hash of the prompts' token ids; it is saved with it.
    """

    strength: float
    kl: float
    budget: float
    percentile: float
    evaluations: int
    converged: bool
    intervention: Intervention
    table: pd.DataFrame


def calibrate(
    lm: LM,
    x: Intervention,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    budget: float = 0.5,
    percentile: float = 95,
    evaluations: int = 6,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
) -> Calibrated:
    """The strength c > 0 at which the percentile over tokens of KL(plain || c * x) is `budget` nats.

    Give tuning prompts: a strength chosen on test prompts flatters what is reported on them. The percentile is over all
    tokens of the answers, so a change of the first tokens of long answers passes under it: use fewer new tokens, or a
    higher percentile, for edits that act on one token. One evaluation scores the
    plain model's answers under several strengths at once, as rows of one batch; kinds that change the weights of the
    whole batch (adapters) are tried one strength an evaluation. Raises ModelError where no strength tried reaches the
    budget or none stays within it.

    >>> from workbench import load_model
    >>> import torch
    >>> lm = load_model("lab")
    >>> v = Residual({3: torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0))})
    >>> found = calibrate(lm, v, ["<|user|>2+3?<|end|><|assistant|>\\n"], budget=0.1, max_new_tokens=8)
    >>> found.converged, round(found.kl, 1), found.intervention.strength == found.strength
    (True, 0.1, True)
    """
    return _calibrate(PlainAnswers.of(lm, prompts, max_new_tokens, batch_size), x, budget, percentile, evaluations)


def compare_at_budget(
    lm: LM,
    task: Task,
    candidates: dict[str, Intervention],
    *,
    budget: float | Sequence[float] = 0.5,
    n: int = 48,
    seed: int = 0,
    split: str = "tuning",
    max_new_tokens: int = 256,
    texts: Sequence[str] | None = None,
    controls: bool = True,
) -> pd.DataFrame:
    """Every candidate, and a random direction of equal norm beside it, at the same KL: behaviour and damage.

    All are calibrated and run on the same n questions of a split that is not for reporting. budget: one, or several,
    each a line of every candidate. controls=False leaves out the random directions. Columns: candidate, control,
    budget, strength, converged, note; then those of `workbench.grid.grid`; then those of `damage`, with _low and
    _high. A line that cannot be brought to its budget keeps the reason in `note` and has no numbers, and so does the
    control of a kind that has no random twin (adapters). Raises ValueError for the test split and for no candidates,
    ModelError where no line reaches its budget.
    """
    prompts = _questions(lm, task, candidates, n, seed, split)
    plain = PlainAnswers.of(lm, prompts, 64, None)  # as `damage` and `calibrate` do by default
    budgets = [budget] if isinstance(budget, (int, float)) else sorted(budget)
    lines = [
        {"candidate": name, "control": control, **line}
        for name, x in candidates.items()
        for control in ((False, True) if controls else (False,))
        for line in _brought(plain, x, budgets, seed if control else None)
    ]
    reached = {number: line.pop("x") for number, line in enumerate(lines) if "x" in line}
    if not reached:
        raise ModelError(f"No candidate reaches the budget of {budget} nats. The first one: {lines[0]['note']}")
    found = _measured(plain, task, reached, prompts, n, seed, split, max_new_tokens, texts)
    return pd.DataFrame(lines).join(found)


def behaviour_and_damage(
    lm: LM,
    task: Task,
    conditions: dict[str, Intervention],
    *,
    n: int = 48,
    seed: int = 0,
    split: str = "tuning",
    max_new_tokens: int = 256,
    texts: Sequence[str] | None = None,
) -> pd.DataFrame:
    """The columns of `compare_at_budget` for interventions as they are, at whatever KL they cost; `condition` first."""
    prompts = _questions(lm, task, conditions, n, seed, split)
    plain = PlainAnswers.of(lm, prompts, 64, None)
    numbered = dict(enumerate(conditions.values()))
    found = _measured(plain, task, numbered, prompts, n, seed, split, max_new_tokens, texts)
    return pd.DataFrame({"condition": list(conditions)}).join(found)


def _questions(
    lm: LM, task: Task, candidates: dict[str, Intervention], n: int, seed: int, split: str
) -> list[str | list[dict[str, str]]]:
    if split == "test" or not candidates:
        raise ValueError(
            f"split={split!r} with {len(candidates)} candidates: give at least one, {{'mean': v}}, and split='tuning' "
            "or 'train'. Strengths that are chosen on the test split flatter what is reported on it."
        )
    return [lm.render(task.messages(row)) for row in task.rows(split, n=n, seed=seed)]


def _measured(
    plain: PlainAnswers,
    task: Task,
    changes: dict[int, Intervention],
    prompts: Sequence[str | list[dict[str, str]]],
    n: int,
    seed: int,
    split: str,
    max_new_tokens: int,
    texts: Sequence[str] | None,
) -> pd.DataFrame:
    """Behaviour of all changes in one generation, and the damage of each; the index holds their numbers."""
    cells = [({"line": number}, x) for number, x in changes.items()]
    table = grid(plain.lm, task, cells, n=n, seed=seed, split=split, max_new_tokens=max_new_tokens).set_index("line")
    costs = []
    for x in changes.values():
        cost: dict[str, float] = {}
        for name, value in damage_beside(plain, x, prompts, texts=texts).items():
            cost |= {name: value.estimate, f"{name}_low": value.low, f"{name}_high": value.high}
        costs.append(cost)
    return table.join(pd.DataFrame(costs, index=table.index))


def _brought(plain: PlainAnswers, x: Intervention, budgets: Sequence[float], seed: int | None) -> list[dict[str, Any]]:
    """What the lines of a candidate (of its random twin, given a seed) say of calibration; `x` where it arrived."""
    lines: list[dict[str, Any]] = []
    seen: list[dict[str, float]] = []
    for budget in budgets:
        try:
            found = _calibrate(plain, x if seed is None else random_like(x, seed), budget, 95, 6, seen)
        except ModelError as reason:
            lines.append({"budget": budget, "strength": math.nan, "converged": False, "note": str(reason)})
            continue
        facts = {"budget": budget, "strength": found.strength, "converged": found.converged, "note": ""}
        lines.append({**facts, "x": found.intervention})
    return lines


def _calibrate(
    plain: PlainAnswers,
    x: Intervention,
    budget: float,
    percentile: float,
    evaluations: int,
    seen: list[dict[str, float]] | None = None,
) -> Calibrated:
    """`seen` holds what earlier searches for other budgets tried, and is added to."""
    if not (NOISE * 10 <= budget < WORST and 0 < percentile <= 100 and evaluations >= 1):
        raise ModelError(
            f"budget={budget}, percentile={percentile}, evaluations={evaluations}: the budget is in nats a token (0.5 "
            f"is a usual one, at least {NOISE * 10}), the percentile above 0 and at most 100, evaluations at least 1."
        )
    several = all(isinstance(part, ROWS) for part in x.parts)
    lines = [] if seen is None else seen
    tried = {line["strength"]: line["kl"] for line in lines}
    used = 0
    while used < evaluations and _arrived(tried, budget) is None:
        if used >= 2 and max(tried.values()) <= NOISE:
            break  # nothing happens at any strength
        used += 1
        new = _next(tried, budget, several)
        for c, costs in zip(new, plain.kl([c * x for c in new]), strict=True):
            tokens = np.concatenate(costs)
            tried[c] = float(np.percentile(tokens, percentile))
            lines.append({"strength": c, "kl": tried[c], "kl_mean": float(tokens.mean()), "evaluation": used})
    table = pd.DataFrame(lines).sort_values("strength", ignore_index=True)
    low, high = _bracket(tried, budget)
    arrived = _arrived(tried, budget)
    strength = low if arrived is None else arrived
    if strength is None or (arrived is None and high is None):
        raise ModelError(_unreachable(x, tried, budget, percentile, used))
    record = {
        "budget": budget, "percentile": percentile, "kl": tried[strength], "strength": strength, "evaluations": used,
        "converged": arrived is not None, "model": plain.lm.name, "revision": plain.lm.revision,
        "prompts_sha256": content_key(prompts=plain.prompts), "new_tokens": max(map(len, plain.answers)),
    }  # fmt: skip
    found = (strength * x).with_calibration(record)
    return Calibrated(strength, tried[strength], budget, percentile, used, arrived is not None, found, table)


def _arrived(tried: dict[float, float], budget: float) -> float | None:
    """The smallest tried strength whose KL is the budget, to within the tolerance."""
    return min((c for c, kl in tried.items() if abs(kl - budget) <= TOLERANCE * budget), default=None)


def _bracket(tried: dict[float, float], budget: float) -> tuple[float | None, float | None]:
    """The first tried strength above the budget and the one tried before it; None where there is no such one."""
    high = min((c for c, kl in tried.items() if kl > budget), default=None)
    return max((c for c in tried if high is None or c < high), default=None), high


def _next(tried: dict[float, float], budget: float, several: bool) -> list[float]:
    """Strengths to try: a ladder, then beyond its end, then inside of the bracket, regula falsi in log strength and KL.

    Small strengths cost KL in proportion to their square, which is a straight line there.
    """
    if not tried:
        return list(LADDER) if several else [1.0]
    low, high = _bracket(tried, budget)
    if low is None or high is None:
        edge = low if high is None else high
        assert edge is not None
        guess = math.sqrt(budget / max(tried[edge], NOISE**2))
        factor = min(max(1.5 * guess, 2), 1e3) if high is None else max(min(guess / 1.5, 0.5), 1e-3)
        reach = (1, 2, 4) if several else (1,)  # further too: where KL levels off, the square promises too much
        return [edge * min(max(factor**power, 1e-6), 1e6) for power in reach]
    below, above = (math.log(max(tried[c], NOISE**2) / budget) for c in (low, high))
    step = math.log(high / low)
    share = -below / (above - below)
    middle = low * math.exp(step * (share if several else min(max(share, 0.1), 0.9)))
    return [math.sqrt(low * middle), middle, math.sqrt(middle * high)] if several else [middle]


def _unreachable(x: Intervention, tried: dict[float, float], budget: float, percentile: float, used: int) -> str:
    weakest, strongest, most = min(tried), max(tried), max(tried.values())
    kind = type(x).__name__
    if most > budget:
        return (
            f"Already {weakest:.3g} times this {kind} costs {tried[weakest]:.3g} nats at percentile {percentile}, more "
            f"than the budget of {budget}, after {used} evaluations. Raise the budget or evaluations, or scale it down."
        )
    return (
        f"This {kind} never reaches the budget of {budget} nats: {most:.3g} at most, up to {strongest:.3g} times as "
        f"strong, after {used} evaluations. Is it zero, or at positions that no answer sees? Try more evaluations, "
        "other layers or positions, a lower budget, or a lower percentile where few tokens change."
    )
