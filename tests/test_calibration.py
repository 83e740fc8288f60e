"""Calibration against KL computed slowly, one row at a time without padding, and re-measured after the search."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.test_adapter import make_adapter
from tests.test_interventions import PROMPTS, assert_same, cache_edit, fingerprint, vector
from tests.test_low_rank import low_rank
from tests.tiny import greedy, make_tiny, tiny_lm
from workbench.calibration import (
    Calibrated,
    _bracket,
    _next,
    behaviour_and_damage,
    calibrate,
    compare_at_budget,
    damage,
)
from workbench.grid import grid
from workbench.interventions import (
    CompressCache,
    DropTokens,
    Gate,
    Intervention,
    Logits,
    QuantizeCache,
    Residual,
    ScaleTokens,
    extract,
    load_intervention,
    project_out,
)
from workbench.interventions.gate import last_states
from workbench.models import LM, ModelError, load_model
from workbench.prompts import contrast
from workbench.tasks import Task

NEW = 10


def slow_kl(lm: LM, x: Intervention, prompts: list[str] = PROMPTS) -> list[list[float]]:
    """From the definition: sum over the vocabulary of p (log p - log q), token by token, one row, no padding."""
    found = []
    for prompt in prompts:
        ids, new = lm.encode(prompt), greedy(lm, prompt, NEW)
        with torch.no_grad():
            plain = lm.model(torch.tensor([ids + new])).logits[0].double().log_softmax(-1)
            with lm.apply(x, prompt_lengths=[len(ids)]):
                changed = lm.model(torch.tensor([ids + new])).logits[0].double().log_softmax(-1)
        places = range(len(ids) - 1, len(ids) + len(new) - 1)
        found.append([float((plain[i].exp() * (plain[i] - changed[i])).sum()) for i in places])
    return found


def kinds(lm: LM) -> dict[str, Intervention]:
    return {
        "residual": vector(lm, 1, "all", 0.3),
        "last": vector(lm, 0, "last"),
        "kv": cache_edit(lm),
        "sum": vector(lm, 1, "generated", 0.3) + cache_edit(lm, 1.0),
    }


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("kind", ["residual", "last", "kv", "sum"])
def test_damage_is_the_definition(architecture: str, kind: str) -> None:
    lm = tiny_lm(architecture)
    x = kinds(lm)[kind]
    tokens = np.concatenate(slow_kl(lm, x))
    for batch_size in (None, 3):
        found = damage(lm, x, PROMPTS, max_new_tokens=NEW, batch_size=batch_size)
        assert found["kl"].estimate == pytest.approx(tokens.mean(), rel=1e-3, abs=1e-5)
        assert found["kl_p95"].estimate == pytest.approx(np.percentile(tokens, 95), rel=1e-3, abs=1e-5)
        assert found["kl"].low <= found["kl"].estimate <= found["kl"].high
        assert found["kl_p95"].low <= found["kl_p95"].estimate <= found["kl_p95"].high
        assert found["kl"].n == len(tokens)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_coefficient_zero_costs_exactly_nothing(architecture: str) -> None:
    lm = tiny_lm(architecture)
    for x in kinds(lm).values():
        found = damage(lm, 0 * x, PROMPTS, max_new_tokens=NEW, texts=PROMPTS)
        assert found["kl"].estimate == found["kl_p95"].estimate == 0.0
        assert found["bits"] == found["bits_plain"]
        assert found["bits_added"].low == found["bits_added"].high == 0.0
        assert found["repetition"] == found["repetition_plain"]


def test_bits_are_those_of_each_text_alone() -> None:
    lm = tiny_lm("llama")
    x = kinds(lm)["sum"]
    found = damage(lm, x, PROMPTS, max_new_tokens=2, texts=PROMPTS)
    for name, change in (("bits", x), ("bits_plain", 0 * x)):
        bits: list[float] = []
        for text in PROMPTS:
            ids = lm.encode(text)
            half = len(ids) // 2
            with lm.apply(change, prompt_lengths=[half]), torch.no_grad():
                scores = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            bits += [-float(scores[place - 1, ids[place]]) / math.log(2) for place in range(half, len(ids))]
        assert found[name].estimate == pytest.approx(np.mean(bits), rel=1e-5)
    added = found["bits_added"]
    assert added.estimate == pytest.approx(found["bits"].estimate - found["bits_plain"].estimate)
    assert added.high - added.low < found["bits"].high - found["bits"].low  # the texts' own spread is out of it
    with pytest.raises(ModelError, match="four or more"):
        damage(lm, x, PROMPTS, max_new_tokens=2, texts=["abc"])


def test_repetition_counts_four_grams() -> None:
    lm = tiny_lm("llama")
    x = kinds(lm)["residual"]
    found = damage(lm, x, PROMPTS, max_new_tokens=30)
    shares = []
    for answer in lm.generate(PROMPTS, x, 30):
        seen: list[list[int]] = []
        again = 0
        for start in range(len(answer.token_ids) - 3):
            gram = answer.token_ids[start : start + 4]
            again += gram in seen
            seen.append(gram)
        shares.append(again / max(len(seen), 1))
    assert found["repetition"].estimate == pytest.approx(np.mean(shares))


def counted(lm: LM, x: Intervention, **options: object) -> tuple[Calibrated, int]:
    """The calibration and the number of scoring forwards it took; those of generation use a cache."""
    calls = []
    handle = lm.model.register_forward_pre_hook(
        lambda module, inputs, given: calls.append(given["use_cache"]), with_kwargs=True
    )
    try:
        return calibrate(lm, x, PROMPTS, max_new_tokens=NEW, **options), calls.count(False)
    finally:
        handle.remove()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["residual", "last", "kv", "sum"])
def test_the_calibrated_strength_spends_the_budget(architecture: str, kind: str, tmp_path: Path) -> None:
    lm = tiny_lm(architecture)
    x = kinds(lm)[kind]
    before = fingerprint(lm)
    found, forwards = counted(lm, x, budget=0.5)
    assert_same(before, fingerprint(lm))
    assert found.converged
    assert forwards == found.evaluations + 1 <= 7  # and one for the plain model
    tokens = np.concatenate(slow_kl(lm, found.intervention))
    assert np.percentile(tokens, 95) == pytest.approx(0.5, rel=0.1)
    assert found.kl == pytest.approx(np.percentile(tokens, 95), rel=1e-2)
    assert set(found.table.columns) == {"strength", "kl", "kl_mean", "evaluation"}
    assert found.table.evaluation.max() == found.evaluations
    record = dict(found.intervention.calibration or {})
    assert (record["kl"], record["strength"], record["budget"]) == (found.kl, found.strength, 0.5)
    assert (record["model"], record["revision"]) == (lm.name, lm.revision)
    assert (2 * found.intervention).calibration is None  # of this strength alone
    assert load_intervention(found.intervention.save(tmp_path / "found.safetensors")).calibration == record
    np.testing.assert_allclose(
        np.percentile(np.concatenate(slow_kl(lm, found.strength * x)), 95), np.percentile(tokens, 95)
    )


@pytest.mark.parametrize(("scale", "budget", "percentile"), [(1e-4, 0.5, 95), (1e4, 0.1, 95), (1.0, 0.02, 50)])
def test_scale_and_percentile_do_not_matter_to_the_search(scale: float, budget: float, percentile: float) -> None:
    lm = tiny_lm("llama")
    x = vector(lm, 1, "all", scale)
    found, forwards = counted(lm, x, budget=budget, percentile=percentile)
    assert forwards <= 7
    tokens = np.concatenate(slow_kl(lm, found.intervention))
    assert np.percentile(tokens, percentile) == pytest.approx(budget, rel=0.1)


def test_an_adapter_is_tried_one_strength_an_evaluation(tmp_path: Path) -> None:
    lm = load_model(make_tiny("llama", tmp_path / "model"))
    x = make_adapter(lm, tmp_path / "adapter")
    before = fingerprint(lm)
    found, forwards = counted(lm, x, budget=0.1, evaluations=12)
    assert_same(before, fingerprint(lm))
    assert len(found.table) == found.evaluations == forwards - 1
    tokens = np.concatenate(slow_kl(lm, found.intervention))
    assert np.percentile(tokens, 95) == pytest.approx(found.kl, rel=1e-2)
    assert not found.converged or found.kl == pytest.approx(0.1, rel=0.1)


def test_too_few_evaluations_return_the_largest_strength_within_the_budget() -> None:
    lm = tiny_lm("llama")
    found = calibrate(lm, vector(lm, 1, "all"), PROMPTS, budget=0.5, evaluations=1, max_new_tokens=NEW)
    assert (found.converged, found.evaluations) == (False, 1)
    within = found.table[found.table.kl <= 0.5]
    assert found.strength == within.strength.max()
    assert found.kl == within.kl.max() <= 0.5


def test_search_steps_follow_the_first_crossing() -> None:
    tried = {0.1: 0.01, 1.0: 1.0, 4.0: 0.2, 8.0: 9.0}  # not monotone
    assert _bracket(tried, 0.5) == (0.1, 1.0)
    inside = _next(tried, 0.25, several=True)
    assert inside[1] == pytest.approx(0.5)  # KL is the square of the strength between 0.1 and 1
    assert all(0.1 < c < 1 for c in inside)
    assert _next({1.0: 0.01}, 1.0, several=False)[0] == pytest.approx(15.0)  # ten times as strong, and half again
    assert _next({1.0: 100.0}, 1.0, several=False)[0] == pytest.approx(0.1 / 1.5)


def test_what_never_reaches_the_budget_is_explained() -> None:
    lm = tiny_lm("llama")
    zero = Residual({1: torch.zeros(lm.d_model)})
    with pytest.raises(ModelError, match=r"never reaches the budget of 0.5 nats.*Is it zero"):
        calibrate(lm, zero, PROMPTS, max_new_tokens=4)
    with pytest.raises(ModelError, match=r"Already .* costs .* more than the budget"):
        calibrate(lm, vector(lm, 1, "all", 1e6), PROMPTS, budget=1e-3, evaluations=1, max_new_tokens=4)
    for wrong in ({"budget": 0.0}, {"percentile": 0}, {"evaluations": 0}):
        with pytest.raises(ModelError, match="the budget is in nats"):
            calibrate(lm, vector(lm), PROMPTS, max_new_tokens=2, **wrong)
    with pytest.raises(ModelError, match="list of at least one prompt"):
        calibrate(lm, vector(lm), [])
    with pytest.raises(ModelError, match="list of at least one prompt"):
        calibrate(lm, vector(lm), "a prompt")


def test_candidates_and_controls_are_compared_at_equal_damage(lab: LM, word_problems: Task) -> None:
    pairs = contrast(word_problems, shots=2, n=16)
    candidates = {
        "residual": extract(lab, pairs).at(layers=[3], positions="last"),
        "values": extract(lab, pairs, site="kv").scaled(keys=0.0),
        "nothing": Residual({1: torch.zeros(lab.d_model)}),
    }
    table = compare_at_budget(lab, word_problems, candidates, budget=0.3, n=6, max_new_tokens=48)
    assert table.candidate.tolist() == ["residual", "residual", "values", "values", "nothing", "nothing"]
    assert table.control.tolist() == [False, True] * 3
    reached = table[table.converged]
    assert {("residual", False), ("residual", True)} <= set(zip(reached.candidate, reached.control, strict=True))
    assert reached.kl_p95.tolist() == pytest.approx([0.3] * len(reached), rel=0.1)
    assert ((reached.low <= reached.accuracy) & (reached.accuracy <= reached.high)).all()
    assert ((reached.steps_low <= reached.steps) & (reached.steps <= reached.steps_high)).all()
    nothing = table[table.candidate == "nothing"]
    assert nothing.accuracy.isna().all() and nothing.note.str.contains("never reaches").all()


def test_several_budgets_share_what_was_tried(lab: LM, word_problems: Task) -> None:
    x = Residual({3: torch.randn(lab.d_model, generator=torch.Generator().manual_seed(1))}, positions="last")
    with forwards_counted(lab) as calls:
        table = compare_at_budget(
            lab, word_problems, {"x": x}, budget=[0.3, 0.1], n=4, max_new_tokens=4, controls=False
        )
    assert table.candidate.tolist() == ["x", "x"]
    assert table.budget.tolist() == [0.1, 0.3]
    assert table.control.tolist() == [False, False]
    assert table.kl_p95.tolist() == pytest.approx([0.1, 0.3], rel=0.06)
    assert table.strength.is_monotonic_increasing
    alone = compare_at_budget(lab, word_problems, {"x": x}, budget=0.1, n=4, max_new_tokens=4, controls=False)
    assert alone.iloc[0].equals(table.iloc[0])  # the lowest budget is searched first, from nothing
    with forwards_counted(lab) as each:
        for budget in (0.1, 0.3):
            compare_at_budget(lab, word_problems, {"x": x}, budget=budget, n=4, max_new_tokens=4, controls=False)
    assert len(calls) < len(each)


@contextmanager
def forwards_counted(lm: LM) -> Iterator[list[int]]:
    """Scoring forwards; those of generation use a cache."""
    calls: list[int] = []
    handle = lm.model.register_forward_pre_hook(
        lambda module, inputs, given: None if given["use_cache"] else calls.append(1), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()


def test_an_adapter_has_no_random_twin_and_says_so(tmp_path: Path, word_problems: Task) -> None:
    lm = load_model(make_tiny("llama", tmp_path / "model"))
    adapter = make_adapter(lm, tmp_path / "adapter")
    candidates = {"tuned": adapter, "vector": vector(lm, 1, "all")}
    table = compare_at_budget(lm, word_problems, candidates, budget=0.05, n=4, max_new_tokens=2)
    assert table.control.tolist() == [False, True, False, True]
    assert "no random Adapter" in table.note[1]
    assert math.isnan(table.kl_p95[1])
    assert table.kl_p95.notna().tolist() == [True, False, True, True]


def test_conditions_as_they_are_have_the_same_numbers_as_grid_and_damage(lab: LM, word_problems: Task) -> None:
    x = extract(lab, contrast(word_problems, shots=1, n=4)).at(layers=[4], positions="last")
    conditions = {"once": x, "nothing": 0 * x}
    texts = [row["question"] for row in word_problems.rows("tuning", n=3, seed=5)]
    table = behaviour_and_damage(lab, word_problems, conditions, n=6, seed=2, max_new_tokens=32, texts=texts)
    assert table.condition.tolist() == ["once", "nothing"]
    cells = [({"condition": name}, each) for name, each in conditions.items()]
    expected = grid(lab, word_problems, cells, n=6, seed=2, max_new_tokens=32)
    assert table[expected.columns].equals(expected)
    prompts = [lab.render(word_problems.messages(row)) for row in word_problems.rows("tuning", n=6, seed=2)]
    for name, interval in damage(lab, x, prompts, texts=texts).items():
        assert (table[name][0], table[f"{name}_low"][0]) == (interval.estimate, interval.low), name
    assert table.kl_p95[1] == 0.0
    assert table.bits[1] == table.bits_plain[1] == table.bits_plain[0]
    with pytest.raises(ValueError, match="split='test'"):
        behaviour_and_damage(lab, word_problems, conditions, split="test")


def test_the_test_split_is_refused(lab: LM, word_problems: Task) -> None:
    with pytest.raises(ValueError, match="split='test'"):
        compare_at_budget(lab, word_problems, {"x": Residual({0: torch.ones(256)})}, split="test")
    with pytest.raises(ValueError, match="0 candidates"):
        compare_at_budget(lab, word_problems, {})


def other_kinds(lm: LM, folder: Path) -> dict[str, Intervention]:
    other = load_model(make_tiny("llama", folder / "other", seed=3))
    states = last_states(lm, PROMPTS, [1])[1]
    gate = Gate(states[0] - states[1], states.mean(0), 1, 0.0, "cosine", lm.name, lm.revision)
    return {
        "low rank": low_rank(lm, "generated"),
        "clamp": vector(lm, 1, "generated").clamp(1.0),
        "gate": vector(lm, 1, "generated").when(gate),
        "scale": ScaleTokens(slice(-5, None), values=-1.0),
        "weights": project_out(lm, vector(lm, 1), [(1, 0), (1, 1)]),
        "logits": Logits(expert=other),
    }


@pytest.mark.parametrize("kind", ["low rank", "clamp", "gate", "scale", "weights", "logits"])
def test_every_kind_with_a_strength_is_brought_to_a_budget(kind: str, tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    x = other_kinds(lm, tmp_path)[kind]
    found, _ = counted(lm, x, budget=0.05)
    assert found.evaluations <= 6
    reached = np.percentile(np.concatenate(slow_kl(lm, found.intervention)), 95)
    assert found.kl == pytest.approx(reached, rel=1e-2)
    assert found.converged
    assert reached == pytest.approx(0.05, rel=0.1)


@pytest.mark.parametrize("x", [DropTokens((1,)), CompressCache(0.5), QuantizeCache(4)], ids=lambda x: type(x).__name__)
def test_what_is_done_or_not_done_has_no_strength_to_search(x: Intervention) -> None:
    with pytest.raises(ModelError, match="is done or not done"):
        calibrate(tiny_lm("llama"), x, PROMPTS, max_new_tokens=NEW)
