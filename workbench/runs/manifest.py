"""The proof that a stage is done: a file written last, with the size and hash of everything the stage left.

A manifest that is missing, torn, edited, or whose files differ is no proof, and the stage is redone. Holds also what
is needed to run the stage again. Deciding what to do is left to `runs`.
"""

import datetime
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.files import content_key, sha256, to_json, write_atomic
from workbench.runs.provenance import commit, machine
from workbench.runs.stages import COST, RESULT

NAME = "manifest.json"


def write_manifest(
    folder: Path, stage: str, key: str, ingredients: Mapping[str, Any], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Hash all files of a finished stage and write its manifest; return it.

    `facts` are what the run measured or was told (seconds, peak memory, parameters) and do not enter the key.
    """
    files = listing(folder)
    content = {
        "stage": stage,
        "key": key,
        "ingredients": dict(ingredients),
        "files": files,
        "output_key": output_key(stage, files),
        "commit": commit(),
        "machine": machine(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **facts,
    }
    return seal(folder / NAME, content)


def seal(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write a manifest with a hash of itself, so that a change to it shows."""
    sealed = {**content, "self": content_key(content=dict(content))}
    write_atomic(path, to_json(sealed, indent=2) + "\n")
    return sealed


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a folder's manifest if it is whole and unedited; the files it lists are not looked at."""
    try:
        content = json.loads((folder / NAME).read_text(encoding="utf-8"))
        own = content.pop("self")
        return content if own == content_key(content=content) else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def proven(folder: Path) -> dict[str, Any] | None:
    """Return a stage's manifest if it is whole and every file it lists has the size and hash it says."""
    content = read_manifest(folder)
    return content if content is not None and not damage(folder, content) else None


def damage(folder: Path, content: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the files a manifest lists, or None."""
    for name, expected in content.get("files", {}).items():
        path = folder / name
        try:
            if path.stat().st_size != expected["size"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['size']}"
            if sha256(path) != expected["sha256"]:
                return f"{name} was changed after it was written"
        except OSError:
            return f"{name} is gone"
    return None


def listing(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and hash of every file below a folder, by its relative name; the manifest itself is left out."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / NAME]
    return {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)} for path in paths
    }


def output_key(stage: str, files: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the key that later stages depend on: all files but those with times (the notebook, the costs)."""
    kept = {name: item["sha256"] for name, item in files.items() if name not in (f"{stage}.ipynb", COST)}
    return content_key(files=kept)


def sweep(folder: Path, *, keep: bool) -> None:
    """Prepare a stage's folder for another attempt: nothing may look finished, and no half-written file may stay.

    With `keep`, other files stay (checkpoints of an interrupted attempt with the same key); else the folder is emptied.
    """
    (folder / NAME).unlink(missing_ok=True)  # first: from here on the stage is not done
    if not keep and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    for leftover in folder.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)
