"""Where a confidence comes from: probabilities of the tokens, a number that the model says, agreement among samples.

Does not cover: P(True) and probes. What the numbers are worth is `confidence`'s matter.

Sources: token probabilities and P(True), Kadavath et al. 2022 (arXiv 2207.05221); said confidences, Lin et al. 2022
(arXiv 2205.14334) and Tian et al. 2023 (arXiv 2305.14975); agreement, Wang et al. 2022 (arXiv 2203.11171).
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.evaluation.stored import ballot
from workbench.prompts import Strategy
from workbench.tasks import Task, Verdict

if TYPE_CHECKING:
    from workbench.interventions import Intervention
    from workbench.models import LM

ASK = "End with a line 'Confidence: NN%': how likely it is, from 0% to 100%, that your answer is right."
_SAID = re.compile(
    r"\b(?:confidence|certainty|confianza|certeza|seguridad)\b[^\d\n]{0,20}?"
    r"(?P<number>\d{1,3}(?:[.,]\d+)?)\s*(?P<unit>%|per\s?cent|por\s+ciento)?\.?(?!\d)",
    flags=re.IGNORECASE,
)


def answer_confidence(
    lm: "LM",
    prompts: Sequence[str | list[dict[str, str]]],
    outputs: Sequence[str],
    interventions: "Intervention | None" = None,
    *,
    answers: Sequence[str | None] | None = None,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """How probable the model finds given outputs, one row each, in the same order.

    Args:
        prompts: as `lm.generate` takes them; outputs: the text that followed each.
        interventions: in force while scoring, such as the one that the outputs were made under.
        answers: read only the tokens of each answer, at its last place in the output (results.rows.extracted); an
            answer that isn't there to the letter gives nan. None reads the whole output.

    Returns:
        tokens (how many were read), log_p (sum, in nats), product (probability of all), mean_p (geometric mean of the
        tokens' probabilities), least_p (the smallest). nan where there is nothing to read. The end token is not
        part of an output's text, so it is not scored; texts are tokenized anew.
    """
    from workbench.divergence import PlainAnswers

    if isinstance(prompts, str) or isinstance(outputs, str):
        raise ValueError("prompts and outputs are lists of texts, one a row. Got one string: put it into a list.")
    prompts, outputs = list(prompts), list(outputs)
    answers = [None] * len(outputs) if answers is None else list(answers)
    if not len(prompts) == len(outputs) == len(answers):
        raise ValueError(f"Got {len(prompts)} prompts, {len(outputs)} outputs and {len(answers)} answers: one a row.")
    whole = [lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True) for text in outputs]
    scored = [number for number, each in enumerate(whole) if each["input_ids"]]
    bits: list[np.ndarray] = [np.empty(0)] * len(outputs)
    if scored:
        sides = [lm.encode(prompts[number]) for number in scored], [whole[number]["input_ids"] for number in scored]
        found = PlainAnswers(lm, *sides, batch_size).bits(interventions)
        for number, each in zip(scored, found, strict=True):
            bits[number] = each
    wants_answers = any(answer is not None for answer in answers)
    lines = []
    for text, each, answer, own in zip(outputs, whole, answers, bits, strict=True):
        keep = _places(text, each["offset_mapping"], answer) if wants_answers else slice(None)
        lines.append(_summary(-own[keep] * math.log(2)))
    return pd.DataFrame(lines)


def _places(text: str, offsets: Sequence[tuple[int, int]], answer: str | None) -> list[int]:
    """Tokens that hold part of the answer's last occurrence, as a whole number or word."""
    found = list(re.finditer(rf"(?<![\w.]){re.escape(answer)}(?!\w|\.\d)", text, flags=re.I)) if answer else []
    if not found:
        return []
    start, end = found[-1].span()
    return [place for place, (low, high) in enumerate(offsets) if low < end and high > start]


def _summary(log_p: np.ndarray) -> dict[str, float]:
    if not len(log_p):
        return {"tokens": 0, "log_p": math.nan, "product": math.nan, "mean_p": math.nan, "least_p": math.nan}
    total = float(log_p.sum())
    line = {"tokens": len(log_p), "log_p": total, "product": min(1.0, math.exp(total))}
    return line | {"mean_p": min(1.0, math.exp(total / len(log_p))), "least_p": min(1.0, math.exp(log_p.min()))}


def asking_confidence(strategy: Strategy | None = None) -> Strategy:
    """`strategy` (None: no other cue) that also asks for a line 'Confidence: NN%'.

    >>> asking_confidence().system == ASK
    True
    """
    strategy = strategy or Strategy()
    name = "says confidence" if strategy.name == "plain" else f"{strategy.name}, says confidence"
    return replace(strategy, name=name, system=f"{strategy.system} {ASK}" if strategy.system else ASK)


def said_confidence(text: str) -> float | None:
    """The last confidence that a text states, from 0 to 1; None when it states none that is in range.

    A number with a percent sign, or a whole number above 1, is a percentage; a decimal of at most 1 is a probability. A
    bare 1 could be either: None.

    >>> said_confidence("The answer is 8. Confidence: 85%"), said_confidence("Confianza: 0,9"), said_confidence("8")
    (0.85, 0.9, None)
    """
    found = list(_SAID.finditer(text))
    if not found:
        return None
    number = float(found[-1]["number"].replace(",", "."))
    decimal = re.search(r"[.,]", found[-1]["number"])
    if not found[-1]["unit"] and number <= 1 and (decimal or number == 0):
        return number
    if not found[-1]["unit"] and number == 1:
        return None
    return number / 100 if number <= 100 else None


def confidence_task(task: Task) -> Task:
    """`task`, whose verifier does not see the stated confidence: '85%' must not be read as the answer.

    Use it with `asking_confidence()`; then `rows.output.map(said_confidence)` is the confidence.
    """

    def judge(row: dict[str, Any], text: str) -> Verdict:
        return task.judge(row, without_confidence(text))

    return replace(task, name=f"{task.name}, confidence", judge=judge)


def without_confidence(text: str) -> str:
    """A text without what it states about its confidence.

    >>> without_confidence("It is 8. Confidence: 85%.")
    'It is 8.'
    """
    return _SAID.sub("", text).rstrip()


def agreement_confidence(samples: pd.DataFrame) -> pd.DataFrame:
    """Most frequent answer of several samples a question, and the share of all samples that gave it.

    Args:
        samples: one row a sample with id, condition, extracted (None: unparsed) and correct.

    Returns:
        One row a question and condition: id, condition, extracted, correct, confidence, samples, unparsed (a share).
        Equal numbers are one answer, as in `SelfConsistency` (0.5 and 1/2). Unparsed samples agree with nothing but
        count as samples; a question without any answer has confidence 0. The first seen wins a tie.
    """
    lines = []
    for (name, question), group in samples.groupby(["condition", "id"], sort=False):
        given = group[group.extracted.notna()]
        votes = Counter(map(ballot, given.extracted))
        most, count = votes.most_common(1)[0] if votes else (None, 0)
        chosen = given[given.extracted.map(ballot) == most].iloc[0] if votes else None
        answer, right = (None, False) if chosen is None else (chosen.extracted, bool(chosen.correct))
        line = {"id": question, "condition": name, "extracted": answer, "correct": right}
        line |= {"confidence": count / len(group), "samples": len(group), "unparsed": 1 - len(given) / len(group)}
        lines.append(line)
    return pd.DataFrame(lines)
