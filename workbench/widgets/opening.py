"""`wb.playground`: its arguments checked, its dials and questions put together."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from workbench.interventions import Intervention
from workbench.models import LM
from workbench.tasks import Task
from workbench.token_readings import MEASURES
from workbench.widgets.controls import Controls
from workbench.widgets.playing import Playground
from workbench.widgets.wishes import Wish

EXAMPLES = 8  # tuning questions in the list


def playground(
    lm: LM,
    interventions: Mapping[str, Intervention | None],
    *,
    task: Task | None = None,
    prompts: Sequence[str] | None = None,
    out: str | Path | None = None,
    strengths: Sequence[float] | None = None,
    n: int = 24,
    max_new_tokens: int = 128,
    seed: int = 0,
    by: str = "kl",
) -> Playground:
    """A panel with dials for one intervention at a time; the last line of a cell shows it.

    interventions: by name; None stands for the plain model. prompts: questions to choose from, asked as chat; some
    tuning questions of a task come behind them. out: folder for saved conditions. strengths: of the strength map, which
    asks `n` tuning questions; None: 0 to 6 for what is added to states and caches, 0 to 2 for the rest. by: the
    measure that colours tokens, one of `token_readings.MEASURES` or "none". Raises ModelError for an intervention that
    does not fit the model, ValueError for none, or without any prompt.
    """
    if not interventions:
        raise ValueError("There is nothing to play with. Give at least one: wb.playground(lm, {'steps': vector}).")
    for x in interventions.values():
        if x is not None:
            x.check(lm)
    if by not in (*MEASURES, "none"):
        raise ValueError(f"by={by!r}: tokens can be coloured by {', '.join(MEASURES)} or none.")
    if strengths is not None and not max(strengths, default=0.0) > 0:
        raise ValueError(f"strengths={list(strengths)}: at least one above 0 is needed, such as [0.5, 1, 2].")
    rows = task.rows("tuning", n=EXAMPLES, seed=seed) if task is not None else []
    examples = dict.fromkeys(prompts or ()) | {row["question"]: row for row in rows}
    if not examples:
        raise ValueError("There is no prompt. Give prompts=['...'] or task=wb.load_task('word-problems').")
    first = Wish(next(iter(interventions)), next(iter(examples)), max_new_tokens=max_new_tokens, seed=seed)
    controls = Controls(lm, interventions, list(examples), strengths, first)
    return Playground(lm, interventions, task, examples, Path(out) if out is not None else None, controls, by, n)
