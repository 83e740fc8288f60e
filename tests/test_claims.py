"""The re-test at equal damage against its pieces done by hand: extraction, tuning, reporting, KL, timing, verdicts."""

import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from tests.test_interventions import assert_same, fingerprint
from tests.tiny import tiny_lm
from workbench.cache import new_cache
from workbench.claims import arms as a
from workbench.claims import cache_steering, latency
from workbench.claims.key_shift import key_shift
from workbench.claims.latency import Timed
from workbench.evaluation import evaluate
from workbench.grid import grid
from workbench.interventions import KV, Residual, extract, random_like, read_pairs
from workbench.models import LM, ModelError, load_model
from workbench.plots import retest
from workbench.plots.drawing import PlotError
from workbench.prompts import contrast, instruction
from workbench.report.svg import figure_to_svg
from workbench.statistics import holm, paired_difference
from workbench.tasks import Task, load_task

PAIRS = SimpleNamespace(
    positive=["one two three:", "abc def ghi jkl mno:", "k:", "steps and more steps:"],
    negative=["one three:", "a much longer negative text:", "nine:", "no:"],
)
SHORT = {"n": 5, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def lab() -> LM:
    return load_model("lab-small")


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("word-problems")


@pytest.fixture(scope="module")
def found(lab: LM, task: Task) -> a.Directions:
    return a.read_directions(lab, contrast(task, shots=2, n=12, lm=lab))


@pytest.fixture(scope="module")
def tuned(lab: LM, task: Task, found: a.Directions) -> list[a.Arm]:
    return a.tune(lab, task, a.candidates(found, most_layers=2, key_shares=(1.0,)), budget=0.3, **SHORT)


@pytest.fixture(scope="module")
def everyone(tuned: list[a.Arm]) -> list[a.Arm]:
    return cache_steering.with_prompts(tuned, instruction("steps"))


@pytest.fixture(scope="module")
def report(lab: LM, task: Task, everyone: list[a.Arm]) -> cache_steering.Report:
    return cache_steering.report(lab, task, everyone, **SHORT)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox", "smollm3", "gpt2"])
def test_keys_as_cached_are_the_loop_without_unrotation(architecture: str) -> None:
    lm = tiny_lm(architecture)
    reading = read_pairs(lm, PAIRS)
    kv = reading.kv(as_cached=True)
    assert kv.rotated == ()
    assert kv.details["keys"] == "as cached"
    for layer in range(len(lm.blocks)):
        key, value = 0, 0
        for sign, texts in ((1, PAIRS.positive), (-1, PAIRS.negative)):
            for text in texts:
                with torch.no_grad():
                    cache = lm.model(torch.tensor([lm.encode(text)[:-1]]), use_cache=True).past_key_values
                key = key + sign * cache.layers[layer].keys[0, :, -1] / 4
                value = value + sign * cache.layers[layer].values[0, :, -1] / 4
        torch.testing.assert_close(kv.keys[layer], key, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(kv.values[layer], value, atol=1e-4, rtol=1e-4)
        turned = layer in reading.rotated
        assert torch.allclose(kv.keys[layer], reading.kv().keys[layer], atol=1e-4) == (not turned)


def test_an_edit_as_cached_adds_keys_as_they_are() -> None:
    lm = tiny_lm("llama")
    kv = read_pairs(lm, PAIRS).kv(as_cached=True).scaled(keys=2.0, values=0.0)
    ids = torch.tensor([lm.encode("some words here:")])
    caches = []
    for change in (0 * kv, kv):
        caches.append(new_cache(lm))
        with lm.apply(change), torch.no_grad():
            lm.model(ids, past_key_values=caches[-1], use_cache=True)
    moved = caches[1].layers[1].keys - caches[0].layers[1].keys
    torch.testing.assert_close(moved[0, :, -2], 2 * kv.keys[1], atol=1e-5, rtol=1e-4)
    assert moved[0, :, :-2].abs().max() < 1e-5


def test_directions_are_those_of_extract() -> None:
    lm = tiny_lm("qwen3")
    found, vector, kv = a.read_directions(lm, PAIRS), extract(lm, PAIRS), extract(lm, PAIRS, site="kv")
    assert found.left_out == ""
    for layer in vector.vectors:
        torch.testing.assert_close(found.vector.vectors[layer], vector.vectors[layer], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.kv.keys[layer], kv.keys[layer], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.kv.values[layer], kv.values[layer], atol=1e-5, rtol=1e-5)


def test_models_that_refuse_are_left_out_in_words(task: Task) -> None:
    hybrid = a.read_directions(tiny_lm("qwen3_next"), PAIRS)
    assert sorted(hybrid.kv.values) == [1, 2]
    assert "layers [1, 2] only" in hybrid.left_out
    assert sorted(hybrid.vector.vectors) == [0, 1, 2, 3]
    learned = a.candidates(a.read_directions(tiny_lm("gpt2"), PAIRS))
    assert "no rotary position" in str(learned[a.AS_CACHED])
    assert isinstance(learned[a.KEYS], dict)
    lm = tiny_lm("gptj")
    none = a.read_directions(lm, PAIRS)
    assert none.kv.values == {} and none.as_cached is None
    options = a.candidates(none, most_layers=1)
    assert all("not edited" in str(options[name]) for name in (a.VALUES, a.KEYS, a.AS_CACHED))
    tuned = a.tune(lm, task, options, budget=0.05, n=4, max_new_tokens=4, kl_tokens=4)
    notes = {arm.name: arm.note for arm in tuned if arm.change is None}
    assert {a.VALUES, a.KEYS, a.AS_CACHED, "random, cache"} <= set(notes)
    table = cache_steering.report(
        lm, task, cache_steering.with_prompts(tuned, instruction()), n=5, max_new_tokens=4
    ).table
    line = table.set_index("condition").loc[a.VALUES]
    assert math.isnan(line.accuracy)
    assert "not edited" in line.note


def test_an_edit_of_nothing_does_nothing() -> None:
    lm = tiny_lm("llama")
    nothing = KV({}, {})
    plain, same = lm.generate(["abc def:"], None, 8), lm.generate(["abc def:"], nothing, 8)
    assert plain[0].token_ids == same[0].token_ids


def test_candidates_are_spread_evenly_and_share_their_values() -> None:
    vector = Residual({layer: torch.ones(4) for layer in range(10)})
    kv = KV({1: torch.ones(2, 3)}, {1: torch.ones(2, 3)})
    options = a.candidates(a.Directions(vector, kv, None), most_layers=4, key_shares=(0.5,))
    assert list(options[a.LAST]) == ["layer 0", "layer 3", "layer 6", "layer 9"]
    assert options[a.LAST]["layer 3"].positions == "last"
    assert options[a.EACH]["layer 3"].positions == slice(-1, None)
    assert options[a.KEYS]["keys x 0.5"].key_strength == 0.5
    assert options[a.VALUES]["values alone"].key_strength == 0.0
    assert list(a.candidates(a.Directions(vector, kv, None), most_layers=1)[a.LAST]) == ["layer 4"]


def test_tuned_arms_spend_the_budget_and_are_the_best_of_their_candidates(
    lab: LM, task: Task, found: a.Directions, tuned: list[a.Arm]
) -> None:
    options = a.candidates(found, most_layers=2, key_shares=(1.0,))
    costs = cache_steering.reached(lab, task, tuned, n=5, seed=0, split="tuning")
    assert [arm.name for arm in tuned] == [*options, *a.FLOORS]
    for arm in tuned:
        assert arm.runs
        assert costs[arm.name].estimate == pytest.approx(arm.kl, rel=1e-3)
        if not arm.note:
            assert arm.kl == pytest.approx(0.3, rel=0.05)
    last = next(arm for arm in tuned if arm.name == a.LAST)
    scores = {}
    for label, x in options[a.LAST].items():
        strength = a.calibrate(
            lab, x, [lab.render(task.messages(row)) for row in task.rows("tuning", n=5)], budget=0.3, max_new_tokens=16
        ).strength
        table = grid(lab, task, [({}, strength * x)], split="tuning", **SHORT)
        scores[label] = (table.accuracy[0], table.steps[0])
        if label == last.choice:
            assert last.strength == pytest.approx(strength)
            assert last.change.strength == pytest.approx(strength)
    assert scores[last.choice] == max(scores.values())


def test_floors_are_as_long_as_what_was_chosen(found: a.Directions, tuned: list[a.Arm]) -> None:
    by_name = {arm.name: arm for arm in tuned}
    twin = random_like(found.kv, 0)
    change = by_name["random, cache"].change
    for layer, values in change.values.items():
        assert torch.equal(values, twin.values[layer])
    assert by_name["random, residual"].choice == by_name[a.LAST].choice


def test_the_test_split_is_not_for_tuning(lab: LM, task: Task) -> None:
    with pytest.raises(ValueError, match="not for reporting"):
        a.tune(lab, task, {}, split="test")


def test_what_cannot_reach_the_budget_keeps_its_reason(lab: LM, task: Task, found: a.Directions) -> None:
    nothing = Residual({0: torch.zeros(lab.d_model)}, "last")
    arm, *_ = a.tune(lab, task, {a.LAST: {"layer 0": nothing}}, n=4, max_new_tokens=4)
    assert arm.change is None and not arm.runs
    assert "never reaches the budget" in arm.note
    assert math.isnan(arm.strength)


def test_each_line_is_evaluate_of_that_arm_alone(
    lab: LM, task: Task, everyone: list[a.Arm], report: cache_steering.Report
) -> None:
    plain = evaluate(lab, task, {"x": []}, **SHORT)
    lines = report.table.set_index("condition")
    assert list(lines.index) == [arm.name for arm in everyone]
    p_values = []
    for arm in everyone:
        alone, line = evaluate(lab, task, {"x": arm.condition}, **SHORT), lines.loc[arm.name]
        own = alone.table().iloc[0]
        assert (line.accuracy, line.low, line.high) == (own.accuracy, own.low, own.high)
        assert (line.steps, line.tokens_out, line.n) == (own.steps, own.tokens_out, 5)
        if arm.name != a.PLAIN:
            by_hand = paired_difference(plain.correct("x").tolist(), alone.correct("x").tolist())
            assert (line.difference, line.difference_low) == (by_hand.difference, by_hand.low)
            p_values.append(by_hand.p_value)
    assert lines.p_holm.dropna().tolist() == pytest.approx(holm(p_values))


def test_kl_is_the_definition_for_changes_and_prompts(
    lab: LM, task: Task, everyone: list[a.Arm], report: cache_steering.Report
) -> None:
    lines = report.table.set_index("condition")
    for arm in everyone:
        tokens = []
        for row in task.rows("test", n=5):
            prompt, told = lab.encode(task.messages(row)), lab.encode(task.messages(row, arm.strategy))
            answer = lab.generate([lab.render(task.messages(row))], None, 16)[0].token_ids
            with torch.no_grad():
                plain = lab.model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
                with lab.apply(arm.change if arm.change is not None else [None], prompt_lengths=[len(told)]):
                    other = lab.model(torch.tensor([told + answer])).logits[0].double().log_softmax(-1)
            for place in range(len(answer)):
                p, q = plain[len(prompt) - 1 + place], other[len(told) - 1 + place]
                tokens.append(float((p.exp() * (p - q)).sum()))
        line, kl = lines.loc[arm.name], "kl" if arm.strategy is None else "kl_prompt"
        assert line[kl] == pytest.approx(np.percentile(tokens, 95), rel=1e-3, abs=1e-5)
        assert line[f"{kl}_low"] <= line[kl] <= line[f"{kl}_high"]


def test_coefficient_zero_is_the_plain_line(lab: LM, task: Task, found: a.Directions) -> None:
    nothing = [a.Arm(a.PLAIN), a.Arm(a.VALUES, 0 * found.kv), a.Arm(a.AS_CACHED, 0 * found.as_cached)]
    zero = cache_steering.report(lab, task, [*nothing, a.Arm(a.EACH, 0 * found.vector.at(1, a.STEPS))], **SHORT)
    rows = {name: group.output.tolist() for name, group in zero.results.rows.groupby("condition")}
    assert all(outputs == rows[a.PLAIN] for outputs in rows.values())
    assert zero.table.kl.tolist() == [0.0] * 4
    assert zero.table.difference.dropna().tolist() == [0.0] * 3


def test_planned_differences_are_paired(report: cache_steering.Report) -> None:
    planned = cache_steering.between(report.results)
    rows = {name: group.set_index("id") for name, group in report.results.rows.groupby("condition")}
    for line in planned.itertuples():
        column = "correct" if line.what == "right" else "steps"
        by_hand = paired_difference(
            rows[line.a][column].tolist(), rows[line.b][column].loc[rows[line.a].index].tolist()
        )
        assert (line.difference, line.p_value) == (by_hand.difference, by_hand.p_value)
    assert planned.p_holm.tolist() == pytest.approx(holm(planned.p_value.tolist()))
    assert len(planned) == 2 * len(cache_steering.PLANNED)
    assert cache_steering.between(report.results, [("nobody", a.VALUES)]).empty


def test_around_holds_the_calibrated_point(lab: LM, task: Task, tuned: list[a.Arm]) -> None:
    arm = next(arm for arm in tuned if arm.name == a.VALUES)
    curve = cache_steering.around(lab, task, [arm, a.Arm(a.PLAIN)], (0.0, 1.0), **SHORT).set_index("multiple")
    assert curve.kl_p95[0.0] == 0.0
    assert curve.kl_p95[1.0] == pytest.approx(arm.kl, rel=1e-3)
    own = evaluate(lab, task, {"x": [arm.change]}, split="tuning", **SHORT).table().iloc[0]
    assert curve.accuracy[1.0] == own.accuracy
    assert cache_steering.around(lab, task, [a.Arm(a.PLAIN)], **SHORT).empty


def test_timing_runs_what_it_says(lab: LM, task: Task, everyone: list[a.Arm]) -> None:
    row = task.rows("tuning", n=1)[0]
    before, tokens, new = fingerprint(lab), [], 3
    conditions = cache_steering.to_time(lab, everyone, row, task)
    assert set(conditions) == {arm.name for arm in everyone if arm.name not in a.FLOORS} | {f"{a.EACH}, cache off"}
    handle = lab.blocks[0].register_forward_hook(lambda module, inputs, output: tokens.append(output.shape[:2]))
    try:
        rounds = latency.time_rounds(lab, {"off": conditions[f"{a.EACH}, cache off"]}, rows=2, tokens=new, rounds=1)
        length = len(lab.encode(conditions[a.PLAIN].prompt))
        assert tokens == [(2, length + step) for step in range(new + 1)] * 2  # a round to warm up
        tokens.clear()
        latency.time_rounds(lab, {"on": conditions[a.EACH]}, rows=2, tokens=new, rounds=1)
        assert tokens == [(2, length), *[(2, 1)] * new] * 2
    finally:
        handle.remove()
    assert (rounds.ms_per_token > 0).all()
    assert_same(fingerprint(lab), before)


def test_every_round_times_every_condition_and_ratios_are_within_rounds() -> None:
    lm = tiny_lm("llama")
    rounds = latency.time_rounds(lm, {"a": Timed("abc"), "b": Timed("abc def")}, rows=1, tokens=2, rounds=3)
    assert rounds.groupby("round").condition.apply(sorted).tolist() == [["a", "b"]] * 3
    made = rounds.assign(ms_per_token=[1.0, 2.0, 6.0, 2.0, 4.0, 8.0])
    assert made.condition.tolist() == ["a", "b"] * 3
    table = latency.latency_table(made, "a").set_index("condition")
    assert table.ratio["a"] == 1.0
    pairs = made.pivot(index="round", columns="condition", values="ms_per_token")
    assert table.ratio["b"] == pytest.approx((pairs.b / pairs.a).median())
    with pytest.raises(ValueError, match="not timed"):
        latency.latency_table(rounds, "c")
    with pytest.raises(ValueError, match="at least 1"):
        latency.time_rounds(lm, {}, rounds=3)


def test_verdicts_follow_the_intervals() -> None:
    lines = [("seen", 0.3, 0.1, 0.5, 0.01), ("the opposite", -0.3, -0.5, -0.1, 0.01), ("not seen", 0.2, 0.1, 0.3, 0.2)]
    lines += [("not seen", 0.1, -0.1, 0.3, 0.01)]
    for verdict, difference, low, high, p in lines:
        planned = pd.DataFrame(
            [{"a": a.LAST, "b": a.VALUES, "what": "right", "difference": difference, "low": low, "high": high,
              "p_holm": p, "n": 9}]
        )  # fmt: skip
        table = cache_steering.claims(pd.DataFrame({"condition": [a.PLAIN]}), planned, CURVE, TIMES)
        assert table.verdict.tolist() == [verdict, "seen", "not seen", "the opposite"]
    assert "0.50 [0.50, 0.50] times" in table.measured[1]


TIMES = pd.DataFrame(
    [
        {"round": turn, "condition": name, "ms_per_token": time, "prefill_ms": 1.0, "use_cache": True}
        for turn in (1, 2)
        for name, time in ((a.VALUES, 1.0), (a.LAST, 2.0), (a.EACH, 0.5 * turn**2))
    ]
)
CURVE = pd.DataFrame(
    [
        {"condition": name, "multiple": multiple, "accuracy": right}
        for name, shares in ((a.VALUES, (0.1, 0.8, 0.1)), (a.LAST, (0.1, 0.7, 0.7)))
        for multiple, right in zip((0.5, 1.0, 2.0), shares, strict=True)
    ]
)


def test_nothing_run_claims_nothing() -> None:
    empty = pd.DataFrame()
    bare = pd.DataFrame(columns=["condition", "multiple", "accuracy"])
    assert cache_steering.claims(pd.DataFrame({"condition": [a.VALUES]}), empty, bare, empty).empty


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_neox", "gpt2"])
def test_key_shift_is_two_runs_compared(architecture: str) -> None:
    lm = tiny_lm(architecture)
    ids = torch.tensor([lm.encode("same text")])
    table = key_shift(lm, "same text", shifts=[3, 40]).set_index(["layer", "shift"])
    for shift in (3, 40):
        caches = []
        for start in (0, shift):
            places = torch.arange(start, start + ids.shape[1])[None]
            with torch.no_grad():
                caches.append(lm.base(ids, position_ids=places, use_cache=True).past_key_values)
        for layer in range(len(lm.blocks)):
            row = table.loc[(layer, shift)]
            for name, kind in (("key", "keys"), ("value", "values")):
                first, second = (getattr(cache.layers[layer], kind)[0, :, -1] for cache in caches)
                assert row[name] == pytest.approx(float((second - first).norm() / first.norm()), abs=1e-4)
            if architecture == "gpt2":
                assert row.key_unrotated == row.key > 0.1
            else:
                assert row.key_unrotated < 1e-3 and row.value < 1e-3 and row.key > 0.05


def test_key_shift_stays_within_the_model_s_positions() -> None:
    assert key_shift(tiny_lm("llama"), "abc", shifts=[1, 10_000])["shift"].unique().tolist() == [1]
    with pytest.raises(ModelError, match="cannot be un-rotated"):
        key_shift(tiny_lm("gptj"), "abc")


def test_figures_hold_every_arm_and_its_interval(report: cache_steering.Report) -> None:
    lost = pd.DataFrame([{"condition": a.KEYS + " x", "note": "no"}])
    fig = retest.equal_damage(pd.concat([report.table, lost]), 0.3)
    assert {trace.y[0] for trace in fig.data} >= set(report.table.condition) | {a.KEYS + " x"}
    assert any("not brought" in note.text for note in fig.layout.annotations)
    assert figure_to_svg(fig).startswith("<svg")
    with pytest.raises(PlotError):
        retest.equal_damage([])


def test_figures_of_strength_keys_and_attention() -> None:
    limits = {"kl_p95_low": 0.1, "kl_p95_high": 0.4, "low": 0.2, "high": 0.8}
    rows = [{"condition": name, "kl_p95": 0.2, "accuracy": 0.5, **limits} for name in (a.VALUES, a.LAST)]
    fig = retest.bought(rows, budget=0.2)
    assert {trace.name: trace.line.color for trace in fig.data} == {
        name: retest.LOOKS[name][0] for name in (a.VALUES, a.LAST)
    }
    moved = [
        {"layer": layer, "shift": shift, "key": layer + 0.5, "key_unrotated": 0.0, "value": 0.0}
        for layer in (0, 1)
        for shift in (1, 10)
    ]
    lines = retest.moved_keys(moved)
    assert list(lines.data[0].y) == [1.0, 1.0]
    looks = {"plain": [{"layer": 0, "head": 1, "weight": 0.25}], "KV-steered": [{"layer": 1, "head": 0, "weight": 0.5}]}
    eyes = retest.attention_heads(looks)
    assert "KV-steered: most 0.50, by head 0 of layer 1" in eyes.layout.meta["alt"]
    assert all(figure_to_svg(each).startswith("<svg") for each in (fig, lines, eyes))
