"""The best of n samples by a score, or a vote in which every sample weighs what it scored.

Scores are at least 0, and more is better. By words:

    exact           1 where the task's verifier says right: an oracle that sees the gold answer, so an upper bound and
                    no strategy
    likelihood      exp of the mean log-probability of the answer's tokens, under the condition's own model
    self-certainty  mean over tokens of KL(uniform || next token), in nats (arXiv 2502.18581)
    shortest        1 / tokens of the whole answer, thoughts included (arXiv 2505.17813)
    longest         tokens of the whole answer

or by an object with `score(ask, place, sample) -> float`: `AskedVerifier` (asked whether it is right), `Probe` (reads
hidden states). Best-of-n against a verifier and weighted votes: Cobbe et al., arXiv 2110.14168; Li et al., 2206.02336.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from workbench.evaluation.asking import Answer, Ask
from workbench.evaluation.judging import judge
from workbench.solvers.sampling import Drawn, check_draws, draw, elected
from workbench.solvers.scoring import log_probabilities

WORDS = ("exact", "likelihood", "self-certainty", "shortest", "longest")


@runtime_checkable
class Scorer(Protocol):
    """What ranks samples without the gold answer: a frozen dataclass, its fields of the kinds `identity` knows."""

    def score(self, ask: Ask, place: int, sample: Drawn) -> float:
        """How good one sample of question `place` is, 0 or more."""
        ...


@dataclass(frozen=True)
class BestOf:
    """n samples a question; the answer is the best of them by `by`, or with `vote` the one of the weightiest votes.

    Equal texts are scored once. Ties go to the sample drawn first.
    """

    n: int = 5
    by: str | Scorer = "likelihood"
    vote: bool = False
    temperature: float = 0.7
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_draws("BestOf", self.n, self.temperature, self.top_p)
        if isinstance(self.by, str) and self.by not in WORDS or not isinstance(self.by, str | Scorer):
            raise ValueError(
                f"by={self.by!r} is no score. Give one of {', '.join(WORDS)}, an AskedVerifier or a Probe."
            )

    def solve(self, ask: Ask) -> list[Answer]:
        """See `Solver`. Facts: `score` of the answer, and `scores` of all samples in the order drawn."""
        answers = []
        for place, each in enumerate(draw(ask, self.n, self.temperature, self.top_p)):
            first = {one.text: one for one in reversed(each)}
            known = {text: self._score(ask, place, one) for text, one in first.items()}
            scores = [known[one.text] for one in each]
            best = max(range(self.n), key=lambda number: scores[number])
            if self.vote:
                best = elected([judge(ask.task, ask.rows[place], one.text)[0].extracted for one in each], scores)
            facts = {"score": scores[best], "scores": scores}
            answers.append(Answer(each[best].text, samples=tuple(one.text for one in each), facts=facts))
            ask.pulse()
        return answers

    def _score(self, ask: Ask, place: int, sample: Drawn) -> float:
        if not isinstance(self.by, str):
            return self.by.score(ask, place, sample)
        if self.by == "exact":
            return float(judge(ask.task, ask.rows[place], sample.text)[0].correct)
        if self.by in ("shortest", "longest"):
            return sample.made.tokens_out ** (1.0 if self.by == "longest" else -1.0)
        answer = sample.made.token_ids
        found = log_probabilities(ask, place, ask.lm, ask.change, ask.lm.encode(sample.prompt), answer)
        if self.by == "self-certainty":
            return -float(found.mean()) - math.log(found.shape[1])
        return math.exp(float(found[range(len(answer)), answer].mean()))
