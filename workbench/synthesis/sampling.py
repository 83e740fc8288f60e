"""What every recipe shares: ask a model many times, let the task judge each answer, note what it cost.

A sample's seed is made from the question's id and the sample's number alone, so no answer depends on the batch, the
chunk or the run that it was made in. Which questions are asked, and in which words, is a recipe's matter (`recipes`).
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.generate import Generation
    from workbench.models import LM
    from workbench.prompts import Strategy
    from workbench.tasks import Task

NOTHING = "(no answer)"  # in a record that is there to say why; a record without an answer can't be read back
Row = dict[str, Any]
Attempt = dict[str, Any]  # row_id, question, answer, plain, prompt, samples: [{text, correct, extracted, ...}], cost


@dataclass(frozen=True)
class Settings:
    """How a recipe answers: everything that the sampled text depends on, besides the model and the questions."""

    strategy: "Strategy | None" = None
    samples: int = 4
    temperature: float = 0.8
    top_p: float = 1.0
    max_new_tokens: int = 256
    style: str = "steps"
    seed: int = 0
    batch_size: int | None = None


Recipe = Callable[["LM", "Task", list[Row], Settings], list[Attempt]]
Edit = Callable[..., list[Attempt]]  # (lm, task, attempts, settings) -> attempts


def answered(
    lm: "LM", task: "Task", rows: list[Row], prompts: list[str], settings: Settings, first: int = 0, **change: Any
) -> list[Attempt]:
    """Sampled and judged answers to these prompts; `first` numbers the samples, so that no two share a seed.

    `change` goes to `lm.generate` (interventions).
    """
    attempts = []
    for row, prompt, found in zip(rows, prompts, sampled(lm, rows, prompts, settings, first, **change), strict=True):
        samples = [judged(task, row, g.text, g.tokens_in, g.tokens_out, g.finished) for g in found]
        attempts.append(attempt_of(row, task, prompt, samples) | {"cost": spent(found)})
    return attempts


def sampled(
    lm: "LM", rows: list[Row], prompts: list[str], settings: Settings, first: int = 0, **change: Any
) -> "list[list[Generation]]":
    """`settings.samples` texts for each prompt; rows give the ids that the seeds are made from."""
    count = settings.samples
    generations = lm.generate(
        [prompt for prompt in prompts for _ in range(count)],
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=[row_seed(settings.seed, str(row["id"]), first + k) for row in rows for k in range(count)],
        batch_size=settings.batch_size,
        **change,
    )
    return [generations[start : start + count] for start in range(0, len(generations), count)]


def spent(generations: "Iterable[Generation]") -> dict[str, int]:
    """What an attempt's `cost` holds: model calls, tokens read and tokens written."""
    found = list(generations)
    return {
        "calls": len(found),
        "tokens_in": sum(g.tokens_in for g in found),
        "tokens_out": sum(g.tokens_out for g in found),
    }


def attempt_of(row: Row, task: "Task", prompt: str, samples: list[dict[str, Any]]) -> Attempt:
    """One question with its sampled answers, ready to be saved as JSON."""
    return {
        "row_id": str(row["id"]), "question": row["question"], "answer": row["answer"],
        "plain": task.messages(row, None), "prompt": prompt, "samples": samples,
        "row": {name: row[name] for name in ("metadata", "options") if name in row},
    }  # fmt: skip


def row_of(attempt: Attempt) -> Row:
    """The task's row again, as far as its verifier reads it."""
    return {"id": attempt["row_id"], "question": attempt["question"], "answer": attempt["answer"], **attempt["row"]}


def judged(task: "Task", row: Row, text: str, tokens_in: int, tokens_out: int, finished: bool) -> dict[str, Any]:
    """One sampled answer with the verdict of the task's verifier."""
    verdict = task.verify(row, text)
    return {
        "text": text.strip(), "correct": verdict.correct, "extracted": verdict.extracted,
        "tokens_in": tokens_in, "tokens_out": tokens_out, "finished": finished,
    }  # fmt: skip


def tokens_of(lm: "LM", text: str) -> int:
    """Tokens of an answer and the one that ends it, which a sampled answer counts too."""
    return len(lm.encode(text)) + 1


def row_seed(seed: int, row_id: str, sample: int) -> int:
    """A seed of its own for every sample, so that no answer depends on the batch or the chunk that it was made in."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{row_id}/{sample}".encode()).digest()[:6], "big")
