"""The page of many conditions holds what the kept rows say, and their costs."""

from pathlib import Path

import pytest

from tests.tiny import tiny_lm
from workbench.claims.conditions_page import page
from workbench.evaluation import evaluate
from workbench.prompts import instruction
from workbench.report.tables import format_table
from workbench.tasks import Task, load_task


def test_the_page_is_made_from_kept_rows(word_problems: Task, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no results"):
        page(tmp_path)
    conditions = {"plain": [], "told": [instruction("steps")]}
    tasks = {"word-problems": word_problems, "chain-sum": load_task("chain-sum")}
    for name, task in tasks.items():
        evaluate(tiny_lm("llama"), task, conditions, n=4, max_new_tokens=4, out=tmp_path / "tiny" / name)
    text = page(tmp_path)
    head, first, *_ = text.split("### ")
    assert "| condition | word-problems, n 4 | chain-sum, n 4 |" in head
    assert head.count("0.00 [0.00, 0.49]") == 4  # Wilson's limits of 0 of 4
    assert "tokens in" in first and "p (Holm)" in first
    assert format_table([{"condition": "plain", "n": 4}]).splitlines()[1].split() == first.splitlines()[4].split()[:2]
