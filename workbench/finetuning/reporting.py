"""How far a training is, in a small file beside its checkpoints that others read while it runs (`workbench.following`).

`checkpoints/live.jsonl`: a first line that says what runs where, a line a step, and a last one where it was ended. It
goes when the training is finished, which losses.jsonl and speed.jsonl tell of. A disk that is full stops nothing.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workbench.files import write_atomic
from workbench.runs.processes import identity

FILE = "live.jsonl"


class Report:
    """The file of one training, written by it alone."""

    def __init__(self, out: Path, stage: str) -> None:
        self.file, self.stage, self.begun = out / "checkpoints" / FILE, stage, False

    def begin(self, doing: str, rows: Sequence[dict[str, Any]] = (), total: int = 0) -> None:
        """Start the file anew: what is done now, the steps done before, and how many there will be."""
        self.begun = True
        first = {"stage": self.stage, "doing": doing, "total": total, "time": time.time()}
        first |= {"host": socket.gethostname(), "process": identity(os.getpid())}
        with contextlib.suppress(OSError):
            write_atomic(self.file, "".join(json.dumps(line) + "\n" for line in (first, *rows)))

    def add(self, row: dict[str, Any]) -> None:
        """A step is done."""
        self._append({**row, "time": time.time()})

    def end(self, words: str) -> None:
        """The training stopped before its end, for this reason."""
        if self.begun and self.file.parent.is_dir():
            self._append({"ended": words, "time": time.time()})

    def _append(self, line: dict[str, Any]) -> None:
        with contextlib.suppress(OSError), self.file.open("ab") as handle:
            handle.write((json.dumps(line) + "\n").encode())


def read_report(out: Path) -> list[dict[str, Any]]:
    """The lines so far, the first one first; a line that is being written is left out. Empty where there is no file."""
    try:
        whole = (out / "checkpoints" / FILE).read_bytes().rpartition(b"\n")[0]
    except OSError:
        return []
    return [json.loads(line) for line in whole.splitlines() if line]
