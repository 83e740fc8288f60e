"""The recipe `programs` and its parts, with the real sandbox: programs against the steps that they are made of."""

from pathlib import Path

import pytest

from tests.tiny import make_tiny
from workbench.models import load_model
from workbench.prompts import Strategy, few_shot
from workbench.sandbox import Limits, isolation, run_many
from workbench.synthesis import synthesize
from workbench.synthesis.programs import SHOTS, as_program, printed, program_task, programs
from workbench.synthesis.sampling import Settings
from workbench.tasks import Task, load_task

pytestmark = pytest.mark.skipif(
    not isolation(), reason="bubblewrap is missing or can't start here: python -m workbench doctor says what to do"
)


class Scripted:
    """A model that answers from a list; everything else is the tiny model's."""

    def __init__(self, lm, texts: list[str]) -> None:
        self.lm, self.texts, self.prompts = lm, texts, []

    def __getattr__(self, name: str):
        return getattr(self.lm, name)

    def generate(self, prompts: list[str], **settings):
        from workbench.generate import Generation

        self.prompts += prompts
        return [
            Generation(
                text=text,
                token_ids=[1],
                tokens_in=3,
                tokens_out=len(text),
                seconds=0.0,
                finished=True,
                forward_passes=1,
            )
            for text, _ in zip(self.texts, prompts, strict=True)
        ]


def row(steps: str, answer: str, question: str = "") -> dict:
    return {"id": "1", "question": question, "answer": answer, "solutions": {"steps": steps}}


def test_worked_steps_become_programs_that_print_the_answer() -> None:
    for name in ("word-problems", "leg-counting", "chain-sum"):
        rows = load_task(name).rows(n=8)
        made = [as_program(each) for each in rows]
        assert all(made)
        assert [printed(found) for found in run_many([each or "" for each in made])] == [
            each["answer"] for each in rows
        ]


@pytest.mark.parametrize(
    ("steps", "answer", "program"),
    [
        ("34+27=61. 61*2=122. The answer is 122.", "122", "a = 34+27\nb = a*2\nprint(b)"),
        ("7/2=3.5", "3.5", "a = 7/2\nprint(a)"),
        ("He pays 2*$1,500=$3,000, so 3000-1=2999 is left.", "2,999", "a = 2*1500\nb = a-1\nprint(b)"),
        ("5-9=-4. -4+7=3.", "3", "a = 5-9\nb = a+7\nprint(b)"),
        ("1+1=3", "3", None),
        ("1+1=2", "5", None),
        ("It is 2.", "2", None),
        ("4/0=4", "4", None),
    ],
)
def test_equations_are_read_or_left_alone(steps: str, answer: str, program: str | None) -> None:
    assert as_program(row(steps, answer)) == program


def test_a_number_of_the_question_stays_a_number() -> None:
    assert as_program(row("2+2=4. 4*4=16.", "16", "2 and 2, times 4")) == "a = 2+2\nb = a*4\nprint(b)"


def test_a_task_of_programs_judges_what_they_print(word_problems: Task) -> None:
    task = program_task(word_problems)
    (example,) = task.rows(n=1)
    assert word_problems.rows(n=1)[0]["solutions"] | {"program": as_program(example)} == example["solutions"]
    right = example["solutions"]["program"]
    assert task.verify(example, right).correct
    assert task.verify(example, f"So:\n```python\n{right}\n```").correct
    wrong = (
        f"{right}\nprint(0)",
        f"{right}\n1/0",
        example["solutions"]["steps"],
        "",
        f"print({example['answer']!r}, 1)",
    )
    assert [task.verify(example, text).correct for text in wrong] == [False] * 5
    assert task.verify(example, "import sys; sys.exit(1)").unparsed
    assert word_problems.verify(example, right).correct is False
    shown = task.messages(example, few_shot("program", 2))
    assert [message["content"] for message in shown if message["role"] == "assistant"] == [
        as_program(each) for each in _shots(task, example)
    ]


def _shots(task: Task, example: dict) -> list[dict]:
    questions = [m["content"] for m in task.messages(example, few_shot("direct", 2)) if m["role"] == "user"][:-1]
    return [next(each for each in task.examples if each["question"] == question) for question in questions]


def test_the_recipe_keeps_programs_that_print_the_answer(tmp_path: Path, word_problems: Task) -> None:
    lm = load_model(make_tiny("llama", tmp_path / "llama"))
    rows = program_task(word_problems).rows("train", n=2)
    good = [f"```python\n{each['solutions']['program']}\n```" for each in rows]
    texts = [
        good[0],
        "print(1)",
        good[0],
        f"{good[1]}\nThe answer is {rows[1]['answer']}.",
        "while True: pass",
        "oops (",
    ]
    model = Scripted(lm, texts)
    settings = Settings(samples=3, strategy=None)
    attempts = programs(
        model, word_problems, word_problems.rows("train", n=2), settings, workers=2, limits=Limits(seconds=2)
    )
    assert [[s["correct"] for s in attempt["samples"]] for attempt in attempts] == [
        [True, False, True],
        [True, False, False],
    ]
    assert [s["text"] for attempt in attempts for s in attempt["samples"]] == texts
    assert attempts[1]["samples"][1]["ran"] == "ran longer than 2 seconds"
    assert attempts[1]["samples"][2]["ran"].endswith("SyntaxError: '(' was never closed")
    assert attempts[0]["samples"][1]["extracted"] == "1"
    assert attempts[0]["cost"] == {"calls": 3, "tokens_in": 9, "tokens_out": sum(map(len, texts[:3]))}
    assert SHOTS.system in model.prompts[0]
    assert model.prompts[0].count("print(") == 3


def test_records_are_made_through_synthesize(tmp_path: Path, word_problems: Task) -> None:
    lm = load_model(make_tiny("llama", tmp_path / "llama"))
    plain = Strategy(system="Write Python.")
    data = synthesize(
        lm, word_problems, programs, n=2, out=tmp_path / "out", strategy=plain, samples=1, max_new_tokens=4
    )
    assert [record["recipe"] for record in data] == ["programs"] * 2
    assert data.kept == []


def test_a_task_of_programs_is_not_made_of_one(word_problems: Task, tmp_path: Path) -> None:
    asking = program_task(word_problems)
    with pytest.raises(ValueError, match="is answered by programs already"):
        program_task(asking)
    with pytest.raises(ValueError, match="is answered by programs already"):
        programs(None, asking, asking.rows("train", n=1), Settings())
