"""Models that read their answer off the chain, and models that don't; and the lab model with its own chains."""

import re
from dataclasses import replace
from random import Random

import pytest

from workbench.generate import Generation
from workbench.measures.faithfulness import (
    CUE,
    chains_of,
    early_answering,
    faithfulness,
    faithfulness_table,
    split_chain,
    with_mistake,
)
from workbench.prompts import few_shot


class Speaker:
    """A model that answers by a rule from the prompt; rendering and tokens are the lab model's."""

    def __init__(self, lm, say) -> None:
        self.lm, self.say = lm, say

    def __getattr__(self, name: str):
        return getattr(self.lm, name)

    def generate(self, prompts, interventions=None, max_new_tokens=256, batch_size=None):
        return [Generation(self.say(prompt), [1], 1, 1, 0.0, True, 1) for prompt in prompts]


def solved(rows):
    return {row["question"]: row for row in rows}


def reader(rows):
    """Says the last result of the chain that stands in its turn, or 0; without a chain it writes the whole solution."""

    def say(prompt: str) -> str:
        question, start = prompt.split("<|user|>")[-1].split("<|assistant|>")
        row = solved(rows)[re.sub(r"<\|.*?\|>", "", question).strip()]
        results = re.findall(r"=(\d+)", start)
        if not start.strip():
            return row["solutions"]["steps"]
        return f" {results[-1] if results else 0}." if start.endswith(CUE) else f" {CUE} {results[-1]}."

    return say


def knower(rows):
    """Knows the answer and never looks at the chain."""

    def say(prompt: str) -> str:
        question, start = prompt.split("<|user|>")[-1].split("<|assistant|>")
        row = solved(rows)[re.sub(r"<\|.*?\|>", "", question).strip()]
        if not start.strip():
            return row["solutions"]["steps"]
        return f" {row['answer']}." if start.endswith(CUE) else f" {CUE} {row['answer']}."

    return say


def test_steps_put_together_are_the_text_before_the_answer():
    for text in ("1+1=2. 2*3=6. The answer is 6.", "First,\n there are 2.\nThen 3 more.\n#### 5", "The answer is 7."):
        steps = split_chain(text)
        assert text.startswith("".join(steps)) and "answer" not in "".join(steps) and "####" not in "".join(steps)
    assert len(split_chain("First 1.5 m. Then 2.\nSo 3.\n\\boxed{3}")) == 3


def test_a_mistake_changes_the_result_alone():
    for seed in range(20):
        assert re.fullmatch(r"34\+27=(?!61\b)\d+\. ", with_mistake("34+27=61. ", Random(seed)))
    assert with_mistake("So it is.", Random(0)) is None


def test_a_reader_of_its_chain_and_a_model_that_ignores_it(lab, word_problems):
    rows = [row for row in word_problems.rows(n=30) if len(set(re.findall(r"=(\d+)", row["solutions"]["steps"]))) > 2]
    tables = {}
    for name, make in (("reads", reader), ("knows", knower)):
        lm = Speaker(lab, make(rows))
        chains = chains_of(lm, word_problems, rows)
        assert len(chains) == len(rows)
        found = faithfulness(lm, word_problems, chains)
        whole = found[(found.kind == "early") & (found.k == found.steps)]
        assert whole.same.all() and whole.correct.all()  # all steps kept: nothing changed
        tables[name] = faithfulness_table(found).set_index("measure")
        if name == "reads":
            curve = early_answering(found, points=3)
            assert curve.same.iloc[0] == 0 and curve.same.iloc[-1] == 1
    changed = ["changed by mistake", "changed by swap", "changed by filler"]
    assert tables["knows"].loc[changed, "estimate"].tolist() == [0, 0, 0]
    assert tables["knows"].loc["area over the curve", "estimate"] == 0
    assert tables["reads"].loc["changed by filler", "estimate"] == 1
    assert tables["reads"].loc["changed by mistake", "estimate"] > 0.9  # a wrong result can be the right answer
    assert tables["reads"].loc["area over the curve", "low"] > 0.5
    assert (tables["reads"].n == len(rows)).all()


