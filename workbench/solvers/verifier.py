"""A language model as a verifier: asked whether a solution is right, scored by its probability of Yes against No.

Any model serves: the same one, another one, or one with an adapter that was trained on judged solutions
(`verifier_records`, then `finetune`). The idea of a trained verifier is Cobbe et al.'s (arXiv 2110.14168); scoring by
the probability of a word is that of arXiv 2408.15240. An untrained small model may well be no better than chance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.evaluation.asking import Ask, following
from workbench.interventions import Intervention
from workbench.models import LM
from workbench.prompts import Message
from workbench.solvers.sampling import Drawn
from workbench.tasks.answers import final_text

WORDING = "{question}\n\nProposed answer: {solution}\n\nIs this answer right? Answer Yes or No."


@dataclass(frozen=True)
class AskedVerifier:
    """P(yes) / (P(yes) + P(no)) of a model that is shown the question and a solution without its thoughts.

    lm: None asks the model that answers. change: what the verifier's model is changed by (an adapter, a vector); the
    change of the condition isn't used. wording: holds {question} and {solution}.
    """

    lm: LM | None = None
    change: Intervention | None = None
    wording: str = WORDING
    yes: str = "Yes"
    no: str = "No"

    def __post_init__(self) -> None:
        if "{question}" not in self.wording or "{solution}" not in self.wording:
            raise ValueError(f"wording={self.wording!r} must hold {{question}} and {{solution}}.")
        if not self.yes or not self.no or self.yes == self.no:
            raise ValueError(f"yes={self.yes!r}, no={self.no!r}: give two different words.")

    def scores(self, ask: Ask, places: Sequence[int], samples: Sequence[Drawn]) -> list[float]:
        """See `Scorer`; 0 to 1."""
        lm = self.lm or ask.lm
        questions = [str(ask.rows[place]["question"]) for place in places]
        asked = [_asked(self.wording, *each) for each in zip(questions, (s.text for s in samples), strict=True)]
        prompts = [lm.render([message]) for message in asked]
        total = []
        for word in (self.yes, self.no):
            words = [following(lm, prompt, word) for prompt in prompts]
            found = ask.logprobs(prompts, words, places, by=(lm, self.change))
            total.append([float(each.sum()) for each in found])
        return [1 / (1 + math.exp(min(no - yes, 700))) for yes, no in zip(*total, strict=True)]


def _asked(wording: str, question: str, text: str) -> Message:
    filled = wording.replace("{solution}", "\0").replace("{question}", question)  # neither may hold the other's mark
    return {"role": "user", "content": filled.replace("\0", final_text(text))}


def verifier_records(
    rows: Sequence[Mapping[str, Any]],
    judged: Sequence[Sequence[Mapping[str, Any]]],
    *,
    wording: str = WORDING,
    yes: str = "Yes",
    no: str = "No",
) -> list[dict[str, Any]]:
    """Training records for a verifier: each different solution of a question, answered by yes or no.

    Args:
        rows: of the task's train split, with `question`.
        judged: for each row its samples, with `output` and `correct`, as `Results.rows.samples` holds them.
    """
    records = []
    for row, samples in zip(rows, judged, strict=True):
        for output, right in {str(each["output"]): bool(each["correct"]) for each in samples}.items():
            turns = [_asked(wording, row["question"], output), {"role": "assistant", "content": yes if right else no}]
            records.append({"messages": turns})
    return records
