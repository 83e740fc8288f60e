"""Kill synthesis again and again at every stage of its work: the records are those of a run that nobody disturbed.

`python -m tests.faults.test_synthesis_kill` prints the table: where each kill fell, what was on disk, what came out.
"""

import signal
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.faults.killing import kills
from workbench.report.tables import format_table
from workbench.synthesis.records import load_data

CHILD = """
import sys
from functools import partial
from workbench.models import load_model
from workbench.prompts import few_shot
from workbench.synthesis import edits, synthesize
from workbench.tasks import load_task
synthesize(load_model("lab-small"), load_task("word-problems"), "star", n=24, out=sys.argv[1], samples=2,
           strategy=few_shot("steps", 2), max_new_tokens=70, chunk_size=2, chains=2, negatives=1,
           edits=[partial(edits.compact, most=1), partial(edits.drop_improbable, threshold=0.001)])
"""
FILES = "steps/*/*.json"
WHEN = (1, 8, 17, 26, 36)  # chunks on disk after which the next kill falls


def test_records_and_counters_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    lines, killed, straight = kills(CHILD, tmp_path, FILES, WHEN)
    assert sum(line["exit"] == -signal.SIGKILL for line in lines) >= len(WHEN) - 1, "too few runs were caught alive"
    assert all(line["made twice"] == 0 and line["all whole"] for line in lines)
    assert (killed / "records.jsonl").read_bytes() == (straight / "records.jsonl").read_bytes()
    cards = [load_data(out).card for out in (killed, straight)]
    for card in cards:
        for step in (card["cost"], *card["cost"]["steps"].values()):
            step.pop("seconds")  # what a killed run spends repeats in nothing but this
    assert cards[0] == cards[1]
    ids = [record["id"] for record in load_data(killed)]
    assert len(ids) == len(set(ids)) >= 24


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        table, one, other = kills(CHILD, Path(scratch), FILES, WHEN)
        print(format_table(table))
        same = (one / "records.jsonl").read_bytes() == (other / "records.jsonl").read_bytes()
        print(f"records of the killed and of the undisturbed run are {'the same bytes' if same else 'DIFFERENT'}")
