"""Start sandboxes, read what they say up to a limit, and end them: every process of them is gone when this returns.

A sandbox's processes live in a process namespace of their own, so ending its first process ends all of them, whatever
they did with sessions, groups and signals, and the kernel reports that first process as ended only after all others.
The start is not counted as the program's time. Does not cover: what the walls are (`jail`), what runs (`inside`); a
killed workbench takes its sandboxes with it but in the millisecond in which bubblewrap starts its child: that child
then waits for ever, without having run anything (5 of 150 kills in the first 40 ms of a start, bubblewrap 0.8.0).
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from workbench.sandbox.jail import Limits, command, readable, refused

START_SECONDS = 60.0  # far more than a start takes (50 ms), for machines under load
TICK = 0.05  # seconds between two looks at memory and files


@dataclass(frozen=True)
class Ended:
    """How one sandbox ended: `limit` names the limit that it was killed at, or is empty."""

    stdout: str
    stderr: str
    exit_code: int | None
    limit: str
    seconds: float
    namespace: int


@dataclass
class Script:
    """What one sandbox shall run: mode and arguments of `inside`, files beside it, and where stdin and stdout are."""

    mode: str
    files: dict[str, bytes]
    rest: tuple[str, ...] = ()
    stdin: int | None = None  # a descriptor, else an empty file
    stdout: int | None = None  # a descriptor, else read here
    inherit: tuple[int, ...] = ()


@dataclass
class _Running:
    process: "subprocess.Popen[bytes]"
    streams: dict[str, int]  # what is read here: stdout, stderr, info, ready
    heard: dict[str, bytearray]
    limit: str = ""
    first: int | None = None  # the namespace's first process, as a pidfd
    first_id: int = 0
    namespace: int = 0
    closed: set[str] = field(default_factory=set)


def script(code: str, stdin: str = "") -> Script:
    """A program that is run as a script, reading `stdin`."""
    return Script("run", {"program.py": code.encode()}, stdin=readable(stdin.encode()) if stdin else None)


def run_inside(scripts: Sequence[Script], limits: Limits, program: str = "bwrap") -> list[Ended]:
    """Run scripts beside each other until the last one ends or one meets a limit; then end all of them.

    Closes the descriptors of the scripts. Raises `SandboxError` when a sandbox can't start.
    """
    running: list[_Running] = []
    try:
        for each in scripts:
            running.append(_start(each, limits, program))  # noqa: PERF401  one by one: the next may fail to start
        for each in scripts:
            _close(each)  # so that the end of one is seen by the other
        begun = _watch(running, limits)
    finally:
        for each in scripts:
            _close(each)
        for one in running:
            _end(one, limits.output)
    seconds = time.monotonic() - begun
    for one in running:
        if not one.heard["ready"]:
            raise refused(one.heard["stderr"].decode(errors="replace")[-500:] or one.limit)
    return [
        Ended(
            one.heard["stdout"][: limits.output].decode(errors="replace"),
            one.heard["stderr"][: limits.output].decode(errors="replace"),
            one.process.returncode, one.limit, seconds, one.namespace,
        )
        for one in running
    ]  # fmt: skip


def _close(each: Script) -> None:
    for descriptor in {each.stdin, each.stdout, *each.inherit} - {None}:
        assert descriptor is not None
        with contextlib.suppress(OSError):
            os.close(descriptor)
    each.stdin = each.stdout = None
    each.inherit = ()


def _start(each: Script, limits: Limits, program: str) -> _Running:
    info, told = os.pipe()
    ready, says = os.pipe()
    handed: list[int] = []
    try:
        files = {"inside.py": Path(__file__).with_name("inside.py").read_bytes(), **each.files}
        words = ["/sandbox/inside.py", each.mode, json.dumps(asdict(limits)), str(says), *each.rest]
        args, handed = command(words, files, limits, told, program)
        process = subprocess.Popen(
            args,
            stdin=subprocess.DEVNULL if each.stdin is None else each.stdin,
            stdout=subprocess.PIPE if each.stdout is None else each.stdout,
            stderr=subprocess.PIPE,
            pass_fds=[*handed, says, *each.inherit],
            env={"PATH": os.defpath},
        )
    except OSError as error:
        os.close(info)
        os.close(ready)
        raise refused(str(error)) from error
    finally:
        for descriptor in {told, says, *handed}:
            os.close(descriptor)
    streams = {"info": info, "ready": ready}
    for name, stream in (("stdout", process.stdout), ("stderr", process.stderr)):
        if stream is not None:
            streams[name] = os.dup(stream.fileno())
            stream.close()
    for descriptor in streams.values():
        os.set_blocking(descriptor, False)
    return _Running(process, streams, {name: bytearray() for name in ("stdout", "stderr", "info", "ready")})


def _watch(running: list[_Running], limits: Limits) -> float:
    """Read until the last one ends by itself or any meets a limit; returns when the clock began."""
    begun, looked = time.monotonic(), 0.0
    started = False
    with selectors.DefaultSelector() as selector:
        for one in running:
            for name, descriptor in one.streams.items():
                selector.register(descriptor, selectors.EVENT_READ, (one, name))
        ends = os.pidfd_open(running[-1].process.pid)
        try:
            selector.register(ends, selectors.EVENT_READ, (running[-1], "end"))
            while not any(one.limit for one in running):
                ended = False
                for key, _ in selector.select(TICK):
                    one, name = key.data
                    ended = ended or name == "end"
                    if name != "end" and not _hear(one, name, limits.output):
                        selector.unregister(key.fd)
                        one.closed.add(name)
                now = time.monotonic()
                if ended and all(one.heard["ready"] or "ready" in one.closed for one in running):
                    break  # a judge may be through before its program is up, which is no failed start
                if not started and all(one.heard["ready"] for one in running):
                    started, begun = True, now
                if now - begun > (limits.seconds if started else START_SECONDS):
                    for one in running:
                        one.limit = "seconds"
                elif now - looked > TICK:
                    looked = now
                    for one in running:
                        one.limit = one.limit or _over(one, limits)
        finally:
            os.close(ends)
    return begun


def _hear(one: _Running, name: str, most: int) -> bool:
    """Read what is there; False at the end of the stream, or when it is more than may be said."""
    try:
        data = os.read(one.streams[name], 1 << 16)
    except BlockingIOError:
        return True
    one.heard[name] += data
    if name in ("stdout", "stderr") and len(one.heard[name]) > most:
        one.limit = "output"
        return False
    if name == "info" and one.first is None and one.heard["info"].rstrip().endswith(b"}"):
        _know(one)
    return bool(data)


def _know(one: _Running) -> None:
    """Get hold of the namespace's first process, as long as it is surely that one and no later one of its number."""
    told = json.loads(one.heard["info"])
    one.namespace, one.first_id = told.get("pid-namespace", 0), told["child-pid"]
    with contextlib.suppress(OSError):
        one.first = os.pidfd_open(one.first_id)
        with contextlib.suppress(PermissionError):
            if one.namespace and Path(f"/proc/{one.first_id}/ns/pid").stat().st_ino != one.namespace:
                os.close(one.first)
                one.first = None


