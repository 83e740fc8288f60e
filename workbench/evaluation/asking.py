"""What a solver gets and gives: questions with everything needed to ask them, and an answer to each.

A `Solver` is how a question is answered: one greedy generation (`Greedy`, the default), a vote among samples, a score
of every option. It goes into a condition like an intervention. `Ask.generate`, `Ask.score` and `Ask.logprobs` are its
only ways to the model, so that every call is counted on the question that caused it, and samples are the same in any
batch, order and after a resume. The idea of a solver beside a task and a scorer is inspect_ai's.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from workbench.divergence import PlainAnswers, TokenScores
from workbench.evaluation.cost import Cost, companions
from workbench.generate import Generation
from workbench.interventions import Intervention, inherit
from workbench.interventions.session import ACTIVE
from workbench.likelihood.scoring import loglikelihoods
from workbench.models import LM
from workbench.prompts import Message, Strategy
from workbench.tasks import Task, Verdict
from workbench.tasks.answers import reopened

Row = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    text: what the task's verifier judges. verdict: given by solvers that know it without reading a text (a choice by
    likelihood). samples: further texts that stand behind the answer, kept in the row with their own verdicts.
    facts: columns of its own, plain numbers or words.
    """

    text: str
    verdict: Verdict | None = None
    samples: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Solver(Protocol):
    """How questions are answered. Frozen dataclasses: their fields are what a saved result depends on.

    A solver may also have `check(ask)`, called before anything is generated, that raises ValueError for a task or a
    strategy it can't go with; and `prompts(ask)`, where it asks by prompts of its own, which its results depend on.
    """

    def solve(self, ask: "Ask") -> list[Answer]:
        """One answer a row of `ask.rows`, in order; rows must not depend on each other."""
        ...


@dataclass
class Ask:
    """Questions to be answered, and what each has cost so far.

    rows: of the task. strategy: how the condition prompts. change: what it changes in the model. pulse: called whenever
    a batch is done, so that a long evaluation is seen to live.
    """

    lm: LM
    task: Task
    rows: list[Row]
    strategy: Strategy | None = None
    change: Intervention | None = None
    max_new_tokens: int = 256
    batch_size: int | None = None
    seed: int = 0
    pulse: Callable[[], None] = lambda: None
    spent: list[Cost] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.spent = self.spent or [Cost() for _ in self.rows]

    def messages(self, row: int, strategy: Strategy | None = None) -> list[Message]:
        """The chat that asks a question, by the condition's own strategy or by another one."""
        return self.task.messages(self.rows[row], strategy or self.strategy)

    def prompt(self, row: int, strategy: Strategy | None = None) -> str:
        """The same as a finished string, to which a solver may add the beginning of an answer."""
        return self.lm.render(self.messages(row, strategy))

    def generate(
        self,
        prompts: Sequence[str | list[Message] | list[int]],
        rows: Sequence[int],
        *,
        lm: LM | None = None,
        max_new_tokens: int | Sequence[int] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        draws: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        bias: dict[int, float] | None = None,
        bias_temperature: float = 1.0,
    ) -> list[Generation]:
        """Continue prompts on behalf of questions: `rows[i]` is the place in `self.rows` that prompt i is asked for.

        lm: a model without the condition's change, even where it is the condition's own. draws: the number of each
        sample among its question's own, which together with the question's id and the seed is its random stream; give
        every sample of a question a number of its own, or two of them are the same. max_new_tokens: one for all or one
        a prompt. bias: nats added to the logits of tokens, bias_temperature: of the decision for them
        (`decode.Decoding`).
        """
        if not prompts:
            return []
        model, change = (self.lm, self.change) if lm is None else (lm, None)
        numbers = draws if draws is not None else [0] * len(prompts)
        seeds = [stream(self.seed, str(self.rows[row]["id"]), draw) for row, draw in zip(rows, numbers, strict=True)]
        found = model.generate(
            prompts,
            change,
            self.max_new_tokens if max_new_tokens is None else max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seeds,
            batch_size=self.batch_size,
            stop=stop,
            bias=bias,
            bias_temperature=bias_temperature,
            progress=lambda done, total: self.pulse(),
        )
        beside = _beside(model, change)
        for row, one in zip(rows, found, strict=True):
            counts = (one.tokens_in, one.tokens_out, one.forward_passes, one.seconds, one.tokens_out)
            self.spent[row].add(model, *counts, beside)
        return found

    def score(
        self,
        prompts: Sequence[str | list[int]],
        texts: Sequence[list[int]],
        rows: Sequence[int],
        *,
        by: tuple[LM, Intervention | None] | None = None,
    ) -> list[TokenScores]:
        """How likely the model finds texts (token ids) behind prompts, under the condition's change.

        Counted as a call that reads prompt and text and writes nothing. by: another model, and what changes it.
        """
        if not prompts:
            return []
        model, change = by or (self.lm, self.change)
        starts = [model.encode(prompt) for prompt in prompts]
        began = time.perf_counter()
        found = PlainAnswers(model, starts, texts, self.batch_size).token_scores(change)
        self._book(starts, texts, rows, model, change, time.perf_counter() - began)
        return found

    def logprobs(
        self,
        prompts: Sequence[str | list[int]],
        texts: Sequence[list[int]],
        rows: Sequence[int],
        *,
        by: tuple[LM, Intervention | None] | None = None,
    ) -> list[Float[np.ndarray, " tokens"]]:
        """The log-probability of every token alone, in nats: as `score`, but what prompts and texts share is read once.

        Counted as `score` counts: what is shared is seen in the seconds.
        """
        model, change = by or (self.lm, self.change)
        starts = [model.encode(prompt) for prompt in prompts]
        began = time.perf_counter()
        asked = [(start, text) for start, text in zip(starts, texts, strict=True) if text]
        scored = iter(loglikelihoods(model, asked, change, batch_size=self.batch_size))
        found = [np.array(next(scored).token_logprobs if text else ()) for text in texts]
        self._book(starts, texts, rows, model, change, time.perf_counter() - began)
        return found

    def _book(
        self,
        starts: Sequence[list[int]],
        texts: Sequence[list[int]],
        rows: Sequence[int],
        model: LM,
        change: Intervention | None,
        seconds: float,
    ) -> None:
        beside = _beside(model, change)
        for row, start, text in zip(rows, starts, texts, strict=True):
            share = seconds / len(starts)
            self.spent[row].add(model, len(start) + len(text), 0, 1 + len(beside), share, len(text), beside)
        self.pulse()


