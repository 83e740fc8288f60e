"""Runs redo what is missing, changed or damaged, and nothing else; their notes tell the truth."""

import json
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.faults.small import FINISH, SETUP, start, three, write_notebook
from workbench import runs
from workbench.files import content_key, sha256, write_atomic
from workbench.runs import comparison, heartbeats, locks, provenance, stages
from workbench.runs.journal import Journal
from workbench.runs.manifest import proven, read_manifest, sweep
from workbench.runs.params import ParameterError
from workbench.runs.status import latest, status

STAGES = ("00_first", "01_second", "02_third")


def quiet(text: str) -> None:
    """Take progress lines and drop them."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three notebooks and their finished run in `run`; tests copy it before they change it."""
    home = tmp_path_factory.mktemp("finished")
    runs.run(three(home / "notebooks"), {"n": 8}, home / "run", say=quiet)
    return home


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "home"))


def again(home: Path, **given: object) -> dict[str, float | None]:
    """Run the three notebooks once more and return which were redone."""
    return runs.run(sorted((home / "notebooks").glob("*.ipynb")), {"n": 8, **given}, home / "run", say=quiet).seconds


def states(folder: Path) -> dict[str, str]:
    """Return the state of every stage."""
    return {item.stage: item.state for item in status(folder).stages}


def same_json(content: bytes, damaged: bytes | None) -> bool:
    """Tell if damage to a JSON file is white space only, which is no damage."""
    try:
        return bool(json.loads(content) == json.loads(damaged or b""))
    except ValueError:
        return False


# Files


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")
    for broken in ("fsync", "replace"):
        for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):
            with monkeypatch.context() as patch:

                def fail(*arguments: object, error: BaseException = error) -> None:
                    raise error

                patch.setattr(os, broken, fail)
                with pytest.raises(type(error)):
                    write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_a_write_keeps_mode_and_link(tmp_path: Path) -> None:
    path, link = tmp_path / "deep" / "a.bin", tmp_path / "link"
    write_atomic(path, b"\x00old")
    path.chmod(0o640)
    link.symlink_to(path)
    write_atomic(link, b"\x00new")
    assert link.is_symlink()
    assert path.read_bytes() == b"\x00new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_key_depends_on_values_and_types_but_not_on_order() -> None:
    assert content_key(a=1, b=[1, {"x": 2, "y": 3}]) == content_key(b=[1, {"y": 3, "x": 2}], a=1)
    variants: list[dict[str, Any]] = [
        {"a": 1},
        {"a": "1"},
        {"a": 1.5},
        {"a": [1]},
        {"a": True},
        {"a": None},
        {"b": 1},
        {},
    ]
    assert len({content_key(**variant) for variant in variants}) == len(variants)
    for value in (float("nan"), {1}, object(), b"x", len):
        with pytest.raises((TypeError, ValueError)):
            content_key(a=value)


# Keys


def test_each_ingredient_flips_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(path: Path, values: dict[str, Any], inputs: dict[str, str]) -> str:
        return content_key(**provenance.ingredients(path.read_bytes(), values, inputs))

    path = write_notebook(tmp_path / "nb.ipynb", ["x = 1"])
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    data.write_text("{}\n")
    values: dict[str, Any] = {"model": str(model), "n": 5, "data": str(data), "out": "a"}
    keys = [key(path, values, {"before": "1"})]
    assert key(path, dict(reversed(values.items())), {"before": "1"}) == keys[0]
    assert key(path, {**values, "out": "elsewhere"}, {"before": "1"}) == keys[0]
    keys.append(key(path, {**values, "n": 6}, {"before": "1"}))
    keys.append(key(path, values, {"before": "2"}))
    keys.append(key(path, values, {}))
    keys.append(key(path, {**values, "revision": "abc"}, {"before": "1"}))
    (model / "model.safetensors").write_bytes(b"others!")
    keys.append(key(path, values, {"before": "1"}))
    data.write_text("{ }\n")
    keys.append(key(path, values, {"before": "1"}))
    write_notebook(path, ["x = 2"])
    keys.append(key(path, values, {"before": "1"}))
    for name, value in (("package_source", "x"), ("package_version", "x"), ("libraries", {"torch": "9"})):
        with monkeypatch.context() as patch:
            patch.setattr(provenance, name, lambda *_, value=value: value)
            keys.append(key(path, values, {"before": "1"}))
    assert len(set(keys)) == len(keys)


