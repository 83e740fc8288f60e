"""Watching a run by its files: against what the training itself says, live in another process, cancelled from there."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

import workbench as wb
from tests.test_finetune import RECORDS
from tests.test_stopping import HELD_OUT, SMALL
from workbench.files import write_atomic
from workbench.finetuning import finetune
from workbench.finetuning.reporting import Report, read_report
from workbench.following import look
from workbench.models import LM, load_model
from workbench.sweeps import sweep
from workbench.widgets import Following
from workbench.widgets.following import EVERY, state_html

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def lm(tiny) -> LM:
    return load_model(tiny("llama"))


def test_what_is_seen_at_every_step_is_what_the_training_says(lm: LM, tmp_path: Path) -> None:
    out, seen = tmp_path / "out", []
    assert look(out).kind == "nothing" and "waiting for it" in look(out).said

    def compare(rows: list[dict[str, float]]) -> None:
        now = look(out)
        assert (now.kind, now.stage, now.over, now.stop_at) == ("training", "finetune", False, out)
        assert (now.step, now.total) == (rows[-1]["step"], 6)
        assert [{name: value for name, value in row.items() if name != "time"} for row in now.rows] == rows
        assert now.age is not None and now.age < 60 and (now.left is None) == (len(rows) < 2)
        seen.append(now)

    finetune(lm, RECORDS, out, watch=compare, held_out=HELD_OUT, **SMALL)
    assert len(seen) == 6 and "held-out loss" in seen[-1].numbers
    timed = seen[3].rows
    each = (timed[3]["time"] - timed[0]["time"]) / 3
    assert seen[3].left == pytest.approx(2 * each)
    done = look(out)
    assert (done.over, done.step, done.total, done.stop_at) == (True, 6, 6, None) and "6 steps" in done.said
    kept = [{name: row[name] for name in json.loads(line)} for row, line in
            zip(done.rows, (out / "losses.jsonl").read_text().splitlines(), strict=True)]  # fmt: skip
    assert kept == [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    assert "tokens a second" in done.numbers
    page = Following(out).html()
    assert "6 of 6" in page and "held-out loss" in page and 'role="img"' in page and "<script" not in page


def test_a_training_that_ended_otherwise_says_so(lm: LM, tmp_path: Path) -> None:
    out = tmp_path / "out"
    finetune(lm, RECORDS, out, until=0.5, **SMALL)
    assert look(out).over and look(out).said == "Ended: paused; the same call without until= goes on"
    gone = Report(tmp_path / "gone", "finetune")
    gone.begin("training", [{"step": 1, "loss": 1.0}], 9)
    lines = read_report(tmp_path / "gone")
    assert not look(tmp_path / "gone").over
    lines[0]["process"]["created"] = 1.0  # another process had this number once
    write_atomic(gone.file, "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "lo')
    found = look(tmp_path / "gone")
    assert found.over and "its process is gone" in found.said and found.step == 1


def test_a_sweep_is_seen_point_by_point(lm: LM, tmp_path: Path) -> None:
    out, kinds = tmp_path / "out", []

    def note(_: Any) -> None:
        now = look(out)
        kinds.append((now.kind, now.over, now.stop_at, now.said.partition(":")[0]))

    options = {name: value for name, value in SMALL.items() if name not in ("learning_rate", "rank")}
    grid = {"learning_rate": [1e-3, 5e-3], "rank": [2, 4]}
    found = sweep(lm, RECORDS, out, grid, held_out=HELD_OUT, rung=0.5, keep=0.5, watch=note, **options)
    assert kinds[0] == ("sweep", False, out, "0 of 4 points have reached the rung, 0 are finished. Now")
    assert kinds[-1] == ("sweep", False, out, "4 of 4 points have reached the rung, 1 are finished. Now")
    done = look(out)
    assert done.over and done.table is not None and done.table.equals(found.table())
    page = Following(out).html()
    assert "Sweep: held-out loss" in page and page.count('role="img"') == 1


OTHER = """
import sys
from tests.test_finetune import RECORDS
from tests.test_stopping import SMALL
from workbench.finetuning import finetune
from workbench.models import load_model
finetune(load_model(sys.argv[1]), RECORDS, sys.argv[2], **{**SMALL, "epochs": 5000})
"""


def test_another_process_is_followed_and_cancelled_from_here(lm: LM, tmp_path: Path, tiny) -> None:
    """The view waits for the folder, follows in a thread, cancels, and its thread ends with the run."""
    out = tmp_path / "out"
    view = Following(out)
    assert view.seen.kind == "nothing"
    view.start()
    other = subprocess.Popen([sys.executable, "-c", OTHER, str(tiny("llama")), str(out)], cwd=ROOT,
                             stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        until = time.monotonic() + 120
        while view.seen.step < 3 and time.monotonic() < until:
            time.sleep(0.05)
        assert view.live and view.seen.step >= 3 and view.seen.total == 5000
        view.cancel()
        assert view.told == "Asked to stop."
        assert "Cancelled at step" in other.communicate(timeout=60)[1].splitlines()[-1]
        view._thread.join(10 * EVERY)
        assert not view.live and view.seen.over and "by a panel" in view.seen.said
        assert (out / "checkpoints").is_dir()  # to go on from
    finally:
        other.kill()
        view.close()


def test_a_closed_view_or_one_that_is_opened_again_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    first, second = Following(tmp_path), Following(tmp_path)
    first.start()
    second.start()
    assert not first.live and second.live
    second.cancel()
    assert "nothing to cancel" in second.told and not list(tmp_path.iterdir())
    second.close()
    assert not second.live and threading.active_count() == before
    assert "waiting for it" in state_html(second.seen)


@pytest.mark.parametrize("headless", [False, True])
def test_a_saved_notebook_holds_the_last_state_and_papermill_gets_no_thread(
    lm: LM, tmp_path: Path, headless: bool
) -> None:
    out = tmp_path / "out"
    report = Report(out, "finetune")
    report.begin("training", [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}], 9)
    environment = f"import os; os.environ['WORKBENCH_HEARTBEAT'] = {str(tmp_path)!r}\n" if headless else ""
    first = f"{environment}import workbench as wb\nview = wb.watch({str(out)!r})\nview"
    last = "print(view.live, view.seen.step)\nview.close()"
    cells = [nbformat.v4.new_code_cell(text) for text in (first, last)]
    notebook = nbformat.v4.new_notebook(cells=cells)
    where = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120, resources=where).execute()
    outputs = [output["data"] for output in notebook.cells[0].outputs if "data" in output]
    (page,) = [data["text/html"] for data in outputs if "text/html" in data]
    assert "2 of 9" in page and "<svg" in page
    assert any("application/vnd.jupyter.widget-view+json" in data for data in outputs) != headless
    assert notebook.cells[1].outputs[0]["text"] == f"{not headless} 2\n"


def test_a_run_folder_shows_its_stages(tmp_path: Path) -> None:
    own = tmp_path / ".run"
    own.mkdir()
    write_atomic(own / "journal.json", json.dumps({"stages": {"01_make": {"state": "running"}, "02_train": {}}}))
    found = wb.watch(tmp_path).seen
    assert (found.kind, found.over) == ("run", True) and "Nothing works on this run" in found.said
    assert found.table is not None and found.table.state.tolist() == ["interrupted", "waiting"]
