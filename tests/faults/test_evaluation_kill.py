"""Kill an evaluation again and again: its rows are those of one that nobody disturbed, and nothing is asked twice.

`python -m tests.faults.test_evaluation_kill` prints the table: when each kill fell, what was on disk, what came out.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from workbench.report.tables import format_table
from workbench.results import load_results

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import sys
from workbench import evaluation
from workbench.evaluation import evaluate
from workbench.models import load_model
from workbench.prompts import few_shot, instruction
from workbench.solvers import SelfConsistency
from workbench.tasks import load_task
evaluation.CHUNK = 4
conditions = {"plain": [], "told": [instruction("steps")], "3 votes": [few_shot("steps", 2), SelfConsistency(3)]}
evaluate(load_model("lab-small"), load_task("word-problems"), conditions, n=20, max_new_tokens=60, out=sys.argv[1])
"""
CHUNKS = 3 * 5
WHEN = (1, 4, 8, 11, 15)  # chunks on disk after which the next kill falls


def run(out: Path, chunks: int | None = None) -> int:
    """Run the child to its end, or until so many chunks are on disk; return its exit code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(out)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as child:
        while chunks is not None and child.poll() is None and len(list(out.glob("conditions/*/*.json"))) < chunks:
            time.sleep(0.002)
        if chunks is not None and child.poll() is None:
            child.send_signal(signal.SIGKILL)
        return child.wait()


def kills(folder: Path) -> tuple[list[dict[str, object]], Path, Path]:
    """Kill at each moment of `WHEN`, then let it finish; the table and the two folders to compare."""
    killed, straight = folder / "killed", folder / "straight"
    lines: list[dict[str, object]] = []
    for chunks in WHEN:
        before = {file: file.stat().st_mtime_ns for file in killed.glob("conditions/*/*.json")}
        code = run(killed, chunks)
        files = {file: file.stat().st_mtime_ns for file in killed.glob("conditions/*/*.json")}
        redone = sum(files[file] != written for file, written in before.items())
        whole = all(json.loads(file.read_text())["key"] for file in files)
        lines.append({"killed after": chunks, "exit": code, "chunks on disk": len(files), "made twice": redone,
                      "all whole": whole})  # fmt: skip
    for out in (killed, straight):
        assert run(out) == 0
    return lines, killed, straight


def test_rows_are_those_of_an_undisturbed_evaluation(tmp_path: Path) -> None:
    lines, killed, straight = kills(tmp_path)
    assert sum(line["exit"] == -signal.SIGKILL for line in lines) >= len(WHEN) - 1, "too few runs were caught alive"
    assert all(line["made twice"] == 0 and line["all whole"] for line in lines)
    first, second = (load_results(out).rows.drop(columns=["seconds"]) for out in (killed, straight))
    pd.testing.assert_frame_equal(first, second)
    assert not first.duplicated(["id", "condition"]).any()
    samples = first[first.condition == "3 votes"].samples
    assert sum(len({each["output"] for each in own}) > 1 for own in samples) > len(samples) / 2  # repeats are distinct


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        table, one, other = kills(Path(scratch))
        print(format_table(table))
        first, second = (load_results(out).rows.drop(columns=["seconds"]) for out in (one, other))
        same = "the same" if first.equals(second) else "DIFFERENT"
        print(f"rows of the killed and of the undisturbed evaluation are {same}")
