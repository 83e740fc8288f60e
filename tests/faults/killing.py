"""Run a child, kill it when so many of its files are on disk, and run it again: what the SIGKILL tests share."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(program: str, out: Path, pattern: str, chunks: int | None = None) -> int:
    """Run a program to its end, or until so many files fit the pattern in its folder; return its exit code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(out)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as child:
        while chunks is not None and child.poll() is None and len(list(out.glob(pattern))) < chunks:
            time.sleep(0.002)
        if chunks is not None and child.poll() is None:
            child.send_signal(signal.SIGKILL)
        return child.wait()


def kills(program: str, folder: Path, pattern: str, when: Sequence[int]) -> tuple[list[dict[str, object]], Path, Path]:
    """Kill at each moment, then let it finish; a line a kill, and the folder beside one that nobody disturbed."""
    killed, straight = folder / "killed", folder / "straight"
    lines: list[dict[str, object]] = []
    for chunks in when:
        before = {file: file.stat().st_mtime_ns for file in killed.glob(pattern)}
        code = run(program, killed, pattern, chunks)
        files = {file: file.stat().st_mtime_ns for file in killed.glob(pattern)}
        redone = sum(files[file] != written for file, written in before.items())
        whole = all(json.loads(file.read_text())["key"] for file in files)
        lines.append({"killed after": chunks, "exit": code, "chunks on disk": len(files), "made twice": redone,
                      "all whole": whole})  # fmt: skip
    for out in (killed, straight):
        assert run(program, out, pattern) == 0
    return lines, killed, straight
