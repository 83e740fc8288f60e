"""Edits, one function each: another wording of the same answers, judged again by the task.

An edit is a function `(lm, task, attempts, settings) -> list[Attempt]`; keyword arguments beyond these are its own, set
by `functools.partial(edit, name=value)`. It changes every sampled answer, counts its tokens anew and asks the verifier
anew, so an edit that loses the answer makes it unusable. What an edit can't do to a text (no equation in it, say) makes
that answer unusable too, with the reason in the record, and no later edit looks at it. Where something else than the
gold answer decided (reviewers, agreement), its word stands as long as the edited text gives the same answer. Equations,
programs and words for one solution are the renderings that arXiv 2401.11864 and 2312.10730 train on together.

Sentences are told apart by full stops, question and exclamation marks and line breaks. The closing sentence is the
last one: it states the answer, and every edit leaves it as it is.
"""

import re
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from workbench.synthesis.sampling import Attempt, Settings, judged, row_of, tokens_of

if TYPE_CHECKING:
    from workbench.models import LM
    from workbench.tasks import Task

__all__ = ["as_programs", "compact", "drop_improbable", "equations", "in_words", "without_steps"]

_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_NUMBER = r"[$€£]?-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?%?"
_EQUATION = re.compile(rf"[(]*{_NUMBER}[)]*(?:\s*[-+*/×÷x]\s*[(]*{_NUMBER}[)]*)+\s*=\s*{_NUMBER}")
_BINARY = re.compile(rf"({_NUMBER})\s*([-+*/×÷x])\s*({_NUMBER})\s*=\s*({_NUMBER})")
_LONGER = re.compile(r"[\d)%](?:\s*[-+*/×÷x]\s*)?$")  # what stands before the last two numbers of a longer sum
_SPOKEN = {"+": "{a} plus {b} is {c}.", "-": "{a} minus {b} is {c}.", "*": "{a} times {b} is {c}.",
           "/": "{a} divided by {b} is {c}."}  # fmt: skip
CONNECTORS = ("so", "then", "therefore", "next", "finally")
_ALL_CONNECTORS = (
    "actually", "additionally", "after that", "alternatively", "also", "and so", "and then", "because of this", "but",
    "consequently", "finally", "first", "firstly", "hence", "however", "hmm", "in addition", "let me check",
    "let's see", "lastly", "moreover", "next", "now", "okay", "ok", "on the other hand", "second", "secondly",
    "since", "so", "that is", "that means", "then", "therefore", "third", "this means that", "thus", "to check",
    "to verify", "wait", "well", "yet",
)  # fmt: skip


def sentences(text: str) -> list[str]:
    """The sentences of an answer, without what separates them.

    >>> sentences("3+4=7. 7*1.5=10.5.  The answer is 10.5.")
    ['3+4=7.', '7*1.5=10.5.', 'The answer is 10.5.']
    """
    return [part.strip() for part in _SENTENCE.split(text.strip()) if part.strip()]


def equations(lm: "LM", task: "Task", attempts: list[Attempt], settings: Settings) -> list[Attempt]:
    """Nothing but the equations of an answer and its closing sentence (equation-of-thought, arXiv 2401.11864)."""

    def rendered(text: str) -> str:
        *steps, closing = sentences(text)
        found = [_tight(match) for step in steps for match in _EQUATION.findall(step)]
        return " ".join([*(f"{equation}." for equation in found), closing]) if found else ""

    return _edited(lm, task, attempts, lambda sample, _: rendered(sample["text"]), "no equation in it")


def in_words(lm: "LM", task: "Task", attempts: list[Attempt], settings: Settings) -> list[Attempt]:
    """Each equation of two numbers spoken out: '34+27=61' becomes '34 plus 27 is 61.'; other words stay."""

    def spoken(match: re.Match[str]) -> str:
        if _LONGER.search(match.string[: match.start()]):
            return match[0]
        a, sign, b, c = match.groups()
        return _SPOKEN[{"×": "*", "x": "*", "÷": "/"}.get(sign, sign)].format(a=a, b=b, c=c).removesuffix(".")

    def rendered(text: str) -> str:
        new = _BINARY.sub(spoken, text)
        return new if new != text else ""

    return _edited(lm, task, attempts, lambda sample, _: rendered(sample["text"]), "no equation in it")


def as_programs(lm: "LM", task: "Task", attempts: list[Attempt], settings: Settings) -> list[Attempt]:
    """Each right answer's equations as a Python program that prints the result (see `programs.as_program`).

    The program's value is computed here, exactly, and must be the gold answer; nothing is run. Answer tasks that are
    taught by it through `programs.program_task`, whose verifier runs what the student writes in the sandbox.
    """
    from workbench.synthesis.programs import as_program

    changed = []
    for attempt in attempts:
        samples = []
        for sample in attempt["samples"]:
            steps = {
                "question": attempt["question"],
                "answer": attempt["answer"],
                "solutions": {"steps": sample["text"]},
            }
            program = as_program(steps) if sample["correct"] and "why" not in sample else None
            new = {"text": program, "tokens_out": tokens_of(lm, program)} if program else {}
            samples.append({"why": "no program in it", **sample} if program is None else sample | new)
        changed.append({**attempt, "samples": samples})
    return changed


def _tight(equation: str) -> str:
    return re.sub(r"[\s$€£]", "", equation)


