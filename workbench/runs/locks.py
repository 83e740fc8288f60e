"""One writer a run folder: a lock that dies with its owner, and a note that says who the owner is.

The lock itself is flock(2), which the operating system drops when the owner dies in whatever way, so that no stale
lock can stay. `owner.json` beside it names the process, the machine and its last sign of life; it is read by `status`
and, where a folder is shared between machines whose file system ignores flock, respected while it is fresh.
"""

import contextlib
import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.files import to_json, write_atomic
from workbench.runs.processes import MARK, end_marked, identity, is_alive

BEAT = 2.0  # seconds between two signs of life of a runner
FRESH = 60.0  # seconds after which a silent owner on another machine counts as dead


@dataclass
class Owner:
    """The holder of a run folder: `mark` is inherited by all processes of the run, `beat` renews the sign of life."""

    path: Path
    mark: str
    beaten: float = field(default=0.0)

    def beat(self, *, ended: bool = False) -> None:
        """Write the sign of life if the last one is older than two seconds."""
        now = time.time()
        if not ended and now - self.beaten < BEAT:
            return
        self.beaten = now
        owner = {
            "process": identity(os.getpid()),
            "host": platform.node(),
            "mark": self.mark,
            "beat": now,
            "ended": ended,
        }
        write_atomic(self.path, to_json(owner))


@contextlib.contextmanager
def hold(folder: Path, say: Callable[[str], None] = print) -> Iterator[Owner]:
    """Hold a run folder for the length of a `with` block; wait, and say so, while another process holds it.

    On entry, processes that a killed owner left behind are ended, so that nothing else writes to the folder.
    Raises OSError if the folder can't be written.
    """
    import fcntl  # Linux and macOS; on Windows runs need WSL

    if os.environ.get(MARK) and os.environ.get(MARK) == read_owner(folder).get("mark"):
        raise ValueError(
            f"this process is part of the run in {folder.parent} and can't start that run again: use another --out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+b") as handle:
        said = False
        while not claim(handle.fileno(), folder, fcntl):
            if not said:
                say(f"waiting for {describe(folder)}, which runs in {folder.parent} (Ctrl-C to leave)")
                said = True
            time.sleep(0.2)
        end_marked(str(read_owner(folder).get("mark", "")))
        owner = Owner(folder / "owner.json", uuid.uuid4().hex)
        owner.beat()
        try:
            yield owner
        finally:
            end_marked(owner.mark)
            owner.beat(ended=True)
            fcntl.flock(handle.fileno(), fcntl.LOCK_UN)


def claim(descriptor: int, folder: Path, fcntl: Any) -> bool:
    """Try to take the lock; False while a living process, here or on another machine, holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    owner = read_owner(folder)
    elsewhere = owner.get("host") not in (None, platform.node()) and not owner.get("ended")
    if elsewhere and time.time() - float(owner.get("beat", 0)) < FRESH:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return False
    return True


def read_owner(folder: Path) -> dict[str, Any]:
    """Return the note about the present or last owner; empty if there was none."""
    try:
        found = json.loads((folder / "owner.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def held(folder: Path) -> bool:
    """Tell if a living process holds the folder, as far as its note says."""
    owner = read_owner(folder)
    if not owner or owner.get("ended"):
        return False
    if owner.get("host") == platform.node():
        return is_alive(owner.get("process"))
    return time.time() - float(owner.get("beat", 0)) < FRESH


def describe(folder: Path) -> str:
    """Name the owner for a person."""
    owner = read_owner(folder)
    return f"process {(owner.get('process') or {}).get('pid', '?')} on {owner.get('host', '?')}"
