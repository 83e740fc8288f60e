"""A small model before a large one: it drafts, and the large model is asked only where the draft is in doubt.

`HandOver` reads the doubt from the small model itself, `DraftVerify` from how likely the large model finds the draft,
in one forward. `choose_threshold` picks the doubt above which the large model answers, on tuning questions.
Cascades: FrugalGPT, arXiv 2305.05176. The condition's model is the large one; its interventions do not reach the small
one. Not covered: more than two models, speculative decoding (token by token, arXiv 2211.17192).
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from workbench.divergence import TokenScores
from workbench.evaluation.asking import Answer, Ask
from workbench.evaluation.judging import judge
from workbench.evaluation.stored import ballot
from workbench.generate import Generation
from workbench.models import LM
from workbench.results import Results
from workbench.tasks.answers import reopened

__all__ = ["Choice", "DraftVerify", "HandOver", "choose_threshold"]

MEASURES = ("entropy", "margin", "probability", "disagreement")


@dataclass(frozen=True)
class HandOver:
    """The small model answers; where its doubt is above the threshold, the large one answers instead.

    measure: 'entropy' of the next token in nats, 'margin' (1 minus how far the likeliest token is ahead), 'probability'
    (minus the log-probability, in nats), each over the tokens of the answer ('mean' or 'max' by `over`), or
    'disagreement', the share of `samples` at `temperature` that end in another answer than the greedy one (or in none:
    a draft without an answer is agreed to by nobody; equal numbers are one answer). Reading the first three costs the
    small model a second forward over its answer, which is counted; a loop of its own could save it. Facts: doubt,
    handed_over; the draft is the row's sample. threshold: infinity hands over nothing.
    """

    small: LM
    threshold: float
    measure: str = "entropy"
    over: str = "mean"
    samples: int = 4
    temperature: float = 0.7

    def __post_init__(self) -> None:
        if self.measure not in MEASURES or self.over not in ("mean", "max") or self.samples < 1:
            raise ValueError(
                f"measure={self.measure!r}, over={self.over!r}, samples={self.samples}: measure is one of "
                f"{', '.join(MEASURES)}, over is 'mean' or 'max', samples is 1 or more."
            )
        if self.measure == "disagreement" and not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}: samples would all be the greedy answer, and none would disagree. "
                "Give temperature=0.7."
            )

    def solve(self, ask: Ask) -> list[Answer]:
        """See `evaluation.Solver`."""
        prompts, drafts = _drafted(ask, self.small)
        told = _told(prompts, drafts)
        if self.measure == "disagreement":
            doubts = self._disagreement(ask, prompts, told)
        else:
            texts = [draft.token_ids for draft in drafts]
            scores = ask.score(prompts, texts, range(len(ask.rows)), by=(self.small, None))
            doubts = [_doubt(each, self.measure, self.over) for each in scores]
        return _answered(ask, told, doubts, self.threshold)

    def _disagreement(self, ask: Ask, prompts: list[str], drafts: list[str]) -> list[float]:
        rows = [row for row in range(len(ask.rows)) for _ in range(self.samples)]
        draws = [1 + draw for _ in drafts for draw in range(self.samples)]
        asked = [prompts[row] for row in rows]
        found = ask.generate(asked, rows, lm=self.small, temperature=self.temperature, draws=draws)
        greedy = [_ballot(ask, row, draft) for row, draft in enumerate(drafts)]
        votes = [_ballot(ask, row, text) for row, text in zip(rows, _told(asked, found), strict=True)]
        apart = Counter(row for row, vote in zip(rows, votes, strict=True) if vote is None or vote != greedy[row])
        return [apart[row] / self.samples for row in range(len(drafts))]


@dataclass(frozen=True)
class DraftVerify:
    """A small model drafts the answer; the large one keeps it, or writes its own where it finds the draft unlikely.

    threshold: mean nats a token (minus the log-probability under the large model, one forward) above which a draft is
    rewritten; infinity keeps all. Facts: doubt (those nats), handed_over; the draft is the row's sample.
    """

    draft: LM
    threshold: float

    def solve(self, ask: Ask) -> list[Answer]:
        """See `evaluation.Solver`."""
        prompts, drafts = _drafted(ask, self.draft)
        rows = range(len(ask.rows))
        alike = self.draft.tokenizer.get_vocab() == ask.lm.tokenizer.get_vocab()
        texts = [draft.token_ids if alike else ask.lm.encode(draft.text or " ") for draft in drafts]
        scores = ask.score([ask.prompt(row) for row in rows], texts, rows)
        doubts = [_doubt(each, "probability", "mean") for each in scores]
        return _answered(ask, _told(prompts, drafts), doubts, self.threshold)


def _drafted(ask: Ask, small: LM) -> tuple[list[str], list[Generation]]:
    """The small model's prompts and its answers to them."""
    prompts = [small.render(ask.messages(row)) for row in range(len(ask.rows))]
    return prompts, ask.generate(prompts, range(len(prompts)), lm=small)


