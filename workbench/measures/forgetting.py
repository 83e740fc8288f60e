"""What was lost elsewhere: other tasks before and after a change of the model, corrected over the tasks.

Does not cover: several stages of training (`workbench.finetuning.stages`, which compares with the best point before).
"""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from workbench.results import Results
from workbench.statistics import holm, minimum_detectable_effect, wilson


def forgetting_table(
    results: Mapping[str, Results], before: str | None = None, after: str | None = None, *, level: float = 0.95
) -> pd.DataFrame:
    """One row a task: accuracy before and after, and their paired difference; below 0 is forgotten.

    Args:
        results: task name -> an evaluation of both conditions.
        before, after: the conditions; None for the first and the last of each evaluation.

    Returns:
        task, n, before, after (Wilson limits in _low, _high), difference, low, high (named so that `plots.forest`
        takes the lines), p_value, p_holm (over the tasks), detectable (the smallest difference that n would have shown
        with 80 % power).

    Raises:
        ValueError: nothing to compare, or an evaluation without one of the conditions.
    """
    if not results:
        raise ValueError("No tasks to compare. Give {name: evaluate(lm, load_task(name), ...)} with at least one.")
    lines = []
    for task, found in results.items():
        first, last = before or found.conditions[0], after or found.conditions[-1]
        if first == last:
            raise ValueError(f"Task {task!r}: before and after are both {first!r}. Evaluate two conditions.")
        change = found.compare(first, last, level)
        line: dict[str, Any] = {"task": task, "n": change.n}
        for key, name in (("before", first), ("after", last)):
            right = found.correct(name)
            share = wilson(int(right.sum()), len(right), level)
            line |= {key: share.estimate, f"{key}_low": share.low, f"{key}_high": share.high}
        line |= {"difference": change.difference, "low": change.low, "high": change.high, "p_value": change.p_value}
        seen = max(change.discordant, 1) / change.n
        lines.append(line | {"detectable": minimum_detectable_effect(change.n, discordant_rate=seen)})
    return pd.DataFrame(lines).assign(p_holm=holm([line["p_value"] for line in lines]))
