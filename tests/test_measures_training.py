"""Planted leaks and planted losses: contamination of a test, and forgetting on other tasks."""

import math

import pandas as pd
import pytest

from workbench.measures.contamination import contamination_table, overlaps, record_texts, two_shares
from workbench.measures.forgetting import forgetting_table
from workbench.results import Results
from workbench.statistics import paired_difference


def answered(ids, right, condition="model") -> pd.DataFrame:
    return pd.DataFrame({"id": list(ids), "condition": condition, "correct": list(right)})


def test_planted_leaks_are_found_and_fresh_siblings_are_not(word_problems):
    rows = word_problems.rows(n=200)
    fresh = [row["question"] for row in word_problems.rows("train", n=400)]
    leaked = {row["id"] for row in rows[:40]}
    records = [{"messages": [{"role": "user", "content": text}]} for text in fresh]
    records += [{"messages": [{"role": "user", "content": row["question"].upper()}]} for row in rows[:40]] * 2
    found = overlaps(rows, record_texts(records))
    assert set(found[found.dirty].id) >= leaked
    assert len(set(found[found.dirty].id) - leaked) <= 0.05 * 160
    assert found.why[0].startswith("the whole question is training text")
    story = "A baker in Lund packs 144 rye loaves into crates of nine before dawn; how many crates leave the yard?"
    inside = overlaps([*rows[60:80], {"id": "own", "question": story}], [*fresh, f"Once more: {story} Say it."])
    assert inside.dirty.tolist()[-1] and "13 tokens in a row shared with training text" in inside.why.tolist()[-1]
    with pytest.raises(ValueError, match="0 training texts"):
        overlaps(rows, [])


def test_memory_raises_dirty_questions_alone():
    ids = [str(number) for number in range(200)]
    overlap = pd.DataFrame({"id": ids, "dirty": [number < 60 for number in range(200)]})
    honest = answered(ids, [number % 2 == 0 for number in range(200)], "honest")
    memory = answered(ids, [number < 60 or number % 2 == 0 for number in range(200)], "memory")
    table = contamination_table(pd.concat([honest, memory]), overlap, baseline="honest").set_index("condition")
    assert table.loc["memory", ["share", "clean", "dirty", "difference", "excess"]].tolist() == [0.3, 0.5, 1, 0.5, 0.5]
    assert table.loc["memory", "difference_low"] > 0.35 and table.loc["memory", "excess_low"] > 0.3
    assert table.loc["honest", "difference"] == 0 and table.loc["honest", "p_value"] == 1
    assert math.isnan(table.loc["honest", "excess"])
    easy = answered(ids, [number < 60 for number in range(200)], "easy")  # dirty ones were easier before, too
    both = contamination_table(pd.concat([easy, easy.assign(condition="after")]), overlap, baseline="easy")
    assert both.difference[1] == 1 and both.excess[1] == 0
    clean = contamination_table(honest, overlap.assign(dirty=False))
    assert math.isnan(clean.dirty[0]) and clean.clean[0] == 0.5
    with pytest.raises(ValueError, match="not in the overlap"):
        contamination_table(honest, overlap.iloc[1:])
    with pytest.raises(ValueError, match="no condition"):
        contamination_table(honest, overlap, baseline="other")


def test_difference_of_two_samples_against_statsmodels():
    proportion = pytest.importorskip("statsmodels.stats.proportion", reason="holds Newcombe's limits")
    for right, n, hits, m in ((56, 70, 48, 80), (9, 10, 3, 10), (0, 10, 5, 30)):
        found = two_shares([1] * hits + [0] * (m - hits), [1] * right + [0] * (n - right))
        expected = proportion.confint_proportions_2indep(right, n, hits, m, method="newcomb")
        assert (found.low, found.high) == pytest.approx(expected, abs=1e-9)


def test_forgetting_of_planted_losses():
    def results(lost: int, n: int = 60) -> Results:
        ids = [str(number) for number in range(n)]
        rows = [answered(ids, [number < 40 for number in range(n)], "plain")]
        rows += [answered(ids, [lost <= number < 40 for number in range(n)], "tuned")]
        return Results(pd.concat(rows, ignore_index=True), {"plain": {}, "tuned": {}})

    table = forgetting_table({"kept": results(0), "some": results(6), "all": results(40)})
    assert table.task.tolist() == ["kept", "some", "all"]
    assert table.difference.tolist() == pytest.approx([0, -0.1, -2 / 3]) and table.high[2] < -0.5
    alone = paired_difference([n < 40 for n in range(60)], [6 <= n < 40 for n in range(60)])
    assert (table.low[1], table.high[1], table.p_value[1]) == (alone.low, alone.high, alone.p_value)
    assert table.p_holm.tolist() == pytest.approx([1, 2 * alone.p_value, 3 * table.p_value[2]])
    assert table.before.tolist() == pytest.approx([2 / 3] * 3) and table.after[2] == 0 and table.after_high[2] > 0
    swapped = forgetting_table({"all": results(40)}, "tuned", "plain")
    assert swapped.difference[0] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="both 'plain'"):
        forgetting_table({"all": results(1)}, "plain", "plain")
    with pytest.raises(ValueError, match="No tasks"):
        forgetting_table({})


def test_a_leak_that_stands_in_many_training_texts_is_found(word_problems):
    leaked = "A glazier trims nine crooked panes before lunch, seals four more at dusk and drops one on the stairs."
    question = {"id": "1", "question": f"{leaked} How many are whole?"}
    others = [f"Text {number} is about nothing of the kind." for number in range(90)]
    for copies in (1, 2, 5):  # in other words around it each time, so that no text is equal to another
        texts = [*others, *(f"Example {number}: {leaked}" for number in range(copies))]
        assert overlaps([question], texts).dirty.tolist() == [True]
    fresh = word_problems.rows(n=200)
    trained = [row["question"] for row in word_problems.rows(split="train", n=400)]
    for n in (1, 10, 200):
        assert overlaps(fresh[:n], trained).dirty.mean() <= 0.02
