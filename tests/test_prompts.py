"""Strategies put the same question differently; contrastive pairs differ in style only and end in the same tokens."""

from dataclasses import replace

import pytest

from tests.tiny import tiny_lm
from workbench.prompts import Strategy, contrast, few_shot, instruction, messages
from workbench.tasks import Task


def test_no_strategy_is_the_question_alone(word_problems: Task) -> None:
    row = word_problems.rows("test", n=1)[0]
    assert messages(word_problems, row) == [{"role": "user", "content": row["question"]}]
    assert word_problems.messages(row, Strategy()) == word_problems.messages(row)


def test_examples_come_from_tuning_and_never_show_the_question(word_problems: Task) -> None:
    tuning = {row["question"]: row for row in word_problems.examples}
    for row in [*word_problems.rows("test", n=5), *word_problems.examples[:5]]:
        *shown, last = messages(word_problems, row, few_shot("steps", 3))
        assert last["content"] == row["question"]
        questions, answers = shown[::2], shown[1::2]
        assert len(questions) == 3
        for question, answer in zip(questions, answers, strict=True):
            assert question["content"] != row["question"]
            assert answer["content"] == tuning[question["content"]]["solutions"]["steps"]


def test_a_row_s_examples_depend_on_the_row_alone(word_problems: Task) -> None:
    rows = word_problems.rows("test", n=4)
    alone = [messages(word_problems, row, few_shot("steps", 2)) for row in rows]
    assert [messages(word_problems, row, few_shot("steps", 2)) for row in reversed(rows)] == alone[::-1]
    styles = [messages(word_problems, rows[0], few_shot(style, 2)) for style in ("direct", "steps")]
    assert [turn["content"] for turn in styles[0][::2]] == [turn["content"] for turn in styles[1][::2]]


def test_instruction_is_a_system_turn(word_problems: Task) -> None:
    row = word_problems.rows("test", n=1)[0]
    assert messages(word_problems, row, instruction("steps"))[0] == {"role": "system", "content": "Show your steps."}


def test_pairs_ask_the_same_and_end_in_the_same_tokens(word_problems: Task) -> None:
    lm = tiny_lm("llama")
    pairs = contrast(word_problems, shots=2, n=3, lm=lm)
    assert len(pairs) == 3
    for positive, negative in zip(pairs.positive, pairs.negative, strict=True):
        assert positive != negative
        question = positive.rpartition("<|user|>")[2]
        assert negative.rpartition("<|user|>")[2] == question
        assert lm.render([{"role": "user", "content": question.partition("<|end|>")[0]}]) == f"<|user|>{question}"
    assert contrast(word_problems, shots=2, n=3) == pairs  # the lab's format without a model is the same text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"split": "test"}, "leak"),
        ({"positive": "direct"}, "difference would be zero"),
        ({"positive": "poem"}, "no worked solution in style 'poem'"),
    ],
)
def test_pairs_that_make_no_sense_are_refused(word_problems: Task, arguments: dict[str, str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        contrast(word_problems, n=2, **arguments)


def test_wrong_strategies_are_refused() -> None:
    with pytest.raises(ValueError, match="direct, steps, long"):
        few_shot("verbose")
    with pytest.raises(ValueError, match="0 to 64"):
        few_shot(shots=100)


def test_groups_share_examples_and_ask_different_questions(word_problems: Task) -> None:
    plain, pairs = contrast(word_problems, shots=2, n=8), contrast(word_problems, shots=2, n=8, groups=3)
    assert "groups" not in plain.about
    assert pairs.about == plain.about | {"groups": 3}
    for side, usual in ((pairs.positive, plain.positive), (pairs.negative, plain.negative)):
        examples = [text.rpartition("<|user|>")[0] for text in side]
        questions = [text.rpartition("<|user|>")[2] for text in side]
        assert examples == [usual[number % 3].rpartition("<|user|>")[0] for number in range(8)]
        assert len(set(questions)) == 8
        assert all(question not in text for question, text in zip(questions, examples, strict=True))
    ends = [[text.rpartition("<|user|>")[2] for text in side] for side in (pairs.positive, pairs.negative)]
    assert ends[0] == ends[1]
    assert contrast(word_problems, shots=2, n=8, groups=3) == pairs
    assert contrast(word_problems, shots=2, n=8, groups=3, seed=1) != pairs


@pytest.mark.parametrize(("groups", "n"), [(0, 4), (-1, 4), (2, 199)])
def test_groups_that_make_no_sense_are_refused(word_problems: Task, groups: int, n: int) -> None:
    rows = word_problems.rows("train", n=200)
    few = replace(word_problems, draw=lambda split, n, seed: rows)  # a file holds no more than it holds
    with pytest.raises(ValueError, match="a question of its own"):
        contrast(few, shots=2, n=n, groups=groups)


def test_a_generated_task_makes_as_many_questions_as_pairs_need(word_problems: Task) -> None:
    pairs = contrast(word_problems, shots=2, n=230, groups=4)
    assert len({text.rpartition("<|user|>")[2] for text in pairs.positive}) == 230
