"""Samples of EleutherAI's lm-evaluation-harness (`--log_samples`) as `Results`; written against version 0.4.13.

A file `samples_TASK_DATE.jsonl` holds a line a question and filter: doc_id, doc, target, arguments, resps,
filtered_resps, filter, and each metric by its name. `results_DATE.json` beside it names model and settings.
"""

import json
from pathlib import Path
from typing import Any

from workbench.exchange.columns import Line, Repeats, as_right, assembled, pick
from workbench.exchange.tables import rows_of
from workbench.results import Results

METRICS = ("exact_match", "acc", "em", "prompt_level_strict_acc", "pass@1", "acc_norm")
QUESTIONS = ("question", "input", "query", "problem", "text", "Problem", "sentence")


def read_lm_eval(
    path: str | Path,
    *,
    condition: str | None = None,
    score: str | None = None,
    filter: str | None = None,
    id: str = "doc_id",
    threshold: float | None = None,
    repeats: Repeats = "refuse",
) -> Results:
    """Results from one samples file, or from a folder that holds exactly one.

    Args:
        condition: name for the results; None takes the model's from the results file, else the file's name.
        score: the metric that says right or wrong; else the first of the usual ones, named in `about`.
        filter: which way of extracting answers, where the task has several (gsm8k: 'strict-match').
        id: 'doc_id', 'doc_hash', or a field of the document as 'doc.FIELD'.
        threshold, repeats: as for `read_table`.

    Raises ValueError for several files or filters (with their names), unknown metrics, and values between 0 and 1.
    """
    file = _file(Path(path))
    lines = rows_of(file)
    if not lines or not {"doc_id", "target", "filtered_resps"} <= lines[0].keys():
        raise ValueError(f"{file} holds no samples of lm-eval (doc_id, target, ...). Make them with: --log_samples")
    filters = list(dict.fromkeys(str(line.get("filter", "none")) for line in lines))
    if filter is None and len(filters) > 1:
        raise ValueError(f"{file} extracts answers in {len(filters)} ways. Choose one: filter={' or '.join(filters)}.")
    if filter is not None and filter not in filters:
        raise ValueError(f"{file} has no filter {filter!r}. It has: {', '.join(filters)}.")
    lines = [line for line in lines if str(line.get("filter", "none")) == (filter or filters[0])]
    names = list(lines[0].get("metrics") or [key for key in lines[0] if key not in _FIELDS])
    metric = pick(names, METRICS, score, "right or wrong", str(file))
    settings = _settings(file)
    who = condition or settings.get("model_name") or file.stem
    task = file.stem.removeprefix("samples_").rsplit("_", 1)[0]
    found = [_line(line, f"{file}, line {n}", who, metric, id, threshold) for n, line in enumerate(lines, start=1)]
    seconds = settings.get("total_evaluation_time_seconds")
    costs = {who: {"seconds": float(seconds)}} if seconds else {}
    about = {"score": metric, "filter": filter or filters[0], "lm_eval": settings}
    return assembled(found, repeats, str(file), task, costs, about)


_FIELDS = (
    "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics", "doc_hash", "prompt_hash",
    "target_hash",
)  # fmt: skip


def _line(line: Line, where: str, who: str, metric: str, id: str, threshold: float | None) -> Line:
    document: dict[str, Any] = line["doc"] if isinstance(line.get("doc"), dict) else {}
    field = id.removeprefix("doc.")
    holder = document if id.startswith("doc.") else line
    if field not in holder:
        raise ValueError(f"{where}: no {id!r}. Use id='doc_id', 'doc_hash' or one of: "
                         f"{', '.join(f'doc.{name}' for name in document) or 'no field of doc'}.")  # fmt: skip
    if metric not in line:
        raise ValueError(f"{where}: the metric {metric!r} is missing. Name another one: score='NAME'.")
    question = next((document[name] for name in QUESTIONS if isinstance(document.get(name), str)), None)
    choices = len(line["resps"]) > 1 if isinstance(line.get("resps"), list) else False
    return {
        "id": str(holder[field]), "condition": who, "correct": as_right(line[metric], where, threshold),
        "question": question, "prompt": _first(line.get("arguments")), "answer": str(line["target"]),
        "output": json.dumps(line["resps"], ensure_ascii=False) if choices else _first(line.get("resps")),
        "extracted": None if choices else _extracted(line["filtered_resps"]),
        "unparsed": _first(line["filtered_resps"]) == "[invalid]",
    }  # fmt: skip


def _first(value: Any) -> str:
    """The first text inside nested lists and the harness's numbered dictionaries."""
    while isinstance(value, list | dict):
        inner = list(value.values()) if isinstance(value, dict) else value
        if not inner:
            return ""
        value = inner[0]
    return "" if value is None else str(value)


def _extracted(value: Any) -> str | None:
    text = _first(value)
    return None if text in ("", "[invalid]") else text  # the harness's word for an answer that no filter found


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted(path.rglob("samples_*.jsonl"))
    if len(found) != 1:
        there = ", ".join(str(file) for file in found) or "none"
        raise ValueError(f"{path} should hold one samples_*.jsonl; found: {there}. Give the path of one file.")
    return found[0]


def _settings(file: Path) -> dict[str, Any]:
    """What the results file of the same date says of model and run; empty where there is none."""
    date = file.stem.rsplit("_", 1)[-1]
    # --output_path NAME.json writes NAME_DATE.json instead of results_DATE.json
    beside = [file.with_name(f"results_{date}.json"), *sorted(file.parent.glob(f"*_{date}.json"))]
    try:
        told = json.loads(next(path for path in beside if path.is_file()).read_text(encoding="utf-8"))
    except (StopIteration, OSError, ValueError):
        return {}
    wanted = ("model_name", "lm_eval_version", "total_evaluation_time_seconds", "date", "model_source", "config")
    return {name: told[name] for name in wanted if name in told}
