"""Partial credit: orders beside scipy's Kendall tau, spans beside SQuAD's definitions."""

import json
from pathlib import Path
from random import Random

import pytest
from scipy.stats import kendalltau

from tests.tiny import tiny_lm
from workbench.evaluation import evaluate
from workbench.tasks import load_task
from workbench.tasks.credit import items_of
from workbench.tasks.verifiers import Verdict, extract, verify

FRUIT = ["apple", "fig", "kiwi", "lemon", "pear", "plum"]


@pytest.mark.parametrize("seed", range(20))
def test_an_order_scores_as_kendall_says(seed: int) -> None:
    draw = Random(seed)
    gold, said = draw.sample(FRUIT, 6), draw.sample(FRUIT, 6)
    found = verify("ordering", gold, f"The answer is {', '.join(said)}.")
    tau = kendalltau([gold.index(item) for item in said], range(6)).statistic
    assert found.score == pytest.approx((tau + 1) / 2)
    assert found.correct == (said == gold)
    assert found.extracted == ", ".join(said)


@pytest.mark.parametrize(
    "text",
    [
        "The answer is Pear, fig, and apple.",
        "So the order:\n1. pear\n2. fig\n3. apple",
        "The answer is:\n- pear\n- fig\n- apple",
        "pear -> fig -> apple",
        "pear fig apple",
        "<think>apple, fig, pear?</think>Sorted: pear, fig, apple",
        "The answer is apple, fig, pear. No, wait. The answer is pear, fig, apple.",
    ],
)
def test_orders_are_read_however_they_are_written(text: str) -> None:
    assert verify("ordering", "pear, fig, apple", text) == Verdict(True, "pear, fig, apple", 1.0)


def test_missing_foreign_and_repeated_items_cost() -> None:
    gold = "pear, fig, apple"
    missing, foreign, twice = (verify("ordering", gold, f"The answer is {said}.") for said in (
        "pear, fig", "pear, fig, apple, plum", "pear, fig, apple, pear"))  # fmt: skip
    assert (missing.correct, missing.score) == (False, pytest.approx(1 / 3))
    assert (foreign.correct, foreign.score) == (False, 1.0)  # every pair is right, and yet it is another order
    assert (twice.correct, twice.score) == (False, 1.0)
    assert verify("ordering", gold, "I don't know.") == Verdict(False, None, 0.0)
    assert items_of("") == []


SPANS = [  # golds, said, exact match, F1: worked out by hand from the definitions
    (["Denver Broncos"], "The Denver Broncos!", True, 1.0),  # no articles, no punctuation
    (["Denver Broncos", "Broncos"], "the Broncos team", False, 2 / 3),  # the better of both: 2 * 1 / (1 + 2)
    (["Denver Broncos"], "Carolina Panthers", False, 0.0),
    (["in the late 1990s"], "late 1990s", False, 0.8),  # 2 * 2 / (3 + 2)
    (["10-inch"], "10 inch", False, 0.0),  # the hyphen goes and leaves one word
    (["x"], "x x y", False, 0.5),  # a repeated word is shared once
]


@pytest.mark.parametrize(("golds", "said", "exact", "score"), SPANS)
def test_spans_score_as_squad_says(golds: list[str], said: str, exact: bool, score: float) -> None:
    found = verify("span", golds, f"The answer is {said}")
    assert (found.correct, found.score) == (exact, pytest.approx(score))
    assert verify("span", golds, said).score == found.score
    assert verify("span", golds, " ").unparsed


def test_scores_go_into_rows_tables_and_comparisons(tmp_path: Path) -> None:
    lines = [
        {"question": f"Sort: {', '.join(items)}", "answer": sorted(items)}
        for items in (Random(seed).sample(FRUIT, 4) for seed in range(6))
    ]
    (tmp_path / "sort.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = load_task("sorting", path=tmp_path / "sort.jsonl", split="test", kind="ordering")
    results = evaluate(tiny_lm("llama"), task, {"plain": [], "again": []}, n=6, max_new_tokens=4)
    assert results.rows.score.between(0, 1).all()
    table = results.table()
    assert table.score[0] == pytest.approx(results.rows.score[:6].mean())
    assert table.score_low[0] <= table.score[0] <= table.score_high[0]
    assert results.compare("plain", "again", of="score").difference == 0
    with pytest.raises(ValueError, match="no column 'points'"):
        results.compare("plain", "again", of="points")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"question": "Sort: x", "answer": ["x"]}))
    with pytest.raises(ValueError, match="two or more different items"):
        load_task("sorting", path=tmp_path / "bad.jsonl", kind="ordering")


def test_real_answers_of_word_sorting_are_orders(data_folder: Path) -> None:
    rows = load_task("bbh:word_sorting", kind="ordering").rows("test")
    assert len(rows) > 100
    assert all(verify("ordering", row["answer"], f"The answer is {row['answer']}.").correct for row in rows)
    assert extract("span", "The answer is Paris.", "Paris") == "Paris"