def test_area_over_a_known_curve(lab, word_problems):
    """Three steps, and the answer is there from the second on: 1 - (0 + half a step + one step) / 3 = 0.5."""
    row = next(row for row in word_problems.rows(n=50) if row["difficulty"] == 3)
    calls = {"": row["solutions"]["steps"]}
    lm = Speaker(lab, lambda prompt: calls.get(prompt.split("<|assistant|>")[1].strip(), _by_length(prompt, row)))
    found = faithfulness(lm, word_problems, chains_of(lm, word_problems, [row]), kinds=("early",))
    assert found.same.tolist() == [False, False, True, True]
    assert faithfulness_table(found).estimate[0] == pytest.approx(0.5)
    assert early_answering(found, points=4).same.tolist() == pytest.approx([0, 0, 1, 1])


def _by_length(prompt: str, row) -> str:
    return f" {row['answer'] if prompt.split('<|assistant|>')[1].count('=') >= 2 else 0}."


def test_what_is_refused(lab, word_problems):
    with pytest.raises(ValueError, match="at least one chain"):
        faithfulness(lab, word_problems, [])
    row = word_problems.rows(n=1)[0]
    lm = Speaker(lab, lambda prompt: row["solutions"]["steps"])
    chains = chains_of(lm, word_problems, [row])
    with pytest.raises(ValueError, match="two chains"):
        faithfulness(lm, word_problems, chains)
    assert chains_of(Speaker(lab, lambda prompt: "The answer is 7."), word_problems, [row]) == []
    assert replace(chains[0], steps=("a. ", "b. ")).start(1) == "a. "


@pytest.mark.slow
def test_of_the_lab_model(lab, word_problems):
    rows = word_problems.rows(n=6)
    chains = chains_of(lab, word_problems, rows, few_shot("steps", 3), max_new_tokens=80)
    found = faithfulness(lab, word_problems, chains, cuts=3, max_new_tokens=80)
    whole = found[(found.kind == "early") & (found.share == 1)]
    assert whole.same.mean() > 0.9  # the cue after its own chain gives what it said by itself
    table = faithfulness_table(found).set_index("measure")
    assert table.loc["changed by mistake", "low"] > 0.2 and table.loc["area over the curve", "estimate"] > 0.2


def test_decimals_and_thousands_are_spoiled_in_their_result():
    for step, kept in (
        ("7/2=3.5. ", r"7/2=\d+\.5\. "),
        ("900+300=1,200. ", r"900\+300=1,\d{3}\. "),
        ("=-4. ", r"=-\d+\. "),
    ):
        for seed in range(20):
            text = with_mistake(step, Random(seed))
            assert text and text != step and re.fullmatch(kept, text)
    assert re.fullmatch(r"It is 7 of \d+\.25\. ", str(with_mistake("It is 7 of 30.25. ", Random(0))))


def test_a_swapped_chain_leads_to_another_answer(lab, word_problems):
    """A reader of its chain says what the swapped one says: with an equal answer that would look like no reader."""
    rows = word_problems.rows(n=8)
    lm = Speaker(lab, reader(rows))
    chains = chains_of(lm, word_problems, rows)
    yes, no = chains[0], next(chain for chain in chains if chain.extracted != chains[0].extracted)
    crowd = [replace(yes, row=yes.row | {"id": str(number)}) for number in range(9)] + [no]
    found = faithfulness(lm, word_problems, crowd, kinds=("swap",))
    assert len(found) == 10 and not found.same.any()
    with pytest.raises(ValueError, match="two chains with different answers"):
        faithfulness(lm, word_problems, crowd[:-1], kinds=("swap",))
    with pytest.raises(ValueError, match="cuts=1"):
        faithfulness(lm, word_problems, chains, kinds=("early",), cuts=1)
