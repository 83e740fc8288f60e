"""A person as the last check of training records: keep, reject or edit each one, in a file that is added to at once.

A folder holds one JSONL file a reviewer: a first line that names the reviewer, then a line a decision, never changed
afterwards, so a kernel that dies loses nothing. A record is known by a hash of its messages, so decisions stay with it
when other records are added or left out; equal records are one. Not covered: how it looks, see `widgets.reviewing`.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, overload
from urllib.parse import quote

from workbench.files import content_key, write_atomic
from workbench.synthesis.records import Data, Record, check_record, load_data

if TYPE_CHECKING:
    import pandas as pd

    from workbench.judging import Agreement

DECISIONS = ("keep", "reject", "edit")
CHOICES = (*DECISIONS, "skip")
FIELDS = ("reviewer", "when", "record", "id", "decision", "why", "text")
OF_THE_ANSWER = ("token_weights", "tokens_out", "verdict")  # what was counted in or said of the answer before its edit


@dataclass(frozen=True)
class Review:
    """What one reviewer is shown, in order, and the file that the decisions go to. Made by `open_review`."""

    reviewer: str
    file: Path
    records: tuple[Record, ...]

    @property
    def decided(self) -> dict[str, dict[str, Any]]:
        """Standing decisions on these records, by their hash, in the order of deciding."""
        own = {record_key(record) for record in self.records}
        return {key: event for key, event in _standing(read_file(self.file)).items() if key in own}

    @property
    def current(self) -> Record | None:
        """The next record; None when all are decided."""
        done = self.decided
        return next((record for record in self.records if record_key(record) not in done), None)

    def counts(self) -> dict[str, int]:
        """How often each choice stands."""
        choices = [event["decision"] for event in self.decided.values()]
        return {choice: choices.count(choice) for choice in CHOICES}

    def decide(self, decision: str, *, why: str = "", text: str | None = None) -> None:
        """Append a decision on the current record; `text` is the new answer of an 'edit'.

        Raises ValueError for an unknown decision, when nothing is left, and for an edit that is empty or changes
        nothing.
        """
        if decision not in CHOICES:
            raise ValueError(f"decision={decision!r} is not known. Use one of: {', '.join(CHOICES)}.")
        record = self.current
        if record is None:
            raise ValueError(f"{self.reviewer} has decided on all {len(self.records)} records. Take one back: undo().")
        if (decision == "edit") != (text is not None):
            raise ValueError(f"decision={decision!r} and text={text!r:.60}: an edit, and only an edit, has a text.")
        if text is not None and (not text.strip() or text == answer_of(record)):
            state = "is empty" if not text.strip() else "changes nothing"
            raise ValueError(f"The edited text {state}. To leave the answer as it is keep it, to drop it reject it.")
        if text is not None and not text.startswith(given := str(record.get("given", ""))):
            raise ValueError(f"This record's answer must begin with its control text {given!r}; found {text[:60]!r}.")
        event = {"record": record_key(record), "id": str(record.get("id", "")), "decision": decision, "why": why}
        self._append(event if text is None else {**event, "text": text})

    def undo(self) -> bool:
        """Take this reviewer's last standing decision back; False when there is none."""
        decided = self.decided
        if decided:
            last = decided[list(decided)[-1]]
            self._append({"record": last["record"], "id": last["id"], "decision": "undo", "why": ""})
        return bool(decided)

    def _append(self, event: dict[str, Any]) -> None:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps({"reviewer": self.reviewer, "when": when, **event}, ensure_ascii=False) + "\n"
        with self.file.open("ab") as handle:  # one write of one line
            handle.write(line.encode())
            handle.flush()
            os.fsync(handle.fileno())


def record_key(record: Record) -> str:
    """What a record is known by: 16 hex digits of its messages' hash.

    >>> record_key({"messages": [{"role": "user", "content": "1+1?"}]}) == record_key({"messages": [], "id": "a"})
    False
    """
    return content_key(messages=record["messages"])[:16]


def answer_of(record: Record) -> str:
    """The answer that is learnt from a record: its last message."""
    return str(record["messages"][-1]["content"])


