"""Recipes in which models take roles: one answers, others review or criticise, one decides or rewrites.

A `Role` is a prompt, and with it another model or an adapter of the same base where wanted: three prompts, three
adapters and three models are the same recipe. `reviewed` is generator, reviewers and adjudicator (GRA, arXiv
2504.12322), `critique` is answer, criticism, rewrite (Self-Refine, arXiv 2303.17651). A small model that cannot follow
a reviewer's instruction can be taught the role: `review_records` makes its training records from verified answers.
What reviewers were worth is in `agreement.review_report`. Not covered: debates of several rounds, and reviewers that
read the steps of an answer one by one.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from workbench.sandbox import SandboxError
from workbench.synthesis.records import Record
from workbench.synthesis.sampling import Attempt, Row, Settings, attempt_of, judged, sampled, spent

if TYPE_CHECKING:
    from workbench.generate import Generation
    from workbench.interventions import Intervention
    from workbench.models import LM
    from workbench.tasks import Task

REVIEW = (
    "Question: {question}\n\nProposed answer: {answer}\n\n"
    "Is every step of the proposed answer right, and its result too? Reply with one word: {options}."
)
Cost = dict[str, int]


@dataclass(frozen=True)
class Role:
    """Who does a part of the work, and what they are told.

    Attributes:
        prompt: text of the user's turn. {question}, {answer}, {critique}, {grades}, {options} are filled in.
        lm: the model; None takes the recipe's.
        adapter: an adapter (or any intervention) for that model, in force for this role alone.
        options: grades from worst to best, for reviewers and adjudicators; the upper half accepts.
        how: 'scored' takes the option that the model finds likeliest as its reply, which works for any model;
            'written' lets it write (greedily) and takes the last option that it names, or no grade.
    """

    prompt: str = REVIEW
    lm: "LM | None" = None
    adapter: "Intervention | None" = None
    options: tuple[str, ...] = ("no", "yes")
    how: Literal["scored", "written"] = "scored"

    def __post_init__(self) -> None:
        clash = any(b.casefold().startswith(a.casefold()) for a, b in permutations(self.options, 2))
        if len(self.options) < 2 or clash or not all(option.strip() == option != "" for option in self.options):
            raise ValueError(
                f"options={self.options!r}: give two or more words, worst first, none the beginning of another, "
                "whatever its case (use 0 to 9, not 1 to 10), without spaces around: ('no', 'yes')."
            )
        if self.how not in ("scored", "written"):
            raise ValueError(f"how={self.how!r} is not known. Use 'scored' or 'written'.")

    def accepts(self, grade: int | None) -> bool:
        """Whether a grade (a place in `options`) is in the upper half; no grade never is."""
        return grade is not None and 2 * grade >= len(self.options)

    def fill(self, **parts: str) -> str:
        """The prompt with its names in braces replaced once; braces inside of what is filled in are left alone.

        >>> Role("{question} {other}").fill(question="What is {answer}?", answer="4")
        'What is {answer}? {other}'
        """
        parts = {"options": " or ".join(reversed(self.options)), **parts}
        return re.sub(r"\{(\w+)\}", lambda found: parts.get(found[1], found[0]), self.prompt)


ANSWERER = Role("{question}")
REVIEWERS = (
    Role(),
    Role(
        "Question: {question}\n\nA student wrote: {answer}\n\n"
        "Work the question out for yourself and compare. Did the student get it right? Reply with one word: {options}."
    ),
    Role(
        "Look for a mistake in this answer.\n\nQuestion: {question}\n\nAnswer: {answer}\n\n"
        "Is the answer free of mistakes? Reply with one word: {options}."
    ),
)
ADJUDICATOR = Role(
    "Reviewers disagree about this answer; their verdicts: {grades}.\n\nQuestion: {question}\n\nAnswer: {answer}\n\n"
    "Decide: is the answer right? Reply with one word: {options}."
)
CRITIC = Role(
    "Question: {question}\n\nDraft answer: {answer}\n\n"
    "Name each mistake of the draft in one sentence, or say that there is none."
)
WRITER = Role(
    "Question: {question}\n\nDraft answer: {answer}\n\nCriticism: {critique}\n\n"
    "Write the answer anew and mend what the criticism is right about. End with: The answer is ..."
)


def reviewed(
    lm: "LM",
    task: "Task",
    rows: list[Row],
    settings: Settings,
    *,
    generator: Role = ANSWERER,
    reviewers: tuple[Role, ...] = REVIEWERS,
    adjudicator: Role | None = ADJUDICATOR,
) -> list[Attempt]:
    """Answers that reviewers accept: all of them, or the adjudicator where they differ (GRA, arXiv 2504.12322).

    The gold answer takes no part in it. A sample holds `grades` (one a reviewer, places in its `options`), its
    `adjudicated` grade where one was needed, and `verified`, what the task's verifier says (None where it can't),
    for `review_report`. Without an adjudicator a disagreement rejects. A scored grade counts one call an option.
    """
    if not reviewers:
        raise ValueError("reviewers is empty: nobody would judge. Give one or more: reviewers=(Role(), ...).")
    attempts = _drafts(lm, task, rows, settings, generator)
    asked = [(attempt, number) for attempt in attempts for number in range(len(attempt["samples"]))]
    for reviewer in reviewers:
        for (attempt, number), (grade, cost) in zip(asked, _grades(lm, reviewer, asked, settings), strict=True):
            attempt["samples"][number]["grades"].append(grade)
            _add(attempt["cost"], cost)
    split = []
    for attempt, number in asked:
        sample = attempt["samples"][number]
        votes = {role.accepts(grade) for role, grade in zip(reviewers, sample["grades"], strict=True)}
        sample["correct"] = votes == {True}
        if len(votes) > 1 and adjudicator is not None:
            said = zip(reviewers, sample["grades"], strict=True)
            sample["said"] = ", ".join("nothing" if g is None else role.options[g] for role, g in said)
            split.append((attempt, number))
    for (attempt, number), (grade, cost) in zip(split, _grades(lm, adjudicator, split, settings), strict=True):
        sample = attempt["samples"][number]
        sample |= {"adjudicated": grade, "correct": adjudicator is not None and adjudicator.accepts(grade)}
        _add(attempt["cost"], cost)
    return attempts


def critique(
    lm: "LM",
    task: "Task",
    rows: list[Row],
    settings: Settings,
    *,
    critic: Role = CRITIC,
    writer: Role = WRITER,
) -> list[Attempt]:
    """Answer, criticise, rewrite; the rewritten answer is judged by the task's verifier (Self-Refine, 2303.17651).

    A sample holds its `draft`, whether that was right already (`draft_correct`) and the `critique`. The critic and the
    writer sample as the settings say, each from a seed of its own.
    """
    attempts = _drafts(lm, task, rows, settings, ANSWERER)
    asked = [(row, attempt, k) for row, attempt in zip(rows, attempts, strict=True) for k in range(settings.samples)]
    parts = [{"question": row["question"], "answer": attempt["samples"][k]["text"]} for row, attempt, k in asked]
    names = [f"{row['id']}/{k}" for row, _, k in asked]
    said = written(lm, critic, [f"{name}/critic" for name in names], parts, settings)
    parts = [{**part, "critique": found.text.strip()} for part, found in zip(parts, said, strict=True)]
    again = written(lm, writer, [f"{name}/writer" for name in names], parts, settings)
    for (row, attempt, k), criticism, new in zip(asked, said, again, strict=True):
        draft = attempt["samples"][k]
        attempt["samples"][k] = judged(task, row, new.text, new.tokens_in, new.tokens_out, new.finished) | {
            "draft": draft["text"], "draft_correct": draft["verified"], "critique": criticism.text.strip(),
        }  # fmt: skip
        _add(attempt["cost"], spent([criticism, new]))
    return attempts


def review_records(attempts: Sequence[Attempt], role: Role | None = None) -> list[Record]:
    """Chat records that teach a role to review: its prompt about each answer, and the right verdict as the reply.

    The verdict is the task's verifier's: the last of `role.options` for a right answer, the first for a wrong one.
    Answers cut off before their end are left out. Give the list to `finetune`; the adapter then goes into a
    `Role(prompt, adapter=...)` with the same prompt and options.
    """
    role = role or REVIEWERS[0]
    records = []
    for attempt in attempts:
        for number, sample in enumerate(attempt["samples"]):
            right = sample.get("verified", sample["correct"])
            if right is None or not sample["finished"]:
                continue
            asked = role.fill(question=attempt["question"], answer=sample["text"])
            records.append({
                "id": f"{attempt['row_id']}/{number}/review", "row_id": attempt["row_id"],
                "messages": [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": role.options[-1 if right else 0]},
                ],
            })  # fmt: skip
    return records


def _drafts(lm: "LM", task: "Task", rows: list[Row], settings: Settings, generator: Role) -> list[Attempt]:
    """Sampled answers that nobody has reviewed; the verifier's verdict is beside them and decides nothing."""
    writer = generator.lm or lm
    prompts = []
    for row in rows:
        *before, last = task.messages(row, settings.strategy)
        prompts.append(writer.render([*before, {**last, "content": generator.fill(question=last["content"])}]))
    attempts = []
    with _acting(writer, generator):
        answers = sampled(writer, rows, prompts, settings)
    for row, prompt, found in zip(rows, prompts, answers, strict=True):
        samples = []
        for answer in found:
            sample = _verified(task, row, answer)
            samples.append(sample | {"correct": False, "by": "reviewers", "verified": sample["correct"], "grades": []})
        attempts.append(attempt_of(row, task, prompt, samples) | {"cost": spent(found)})
    return attempts


