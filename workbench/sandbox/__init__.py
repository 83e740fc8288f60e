"""Run model-written Python in isolation, or refuse: programs for their answer, and functions against hidden tests.

    run_python   code -> sandbox -> what it printed; judged outside, by the task's verifier
    judge_tests  program -> sandbox A  <- arguments, plain results ->  sandbox B <- tests; B's word is the verdict

No verdict comes out of a process that model-written code runs in: it could print, exit or patch its way to a pass.
Where a machine can't isolate, nothing runs (`SandboxError` says what to install). Programs have the standard library
alone.

Does not cover: other languages, third-party packages, tests that look at changes made to arguments in place. Judging
by unit tests is of HumanEval (arXiv 2107.03374). The walls are in `jail`, the limits in `supervise` and `inside`.
"""

import os
import signal
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from json import loads

from workbench.sandbox.jail import Limits, SandboxError, isolation, required
from workbench.sandbox.supervise import Ended, Script, run_inside, script

__all__ = ["Limits", "Outcome", "SandboxError", "isolation", "judge_tests", "run_many", "run_python"]

_LIMITS = {
    "seconds": "ran longer than {0.seconds:g} seconds",
    "memory": "used more than {0.memory} bytes of memory",
    "files": "made more than {0.files} files",
    "output": "wrote more than {0.output} bytes",
}


@dataclass(frozen=True)
class Outcome:
    """What a program did.

    Attributes:
        passed: the tests' verdict; None from `run_python`, which judges nothing.
        reason: how it ended, in words.
        stdout, stderr: what it wrote, up to the limit; of `judge_tests`, what the program wrote to both is in stderr.
        exit_code: None when it was killed at a limit, and from `judge_tests`.
        limit: the field of `Limits` that it was killed at, or "".
        seconds: wall clock without the start.
        namespaces: numbers of the process namespaces it ran in, to see that they are empty.
    """

    passed: bool | None
    reason: str
    stdout: str
    stderr: str
    exit_code: int | None
    limit: str
    seconds: float
    namespaces: tuple[int, ...] = ()


def run_python(code: str, *, stdin: str = "", limits: Limits | None = None) -> Outcome:
    """Run `code` as a script in a sandbox of its own and return what it printed.

    Args:
        code: Python source; it may be wrong, hostile or endless.
        stdin: what it can read.
        limits: when it is killed; default `Limits()`.

    Raises:
        SandboxError: this machine can't isolate it; nothing was run.
        ValueError: the code is no text that can be encoded.

    >>> run_python("print(6 * 7)").stdout if isolation() else "42"
    '42...'
    """
    required()
    limits = limits or Limits()
    _encodable(code, stdin)
    (ended,) = run_inside([script(code, stdin)], limits)
    return Outcome(
        None, _reason(ended, limits), ended.stdout, ended.stderr, _code(ended), ended.limit, ended.seconds,
        (ended.namespace,),
    )  # fmt: skip


def run_many(codes: Iterable[str], *, workers: int | None = None, limits: Limits | None = None) -> list[Outcome]:
    """`run_python` for many programs, `workers` at a time (default: one a processor core); results in the order given.

    Each start costs about 50 ms of a core, most of it the interpreter's own.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} is too few: give 1 or more, or None for one a processor core.")
    required()
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda code: run_python(code, limits=limits), codes))


def judge_tests(
    program: str, tests: str, entry_point: str, limits: Limits | None = None, *, given: str = ""
) -> Outcome:
    """Whether the function `entry_point` of a program passes tests that the program can't see, reach or answer for.

    Args:
        program: Python source that defines `entry_point`.
        tests: source that defines `check(candidate)`, as in HumanEval, or holds bare asserts on `entry_point`.
        limits: for each of the two sandboxes; the wall clock is for both together.
        given: source that the tests may use besides, such as the question's own helpers; never the program.

    A pass takes all of: the tests ran to their end, in the sandbox that never holds the program; they called it at
    least once; every answer was plain data. Raises `SandboxError` as `run_python` does.

    >>> judge_tests("def f(x): return x + 1", "def check(f): assert f(1) == 2", "f").passed if isolation() else True
    True
    """
    required()
    if not entry_point.isidentifier():
        raise ValueError(f"entry_point={entry_point!r} is no name of a function. Give the one that the tests call.")
    limits = limits or Limits()
    _encodable(program, tests, given)
    asked, asks = os.pipe()
    heard, replies = os.pipe()
    answering = Script("answer", {"program.py": program.encode()}, (entry_point,), stdin=asked, stdout=replies)
    files = {"tests.py": tests.encode(), "given.py": given.encode()}
    judging = Script("judge", files, (entry_point, str(asks)), stdin=heard, inherit=(asks,))
    candidate, judge = run_inside([answering, judging], limits)
    passed, reason = _verdict(candidate, judge, limits)
    return Outcome(
        passed, reason, "", candidate.stderr, None, candidate.limit or judge.limit, judge.seconds,
        (candidate.namespace, judge.namespace),
    )  # fmt: skip


def _verdict(candidate: Ended, judge: Ended, limits: Limits) -> tuple[bool, str]:
    for ended in (candidate, judge):
        if ended.limit:
            return False, f"the {'program' if ended is candidate else 'judge'} {_LIMITS[ended.limit].format(limits)}"
    try:
        told = loads(judge.stdout)
    except ValueError:
        return False, f"the tests ended without a verdict: {_reason(judge, limits)}"
    reason = str(told["reason"])
    if "the program ended" in reason and candidate.stderr.strip():
        reason += f" ({candidate.stderr.strip().splitlines()[-1][:300]})"
    return told["passed"] is True, reason


def _reason(ended: Ended, limits: Limits) -> str:
    if ended.limit:
        return _LIMITS[ended.limit].format(limits)
    if ended.exit_code and ended.exit_code > 128:
        number = ended.exit_code - 128
        known = number in signal.valid_signals()
        return f"ended by {signal.Signals(number).name if known else f'exit code {ended.exit_code}'}"
    if ended.exit_code:
        last = ended.stderr.strip().splitlines()[-1:] or [""]
        return f"exit code {ended.exit_code}: {last[0][:300]}"
    return "ran to its end"


def _code(ended: Ended) -> int | None:
    return None if ended.limit else ended.exit_code


def _encodable(*texts: str) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"The code can't be written as UTF-8 ({error}). Take the surrogates out of it.") from None