def _beside(lm: LM, change: Intervention | None) -> list[LM]:
    """Models that are asked at every token, by the change or by a block of `lm.apply` around."""
    rows = inherit(lm, [change]) if isinstance(lm, LM) and lm.model in ACTIVE else [change]
    return list({id(model): model for row in rows for model in companions(row)}.values())


def begun(lm: LM, prompt: str, words: str) -> str:
    """A prompt with the first words of its answer, behind a space where no chat template ends the prompt."""
    space = "" if not words or prompt[-1:].isspace() or lm.tokenizer.chat_template else " "
    return f"{prompt}{space}{words}"


def following(lm: LM, prompt: str, word: str) -> list[int]:
    """Token ids of a word as it follows a prompt: those that the two together have more than the prompt alone.

    A tokenizer may write a word otherwise where it stands alone; where both run into one token, it does all the same.
    """
    head, whole = lm.encode(prompt), lm.encode(begun(lm, prompt, word))
    if whole[: len(head)] == head and len(whole) > len(head):
        return whole[len(head) :]
    return lm.encode(begun(lm, prompt, word)[len(prompt) :])


@dataclass(frozen=True)
class Greedy:
    """One answer to each question, the most likely token at every step."""

    def solve(self, ask: Ask) -> list[Answer]:
        """See `Solver`."""
        places = range(len(ask.rows))
        prompts = [ask.prompt(place) for place in places]
        found = ask.generate(prompts, places)
        texts = [reopened(*each) for each in zip(prompts, (one.text for one in found), strict=True)]
        return [Answer(text, facts={"finished": one.finished}) for text, one in zip(texts, found, strict=True)]


def stream(seed: int, question: str, draw: int) -> int:
    """The random stream of a question's sample; other questions, draws and seeds have others."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{question}/{draw}".encode()).digest()[:7], "big")


def identity(value: Any) -> Any:
    """A value as JSON that changes when what it does changes: models by weights, interventions by their numbers.

    Raises:
        ValueError: a value that can't be told apart from others of its kind, such as a function.
    """
    from workbench.evaluation.conditions import fingerprint

    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, LM):
        return [value.revision, value.reasons.get("quantization", ""), str(value.model.dtype)]
    if isinstance(value, Intervention):
        return fingerprint(value)
    if isinstance(value, Task):
        return [value.name, value.source, {name: str(knob) for name, knob in value.parameters.items()}]
    if isinstance(value, dict):
        return {str(name): identity(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [identity(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        held = {each.name: identity(getattr(value, each.name)) for each in fields(value)}
        return {"kind": f"{type(value).__module__}.{type(value).__qualname__}", **held}
    raise ValueError(
        f"A solver holds {value!r}, and a saved result could not say which one it was. Its fields may be numbers, "
        "words, models, interventions, tasks, frozen dataclasses, and lists of these."
    )
