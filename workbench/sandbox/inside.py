"""What runs first inside of the sandbox: it puts on the limits, then runs a program, answers calls, or runs tests.

Started as a script with a mode and the limits; it needs the standard library alone and never runs in the workbench's
own process. `answer` and `judge` are two sandboxes joined by two pipes: the one holds the program and has never seen
the tests, the other holds the tests and never runs the program. Between them go lines of JSON with plain data, so
nothing that the program makes, an object that equals everything for example, ever lies in the process that judges.

Does not cover: changes that a program makes to its arguments in place, which the tests don't see.
"""

import base64
import builtins
import json
import os
import resource
import sys
import types
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

HOME = "/sandbox"
LARGEST_INT = 2**63  # above it JSON readers may refuse the digits, so it goes as hexadecimal


def restrict(limits: dict[str, Any]) -> None:
    """Put limits on this process and its children that only a privileged user could raise again."""
    for name, value in {
        "CPU": limits["cpu"],
        "AS": limits["memory"],
        "NPROC": limits["processes"] + 1,  # bubblewrap's own
        "FSIZE": limits["file_size"],
        "NOFILE": 64,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def source(name: str) -> Any:
    """The compiled file `name` of /sandbox."""
    with open(f"{HOME}/{name}", encoding="utf-8") as stream:  # noqa: PTH123  importing pathlib would slow every start
        return compile(stream.read(), name, "exec")


def as_module(name: str, file: str) -> dict[str, Any]:
    """Run a file as the module `name` and return its names."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(source(file), module.__dict__)
    return module.__dict__


def encode(value: Any) -> Any:
    """A value as JSON: plain data only, containers as tagged lists.

    >>> encode((1, {"a": [None, 2.5]}))
    ['tuple', 1, ['dict', ['a', ['list', None, 2.5]]]]
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if abs(value) < LARGEST_INT else ["int", hex(value)]
    if isinstance(value, float | str):
        return float(value) if isinstance(value, float) else str(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, bytes | bytearray):
        return ["bytes", base64.b64encode(value).decode()]
    if isinstance(value, dict):
        return ["dict", *([encode(key), encode(each)] for key, each in value.items())]
    for kind in (list, tuple, set, frozenset, range):
        if isinstance(value, kind):
            return [kind.__name__, *map(encode, value)]
    raise TypeError(f"a {type(value).__name__} is no plain data (numbers, text, lists, tuples, dicts, sets)")


def decode(value: Any) -> Any:
    """The value that `encode` was given; a range comes back as a list.

    >>> decode(encode((1, {"a": [None, 2**70, {3}]})))
    (1, {'a': [None, 1180591620717411303424, {3}]})
    """
    if not isinstance(value, list):
        return value
    name, *items = value
    makers: dict[str, Callable[[], Any]] = {
        "int": lambda: int(items[0], 16),
        "complex": lambda: complex(*items),
        "bytes": lambda: base64.b64decode(items[0]),
        "dict": lambda: {decode(key): decode(each) for key, each in items},
        "list": lambda: [decode(item) for item in items],
        "range": lambda: [decode(item) for item in items],
        "tuple": lambda: tuple(decode(item) for item in items),
        "set": lambda: {decode(item) for item in items},
        "frozenset": lambda: frozenset(decode(item) for item in items),
    }
    return makers[name]()


def pipes() -> tuple[BinaryIO, BinaryIO]:
    """Take stdin and stdout for the protocol; what the code prints goes to stderr, and what it reads is empty."""
    reads, writes = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return reads, writes


def send(stream: BinaryIO, message: Any) -> None:
    """One message, one line."""
    stream.write(json.dumps(message).encode() + b"\n")
    stream.flush()


def run() -> None:
    """Run the program as a script."""
    as_module("__main__", "program.py")


def answer(entry_point: str) -> None:
    """Run the program, then call its function with each line's arguments and answer with what it returns or raises."""
    requests, replies = pipes()
    function = as_module("candidate", "program.py")[entry_point]
    for line in requests:
        args, named = decode(json.loads(line))
        try:
            reply = ["returned", encode(function(*args, **named))]
        except BaseException as error:
            reply = ["raised", type(error).__name__, str(error)[:500]]
        send(replies, reply)


class Judge:
    """Runs tests against a function that lives in the other sandbox."""

    def __init__(self, requests: int, longest: int) -> None:
        self.replies, self.verdict = pipes()
        self.requests = os.fdopen(requests, "wb")
        self.longest = longest
        self.calls = 0

    def finish(self, passed: bool, reason: str) -> NoReturn:
        """Give the verdict and end, whatever the tests would do next."""
        send(self.verdict, {"passed": passed, "reason": reason[:2000]})
        sys.stderr.flush()
        os._exit(0)

    def call(self, *args: Any, **named: Any) -> Any:
        """What the program's function returns or raises; a broken answer ends the tests as failed."""
        self.calls += 1
        try:
            send(self.requests, encode((args, named)))
        except TypeError as error:
            self.finish(False, f"the tests can't call the program: {error}")
        except OSError:
            self.finish(False, "the program ended before it was called")
        line = self.replies.readline(self.longest)
        if not line.endswith(b"\n"):
            self.finish(False, "the program's answer is too long" if line else "the program ended without an answer")
        try:
            word, *rest = json.loads(line)
            if word == "returned":
                (value,) = rest
                return decode(value)
            name, message = map(str, rest)
            if word != "raised":
                raise ValueError(word)
        except BaseException as error:
            self.finish(False, f"the program's answer is no plain data ({type(error).__name__})")
        raise raised(name, message)

    def run(self, entry_point: str) -> NoReturn:
        """Run what the question gave, then the tests; nothing but their end without an error is a pass."""
        try:
            names = as_module("tests", "given.py")
            names[entry_point] = self.call
            exec(source("tests.py"), names)
            if "check" in names:
                names["check"](self.call)
        except BaseException as error:
            self.finish(False, f"{type(error).__name__}: {error}".removesuffix(": "))
        self.finish(self.calls > 0, "all tests passed" if self.calls else "the tests never called the program")


def raised(name: str, message: str) -> Exception:
    """The built-in error of that name, so that tests can expect it; any other becomes a RuntimeError.

    StopIteration too: inside of `all(map(function, ...))` it would end the tests early without failing them. And
    AssertionError, which is the tests' own word.

    >>> raised("ValueError", "no"), raised("StopIteration", "")
    (ValueError('no'), RuntimeError('StopIteration: '))
    """
    kind = getattr(builtins, name, None)
    special = (StopIteration, StopAsyncIteration, AssertionError, Warning)
    if not (isinstance(kind, type) and issubclass(kind, Exception)) or issubclass(kind, special):
        return RuntimeError(f"{name}: {message}")
    try:
        return kind(message)
    except TypeError:  # UnicodeDecodeError and its like want more arguments
        return RuntimeError(f"{name}: {message}")


def main(mode: str, limits: str, ready: str, *rest: str) -> None:
    """Limits, then a byte that says so, then the code; `exit` and `quit` are there as in any script."""
    bounds = json.loads(limits)
    restrict(bounds)
    os.write(int(ready), b"!")
    os.close(int(ready))
    sys.argv = ["program.py"]
    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
    if mode == "run":
        run()
    elif mode == "answer":
        answer(*rest)
    else:
        entry_point, requests = rest
        Judge(int(requests), bounds["output"]).run(entry_point)


if __name__ == "__main__":
    main(*sys.argv[1:])
