"""Conditions alone equal conditions together, resumed equals uninterrupted, strength 0 equals plain."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.tiny import tiny_lm
from workbench.evaluation import evaluate, peak_memory
from workbench.grid import best, grid
from workbench.interventions import Residual, extract
from workbench.models import LM
from workbench.prompts import contrast, instruction
from workbench.results import load_results, shows_steps
from workbench.statistics import paired_difference, wilson
from workbench.tasks import Task

SAME = ["id", "condition", "prompt", "output", "extracted", "correct", "tokens_in", "tokens_out", "forward_passes"]


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm("llama")


def push(lm: LM, strength: float = 3.0) -> Residual:
    generator = torch.Generator().manual_seed(1)
    return strength * Residual({1: torch.randn(lm.d_model, generator=generator)}, positions="all")


def test_conditions_together_equal_each_alone(lm: LM, word_problems: Task) -> None:
    conditions = {"plain": [], "pushed": [push(lm)], "told": [instruction("steps")], "both": [push(lm), instruction()]}
    together = evaluate(lm, word_problems, conditions, n=4, max_new_tokens=8)
    assert together.rows.groupby("condition").output.apply(tuple).nunique() == 4  # each condition does something
    for name, condition in conditions.items():
        alone = evaluate(lm, word_problems, {name: condition}, n=4, max_new_tokens=8)
        seen = together.rows[together.rows.condition == name].reset_index(drop=True)
        pd.testing.assert_frame_equal(alone.rows[SAME], seen[SAME])


def test_strength_zero_is_plain(lm: LM, word_problems: Task) -> None:
    results = evaluate(lm, word_problems, {"plain": [], "zero": [0.0 * push(lm)]}, n=4, max_new_tokens=8)
    plain, zero = (group.output.tolist() for _, group in results.rows.groupby("condition", sort=False))
    assert plain == zero


def test_table_and_comparison_come_from_the_rows(lm: LM, word_problems: Task) -> None:
    results = evaluate(lm, word_problems, {"plain": [], "pushed": [push(lm)]}, n=6, max_new_tokens=8)
    flags = {"plain": [True, True, False, False, False, True], "pushed": [False, True, False, False, False, False]}
    for name, right in flags.items():
        results.rows.loc[results.rows.condition == name, "correct"] = right
    table = results.table().set_index("condition")
    assert (table.accuracy["plain"], table.low["plain"]) == (0.5, wilson(3, 6).low)
    assert results.compare("plain", "pushed") == paired_difference(flags["plain"], flags["pushed"])
    assert results.comparisons().p_holm[0] == results.compare("plain", "pushed").p_value
    assert table.model_calls["plain"] >= 8
    assert table.peak_memory_mb["plain"] > 50
    assert table.tokens_in["plain"] == results.rows[results.rows.condition == "plain"].tokens_in.mean()


def test_a_finished_condition_is_not_run_again_and_a_damaged_one_is(
    lm: LM, word_problems: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions = {"plain": [], "pushed": [push(lm)]}
    first = evaluate(lm, word_problems, conditions, n=4, max_new_tokens=8, out=tmp_path)
    files = sorted((tmp_path / "conditions").glob("*.json"))
    files[0].write_text(files[0].read_text()[:100])
    runs: list[int] = []
    original = type(lm).generate

    def counted(self: LM, prompts: list[str], *args: object, **kwargs: object) -> object:
        runs.append(len(prompts))
        return original(self, prompts, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(lm), "generate", counted)
    again = evaluate(lm, word_problems, conditions, n=4, max_new_tokens=8, out=tmp_path)
    assert runs == [4]  # only the damaged condition
    pd.testing.assert_frame_equal(first.rows[SAME], again.rows[SAME])
    evaluate(lm, word_problems, {"pushed": [push(lm, 2.0)]}, n=4, max_new_tokens=8, out=tmp_path)
    assert runs == [4, 4]  # another strength is another condition
    loaded = load_results(tmp_path)
    assert loaded.conditions == ["pushed"]
    assert json.loads((tmp_path / "costs.json").read_text())["about"]["n"] == 4


def test_what_makes_no_condition_is_refused_before_any_work(lm: LM, word_problems: Task) -> None:
    with pytest.raises(ValueError, match="holds a str"):
        evaluate(lm, word_problems, {"plain": ["steps"]}, n=2)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="Keep one"):
        evaluate(lm, word_problems, {"two": [instruction("steps"), instruction("long")]}, n=2)
    with pytest.raises(ValueError, match="No conditions"):
        evaluate(lm, word_problems, {}, n=2)
    with pytest.raises(ValueError, match="width 8"):
        evaluate(lm, word_problems, {"foreign": [Residual({0: torch.zeros(8)})]}, n=2)
    with pytest.raises(ValueError, match="Conditions: plain"):
        evaluate(lm, word_problems, {"plain": []}, n=2, max_new_tokens=2).compare("plain", "tuned")


def test_grid_equals_one_cell_at_a_time(lm: LM, word_problems: Task) -> None:
    cells = [({"strength": strength}, push(lm, strength)) for strength in (0.0, 1.0, 4.0)]
    together = grid(lm, word_problems, cells, n=3, max_new_tokens=8)
    alone = pd.concat([grid(lm, word_problems, [cell], n=3, max_new_tokens=8) for cell in cells], ignore_index=True)
    pd.testing.assert_frame_equal(together, alone)
    with pytest.raises(ValueError, match="tuning"):
        grid(lm, word_problems, cells, split="test")


def test_best_takes_the_weakest_of_equals() -> None:
    table = pd.DataFrame({"strength": [4.0, 1.0, 2.0, 0.5], "accuracy": [0.9, 0.9, 0.9, 0.2]})
    assert best(table)["strength"] == 1.0


def test_shows_steps_needs_an_equation() -> None:
    assert shows_steps("12 + 5 = 17, so 17")
    assert not shows_steps("The answer is 12, not 5")


def test_peak_memory_sees_a_large_tensor() -> None:
    with peak_memory(torch.device("cpu"), every=0.005) as small:
        pass
    with peak_memory(torch.device("cpu"), every=0.005) as large:
        block = torch.ones(64, 2**20)
        for _ in range(20):
            block = block * 1.0001
    assert large() > small() + 200


def test_strengths_may_come_from_a_data_frame(lm: LM, word_problems: Task) -> None:
    """NumPy's float64 is what a cell of a frame holds; it is the number that it says."""
    pairs = contrast(word_problems, shots=1, n=2, lm=lm)
    kv, v = extract(lm, pairs, site="kv"), extract(lm, pairs)
    prompts = [word_problems.messages(row) for row in word_problems.rows(n=2)]
    for half, plain in ((np.float64(4.0) * v, 4.0 * v), (kv.scaled(values=np.float64(4.0)), kv.scaled(values=4.0))):
        given, wanted = (lm.generate(prompts, change, max_new_tokens=6) for change in (half, plain))
        assert [each.token_ids for each in given] == [each.token_ids for each in wanted]
    labels = best(pd.DataFrame({"strength": [1.0], "keys": [0.5], "accuracy": [0.2]}))
    assert type(labels["keys"]) is float
