"""Answers by likelihood: of the options of a question, or of two sentences, the likelier one; nothing is generated.

Scores are those of `workbench.likelihood`. The condition's strategy asks the question; behind it the assistant's turn
begins with `lead`, and the options go on from there. Does not read an answer out of a text (`evaluation.Greedy`).
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from workbench.evaluation.asking import Answer, Ask, begun
from workbench.evaluation.cost import companions
from workbench.interventions.session import Session
from workbench.likelihood import Choice, Pair, Scored, minimal_pairs, multiple_choice, option_texts
from workbench.likelihood.choices import STYLES, UNCONDITIONAL, bare_question, gold_place, is_lettered
from workbench.likelihood.normalising import check_normalisation
from workbench.models import ModelError
from workbench.tasks import Task, Verdict
from workbench.tasks.answers import reopened

Row = dict[str, Any]
Answered = list[tuple[Answer, tuple[Scored, ...]]]


@dataclass(frozen=True)
class Likelihood:
    """The likeliest option is the answer; for tasks with options (AQuA, parts of BBH) and of pairs (BLiMP).

    normalisation: see `workbench.likelihood.normalised`; pairs take all but "unconditional", which runs options behind
    `lead` alone. style: "letter" scores the letters of a question that lists its options, written as the gold answer
    is; "text" leaves the list out and scores the options' texts, in worked examples, too. lead: how the answer begins,
    as in direct examples ("The answer is A."). Facts: confidence, the chosen one's share in a softmax over the summed
    log-probabilities, and margin, the right one's score minus the best other one's, in nats (a unit).

    >>> import workbench as wb
    >>> lm, task = wb.load_model("lab"), wb.load_task("word-problems")
    >>> row = {"id": "a", "question": "1+1?\\nOptions:\\n(A) 2\\n(B) 3", "answer": "A"}
    >>> print(Likelihood(style="letter").solve(Ask(lm, task, [row]))[0].text in "AB")
    True
    """

    normalisation: str = "sum"
    style: str = "text"
    lead: str = "The answer is"
    chunk: ClassVar[int] = 1024  # questions at a time share more beginnings

    def __post_init__(self) -> None:
        check_normalisation(self.normalisation)
        if self.style not in STYLES:
            raise ModelError(f"style={self.style!r} is unknown. Allowed: {', '.join(STYLES)}.")

    def check(self, ask: Ask) -> None:
        """Raise ModelError for a task without options or pairs; of pairs, for a strategy or an edit of the cache."""
        if ask.task.kind != "pair":
            option_texts(ask.rows[0])
            return
        session = Session(ask.lm, [ask.change])
        if session.kv or session.edits:
            raise ModelError(
                f"The condition edits the cache of the prompt, and the sentences of task {ask.task.name!r} have no "
                "prompt but the token that begins texts. Leave the edit out of the condition."
            )
        if ask.strategy is not None:
            raise ModelError(
                f"The strategy {ask.strategy.name!r} prompts, and the sentences of task {ask.task.name!r} stand alone. "
                "Leave it out of the condition."
            )

    def solve(self, ask: Ask) -> list[Answer]:
        """See `Solver`."""
        self.check(ask)
        began = time.perf_counter()
        found = self._pairs(ask) if ask.task.kind == "pair" else self._choices(ask)
        seconds = time.perf_counter() - began
        total, beside = sum(len(scored) for _, scored in found), companions(ask.change)
        for place, (_, scored) in enumerate(found):
            for one in scored:
                read = one.context_tokens + one.tokens
                ask.spent[place].add(ask.lm, read, 0, 1 + len(beside), seconds / total, one.tokens, beside)
        return [answer for answer, _ in found]

    def _pairs(self, ask: Ask) -> Answered:
        found = minimal_pairs(
            ask.lm, ask.rows, ask.change, normalisation=self.normalisation, batch_size=ask.batch_size,
            progress=lambda done, total: ask.pulse(),
        )  # fmt: skip
        return [(_of_pair(*each), each[1].scored) for each in zip(ask.rows, found, strict=True)]

    def _choices(self, ask: Ask) -> Answered:
        task = _cloze(ask.task) if self.style == "text" else ask.task

        def context(row: Mapping[str, Any]) -> str:
            asked = _bare(row) if self.style == "text" else dict(row)
            prompt = ask.lm.render(task.messages(asked, ask.strategy))
            if tag := reopened(prompt, "").strip():  # a template that opens the thoughts: the answer stands behind them
                prompt += f"{tag.replace('<', '</')}\n\n"
            return begun(ask.lm, prompt, self.lead)

        found = multiple_choice(
            ask.lm, ask.rows, ask.change, style=self.style, normalisation=self.normalisation, prompt=context,
            unconditional=self.lead or UNCONDITIONAL, special=False, batch_size=ask.batch_size,
            progress=lambda done, total: ask.pulse(),
        )  # fmt: skip
        return [(_of_choice(*each), each[1].scored + each[1].alone) for each in zip(ask.rows, found, strict=True)]


def _bare(row: Mapping[str, Any]) -> Row:
    """A row that asks for an option's text."""
    options = option_texts(row)
    answer = options[gold_place(row, options)]
    return {
        **row,
        "question": bare_question(row),
        "answer": answer,
        "solutions": {"direct": f"The answer is {answer}."},
    }


def _cloze(task: Task) -> Task:
    """The same task with such rows, from which worked examples are drawn."""
    return replace(task, draw=lambda split, n, seed: [_bare(row) for row in task.draw(split, n, seed)])


def _of_choice(row: Row, found: Choice) -> Answer:
    facts = {"confidence": found.confidence, "margin": found.margin, "prompt": found.prompt}
    lettered = is_lettered(row, found.options)
    extracted = chr(65 + found.chosen) if lettered else found.options[found.chosen]
    return Answer(found.options[found.chosen], Verdict(found.correct, extracted), facts=facts)


def _of_pair(row: Row, found: Pair) -> Answer:
    chosen = row["good"] if found.correct else row["bad"]
    confidence = 1 / (1 + math.exp(-abs(found.scored[0].logprob - found.scored[1].logprob)))
    facts = {"confidence": confidence, "margin": found.good - found.bad, "prompt": "", "field": found.field}
    return Answer(chosen, Verdict(found.correct, chosen), facts=facts)
