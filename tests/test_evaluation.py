"""Conditions alone equal conditions together, resumed equals uninterrupted, strength 0 equals plain."""

import json
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import tiny_lm
from workbench.evaluation import Answer, Ask, cost, evaluate, peak_memory
from workbench.evaluation.cost import forward_flops
from workbench.grid import best, grid
from workbench.interventions import Residual, extract
from workbench.models import LM
from workbench.prompts import contrast, instruction
from workbench.results import load_results, shows_steps
from workbench.statistics import paired_difference, wilson
from workbench.tasks import Task, Verdict

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


def test_what_was_not_parsed_is_none_made_and_read_back(lab: LM, word_problems: Task, tmp_path: Path) -> None:
    found = evaluate(lab, word_problems, {"cut": [], "also": [push(lab)]}, n=4, max_new_tokens=1, out=tmp_path)
    verdicts = [word_problems.verify(row, text) for row, text in zip(
        word_problems.rows("test", n=4, seed=0), found.rows.output[:4], strict=True)]  # fmt: skip
    assert any(verdict.extracted is None for verdict in verdicts)
    for rows in (found.rows, load_results(tmp_path).rows):
        assert rows.extracted.dtype == object
        assert rows.extracted.tolist()[:4] == [verdict.extracted for verdict in verdicts]
        assert [text is None for text in rows.extracted] == rows.unparsed.tolist()


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
    files = sorted((tmp_path / "conditions").rglob("*.json"))
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


def test_rows_are_kept_for_the_same_task_gold_answers_and_surroundings_alone(
    lm: LM, word_problems: Task, tmp_path: Path
) -> None:
    rows = word_problems.rows(n=3)
    wrong = replace(word_problems, draw=lambda split, n, seed: [row | {"answer": 10**9} for row in rows])
    lenient = replace(word_problems, name="lenient", judge=lambda row, text: Verdict(True, "all"))
    asked = {"n": 3, "max_new_tokens": 8, "out": tmp_path}
    first = evaluate(lm, word_problems, {"plain": []}, **asked)
    assert set(evaluate(lm, wrong, {"plain": []}, **asked).rows.answer) == {str(10**9)}
    assert evaluate(lm, lenient, {"plain": []}, **asked).rows.correct.all()
    with lm.apply(push(lm, 4.0)):
        around = evaluate(lm, word_problems, {"plain": []}, **asked)
    inside = evaluate(lm, word_problems, {"pushed": [push(lm, 4.0)]}, n=3, max_new_tokens=8)
    assert around.rows.output.tolist() == inside.rows.output.tolist() != first.rows.output.tolist()


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


@dataclass(frozen=True)
class Twice:
    """Two samples a question, at a temperature; the second is the answer."""

    temperature: float = 1.0
    chunk: int = 2

    def solve(self, ask: Ask) -> list[Answer]:
        places = [place for place in range(len(ask.rows)) for _ in range(2)]
        prompts = [ask.prompt(place) for place in places]
        found = ask.generate(prompts, places, temperature=self.temperature, draws=[0, 1] * len(ask.rows))
        pairs = [found[at : at + 2] for at in range(0, len(found), 2)]
        return [Answer(b.text, samples=(a.text, b.text), facts={"first": a.text}) for a, b in pairs]


def test_scores_do_not_depend_on_batch_size_or_order(lab: LM, word_problems: Task) -> None:
    conditions = {"plain": [], "told": [instruction("steps")], "sampled": [Twice(0.7)]}
    found = [
        evaluate(lab, word_problems, conditions, n=20, max_new_tokens=60, batch_size=size).rows for size in (1, 7, 64)
    ]
    turned = replace(word_problems, draw=lambda *asked: word_problems.draw(*asked)[::-1])
    found.append(evaluate(lab, turned, conditions, n=20, max_new_tokens=60).rows)
    columns = ["output", "extracted", "correct", "tokens_in", "tokens_out", "flops"]
    first, *others = (rows.set_index(["condition", "id"]).sort_index()[columns] for rows in found)
    assert first.output.nunique() > 40
    for other in others:
        pd.testing.assert_frame_equal(first, other)


def test_samples_are_distinct_counted_and_judged(lab: LM, word_problems: Task) -> None:
    rows = evaluate(lab, word_problems, {"sampled": [instruction("steps"), Twice()]}, n=12, max_new_tokens=60).rows
    samples = rows.samples.tolist()
    assert sum(a["output"] != b["output"] for a, b in samples) > 6
    assert (rows.calls == 2).all()
    asked = {row["id"]: row for row in word_problems.rows("test", n=12, seed=0)}
    for name, output, judged in zip(rows.id, rows.output, samples, strict=True):
        assert judged[1]["output"] == output
        assert [
            task_says.correct
            for task_says in word_problems.verify_many([asked[name]] * 2, [s["output"] for s in judged])
        ] == [s["correct"] for s in judged]


