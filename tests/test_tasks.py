"""Tasks: splits that share nothing, samples that repeat exactly, files that are read or refused by line."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas
import pytest

from workbench import prompts
from workbench.lab.families import FAMILIES
from workbench.tasks import SPLITS, gym, load_task, task_names
from workbench.tasks.benchmarks import SHARES, split_of

DATA = os.environ.get("WORKBENCH_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="WORKBENCH_DATA names no folder with benchmark files")
GYM = ("reasoning-gym:chain_sum", "reasoning-gym:leg_counting", "reasoning-gym:maze")
SUMS = [{"question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(1, 61)]


def write(folder: Path, rows: list[dict], ending: str) -> Path:
    file = folder / f"sums.{ending}"
    if ending == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == "json":
        file.write_text(json.dumps({"version": 1, "examples": rows}))
    elif ending == "csv":
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pandas.DataFrame(rows).to_parquet(file)
    return file


def texts(task, split, **which):
    return [row["question"] for row in task.rows(split, **which)]


@pytest.mark.parametrize("name", [*FAMILIES, *GYM])
def test_generated_splits_are_disjoint_and_repeat_exactly(name):
    task, again = load_task(name), load_task(name)
    drawn = {split: texts(task, split, n=20, seed=3) for split in SPLITS}
    assert len({question for questions in drawn.values() for question in questions}) == 60
    assert task.rows("test", n=5, seed=3) == again.rows("test", n=20, seed=3)[:5]
    assert texts(task, "test", n=20, seed=4) != drawn["test"]
    for row in task.rows("test", n=5):
        assert task.verify(row, f"The answer is {row['answer']}.").correct
        assert task.verify(row, "").extracted is None


@pytest.mark.parametrize("family", FAMILIES)
def test_every_worked_solution_of_the_lab_is_right(family):
    task = load_task(family)
    for row in task.rows("tuning", n=20):
        assert all(task.verify(row, solution).correct for solution in row["solutions"].values())
        assert task.messages(row) == [{"role": "user", "content": row["question"]}]


def test_a_strategy_is_prompts_own_work():
    task = load_task("word-problems")
    row = task.rows(n=1)[0]
    strategy = prompts.few_shot("steps", shots=2)
    assert task.messages(row, strategy) == prompts.messages(task, row, strategy)
    assert len(task.messages(row, strategy)) == 5


def test_a_knob_makes_problems_harder():
    assert {row["difficulty"] for row in load_task("word-problems", steps=(9, 9)).rows(n=5)} == {9}


@needs_data
@pytest.mark.parametrize(
    ("name", "kind", "sizes"),
    [
        ("gsm8k", "number", (7473, 1319)),
        ("svamp", "number", (416, 584)),
        ("aqua", "option", (254, 254)),
        ("math500", "latex", (204, 296)),
        ("humaneval", "code", (56, 108)),
        ("bbh:boolean_expressions", "text", (117, 133)),
        ("bbh:object_counting", "number", (108, 142)),
        ("bbh:ruin_names", "option", (87, 161)),
    ],
)
def test_benchmarks(name, kind, sizes):
    task = load_task(name)
    drawn = {split: texts(task, split) for split in SPLITS}
    assert task.kind == kind
    assert (len(drawn["train"]) + len(drawn["tuning"]), len(drawn["test"])) == sizes
    assert all(drawn.values())
    assert len({question for questions in drawn.values() for question in questions}) == sum(sizes)
    sample = task.rows("test", n=40, seed=1)
    assert sample[:10] == load_task(name).rows("test", n=10, seed=1)
    assert len({row["id"] for row in task.rows("test")}) == sizes[1]
    if kind != "code":
        assert all(task.verify(row, row["solutions"]["direct"]).correct for row in sample)
        worked = [row for row in sample if "steps" in row["solutions"]]
        assert all(task.verify(row, row["solutions"]["steps"]).correct for row in worked)


@needs_data
def test_gsm8k_test_questions_stay_together_and_in_order():
    lines = [json.loads(line) for line in Path(DATA or "", "gsm8k", "test.jsonl").read_text().splitlines()]
    for path in (None, Path(DATA or "", "gsm8k"), Path(DATA or "", "gsm8k", "test.jsonl")):
        assert texts(load_task("gsm8k", path=path), "test") == [line["question"].strip() for line in lines]


@needs_data
def test_aqua_lists_its_options_in_the_question():
    row = load_task("aqua").rows("test")[0]
    assert row["question"].endswith("\n".join(row["options"]))
    assert row["options"][0].startswith("(A) ")


@needs_data
def test_every_part_of_bbh_loads():
    parts = [name for name in task_names() if name.startswith("bbh:")]
    held = sum(len(load_task(part).rows(split)) for part in parts for split in SPLITS)
    assert (len(parts), held) == (27, 6511 - 4 - 3)  # four repeated questions, three gold answers that are no option


def test_humaneval_without_tests_refuses_to_judge(tmp_path):
    (tmp_path / "HumanEval.jsonl").write_text(
        json.dumps({"task_id": "T/0", "prompt": "def f():\n", "canonical_solution": " return 1\n", "entry_point": "f"})
    )
    task = load_task("humaneval", path=tmp_path, split="test")
    with pytest.raises(ValueError, match="lacks test"):
        task.verify(task.rows()[0], "def f(): return 1")


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "parquet"])
def test_plain_files_give_the_same_task(tmp_path, ending):
    task = load_task("sums", path=write(tmp_path, SUMS, ending))
    drawn = {split: task.rows(split) for split in SPLITS}
    assert task.kind == "number"
    assert sum(map(len, drawn.values())) == 60
    assert all(split_of(row["question"], SHARES["all"]) == split for split, rows in drawn.items() for row in rows)
    assert all(task.verify(row, f"It is {row['answer']}.").correct for rows in drawn.values() for row in rows)
    assert {row["question"]: int(row["answer"]) for rows in drawn.values() for row in rows} == {
        row["question"]: row["answer"] for row in SUMS
    }


def test_gsm8k_from_a_plain_file_and_a_whole_file_in_one_split(tmp_path):
    task = load_task("gsm8k", path=write(tmp_path, SUMS, "jsonl"), split="test")
    assert texts(task, "test") == [row["question"] for row in SUMS]
    with pytest.raises(ValueError, match="0 train, 0 tuning, 60 test"):
        task.rows("tuning", n=1)


def test_a_known_question_is_in_one_split_only(tmp_path):
    write(tmp_path, SUMS, "jsonl").rename(tmp_path / "train.jsonl")
    write(tmp_path, SUMS[:30], "jsonl").rename(tmp_path / "test.jsonl")
    task = load_task("gsm8k", path=tmp_path)
    assert [len(task.rows("test")), len(task.rows("train")) + len(task.rows("tuning"))] == [30, 30]


def test_unusual_columns_and_kinds(tmp_path):
    rows = [{"Text": f"Name {n}", "Says": f"word {n}", "Question": "?"} for n in range(40)]
    task = load_task("words", path=write(tmp_path, rows, "jsonl"), question="Text", answer="says")
    row = task.rows("train")[0]
    assert task.kind == "text"
    assert row["question"].startswith("Name")
    assert task.verify(row, f"The answer is {row['answer'].upper()}.").correct


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"question": "a?", "answer": 1}', '{"question": "b?"'], "line 2: not JSON"),
        (['{"question": "a?", "answer": 1}', "[1]"], "line 2: expected an object"),
        (['{"ask": "a?", "answer": 1}'], "line 1: no any of.*|line 1: no .*Columns seen: ask, answer"),
        (['{"question": "a?", "reply": 1}'], "Columns seen: question, reply.*answer='COLUMN'"),
        (['{"question": "", "answer": 1}'], "line 1: the question in column 'question' is empty"),
        (['{"question": "a?", "answer": null}'], "line 1: the answer in column 'answer' is empty"),
        ([], "no rows in it"),
    ],
)
def test_errors_name_file_line_and_columns(tmp_path, lines, message):
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message) as caught:
        load_task("mine", path=file)
    assert "mine.jsonl" in str(caught.value)


def test_other_errors_of_files(tmp_path):
    file = write(tmp_path, [*SUMS, {"question": "Where?", "answer": "east"}], "csv")
    with pytest.raises(ValueError, match="line 62: kind 'number' needs one number"):
        load_task("sums", path=file, kind="number")
    with pytest.raises(ValueError, match="There is no file"):
        load_task("sums", path=tmp_path / "none.csv")
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(ValueError, match=r"end in '\.xlsx'"):
        load_task("sums", path=tmp_path / "a.xlsx")
    with pytest.raises(ValueError, match="no answer kind 'essay'"):
        load_task("sums", path=file, kind="essay")
    with pytest.raises(ValueError, match=r"Expected test\.jsonl or train\.jsonl"):
        load_task("gsm8k", path=tmp_path)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("word_problem", "word-problems"),
        ("gsm8", "gsm8k"),
        ("bbh:boolean_expression", "bbh:boolean_expressions"),
        ("reasoning-gym:chain_summ", "chain"),
        ("reasoning-gym:sudokus", "reasoning-gym:sudoku"),
    ],
)
def test_wrong_names_get_the_nearest_right_ones(name, nearest):
    with pytest.raises(ValueError, match=f"Did you mean .*{nearest}"):
        load_task(name)


def test_wrong_parameters_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no parameter 'max_term'.*Did you mean max_terms"):
        load_task("reasoning-gym:chain_sum", max_term=3)
    with pytest.raises(ValueError, match=r"refused min_terms=30: max_terms must be"):
        load_task("reasoning-gym:chain_sum", min_terms=30)
    with pytest.raises(ValueError, match="doesn't take"):
        load_task("word-problems", stairs=3)
    with pytest.raises(ValueError, match="no parameters called steps"):
        load_task("mine", path=write(tmp_path, SUMS, "jsonl"), steps=3)
    with pytest.raises(ValueError, match="takes none of path"):
        load_task("word-problems", path=tmp_path)
    with pytest.raises(ValueError, match="no split 'dev'"):
        load_task("word-problems").rows("dev")
    with pytest.raises(ValueError, match="whole number from 1"):
        load_task("word-problems").rows(n=0)


def test_a_generator_that_draws_from_the_global_random_state_repeats_exactly():
    assert load_task("reasoning-gym:codeio").rows(n=2) == load_task("reasoning-gym:codeio").rows(n=2)


@pytest.mark.parametrize(
    ("hidden", "program", "said"),
    [
        ("reasoning_gym", "print(wb.task_names()[:2])", "['word-problems', 'gsm8k']"),
        ("reasoning_gym", "wb.load_task('gcd')", "drawn from reasoning-gym, which is not installed. Next: make"),
        ("reasoning_gym", "wb.load_task('reasoning-gym:gcd')", "which is not installed. Next: make reasoning-gym"),
        ("pycosat", "print(len(wb.load_task('leg-counting').rows(n=3)))", "3"),
        ("pycosat", "wb.load_task('reasoning-gym:zebra_puzzles').rows(n=1)", "it needs pycosat, which is not"),
    ],
)
def test_without_reasoning_gym_or_its_compiled_part_the_rest_works(hidden, program, said):
    source = f"import sys; sys.modules[{hidden!r}] = None; import workbench as wb\n{program}"
    found = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert said in found.stdout + found.stderr
    assert not any(line.startswith("ModuleNotFoundError") for line in found.stderr.splitlines())


def test_an_exhausted_generator_says_so():
    with pytest.raises(ValueError, match="too few different test questions"):
        load_task("reasoning-gym:gcd", max_value=3).rows(n=50)


def test_without_files_or_network_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(ValueError, match=r"'svamp' could not be loaded.*path=.*WORKBENCH_DATA"):
        load_task("svamp")


@pytest.mark.parametrize(
    ("name", "answer", "allowed"),
    [
        ("countdown", "2*(3+4) - 1/2", True),
        ("countdown", "__import__('os').system('true')", False),
        ("puzzle24", "9**9**9**9", False),
        ("simple_integration", "x**2*sin(3*x)/2 + C", True),
        ("simple_integration", "open(x)", False),
        ("polynomial_multiplication", "x.evalf()", False),
        ("spiral_matrix", "[1, 2]", True),
        ("spiral_matrix", "[print(1)]", False),
        ("chain_sum", "anything", True),
    ],
)
def test_answers_that_a_scorer_would_run_are_kept_from_it(name, answer, allowed):
    assert gym.harmless(name, answer) is allowed


def test_a_scorer_that_accepts_everything_is_not_used():
    task = load_task("reasoning-gym:game_of_life_halting")
    row = task.rows(n=1)[0]
    assert not task.verify(row, "The answer is 123.").correct
    assert task.verify(row, f"<answer>{row['answer']}</answer>").correct
