"""Start the process that executes one notebook, watch it, and see that nothing of it lives on.

The process gets its own group, this interpreter as the kernel `python3`, an empty IPython profile, a fixed hash seed
and the run's mark; it is stopped at the wall-clock limit. What happens inside it is `execute`'s matter.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workbench.files import to_json, write_atomic
from workbench.runs.heartbeats import FOLDER, LINE_EVERY, line, read_beat
from workbench.runs.locks import Owner
from workbench.runs.processes import MARK, end_marked
from workbench.runs.provenance import PACKAGE

GRACE = 5.0  # seconds between asking a notebook to stop and killing it


@dataclass(frozen=True)
class Failure:
    """Why a notebook failed: the error's name and message, the cell counted from 1 and its source, the traceback."""

    name: str
    message: str
    cell: int | None = None
    source: str = ""
    traceback: str = ""

    def record(self) -> dict[str, Any]:
        """Return plain data for the journal."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """What an execution left: a failure or None, and the largest resident memory of one of its processes."""

    failure: Failure | None
    peak_memory_bytes: int | None


def launch(
    folder: Path,
    stage: str,
    source: bytes,
    parameters: Mapping[str, Any],
    owner: Owner,
    *,
    timeout: float | None,
    say: Callable[[str], None],
) -> Outcome:
    """Execute a notebook's content in a child process; the executed notebook lands in the stage's folder."""
    work = folder / ".run" / stage
    for old in (*(work / name for name in ("outcome.json", "heartbeat.json", "partial.ipynb")), *work.glob(".*.tmp")):
        old.unlink(missing_ok=True)
    scratch = tempfile.mkdtemp(prefix="workbench-")
    job = {"parameters": dict(parameters), "parent": os.getpid(), "cwd": str(Path.cwd()), "scratch": scratch}
    write_atomic(work / "job.json", to_json(job))
    write_atomic(work / "source.ipynb", source)
    try:
        with (work / "log.txt").open("wb") as log:
            command = [sys.executable, "-m", "workbench.runs.execute", str(work)]
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(work, scratch, owner.mark),
                start_new_session=True,
            )
            limit = watch(child, work, owner, timeout, say)
    finally:
        end_marked(owner.mark)
        shutil.rmtree(scratch, ignore_errors=True)
    if (work / "partial.ipynb").exists():
        (work / "partial.ipynb").replace(folder / stage / f"{stage}.ipynb")
    return read_outcome(work, child.returncode, limit)


def environment(work: Path, scratch: str, mark: str) -> dict[str, str]:
    """Return the environment of an execution; also writes the kernel specification that it will find first."""
    specification = {
        "argv": [sys.executable, "-m", "workbench.runs.kernel", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
    }
    write_atomic(Path(scratch) / "jupyter" / "kernels" / "python3" / "kernel.json", to_json(specification))

    def first(name: str, value: str) -> str:
        return os.pathsep.join([value, *filter(None, [os.environ.get(name)])])

    return {
        "PYTHONHASHSEED": "0",  # sets of strings iterate alike in every start; an own choice wins
        **os.environ,
        "PYTHONPATH": first("PYTHONPATH", str(PACKAGE.parent)),
        "JUPYTER_PATH": first("JUPYTER_PATH", f"{scratch}/jupyter"),
        "JUPYTER_RUNTIME_DIR": scratch,
        "IPYTHONDIR": f"{scratch}/ipython",  # no start-up files of the user's own
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        FOLDER: str(work),
        MARK: mark,
    }


def watch(
    child: "subprocess.Popen[bytes]", work: Path, owner: Owner, timeout: float | None, say: Callable[[str], None]
) -> float | None:
    """Wait for the child, show its heartbeats, renew the owner's; return the limit if it was exceeded, else None."""
    began = time.monotonic()
    told, shown = 0.0, None
    try:
        while child.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=0.1)
            owner.beat()
            if timeout is not None and time.monotonic() - began > timeout:
                stop(child)
                return timeout
            if time.monotonic() - told >= LINE_EVERY:
                told = time.monotonic()
                beat = read_beat(work)
                if beat and beat != shown:
                    say(f"  {line(beat)}")
                    shown = beat
    except BaseException:
        stop(child)
        raise
    return None


def stop(child: "subprocess.Popen[bytes]") -> None:
    """Ask the child's process group to end, then kill it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=GRACE)
            return


def read_outcome(work: Path, code: int | None, limit: float | None) -> Outcome:
    """Return what the child wrote, or what its end says if it wrote nothing."""
    try:
        found = json.loads((work / "outcome.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {}
    if limit is not None:
        failure: Failure | None = Failure("TimeLimit", f"it ran longer than --timeout {limit:g} seconds")
    elif found:
        failure = Failure(**found["error"]) if found["error"] else None
    elif code is not None and code < 0:
        failure = Failure("Killed", f"the executing process was ended by {signal.Signals(-code).name}")
    else:
        tail = (work / "log.txt").read_text(encoding="utf-8", errors="replace")[-2000:]
        failure = Failure("Stopped", f"the executing process ended with code {code} and no outcome", traceback=tail)
    return Outcome(failure, found.get("peak_memory_bytes"))
