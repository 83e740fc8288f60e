"""What a condition holds: changes of the model (summed), at most one prompt strategy, at most one solver."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workbench.evaluation.asking import Greedy, Solver
from workbench.files import content_key, sha256
from workbench.interventions import Adapter, Intervention
from workbench.interventions.session import ACTIVE
from workbench.models import LM
from workbench.prompts import Strategy
from workbench.tasks import Task

Condition = Intervention | Strategy | Solver | Sequence[Intervention | Strategy | Solver]


def planned(task: Task, conditions: Mapping[str, Condition]) -> list["Plan"]:
    """All conditions sorted out; of pairs of sentences, which no text is generated behind, by `solvers.Likelihood`.

    Raises ValueError for no conditions, and for what a condition can't hold or can't answer.
    """
    plans = [Plan.of(name, condition) for name, condition in conditions.items()]
    if not plans:
        raise ValueError('No conditions to evaluate. Give at least one, for example {"plain": []}.')
    if task.kind == "pair":
        from workbench.solvers.likelihood import Likelihood

        plans = [replace(plan, solver=Likelihood()) if isinstance(plan.solver, Greedy) else plan for plan in plans]
        wrong = next((plan for plan in plans if not isinstance(plan.solver, Likelihood)), None)
        if wrong is not None:
            raise ValueError(
                f"Condition {wrong.name!r} answers by {type(wrong.solver).__name__}, and the pairs of sentences of "
                f"task {task.name!r} ask nothing that a text could answer. Give it solvers.Likelihood(), or no solver."
            )
    return plans


@dataclass(frozen=True)
class Plan:
    """A condition sorted out."""

    name: str
    change: Intervention | None
    strategy: Strategy | None
    solver: Solver

    @classmethod
    def of(cls, name: str, condition: Condition) -> "Plan":
        """Raises ValueError where a condition holds something else, or two of what there can be one of."""
        items: list[Any] = list(condition) if isinstance(condition, Sequence) else [condition]
        changes = [item for item in items if isinstance(item, Intervention)]
        strategies = [item for item in items if isinstance(item, Strategy)]
        solvers = [
            item for item in items if not isinstance(item, Intervention | Strategy | type) and isinstance(item, Solver)
        ]
        known = {id(item) for item in (*changes, *strategies, *solvers)}
        wrong = [item for item in items if id(item) not in known]
        if wrong:
            raise ValueError(
                f"Condition {name!r} holds a {type(wrong[0]).__name__}. It may hold interventions (residual, kv, "
                "adapter), one Strategy (how it is asked) and one solver (how it is answered, workbench.solvers); a "
                "vector becomes an intervention by v.at(layers=[3], positions='generated')."
            )
        if len(strategies) > 1:
            raise ValueError(f"Condition {name!r} holds {len(strategies)} prompt strategies: {strategies}. Keep one.")
        if len(solvers) > 1:
            raise ValueError(f"Condition {name!r} holds {len(solvers)} solvers: {solvers}. Keep one.")
        return cls(
            name,
            sum(changes[1:], changes[0]) if changes else None,
            strategies[0] if strategies else None,
            solvers[0] if solvers else Greedy(),
        )


def around(lm: LM) -> list[str]:
    """What an enclosing `lm.apply` puts on the model: a fingerprint a row, none outside of such a block."""
    stack = ACTIVE.get(lm.model)
    return [fingerprint(row) for row in stack[-1].rows] if stack else []


def _settings(part: Adapter) -> str:
    """A hash of what an adapter's settings make of its weights (alpha, rank), wherever its model lies."""
    held = json.loads((part.path / "adapter_config.json").read_text(encoding="utf-8"))
    held = {name: value for name, value in held.items() if name not in ("base_model_name_or_path", "revision")}
    # peft writes sets as lists, in any order
    return content_key(**{name: sorted(map(str, v)) if isinstance(v, list) else v for name, v in held.items()})


def fingerprint(change: Intervention | None) -> str:
    """A hash of what an intervention does: its numbers, and for adapters the weights that their path leads to."""
    if change is None:
        return "none"
    hashes = []
    for part in change.parts:
        if isinstance(part, Adapter):
            hashes.append(f"{part.strength}/{sha256(part.path / 'adapter_model.safetensors')}/{_settings(part)}")
        else:
            with tempfile.TemporaryDirectory() as folder:
                bare = replace(part)  # type: ignore[type-var]  # leaves the record of a calibration behind
                hashes.append(sha256(bare.save(Path(folder) / "part.safetensors")))
    return "+".join(hashes)