def compact(
    lm: "LM",
    task: "Task",
    attempts: list[Attempt],
    settings: Settings,
    *,
    connectors: Sequence[str] = CONNECTORS,
    most: int = 3,
) -> list[Attempt]:
    """Chains with few connecting phrases: at most `most` of those in `connectors`, none of any other.

    A sentence that neither computes nor states a number is left out. After the idea of connector-aware compact chains
    (CAC-CoT, arXiv 2508.18743), which has a teacher write under such limits; here a rule shortens what was written.
    """
    allowed = {connector.lower() for connector in connectors}
    opening = re.compile(rf"^({'|'.join(sorted(_ALL_CONNECTORS, key=len, reverse=True))})\b[,:]?\s+", re.IGNORECASE)

    def shortened(text: str) -> str:
        *steps, closing = sentences(text)
        left, kept = most, []
        for step in steps:
            if not re.search(r"\d", step):
                continue
            while found := opening.match(step):
                if found[1].lower() in allowed and left:
                    left -= 1
                    break
                step = step[found.end() :]
            kept.append(step[:1].upper() + step[1:])
        return " ".join([*dict.fromkeys(kept), closing])

    return _edited(lm, task, attempts, lambda sample, _: shortened(sample["text"]), "nothing left")


def without_steps(
    lm: "LM", task: "Task", attempts: list[Attempt], settings: Settings, *, removed: int, jitter: float = 0.0
) -> list[Attempt]:
    """The first `removed` sentences of each chain taken away; the closing sentence always stays.

    Training on a schedule of growing `removed` moves the steps from the text into the model (internalised chain of
    thought, arXiv 2405.14838). With `jitter`, each chain loses one sentence more with that probability, again and
    again, by a seed of its own (the paper smooths its stages in the same way, by tokens).
    """
    if removed < 0 or not 0 <= jitter < 1:
        raise ValueError(f"removed={removed} and jitter={jitter}: give 0 or more, and a probability from 0 to below 1.")

    def rest(sample: dict[str, Any], name: str) -> str:
        *steps, closing = sentences(sample["text"])
        draws, gone = Random(name), removed
        while jitter and gone < len(steps) and draws.random() < jitter:
            gone += 1
        return " ".join([*steps[gone:], closing])

    return _edited(lm, task, attempts, rest, "nothing left", seed=settings.seed)


def drop_improbable(
    lm: "LM",
    task: "Task",
    attempts: list[Attempt],
    settings: Settings,
    *,
    student: "LM | None" = None,
    threshold: float = 0.01,
) -> list[Attempt]:
    """Take out steps in which the student finds some token less likely than `threshold`; the closing sentence stays.

    `student` is by default the model that was asked. A step is judged as it stands in the teacher's chain, before
    anything is taken out. After the finding of arXiv 2509.22230 that tokens which a student finds improbable make a
    trace harder to learn; there the student replaces such a token while the teacher writes (see
    `recipes.student_paced`), here whole steps go, so that what is left are the teacher's own sentences.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold={threshold} is no probability: give a number between 0 and 1, such as 0.01.")
    texts = [
        (attempt, sample["text"]) for attempt in attempts for sample in attempt["samples"] if _open(attempt, sample)
    ]
    worst = iter(_least_likely(student or lm, texts))

    def probable(sample: dict[str, Any], _: str) -> str:
        *steps, closing = sentences(sample["text"])
        likely = next(worst)
        kept = [step for step, probability in zip(steps, likely, strict=False) if probability >= threshold]
        return " ".join([*kept, closing])

    return _edited(lm, task, attempts, probable, "nothing left")


def _least_likely(reader: "LM", texts: "Sequence[tuple[Attempt, str]]") -> list[list[float]]:
    """For each answer, the probability of the least likely token of each of its sentences, after the plain question."""
    from workbench.divergence import PlainAnswers

    prompts, answers, owners = [], [], []
    for attempt, text in texts:
        parts = sentences(text)
        pieces = [reader.encode(part if place == 0 else f" {part}") for place, part in enumerate(parts)]
        prompts.append(reader.encode(reader.render(attempt["plain"])))
        answers.append([token for piece in pieces for token in piece])
        owners.append([len(piece) for piece in pieces])
    result = []
    for bits, lengths in zip(PlainAnswers(reader, prompts, answers, None).bits(None), owners, strict=True):
        ends = [sum(lengths[: place + 1]) for place in range(len(lengths))]
        result.append([float(2 ** -bits[end - n : end].max()) for end, n in zip(ends, lengths, strict=True) if n])
    return result


def _edited(
    lm: "LM",
    task: "Task",
    attempts: list[Attempt],
    change: Callable[[dict[str, Any], str], str],
    why_empty: str,
    seed: int = 0,
) -> list[Attempt]:
    """Every sample's text changed, its tokens counted and its verdict made anew; "" means that it couldn't be."""
    changed = []
    for attempt in attempts:
        samples = []
        for number, sample in enumerate(attempt["samples"]):
            text = change(sample, f"{seed}/{attempt['row_id']}/{number}") if _open(attempt, sample) else ""
            if not text:
                samples.append({"why": why_empty, **sample})  # the first reason stays
                continue
            sizes = sample["tokens_in"], tokens_of(lm, text)
            new = judged(task, row_of(attempt), text, *sizes, sample["finished"])
            if "by" in sample:
                new["correct"] = sample["correct"] and new["extracted"] == sample["extracted"]
            samples.append({**sample, **new})
        changed.append({**attempt, "samples": samples})
    return changed


def _open(attempt: Attempt, sample: dict[str, Any]) -> bool:
    """Whether there is something to edit: a text that no edit failed on, to a question that has an answer."""
    return bool(sample["text"]) and "why" not in sample and "dropped" not in attempt
