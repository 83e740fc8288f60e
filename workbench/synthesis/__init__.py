"""Make training records with a checker in the loop: answer, verify, select, remove repeats and leaks, keep provenance.

A recipe is a function `(lm, task, rows, settings) -> list[Attempt]`, one attempt a question:

* `rejection`: the model answers each question several times under a prompt strategy and only verified answers survive
  (rejection sampling, Yuan et al. 2023, arXiv 2308.01825). The record holds the *plain* question, so fine-tuning on it
  moves what the strategy's prompt did into the weights (context distillation, Askell et al. 2021, arXiv 2112.00861).
* `star`: rejection sampling, and a second try with the right answer given away for questions that it left without a
  verified one (rationalisation of STaR, Zelikman et al. 2022, arXiv 2203.14465). Only the final answer is verified, so
  a hinted chain may reach it by a wrong step more often than one without a hint.
* `oracle`: the task's own worked solution.

Work is saved a chunk of questions at a time. A killed run goes on from its last chunk and ends in the same bytes;
times, which never repeat, are in the card and not in the records. Selection happens after sampling, so changing
`select` or the filters of a finished folder costs no model call. Not covered: answers that no verifier can judge.
"""

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from workbench.files import content_key, write_atomic
from workbench.results import shows_steps
from workbench.runs import heartbeat
from workbench.synthesis.card import make_card, write_records
from workbench.synthesis.records import Data, claim_folder, load_data
from workbench.synthesis.selection import Attempt, Select, drop_leaks, drop_repeats, make_record, selected, usable

if TYPE_CHECKING:
    from workbench.models import LM
    from workbench.prompts import Strategy
    from workbench.tasks import Task

Row = dict[str, Any]


HINT = "(The answer is {answer}. Show the steps that lead to it.)"


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


def synthesize(
    lm: "LM",
    task: "Task",
    recipe: Literal["rejection", "star", "oracle"] | Recipe = "rejection",
    n: int = 500,
    seed: int = 0,
    *,
    out: str | Path,
    split: str = "train",
    select: Select = "shortest",
    threshold: float = 0.8,
    max_overlap: float = 0.05,
    chunk_size: int = 50,
    file_format: Literal["jsonl", "parquet"] = "jsonl",
    strategy: "Strategy | None" = None,
    evaluation: "Task | None" = None,
    **settings: Any,
) -> Data:
    """Records for `n` questions of `task`, written to the folder `out` with a card; a second call resumes or reloads.

    `n` counts questions asked: `data.kept` is shorter, and `data.card["counts"]` says why. Further settings are the
    fields of `Settings`: `samples`, `temperature`, `top_p`, `max_new_tokens`, `style` (oracle), `batch_size`.
    `threshold` is the similarity from which a record counts as a repeat, `max_overlap` the share of verified records
    that may overlap with the test questions of `evaluation` (default: `task`) before the set is refused (`overlap`).

    Raises `ValueError` for settings that can't work, a folder that holds another run, and a leaking set.
    """
    chosen = Settings(strategy=strategy, seed=seed, **_known(settings))
    _check(recipe, n, chosen, select, max_overlap, file_format)
    make = {"rejection": rejection, "star": star, "oracle": oracle}[recipe] if isinstance(recipe, str) else recipe
    out, exam = Path(out), evaluation or task
    rows = task.rows(split=split, n=n, seed=seed)
    sampling = _sampling(make, lm, task, rows, chosen) | {"split": split, "chunk_size": chunk_size}
    finishing = {"select": select, "threshold": threshold, "max_overlap": max_overlap, "evaluation": exam.name}
    key = content_key(sampling=sampling, finishing=finishing | {"file_format": file_format})
    if not _finished(out, key):
        claim_folder(out, sampling, "synthesize")
        attempts, cost = _sample(make, lm, task, rows, chosen, chunk_size, out)
        records = [make_record(choice, sampling, task.name) for choice in selected(attempts, select, seed)]
        shared = drop_leaks(records, attempts, exam, max_overlap)
        drop_repeats(records, attempts, threshold)
        file = write_records(out, records, file_format)
        make_card(out, file, records, key=key, sampling=sampling, finishing=finishing, cost=cost, overlap=shared)
    return load_data(out)


