"""Abstentions read in two languages, and tables of models that always, never or rightly abstain."""

import math

import pandas as pd
import pytest

import workbench as wb
from workbench.measures.abstention import abstains, abstention_table, may_abstain, twins
from workbench.measures.perturbations import CANNOT
from workbench.prompts import few_shot
from workbench.statistics import wilson

ABSTAINS = (
    "It cannot be answered.",
    "I can't answer this.",
    "There is not enough information.",
    "We don't know how many. It is impossible to tell.",
    "The problem doesn't say how many she lost, so we cannot determine it.",
    "Insufficient data.",
    "No se puede saber.",
    "No se puede responder.",
    "Faltan datos para calcularlo.",
    "Es imposible determinar la respuesta.",
    "No hay suficiente información.",
    "No lo sé.",
    "I don’t know.",
    "The answer cannot be determined.",
    "The answer is: cannot be answered",
)
ANSWERS = (
    "The answer is 7.",
    "She can't carry more than 7. The answer is 7.",
    "I cannot tell at first. So I count: 3+4=7. The answer is 7.",
    "La respuesta es 7.",
    "No hay problema: 3+4=7. La respuesta es 7.",
    "",
    "She gives some to Bo.",
    "He does not have enough money, he has 7 left.",
)


@pytest.mark.parametrize("text", ABSTAINS)
def test_abstentions_are_read(text):
    assert abstains(text)


@pytest.mark.parametrize("text", ANSWERS)
def test_answers_are_no_abstentions(text):
    assert not abstains(text)


def table(task, rows, say) -> pd.Series:
    lines = []
    for row in rows:
        verdict = task.verify(row, say(row))
        line = {"id": row["id"], "condition": "model", "answer": str(row["answer"])}
        lines.append(line | {"extracted": verdict.extracted, "correct": verdict.correct})
    return abstention_table(pd.DataFrame(lines)).iloc[0]


def test_models_that_never_always_or_rightly_abstain(word_problems):
    task = twins(word_problems)
    rows = task.rows(n=30)
    assert len(rows) == 60 and sum(row["answer"] == CANNOT for row in rows) == 30
    guess = lambda row: f"The answer is {row.get('original_answer', row['answer'])}."  # noqa: E731  # never abstains
    never = table(task, rows, guess)
    assert math.isnan(never.precision) and never.recall == never.f1 == 0
    assert never.answered_unanswerable == 1 and never.selective_accuracy == 0.5
    always = table(task, rows, lambda row: "It cannot be answered.")
    assert (always.precision, always.recall, always.coverage) == (0.5, 1, 0) and always.f1 == pytest.approx(2 / 3)
    assert math.isnan(always.selective_accuracy) and always.abstained_answerable == 1
    rightly = table(task, rows, lambda row: "No se sabe." if row.get("unanswerable") else guess(row))
    assert (rightly.precision, rightly.recall, rightly.f1, rightly.selective_accuracy) == (1, 1, 1, 1)


def test_half_of_each_against_the_definition(word_problems):
    task = twins(word_problems)
    rows = task.rows(n=40)
    said = {row["id"]: place % 4 < 2 for place, row in enumerate(rows)}  # pairs: half of them abstain, both twins
    found = table(task, rows, lambda row: "Unanswerable." if said[row["id"]] else "The answer is -1.")
    assert (found.precision, found.recall, found.selective_accuracy) == (0.5, 0.5, 0)
    assert found.recall_low < 0.5 < found.recall_high and found.n == 80


def test_one_side_alone_is_refused(word_problems):
    with pytest.raises(ValueError, match=r"Evaluate twins\(task\)"):
        table(word_problems, word_problems.rows(n=3), lambda row: "The answer is 1.")


def test_svamp_has_twins(data_folder):
    task = twins(wb.load_task("svamp", path=data_folder))
    assert len(task.rows(n=50)) > 90
    assert may_abstain(few_shot()).system.endswith("cannot be answered.")


@pytest.mark.slow
def test_of_the_lab_model(lab, word_problems):
    """The lab model was never shown a question without an answer: it answers all the same."""
    found = wb.evaluate(lab, twins(word_problems), {"steps": few_shot("steps", 3)}, n=6, max_new_tokens=80)
    line = abstention_table(found.rows).iloc[0]
    assert line.n == 12 and line.recall == 0 and line.coverage > 0.5


def test_shares_of_all_or_none_keep_a_width(word_problems):
    task = twins(word_problems)
    rows = task.rows(n=20)
    rightly = table(
        task, rows, lambda row: "No se sabe." if row.get("unanswerable") else f"The answer is {row['answer']}."
    )
    wanted = wilson(20, 20).low
    assert rightly[["precision_low", "recall_low", "selective_accuracy_low"]].tolist() == pytest.approx([wanted] * 3)
    assert rightly.unread == 0 and rightly.unread_high == pytest.approx(wilson(0, 20).high)
