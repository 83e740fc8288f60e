r"""Equality of LaTeX answers, in a process of its own, because math-verify may hang and refuses to work in a thread.

math-verify 0.9 stops itself with SIGALRM, which exists only in a main thread and can't interrupt a long step in C (a
power tower). So one worker process, started on first use and kept, answers one comparison at a time over pipes; past
the hard limit it is killed, the comparison counts as "not equal", and the next one gets a fresh worker. The worker is
this file run as a script: nothing of a parent that holds a model or a GPU is forked or imported.

Does not cover: finding the answer in a text (`workbench.tasks.verifiers`).
"""

import atexit
import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 10.0  # seconds for one comparison before the worker is killed; the slowest of MATH-500's gold answers takes 0.6
_START = 300.0  # seconds for the worker to import sympy, generous for a busy machine
_LONGEST = 2000  # characters; a longer answer is a model that repeats itself
_MEMORY = 4 * 2**30  # bytes that a worker may address; a power tower would otherwise take the machine's memory with it


def plain(text: str) -> str:
    r"""LaTeX written as a reader would type it: fractions as a/b, no spacing commands, no `\text{}`, one kind of minus.

    >>> plain(r"\text{about } \$1{,}200\,\frac{3}{4} −5\%")
    'about  $1,200 3/4 -5%'
    """
    text = re.sub(r"[−–]", "-", text)
    text = re.sub(r"(?<=\d)(?:[\u00a0\u202f\u2009]|\\[,!;: ])(?=\d{3}(?!\d))", "", text)
    text = text.replace("{,}", ",").replace("\\%", "%").replace("\\$", "$")
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-z])|\\!", "", text)
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]+)\}\s*\{([^{}]+)\}|\\[dt]?frac\s*(\d)\s*(\d)", _fraction, text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf|textit|boxed|mbox)\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\\[,;: ]|\\(?:quad|circ)\b", " ", text)


def _fraction(match: re.Match[str]) -> str:
    over, under = match[1] or match[3], match[2] or match[4]
    before = match.string[: match.start()]
    return f"{' ' if before[-1:].isdigit() else ''}{over}/{under}"


def same(gold: str, given: str, limit: float = LIMIT) -> bool:
    r"""Whether two LaTeX answers are mathematically equal, by math-verify 0.9 (identical writing is equal at once).

    Args:
        limit: seconds before the comparison is given up as "not equal".

    Raises:
        RuntimeError: math-verify can't work here (a missing parser must not look like 0 % accuracy).

    >>> same(r"\frac{1}{2}", "0.5"), same("(1, 2)", "(2, 1)")
    (True, False)
    """
    if _bare(gold) == _bare(given):
        return True
    if len(given) > _LONGEST:
        return False
    return bool(_worker().ask({"gold": gold, "given": given}, limit))


def _bare(text: str) -> str:
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return re.sub(r"\s|\\left|\\right|\\[,!;: ]|^\$+|\$+$|\.$", "", text.strip())


class _Worker:
    """A math-verify process behind two pipes; safe to call from any thread, one comparison at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[bytes] | None = None
        self.replies: queue.Queue[bytes | None] = queue.Queue()
        self.owner = os.getpid()
        atexit.register(self.stop)

    def ask(self, request: dict[str, Any], limit: float) -> Any:
        """The worker's answer, or None when it took longer than `limit` seconds or died."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.stop()
                self.start()
            try:
                return self._exchange(request, limit)
            except BaseException:  # also an interrupted notebook cell: the late reply must not answer the next question
                self.stop()
                raise

    def _exchange(self, request: dict[str, Any], limit: float) -> Any:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            reply = self.replies.get(timeout=limit)
        except (queue.Empty, BrokenPipeError):
            reply = None
        if reply is None:
            self.stop()
            return None
        return json.loads(reply)["equal"]

    def start(self) -> None:
        # -P: this folder's `statistics` must not hide Python's own
        command = [sys.executable, "-P", str(Path(__file__).resolve())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
            start_new_session=True,
        )  # fmt: skip
        self.replies = queue.Queue()
        threading.Thread(target=_forward, args=(self.process, self.replies), daemon=True).start()
        try:
            hello = json.loads(self.replies.get(timeout=_START) or '{"error": "the process ended at once"}')
        except queue.Empty:
            hello = {"error": f"it did not start within {_START:.0f} s"}
        if "error" in hello:
            self.stop()
            raise RuntimeError(
                f"LaTeX answers can't be compared: math-verify's process said: {hello['error']}. Next: "
                'pip install "math-verify==0.9.*" "antlr4-python3-runtime==4.13.2", then python -m workbench doctor.'
            )

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is None or os.getpid() != self.owner:
            return
        process.kill()
        process.wait()
        if process.stdin:
            process.stdin.close()


_workers: dict[int, _Worker] = {}
_starting = threading.Lock()


def _worker() -> _Worker:
    """This process's worker: a forked child gets its own, because pipes can't be shared."""
    with _starting:
        if os.getpid() not in _workers:
            _workers[os.getpid()] = _Worker()
        return _workers[os.getpid()]


def _forward(process: subprocess.Popen[bytes], replies: queue.Queue[bytes | None]) -> None:
    """Reader thread: a pipe can't be read with a time limit on every system, a queue can."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            replies.put(line)
    replies.put(None)


def _comparison() -> Callable[[str, str], bool]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def equal(gold: str, given: str) -> bool:
        wanted, found = (parse(f"\\boxed{{{text}}}", config, parsing_timeout=5) for text in (gold, given))
        return bool(wanted and found and verify(wanted, found, timeout_seconds=5))

    return equal


def _serve() -> None:
    """The worker's main loop: one JSON request a line in, one JSON reply a line out."""
    out, sys.stdout = sys.stdout, sys.stderr  # libraries that print must not answer
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    except (ImportError, ValueError, OSError):
        print("no memory limit on this system", file=sys.stderr)
    try:
        equal = _comparison()
        works = equal("\\frac{1}{2}", "0.5")
        ready = {"ready": "yes"} if works else {"error": "it finds 1/2 and 0.5 different"}
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out, flush=True)
        return
    print(json.dumps(ready), file=out, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            verdict = equal(request["gold"], request["given"])
        except Exception:  # an answer that the library can't handle is not equal to anything
            verdict = False
        print(json.dumps({"equal": verdict}), file=out, flush=True)


if __name__ == "__main__":
    _serve()