def _sampling(make: Recipe, lm: "LM", task: "Task", rows: list[Row], settings: Settings) -> dict[str, Any]:
    """What the sampled text depends on, as plain JSON values."""
    values = {
        "recipe": make.__name__, "task": task.name, "model": {"name": lm.name, "revision": lm.revision},
        "questions": content_key(questions=[[row["id"], row["question"]] for row in rows]), "n": len(rows),
        **asdict(settings),
    }  # fmt: skip
    values.pop("batch_size")  # rows are independent of the batch around them, so it may change between two starts
    return json.loads(json.dumps(values))


def _known(settings: dict[str, Any]) -> dict[str, Any]:
    names = [name for name in Settings.__dataclass_fields__ if name not in ("strategy", "seed")]
    unknown = ", ".join(sorted(settings.keys() - set(names)))
    if unknown:
        raise ValueError(f"synthesize() got the unknown setting {unknown}. Settings are: {', '.join(names)}.")
    return settings


def _check(recipe: str | Recipe, n: int, settings: Settings, select: str, limit: float, file_format: str) -> None:
    choices: list[tuple[str, str | Recipe, tuple[str, ...]]] = [
        ("recipe", recipe, ("rejection", "star", "oracle")),
        ("select", select, get_args(Select)),
        ("file_format", file_format, ("jsonl", "parquet")),
    ]
    for name, value, allowed in choices:
        if isinstance(value, str) and value not in allowed:
            raise ValueError(f"{name}={value!r} is not known. Choose one of {', '.join(allowed)}.")
    for name, number in {"n": n, "samples": settings.samples, "max_new_tokens": settings.max_new_tokens}.items():
        if number < 1:
            raise ValueError(f"{name}={number} is too small: give 1 or more.")
    if not 0 <= limit <= 1:
        raise ValueError(f"max_overlap={limit} is no share: give a number from 0 to 1, such as 0.05.")
    if recipe in ("rejection", "star") and settings.temperature == 0 and settings.samples > 1:
        raise ValueError(
            f"samples={settings.samples} with temperature=0 gives {settings.samples} equal answers a question. "
            "Pass samples=1, or a temperature such as 0.8."
        )


def _finished(out: Path, key: str) -> bool:
    card = out / "card.json"
    return card.exists() and json.loads(card.read_text(encoding="utf-8"))["key"] == key


def rejection(lm: "LM", task: "Task", rows: list[Row], settings: Settings) -> list[Attempt]:
    """Answer every question `settings.samples` times under the strategy, each answer judged by the task's verifier."""
    prompts = [lm.render(task.messages(row, settings.strategy)) for row in rows]
    return _answered(lm, task, rows, prompts, settings)


def star(lm: "LM", task: "Task", rows: list[Row], settings: Settings) -> list[Attempt]:
    """As `rejection`; where no answer is verified, as many tries more whose prompt ends in the right answer.

    An answer to such a prompt is used only if it shows steps: else it repeats what it was told.
    """
    attempts = rejection(lm, task, rows, settings)
    failed = [number for number, attempt in enumerate(attempts) if not any(map(usable, attempt["samples"]))]
    asked = [rows[number] for number in failed]
    prompts = []
    for row in asked:
        *before, question = task.messages(row, settings.strategy)
        hinted = f"{question['content']}\n{HINT.format(answer=row['answer'])}"
        prompts.append(lm.render([*before, {**question, "content": hinted}]))
    again = _answered(lm, task, asked, prompts, settings, first=settings.samples) if asked else []
    for number, hinted_attempt in zip(failed, again, strict=True):
        hinted_samples = [
            sample | {"hinted": True, "echo": not shows_steps(sample["text"])} for sample in hinted_attempt["samples"]
        ]
        attempts[number]["samples"] += hinted_samples
        if any(map(usable, hinted_samples)):
            attempts[number]["prompt"] = hinted_attempt["prompt"]
    return attempts


