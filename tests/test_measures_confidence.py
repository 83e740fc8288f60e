"""Confidence measures against their definitions written out, planted miscalibration, and scoring alone or batched."""

import math
from random import Random

import numpy as np
import pandas as pd
import pytest
import torch

import workbench as wb
from workbench.measures.confidence import (
    auroc,
    brier,
    calibration_error,
    confidence_table,
    reliability_table,
    risk_coverage,
    risk_coverage_area,
)
from workbench.measures.elicitation import (
    agreement_confidence,
    answer_confidence,
    asking_confidence,
    confidence_task,
    said_confidence,
)
from workbench.measures.resampling import bootstrap_statistics
from workbench.prompts import few_shot
from workbench.statistics import bootstrap_mean


def planted(n: int, gap: float, seed: int = 0) -> tuple[list[float], list[bool]]:
    """Confidences of which each is too high by `gap`."""
    rng = Random(seed)
    p = [rng.uniform(gap, 1) for _ in range(n)]
    return p, [rng.random() < each - gap for each in p]


def reference_error(p: list[float], right: list[bool], bins: int) -> float:
    total = 0.0
    for number in range(bins):
        last = number == bins - 1
        held = [
            (f, o) for f, o in zip(p, right, strict=True) if number / bins <= f and (f < (number + 1) / bins or last)
        ]
        if held:
            total += abs(sum(o for _, o in held) - sum(f for f, _ in held))
    return total / len(p)


@pytest.mark.parametrize("bins", [1, 4, 8])
def test_calibration_error_is_its_definition(bins):
    p, right = planted(300, 0.2)
    assert calibration_error(p, right, bins=bins).estimate == pytest.approx(reference_error(p, right, bins))


def test_adaptive_bins_have_equal_mass_and_keep_equal_confidences_together():
    p, right = planted(300, 0.1)
    assert reliability_table(p, right, bins=5, adaptive=True).n.tolist() == [60] * 5
    table = reliability_table([0.5] * 8 + [0.9] * 2, [True] * 10, bins=5, adaptive=True)
    assert table.n.tolist() == [8, 2]
    ordered = sorted(zip(p, right, strict=True))
    parts = [ordered[start : start + 60] for start in range(0, 300, 60)]
    expected = sum(abs(sum(o for _, o in part) - sum(f for f, _ in part)) for part in parts) / 300
    assert calibration_error(p, right, bins=5, adaptive=True).estimate == pytest.approx(expected)


def test_limits_hold_the_planted_gap_and_the_correction_takes_part_of_the_bias_off():
    inside, plain, corrected = 0, [], []
    for seed in range(30):
        p, right = planted(150, 0.2, seed)
        found = calibration_error(p, right, bins=5)
        inside += found.low <= 0.2 <= found.high
        p, right = planted(150, 0.0, seed)
        plain.append(calibration_error(p, right, bins=10).estimate)
        corrected.append(calibration_error(p, right, bins=10, debiased=True).estimate)
    assert inside >= 25
    assert np.mean(corrected) < 0.7 * np.mean(plain)


@pytest.mark.parametrize("adaptive", [False, True])
def test_brier_decomposition_adds_up_exactly(adaptive):
    p, right = planted(200, 0.15)
    parts = {name: value.estimate for name, value in brier(p, right, bins=6, adaptive=adaptive).items()}
    assert parts["score"] == pytest.approx(np.mean([(f - o) ** 2 for f, o in zip(p, right, strict=True)]))
    total = parts["reliability"] - parts["resolution"] + parts["uncertainty"]
    assert parts["score"] == pytest.approx(total + parts["within_variance"] - parts["within_covariance"], abs=1e-12)
    assert abs(parts["within_variance"] - parts["within_covariance"]) > 1e-6  # the terms are needed here


def test_known_decomposition():
    """Murphy's own case: forecasts 0 and 1 that are always right have all resolution, no reliability term."""
    parts = brier([0.0] * 5 + [1.0] * 5, [False] * 5 + [True] * 5)
    assert (parts["score"].estimate, parts["reliability"].estimate) == (0, 0)
    assert parts["resolution"].estimate == parts["uncertainty"].estimate == 0.25


def test_auroc_counts_pairs():
    rng = Random(1)
    p = [rng.choice([0.1, 0.3, 0.5, 0.9]) for _ in range(80)]
    right = [rng.random() < each for each in p]
    pairs = [(a, b) for a, o in zip(p, right, strict=True) if o for b, q in zip(p, right, strict=True) if not q]
    expected = sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    assert auroc(p, right).estimate == pytest.approx(expected)
    assert math.isnan(auroc([0.2, 0.4], [True, True]).estimate)


def test_risk_and_coverage():
    p, right = [0.9, 0.8, 0.8, 0.1], [True, True, False, False]
    table = risk_coverage(p, right)
    assert table.coverage.tolist() == [0.25, 0.75, 1] and table.accuracy.tolist() == pytest.approx([1, 2 / 3, 0.5])
    orders = [[0, 0, 1, 1], [0, 1, 0, 1]]  # the two ways to order the tie
    expected = np.mean([[np.mean(order[: k + 1]) for k in range(4)] for order in orders])
    found = risk_coverage_area(p, right).estimate
    assert found == pytest.approx(np.mean([0, 0.25, 1 / 3, 0.5])) == pytest.approx(expected)
    assert risk_coverage_area([0.5] * 10, [True] * 7 + [False] * 3).estimate == pytest.approx(0.3)


