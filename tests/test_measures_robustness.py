"""Perturbations against gold answers worked out in another way, and the rates of models that keep, copy or follow."""

import re
from dataclasses import replace
from random import Random

import pandas as pd
import pytest

import workbench as wb
from workbench.measures import chains, perturbations
from workbench.measures.perturbations import CANNOT
from workbench.measures.robustness import adapt_rate, keep_rate, perturb, perturbed, reworded, shuffled_shots
from workbench.measures.syllogisms import follows, parsed
from workbench.measures.word_problems import reading
from workbench.prompts import few_shot
from workbench.tasks import load_task
from workbench.tasks.verifiers import verify

STAY = (perturbations.paraphrase, perturbations.rename)
MOVE = (perturbations.change_number, perturbations.change_quantifier)


def answers(task, rows, say, condition="model") -> pd.DataFrame:
    """Rows as `evaluate` makes them, of a model that says what `say(row)` gives."""
    lines = []
    for row in rows:
        verdict = task.verify(row, say(row))
        line = {"id": row["id"], "condition": condition, "answer": str(row["answer"]), "output": say(row)}
        lines.append(line | {"extracted": verdict.extracted, "correct": verdict.correct, "unparsed": verdict.unparsed})
    return pd.DataFrame(lines)


def worked_out(question: str) -> int:
    """The answer to a word problem by following its sentences, written apart from the package's reader."""
    value = int(re.search(r"has (\d+)", question)[1])
    for sentence in re.split(r"(?<=\.)\s", question)[1:]:
        number = re.search(r"\d+", sentence)
        if "half" in sentence:
            value //= 2
        elif "doubles" in sentence or "triples" in sentence:
            value *= 2 if "doubles" in sentence else 3
        elif number:
            value += int(number[0]) * (-1 if re.search("loses|sells|gives", sentence) else 1)
    return value


@pytest.mark.parametrize("change", [*STAY, *MOVE])
def test_word_problems_are_worked_out_again(word_problems, change):
    rows = word_problems.rows(n=150)
    changed, left_out = perturb(rows, change)
    assert len(changed) + sum(left_out.values()) == 150 and len(changed) > 140
    by_id = {row["id"]: row for row in rows}
    for row in changed:
        assert row["question"] != by_id[row["id"]]["question"]
        assert worked_out(row["question"]) == int(row["answer"])
        assert (row["answer"] == row["original_answer"]) == (change in STAY)


def test_every_lab_word_problem_is_read_back(word_problems):
    for row in word_problems.rows(n=200, seed=3):
        problem = reading(row["question"])
        assert problem.text() == row["question"] and str(problem.value()) == row["answer"]


@pytest.mark.parametrize("family", ["chain-sum", "leg-counting", "number-sorting", "gcd", "syllogism"])
def test_other_families_are_worked_out_again(family):
    pytest.importorskip("reasoning_gym", reason="five of the lab's families are drawn from it")
    task = load_task(family)
    rows = {row["id"]: row for row in task.rows(n=60)}
    for change in MOVE:
        for row in perturb(list(rows.values()), change)[0]:
            old, asked = rows[row["id"]], row["question"]
            assert asked != old["question"] and row["answer"] != old["answer"]
            if family == "chain-sum":
                assert eval(asked.split(": ")[1].removesuffix(" =")) == int(row["answer"])
            if family == "number-sorting":
                numbers = sorted(map(int, asked.split(": ")[1].split(", ")), reverse="descending" in asked)
                assert verify("list", numbers, f"The answer is {row['answer']}.").correct
            if family == "gcd":
                a, b = map(int, re.findall(r"\d+", asked))
                assert max(d for d in range(1, 61) if a % d == b % d == 0) == int(row["answer"])
    assert len(perturb(list(rows.values()), perturbations.paraphrase)[0]) == 60


def test_syllogisms_by_the_textbook():
    barbara = ("All cats are pets", "All pets are kind", "All cats are kind")
    assert follows(*barbara) and not follows(barbara[0], barbara[2], barbara[1])
    assert follows("No pets are kind", "All cats are pets", "No kind are cats")
    assert follows("Some cats are pets", "All pets are kind", "Some kind are cats")
    assert follows("All pets are kind", "All pets are cats", "Some cats are kind")  # Darapti, by existential import
    assert not follows("Some cats are pets", "Some pets are kind", "Some cats are kind")
    assert not follows("Some cats are not pets", "All pets are kind", "Some cats are not kind")
    assert parsed("What is 1 + 1?") is None