def _answered(
    lm: "LM", task: "Task", rows: list[Row], prompts: list[str], settings: Settings, first: int = 0
) -> list[Attempt]:
    """Sampled and judged answers to these prompts; `first` numbers the samples, so that no two share a seed."""
    repeated = [prompt for prompt in prompts for _ in range(settings.samples)]
    seeds = [_row_seed(settings.seed, str(row["id"]), first + k) for row in rows for k in range(settings.samples)]
    generations = lm.generate(
        repeated,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=seeds,
        batch_size=settings.batch_size,
    )
    attempts = []
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        answers = generations[number * settings.samples : (number + 1) * settings.samples]
        samples = [_sampled(task, row, g.text, g.tokens_in, g.tokens_out, g.finished) for g in answers]
        attempts.append(_attempt(row, task, prompt, samples))
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
        tokens_in, tokens_out = len(lm.encode(prompt)), len(lm.encode(text))
        attempts.append(_attempt(row, task, prompt, [_sampled(task, row, text, tokens_in, tokens_out, True)]))
    return attempts


def _attempt(row: Row, task: "Task", prompt: str, samples: list[dict[str, Any]]) -> Attempt:
    plain = task.messages(row, None)
    return {
        "row_id": str(row["id"]), "question": row["question"], "answer": row["answer"],
        "plain": plain, "prompt": prompt, "samples": samples,
    }  # fmt: skip


def _sampled(task: "Task", row: Row, text: str, tokens_in: int, tokens_out: int, finished: bool) -> dict[str, Any]:
    verdict = task.verify(row, text)
    return {
        "text": text.strip(), "correct": verdict.correct, "extracted": verdict.extracted,
        "tokens_in": tokens_in, "tokens_out": tokens_out, "finished": finished,
    }  # fmt: skip


def _row_seed(seed: int, row_id: str, sample: int) -> int:
    """A seed of its own for every sample, so that no answer depends on the batch or the chunk that it was made in."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{row_id}/{sample}".encode()).digest()[:6], "big")


def _sample(
    make: Recipe, lm: "LM", task: "Task", rows: list[Row], settings: Settings, chunk_size: int, out: Path
) -> tuple[list[Attempt], dict[str, float]]:
    """Attempts for all rows: chunks on disk are read, missing or damaged ones are made and saved."""
    attempts: list[Attempt] = []
    cost: Counter[str] = Counter()
    for start in range(0, len(rows), chunk_size):
        part = rows[start : start + chunk_size]
        file = out / "chunks" / f"{start // chunk_size:05d}.json"
        saved = _read_chunk(file, part)
        if saved is None:
            begin = time.perf_counter()
            made = make(lm, task, part, settings)
            samples = [sample for attempt in made for sample in attempt["samples"]]
            spent = {"seconds": time.perf_counter() - begin, "calls": len(samples) if make is not oracle else 0}
            spent |= {name: sum(sample[name] for sample in samples) for name in ("tokens_in", "tokens_out")}
            saved = {"attempts": made, "cost": spent}
            write_atomic(file, json.dumps(saved, ensure_ascii=False))
            heartbeat("synthesize", start + len(part), len(rows), seconds=round(spent["seconds"], 2))
        attempts += saved["attempts"]
        cost.update(saved["cost"])
    return attempts, dict(cost)


def _read_chunk(file: Path, rows: list[Row]) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        same = [attempt["row_id"] for attempt in saved["attempts"]] == [str(row["id"]) for row in rows]
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        print(f"{file} is damaged; its {len(rows)} questions are answered again.", file=sys.stderr)
    return saved if same else None
