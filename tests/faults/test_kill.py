"""Kill a run's processes at random moments, again and again: nothing is torn, nothing is claimed, nothing is lost."""

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest

from tests.faults.small import FINISH, SETUP, start, three, write_notebook
from workbench.runs import locks
from workbench.runs.manifest import damage, proven, read_manifest
from workbench.runs.processes import MARK, end_marked, marked
from workbench.runs.status import status

SEED = 11
STAGES = ("00_first", "01_second", "02_third")


def results(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every result that is proven done."""
    return {name: (folder / name / "result.json").read_bytes() for name in STAGES if proven(folder / name)}


def find(folder: Path, words: str) -> psutil.Process | None:
    """Return a living process of the run whose command line holds `words`."""
    mark = locks.read_owner(folder / ".run").get("mark", "")
    for process in marked(mark) if mark else ():
        with contextlib.suppress(psutil.Error):
            if words in " ".join(process.cmdline()):
                return process
    return None


def kill_one(runner: "subprocess.Popen[str]", folder: Path, target: str, delay: float) -> str:
    """SIGKILL the runner, the kernel or the kernel's child at some moment of its life; return which it was.

    If the run ends before the wanted process was seen, the runner, dead or alive, is taken.
    """
    words = {"kernel": "workbench.runs.kernel", "trainer": "print(7)"}.get(target)
    victim = None
    while words and not victim and runner.poll() is None:
        time.sleep(0.1)
        victim = find(folder, words)
    with contextlib.suppress(subprocess.TimeoutExpired):
        runner.wait(timeout=0 if target == "trainer" else delay)
    with contextlib.suppress(psutil.NoSuchProcess):
        (victim or runner).kill()
    runner.communicate()
    return target if victim else "runner"


def leave_work(folder: Path, target: str, draw: random.Random) -> None:
    """Damage a finished stage where the next start would otherwise find nothing to do, or no child to be killed."""
    done = list(results(folder))
    if target == "trainer" and STAGES[1] in done:
        (folder / STAGES[1] / "result.json").unlink()
    elif len(done) == len(STAGES):
        (folder / draw.choice(done) / "part-0.json").write_text("{}", encoding="utf-8")


def assert_nothing_is_torn(folder: Path, reference: dict[str, bytes]) -> None:
    """Every JSON file parses, every notebook reads, every manifest is true, no stage is falsely called completed."""
    for path in folder.rglob("*.json"):
        json.loads(path.read_text(encoding="utf-8"))
    for path in folder.rglob("*.ipynb"):
        nbformat.read(path, as_version=4)
    for path in folder.glob("*/manifest.json"):
        content = read_manifest(path.parent)
        assert content is not None
        planted = ("result.json is gone", "part-0.json has")  # by leave_work, in a stage not reached since
        problem = damage(path.parent, content)
        assert problem is None or problem.startswith(planted)
    for item in status(folder).stages if (folder / ".run").is_dir() else ():
        if item.state == "completed":
            assert (folder / item.stage / "result.json").read_bytes() == reference[item.stage]
        assert item.state not in ("running", "stalled"), "no runner lives"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_and_resumes_end_like_an_uninterrupted_run(tmp_path: Path) -> None:
    notebooks = three(tmp_path / "notebooks")
    whole = start(tmp_path, "run", *notebooks, "--out", "whole")
    output, errors = whole.communicate()
    assert whole.returncode == 0, output + errors
    reference = results(tmp_path / "whole")
    assert set(reference) == set(STAGES)
    manifests = [read_manifest(tmp_path / "whole" / name) for name in STAGES]
    scale = max(found["seconds"] for found in manifests if found)  # only for the random moments

    folder, draw = tmp_path / "killed", random.Random(SEED)
    targets = [*["runner"] * 11, *["kernel"] * 6, *["trainer"] * 3]
    draw.shuffle(targets)
    killed = set()
    for target in targets:
        leave_work(folder, target, draw)
        runner = start(tmp_path, "run", *notebooks, "--out", "killed")
        killed.add(kill_one(runner, folder, target, draw.uniform(0, scale if target == "runner" else scale / 3)))
        assert_nothing_is_torn(folder, reference)
    assert killed == {"runner", "kernel", "trainer"}
    last = start(tmp_path, "run", *notebooks, "--out", "killed")
    output, errors = last.communicate()
    assert last.returncode == 0, output + errors
    assert results(folder) == reference
    assert {item.state for item in status(folder).stages} == {"completed"}
    assert not list(folder.rglob("*.tmp"))
    for name in STAGES:
        made = [read_manifest(tmp_path / run / name) for run in ("whole", "killed")]
        parts = [{**found["ingredients"], "package": None} for found in made if found]  # somebody may be editing it
        assert parts[0] == parts[1]


@pytest.mark.timeout(900)
def test_a_killed_runner_leaves_no_kernel_and_its_orphans_are_ended_by_the_next_start(tmp_path: Path) -> None:
    """The kernel dies with its runner; a kernel's own child is named by status and ended before work goes on."""
    sleeper = "import subprocess, sys\nseed = 1\nif not (folder / 'once').exists():\n    (folder / 'once').touch()\n"
    sleeper += "    subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'], check=False)\n"
    notebook = write_notebook(
        tmp_path / "notebooks" / "00_first.ipynb", [SETUP.format(stage="00_first"), sleeper, FINISH]
    )
    runner = start(tmp_path, "run", notebook, "--out", "run")
    folder = tmp_path / "run"
    orphan = patiently(lambda: find(folder, "time.sleep(600)"))
    kernel = find(folder, "workbench.runs.kernel")
    assert kernel is not None
    assert {item.state for item in status(folder).stages} == {"running"}
    assert {item.state for item in status(folder, stall_after=-1).stages} == {"stalled"}
    runner.kill()
    runner.communicate()
    patiently(lambda: not kernel.is_running() or kernel.status() == psutil.STATUS_ZOMBIE)
    found = status(folder)
    assert {item.state for item in found.stages} == {"interrupted"}
    assert found.leftovers == (orphan.pid,)
    again = start(tmp_path, "run", notebook, "--out", "run")
    output, errors = again.communicate()
    assert again.returncode == 0, output + errors
    assert not orphan.is_running()
    assert {item.state for item in status(folder).stages} == {"completed"}


@pytest.mark.timeout(900)
def test_a_runner_asked_to_stop_ends_its_processes_and_says_how_to_continue(tmp_path: Path) -> None:
    cells = ["import time\nwhile True:\n    time.sleep(0.1)"]
    notebook = write_notebook(tmp_path / "notebooks" / "00_first.ipynb", cells)
    runner = start(tmp_path, "run", notebook, "--out", "run")
    patiently(lambda: find(tmp_path / "run", "workbench.runs.kernel"))
    mark = locks.read_owner(tmp_path / "run" / ".run")["mark"]
    runner.terminate()
    _, errors = runner.communicate()
    assert runner.returncode == 130
    assert "interrupted. Continue with: python -m workbench run" in errors
    assert marked(mark) == []
    assert {item.state for item in status(tmp_path / "run").stages} == {"interrupted"}


def patiently(condition):
    """Wait until a condition holds and return its value."""
    while not (value := condition()):
        time.sleep(0.05)
    return value


def test_marks_are_inherited_and_only_the_marked_are_found(tmp_path: Path) -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    with subprocess.Popen([sys.executable, "-c", program], env={**os.environ, MARK: "a-test"}) as child:
        patiently(lambda: len(marked("a-test")) == 2)
        assert child.pid in {process.pid for process in marked("a-test")}
        assert marked("another-test") == []
        assert end_marked("a-test") == 2
    assert marked("a-test") == []
