"""Training records on disk: one JSON object a line (or a Parquet file) beside a card that says how they were made.

A record is a short chat that ends in the answer to learn, with its provenance. `load_data` checks every record and
names the file and line of the first wrong one. How records are made is in `synthesis`, how they are used in `finetune`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.aside import LONGEST_ROW, Aside, BadRow, lines_of
from workbench.files import sha256, write_atomic

Record = dict[str, Any]
NEGATIVE = "a wrong chain, as negative data"  # the reason in a record that is there to be learnt against


class RecordError(ValueError):
    """A record, or a file of records, that can't be used; the message names file and line."""


@dataclass(frozen=True)
class Data:
    """A folder of records: all `records`, `kept` those to train on, the `card`, and `bad` rows put aside on reading."""

    folder: Path
    records: list[Record]
    card: dict[str, Any]
    bad: tuple[BadRow, ...] = ()

    @property
    def kept(self) -> list[Record]:
        """Records that passed every check; a record without a `kept` field counts as kept."""
        return [record for record in self.records if record.get("kept", True)]

    @property
    def negatives(self) -> list[Record]:
        """Wrong chains that were asked for as negative data, marked and not kept."""
        return [record for record in self.records if record.get("reason") == NEGATIVE]

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)


def load_data(path: str | Path, max_bad: float = 0.01) -> Data:
    """Records from a folder that `synthesize` wrote, or from any JSONL or Parquet file with a `messages` field.

    At most `max_bad` of the records may be unusable (broken JSON, wrong fields, endless); those are put aside in
    `data.bad`, with file, line and reason. Raises `RecordError` when nothing is there, when more records are wrong, or
    when the file is not the one its card names.
    """
    path = Path(path)
    file = path if path.is_file() else _records_file(path)
    card_file = file.parent / "card.json"
    card = json.loads(card_file.read_text(encoding="utf-8")) if path.is_dir() and card_file.exists() else {}
    if card and sha256(file) != card["records"]["sha256"]:
        raise RecordError(
            f"{file} is not the file that {card_file} describes (its sha256 differs): it was edited or copied half. "
            f"Delete {file} and run synthesize(..., out={str(path)!r}) again, or pass the file itself to load_data."
        )
    aside = Aside(max_bad, RecordError)
    records = []
    for line, record in _parquet(file) if file.suffix == ".parquet" else _jsonl(file, aside):
        try:
            records.append(check_record(record, f"{file}, line {line}"))
        except RecordError as error:
            aside.put(str(file), line, str(error), record)
    aside.check(len(records))
    return Data(file.parent, records, card, tuple(aside.rows))


def check_record(record: Any, where: str) -> Record:
    """The record itself when a model can be trained on it; else a `RecordError` that starts with `where`."""
    example = '{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}'
    if not isinstance(record, dict):
        raise RecordError(f"{where}: a record is a JSON object, found {type(record).__name__}. Write it as {example}")
    if "messages" not in record:
        found = ", ".join(sorted(record)) or "nothing"
        raise RecordError(f'{where}: the field "messages" is missing; found: {found}. Write a record as {example}')
    messages = record["messages"]
    for number, message in enumerate(messages if isinstance(messages, list) else [messages], start=1):
        good = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not good or not isinstance(message.get("content"), str):
            raise RecordError(
                f'{where}: message {number} needs a "role" and a "content", both text; found {message!r:.120}. '
                f"Write a record as {example}"
            )
    roles = [message["role"] for message in messages]
    if len(roles) < 2 or roles[-1] != "assistant" or not messages[-1]["content"].strip():
        raise RecordError(
            f"{where}: the messages must end in an assistant message with text, after at least one other message; "
            f"found the roles {roles}. Write a record as {example}"
        )
    return record


def _records_file(folder: Path) -> Path:
    found = [folder / name for name in ("records.jsonl", "records.parquet") if (folder / name).exists()]
    if len(found) == 1:
        return found[0]
    names = "records.jsonl and records.parquet"
    state = f"holds both {names}" if found else f"holds none of {names}"
    there = ", ".join(sorted(item.name for item in folder.iterdir())) if folder.is_dir() else "no such folder"
    raise RecordError(
        f"{folder} {state} ({there or 'it is empty'}). Make records with synthesize(lm, task, out={str(folder)!r}) "
        "or give the path of one JSONL or Parquet file."
    )


def _jsonl(file: Path, aside: Aside) -> Iterator[tuple[int, Any]]:
    for number, line in lines_of(file, file.read_bytes(), aside):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            reason = f"{file}, line {number}: not JSON ({error}); it starts {line[:60]!r}."
            aside.put(str(file), number, reason, line)
            continue
        if len(line) <= LONGEST_ROW:
            yield number, record
        else:
            reason = f"{file}, line {number}: {len(line):,} characters, more than the {LONGEST_ROW:,} of a record."
            aside.put(str(file), number, reason, line)


def _parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow.parquet

    yield from enumerate(pyarrow.parquet.read_table(file).to_pylist(), start=1)


def claim_folder(out: Path, settings: dict[str, Any], made_by: str) -> None:
    """Mark `out` as belonging to one set of JSON settings; refuse a folder that was started with others, by name."""
    file = out / "settings.json"
    if not file.exists():
        write_atomic(file, json.dumps(settings, indent=2, ensure_ascii=False))
        return
    started = json.loads(file.read_text(encoding="utf-8"))
    names = sorted(name for name in started.keys() | settings.keys() if started.get(name) != settings.get(name))
    if names:
        pairs = [(name, started.get(name), settings.get(name)) for name in names]
        changes = "; ".join(f"{name}: {there!r:.80} there, {now!r:.80} now" for name, there, now in pairs)
        raise ValueError(
            f"{out} was started by {made_by} with other settings ({changes}). Choose another out= folder, go back to "
            f"the old settings to finish it, or delete the folder to start over."
        )
