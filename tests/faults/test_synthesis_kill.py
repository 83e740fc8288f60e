"""Kill synthesis again and again at every stage of its work: the records are those of a run that nobody disturbed.

`python -m tests.faults.test_synthesis_kill` prints the table: where each kill fell, what was on disk, what came out.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from workbench.report.tables import format_table
from workbench.synthesis.records import load_data

ROOT = Path(__file__).resolve().parents[2]
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
CHUNKS = 3 * 12  # of the recipe and of both edits
WHEN = (1, 8, 17, 26, 36)  # chunks on disk after which the next kill falls


def run(out: Path, chunks: int | None = None) -> int:
    """Run the child to its end, or until `chunks` more than it found are on disk; return its exit code."""
    command = [sys.executable, "-c", CHILD, str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as child:
        while chunks is not None and child.poll() is None and len(list(out.glob("steps/*/*.json"))) < chunks:
            time.sleep(0.002)
        if chunks is not None and child.poll() is None:
            child.send_signal(signal.SIGKILL)
        return child.wait()


def kills(folder: Path) -> tuple[list[dict[str, object]], Path, Path]:
    """Kill the run at each moment of `WHEN`, then let it finish; the table and the two folders to compare."""
    killed, straight = folder / "killed", folder / "straight"
    lines: list[dict[str, object]] = []
    for chunks in WHEN:
        before = {file: file.stat().st_mtime_ns for file in killed.glob("steps/*/*.json")}
        code = run(killed, chunks)
        files = {file: file.stat().st_mtime_ns for file in killed.glob("steps/*/*.json")}
        redone = sum(files[file] != written for file, written in before.items())
        whole = all(json.loads(file.read_text())["key"] for file in files)
        lines.append({"killed after": chunks, "exit": code, "chunks on disk": len(files), "made twice": redone,
                      "all whole": whole, "card": (killed / "card.json").exists()})  # fmt: skip
    for out in (killed, straight):
        assert run(out) == 0
    return lines, killed, straight


def test_records_and_counters_are_those_of_an_undisturbed_run(tmp_path: Path) -> None:
    lines, killed, straight = kills(tmp_path)
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
        table, one, other = kills(Path(scratch))
        print(format_table(table))
        same = (one / "records.jsonl").read_bytes() == (other / "records.jsonl").read_bytes()
        print(f"records of the killed and of the undisturbed run are {'the same bytes' if same else 'DIFFERENT'}")
