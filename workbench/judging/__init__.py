"""Judgements of answers that no verifier decides: a model or a person says which of two is better, or gives a grade.

`judge_pairs` and `grade_answers` ask a model, `widgets.rate` a person, `agreement` says what their verdicts are worth,
against the verifier and against each other. All work on `Results` and keep their rows in files that are gone on from.
"""

from workbench.judging.agreements import Agreement, agreement
from workbench.judging.grades import Graded, grade_answers
from workbench.judging.pairs import Judged, judge_pairs
from workbench.judging.votes import Ballot, open_ballot, read_votes

__all__ = [
    "Agreement",
    "Ballot",
    "Graded",
    "Judged",
    "agreement",
    "grade_answers",
    "judge_pairs",
    "open_ballot",
    "read_votes",
]
