"""The command line refuses bad input with code 2 before work, fails with 1 and the next command, shows the table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from tests.faults.small import FINISH, SETUP, environment, write_notebook
from workbench.__main__ import app

ROWS = [{"condition": "plain", "accuracy": 0.51234}, {"condition": "steered", "accuracy": 0.75}]


def call(*words: object) -> Result:
    """Call the command line in this process."""
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two notebooks, the second of them the main one, as working directory."""
    monkeypatch.chdir(tmp_path)
    first = [SETUP.format(stage="00_start"), "if n == 13: raise RuntimeError('unlucky')\nseed = n", FINISH]
    write_notebook(tmp_path / "notebooks" / "00_start.ipynb", first)
    main = [SETUP.format(stage="05_evaluate"), f"runs.finish(folder, {{'table': {ROWS!r}, 'shots': shots}})"]
    cell = 'shots: int = 4\nout: str = "outputs/interactive"'
    write_notebook(tmp_path / "notebooks" / "05_evaluate.ipynb", main, cell)
    return tmp_path


def test_run_status_and_compare(project: Path) -> None:
    done = call("run", "-p", "n=5", "-p", "shots=2", "--out", "outputs/a")
    assert done.exit_code == 0, done.output
    assert "05_evaluate: done" in done.stderr
    assert "steered" in done.stdout and "0.75" in done.stdout
    assert json.loads((project / "outputs/a/05_evaluate/result.json").read_text())["shots"] == 2
    found = call("status", "--json")
    assert {item["state"] for item in json.loads(found.stdout)["stages"]} == {"completed"}
    again = call("run", "-p", "shots=2", "-p", "n=5", "--out", "outputs/a")
    assert again.stderr.count("kept") == 2
    assert "00_start     kept" in again.stdout
    failed = call("run", "notebooks/00_start.ipynb", "-p", "n=13", "--out", "outputs/b")
    assert failed.exit_code == 1
    assert "RuntimeError: unlucky" in failed.stderr
    assert "continue with: python -m workbench" in failed.stderr
    text = call("status", "outputs/b").stdout
    assert "failed" in text
    assert "unlucky" in text
    assert "completed" not in text
    refused = call("compare", "outputs/a", "outputs/b")
    assert refused.exit_code == 2
    assert "no finished stage" in refused.stderr


def test_a_hub_name_without_network_ends_in_one_paragraph(tmp_path: Path) -> None:
    start = Path(__file__).parents[1] / "notebooks" / "00_start_here.ipynb"
    failed = call("run", start, "-p", "model=nobody/no-such-model", "--out", tmp_path / "run")
    assert failed.exit_code == 1
    last = failed.stderr.strip().splitlines()
    assert len(last) == 2, last  # "started", and the paragraph
    assert "Could not load 'nobody/no-such-model'. Check the spelling and the network" in last[1]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["-p", "shot=2"], "did you mean shots"),
        (["-p", "shots=many"], "valid integer"),
        (["-p", "shots"], "NAME=VALUE"),
        (["-p", "shots=1", "-p", "shots=2"], "given twice"),
        (["-p", "x;import os=1"], "not a parameter name"),
        (["-p", "hf_token=planted-value"], "secret"),
        (["-p", "out=x"], "--out"),
        (["06_absent"], "no notebook 06_absent"),
        (["-f", "absent.yaml"], "cannot be read"),
        (["--out", "notebooks"], "no run folder"),
    ],
)
def test_bad_input_ends_with_one_paragraph_and_code_2(project: Path, words: list[str], problem: str) -> None:
    found = call("run", *words)
    assert found.exit_code == 2
    assert problem in found.stderr
    assert "Traceback" not in found.stderr
    assert "planted-value" not in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (project / "outputs").exists()


def test_a_yaml_file_and_words_are_merged(project: Path) -> None:
    (project / "given.yaml").write_text("shots: 3\nn: nope\n")
    refused = call("run", "-f", "given.yaml", "-p", "shots=2")
    assert "n = 'nope' is refused" in refused.stderr


def test_parameters_are_listed(project: Path) -> None:
    assert "shots: int = 4" in call("parameters", "05_evaluate").stdout
    assert call("parameters", "absent").exit_code == 2


def test_the_command_line_loads_without_the_heavy_libraries(project: Path) -> None:
    program = "import sys, workbench.__main__; print(sorted({'torch', 'papermill', 'pandas'} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_status_without_a_run_says_what_to_type(project: Path) -> None:
    for words in ([], ["absent"]):
        found = call("status", *words)
        assert found.exit_code == 2
        assert "python -m workbench run" in found.stderr


def test_help_names_the_commands(project: Path) -> None:
    text = call("--help").stdout
    for name in ("run", "sweep", "status", "compare", "parameters", "report", "doctor"):
        assert name in text
