"""Verdicts on answers, with a limit on the time that a verifier may take: one that hangs costs seconds, not the run."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from workbench.tasks import Task, Verdict

SECONDS = 30.0  # for one answer; unit tests in the sandbox have a limit of their own below this


class Hung(BaseException):
    """A verifier was stopped. No Exception: a verifier that catches those would go on."""


def judge(task: Task, row: dict[str, Any], text: str, seconds: float = SECONDS) -> tuple[Verdict, bool]:
    """The verdict on a text, and whether the verifier had to be stopped, which counts as unparsed.

    The limit works by SIGALRM in a main thread (notebooks, scripts); elsewhere a verifier runs as long as it runs.
    """
    try:
        with _limited(seconds):
            return task.verify(row, text), False
    except Hung:
        return Verdict(False, None), True


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    left = signal.getitimer(signal.ITIMER_REAL)[0]  # somebody else's alarm: kept, and first if it comes first
    if 0 < left <= seconds:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Hung

    began, before = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3))
