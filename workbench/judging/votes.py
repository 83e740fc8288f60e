"""A person as judge: which two answers to show on which side, and a file of votes that is added to at every click.

The file is JSONL: a first line that says what is compared, then a line a vote or undo, never changed afterwards, so a
kernel that dies loses nothing. Several raters may share a file; each has an order of questions and sides of their own.
How it looks in a notebook is `widgets.rating`'s matter.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.files import content_key, write_atomic
from workbench.judging.asking import check_settings, read_rows
from workbench.judging.questions import Duel, duels
from workbench.results import Results

if TYPE_CHECKING:
    from workbench.tasks import Task

CHOICES = ("left", "right", "tie", "skip")


@dataclass(frozen=True)
class Showing:
    """One question as a rater sees it; `left` says whose answer is on the left, 'a' or 'b', and is not shown."""

    duel: Duel
    left: str

    @property
    def texts(self) -> tuple[str, str]:
        """The answers on the left and on the right."""
        both = (self.duel.text_a, self.duel.text_b)
        return both if self.left == "a" else (both[1], both[0])


@dataclass(frozen=True)
class Ballot:
    """What one rater is asked, in order, and the file that the votes go to. Made by `open_ballot`."""

    a: str
    b: str
    rater: str
    file: Path
    showings: tuple[Showing, ...]

    @property
    def answered(self) -> list[str]:
        """Ids that this rater answered or skipped, in the order in which that happened."""
        return list(_standing(_events(self.file, self.rater)))

    @property
    def current(self) -> Showing | None:
        """The next question; None when all are done."""
        done = set(self.answered)
        return next((showing for showing in self.showings if showing.duel.id not in done), None)

    def counts(self) -> dict[str, int]:
        """How often each choice stands, by side: nothing in it says which condition is ahead."""
        choices = [event["choice"] for event in _standing(_events(self.file, self.rater)).values()]
        return {choice: choices.count(choice) for choice in CHOICES}

    def vote(self, choice: str) -> None:
        """Append a vote on the current question: 'left', 'right', 'tie' or 'skip'."""
        if choice not in CHOICES:
            raise ValueError(f"choice={choice!r} is no vote. Use one of: {', '.join(CHOICES)}.")
        showing = self.current
        if showing is None:
            raise ValueError(
                f"{self.rater} has voted on all {len(self.showings)} questions. Take one back with undo()."
            )
        self._append({"id": showing.duel.id, "left": showing.left, "choice": choice})

    def undo(self) -> bool:
        """Take this rater's last standing vote back; False when there is none."""
        answered = self.answered
        if answered:
            self._append({"id": answered[-1], "choice": "undo"})
        return bool(answered)

    def _append(self, event: dict[str, Any]) -> None:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps({"rater": self.rater, "when": when, **event}, ensure_ascii=False) + "\n"
        with self.file.open("ab") as handle:  # one write of one line: two raters at once don't mix
            handle.write(line.encode())
            handle.flush()
            os.fsync(handle.fileno())


def open_ballot(
    results: Results,
    a: str,
    b: str,
    *,
    out: str | Path,
    rater: str,
    seed: int = 0,
    n: int | None = None,
    questions: "Mapping[str, str] | Task | None" = None,
) -> Ballot:
    """Start or go on with a rater's votes in the file `out`.

    Each condition is on the left for half of the questions; order and sides are drawn by `seed` and the rater's name.
    Raises ValueError for an empty name, unknown conditions, and a file that is about other answers.
    """
    if not rater.strip():
        raise ValueError("rater is empty. Give your name: it tells your votes from others' in the same file.")
    pairs = duels(results, a, b, questions, n, seed)
    answers = content_key(shown=[[duel.id, duel.question, duel.text_a, duel.text_b] for duel in pairs])[:16]
    settings = {"kind": "votes", "a": a, "b": b, "seed": seed, "questions": len(pairs), "answers": answers}
    file = Path(out)
    if file.exists():
        check_settings(file, read_rows(file)[0], settings)
        _mend(file)
    else:
        write_atomic(file, json.dumps({"settings": settings}, ensure_ascii=False) + "\n")
    draw = Random(f"ballot/{seed}/{rater}")
    order = draw.sample(pairs, len(pairs))
    sides = draw.sample(["a", "b"], 2) * (len(pairs) // 2 + 1)
    sides = draw.sample(sides[: len(pairs)], len(pairs))
    return Ballot(a, b, rater, file, tuple(Showing(duel, side) for duel, side in zip(order, sides, strict=True)))


def read_votes(file: str | Path) -> pd.DataFrame:
    """Standing votes: rater, id, left, choice (left, right, tie, skip), verdict ('a', 'b', 'tie', None), when, a, b.

    Raises ValueError where there is no such file or it holds something else.
    """
    path = Path(file)
    if not path.exists():
        raise ValueError(f"There is no file {path}. Rate first: wb.rate(results, a, b, out={str(path)!r}, rater=NAME)")
    settings, events = read_rows(path)
    if settings.get("kind") != "votes":
        raise ValueError(f"{path} holds {settings.get('kind')!r}, not votes of people. Give the out= file of rate.")
    lines = []
    for rater in dict.fromkeys(event["rater"] for event in events):
        own = [event for event in events if event["rater"] == rater]
        for event in _standing(own).values():
            sides = {"left": event["left"], "right": "b" if event["left"] == "a" else "a", "tie": "tie"}
            lines.append({**event, "verdict": sides.get(event["choice"]), "a": settings["a"], "b": settings["b"]})
    columns = ["rater", "id", "left", "choice", "verdict", "when", "a", "b"]
    return pd.DataFrame(lines, columns=columns, dtype=object)


def _events(file: Path, rater: str) -> list[dict[str, Any]]:
    return [event for event in read_rows(file)[1] if event["rater"] == rater]


def _standing(events: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Votes that were not taken back, by id, in the order of voting."""
    kept: dict[str, dict[str, Any]] = {}
    for event in events:
        if event["choice"] == "undo":
            kept.pop(event["id"], None)
        else:
            kept[event["id"]] = event
    return kept


def _mend(file: Path) -> None:
    """Cut a last line off that was only half written, so that the next vote begins a line of its own."""
    data = file.read_bytes()
    if not data.endswith(b"\n"):
        write_atomic(file, data[: data.rfind(b"\n") + 1])
