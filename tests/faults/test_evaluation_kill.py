"""Kill an evaluation again and again: its rows are those of one that nobody disturbed, and nothing is asked twice.

`python -m tests.faults.test_evaluation_kill` prints the table: when each kill fell, what was on disk, what came out.
"""

import signal
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from tests.faults.killing import kills
from workbench.report.tables import format_table
from workbench.results import load_results

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
FILES = "conditions/*/*.json"
WHEN = (1, 4, 8, 11, 15)  # chunks on disk after which the next kill falls


def test_rows_are_those_of_an_undisturbed_evaluation(tmp_path: Path) -> None:
    lines, killed, straight = kills(CHILD, tmp_path, FILES, WHEN)
    assert sum(line["exit"] == -signal.SIGKILL for line in lines) >= len(WHEN) - 1, "too few runs were caught alive"
    assert all(line["made twice"] == 0 and line["all whole"] for line in lines)
    first, second = (load_results(out).rows.drop(columns=["seconds"]) for out in (killed, straight))
    pd.testing.assert_frame_equal(first, second)
    assert not first.duplicated(["id", "condition"]).any()
    samples = first[first.condition == "3 votes"].samples
    assert sum(len({each["output"] for each in own}) > 1 for own in samples) > len(samples) / 2  # repeats are distinct


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        table, one, other = kills(CHILD, Path(scratch), FILES, WHEN)
        print(format_table(table))
        first, second = (load_results(out).rows.drop(columns=["seconds"]) for out in (one, other))
        same = "the same" if first.equals(second) else "DIFFERENT"
        print(f"rows of the killed and of the undisturbed evaluation are {same}")
