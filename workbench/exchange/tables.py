"""Any CSV, JSONL or Parquet file with a column of question ids and one of right or wrong, as `Results`."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from workbench.exchange.columns import Line, Repeats, as_right, assembled, pick
from workbench.exchange.spreadsheets import unguarded
from workbench.results import Results

IDS = ("id", "question_id", "sample_id", "doc_id", "example_id", "uid", "qid", "idx", "index")
RIGHT = ("correct", "is_correct", "exact_match", "acc", "accuracy", "passed", "pass", "score")
OTHERS: dict[str, tuple[str, ...]] = {
    "question": ("question", "input"), "prompt": ("prompt",), "answer": ("answer", "target", "gold", "reference"),
    "output": ("output", "response", "completion", "generation", "prediction", "model_output"),
    "extracted": ("extracted", "parsed", "pred"), "tokens_in": ("tokens_in", "input_tokens", "prompt_tokens"),
    "tokens_out": ("tokens_out", "output_tokens", "completion_tokens"), "seconds": ("seconds", "time", "latency"),
    "task": ("task",), "unparsed": ("unparsed",), "steps": ("steps",), "forward_passes": ("forward_passes",),
}  # fmt: skip
NUMBERS = {"tokens_in": int, "tokens_out": int, "seconds": float, "forward_passes": int}


def read_table(
    path: str | Path,
    *,
    condition: str | None = None,
    id: str | None = None,
    correct: str | None = None,
    threshold: float | None = None,
    repeats: Repeats = "refuse",
) -> Results:
    """Results from a table with a row an answer.

    Args:
        condition: name for the results; None takes the column `condition` or `model`, else the file's name.
        id, correct: names of those columns, found by their usual names unless given.
        threshold: where `correct` holds scores between 0 and 1, the smallest that counts as right.
        repeats: what to do with questions that are answered several times, see `columns.assembled`.

    Raises ValueError for a file that can't be read, missing columns, and values that are neither right nor wrong.
    """
    path = Path(path)
    lines = rows_of(path)
    if not lines:
        raise ValueError(f"{path} holds no rows. Give a file with one row an answered question.")
    names = list(dict.fromkeys(name for line in lines for name in line))
    key, right = pick(names, IDS, id, "the id", str(path)), pick(names, RIGHT, correct, "right or wrong", str(path))
    named = next((name for name in ("condition", "model") if name in names), None) if condition is None else None
    taken = {
        goal: column for goal, wanted in OTHERS.items()
        if (column := next((name for name in names if name.lower() in wanted and name not in (key, right)), None))
    }  # fmt: skip
    found: list[Line] = []
    for number, line in enumerate(lines, start=1):
        where = f"{path}, row {number}"
        if line.get(key) in (None, ""):
            raise ValueError(f"{where}: the id column {key!r} is empty. Fill it, or name another column: id='NAME'.")
        who = condition or (str(line[named]) if named and line.get(named) else path.stem)
        row: Line = {"id": line[key], "condition": who, "correct": as_right(line.get(right), where, threshold)}
        row |= {goal: _value(goal, line.get(column), where) for goal, column in taken.items()}
        found.append(row)
    about = {"columns": {"id": key, "correct": right, **taken}}
    return assembled(found, repeats, str(path), path.stem, {}, about)


def _value(goal: str, value: Any, where: str) -> Any:
    if value is None or (value == "" and goal not in ("output", "prompt")):
        return None
    if goal in NUMBERS:
        try:
            return NUMBERS[goal](float(value))
        except (TypeError, ValueError):
            raise ValueError(f"{where}: {goal} should be a number; got {value!r}.") from None
    return as_right(value, where) if goal in ("unparsed", "steps") else str(value)


def rows_of(path: Path) -> list[Line]:
    """The rows of a .csv, .tsv, .jsonl or .parquet file, as dictionaries."""
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Give a .csv, .jsonl or .parquet file.")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows: list[Line] = pyarrow.parquet.read_table(path).to_pylist()
        return rows
    text = path.read_bytes().decode("utf-8-sig")  # read_text would change line ends inside of cells
    if path.suffix in (".csv", ".tsv"):
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if path.suffix == ".tsv" else ",")
        return [{unguarded(k): unguarded(v or "") for k, v in row.items() if k is not None} for row in reader]
    if path.suffix in (".jsonl", ".ndjson"):
        return [_record(line, f"{path}, line {n}") for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    raise ValueError(f"{path}: the ending {path.suffix!r} is not known. Use .csv, .tsv, .jsonl or .parquet.")


def _record(line: str, where: str) -> Line:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error}). Each line holds one object.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: a JSON {type(found).__name__}, not an object with the fields of one answer.")
    return found
