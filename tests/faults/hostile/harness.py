"""Run hostile programs beside canaries: things outside that tell when somebody got through to them."""

import contextlib
import os
import platform
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults.hostile import escapes, exhaustion, forgeries
from tests.faults.hostile.case import Case
from workbench.files import sha256
from workbench.sandbox import Limits, Outcome, jail, judge_tests, run_python
from workbench.synthesis.programs import printed
from workbench.tasks.verifiers import verify

PROJECT = Path(__file__).resolve().parents[3]
CASES = [*escapes.CASES, *exhaustion.CASES, *forgeries.CASES]
SECRET = "canary-" + os.urandom(8).hex()
SHORT, LONG = 1.0, 8.0  # seconds: for what has to be killed, and for what ends by itself


@dataclass
class Canaries:
    """What stands outside: `touched` names each that was reached, `fill` puts their places into a program."""

    folder: Path
    port: int = 0
    touched: list[str] = field(default_factory=list)

    @property
    def abstract(self) -> str:
        return f"workbench-{self.folder.name}-{os.getpid()}"

    def fill(self, code: str) -> str:
        places = {
            "CALLS": jail._CALLS[platform.machine()], "SECRET": self.folder / "secret",
            "VICTIM": self.folder / "victim",
            "UNIX": self.folder / "socket", "ABSTRACT": self.abstract, "PORT": self.port, "PID": os.getpid(),
            "PROJECT": PROJECT,
        }  # fmt: skip
        for name, place in places.items():
            code = code.replace(f"@{name}@", str(place))
        return code

    def changed(self) -> list[str]:
        """What of the files outside is not as it was."""
        found = [] if (self.folder / "victim").read_text() == "as it was" else ["victim"]
        names = sorted(path.name for path in self.folder.iterdir())
        return found + ([] if names == ["secret", "socket", "victim"] else names)


@contextlib.contextmanager
def canaries(folder: Path) -> Iterator[Canaries]:
    """Servers, files and an environment variable that only somebody outside can reach."""
    found = Canaries(folder)
    (folder / "secret").write_text(SECRET)
    (folder / "secret").chmod(0o644)
    (folder / "victim").write_text("as it was")
    (folder / "victim").chmod(0o666)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    tcp = socket.create_server(("127.0.0.1", 0))
    found.port = tcp.getsockname()[1]
    udp.bind(("127.0.0.1", found.port))
    servers = {"tcp": tcp, "udp": udp}
    for name, address in (("unix", str(folder / "socket")), ("abstract", f"\0{found.abstract}")):
        servers[name] = socket.socket(socket.AF_UNIX)
        servers[name].bind(address)
        servers[name].listen()
    ending, held = threading.Event(), []

    def listen(name: str, server: socket.socket) -> None:
        server.settimeout(0.1)
        while not ending.is_set():
            with contextlib.suppress(TimeoutError):
                held.append(server.recvfrom(1) if name == "udp" else server.accept()[0])
                found.touched.append(name)

    threads = [threading.Thread(target=listen, args=item) for item in servers.items()]
    for thread in threads:
        thread.start()
    os.environ["WORKBENCH_SECRET"] = SECRET
    try:
        yield found
    finally:
        ending.set()
        for thread in threads:
            thread.join()
        for each in (*servers.values(), *held):
            if isinstance(each, socket.socket):
                each.close()
        del os.environ["WORKBENCH_SECRET"]


@dataclass(frozen=True)
class Finding:
    """What one program came to; `fault` is empty where the sandbox held."""

    case: Case
    outcome: Outcome
    fault: str
    ended: float  # seconds since the machine started

    @property
    def happened(self) -> str:
        said = " ".join(self.outcome.stdout.split())[:60]
        return f"{self.outcome.reason}{f'; printed: {said}' if said else ''}"


def run(case: Case, outside: Canaries) -> Finding:
    """Run one program and hold what it did against what must come of it."""
    code = outside.fill(case.code)
    limits = Limits(seconds=SHORT if case.expect in ("seconds", "ends") else LONG, memory=256 << 20, cpu=60)
    if case.against == "judge_tests":
        outcome = judge_tests(code, forgeries.TESTS, "add", Limits(seconds=2 * SHORT))
    else:
        outcome = run_python(code, limits=limits)
    ended = time.clock_gettime(time.CLOCK_BOOTTIME)
    fault = _fault(case, outcome) or (f"alive: {found}" if (found := survivors(outcome, ended)) else "")
    return Finding(case, outcome, fault, ended)


def _fault(case: Case, outcome: Outcome) -> str:
    said = outcome.stdout + outcome.stderr
    if SECRET in said or "tests-4711" in said:
        return "a secret came out"
    if case.expect == "refused":
        return "" if outcome.stdout.startswith("refused") else "it was not refused, or never tried"
    if case.expect == "judged wrong":
        answer = printed(outcome)
        right = (
            outcome.passed
            if case.against == "judge_tests"
            else verify("number", forgeries.ANSWER, answer or "").correct
        )
        return "judged right" if right else ""
    if case.expect == "ends":
        return ""
    return "" if outcome.limit == case.expect else f"expected the limit on {case.expect}, met {outcome.limit or 'none'}"


def survivors(outcome: Outcome, ended: float) -> list[int]:
    """Processes that live in the outcome's process namespaces and began before its end (numbers are used again)."""
    assert all(outcome.namespaces), "the namespaces are not known"
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if (entry / "ns" / "pid").stat().st_ino in outcome.namespaces:
                words = (entry / "stat").read_text().rpartition(")")[2].split()
                if words[0] not in "ZX" and int(words[19]) / os.sysconf("SC_CLK_TCK") < ended:
                    found.append(int(entry.name))
    return found


def run_all(folder: Path, workers: int = 4) -> tuple[list[Finding], Canaries]:
    """All programs, `workers` at a time, in the order of the table."""
    before = {file: sha256(file) for file in (Path(os.__file__), PROJECT / "pyproject.toml")}
    with canaries(folder) as outside:
        with ThreadPoolExecutor(workers) as pool:
            findings = list(pool.map(lambda case: run(case, outside), CASES))
        outside.touched += outside.changed()
    outside.touched += [str(file) for file, digest in before.items() if sha256(file) != digest]
    return findings, outside


def run_outside(case: Case, outside: Canaries) -> str:
    """What the same program prints without a sandbox: a positive control, for programs that do no harm."""
    words = [sys.executable, "-c", outside.fill(case.code)]
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=60).stdout


def naive_judge(program: str) -> bool:
    """The usual way: program and tests in one process, whose exit code is the verdict."""
    source = f"{program}\n{forgeries.TESTS}\ncheck(add)\n"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, check=False, timeout=60)
    return done.returncode == 0