def test_gsm8k_notes_and_svamp_equations():
    ducks = {"id": "1", "question": "Ana lays 16 eggs. She eats three. She sells the rest for $4 each. How much?"}
    ducks |= {"answer": "52", "solution": "16-3=<<16-3=13>>13\n13*4=<<13*4=52>>52\n#### 52"}
    changed = chains.changed_number(ducks, Random(1))
    eggs, price = re.findall(r"\d+", changed["question"])
    assert (int(eggs) - 3) * int(price) == int(changed["answer"]) != 52
    twice = ducks | {"question": ducks["question"] + " A note: 16 and 4."}
    assert chains.changed_number(twice, Random(1)) == "an operand that can't be traced to one place"
    untold = ducks | {"solution": "16-3-1=<<16-3-1=12>>12 12*4=<<12*4=48>>48"}
    assert chains.changed_number(untold, Random(1)) == "the calculation doesn't end in the gold answer"
    strange = ducks | {"solution": "16-11=<<16-11=5>>5", "answer": "5"}
    assert "traced" in chains.changed_number(strange, Random(1))
    assert "no worked calculation" in chains.changed_number({**ducks, "solution": None}, Random(1))
    dvds = {"id": "2", "question": "A pack costs 76 dollars, 25 off. How much?", "answer": "51"}
    changed = chains.changed_number(dvds | {"equation": "( 76.0 - 25.0 )"}, Random(0))
    assert eval("{}-{}".format(*re.findall(r"\d+", changed["question"]))) == int(changed["answer"])


@pytest.mark.parametrize("name", ["gsm8k", "svamp"])
def test_real_files_give_rows_whose_gold_answer_moved(name, data_folder):
    rows = load_task(name, path=data_folder).rows()
    for change in (perturbations.change_number, perturbations.delete_number):
        changed, left_out = perturb(rows, change)
        assert len(changed) + sum(left_out.values()) == len(rows)
        assert len(changed) > (0.3 if name == "gsm8k" else 0.9) * len(rows)
        assert all(row["answer"] != row["original_answer"] and "solution" not in row for row in changed)


def test_identity_keeps_all_and_a_copy_follows_none(word_problems):
    def identity(row, rng):
        return dict(row)

    rows = word_problems.rows(n=50)
    gold = {row["id"]: row["answer"] for row in rows}
    wrong = set(list(gold)[:20])
    say = lambda row: f"The answer is {0 if row['id'] in wrong else gold[row['id']]}."  # noqa: E731  # a copy
    before = answers(word_problems, rows, say)
    same = perturbed(word_problems, identity)
    kept = keep_rate(before, answers(same, same.rows(n=50), say))
    assert kept[["rate", "n", "difference"]].iloc[0].tolist() == [1, 30, 0] and kept.low[0] < 1
    moved = perturbed(word_problems, perturbations.change_number)
    copied = adapt_rate(before, answers(moved, moved.rows(n=50), say))
    assert copied.rate[0] == 0 and copied.stuck[0] == 1
    followed = adapt_rate(before, answers(moved, moved.rows(n=50), lambda row: f"The answer is {row['answer']}."))
    assert followed.rate[0] == 1 and followed.stuck[0] == 0
    with pytest.raises(ValueError, match="use adapt_rate"):
        keep_rate(before, answers(moved, moved.rows(n=50), say))


def test_several_changes_a_question_are_one_cluster(word_problems):
    rows = word_problems.rows(n=30)
    before = answers(word_problems, rows, lambda row: f"The answer is {row['answer']}.")
    half = {row["id"] for row in rows[:15]}
    after = pd.concat([before.assign(correct=before.id.isin(half))] * 8)
    found, once = keep_rate(before, after), keep_rate(before, after.drop_duplicates("id"))
    assert found.n[0] == 240 and found.questions[0] == 30
    assert found.high[0] - found.low[0] == pytest.approx(once.high[0] - once.low[0], abs=0.05)


