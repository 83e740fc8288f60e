"""Complements against truth by evaluation, and models that say yes, that read the question, and that change with it."""

import re

import pandas as pd
import pytest

from workbench.measures.consistency import (
    comparisons,
    complement,
    consistency_table,
    exclusive,
    paraphrased,
    same_answers,
)
from workbench.measures.syllogisms import follows, parsed
from workbench.tasks import load_task


def answered(task, rows, say, condition="model") -> pd.DataFrame:
    lines = []
    for row in rows:
        verdict = task.verify(row, say(row))
        line = {"id": row["id"], "condition": condition, "extracted": verdict.extracted, "correct": verdict.correct}
        lines.append(line)
    return pd.DataFrame(lines).astype({"extracted": object})


def test_boolean_expressions_and_their_negation(data_folder):
    task = exclusive(load_task("bbh:boolean_expressions", path=data_folder))
    rows = task.rows(n=60)
    assert len(rows) == 120
    for row in rows:
        assert str(eval(row["question"].removesuffix(" is"))) == row["answer"]
    yes = answered(task, rows, lambda row: "True.", "yes")
    reads = answered(task, rows, lambda row: f"The answer is {row['answer']}.", "reads")
    silent = answered(task, rows, lambda row: "" if row["id"] == "boolean_expressions-00208" else "False", "silent")
    found = consistency_table(pd.concat([yes, reads, silent])).set_index("condition")
    kinds = ["both_yes", "both_no", "one", "unread"]
    assert found.loc["yes", kinds].tolist() == [1, 0, 0, 0] and found.loc["yes", "yes"] == 1
    assert found.loc["reads", kinds].tolist() == [0, 0, 1, 0] and found.loc["reads", "both_right"] == 1
    assert found.loc["silent", kinds].tolist() == pytest.approx([0, 59 / 60, 0, 1 / 60])
    assert found.loc["reads", "one_low"] < 1 and (found.n == 60).all()
    half = answered(task, rows, lambda row: "True" if int(row["cluster"][-1]) % 2 else row["answer"])
    odd = sum(int(row["cluster"][-1]) % 2 for row in rows) / len(rows)
    assert consistency_table(half).both_yes[0] == pytest.approx(odd)


def test_syllogisms_never_have_two_that_follow():
    pytest.importorskip("reasoning_gym", reason="the syllogisms are drawn from it")
    task = exclusive(load_task("syllogism"))
    rows = {row["id"]: row for row in task.rows(n=120)}
    pairs = [(row, rows[f"{name}~not"]) for name, row in rows.items() if not name.endswith("~not")]
    assert len(pairs) > 40
    for row, other in pairs:
        assert not row["answer"] == other["answer"] == "Yes"
        for each in (row, other):
            assert ("Yes" if follows(*parsed(each["question"])) else "No") == each["answer"]
    assert any(row["answer"] == other["answer"] == "No" for row, other in pairs)
    assert len({row["answer"] for row, _ in pairs}) == 2
    wrong = "Consider these statements: 1. All cats are pets 2. Some pets are kind Does it logically follow that: "
    wrong += "Some cats are kind? (Answer Yes or No)"
    assert "not what follows" in complement({"question": wrong, "answer": "Yes"})
    clash = "Consider these statements: 1. All cats are pets 2. No cats are pets Does it logically follow that: "
    assert "contradict" in complement({"question": clash + "All cats are pets? (Answer Yes or No)", "answer": "Yes"})
    assert complement({"question": "What is 1 + 1?", "answer": "2"}) == "no rule makes its complement"


def test_comparisons():
    task = comparisons()
    splits = {split: task.rows(split, n=80) for split in ("train", "tuning", "test")}
    pairs = [frozenset(re.findall(r"\d+", row["question"])) for rows in splits.values() for row in rows]
    assert len(set(pairs)) == 240
    for row in exclusive(task).rows(n=80):
        a, b = map(int, re.findall(r"\d+", row["question"]))
        assert row["answer"] == ("Yes" if a > b else "No")
    assert task.rows(n=5) == task.rows(n=9)[:5] and task.verify(row, f"The answer is {row['answer']}.").correct
    with pytest.raises(ValueError, match="asked for"):
        comparisons(9).rows(n=100)


def test_one_side_alone_is_refused(word_problems):
    task = comparisons()
    rows = task.rows(n=4)
    with pytest.raises(ValueError, match=r"Evaluate exclusive\(task\)"):
        consistency_table(answered(task, rows, lambda row: "Yes"))
    with pytest.raises(ValueError, match=r"Evaluate paraphrased\(task\)"):
        same_answers(answered(task, rows, lambda row: "Yes"))
    with pytest.raises(ValueError, match=r"no rule makes its complement \(3\)"):
        exclusive(word_problems).rows(n=3)


def test_same_answers_over_wordings(word_problems):
    task = paraphrased(word_problems, 3)
    rows = task.rows(n=30)
    groups = pd.DataFrame(rows).groupby("cluster")
    assert (groups.question.nunique() == groups.size()).all() and (groups.answer.nunique() == 1).all()
    assert groups.size().max() == 4
    steady = same_answers(answered(task, rows, lambda row: "The answer is 7.")).iloc[0]
    assert (steady.agreement, steady.all_same) == (1, 1) and steady.accuracy < 0.2
    fours = [row for row in rows if (groups.size() == 4)[row["cluster"]]]
    drifts = lambda row: f"The answer is {int(row['id'][-1]) // 2}."  # noqa: E731  # 0, 0, 1, 1: 2 of 6 pairs agree
    found = same_answers(answered(task, fours, drifts)).iloc[0]
    assert found.agreement == pytest.approx(1 / 3) and found.all_same == 0
    mute = same_answers(answered(task, fours, lambda row: "")).iloc[0]
    assert mute.agreement == 0 and mute.unparsed == 1