def test_prose_outputs_and_counts_of_a_notebook_do_not_flip_the_key(tmp_path: Path) -> None:
    path = write_notebook(tmp_path / "nb.ipynb", ["x = 1"])
    before = provenance.notebook_source(path.read_bytes())
    content = json.loads(path.read_text())
    content["cells"][0]["source"] = "# Another title"
    content["cells"][2]["execution_count"] = 7
    content["cells"][2]["source"] = ["x ", "= 1"]
    assert provenance.notebook_source(json.dumps(content).encode()) == before


def test_the_package_key_is_of_its_source(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "m.py").write_text("x = 1")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "m.py").write_text("x = 2")
    assert provenance.package_source(tmp_path / "a") != provenance.package_source(tmp_path / "b")


def test_a_hub_models_revision_is_its_cached_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert provenance.model_revision("some/model") == "some/model@main"
    reference = tmp_path / "models--some--model" / "refs" / "main"
    reference.parent.mkdir(parents=True)
    reference.write_text("0123abcd")
    assert provenance.model_revision("some/model") == "0123abcd"


# Runs


def test_a_finished_run_is_proven_described_and_kept(home: Path) -> None:
    folder = home / "run"
    assert states(folder) == dict.fromkeys(STAGES, "completed")
    for name in STAGES:
        manifest = proven(folder / name)
        assert manifest is not None
        assert manifest["parameters"]["n"] == 8
        assert {f"{name}.ipynb", "result.json", "cost.json"} <= set(manifest["files"])
        assert manifest["peak_memory_bytes"] > 1_000_000
        assert manifest["seconds"] > 0
        assert manifest["machine"]["cores"] >= 1
        notebook = nbformat.read(folder / name / f"{name}.ipynb", as_version=4)
        assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    whole = read_manifest(folder)
    assert whole is not None
    assert list(whole["stages"]) == list(STAGES)
    stamps = {path: path.stat().st_mtime_ns for path in folder.glob("[0-9m]*/*")}
    assert again(home) == dict.fromkeys(STAGES)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("[0-9m]*/*")} == stamps