def test_questions_without_a_partner_are_refused(word_problems):
    rows = word_problems.rows(n=6)
    frame = answers(word_problems, rows, lambda row: "The answer is 1.")
    with pytest.raises(ValueError, match="same n and seed"):
        keep_rate(frame.iloc[:3], frame)
    with pytest.raises(ValueError, match="none of 6"):
        keep_rate(frame.assign(correct=False), frame)
    with pytest.raises(ValueError, match="no rule works its gold answer out"):
        perturbed(replace(word_problems, draw=lambda *_: [{"id": "1", "question": "?", "answer": "1"}]), MOVE[1]).rows()


def test_deleted_numbers_and_examples_of_the_original(word_problems):
    gap = perturbed(word_problems, perturbations.delete_number)
    row = gap.rows(n=1)[0]
    assert row["answer"] == CANNOT and "some" in row["question"]
    assert gap.verify(row, "It cannot be answered.").correct
    assert not gap.verify(row, "The answer is 7.").correct and gap.verify(row, "The answer is 7.").extracted == "7"
    original = word_problems.rows(n=1)[0]
    strategy = few_shot("steps", 3)
    assert gap.messages(row, strategy)[:-1] == word_problems.messages(original, strategy)[:-1]


def test_order_of_examples_and_wording(word_problems):
    row, strategy = word_problems.rows(n=1)[0], few_shot("steps", 3)
    plain, mixed = (task.messages(row, strategy) for task in (word_problems, shuffled_shots(word_problems)))
    assert plain != mixed and plain[-1] == mixed[-1]
    assert sorted(m["content"] for m in plain) == sorted(m["content"] for m in mixed)
    assert [m["role"] for m in plain] == [m["role"] for m in mixed]
    with pytest.raises(ValueError, match="no other order"):
        shuffled_shots(word_problems).messages(row)
    with pytest.raises(ValueError, match="one place"):
        reworded(word_problems, "Solve this.")


@pytest.mark.slow
def test_of_the_lab_model(lab, word_problems):
    asked = {"steps": few_shot("steps", 3)}
    settings = {"n": 16, "max_new_tokens": 80}
    before = wb.evaluate(lab, word_problems, asked, **settings)
    kept = keep_rate(
        before.rows, wb.evaluate(lab, perturbed(word_problems, perturbations.paraphrase), asked, **settings).rows
    )
    moved = wb.evaluate(lab, perturbed(word_problems, perturbations.change_number), asked, **settings)
    followed = adapt_rate(before.rows, moved.rows)
    assert kept.low[0] > 0.3 and followed.low[0] > 0.3 and followed.stuck[0] < 0.2


def test_a_deleted_number_is_one_that_the_answer_needs():
    head = "Find the Greatest Common Divisor (GCD) of these numbers: "
    for seed in range(20):
        gap = perturbations.delete_number({"id": "1", "question": f"{head}12, 18, 25.", "answer": "1"}, Random(seed))
        assert gap["question"] == f"{head}12, 18, ?."  # without 12 or 18 it is 1 whatever was there
    assert "same whatever" in perturbations.delete_number({"question": f"{head}2, 3, 5, 7.", "answer": "1"}, Random(0))
    eggs = {"id": "2", "question": "Ana has 9 pens, 8 cups, 16 eggs and eats 5. Eggs?", "answer": "11"}
    eggs |= {"solution": "9+8=<<9+8=17>>17 other things. 16-5=<<16-5=11>>11"}
    for seed in range(20):
        gap = perturbations.delete_number(eggs, Random(seed))
        assert "9 pens, 8 cups" in gap["question"] and "some" in gap["question"]


def test_an_order_that_stays_is_left_out():
    row = {"id": "1", "question": "Sort these numbers in ascending order: 5, 5", "answer": "5, 5"}
    assert perturbations.change_quantifier(row, Random(0)) == "the answer stays the same"


def test_all_kept_in_several_changes_keeps_a_width(word_problems):
    rows = word_problems.rows(n=12)
    before = answers(word_problems, rows, lambda row: f"The answer is {row['answer']}.")
    found = keep_rate(before, pd.concat([before, before]))
    assert found.rate[0] == found.high[0] == 1 and 0.6 < found.low[0] < 0.9
