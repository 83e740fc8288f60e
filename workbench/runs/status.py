"""The truth about a run, also after its processes were killed: what is proven, what runs, what was cut short.

A stage is completed only if its manifest is whole, every file it lists still has its size and hash, and its inputs are
the present ones. Running means that the owner of the folder lives. Nothing here writes, locks or starts anything.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.runs import OWN, locks, own_key
from workbench.runs.heartbeats import duration, line, read_beat
from workbench.runs.journal import Journal
from workbench.runs.manifest import NAME, damage, read_manifest
from workbench.runs.processes import marked

STALL_AFTER = 300.0  # seconds without any sign of life from a stage


@dataclass(frozen=True)
class StageStatus:
    """One stage: completed, running, stalled, interrupted, failed, damaged, outdated or waiting; a line of detail."""

    stage: str
    state: str
    detail: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class RunStatus:
    """A run folder: its stages, its owner if that lives, and processes that outlived a killed owner."""

    folder: Path
    stages: tuple[StageStatus, ...]
    owner: str | None
    leftovers: tuple[int, ...] = ()


def status(folder: Path | str, *, stall_after: float = STALL_AFTER) -> RunStatus:
    """Return the state of every stage of a run folder; raises FileNotFoundError if it is no run folder."""
    home = Path(folder)
    own = home / OWN
    if not own.is_dir():
        raise FileNotFoundError(f"{home} is no run folder. Start a run: python -m workbench run --out {home}")
    alive = locks.held(own)
    journal = Journal.open(own / "journal.json")
    names = sorted({*journal.stages, *(path.parent.name for path in home.glob(f"*/{NAME}"))})
    manifests = {name: read_manifest(home / name) for name in names}
    stages = tuple(judge(home, name, journal.stages.get(name, {}), manifests, alive, stall_after) for name in names)
    mark = str(locks.read_owner(own).get("mark", ""))
    leftovers = () if alive or not mark else tuple(process.pid for process in marked(mark))
    return RunStatus(home, stages, locks.describe(own) if alive else None, leftovers)


def judge(
    home: Path, name: str, entry: Mapping[str, Any], manifests: Mapping[str, Any], alive: bool, stall_after: float
) -> StageStatus:
    """Return the state of one stage from proof first, and from notes only where there is no proof."""
    manifest = manifests.get(name)
    state = entry.get("state", "waiting")
    if (manifest is not None and state != "running") or (manifest and manifest["key"] == entry.get("key")):
        return judge_manifest(home, name, entry, manifests, manifest)
    beat = read_beat(home / OWN / name)
    last = line(beat) if beat else ""
    if state == "running" and alive:
        signs = [
            entry.get("began") or 0.0,
            (beat or {}).get("time") or 0.0,
            modified(home / OWN / name / "partial.ipynb"),
        ]
        silent = time.time() - max(signs)
        if silent > stall_after:
            return StageStatus(name, "stalled", f"no sign of life for {duration(silent)}; last: {last or 'none'}")
        return StageStatus(name, "running", last)
    if state in ("running", "interrupted"):
        return StageStatus(name, "interrupted", f"last: {last}" if last else "")
    if state == "failed":
        error = entry.get("error") or {}
        cell = f"cell {error['cell']}: " if error.get("cell") else ""
        return StageStatus(
            name, "failed", f"{cell}{error.get('name')}: {error.get('message')}"[:300], entry.get("seconds")
        )
    if state == "completed":
        return StageStatus(name, "damaged", "its manifest is gone or was changed; the next run redoes it")
    return StageStatus(name, "waiting")


def judge_manifest(
    home: Path, name: str, entry: Mapping[str, Any], manifests: Mapping[str, Any], manifest: Mapping[str, Any]
) -> StageStatus:
    """Return the state of a stage that has a whole manifest."""
    if problem := damage(home / name, manifest):
        return StageStatus(name, "damaged", f"{problem}; the next run redoes it")
    expected = entry.get("expected")
    if expected and expected != own_key(manifest["ingredients"]):
        return StageStatus(name, "outdated", "made from other parameters, notebook or package; the next run redoes it")
    for other, key in manifest["ingredients"]["inputs"].items():
        if (manifests.get(other) or {}).get("output_key") != key:
            return StageStatus(name, "outdated", f"made from another {other}; the next run redoes it")
    return StageStatus(name, "completed", "", manifest.get("seconds"))


def modified(path: Path) -> float:
    """Return a file's modification time, 0 if there is none."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def latest(outputs: Path) -> Path | None:
    """Return the run folder in `outputs` that was worked in last."""
    folders = [path.parent for path in outputs.glob(f"*/{OWN}")]
    return max(folders, key=lambda folder: modified(folder / OWN / "journal.json"), default=None)


def as_data(found: RunStatus) -> str:
    """Return a status as JSON text."""
    stages = [
        {"stage": item.stage, "state": item.state, "detail": item.detail, "seconds": item.seconds}
        for item in found.stages
    ]
    return json.dumps(
        {"folder": str(found.folder), "owner": found.owner, "leftovers": list(found.leftovers), "stages": stages}
    )