def test_any_damaged_file_is_no_proof(home: Path) -> None:
    folder = home / "run" / "01_second"
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        flipped = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
        for damaged in (flipped, content[:-1], b"", content + b" ", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            if path.name != "manifest.json" or not same_json(content, damaged):
                assert proven(folder) is None, path.name
                assert states(home / "run")["01_second"] != "completed"
        path.write_bytes(content)
    assert proven(folder) is not None


def test_damaged_stages_are_redone_with_equal_results_and_the_others_kept(home: Path) -> None:
    folder = home / "run"
    before = {name: (folder / name / "result.json").read_bytes() for name in STAGES}
    (folder / "00_first" / "part-1.json").write_text("{}")
    (folder / "02_third" / "manifest.json").write_text('{"self": "0"')
    (folder / "02_third" / "stray.txt").write_text("left by somebody")
    redone = {name: seconds is not None for name, seconds in again(home).items()}
    assert redone == {"00_first": True, "01_second": False, "02_third": True}
    assert {name: (folder / name / "result.json").read_bytes() for name in STAGES} == before
    assert not (folder / "02_third" / "stray.txt").exists()
    assert states(folder) == dict.fromkeys(STAGES, "completed")


def test_a_failed_run_keeps_what_is_done_and_says_where_it_failed(home: Path) -> None:
    second = home / "notebooks" / "01_second.ipynb"
    write_notebook(second, [SETUP.format(stage="01_second"), "x = 1\nraise KeyError('lost')", FINISH])
    half = home / "run" / ".run" / "01_second" / ".partial.ipynb.1-2-3.tmp"
    half.parent.mkdir(parents=True, exist_ok=True)
    half.write_text("half a noteb", encoding="utf-8")  # as a killed run leaves it
    with pytest.raises(runs.RunFailed, match="01_second failed in cell 4: KeyError") as caught:
        again(home)
    assert not half.exists()
    assert "raise KeyError" in caught.value.failure.source
    found = states(home / "run")
    assert (found["00_first"], found["01_second"]) == ("completed", "failed")
    assert found["02_third"] != "completed"
    assert read_manifest(home / "run") is None
    executed = nbformat.read(home / "run" / "01_second" / "01_second.ipynb", as_version=4)
    assert executed.metadata.workbench_run.state == "failed"


FAILURES: dict[str, tuple[str, str, float | None]] = {
    "a killed kernel": ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "KernelDied", None),
    "an early exit": ("import sys\nsys.exit(0)", "NoResult", None),
    "too long": ("import time\ntime.sleep(600)", "TimeLimit", 4.0),
}


@pytest.mark.parametrize("case", FAILURES)
def test_ends_that_papermill_calls_completed_are_failures(tmp_path: Path, case: str) -> None:
    source, expected, limit = FAILURES[case]
    notebook = write_notebook(tmp_path / "00_first.ipynb", [SETUP.format(stage="00_first"), source, FINISH])
    with pytest.raises(runs.RunFailed) as caught:
        runs.run([notebook], {}, tmp_path / "run", timeout=limit, say=quiet)
    assert caught.value.failure.name == expected
    assert states(tmp_path / "run") == {"00_first": "failed"}
    saved = tmp_path / "run" / "00_first" / "00_first.ipynb"
    if expected == "KernelDied":
        cells = [cell for cell in nbformat.read(saved, as_version=4).cells if cell.cell_type == "code"]
        assert cells[-1].metadata.papermill.status == "pending"


def test_the_kernel_is_this_interpreter_without_secrets_in_what_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-secret-0123456789")
    wrong = tmp_path / "jupyter" / "kernels" / "python3"
    wrong.mkdir(parents=True)
    (wrong / "kernel.json").write_text('{"argv": ["/bin/false"], "display_name": "wrong", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    cells = [
        SETUP.format(stage="00_first"),
        "import os, sys\nprint(os.environ['HF_TOKEN'])",
        "seed = os.environ['PYTHONHASHSEED']",
        "runs.finish(folder, {'executable': sys.executable, 'seed': seed, 'model': model, 'n': n})",
    ]
    hostile = '\'); import os; (\'"""\\'
    notebook = write_notebook(tmp_path / "00_first.ipynb", cells)
    done = runs.run([notebook], {"model": hostile, "n": 7}, tmp_path / "run {odd} name", say=quiet)
    result = json.loads((done.folder / "00_first" / "result.json").read_text())
    expected = {"executable": sys.executable, "seed": os.environ.get("PYTHONHASHSEED", "0"), "model": hostile, "n": 7}
    assert result == expected
    for path in done.folder.rglob("*"):
        assert not path.is_file() or b"planted-secret" not in path.read_bytes(), path


def test_two_starters_give_one_result(tmp_path: Path) -> None:
    count = "from pathlib import Path\nwith Path(out, 'starts').open('a') as log:\n    log.write('x')\nseed = 1"
    notebook = write_notebook(tmp_path / "00_first.ipynb", [SETUP.format(stage="00_first"), count, FINISH])
    starters = [start(tmp_path, "run", notebook, "--out", "run") for _ in range(2)]
    ends = [starter.communicate() for starter in starters]
    assert [starter.returncode for starter in starters] == [0, 0], ends
    assert (tmp_path / "run" / "starts").read_text() == "x"
    assert sum("kept" in errors for _, errors in ends) == 1
    assert states(tmp_path / "run") == {"00_first": "completed"}