def test_bootstrap_over_clusters_agrees_with_the_one_of_means():
    rng = np.random.default_rng(0)
    values, clusters = rng.normal(size=120), np.repeat(np.arange(30), 4).tolist()
    mine = bootstrap_statistics(lambda rows: [values[rows].mean()], 120, clusters, resamples=4000)[0]
    theirs = bootstrap_mean(values, clusters=clusters)
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=0.02)


@pytest.mark.parametrize(
    ("p", "right", "said"),
    [([0.5, 85.0], [True, True], "between 0 and 1"), ([0.5], [True, False], "equal lengths"), ([], [], "empty")],
)
def test_wrong_input_is_named(p, right, said):
    with pytest.raises(ValueError, match=said):
        calibration_error(p, right)


def test_said_confidence():
    cases = {
        "Confidence: 85%": 0.85,
        "confidence is about 70 percent": 0.7,
        "Confianza: 90 %": 0.9,
        "Confidence: 1": None,
    }
    cases |= {
        "Confidence: 0.4": 0.4,
        "Confidence: 140%": None,
        "": None,
        "Confidence: 40": 0.4,
        "certeza: 20 por ciento": 0.2,
    }
    assert {text: said_confidence(text) for text in cases} == cases
    assert asking_confidence(few_shot("steps", 3)).shots == 3


def test_a_stated_confidence_is_not_the_answer(word_problems):
    row = word_problems.rows(n=1)[0]
    text = f"I get {row['answer']}\nConfidence: 85%"
    assert not word_problems.verify(row, text).correct
    assert confidence_task(word_problems).verify(row, text).correct


def test_agreement():
    samples = pd.DataFrame(
        {"id": ["a"] * 4 + ["b"] * 2, "condition": "x", "extracted": ["7", "7", "8", None, None, None]}
    ).assign(correct=[True, True, False, False, False, False])
    found = agreement_confidence(samples).set_index("id")
    assert found.loc["a", ["extracted", "correct", "confidence", "unparsed"]].tolist() == ["7", True, 0.5, 0.25]
    assert found.loc["b", "confidence"] == 0 and not found.loc["b", "correct"]


def test_token_probabilities_are_those_of_one_forward_and_do_not_depend_on_the_batch(lab, word_problems):
    rows = word_problems.rows(n=6)
    prompts = [lab.render(word_problems.messages(row, few_shot("steps", 1))) for row in rows]
    outputs = [row["solutions"]["steps" if number % 2 else "direct"] for number, row in enumerate(rows)]
    together = answer_confidence(lab, prompts, outputs)
    alone = pd.concat([answer_confidence(lab, [p], [o]) for p, o in zip(prompts, outputs, strict=True)])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-8)
    start, end = lab.encode(prompts[1]), lab.tokenizer(outputs[1], add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        scores = lab.model(torch.tensor([start + end])).logits[0].log_softmax(-1)
    expected = [scores[len(start) + place - 1, token].item() for place, token in enumerate(end)]
    assert together.log_p[1] == pytest.approx(sum(expected), rel=1e-4)
    assert together.least_p[1] == pytest.approx(math.exp(min(expected)), rel=1e-3)


def test_confidence_of_the_answer_alone(lab, word_problems):
    row = word_problems.rows(n=1)[0]
    prompt = lab.render(word_problems.messages(row))
    outputs = [row["solutions"]["steps"], row["solutions"]["steps"], ""]
    found = answer_confidence(lab, [prompt] * 3, outputs, answers=[row["answer"], "123456", None])
    whole = answer_confidence(lab, [prompt], outputs[:1])
    assert 0 < found.tokens[0] < whole.tokens[0]
    assert found["product"].isna().tolist() == [False, True, True]


def test_of_the_lab_model(lab, word_problems):
    results = wb.evaluate(lab, word_problems, {"steps": few_shot("steps", 3)}, n=8, batch_size=8, max_new_tokens=80)
    scored = answer_confidence(lab, results.rows.prompt, results.rows.output)
    table = confidence_table(results.rows.assign(confidence=scored.mean_p.to_numpy()))
    assert table.n[0] == 8 and 0 <= table.ece_low[0] <= table.ece_high[0] <= 1


def test_whole_percentages_fall_into_the_bin_above_their_edge():
    said = [percent / 100 for percent in range(0, 101, 10)]
    table = reliability_table(said, [True] * 11)
    assert table.n.tolist() == [1] * 9 + [2] and table.low.tolist() == [percent / 100 for percent in range(0, 91, 10)]
    assert (reliability_table(said, [True] * 11, bins=20).confidence == [*said[:-1], 1.0]).all()


def test_equal_numbers_agree_however_they_are_written():
    samples = pd.DataFrame(
        {"id": "a", "condition": "x", "extracted": ["3", "0.5", "1/2"], "correct": [False, True, True]}
    )
    found = agreement_confidence(samples).iloc[0]
    assert (found.extracted, found.correct, found.confidence) == ("0.5", True, pytest.approx(2 / 3))


def test_one_row_has_no_limits():
    """Not known, which is not 0."""
    for found in (calibration_error([0.5], [True]), calibration_error([0.5] * 3, [True] * 3, clusters=["a"] * 3)):
        assert found.estimate == 0.5 and math.isnan(found.low) and math.isnan(found.high)
    assert "no spread seen" in brier([0.5, 0.5], [True, True])["score"].note
