"""Recipes, one function each: how a model is asked for the answers that become training records.

A recipe is a function `(lm, task, rows, settings) -> list[Attempt]`, one attempt a question, in the order of `rows`.
Keyword arguments beyond these four are its own, set by `functools.partial(recipe, name=value)`; `synthesize` writes
them into the card. Sampling and judging are in `sampling`, the choice among samples in `selection`.
"""

from typing import TYPE_CHECKING

from workbench.results import shows_steps
from workbench.synthesis.sampling import Attempt, Row, Settings, answered, attempt_of, judged, tokens_of
from workbench.synthesis.selection import usable

if TYPE_CHECKING:
    from workbench.models import LM
    from workbench.tasks import Task

__all__ = ["oracle", "rejection", "star", "student_paced"]

HINT = "(The answer is {answer}. Show the steps that lead to it.)"


def rejection(lm: "LM", task: "Task", rows: list[Row], settings: Settings) -> list[Attempt]:
    """Answer every question `settings.samples` times under the strategy, each answer judged by the task's verifier.

    Rejection sampling (Yuan et al. 2023, arXiv 2308.01825). The record will hold the *plain* question, so fine-tuning
    on it moves what the strategy's prompt did into the weights (context distillation, arXiv 2112.00861).
    """
    prompts = [lm.render(task.messages(row, settings.strategy)) for row in rows]
    return answered(lm, task, rows, prompts, settings)


def star(lm: "LM", task: "Task", rows: list[Row], settings: Settings) -> list[Attempt]:
    """As `rejection`; where no answer is verified, as many tries more whose prompt ends in the right answer.

    Rationalisation of STaR (Zelikman et al. 2022, arXiv 2203.14465). Only the final answer is verified, so a hinted
    chain may reach it by a wrong step more often than another. An answer to such a prompt is used only if it shows
    steps: else it repeats what it was told.
    """
    attempts = rejection(lm, task, rows, settings)
    failed = [number for number, attempt in enumerate(attempts) if not any(map(usable, attempt["samples"]))]
    asked = [rows[number] for number in failed]
    prompts = []
    for row in asked:
        *before, question = task.messages(row, settings.strategy)
        hinted = f"{question['content']}\n{HINT.format(answer=row['answer'])}"
        prompts.append(lm.render([*before, {**question, "content": hinted}]))
    again = answered(lm, task, asked, prompts, settings, first=settings.samples) if asked else []
    for number, hinted_attempt in zip(failed, again, strict=True):
        hinted_samples = [
            sample | {"hinted": True, "echo": not shows_steps(sample["text"])} for sample in hinted_attempt["samples"]
        ]
        attempts[number]["samples"] += hinted_samples
        attempts[number]["cost"] = {
            name: n + hinted_attempt["cost"][name] for name, n in attempts[number]["cost"].items()
        }
        if any(map(usable, hinted_samples)):
            attempts[number]["prompt"] = hinted_attempt["prompt"]
    return attempts


def oracle(lm: "LM", task: "Task", rows: list[Row], settings: Settings) -> list[Attempt]:
    """The task's own worked solution in `settings.style`, or its one rationale; the model only counts the tokens."""
    attempts = []
    for row in rows:
        text = row.get("solutions", {}).get(settings.style) or row.get("solution")
        if not text:
            styles = ", ".join(row.get("solutions", {})) or "none"
            raise ValueError(
                f"Question {row['id']} of task {task.name} has no worked solution in style {settings.style!r}; "
                f"its styles are: {styles}. Pass style=... with one of them, or use recipe='rejection'."
            )
        prompt = lm.render(task.messages(row, None))
        tokens_in, tokens_out = len(lm.encode(prompt)), tokens_of(lm, text)
        attempts.append(attempt_of(row, task, prompt, [judged(task, row, text, tokens_in, tokens_out, True)]))
    return attempts


def student_paced(
    lm: "LM", task: "Task", rows: list[Row], settings: Settings, *, teacher: "LM", plausible: float = 0.05
) -> list[Attempt]:
    """As `rejection`, written by `teacher`, but only in tokens that the student `lm` finds plausible at that place.

    A token is ruled out when the student gives it less than `plausible` times its own likeliest token's probability;
    the teacher then chooses among the rest. In arXiv 2509.22230 (reverse speculative decoding) the student's own token
    takes the place of an improbable one, and the bound is an absolute probability. Both models read the strategy's
    prompt and must share a vocabulary.
    """
    from workbench.interventions import Logits

    # Strength 0 would be no intervention at all; this much of the student moves logits by less than rounding.
    barred = Logits(expert=lm, strength=1e-6, plausible=plausible)
    prompts = [lm.render(task.messages(row, settings.strategy)) for row in rows]
    return answered(teacher, task, rows, prompts, settings, interventions=barred)
