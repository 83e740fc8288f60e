"""Tables of arms over seeds: what is saved is not run again, and every arm of the shipped tables can be run."""

from pathlib import Path
from typing import Any

import pytest

from workbench.claims import data_recipes, tuning_methods
from workbench.claims.over_seeds import run_cells, table
from workbench.models import LM
from workbench.results import Results
from workbench.tasks import load_task


def _bench(lm: LM) -> data_recipes.Bench:
    task = load_task("word-problems")
    return data_recipes.Bench(lm, lm, lm, task, questions=16, samples=2, tokens=200, epochs=1, n=6, limit=80)


def test_every_data_recipe_is_an_arm_of_the_table(lab: LM) -> None:
    arms = data_recipes.arms(_bench(lab))
    assert {"untrained", data_recipes.BASELINE, "weak 1/2, strong 1/2", "programs, the student's own"} <= set(arms)
    assert "paced by the student" not in arms  # it needs a teacher that is another model


def test_a_table_of_recipes_equals_its_own_second_run_without_work(lab: LM, tmp_path: Path) -> None:
    every = data_recipes.arms(_bench(lab))
    arms = {name: every[name] for name in ("untrained", data_recipes.BASELINE, "long 1/4, short 3/4")}
    first = table(run_cells(arms, [0], tmp_path, {"n": 6}), data_recipes.BASELINE)

    def never(seed: int, out: Path) -> tuple[Results, dict[str, Any]]:
        raise AssertionError("this cell was saved")

    again = table(run_cells(dict.fromkeys(arms, never), [0], tmp_path, {"n": 6}), data_recipes.BASELINE)
    assert again.equals(first)
    assert list(first.arm) == list(arms)
    assert (first.seeds == 1).all()
    mixed = first.set_index("arm").loc["long 1/4, short 3/4"]
    assert 0 < mixed["learnt tokens"] <= 200 + 160  # the last record may pass the budget
    with pytest.raises(AssertionError):  # other settings, other cells
        run_cells({"untrained": never}, [0], tmp_path, {"n": 7})


def test_an_arm_that_makes_nothing_is_told_and_left_out(lab: LM, tmp_path: Path) -> None:
    def nothing(seed: int, out: Path) -> tuple[Results, dict[str, Any]]:
        raise ValueError("no record was kept")

    arms = {"untrained": data_recipes.arms(_bench(lab))["untrained"], "nothing": nothing}
    found = table(run_cells(arms, [0, 1], tmp_path, {}), "untrained").set_index("arm")
    assert found.loc["nothing", "note"] == "no record was kept"
    assert found.loc["nothing", "seeds"] == 0
    assert found.loc["untrained", "n"] == 6


def test_a_kind_of_training_is_tried_at_a_multiple_of_its_rate(lab: LM, tmp_path: Path) -> None:
    bench = tuning_methods.Bench(lab, load_task("word-problems"), "tuning", questions=12, epochs=1, n=4, limit=60)
    results, facts = bench.trained(0, tmp_path, name="dora", rate=0.5, settings=tuning_methods.ARMS["dora"])
    assert len(results.rows) == 4
    assert facts["records"] > 0
    assert facts["MB"] > 0
