"""Jobs for a judge, each done once and kept in a file that a killed run goes on from.

The file is JSONL: a line of settings, then a line a job in a fixed order. It is replaced whole after every chunk of
jobs, and chunks begin at fixed places, so a run that was killed ends in the same bytes as one that was not. Rows
therefore hold no times. Not covered: two writers of one file.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from workbench.files import write_atomic

CHUNK = 32  # jobs between two writes
Job = dict[str, Any]
Ask = Callable[[list[Job]], list[dict[str, Any]]]


def asked(
    file: Path | None, settings: dict[str, Any], jobs: Sequence[Job], ask: Ask, chunk: int = CHUNK
) -> list[dict[str, Any]]:
    """A row a job: what names it (all but its prompt) and what `ask` answered; jobs in the file are not asked again.

    Raises ValueError where the file belongs to other settings, with what differs, before anything is asked.
    """
    named = [{key: value for key, value in job.items() if key != "prompt"} for job in jobs]
    rows = _kept(file, settings, named, chunk)
    while len(rows) < len(jobs):
        start, stop = len(rows), min(len(rows) + chunk, len(jobs))
        answers = ask(list(jobs[start:stop]))
        rows += [{**name, **answer} for name, answer in zip(named[start:stop], answers, strict=True)]
        if file is not None:
            write_atomic(file, _lines([{"settings": settings}, *rows]))
    return rows


def read_rows(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings and rows of a file; lines that are cut off or damaged are left out."""
    found: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    if not found or not isinstance(found[0], dict) or "settings" not in found[0]:
        raise ValueError(
            f"{file} is not a file of judgements: its first line should hold the settings. Choose another out= file."
        )
    return found[0]["settings"], found[1:]


def check_settings(file: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse a file that was started with other settings, by name."""
    names = sorted(name for name in there.keys() | now.keys() if there.get(name) != now.get(name))
    if names:
        changes = "; ".join(f"{name}: {there.get(name)!r:.80} there, {now.get(name)!r:.80} now" for name in names)
        raise ValueError(
            f"{file} was started with other settings ({changes}). Choose another out= file, go back to the old "
            "settings to finish it, or delete it to start over."
        )


def _kept(file: Path | None, settings: dict[str, Any], named: list[Job], chunk: int) -> list[dict[str, Any]]:
    """Rows of whole chunks that the file holds for these jobs."""
    if file is None or not file.exists():
        return []
    there, rows = read_rows(file)
    check_settings(file, there, settings)
    good = 0
    for row, name in zip(rows, named, strict=False):
        if any(row.get(key) != value for key, value in name.items()):
            break
        good += 1
    return rows[: good if good == len(named) else good - good % chunk]


def _lines(values: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)
