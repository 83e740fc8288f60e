"""Processes of a run: who is alive, who belongs to which run, and that none outlives its starter.

A run marks all its processes with a random mark in their environment, which children inherit: that is how a kernel's
own children (a trainer, say) are found after their parents were killed. Leans on psutil; on Linux also on
prctl(PR_SET_PDEATHSIG), elsewhere on polling the parent. Does not start anything (see `runs`).
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time

import psutil

MARK = "WORKBENCH_RUN_MARK"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int | None = None) -> None:
    """Arrange that this process is killed when its parent dies, also by SIGKILL; call it first in a child process.

    `parent` is the expected parent's process id: if it is gone already, this process ends at once.
    """
    expected = parent or os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    else:
        threading.Thread(target=watch_parent, args=(expected,), daemon=True).start()
    if os.getppid() != expected:  # it died before the line above took effect
        os._exit(1)


def watch_parent(expected: int) -> None:
    """End this process within half a second of its parent's death; for systems without PR_SET_PDEATHSIG."""
    while os.getppid() == expected:
        time.sleep(0.5)
    os._exit(1)


def identity(pid: int) -> dict[str, float] | None:
    """Return what tells a process from a later one with the same number: its id and start time (epoch seconds)."""
    try:
        return {"pid": pid, "created": psutil.Process(pid).create_time()}
    except psutil.Error:
        return None


def is_alive(known: object) -> bool:
    """Tell if the process that `identity` described is still running; a zombie is dead."""
    if not isinstance(known, dict) or not isinstance(known.get("pid"), int):
        return False
    try:
        process = psutil.Process(known["pid"])
        return process.create_time() == known.get("created") and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def marked(mark: str) -> list[psutil.Process]:
    """Return this user's living processes that carry a run's mark, this one excluded."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # gone meanwhile, or somebody else's
            same = process.pid != os.getpid() and process.environ().get(MARK) == mark
            if same and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_marked(mark: str) -> int:
    """Kill every process that carries the mark, children made meanwhile included; return how many there were."""
    count = 0
    while mark and (left := marked(mark)):
        count += len(left)
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=5)
    return count