def _told(prompts: list[str], found: list[Generation]) -> list[str]:
    """Answers as the task judges them."""
    return [reopened(prompt, one.text) for prompt, one in zip(prompts, found, strict=True)]


def _ballot(ask: Ask, row: int, text: str) -> str | None:
    extracted = judge(ask.task, ask.rows[row], text)[0].extracted
    return None if extracted is None else ballot(extracted)


def _doubt(scores: TokenScores, measure: str, over: str) -> float:
    tokens = {"entropy": scores.entropy, "margin": 1 - scores.margin, "probability": -scores.logprobs}[measure]
    return round(float(tokens.max() if over == "max" else tokens.mean()), 6)


def _answered(ask: Ask, drafts: list[str], doubts: list[float], threshold: float) -> list[Answer]:
    """The large model's answer where the doubt is above the threshold, else the draft."""
    over = [row for row, doubt in enumerate(doubts) if doubt > threshold]
    prompts = [ask.prompt(row) for row in over]
    large = dict(zip(over, _told(prompts, ask.generate(prompts, over)), strict=True))
    answers = []
    for row, (draft, doubt) in enumerate(zip(drafts, doubts, strict=True)):
        facts = {"doubt": doubt, "handed_over": row in large}
        answers.append(Answer(large.get(row, draft), samples=(draft,), facts=facts))
    return answers


@dataclass(frozen=True)
class Choice:
    """A threshold, and what it did on the questions that it was chosen on."""

    threshold: float
    share: float
    accuracy: float
    n: int


def choose_threshold(
    results: Results, cascade: str, large: str, *, share: float | None = None, loss: float = 0.0
) -> Choice:
    """The threshold that hands over the fewest questions and loses at most `loss` accuracy to the best threshold.

    results: of the tuning split, with a condition `cascade` (at any threshold) and one of the `large` model alone.
    share: instead, the most accurate threshold that hands over at most this share of the questions.
    Raises ValueError for results of the test split, or a condition without a doubt in its rows.
    """
    if results.about.get("split") == "test":
        raise ValueError("A threshold chosen on the test split would flatter what is reported. Use split='tuning'.")
    rows = results.rows[results.rows.condition == cascade].set_index("id")
    if "doubt" not in rows or rows.empty or rows.doubt.isna().any():
        raise ValueError(f"Condition {cascade!r} holds no doubts; it is answered by HandOver or DraftVerify.")
    doubts = rows.doubt.to_numpy(float)
    small = np.array([samples[0]["correct"] for samples in rows.samples])
    other = results.correct(large).loc[rows.index].to_numpy(bool)
    found = []
    for threshold in (-np.inf, *np.unique(doubts)):
        over = doubts > threshold
        found.append(
            Choice(float(threshold), float(over.mean()), float(np.where(over, other, small).mean()), len(rows))
        )
    if share is not None:
        return min((each for each in found if each.share <= share), key=lambda each: (-each.accuracy, each.share))
    best = max(each.accuracy for each in found)
    return min((each for each in found if each.accuracy >= best - loss - 1e-9), key=lambda each: each.share)