def _verified(task: "Task", row: Row, answer: "Generation") -> dict[str, Any]:
    """The verifier's verdict, or none where it can't judge: code without a sandbox, a gold answer in prose."""
    sizes = answer.tokens_in, answer.tokens_out, answer.finished
    try:
        return judged(task, row, answer.text, *sizes)
    except (ValueError, SandboxError):
        names = ("tokens_in", "tokens_out", "finished")
        return {"text": answer.text.strip(), "correct": None, "extracted": None, **dict(zip(names, sizes, strict=True))}


def _grades(
    lm: "LM", role: Role | None, asked: list[tuple[Attempt, int]], settings: Settings
) -> list[tuple[int | None, Cost]]:
    """One grade (a place in the role's options, or None) for each answer, and what it cost."""
    if role is None or not asked:
        return []
    parts = []
    for attempt, number in asked:
        sample = attempt["samples"][number]
        parts.append({"question": attempt["question"], "answer": sample["text"], "grades": sample.pop("said", "")})
    if role.how == "written":
        names = [f"{attempt['row_id']}/{number}/review" for attempt, number in asked]
        texts = written(lm, role, names, parts, replace(settings, temperature=0.0))
        return [(named(role.options, text.text), spent([text])) for text in texts]
    model = role.lm or lm
    prompts = [model.render([{"role": "user", "content": role.fill(**part)}]) for part in parts]
    return [(int(np.argmax(scores)), cost) for scores, cost in option_scores(model, prompts, role, settings.batch_size)]


