"""Strengths x layers x vectors as one batch: every cell answers the same tuning questions, in one generation.

Choosing happens here, reporting in `evaluate`: the test split is refused, so what is reported was not chosen on it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from workbench.decode import OnToken
from workbench.generate import Generation
from workbench.interventions import Intervention
from workbench.models import LM
from workbench.results import shows_steps
from workbench.runs.heartbeats import heartbeat
from workbench.statistics import paired_difference, wilson
from workbench.tasks import Task

Cell = tuple[dict[str, Any], Intervention | None]


def grid(
    lm: LM,
    task: Task,
    cells: Sequence[Cell],
    *,
    n: int = 48,
    seed: int = 0,
    split: str = "tuning",
    max_new_tokens: int = 256,
    on_token: OnToken | None = None,
) -> pd.DataFrame:
    """Accuracy and share of answers with steps for every cell, on the same n questions.

    Args:
        cells: (labels, intervention) pairs, for example ({"layer": 3, "strength": 1.0}, 1.0 * v.at(layers=[3])).
        on_token: as for `lm.generate`; what it raises stops the grid; no progress is printed then.

    Returns:
        A frame with the labels of each cell, n, accuracy, low, high (Wilson), steps, difference to the plain model
        (paired, Tango's interval), tokens_out (mean).

    Raises:
        ValueError: no cells, or the test split.
    """
    if split == "test":
        raise ValueError(
            "A grid chooses; choosing on the test split would flatter what is reported. Use split='tuning'."
        )
    if not cells:
        raise ValueError("The grid has no cells. Give at least one: [({'strength': 1.0}, 1.0 * x)].")
    rows = task.rows(split, n=n, seed=seed)
    prompts = [lm.render(task.messages(row)) for row in rows]
    runs = [None, *(change for _, change in cells)]  # the plain model first, for the differences
    found = lm.generate(
        prompts * len(runs),
        [change for change in runs for _ in rows],
        max_new_tokens,
        progress=(lambda done, total: heartbeat("grid", done, total)) if on_token is None else None,
        on_token=on_token,
    )
    answers = [found[start : start + n] for start in range(0, len(found), n)]
    right = [[v.correct for v in task.verify_many(rows, [answer.text for answer in each])] for each in answers]
    lines = [
        {**labels, **_line(right[0], right[place], answers[place])} for place, (labels, _) in enumerate(cells, start=1)
    ]
    return pd.DataFrame(lines)


def _line(plain: list[bool], right: list[bool], answers: Sequence[Generation]) -> dict[str, float]:
    n = len(right)
    accuracy, style = wilson(sum(right), n), wilson(sum(shows_steps(answer.text) for answer in answers), n)
    change = paired_difference(plain, right)
    return {
        "n": n,
        "accuracy": accuracy.estimate,
        "low": accuracy.low,
        "high": accuracy.high,
        "steps": style.estimate,
        "steps_low": style.low,
        "steps_high": style.high,
        "difference": change.difference,
        "difference_low": change.low,
        "difference_high": change.high,
        "tokens_out": sum(answer.tokens_out for answer in answers) / n,
    }


def best(table: pd.DataFrame) -> dict[str, Any]:
    """The cell with the highest accuracy; of equals the weakest (by absolute strength), which does the least damage."""
    order = table.assign(size=table.strength.abs() if "strength" in table else 0.0)
    chosen = order.sort_values(["accuracy", "size"], ascending=[False, True], kind="stable").iloc[0]
    plain = {str(name): value for name, value in chosen.drop("size").items()}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in plain.items()}
