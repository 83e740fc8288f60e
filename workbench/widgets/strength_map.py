"""The strength map of a playground: accuracy by strength at one layer and span, as a table and a still picture.

Measured on tuning questions, since it is there to choose by. Leans on `grid` and `plots.strength_curve`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import pandas as pd

from workbench.grid import grid
from workbench.interventions import Intervention
from workbench.models import LM, ModelError
from workbench.tasks import Task
from workbench.widgets.wishes import Wish, changed, title

BEAT = 0.2  # seconds between words on how far it is
__all__ = ["StrengthMap", "measure"]


@dataclass(frozen=True, eq=False)
class StrengthMap:
    """table: as `grid` gives it. picture: SVG. words: the sweet spot and the breakdown."""

    table: pd.DataFrame
    picture: str
    words: str


def measure(
    lm: LM,
    task: Task | None,
    interventions: Mapping[str, Intervention | None],
    wish: Wish,
    strengths: Sequence[float],
    n: int,
    check: Callable[[], None],
    tell: Callable[[str], None],
) -> StrengthMap:
    """Let every strength, 0 too, answer the same n tuning questions; `check` may stop it after any token."""
    from workbench.plots import strength_curve
    from workbench.report.svg import alt_text, figure_to_svg

    if task is None:
        raise ModelError("A strength map needs questions: wb.playground(lm, interventions, task=wb.load_task(...)).")
    doses = [0.0, *(each for each in strengths if each)]
    cells = [({"strength": dose}, changed(replace(wish, strength=dose), interventions)) for dose in doses]
    where, told, steps = title(replace(wish, strength=1.0), cells[0][1]), perf_counter(), 0
    tell(f"strength map of {where}: {len(cells)} strengths × {n} questions")

    def heard(_: dict[int, list[int]]) -> None:
        nonlocal told, steps
        check()
        steps += 1
        if perf_counter() - told > BEAT:
            told = perf_counter()
            tell(f"strength map of {where}: {len(cells)} strengths × {n} questions, token {steps}")

    table = grid(lm, task, cells, n=n, seed=wish.seed, max_new_tokens=wish.max_new_tokens, on_token=heard)
    table = table.assign(condition=wish.name)
    figure = strength_curve(table)
    figure.update_layout(title={"text": f"What strength does: {where}"}, height=340)
    return StrengthMap(table, figure_to_svg(figure), alt_text(figure).partition("by strength. ")[2])
