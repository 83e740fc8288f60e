"""Answered questions on disk, a chunk a file, so that a killed evaluation goes on where it stopped.

A chunk's key is made of all that its rows depend on: model, change, solver, prompts, questions. Chunks are cut from the
questions in order, so a larger n finds the first ones done.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workbench.files import content_key, write_atomic

Answered = dict[str, Any]  # rows: one a question; cost: seconds, peak_memory_mb, model_calls


def chunk_file(folder: Path, condition: str, number: int) -> Path:
    """Where a condition's chunk is kept."""
    readable = re.sub(r"[^a-z0-9]+", "-", condition.lower()).strip("-")
    return folder / "conditions" / f"{readable}-{content_key(name=condition)[:6]}" / f"{number:05}.json"


def kept(file: Path | None, key: str) -> Answered | None:
    """The chunk, if it is there whole and made from the same things."""
    if file is None or not file.exists():
        return None
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None  # cut off or damaged: run it again
    return held["answered"] if isinstance(held, dict) and held.get("key") == key else None


def store(file: Path | None, key: str, answered: Answered) -> None:
    """Keep a chunk, whole or not at all."""
    if file is not None:
        write_atomic(file, json.dumps({"key": key, "answered": answered}, ensure_ascii=False))


def joined(parts: Sequence[Answered]) -> Answered:
    """Chunks as one: rows in order, times and calls added, the highest peak."""
    cost = {"seconds": 0.0, "peak_memory_mb": 0.0, "model_calls": 0}
    for part in parts:
        for name, value in part["cost"].items():
            cost[name] = max(cost[name], value) if name == "peak_memory_mb" else cost[name] + value
    return {"rows": [row for part in parts for row in part["rows"]], "cost": cost}