def _over(one: _Running, limits: Limits) -> str:
    """The limit on memory or files that all processes of a sandbox together have met, or nothing."""
    if not one.first_id or not one.heard["ready"]:
        return ""
    used, waiting = 0, [one.first_id]
    while waiting:
        process = Path(f"/proc/{waiting.pop()}")
        with contextlib.suppress(OSError, ValueError):
            for line in (process / "status").read_text().splitlines():
                if line.startswith(("RssAnon:", "RssShmem:")):
                    used += int(line.split()[1]) << 10
            for thread in (process / "task").iterdir():
                waiting += map(int, (thread / "children").read_text().split())
    if used > limits.memory:
        return "memory"
    with contextlib.suppress(OSError):
        folder = os.statvfs(f"/proc/{one.first_id}/root/tmp")
        if folder.f_files - folder.f_ffree > limits.files + 1:
            return "files"
    return ""


def _end(one: _Running, most: int) -> None:
    """Kill a sandbox, wait until no process of it is left, and read the rest of what it said."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if one.first is None:
            _hear(one, "info", most)
    if one.first is None:
        one.process.kill()  # its child, if it has one by now, dies with it
    else:
        with contextlib.suppress(OSError):
            signal.pidfd_send_signal(one.first, signal.SIGKILL)
    try:
        one.process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        one.process.kill()
        one.process.wait()
    if one.first is not None:
        with selectors.DefaultSelector() as selector:
            selector.register(one.first, selectors.EVENT_READ)
            selector.select(10)
        os.close(one.first)
    for name, descriptor in one.streams.items():
        if name != "info":
            with contextlib.suppress(OSError):
                while not one.limit and (before := len(one.heard[name])) < most:
                    _hear(one, name, most)
                    if len(one.heard[name]) == before:
                        break
        os.close(descriptor)