def option_scores(
    lm: "LM", prompts: Sequence[str], role: Role, batch_size: int | None = None
) -> list[tuple[list[float], Cost]]:
    """Log-probability (nats) of each of the role's options as the reply to each prompt, and the tokens it took.

    An option of several tokens counts as a whole. Every option is a row of its own: a call, and the prompt read again.
    """
    from workbench.divergence import PlainAnswers

    space = "" if lm.tokenizer.chat_template else " "  # a prompt without a template ends in "Answer:"
    starts, ends = [], []
    for prompt in prompts:
        start = lm.encode(prompt)
        for option in role.options:
            whole = lm.encode(f"{prompt}{space}{option}")
            starts.append(start)
            ends.append(whole[len(start) :] if whole[: len(start)] == start else lm.encode(space + option))
    bits = PlainAnswers(lm, starts, ends, batch_size).bits(role.adapter)
    scores = [-float(found.sum() * np.log(2)) for found in bits]
    sizes = [len(start) + len(end) for start, end in zip(starts, ends, strict=True)]
    count = len(role.options)
    return [
        (scores[at : at + count], {"calls": count, "tokens_in": sum(sizes[at : at + count]), "tokens_out": 0})
        for at in range(0, len(scores), count)
    ]


def named(options: Sequence[str], text: str) -> int | None:
    """The place of the option that a text names last, as a word of its own and whatever its case; None if it has none.

    >>> named(("no", "yes"), "Not bad: nobody would say no... but YES."), named(("no", "yes"), "Know nothing")
    (1, None)
    """
    words = "|".join(re.escape(option) for option in sorted(options, key=len, reverse=True))
    found = re.findall(rf"(?<!\w)(?:{words})(?!\w)", text, flags=re.IGNORECASE)
    return [option.casefold() for option in options].index(found[-1].casefold()) if found else None


def written(
    lm: "LM", role: Role, names: list[str], parts: list[dict[str, str]], settings: Settings
) -> "list[Generation]":
    """One text for each, by the role's model; the names give each a seed of its own."""
    model = role.lm or lm
    prompts = [model.render([{"role": "user", "content": role.fill(**part)}]) for part in parts]
    with _acting(model, role):
        found = sampled(model, [{"id": name} for name in names], prompts, replace(settings, samples=1))
    return [texts[0] for texts in found]


@contextmanager
def _acting(lm: "LM", role: Role) -> Iterator[None]:
    """The role's adapter in force for the length of the block."""
    if role.adapter is None:
        yield
        return
    with lm.apply(role.adapter):
        yield


def _add(total: Cost, more: Cost) -> None:
    for name, value in more.items():
        total[name] += value


__all__ = ["critique", "reviewed"]