def open_review(
    records: Data | str | Path | list[Record], *, out: str | Path, reviewer: str, seed: int = 0, n: int | None = None
) -> Review:
    """Start or go on with a reviewer's decisions in the folder `out`; records that are not kept are not shown.

    n: how many records, drawn by `seed` (the same ones for every reviewer); all in their own order unless given.
    Raises ValueError for an empty name, for `n` below 1, and `RecordError` where there is nothing to review.
    """
    from workbench.finetuning.recipe import kept_records

    if not reviewer.strip():
        raise ValueError("reviewer is empty. Give your name: it tells your decisions from others' in the same folder.")
    if n is not None and n < 1:
        raise ValueError(f"n={n} is too small: give 1 or more, or leave it out for all records.")
    folder = Path(out)
    if folder.is_file():
        raise ValueError(f"out={str(folder)!r} is a file. Give a folder: each reviewer gets a file of their own in it.")
    kept, _ = kept_records(records)
    different = list({record_key(record): record for record in kept}.values())
    if n is not None and n < len(different):
        chosen = sorted(Random(f"review/{seed}").sample(range(len(different)), n))
        different = [different[place] for place in chosen]
    file = folder / f"{quote(reviewer, safe=' ')}.jsonl"
    if file.exists():
        read_file(file)
        _mend(file)
    else:
        write_atomic(
            file, json.dumps({"settings": {"kind": "reviews", "reviewer": reviewer}}, ensure_ascii=False) + "\n"
        )
    return Review(reviewer, file, tuple(different))


def read_reviews(out: str | Path, reviewers: Sequence[str] | None = None) -> "pd.DataFrame":
    """Standing decisions of a folder: reviewer, when (ISO 8601, UTC), record (hash), id, decision, why, text.

    reviewers: whose; everybody's unless given. A last line that a kill tore is left out with a word on standard
    error; any other line with wrong fields raises ValueError with file and line. So does a folder without decisions.
    """
    import pandas as pd

    files = sorted(Path(out).glob("*.jsonl")) if Path(out).is_dir() else []
    if not files:
        raise ValueError(f"{out} holds no reviews. Review first: wb.review(records, out={str(out)!r}, reviewer=NAME).")
    rows = [event for file in files for event in _standing(read_file(file)).values()]
    there = list(dict.fromkeys(row["reviewer"] for row in rows))
    if missing := [name for name in reviewers or () if name not in there]:
        raise ValueError(f"{out} holds no decision of {', '.join(missing)}; there are: {', '.join(there) or 'none'}.")
    chosen = [{"text": None, **row} for row in rows if reviewers is None or row["reviewer"] in reviewers]
    return pd.DataFrame(chosen, columns=list(FIELDS), dtype=object)


@overload
def reviewed(records: list[Record], out: str | Path, *, reviewers: Sequence[str] | None = ...,
             only_reviewed: bool = ...) -> list[Record]: ...  # fmt: skip
@overload
def reviewed(records: Data | str | Path, out: str | Path, *, reviewers: Sequence[str] | None = ...,
             only_reviewed: bool = ...) -> Data: ...  # fmt: skip
def reviewed(
    records: Data | str | Path | list[Record], out: str | Path, *, reviewers: Sequence[str] | None = None,
    only_reviewed: bool = False,
) -> Data | list[Record]:  # fmt: skip
    """The records with what `review` decided, in the form given (a path becomes `Data`): ready for `wb.finetune`.

    A record that any reviewer rejected is out; else the latest edit, if any, stands in place of its answer, with
    `edited` (by, when, why, and the hash of the record it was) and without the old answer's verdict and token counts.
    What nobody decided on or what was skipped stays, unless `only_reviewed`. reviewers: whose decisions count
    (everybody's unless given).

    Raises ValueError where no decision is about these records.
    """
    data = None if isinstance(records, list) else records if isinstance(records, Data) else load_data(records)
    given = records if isinstance(records, list) else data.records if data else []
    table = read_reviews(out, reviewers)
    events: dict[str, list[dict[str, Any]]] = {}
    for row in table.sort_values("when", kind="stable").to_dict("records"):
        events.setdefault(str(row["record"]), []).append({str(name): value for name, value in row.items()})
    keys = [record_key(check_record(record, f"record {number}")) for number, record in enumerate(given, start=1)]
    if not events.keys() & set(keys):
        raise ValueError(
            f"None of the {len(events)} decisions in {out} is about these {len(given)} records. Give the records that "
            "were reviewed, as they were."
        )
    found = [_applied(record, events.get(key, ()), only_reviewed) for record, key in zip(given, keys, strict=True)]
    left = [record for record in found if record is not None]
    return left if data is None else replace(data, records=left)