def test_nothing_starts_when_an_input_is_bad(tmp_path: Path) -> None:
    notebook = write_notebook(tmp_path / "00_first.ipynb", ["raise SystemError"])
    for given in ({"nn": 5}, {"n": "many"}, {"n": 0}):
        with pytest.raises(ParameterError):
            runs.run([notebook], given, tmp_path / "run", say=quiet)
    with pytest.raises(ParameterError, match="no run folder"):
        runs.run([notebook], {}, tmp_path, say=quiet)
    with pytest.raises(ParameterError, match="no notebook"):
        runs.run(["missing"], {}, tmp_path / "run", say=quiet)
    assert not (tmp_path / "run").exists()


def test_other_parameters_empty_the_stage_and_an_interrupted_attempt_is_continued(tmp_path: Path) -> None:
    for name in ("manifest.json", "result.json", "checkpoint.bin", ".x.tmp"):
        write_atomic(tmp_path / name, "x")
    sweep(tmp_path, keep=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.bin"]
    sweep(tmp_path, keep=False)
    assert list(tmp_path.iterdir()) == []
    journal = Journal.open(tmp_path / "journal.json")
    for state, continued in (("running", "k"), ("interrupted", "k"), ("failed", "k"), ("completed", None)):
        journal.note("s", state=state, key="k")
        assert Journal.open(journal.path).attempt("s") == continued


def test_an_earlier_stage_that_changed_outdates_the_later_ones(home: Path) -> None:
    folder = home / "run"
    journal = Journal.open(folder / ".run" / "journal.json")
    journal.expect({"00_first": "another"})
    assert states(folder) == {"00_first": "outdated", "01_second": "completed", "02_third": "completed"}
    shutil.rmtree(folder / "00_first")
    found = states(folder)
    assert found["00_first"] == "damaged"
    assert found["01_second"] == "outdated"


def test_needs_narrow_what_a_stage_depends_on(home: Path) -> None:
    folder = home / "run"
    stage = runs.plan([write_notebook(home / "notebooks" / "03_last.ipynb", [], needs=["01_second"])], {})[0]
    assert list(runs.input_keys(stage, [stage], folder)) == ["01_second"]
    free = runs.plan([write_notebook(home / "notebooks" / "03_last.ipynb", [])], {})[0]
    assert list(runs.input_keys(free, [free], folder)) == list(STAGES)


def test_the_lock_is_free_after_its_owner_and_refuses_its_own_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locks.hold(tmp_path) as owner:
        assert locks.held(tmp_path)
        monkeypatch.setenv("WORKBENCH_RUN_MARK", owner.mark)
        with pytest.raises(ValueError, match="part of the run"), locks.hold(tmp_path):
            pass
        monkeypatch.delenv("WORKBENCH_RUN_MARK")
    assert not locks.held(tmp_path)
    (tmp_path / "owner.json").write_text(json.dumps({"host": "another", "beat": time.time(), "process": None}))
    assert locks.held(tmp_path)
    (tmp_path / "owner.json").write_text(json.dumps({"host": "another", "beat": 0.0, "process": None}))
    assert not locks.held(tmp_path)
    with locks.hold(tmp_path):
        assert locks.held(tmp_path)


def test_status_of_no_run_teaches(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="python -m workbench run"):
        status(tmp_path)
    assert latest(tmp_path) is None


# Stages, heartbeat, comparison


def test_results_hold_plain_data_and_say_what_is_not(tmp_path: Path) -> None:
    import numpy as np
    import pandas as pd

    frame = pd.DataFrame(
        [{"condition": "plain", "accuracy": np.float64(0.5)}, {"condition": "x", "accuracy": float("nan")}]
    )
    given = {"table": frame, "n": np.int64(3), "flag": np.bool_(True), "array": np.arange(2), "path": Path("a/b")}
    path = stages.finish(tmp_path, given, {"seconds": 1.5})
    rows = [{"condition": "plain", "accuracy": 0.5}, {"condition": "x", "accuracy": None}]
    assert list(json.loads(path.read_text())) == list(given), "the order of columns is kept"
    expected = {"table": rows, "n": 3, "flag": True, "array": [0, 1], "path": "a/b"}
    assert json.loads(path.read_text()) == expected
    assert sha256(path) == sha256(stages.finish(tmp_path, given, {"seconds": 2.5}))
    with pytest.raises(stages.StageError, match=r"result\['a'\]\[1\] is a function"):
        stages.finish(tmp_path, {"a": [1, lambda: 0]})


def test_a_missing_earlier_stage_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert stages.begin("00_first", "outputs/interactive") == tmp_path / "outputs" / "interactive" / "00_first"
    with pytest.raises(stages.StageError, match=r"python -m workbench run notebooks/01_second\.ipynb"):
        stages.earlier("01_second", "outputs/interactive")


def test_a_heartbeat_goes_to_the_file_of_a_run_or_to_standard_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(heartbeats.progress(iter("abc"), "letters")) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "letters 3/3"
    monkeypatch.setenv(heartbeats.FOLDER, str(tmp_path))
    for step in range(1, 6):
        runs.heartbeat("train", step, 5, loss=1 / step, bad=float("nan"))
    beat = heartbeats.read_beat(tmp_path)
    assert beat is not None
    assert (beat["step"], beat["total"], beat["numbers"]) == (5, 5, {"loss": 0.2, "bad": None})
    assert capsys.readouterr().err == ""


def test_a_heartbeat_in_an_open_notebook_is_one_bar(tmp_path: Path) -> None:
    from nbclient import NotebookClient

    source = "from workbench import runs\nfor item in runs.progress(range(30), 'train'):\n    pass"
    notebook = nbformat.read(write_notebook(tmp_path / "open.ipynb", [source], None), as_version=4)
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(Path.cwd())}}).execute()
    text = json.dumps(notebook)  # the state of the widget is in the metadata
    assert "train" in text
    assert "30/30" in text
    assert len(notebook.cells[-1].outputs) == 1


