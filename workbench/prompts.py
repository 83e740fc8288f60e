"""How a question is put to a model: alone, with an instruction, after worked examples; and the pairs for steering.

A `Strategy` is one of the things that a condition of `evaluate` may hold. `contrast` makes prompts that differ only in
how their examples are answered (contrastive in-context pairs, as in arXiv 2507.08799) and end in the same tokens.
"""

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from workbench.lab.corpus import SYSTEM, chat

if TYPE_CHECKING:
    from workbench.models import LM
    from workbench.tasks import Task

STYLES = ("direct", "steps", "long", "program")
INSTRUCTIONS = {**SYSTEM, "program": "Write a Python program that prints the answer."}
SHORT = {
    "number": "Answer with the number only.",
    "option": "Answer with the letter of the option only.",
    "latex": r"Answer with the result only, as \boxed{...}.",
    "list": "Answer with the list only.",
    "text": "Answer with the answer alone, without an explanation.",
    "code": "Answer with the code only.",
}
Message = dict[str, str]
Row = dict[str, Any]


@dataclass(frozen=True)
class Strategy:
    """A way to prompt: an instruction in the system turn, and `shots` examples answered in `style`.

    Attributes:
        name: shown in tables.
        system: text of the system turn, or None for no such turn.
        shots: number of worked examples before the question; drawn from the tuning split, the same for a row each time.
        style: 'direct', 'steps', 'long' or 'program' (`synthesis.programs`): which worked solution the examples show.
        suffix: a paragraph behind the question in the user's turn, for templates that have no system turn.
    """

    name: str = "plain"
    system: str | None = None
    shots: int = 0
    style: str = "direct"
    suffix: str = ""

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"style={self.style!r} is not a style. Use one of: {', '.join(STYLES)}.")
        if not 0 <= self.shots <= 64:
            raise ValueError(f"shots={self.shots} is out of range. Use 0 to 64 examples.")


def few_shot(style: str = "steps", shots: int = 3) -> Strategy:
    """Examples answered in a style, with no instruction."""
    return Strategy(name=f"{shots} shots, {style}", shots=shots, style=style)


def instruction(style: str = "steps") -> Strategy:
    """The style asked for in words, in the system turn ('Show your steps.')."""
    return Strategy(name=f"told: {style}", system=INSTRUCTIONS[style], style=style)


def zero_shot(wording: str = "Let's think step by step.") -> Strategy:
    """Zero-shot chain of thought: the wording behind the question, no examples (Kojima et al., arXiv 2205.11916).

    The paper writes it as the beginning of the answer and asks a second time for the number; here it stands in the
    user's turn, where a chat template has room for it, and the answer is read by the task's verifier.
    """
    return Strategy(name="zero-shot steps", suffix=wording, style="steps")


def short_answer(kind: str = "number", wording: str | None = None) -> Strategy:
    """The answer alone is asked for; `kind` is the task's (`task.kind`), `wording` another way to say it.

    >>> short_answer("option").suffix
    'Answer with the letter of the option only.'
    """
    if wording is None and kind not in SHORT:
        raise ValueError(f"kind={kind!r} has no wording for a short answer. Kinds: {', '.join(SHORT)}; or wording=.")
    return Strategy(name="short answer", suffix=wording if wording is not None else SHORT[kind])


def messages(task: "Task", row: dict[str, Any], strategy: Strategy | None = None) -> list[Message]:
    """Chat messages that put one row's question; they end in the user's turn.

    Raises:
        ValueError: the task has no worked solutions in the style that the examples should show.
    """
    strategy = strategy or Strategy()
    turns: list[Message] = [{"role": "system", "content": strategy.system}] if strategy.system else []
    if strategy.shots:
        for example in examples_for(task, row, strategy.shots):
            turns += _exchange(task, example, strategy.style)
    asked = f"{row['question']}\n\n{strategy.suffix}" if strategy.suffix else row["question"]
    return [*turns, {"role": "user", "content": asked}]


def _exchange(task: "Task", row: dict[str, Any], style: str) -> list[Message]:
    solutions = row.get("solutions") or {}
    if style == "direct" and "direct" not in solutions and "entry_point" not in row:  # code is no short answer
        solutions = solutions | {"direct": f"The answer is {row['answer']}."}
    if style not in solutions:
        raise ValueError(
            f"Task {task.name} has no worked solution in style {style!r} (it has: {', '.join(solutions) or 'none'}). "
            "Use a style that it has, or a strategy without examples: Strategy(system='Show your steps.')."
        )
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": solutions[style]}]