def review_agreement(out: str | Path, *, resamples: int = 1000, seed: int = 0) -> "Agreement":
    """How far the reviewers of a folder agree on keep, reject and edit; skipped records are missing. See `agreement`.

    Raises ValueError for fewer than two reviewers.
    """
    from workbench.judging import agreement

    said: dict[str, dict[str, str | None]] = {}
    for row in read_reviews(out).to_dict("records"):
        said.setdefault(str(row["reviewer"]), {})[str(row["record"])] = (
            None if row["decision"] == "skip" else str(row["decision"])
        )
    return agreement(said, resamples=resamples, seed=seed, labels=DECISIONS)


def read_file(file: Path) -> list[dict[str, Any]]:
    """All lines of a reviewer's file but the first, checked; a torn last one is left out and told."""
    whole, newline, torn = file.read_bytes().rpartition(b"\n")
    if torn:
        print(f"{file}: its last line was only half written and is left out; decide on that record again.",
              file=sys.stderr)  # fmt: skip
    lines = whole.decode("utf-8", errors="replace").split("\n") if newline else []
    name = _settings(file, lines[0] if lines else "")
    return [_event(line, f"{file}, line {number}", name) for number, line in enumerate(lines[1:], start=2)]


def _settings(file: Path, line: str) -> str:
    try:
        settings = json.loads(line)["settings"]
        if settings["kind"] == "reviews" and isinstance(settings["reviewer"], str):
            return settings["reviewer"]
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f'{file}, line 1: a file of reviews begins with {{"settings": {{"kind": "reviews", "reviewer": NAME}}}}; '
        f"found {line[:80]!r}. Choose another out= folder."
    )


def _event(line: str, where: str, reviewer: str) -> dict[str, Any]:
    """One decision; raises ValueError with file and line for fields that no panel writes."""
    try:
        event = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error}); it starts {line[:60]!r}. Mend or delete the line.") from None
    wrong = _wrong(event, reviewer) if isinstance(event, dict) else f"a {type(event).__name__}, not an object"
    if wrong:
        raise ValueError(f"{where}: {wrong}. Mend or delete the line; its fields are {', '.join(FIELDS)}.")
    return dict(event)


def _wrong(event: dict[str, Any], reviewer: str) -> str:
    """What is wrong with a decision's fields, or nothing."""
    needed = [*FIELDS[:-1], *(["text"] if event.get("decision") == "edit" else [])]
    if missing := [name for name in needed if not isinstance(event.get(name), str)]:
        return f"no text in {', '.join(missing)}"
    if more := sorted(event.keys() - set(needed)):
        return f"unknown field {', '.join(more)}"
    if event["decision"] not in (*CHOICES, "undo"):
        return f"decision {event['decision']!r} is none of {', '.join((*CHOICES, 'undo'))}"
    if event["reviewer"] != reviewer:
        return f"reviewer {event['reviewer']!r} in the file of {reviewer!r}"
    if event["decision"] == "edit" and not event["text"].strip():
        return "the edited text is empty"
    try:
        datetime.fromisoformat(event["when"])
    except ValueError:
        return f"when={event['when']!r} is no ISO 8601 time"
    return ""


def _standing(events: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Decisions that were not taken back, by record, in the order of deciding."""
    kept: dict[str, dict[str, Any]] = {}
    for event in events:
        kept.pop(event["record"], None)
        if event["decision"] != "undo":
            kept[event["record"]] = event
    return kept


def _applied(record: Record, events: Sequence[dict[str, Any]], only_reviewed: bool) -> Record | None:
    """The record after all decisions on it; None where it is out."""
    decisions = [event["decision"] for event in events]
    if "reject" in decisions or (only_reviewed and not set(decisions) & {"keep", "edit"}):
        return None
    edits = [event for event in events if event["decision"] == "edit"]
    if not edits:
        return record
    last = edits[-1]
    kept = {name: value for name, value in record.items() if name not in OF_THE_ANSWER}
    messages = [*record["messages"][:-1], {**record["messages"][-1], "content": last["text"]}]
    about = {"by": last["reviewer"], "when": last["when"], "why": last["why"], "record": last["record"]}
    return {**kept, "messages": messages, "edited": about}


def _mend(file: Path) -> None:
    """Cut a torn last line off, so that the next decision begins a line of its own."""
    data = file.read_bytes()
    if not data.endswith(b"\n"):
        write_atomic(file, data[: data.rfind(b"\n") + 1])
