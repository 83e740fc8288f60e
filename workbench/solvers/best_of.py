"""The best of n samples by a score, or a vote in which every sample weighs what it scored.

Scores are at least 0, and more is better. By words:

    exact           1 where the task's verifier says right: an oracle that sees the gold answer, so an upper bound and
                    no strategy
    likelihood      exp of the mean log-probability of the answer's tokens, under the condition's own model
    self-certainty  mean over tokens of KL(uniform || next token), in nats (arXiv 2502.18581)
    shortest        1 / tokens of the whole answer, thoughts included (arXiv 2505.17813)
    longest         tokens of the whole answer

or by an object with `scores(ask, places, samples)`: `AskedVerifier` (asked whether it is right), `Probe` (reads
hidden states). Best-of-n against a verifier and weighted votes: Cobbe et al., arXiv 2110.14168; Li et al., 2206.02336.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from workbench.evaluation.asking import Answer, Ask
from workbench.evaluation.judging import judge
from workbench.solvers.sampling import Drawn, check_draws, draw, elected

WORDS = ("exact", "likelihood", "self-certainty", "shortest", "longest")


@runtime_checkable
class Scorer(Protocol):
    """What ranks samples without the gold answer: a frozen dataclass, its fields of the kinds `identity` knows."""

    def scores(self, ask: Ask, places: Sequence[int], samples: Sequence[Drawn]) -> list[float]:
        """How good each sample of question `places[i]` is, 0 or more; none depends on the others."""
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
        """See `Solver`. Facts: `chosen_score` of the answer, and `scores` of all samples in the order drawn."""
        drawn = draw(ask, self.n, self.temperature, self.top_p)
        first = {(place, one.text): one for place, each in enumerate(drawn) for one in reversed(each)}
        found = self._scores(ask, [place for place, _ in first], list(first.values()))
        known = dict(zip(first, found, strict=True))
        answers = []
        for place, each in enumerate(drawn):
            scores = [known[place, one.text] for one in each]
            best = max(range(self.n), key=lambda number: scores[number])
            if self.vote:
                best = elected([judge(ask.task, ask.rows[place], one.text)[0].extracted for one in each], scores)
            facts = {"chosen_score": scores[best], "scores": scores}
            answers.append(Answer(each[best].text, samples=tuple(one.text for one in each), facts=facts))
        return answers

    def _scores(self, ask: Ask, places: Sequence[int], samples: Sequence[Drawn]) -> list[float]:
        if not isinstance(self.by, str):
            return self.by.scores(ask, places, samples)
        if self.by == "exact":
            pairs = zip((ask.rows[place] for place in places), (sample.text for sample in samples), strict=True)
            return [float(judge(ask.task, row, text)[0].correct) for row, text in pairs]
        if self.by in ("shortest", "longest"):
            return [sample.made.tokens_out ** (1.0 if self.by == "longest" else -1.0) for sample in samples]
        asked = [sample.prompt for sample in samples], [sample.made.token_ids for sample in samples], places
        if self.by == "self-certainty":
            return [float(each.certainty.mean()) for each in ask.score(*asked)]
        return [math.exp(float(each.mean())) for each in ask.logprobs(*asked)]
