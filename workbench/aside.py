"""Rows that can't be used, put aside with file, line and reason, until they are too many to be an accident.

A reader calls `put` where it would have raised, goes on with the next row, and calls `check` at the end: past the
allowed share nothing was read. What a bad row is, the readers say (`tasks.rows`, `synthesis.records`).
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from workbench.files import write_atomic

LONGEST_ROW = 200_000  # characters; the longest of GSM8K's has 1,500, and a million are a file in the wrong column


@dataclass(frozen=True)
class BadRow:
    """Where a row stands, why it can't be used, and how it begins."""

    file: str
    line: int
    reason: str
    text: str


@dataclass
class Aside:
    """Bad rows so far; `share` of all rows may be bad. `error` is raised past it."""

    share: float = 0.01
    error: type[ValueError] = ValueError
    rows: list[BadRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"max_bad={self.share} is no share: give a number from 0 to 1, such as 0.01.")

    def put(self, file: str, line: int, reason: str, text: object = "") -> None:
        """Remember one bad row; of a long one only the beginning."""
        self.rows.append(BadRow(file, line, reason, str(text)[:200]))

    def check(self, good: int) -> None:
        """Tell what was put aside; raise when it was too much of all, or when nothing good is left."""
        if not self.rows:
            return
        total, first = good + len(self.rows), self.rows[0]
        told = f"{len(self.rows)} of {total} rows can't be used. First: {first.reason}"
        if total == 1:
            raise self.error(first.reason)
        if good == 0 or len(self.rows) > self.share * total:
            raise self.error(
                f"{told} That is {len(self.rows) / total:.1%}; at most {self.share:.1%} may be put aside (max_bad). "
                "Mend the file, or read it with a larger max_bad."
            )
        print(f"{told} They are put aside.", file=sys.stderr)


def lines_of(path: Path, data: bytes, aside: Aside) -> Iterator[tuple[int, str]]:
    """Numbered lines that hold something; those that are no UTF-8 or endless are put aside."""
    for at, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        if len(raw) > 4 * LONGEST_ROW:
            aside.put(str(path), at, f"{path}, line {at}: {len(raw):,} bytes long, more than a row can be.", raw[:200])
            continue
        try:
            yield at, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            reason = f"{path}, line {at}: not UTF-8 text ({error.reason} at byte {error.start})."
            aside.put(str(path), at, reason, raw[:200].decode("utf-8", "replace"))


def too_long(path: str, at: int, row: object, aside: Aside) -> bool:
    """Whether a row holds more characters than one can be learnt from; it is put aside then."""
    size = sum(len(value) for value in row.values() if isinstance(value, str)) if isinstance(row, dict) else 0
    if size > LONGEST_ROW:
        aside.put(path, at, f"{path}, line {at}: {size:,} characters, more than the {LONGEST_ROW:,} of a row.", row)
    return size > LONGEST_ROW


def write_aside(folder: Path, rows: Iterable[BadRow]) -> None:
    """Write `bad_rows.jsonl`: file, line, reason and beginning of each row put aside. No rows, no file."""
    text = "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
    if text:
        write_atomic(folder / "bad_rows.jsonl", text)
    else:
        (folder / "bad_rows.jsonl").unlink(missing_ok=True)  # of an earlier start, before the file was mended
