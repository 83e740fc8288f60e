"""What the runner last did with each stage: notes for `status` and for the next start, never a proof of completion.

One writer (the holder of the folder's lock), each note an atomic replacement of a small file.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.files import to_json, write_atomic


@dataclass
class Journal:
    """The notes of a run folder: by stage a dictionary with state, key, began, seconds, error, expected."""

    path: Path
    stages: dict[str, dict[str, Any]]

    @classmethod
    def open(cls, path: Path) -> "Journal":
        """Read the notes of earlier starts; a missing or unreadable file means none."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))["stages"]
        except (OSError, ValueError, KeyError, TypeError):
            found = {}
        return cls(path, {str(name): item for name, item in found.items() if isinstance(item, dict)})

    def note(self, stage: str, **entries: Any) -> None:
        """Add or replace entries of a stage."""
        self.stages.setdefault(stage, {}).update(entries)
        self.save()

    def expect(self, keys: Mapping[str, str]) -> None:
        """Note which own keys (ingredients without inputs) this start is going to produce."""
        for stage, key in keys.items():
            entry = self.stages.setdefault(stage, {"state": "waiting"})
            entry["expected"] = key
            if entry.get("state") == "running":  # its runner is gone, or this one could not hold the lock
                entry["state"] = "interrupted"
        self.save()

    def forget(self, stages: Iterable[str]) -> None:
        """Drop what is known of earlier attempts, so that none is continued."""
        for stage in stages:
            self.stages[stage] = {"state": "waiting", "expected": self.stages.get(stage, {}).get("expected")}
        self.save()

    def attempt(self, stage: str) -> str | None:
        """Return the key of the last attempt if it did not complete: its files may be continued."""
        entry = self.stages.get(stage, {})
        return entry.get("key") if entry.get("state") in ("running", "interrupted", "failed") else None

    def save(self) -> None:
        """Replace the file."""
        write_atomic(self.path, to_json({"stages": self.stages}, indent=2))
