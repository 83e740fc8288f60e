"""Tables of arms over seeds: what is saved is not run again, and every arm of the shipped tables can be run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from workbench.claims import data_recipes, tuning_methods
from workbench.claims.over_seeds import run_cells, table
from workbench.generate import Generation
from workbench.interventions import Residual
from workbench.models import LM
from workbench.results import Results
from workbench.sandbox import isolation
from workbench.synthesis.programs import as_program
from workbench.synthesis.records import Data, load_data
from workbench.tasks import load_task


def _bench(lm: LM, kind: type[data_recipes.Bench] = data_recipes.Bench, **other: int) -> data_recipes.Bench:
    sizes: dict[str, Any] = {"questions": 16, "samples": 2, "tokens": 200, "epochs": 1, "n": 6, "limit": 80} | other
    return kind(lm, lm, lm, load_task("word-problems"), **sizes)


class Untrained(data_recipes.Bench):
    """All of an arm up to the training of its student."""

    def tested(self, seed: int, out: Path, cut: Data, name: str, made: Data, **rest: Any) -> Any:
        return None, self.facts(cut, made)


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
    assert 0 < mixed["learnt tokens"] <= 200
    with pytest.raises(AssertionError):  # other settings, other cells
        run_cells({"untrained": never}, [0], tmp_path, {"n": 7})


def test_an_arm_that_makes_nothing_is_told_and_left_out(lab: LM, tmp_path: Path) -> None:
    def nothing(seed: int, out: Path) -> tuple[Results, dict[str, Any]]:
        raise ValueError("no record was kept")

    arms = {"untrained": data_recipes.arms(_bench(lab))["untrained"], "nothing": nothing}
    found = table(run_cells(arms, [0, 1], tmp_path, {}), "untrained").set_index("arm")
    assert found.loc["nothing", "note"] == "seed 0: no record was kept; seed 1: no record was kept"
    assert found.loc["nothing", "seeds"] == 0
    assert found.loc["untrained", "n"] == 6


def test_a_kind_of_training_is_tried_at_a_multiple_of_its_rate(lab: LM, tmp_path: Path) -> None:
    bench = tuning_methods.Bench(lab, load_task("word-problems"), "tuning", questions=12, epochs=1, n=4, limit=60)
    results, facts = bench.trained(0, tmp_path, name="dora", rate=0.5, settings=tuning_methods.ARMS["dora"])
    assert len(results.rows) == 4
    assert facts["records"] > 0
    assert facts["MB"] > 0


def test_a_cell_that_failed_is_tried_again_and_told_beside_the_others(lab: LM, tmp_path: Path) -> None:
    plain, broken = data_recipes.arms(_bench(lab))["untrained"], [1]

    def mended(seed: int, out: Path) -> tuple[Results, dict[str, Any]]:
        if seed in broken:
            raise ValueError("not yet")
        return plain(seed, out)

    (line,) = table(run_cells({"untrained": mended}, [0, 1], tmp_path, {}), "untrained").to_dict("records")
    assert (line["seeds"], line["note"]) == (1, "seed 1: not yet")
    broken.clear()
    (line,) = table(run_cells({"untrained": mended}, [0, 1], tmp_path, {}), "untrained").to_dict("records")
    assert line["seeds"] == 2
    assert "note" not in line


def test_a_probe_scores_no_record_that_it_was_fitted_on(
    lab: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench.synthesis import scores

    fitted, real = [], scores.probed

    def probed(records: list, *, lm: LM, right: list, wrong: list) -> list[float]:
        assert not {r["row_id"] for r in records} & {r["row_id"] for r in (*right, *wrong)}
        fitted.append(len(records))
        return real(records, lm=lm, right=right, wrong=wrong)

    monkeypatch.setattr(scores, "probed", probed)
    bench = _bench(lab, Untrained, questions=24)
    _, facts = data_recipes.arms(bench)["best by probe"](0, tmp_path)
    assert len(fitted) == 2
    assert sum(fitted) == facts["kept"]


@pytest.mark.skipif(not isolation(), reason="bubblewrap is missing or can't start here")
def test_the_student_s_own_programs_are_judged_by_what_they_print(
    lab: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student that writes its questions' programs as it was taught: all of them are kept, and both rounds counted."""
    bench = _bench(lab, Untrained, questions=4)
    right = {row["question"]: as_program(row) for row in bench.task.rows("train", n=4, seed=100)}
    real = LM.generate

    def generate(self: LM, prompts: list, *args: Any, **settings: Any) -> list[Generation]:
        texts = [next((p for q, p in right.items() if q in prompt and prompt.count("<|user|>") == 1), None)
                 for prompt in prompts]  # fmt: skip
        if None in texts:
            return real(self, prompts, *args, **settings)
        return [Generation(str(text), [1], 3, 9, 0.0, True, 1) for text in texts]

    monkeypatch.setattr(LM, "generate", generate)
    _, facts = data_recipes.arms(bench)["programs, the student's own"](0, tmp_path)
    own = load_data(tmp_path / "own-programs")
    assert [record["messages"][-1]["content"] for record in own.kept] == list(right.values())
    first = load_data(tmp_path / "records")
    assert facts["kept"] == len(own.kept) + len(first.kept)
    assert facts["calls"] == own.card["cost"]["calls"] + first.card["cost"]["calls"]


def test_stages_count_all_that_they_hand_over(lab: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = SimpleNamespace(adapter=Residual({3: torch.zeros(lab.d_model)}, "all"))
    monkeypatch.setattr(data_recipes, "finetune_stages", lambda *args, **settings: nothing)
    bench = _bench(lab, questions=8, tokens=60)
    _, facts = data_recipes.arms(bench)["steps internalised in stages"](0, tmp_path)
    stages = [load_data(folder) for folder in sorted((tmp_path / "arms").iterdir())]
    assert len(stages) == 5
    assert facts["records"] == sum(len(stage) for stage in stages)
    assert facts["learnt tokens"] == sum(record["tokens_out"] for stage in stages for record in stage)
