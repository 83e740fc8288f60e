"""Flips between batch sizes: none in float32, and counted right where there are some."""

from dataclasses import replace

import pytest

from tests.tiny import tiny_lm
from workbench.claims.batch_flips import _line, flips
from workbench.evaluation import evaluate
from workbench.statistics import wilson
from workbench.tasks import Task


def test_float32_does_not_flip(word_problems: Task) -> None:
    table = flips(tiny_lm("llama"), word_problems, n=5, sizes=(1, 2, 5), limit=6)
    assert table.batch.tolist() == ["2 against 1", "5 against 1"]
    assert all(text.startswith("0.000 [0.000, ") for text in [*table["texts differ"], *table["verdicts differ"]])
    with pytest.raises(ValueError, match="two or more batch sizes"):
        flips(tiny_lm("llama"), word_problems, sizes=(4,))


def test_differences_are_counted_by_question_and_not_by_place(word_problems: Task) -> None:
    one = evaluate(tiny_lm("llama"), word_problems, {"x": []}, n=6, max_new_tokens=4)
    rows = one.rows.copy()
    rows.loc[[0, 2], "output"] = "other words"
    rows.loc[2, "correct"] = not rows.correct[2]
    line = _line(tiny_lm("llama"), 1, 7, one, replace(one, rows=rows.iloc[::-1]))
    for name, count in (("texts differ", 2), ("verdicts differ", 1)):
        interval = wilson(count, 6)
        assert line[name] == f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