@dataclass(frozen=True)
class Falls(Twice):
    """`Twice`, which dies at its third chunk when told to."""

    after: ClassVar[int] = 99
    done: ClassVar[list[str]] = []

    def solve(self, ask: Ask) -> list[Answer]:
        if len(self.done) >= self.after:
            raise KeyboardInterrupt
        self.done.extend(str(row["id"]) for row in ask.rows)
        return super().solve(ask)


def test_a_killed_condition_goes_on_and_nothing_is_asked_twice(
    lm: LM, word_problems: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conditions = {"sampled": [Falls()]}
    monkeypatch.setattr(Falls, "done", [])
    whole = evaluate(lm, word_problems, conditions, n=7, max_new_tokens=6)
    monkeypatch.setattr(Falls, "done", [])
    monkeypatch.setattr(Falls, "after", 4)
    with pytest.raises(KeyboardInterrupt):
        evaluate(lm, word_problems, conditions, n=7, max_new_tokens=6, out=tmp_path)
    monkeypatch.setattr(Falls, "after", 99)
    resumed = evaluate(lm, word_problems, conditions, n=7, max_new_tokens=6, out=tmp_path)
    pd.testing.assert_frame_equal(whole.rows[[*SAME, "samples"]], resumed.rows[[*SAME, "samples"]])
    assert sorted(Falls.done) == sorted(whole.rows.id)  # each question once, over both starts
    more = evaluate(lm, word_problems, conditions, n=10, max_new_tokens=6, out=tmp_path)
    assert more.rows.id.tolist()[:7] == whole.rows.id.tolist()
    assert len(Falls.done) == 7 + 4  # the last chunk held one question of its two


def test_a_verifier_that_hangs_is_stopped_and_counted(lm: LM, word_problems: Task) -> None:
    def judge(row: dict[str, Any], text: str) -> Verdict:
        while row["id"] == first:
            with suppress(Exception):  # as careless code has it
                time.sleep(0.01)
        return Verdict(True, "1")

    first = word_problems.rows(n=3)[0]["id"]
    stuck = replace(word_problems, judge=judge)
    rows = evaluate(lm, stuck, {"plain": []}, n=3, max_new_tokens=2, verify_seconds=0.3).rows
    assert rows.hung.tolist() == [True, False, False]
    assert rows.unparsed.tolist() == [True, False, False]
    assert rows.correct.tolist() == [False, True, True]


def test_a_solver_that_could_not_be_told_from_another_is_refused(lm: LM, word_problems: Task) -> None:
    @dataclass(frozen=True)
    class Scored(Twice):
        score: Any = len

    with pytest.raises(ValueError, match="could not say which one"):
        evaluate(lm, word_problems, {"scored": [Scored()]}, n=2)
    with pytest.raises(ValueError, match="2 solvers"):
        evaluate(lm, word_problems, {"two": [Twice(), Twice()]}, n=2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_flops_are_what_torch_counts(architecture: str) -> None:
    lm, tokens = tiny_lm(architecture), 24
    before = lm.model.config._attn_implementation
    lm.model.set_attn_implementation("eager")
    try:
        with FlopCounterMode(display=False) as counter:
            lm.model(input_ids=torch.arange(tokens)[None] + 1, use_cache=False)
    finally:
        lm.model.set_attn_implementation(before)
    config = lm.model.config.get_text_config()
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    masked = tokens * tokens - tokens * (tokens + 1) // 2  # pairs that torch computes and masks away
    counted = counter.get_total_flops() - 4 * width * masked * config.num_hidden_layers
    assert forward_flops(lm, tokens, tokens) == pytest.approx(counted, rel=0.02)  # norms and biases are no products


def test_flops_count_the_experts_that_a_token_is_sent_to(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_lm("mixtral").model
    experts = sum(weight.numel() for name, weight in model.named_parameters() if ".experts" in name)
    some, *_ = cost.sizes(model)
    idle = 1 - model.config.num_experts_per_tok / model.config.num_local_experts
    monkeypatch.setattr(model.config, "num_experts_per_tok", model.config.num_local_experts)
    every, *_ = cost.sizes(model)
    assert idle > 0
    assert every - some == pytest.approx(experts * idle)