def examples_for(task: "Task", row: dict[str, Any], shots: int) -> list[dict[str, Any]]:
    """Examples for a row: from the tuning split, never the row itself, picked by a hash so that order is no matter."""
    pool = [example for example in task.examples if example["question"] != row["question"]]
    if len(pool) < shots:
        raise ValueError(f"Task {task.name} has {len(pool)} rows to draw examples from, {shots} are asked for.")
    rank = {c["id"]: hashlib.sha256(f"{row['id']}/{c['id']}".encode()).digest() for c in pool}
    return sorted(pool, key=lambda candidate: rank[candidate["id"]])[:shots]


@dataclass(frozen=True)
class Pairs:
    """Contrastive prompts: `positive[i]` and `negative[i]` differ in how examples are answered, and end alike.

    Each is a finished prompt, ready for `lm.generate`.
    """

    positive: list[str]
    negative: list[str]
    about: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.positive)


def contrast(
    task: "Task",
    *,
    positive: str = "steps",
    negative: str = "direct",
    shots: int = 4,
    n: int = 100,
    seed: int = 0,
    lm: "LM | None" = None,
    split: str = "train",
    groups: int | None = None,
) -> Pairs:
    """Pairs of prompts whose examples are answered in style `positive` and in style `negative`.

    Args:
        task: where questions and worked solutions come from.
        shots: examples before each question.
        n: number of pairs.
        lm: the model whose chat template renders the prompts; None takes the lab's template.
        split: rows for questions and examples; never 'test', which is for reporting.
        groups: None gives each pair its own examples; a number gives pair i those of set i mod `groups`, and a question
            of its own, so that `extract` runs the examples once a set. The price: fewer sets stand behind the mean.

    Raises:
        ValueError: test split, equal styles, a style without solutions, `groups` below 1, or too few rows.
    """
    _check_sides(positive, negative, split)
    rows = task.rows(split, seed=seed)
    if groups is not None and len(rows) < n + shots:
        with suppress(ValueError):  # a generated task makes more; what a file lacks is told below
            rows = task.rows(split, n=n + shots, seed=seed)
    if len(rows) <= shots:
        raise ValueError(f"Task {task.name} has {len(rows)} {split} rows, {shots + 1} are needed for {shots} shots.")
    render = lm.render if lm is not None else chat
    sides: dict[str, list[str]] = {positive: [], negative: []}
    for examples, last in _drawn(rows, shots, n, seed, groups):
        for style, prompts in sides.items():
            turns = [message for example in examples for message in _exchange(task, example, style)]
            prompts.append(render([*turns, {"role": "user", "content": last["question"]}]))
    about = {
        "task": task.name,
        "positive": positive,
        "negative": negative,
        "shots": shots,
        "seed": seed,
        "split": split,
    }
    return Pairs(sides[positive], sides[negative], about if groups is None else about | {"groups": groups})


def _check_sides(positive: str, negative: str, split: str) -> None:
    if split == "test":
        raise ValueError("Pairs from the test split would leak into what is reported. Use split='train' or 'tuning'.")
    if positive == negative:
        raise ValueError(f"positive and negative are both {positive!r}: their difference would be zero.")


def _drawn(rows: list[Row], shots: int, n: int, seed: int, groups: int | None) -> Iterator[tuple[list[Row], Row]]:
    """Examples and last question of each pair; with `groups` the examples of the first pairs come round again."""
    sets = [Random(f"{seed}/{number}").sample(rows, shots + 1) for number in range(n if groups is None else groups)]
    if groups is None:
        yield from ((examples, last) for *examples, last in sets)
        return
    if groups < 1 or len(rows) < n + shots:
        raise ValueError(
            f"groups={groups} with n={n} and shots={shots}: give groups of at least 1, and n of at most "
            f"{len(rows) - shots}, because each pair needs a question of its own out of {len(rows)} rows."
        )
    left = Random(f"{seed}/questions").sample(rows, len(rows))
    for number in range(n):
        *examples, _ = sets[number % groups]
        last = next(row for row in left if row not in examples)
        left.remove(last)
        yield examples, last
