"""Student's and teacher's versions: what is in each, that both run to their end, and which sources are refused."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from typer.testing import CliRunner

from workbench.__main__ import app
from workbench.runs import run
from workbench.runs.params import read_parameters
from workbench.teaching import editions

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
WITH_EXERCISES = (
    "00_start_here",
    "00_what_is_inside",
    "01_synthesize_data",
    "02_finetune_qlora",
    "03_steering_vectors",
    "04_kv_cache",
    "05_evaluate",
    "06_compare_runs",
    "07_live_demo",
)
RUN_HERE = WITH_EXERCISES[:2]  # the others take minutes even with few questions; test_notebooks.py runs their sources
SECRET = "# the mean of the two, as a teacher would write it"


def chosen(names: tuple[str, ...]) -> list[Path]:
    return [path for path in NOTEBOOKS if path.stem in names]


def markdown(source: str, *tags: str) -> dict[str, Any]:
    return {"cell_type": "markdown", "metadata": {"tags": list(tags)} if tags else {}, "source": source}


def code(source: str, *tags: str, hidden: bool = False) -> dict[str, Any]:
    metadata: dict[str, Any] = {"tags": list(tags)} if tags else {}
    metadata |= {"jupyter": {"source_hidden": True}} if hidden else {}
    return {"cell_type": "code", "metadata": metadata, "source": source, "outputs": [], "execution_count": None}


def small() -> dict[str, Any]:
    """Two exercises and a prediction, with outputs and traces of an execution in it."""
    cells = [
        markdown("# Means\n\nWhat you will learn: means."),
        code("import workbench as wb\n\nnumbers = [1, 2, 6]"),
        markdown("## 1. The mean\n\n**Predict:** is the mean above 2?"),
        code("guess_1 = ...  # True or False", "predict"),
        code("mean = sum(numbers) / len(numbers)"),
        code("wb.check_prediction(guess_1, mean > 2)", "check"),
        markdown("**Exercise 1.1** The mean of 4 and 8?\n\n<details><summary>Hint</summary>Halve.</details>"),
        code("answer_1_1 = ...", "exercise"),
        code(f"if answer_1_1 is ...:  {SECRET}\n    answer_1_1 = (4 + 8) / 2", "solution", hidden=True),
        code("wb.check(answer_1_1, 6, wrong={12: 'that is the sum'}, hint='halve')", "check"),
        markdown("<details><summary>For the teacher</summary>\n\n7 minutes. Some add.\n\n</details>", "teacher"),
        markdown("## 2. The rest"),
        markdown("**Exercise 2.1** Which is the largest?"),
        code("answer_2_1 = ...", "exercise"),
        code(f"if answer_2_1 is ...:  {SECRET}\n    answer_2_1 = max(numbers)", "solution", hidden=True),
        code("wb.check(answer_2_1, max(numbers))", "check"),
    ]
    for number, cell in enumerate(cells):
        cell["id"] = f"m-{number}"
    cells[1]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "old"}]
    cells[1]["metadata"]["execution"] = {"iopub.execute_input": "2020"}
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": cells, "metadata": {**kernel, "papermill": {}}, "nbformat": 4, "nbformat_minor": 5}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "means.ipynb"
    path.write_text(json.dumps(small()))
    return path


def texts(path: Path) -> str:
    """What cells said when they ran."""
    outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def executed(path: Path, to: Path) -> str:
    papermill.execute_notebook(str(path), str(to), kernel_name="python3", progress_bar=False)
    return texts(to)


def test_the_students_version_holds_no_solution(source: Path, tmp_path: Path) -> None:
    student, teacher = editions.build_class([source], tmp_path / "class", "abc123")
    text = student.read_text()
    assert SECRET not in text and "max(numbers)\\n" not in text and "(4 + 8) / 2" not in text
    assert "teacher" not in text.lower()
    assert "solution" not in text
    assert "abc123 by `make class`" in text
    shown = teacher.read_text()
    assert shown.count(SECRET) == 2
    assert "source_hidden" not in shown
    assert "<details open>" in shown
    assert "| 1. The mean | 7 | 1 | 1 |" in shown and "| **all** | **7** |" in shown
    for path in (student, teacher):
        book = nbformat.read(path, 4)
        nbformat.validate(book)
        assert book.metadata.kernelspec.name == "python3"
        assert "old" not in path.read_text() and "papermill" not in path.read_text()


def test_both_versions_run_to_their_end(source: Path, tmp_path: Path) -> None:
    student, teacher = editions.build_class([source], tmp_path / "class", "abc123")
    said = executed(teacher, tmp_path / "teacher.ipynb")
    assert said.count("Right") == 2
    assert "No prediction made; measured was True" in said
    assert executed(source, tmp_path / "source.ipynb") == said
    blank = executed(student, tmp_path / "student.ipynb")
    assert blank.count("Not answered yet") == 2
    assert "Hint: halve" in blank


def test_a_persons_own_answers_stand_in_all_versions(source: Path, tmp_path: Path) -> None:
    book = small()
    book["cells"][7]["source"] = "answer_1_1 = 12"
    book["cells"][3]["source"] = "guess_1 = True"
    (tmp_path / "own.ipynb").write_text(json.dumps(editions.teacher_version(book)))
    said = executed(tmp_path / "own.ipynb", tmp_path / "own-run.ipynb")
    assert "Not yet: that is the sum" in said and "As you said: True" in said


def test_building_twice_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    first = editions.build_class([source], tmp_path / "one", "abc123")
    second = editions.build_class([source], tmp_path / "two", "abc123")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    before = source.read_bytes()
    editions.build_class([source], tmp_path / "one", "abc123")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("place", "cell", "fault"),
    [
        (15, None, "exercise 2.1 has no check of answer_2_1"),
        (14, None, "exercise 2.1 has no solution for answer_2_1"),
        (14, code("if answer_1_1 is ...:\n    answer_1_1 = 6", "solution"), "no blank of the exercise before it"),
        (14, code("answer_2_1 = 6", "solution"), "writes over a person's own answer_2_1"),
        (14, code("if answer_2_1 is ...:\n    most = answer_2_1 = 6", "solution"), "most is set in a solution only"),
        (13, code("answer_1_1 = ...", "exercise"), "answer_1_1 is the answer of two exercises"),
        (13, code("answer_2_1 = 3", "exercise"), "has no blank"),
        (12, markdown("Which is the largest?"), "has no text above it"),
        (12, markdown("**Exercise 1.1** Which is the largest?"), "exercise 1.1 is there twice"),
        (5, None, "the prediction guess_1 is compared with nothing"),
        (9, code("wb.check(6, 6)", "check"), "looks at no exercise or prediction before it"),
        (9, code("wb.check(answer_1_1, 6)"), "is not tagged check"),
        (4, code("wb.check_prediction(answer_1_1, 6)", "check"), "looks at no exercise or prediction before it"),
        (10, markdown("Some add.", "teacher"), "needs <details> and the section's `N minutes`"),
        (7, code("answer_1_1 = ...", "exercise", "check"), "tagged exercise and check"),
        (7, code("answer_1_1 =", "exercise"), "is no Python"),
    ],
)  # fmt: skip
def test_other_forms_are_refused_in_words(tmp_path: Path, place: int, cell: dict[str, Any] | None, fault: str) -> None:
    book = small()
    assert editions.faults(book) == []
    last = copy.deepcopy(book["cells"][15])
    book["cells"][place : place + 1] = [] if cell is None else [cell | {"id": "changed"}]
    if fault.startswith("most"):
        book["cells"].append(code("print(most)") | {"id": "m-last"})
        assert last["source"] == book["cells"][15]["source"]
    (tmp_path / "means.ipynb").write_text(json.dumps(book))
    with pytest.raises(editions.EditionError, match="no version was built") as refused:
        editions.build_class([tmp_path / "means.ipynb"], tmp_path / "class", "abc123")
    assert fault in str(refused.value) and "means.ipynb" in str(refused.value)
    assert not (tmp_path / "class").exists()


def test_the_command(source: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["class", str(source), "--out", str(tmp_path / "class")])
    assert done.exit_code == 0, done.output
    assert done.output.split() == [str(tmp_path / "class" / kind / "means.ipynb") for kind in ("student", "teacher")]
    source.write_text("{}")
    refused = CliRunner().invoke(app, ["class", str(source), "--out", str(tmp_path / "class")])
    assert refused.exit_code == 2
    assert "is no notebook that can be read" in refused.output


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_exercises_of_the_notebooks_are_in_their_form(path: Path) -> None:
    assert editions.faults(editions.read_book(path)) == []


@pytest.mark.parametrize("path", chosen(WITH_EXERCISES), ids=lambda path: path.stem)
def test_every_section_asks_for_a_prediction_and_two_to_four_exercises(path: Path) -> None:
    book = editions.read_book(path)
    asking = [section for section in editions.sections(book) if section.asks]
    assert asking
    for section in asking:
        assert section.predictions >= 1, section.title
        assert 2 <= section.exercises <= 4 * max(1, section.parts), section.title
        assert section.minutes > 0, section.title
    told = re.search(r"in class about (\d+) minutes", "".join(book["cells"][0]["source"]))
    assert told and abs(int(told[1]) - sum(section.minutes for section in asking)) <= 5


def test_sections_are_counted() -> None:
    found = editions.sections(small())
    assert found == [editions.Section("1. The mean", 7, 1, 1), editions.Section("2. The rest", 0, 0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("path", chosen(RUN_HERE), ids=lambda path: path.stem)
def test_versions_of_the_notebooks_run(path: Path, tmp_path: Path) -> None:
    """On the lab model every solution is right, and blanks stop nothing."""
    given = {"n": 5, "shots": 1, "max_new_tokens": 8, "samples": 1, "n_beside": 3}
    values = {name: value for name, value in given.items() if name in read_parameters(path).parameters}
    asked = editions.exercises(editions.read_book(path))
    blanks = sum(len(names) for names in asked.values())
    for built in editions.build_class([path], tmp_path, "abc123"):
        kind = built.parent.name
        run([built], values, tmp_path / f"run-{kind}", say=lambda text: None)
        said = texts(tmp_path / f"run-{kind}" / path.stem / path.name)
        assert "Not yet" not in said
        assert len(re.findall(r"^Right[:.]", said, re.MULTILINE)) == (blanks if kind == "teacher" else 0)
        assert said.count("Not answered yet") == (blanks if kind == "student" else 0)
