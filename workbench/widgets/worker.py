"""One thread that works on the newest wish: an older one is dropped, and stopped where it asks whether it still counts.

A notebook's main thread is busy while a cell runs, and controls send more wishes than a model can answer. What a wish
is, and what working on it means, is the caller's matter. Not a pool and not a queue: at most one wish waits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Any

__all__ = ["Dropped", "Job", "Worker"]


class Dropped(BaseException):
    """Raised inside of a job that was cancelled or overtaken; no Exception, so that nobody swallows it by mistake."""


@dataclass(frozen=True, eq=False)
class Job:
    """A wish being worked on; numbers count up from 1."""

    number: int
    wish: Any
    worker: "Worker"

    @property
    def wanted(self) -> bool:
        """Whether nobody has cancelled or overtaken it."""
        return self.worker.wanted == self.number

    def check(self) -> None:
        """Raise Dropped where it is not wanted any more: to be called often."""
        if not self.wanted:
            raise Dropped


class Worker:
    """Calls `work(job)` in a thread of its own, one job at a time, always the newest.

    work may raise Dropped through `job.check()`; it has to deal with its own errors. The thread lives while there is
    work.

    >>> done = []
    >>> worker = Worker(lambda job: done.append(job.wish))
    >>> worker.ask("a"), worker.wait()
    (1, True)
    >>> done
    ['a']
    """

    def __init__(self, work: Callable[[Job], None]) -> None:
        self.work = work
        self.wanted = 0  # number of the only job that may go on; 0 none
        self._count = 0
        self._next: Job | None = None
        self._thread: Thread | None = None
        self._changed = Condition()

    def ask(self, wish: Any) -> int:
        """Work on this instead of what went before; returns its number at once."""
        with self._changed:
            self._count += 1
            self.wanted, self._next = self._count, Job(self._count, wish, self)
            if self._thread is None:
                self._thread = Thread(target=self._run, name="workbench-playground", daemon=True)
                self._thread.start()
            return self._count

    def cancel(self) -> bool:
        """Stop what is under way; whether there was anything."""
        with self._changed:
            self.wanted, self._next = 0, None
            return self._thread is not None

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to do; False where `timeout` seconds were not enough."""
        with self._changed:
            return self._changed.wait_for(lambda: self._thread is None, timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                job, self._next = self._next, None
                if job is None:
                    self._thread = None
                    self._changed.notify_all()
                    return
            try:
                self.work(job)
            except Dropped:
                continue
            except BaseException:
                with self._changed:  # a fault of `work` must not leave waiting callers behind
                    self._thread, self.wanted = None, 0
                    self._changed.notify_all()
                raise
