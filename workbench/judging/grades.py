"""A model as judge of one answer at a time: a grade by a rubric, for every answer of every condition.

Cheaper than pairs (one call an answer) and comparable between many conditions, but coarser: most judges use two or
three of the grades. Whether grades follow the truth shows in their mean for right and for wrong answers
(`Graded.table`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from workbench.files import content_key
from workbench.judging.asking import Job, asked
from workbench.judging.pairs import Prompt, as_turn, prompt_writer
from workbench.judging.questions import question_texts
from workbench.judging.replies import (
    best,
    by_letters,
    by_text,
    check_judge,
    expected_grade,
    identity,
    read_grade,
    without_special,
)
from workbench.results import Results
from workbench.statistics import Comparison, bootstrap_mean, paired_difference
from workbench.tasks.answers import final_text

if TYPE_CHECKING:
    from workbench.interventions import Intervention
    from workbench.models import LM
    from workbench.served import Served
    from workbench.tasks import Task

RUBRIC = (
    "Grade an answer to a question from 1 to 5: 5 right and every step sound; 4 right with a small slip in a step; "
    "3 wrong after mostly sound steps; 2 wrong; 1 no answer to the question.\n\nQuestion: {question}\n\n"
    "Answer: {answer}\n\nReply with one digit from 1 to 5."
)


@dataclass(frozen=True)
class Graded:
    """One row an answer: id, condition, correct, grade (None where unparsed), tokens; `expected` where read by letters.

    `expected` is the mean of the grades weighted by their probabilities: it moves where the likeliest grade does not.
    """

    rows: pd.DataFrame
    about: dict[str, Any]

    def table(self, level: float = 0.95) -> pd.DataFrame:
        """One row a condition: mean grade with its bootstrap interval, share unparsed, mean for right and for wrong."""
        lines = []
        for name, group in self.rows.groupby("condition", sort=False):
            read = group[group.grade.notna()]
            line: dict[str, Any] = {"condition": name, "n": len(group), "unparsed": float(group.grade.isna().mean())}
            if len(read):
                mean = bootstrap_mean(read.grade.to_numpy(float), level=level)
                line |= {"grade": mean.estimate, "low": mean.low, "high": mean.high, "note": mean.note}
            for truth in (True, False):
                part = read[read.correct == truth]
                line["grade_right" if truth else "grade_wrong"] = part.grade.astype(float).mean() if len(part) else None
            lines.append(line)
        return pd.DataFrame(lines)

    def compare(self, a: str, b: str, level: float = 0.95) -> Comparison:
        """Paired difference of grades, b - a, over the questions where both could be read."""
        sides = []
        for name in (a, b):
            side = self.rows[(self.rows.condition == name) & self.rows.grade.notna()]
            if side.empty:
                names = ", ".join(map(str, self.rows.condition.unique()))
                raise ValueError(f"No grade of condition {name!r} could be read. Conditions: {names}.")
            sides.append(side.set_index("id").grade.astype(float))
        shared = sides[0].index.intersection(sides[1].index)
        return paired_difference(sides[0][shared].tolist(), sides[1][shared].tolist(), level)


def grade_answers(
    lm: "LM | Served",
    results: Results,
    conditions: Sequence[str] | None = None,
    *,
    rubric: Prompt = RUBRIC,
    scale: tuple[int, int] = (1, 5),
    questions: "Mapping[str, str] | Task | None" = None,
    by: Literal["text", "letters"] = "text",
    interventions: "Intervention | None" = None,
    max_new_tokens: int = 16,
    out: str | Path | None = None,
) -> Graded:
    """Grade every answer of `conditions` (default: all) on a scale of whole numbers.

    rubric: text with {question} and {answer}, or a function of both. The other arguments, the file and the errors are
    those of `judge_pairs`.
    """
    check_judge(lm, by, interventions)
    names = results.conditions if conditions is None else list(conditions)
    unknown = [name for name in names if name not in results.conditions]
    if unknown or not names:
        raise ValueError(f"No condition {unknown or names} in these results. Use of: {', '.join(results.conditions)}.")
    if not scale[0] < scale[1] or (by == "letters" and not 0 <= scale[0] <= scale[1] <= 9):
        raise ValueError(f"scale={scale}: give a lowest and a higher grade, (1, 5); single digits with by='letters'.")
    grades, texts = range(scale[0], scale[1] + 1), question_texts(results, questions)
    write = prompt_writer(rubric, ("question", "answer"))
    wanted = results.rows[results.rows.condition.isin(names)]
    jobs: list[Job] = []
    for number, row in enumerate(wanted.itertuples(index=False)):
        text = write(without_special(lm, texts[str(row.id)]), without_special(lm, str(row.output)))
        jobs.append({"number": number, "id": str(row.id), "condition": row.condition, "prompt": as_turn(text)})
    about = identity(lm, interventions) | {"kind": "grades", "scale": list(scale), "by": by, "answers": len(jobs)}
    about |= {"max_new_tokens": max_new_tokens} if by == "text" else {}
    about["prompts"] = content_key(prompts=[job["prompt"] for job in jobs])[:16]
    file = Path(out) if out is not None else None
    found = asked(file, about, jobs, partial(_ask, lm, by, interventions, max_new_tokens, grades))
    table = pd.DataFrame(found).assign(correct=wanted.correct.to_numpy(dtype=bool))
    return Graded(table.assign(grade=table.grade.astype("Int64")).replace({np.nan: None}), about)


def _ask(lm: Any, by: str, change: Any, limit: int, grades: Sequence[int], jobs: list[Job]) -> list[dict[str, Any]]:
    prompts = [job["prompt"] for job in jobs]
    if by == "text":
        return [
            {**reply, "grade": read_grade(final_text(reply["text"]), grades)}
            for reply in by_text(lm, prompts, change, limit)
        ]
    answered = []
    for reply in by_letters(lm, prompts, change, [str(grade) for grade in grades]):
        top = best(reply["scores"])
        expected = expected_grade(reply["scores"])
        answered.append({**reply, "grade": None if top is None else int(top), "expected": expected})
    return answered
