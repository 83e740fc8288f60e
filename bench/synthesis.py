"""Real records through every step that needs no sampling: rendering, duplicates, test-set overlap, tokens and packing.

GSM8K's 7,473 training questions with their own solutions, against every benchmark in the data folder. The limit is a
minute for all of it, in one process.
"""

import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import workbench as wb
from workbench.finetuning.packing import encode_all
from workbench.synthesis import edits
from workbench.tasks.benchmarks import BENCHMARKS

LIMIT = 60.0  # seconds
ROW = 2048  # tokens of a packed row


def lines(lm: wb.LM) -> list[dict[str, Any]]:
    """One line a step: what went in, what came out, seconds."""
    data = os.environ.get("WORKBENCH_DATA")
    if not data or not (Path(data) / "gsm8k" / "train.jsonl").exists():
        return [{"step": "left out: WORKBENCH_DATA names no folder with gsm8k/train.jsonl"}]
    found: list[dict[str, Any]] = []
    begin = last = time.perf_counter()

    def tell(step: str, records: int) -> None:
        nonlocal last
        now = time.perf_counter()
        found.append({"step": step, "records": records, "seconds": now - last, "limit": ""})
        last = now

    task = wb.load_task("gsm8k-train", path=Path(data) / "gsm8k" / "train.jsonl", split="train")
    exams = [wb.load_task(name) for name in BENCHMARKS]
    questions = len(task.rows("train"))
    tell("read", questions)
    with TemporaryDirectory() as out:
        made = wb.synthesize(
            lm, task, "oracle", n=questions, out=out, edits=[edits.in_words], dedup="minhash", evaluation=exams,
            chunk_size=500,
        )  # fmt: skip
        told = made.card["overlap"]["by_task"]
        tell(f"render, MinHash, overlap with {sum(told.values())} questions of {len(told)} test sets", len(made.kept))
    examples, _ = encode_all(lm, made.kept, "GSM8K", max_length=ROW)
    tell("tokens and masks", len(examples))
    rows = packed(examples)
    tell(f"packed into rows of {ROW}", rows)
    found.append({"step": "all", "records": questions, "seconds": last - begin, "limit": f"<= {LIMIT:.0f}"})
    return found


def packed(examples: list[Any]) -> int:
    """Rows that TRL's best-fit packing makes of the examples."""
    import datasets
    from trl.data_utils import pack_dataset

    table = {"input_ids": [example.input_ids for example in examples]}
    return pack_dataset(datasets.Dataset.from_dict(table), seq_length=ROW, strategy="bfd").num_rows