def test_comparison_shows_what_differed_and_what_came_out(home: Path) -> None:
    other = home / "other"
    shutil.copytree(home / "run", other)
    manifest = json.loads((other / "00_first" / "manifest.json").read_text())
    manifest.pop("self")
    manifest["ingredients"]["parameters"]["n"] = 9
    from workbench.runs.manifest import seal

    for name in STAGES[1:]:
        (other / name / "manifest.json").unlink()
    seal(other / "00_first" / "manifest.json", manifest)
    found = comparison.compare([home / "run", other])
    assert {"what": "n", "run": 8, "other": 9} in found.differences
    assert {row["run"] for row in found.rows} == {"run", "other"}
    assert "accuracy" in found.text()
    assert json.loads(found.as_data())["runs"] == ["run", "other"]
    with pytest.raises(ValueError, match="twice"):
        comparison.compare([other, other])
    with pytest.raises(ValueError, match="no finished stage"):
        comparison.compare([home / "run", home / "notebooks"])


def test_a_report_that_fails_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "workbench.report", None)
    runs.make_report(tmp_path, said.append)
    assert "python -m workbench report" in said[0]


def test_say_is_called_with_lines_for_a_person(home: Path) -> None:
    said: list[str] = []
    note: Callable[[str], None] = said.append
    runs.run(sorted((home / "notebooks").glob("*.ipynb")), {"n": 8}, home / "run", say=note)
    assert said == [f"{name}: kept" for name in STAGES]
