"""Run a child, kill it when so many of its files are on disk, and run it again: what the SIGKILL tests share."""

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Children of a server that has the libraries loaded: they are processes of their own, without the seconds of importing.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["workbench.evaluation", "workbench.synthesis", "workbench.lab.families", "datasets"])


def child(program: str, out: Path) -> None:
    """What a child does: the program, with the folder as its argument, its complaints thrown away."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.argv = ["child", str(out)]
    exec(program, {"__name__": "__main__"})


def run(program: str, out: Path, pattern: str, chunks: int | None = None) -> int:
    """Run a program to its end, or until so many files fit the pattern in its folder; return its exit code."""
    process = FORKS.Process(target=child, args=(program, out))
    process.start()
    while chunks is not None and process.is_alive() and len(list(out.glob(pattern))) < chunks:
        time.sleep(0.002)
    if chunks is not None:
        process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


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
