"""All changes of the questions at once: the same rates as each change alone, and nothing where nothing was right."""

import pytest

from tests.tiny import tiny_lm
from workbench.evaluation import evaluate
from workbench.measures.battery import COLUMNS, robustness_table
from workbench.measures.perturbations import change_number, change_quantifier, paraphrase
from workbench.measures.robustness import adapt_rate, keep_rate, perturbed
from workbench.models import LM
from workbench.prompts import instruction
from workbench.tasks import Task, load_task


def test_rates_are_those_of_each_change_alone(lab: LM, word_problems: Task) -> None:
    conditions = {"told": [instruction("steps")]}
    asked = {"n": 10, "seed": 3, "max_new_tokens": 80}
    before = evaluate(lab, word_problems, conditions, **asked).rows
    table = robustness_table(
        lab, word_problems, conditions, before, n=10, seed=3, max_new_tokens=80, changes=(paraphrase, change_number)
    )
    assert table.perturbation.tolist() == ["paraphrase", "change number"]
    for change, rate in ((paraphrase, keep_rate), (change_number, adapt_rate)):
        after = evaluate(lab, perturbed(word_problems, change, seed=3), conditions, **asked).rows
        alone = rate(before, after).iloc[0]
        line = table[table.perturbation == change.__name__.replace("_", " ")].iloc[0]
        assert line.rate == alone.rate
        assert (line.low, line.high, line.n) == (alone.low, alone.high, alone.n)


def test_nothing_right_leaves_an_empty_table_and_impossible_changes_are_left_out() -> None:
    lm, task = tiny_lm("llama"), load_task("leg-counting")
    before = evaluate(lm, task, {"plain": []}, n=4, max_new_tokens=3).rows
    assert not before.correct.any()
    table = robustness_table(
        lm, task, {"plain": []}, before, n=4, max_new_tokens=3, changes=(change_quantifier, paraphrase)
    )
    assert list(table.columns) == COLUMNS
    assert len(table) == 0
    with pytest.raises(ValueError, match="same conditions"):
        robustness_table(
            lm, task, {"other": []}, before.assign(correct=True), n=4, max_new_tokens=3, changes=(paraphrase,)
        )
