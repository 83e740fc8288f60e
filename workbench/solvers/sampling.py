"""Several samples a question: all of them kept, or the answer that most of them give.

Samples are drawn from streams of their own (`Ask.generate`), so the first k of a larger number are those of a smaller
one, and a vote among stored samples (`evaluation.stored.majority_at`) is the vote that was held here.
"""

from dataclasses import dataclass

from workbench.evaluation.asking import Answer, Ask
from workbench.evaluation.judging import judge
from workbench.evaluation.stored import ballot, elected
from workbench.generate import Generation
from workbench.tasks.answers import reopened


@dataclass(frozen=True)
class Drawn:
    """One sample of a question: the prompt it continues, its text as the task judges it, what was generated."""

    prompt: str
    text: str
    made: Generation


def draw(ask: Ask, k: int, temperature: float, top_p: float) -> list[list[Drawn]]:
    """k samples for every question of `ask`, in one call; sample i of a question is the same whatever k is."""
    prompts = [ask.prompt(place) for place in range(len(ask.rows))]
    places = [place for place in range(len(ask.rows)) for _ in range(k)]
    found = ask.generate(
        [prompts[place] for place in places],
        places,
        temperature=temperature,
        top_p=top_p,
        draws=list(range(k)) * len(ask.rows),
    )
    drawn = [Drawn(prompts[p], reopened(prompts[p], one.text), one) for p, one in zip(places, found, strict=True)]
    return [drawn[start : start + k] for start in range(0, len(drawn), k)]


def check_draws(name: str, k: int, temperature: float, top_p: float) -> None:
    """Raise ValueError where k samples can't be drawn, or would all be the same."""
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"{name} of {k!r} samples: give a whole number from 1.")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"{name}: temperature={temperature}, top_p={top_p}; give 0 or more, and above 0 to 1.")
    if k > 1 and temperature == 0:
        raise ValueError(
            f"{name} of {k} samples at temperature 0: all would be the same. Give temperature=0.7, or one sample."
        )


@dataclass(frozen=True)
class Samples:
    """k samples a question, all kept in the row; the first is the answer, `solve_rate` the share of right ones."""

    k: int = 5
    temperature: float = 0.7
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_draws("Samples", self.k, self.temperature, self.top_p)

    def solve(self, ask: Ask) -> list[Answer]:
        """See `Solver`. Facts: `finished`, the share of samples that ended before the token limit."""
        return [
            Answer(
                each[0].text,
                samples=tuple(one.text for one in each),
                facts={"finished": sum(one.made.finished for one in each) / self.k},
            )
            for each in draw(ask, self.k, self.temperature, self.top_p)
        ]


@dataclass(frozen=True)
class SelfConsistency:
    """The answer that most of k sampled chains give (Wang et al., arXiv 2203.11171).

    Answers are read by the task's verifier (thoughts left out) and count as the same when `evaluation.stored.ballot`
    says so: equal numbers, else equal words. A sample without an answer has no vote; ties go to the answer seen first.
    """

    k: int = 5
    temperature: float = 0.7
    top_p: float = 1.0

    def __post_init__(self) -> None:
        check_draws("SelfConsistency", self.k, self.temperature, self.top_p)

    def solve(self, ask: Ask) -> list[Answer]:
        """See `Solver`. Facts: `votes` for the answer, `voters` (samples with an answer), `agreement` = votes / k."""
        answers = []
        for row, each in zip(ask.rows, draw(ask, self.k, self.temperature, self.top_p), strict=True):
            texts = [one.text for one in each]
            extracted = [judge(ask.task, row, text)[0].extracted for text in texts]
            chosen = elected(extracted)
            given = [ballot(each) for each in extracted if each is not None]
            votes = given.count(ballot(extracted[chosen] or ""))
            facts = {"votes": votes, "voters": len(given), "agreement": votes / self.k}
            answers.append(Answer(texts[chosen], samples=tuple(texts), facts=facts))
        return answers
