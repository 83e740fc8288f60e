"""Plain files as rows of a question and its gold answer, because real tasks come as other people's files.

Reads JSON, JSONL, CSV and Parquet (`.gz` too), finds the columns by name, finds the kind of answer, checks every row,
and says file, line and columns when one is wrong. Does not cover: which file belongs to which benchmark
(`workbench.tasks.benchmarks`), judging answers (`workbench.tasks.verifiers`).
"""

import csv
import gzip
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from workbench.aside import Aside, lines_of, too_long
from workbench.tasks.answers import KINDS, normalise, numbers
from workbench.tasks.credit import gold_items, words_of

QUESTIONS = ("question", "problem", "input", "prompt", "query", "instruction")
ANSWERS = (
    "answer", "target", "correct", "label", "expected", "gold", "ground_truth", "canonical_solution", "output",
    "solution", "response",
)  # fmt: skip
_IDS = ("id", "task_id", "unique_id")


def same_text(question: str) -> str:
    """A question as told apart from others: case and spacing don't count."""
    return " ".join(question.casefold().split())


def read_records(path: Path, aside: Aside | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line (or record) number and record for each record of a JSON, JSONL, CSV or Parquet file, `.gz` included.

    Lines that can't be read go to `aside`; without one they raise.

    Raises:
        ValueError: no such file, an unknown ending, or a line that can't be read, by file and line.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path}. Give path= a JSON, JSONL, CSV or Parquet file.")
    ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if ending == ".parquet":
        import pandas

        yield from enumerate(pandas.read_parquet(path).to_dict("records"), start=1)
        return
    if ending not in {".json", ".jsonl", ".csv"}:
        raise ValueError(
            f"{path}: can't read files that end in {ending!r}. Endings: .json .jsonl .csv .parquet (also .gz)."
        )
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: not readable ({error}).") from error
    own = aside or Aside(share=0)
    lines = list(lines_of(path, data, own))
    if ending == ".csv":
        reader = csv.DictReader(f"{line}\n" for _, line in lines)
        for record in reader:
            yield reader.line_num, {str(key): value for key, value in record.items()}
        return
    yield from _json_records(path, lines, own)
    if aside is None:
        own.check(good=0)


def _json_records(path: Path, lines: list[tuple[int, str]], aside: Aside) -> Iterator[tuple[int, dict[str, Any]]]:
    """A JSON array, an object that holds one, or an object a line: the content decides, not the file's ending."""
    try:
        whole = json.loads("\n".join(line for _, line in lines))
    except json.JSONDecodeError:
        whole = None
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        whole = lists[0] if len(lists) == 1 else [whole]
    for at, record in enumerate(whole, start=1) if isinstance(whole, list) else lines:
        try:
            record = json.loads(record) if isinstance(record, str) and whole is None else record
        except json.JSONDecodeError as error:
            reason = f"{path}, line {at}: not JSON ({error.msg} at column {error.colno}): {str(record)[:80]!r}"
            aside.put(str(path), at, reason, record)
            continue
        if not isinstance(record, dict):
            reason = f"{path}, line {at}: expected an object with named fields, found {type(record).__name__}."
            aside.put(str(path), at, reason, record)
            continue
        yield at, record


def _column(record: Mapping[str, Any], asked: str | None, usual: tuple[str, ...], role: str, where: str) -> str:
    names = {str(name).lower(): str(name) for name in record}
    for name in (asked.lower(),) if asked else usual:
        if name in names:
            return names[name]
    wanted = f"column {asked!r}" if asked else f"any of the usual {role} columns ({', '.join(usual)})"
    seen = ", ".join(map(str, record))
    raise ValueError(f"{where}: no {wanted}. Columns seen: {seen}. Say which: load_task(..., {role}='COLUMN').")


def rows_of(
    records: Iterator[tuple[int, dict[str, Any]]],
    where: str,
    question: str | None = None,
    answer: str | None = None,
    aside: Aside | None = None,
) -> list[dict[str, Any]]:
    """Records as rows with `id`, `question`, `answer`, `where`, and every other column; columns are found by name.

    Rows without a question or an answer, and endless ones, go to `aside`; without one they raise.
    """
    own = aside or Aside(share=0)
    rows = []
    for at, record in records:
        if too_long(where, at, record, own):
            continue
        try:
            rows.append(_row(at, record, where, question, answer))
        except ValueError as error:
            own.put(where, at, str(error), record)
    if aside is None:
        own.check(len(rows))
    if not rows and not own.rows:
        raise ValueError(f"{where}: no rows in it. Each row needs a question and an answer.")
    if len({row["id"] for row in rows}) < len(rows):
        rows = [row | {"id": f"{row['id']}-{place}"} for place, row in enumerate(rows)]
    return rows


def _row(at: int, record: dict[str, Any], where: str, question: str | None, answer: str | None) -> dict[str, Any]:
    place = f"{where}, line {at}"
    asks = _column(record, question, QUESTIONS, "question", place)
    tells = _column(record, answer, ANSWERS, "answer", place)
    asked, told = record[asks], record[tells]
    if not isinstance(asked, str) or not asked.strip():
        raise ValueError(f"{place}: the question in column {asks!r} is empty or no text: {asked!r}.")
    if told is None or told != told or not str(told).strip():
        raise ValueError(f"{place}: the answer in column {tells!r} is empty: {told!r}.")
    fields = {str(key).lower(): value for key, value in record.items() if key not in (asks, tells)}
    own = next((str(fields.pop(name)) for name in _IDS if fields.get(name) not in (None, "")), None)
    told = told.tolist() if hasattr(told, "tolist") else told
    row = {"id": own or f"{Path(where).name.split('.')[0]}-{at:05d}", "question": asked.strip(), "answer": told}
    return _joined(row | {key: value for key, value in fields.items() if key not in row} | {"where": place})


def _joined(row: dict[str, Any]) -> dict[str, Any]:
    """Peculiar files: SVAMP's `Body`, AQuA's `options`, GSM8K's `#### answer`, HumanEval's bare function head."""
    if isinstance(body := row.get("body"), str) and body.strip():
        row["question"] = f"{body.strip().removesuffix('.')}. {row['question']}"
    options = row.get("options")
    if options is not None and not isinstance(options, str):
        listed = [re.sub(r"^\W*([A-Z])\s*[).:]\s*", r"(\1) ", str(option).strip()) for option in options]
        if not all(re.match(r"\([A-Z]\) ", option) for option in listed):
            listed = [f"({chr(65 + place)}) {option}" for place, option in enumerate(map(str, options))]
        row["options"] = listed
        row["option_texts"] = [option[4:].strip() for option in listed]
        row["question"] = "\n".join([row["question"], "Options:", *listed])
    if isinstance(row["answer"], str) and "\n#### " in row["answer"]:
        row["solution"], row["answer"] = row["answer"], row["answer"].rpartition("#### ")[2].strip()
    if "entry_point" in row:
        row["prompt"] = row["question"]
        row["question"] = (
            f"Complete this Python function. Answer with the whole function.\n```python\n{row['question']}\n```"
        )
    return row


def kind_of(rows: list[dict[str, Any]]) -> str:
    """The answer kind that gold answers show: option letters, numbers, lists of numbers, else text."""
    golds = [row["answer"] for row in rows]
    if sum(bool(re.fullmatch(r"\([A-Z]\)", str(gold))) for gold in golds) > 0.9 * len(golds):
        return "option"  # BIG-Bench Hard has three mislabelled rows among these; `checked` drops them
    if all("options" in row and re.fullmatch(r"[A-Z]", str(gold)) for row, gold in zip(rows, golds, strict=True)):
        return "option"
    if all(not isinstance(gold, list) and _is_number(str(gold)) for gold in golds):
        return "number"
    pieces = [gold if isinstance(gold, list) else str(gold).strip("[] ").split(",") for gold in golds]
    return "list" if all(_is_number(str(item).strip(" '\"")) for piece in pieces for item in piece) else "text"


def _is_number(text: str) -> bool:
    return len(numbers(text)) == 1 and not re.search(r"[A-Za-z]{2,}", text)


def checked(rows: list[dict[str, Any]], kind: str, aside: Aside | None = None) -> list[dict[str, Any]]:
    """Rows whose gold answers fit `kind`, without repeated questions; others go to `aside`, or raise without one.

    Raises:
        ValueError: a kind that doesn't exist, or a gold answer that isn't of it, by file and line.
    """
    if kind not in KINDS:
        raise ValueError(f"There is no answer kind {kind!r}. Kinds: {', '.join(KINDS)}.")
    kept: dict[str, dict[str, Any]] = {}
    for row in rows:
        gold = str(row["answer"])
        reason = _misfit(row, gold, kind)
        if reason and kind == "option" and re.search(r"^\([A-Z]\)", row["question"], flags=re.MULTILINE):
            continue  # BIG-Bench Hard: a gold answer with a comma was cut into several options, so none is right
        if reason:
            if aside is None:
                raise ValueError(reason)
            file, _, line = row["where"].rpartition(", line ")
            aside.put(file, int(line), reason, row["question"])
            continue
        if kind == "number" and not isinstance(row["answer"], str):
            row["answer"] = numbers(gold)[0]  # SVAMP's 51.0 is "51"
        fields = {key: value for key, value in row.items() if key != "where"}
        kept.setdefault(same_text(row["question"]), fields | _worked(fields, kind))
    return list(kept.values())


def _misfit(row: dict[str, Any], gold: str, kind: str) -> str:
    """Why the gold answer is not of this kind, or nothing."""
    if kind == "option" and not re.fullmatch(r"\(?[A-Z]\)?", gold):
        return f"{row['where']}: kind 'option' needs a letter as gold answer, not {gold!r}."
    if kind == "number" and len(numbers(gold)) != 1:
        return f"{row['where']}: kind 'number' needs one number as gold answer, not {gold!r}."
    if kind == "ordering" and not 2 <= len(set(gold_items(row["answer"]))) == len(gold_items(row["answer"])):
        return f"{row['where']}: kind 'ordering' needs two or more different items in order, not {gold!r}."
    if kind == "span" and not any(words_of(str(each)) for each in _each(row["answer"])):
        return f"{row['where']}: the gold span {gold!r} has no words to compare."
    if kind == "text" and not normalise(gold):
        return f"{row['where']}: the gold answer {gold!r} has nothing to compare."
    return ""


def _each(gold: Any) -> list[Any]:
    return list(gold) if isinstance(gold, list | tuple) else [gold]


def _worked(row: dict[str, Any], kind: str) -> dict[str, Any]:
    """`solutions` by style, for worked examples in prompts: the bare answer, and the steps where the file has them."""
    if kind == "code" or isinstance(row.get("solutions"), dict):
        return {}
    gold = f"${row['answer']}$" if kind == "latex" else str(row["answer"])
    if kind in ("ordering", "span") and (told := _each(row["answer"])):
        gold = ", ".join(map(str, told)) if kind == "ordering" else str(told[0])
    solutions = {"direct": f"The answer is {gold}."}
    steps = row.get("rationale") or row.get("solution")
    if isinstance(steps, str) and steps.strip():
        steps = re.sub(r"<<[^<>\n]*>>", "", steps).partition("\n#### ")[0].strip()
        solutions["steps"] = f"{steps}\nThe answer is {gold}."
    return {"solutions": solutions}
