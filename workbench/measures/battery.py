"""Every change of the questions at once: a row a condition and change, with its keep-rate or adapt-rate.

Leans on `robustness` and `perturbations`; the changed questions go through `evaluate` like any others.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from workbench.evaluation import Condition, evaluate
from workbench.measures.perturbations import change_number, change_quantifier, paraphrase, rename
from workbench.measures.robustness import Change, adapt_rate, keep_rate, perturbed
from workbench.models import LM
from workbench.tasks import Task

__all__ = ["CHANGES", "robustness_table"]

CHANGES: tuple[Change, ...] = (paraphrase, rename, change_number, change_quantifier)
COLUMNS = ["condition", "perturbation", "rate", "low", "high", "n", "questions", "accuracy_before", "accuracy_after"]


def robustness_table(
    lm: LM,
    task: Task,
    conditions: Mapping[str, Condition],
    before: pd.DataFrame,
    *,
    n: int,
    seed: int = 0,
    changes: Sequence[Change] = CHANGES,
    max_new_tokens: int = 256,
    out: Path | None = None,
) -> pd.DataFrame:
    """Keep-rates of changes that leave the gold answer and adapt-rates of those that change it.

    Args:
        before: rows of `evaluate(lm, task, ...)` with the same conditions and seed, and at least n questions.
        n: questions to change; those that a change can't be made to are left out.

    Returns:
        condition, perturbation, rate with low and high, n (changed questions that were right before), questions,
        accuracy_before, accuracy_after. Conditions that had nothing right, and changes that no question of the task
        can have, are left out: an empty table says that there was nothing to keep.

    Raises:
        ValueError: a condition without rows before.
    """
    missing = [name for name in conditions if name not in set(before.condition)]
    if missing:
        known = ", ".join(dict.fromkeys(before.condition))
        raise ValueError(
            f"Condition {missing[0]!r} is not among the rows before (they have: {known}). Evaluate the same conditions "
            "on the unchanged task first."
        )
    lines: list[pd.DataFrame] = []
    for change in changes:
        name = getattr(change, "__name__", "changed")
        other = perturbed(task, change, seed=seed)
        try:
            other.rows("test", n=n, seed=seed)
        except ValueError:  # no question of this task has such a change
            continue
        folder = None if out is None else out / name
        found = evaluate(lm, other, conditions, n=n, seed=seed, max_new_tokens=max_new_tokens, out=folder)
        for condition, after in found.rows.groupby("condition", sort=False):
            own = before[(before.condition == condition) & before.id.isin(after.id)]
            moved = own.set_index("id").answer.astype(str) != after.set_index("id").answer.astype(str).loc[own.id]
            rate = adapt_rate if moved.any() else keep_rate
            asked = own[moved.to_numpy()] if moved.any() else own
            if asked.correct.any():
                lines.append(rate(own, after).assign(perturbation=name.replace("_", " ")))
    return pd.concat(lines, ignore_index=True)[COLUMNS] if lines else pd.DataFrame(columns=COLUMNS)
