"""inspect_ai's evaluation logs, written and read: version 2 of the JSON format, checked against inspect_ai 0.3.285.

One log a condition, because a log holds one model and plan. Written without inspect_ai, so that exporting needs nothing
installed; `.json` logs are read without it too, the packed `.eval` ones through it. Not covered: tools, stores, events
other than the model's one call.
Format: https://inspect.aisi.org.uk/eval-logs.html and the classes of `inspect_ai.log`.
"""

import importlib
import importlib.util
import json
import math
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.exchange.columns import Line, Repeats, as_right, assembled, pick
from workbench.files import content_key, write_atomic
from workbench.results import Results

SCORER = "verifier"
NAMED = (
    "id", "condition", "prompt", "output", "answer", "extracted", "correct", "tokens_in", "tokens_out", "seconds",
    "task", "epoch",
)  # fmt: skip


MEANT = (
    *NAMED, "steps", "unparsed", "hung", "score", "calls", "forward_passes", "flops", "cluster", "samples",
    "solve_rate",
)  # fmt: skip


def to_inspect(results: Results, folder: str | Path, *, created: datetime | None = None) -> list[Path]:
    """Write one log a condition into `folder` and return their paths; `inspect view --log-dir FOLDER` shows them.

    Each holds the samples with prompt, answer, score, tokens and seconds, accuracy with its standard error (over
    questions, repeated ones averaged first), and the condition's cost. created: time of the end, default now (UTC); the
    same time gives the same bytes. Columns that the format has no place for go to each sample's metadata.
    """
    ended = (created or datetime.now(UTC)).astimezone(UTC)
    paths = []
    for condition in results.conditions:
        rows = results.rows[results.rows.condition == condition]
        log = _log(results, condition, rows, ended)
        stamp = ended.strftime("%Y-%m-%dT%H-%M-%S+00-00")
        words = [re.sub(r"[^A-Za-z0-9]+", "-", str(word)).strip("-") for word in (log["eval"]["task"], condition)]
        path = Path(folder) / f"{stamp}_{'-'.join(word for word in words if word)}_{log['eval']['task_id']}.json"
        write_atomic(path, json.dumps(log, indent=1, ensure_ascii=False, allow_nan=False))
        paths.append(path)
    return paths


def _log(results: Results, condition: str, rows: pd.DataFrame, ended: datetime) -> dict[str, Any]:
    about, cost = results.about, results.costs[condition]
    seconds = cost.get("seconds", math.nan)
    began = ended - timedelta(seconds=float(seconds) if math.isfinite(seconds) else 0.0)
    task = str(about.get("task") or rows.task.iloc[0])
    model = "workbench/" + str(about.get("model", "unknown")).rstrip("/").rsplit("/", 1)[-1]
    key = content_key(condition=condition, about=json.loads(json.dumps(about, default=str)), ended=str(ended))
    epochs = rows.groupby("id").cumcount() + 1
    samples = [
        _sample({str(name): value for name, value in row.items()}, int(epoch), model, began, _generation(about))
        for row, epoch in zip(rows.to_dict("records"), epochs, strict=True)
    ]
    usage = _usage(model, rows.tokens_in.sum(skipna=False), rows.tokens_out.sum(skipna=False))
    spec = {
        "eval_id": key[:22], "run_id": key[22:44], "created": ended.isoformat(timespec="seconds"), "task": task,
        "task_id": key[44:], "task_version": 0, "task_args": {"condition": condition}, "task_args_passed": {},
        "task_attribs": {}, "model": model, "model_args": {}, "model_generate_config": _generation(about),
        "dataset": {"name": task, "samples": int(rows.id.nunique()), "shuffled": False,
                    "sample_ids": list(dict.fromkeys(rows.id.astype(str)))},
        "config": {"epochs": int(epochs.max())}, "packages": {"workbench": _version()},
        "metadata": {"condition": condition, "cost": _plain(cost), "workbench": _plain(about)}, "tags": [condition],
    }  # fmt: skip
    return {
        "version": 2, "status": "success", "eval": spec,
        "plan": {"name": "plan", "steps": [{"solver": condition, "params": {}, "params_passed": {}}],
                 "config": _generation(about)},
        "results": _results(rows, len(samples)),
        "stats": {"started_at": began.isoformat(), "completed_at": ended.isoformat(), "model_usage": usage},
        "tags": [condition], "samples": samples,
    }  # fmt: skip


def _results(rows: pd.DataFrame, total: int) -> dict[str, Any]:
    each = rows.groupby("id", sort=False).correct.mean().to_numpy(float)
    spread = float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else 0.0
    metrics = {
        name: {"name": name, "value": value, "params": {}}
        for name, value in (("accuracy", float(each.mean())), ("stderr", spread))
    }
    score = {"name": SCORER, "scorer": SCORER, "params": {}, "metrics": metrics, "scored_samples": total,
             "unscored_samples": 0}  # fmt: skip
    return {"total_samples": total, "completed_samples": total, "scores": [score]}


def _sample(
    row: dict[str, Any], epoch: int, model: str, began: datetime, settings: dict[str, Any]
) -> dict[str, Any]:  # fmt: skip
    usage, seconds = _usage(model, row["tokens_in"], row["tokens_out"]), float(row["seconds"])
    extracted = row["extracted"] if isinstance(row["extracted"], str) else None
    key = content_key(id=str(row["id"]), epoch=epoch, condition=str(row["condition"]), text=row["output"])[:20]
    reply = {"id": f"{key}-a", "role": "assistant", "content": row["output"], "source": "generate", "model": model}
    known = {"time": seconds} if math.isfinite(seconds) else {}
    asked = {"id": f"{key}-u", "role": "user", "content": row["prompt"], "source": "input"}
    output = {"model": model, "completion": row["output"], **known, **({"usage": usage[model]} if usage else {}),
              "choices": [{"message": reply, "stop_reason": "unknown"}]}  # fmt: skip
    # the one event that its frames of messages and its view of a transcript are made from
    event = {"uuid": f"{key}-e", "event": "model", "timestamp": began.isoformat(), "working_start": 0.0, "model": model,
             "input": [asked], "tools": [], "tool_choice": "none", "config": settings, "output": output}  # fmt: skip
    score: dict[str, Any] = {"value": "C" if row["correct"] else "I", "answer": extracted}
    return {
        "id": str(row["id"]), "epoch": epoch, "input": row["prompt"], "target": str(row.get("answer", "")),
        "messages": [asked, reply], "output": output, "events": [event],
        "scores": {SCORER: score},
        "metadata": {name: _plain(value) for name, value in row.items() if name not in NAMED},
        "model_usage": usage, **({"total_time": seconds, "working_time": seconds} if known else {}),
        "uuid": key,
    }  # fmt: skip


def _usage(model: str, read: float, written: float) -> dict[str, dict[str, int]]:
    """Tokens by model; empty where they are unknown, because the format's numbers are whole."""
    if not (math.isfinite(read) and math.isfinite(written)):
        return {}
    return {model: {"input_tokens": int(read), "output_tokens": int(written), "total_tokens": int(read + written)}}


def _generation(about: dict[str, Any]) -> dict[str, Any]:
    limit = about.get("max_new_tokens")
    return {"max_tokens": limit} if isinstance(limit, int) else {}  # the temperature is the solver's, not in Results


def _version() -> str:
    return str(importlib.import_module("workbench").__version__)


def _plain(value: Any) -> Any:
    """JSON values only: numpy scalars as Python's, what is no number as null, other objects as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def read_inspect(
    path: str | Path,
    *,
    condition: str | None = None,
    score: str | None = None,
    threshold: float | None = None,
    repeats: Repeats = "refuse",
) -> Results:
    """Results from one log, `.json` or `.eval`.

    condition: name for the results; None takes an own log's condition, else the model's name. score: the scorer to
    go by; needed where there are several. threshold, repeats (epochs): as for `read_table`. Samples without that score
    (errors, limits) are an error, because leaving them out would flatter the model.
    """
    path = Path(path)
    log = _load(path)
    samples, spec = log.get("samples") or [], log["eval"]
    if not samples:
        raise ValueError(f"{path} holds no samples (status {log.get('status')!r}). Run inspect with log_samples on.")
    names = list(dict.fromkeys(name for sample in samples for name in sample.get("scores") or {}))
    if score is None and len(names) > 1:
        raise ValueError(f"{path} has {len(names)} scorers. Choose one: score={' or '.join(names)}.")
    scorer = pick(names, names, score, "right or wrong", str(path))
    told = spec.get("metadata") or {}
    who = condition or told.get("condition") or str(spec["model"])
    own = "workbench" in told
    lines = [_read_sample(sample, who, scorer, str(path), threshold, own) for sample in samples]
    cost = told.get("cost") or _seconds(log.get("stats") or {})
    cost = {name: math.nan if value is None else value for name, value in cost.items()}
    about = {"score": scorer, "model": spec["model"], **(told.get("workbench") or {})}
    return assembled(lines, repeats, str(path), str(spec["task"]), {who: cost}, about)


def _read_sample(sample: dict[str, Any], who: str, scorer: str, path: str, threshold: float | None, own: bool) -> Line:
    where = f"{path}, sample {sample['id']!r}"
    given = (sample.get("scores") or {}).get(scorer)
    if given is None:
        raise ValueError(f"{where} has no score of {scorer!r} (error: {sample.get('error')!r:.80}). Run it to the end.")
    usage = list((sample.get("model_usage") or {}).values())
    output, input_ = sample.get("output") or {}, sample["input"]
    choices = output.get("choices") or []
    text = output.get("completion") or (_text(choices[0]["message"]["content"]) if choices else "")
    prompt = input_ if isinstance(input_, str) else "\n\n".join(_text(turn["content"]) for turn in input_)
    target = sample.get("target", "")
    seconds = sample.get("working_time", sample.get("total_time"))
    metadata = sample.get("metadata") or {}
    if not own:  # another tool's "steps" or "score" is not the column of that name here
        metadata = {name: value for name, value in metadata.items() if name not in MEANT}
    line: Line = {
        **metadata, "id": str(sample["id"]), "condition": who, "prompt": prompt, "output": text,
        "answer": target if isinstance(target, str) else json.dumps(target), "extracted": given.get("answer"),
        "correct": as_right(given["value"], where, threshold), "seconds": seconds, "epoch": sample.get("epoch", 1),
    }  # fmt: skip
    if usage:
        line["tokens_in"] = sum(_read_tokens(each) for each in usage)
        line["tokens_out"] = sum(each.get("output_tokens", 0) for each in usage)
    return {key: value for key, value in line.items() if value is not None}


def _read_tokens(usage: dict[str, Any]) -> int:
    parts = ("input_tokens", "input_tokens_cache_read", "input_tokens_cache_write")
    return sum(usage.get(name) or 0 for name in parts)


def _text(content: Any) -> str:
    """A message's text: plain, or the text parts of a list."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))


def _seconds(stats: dict[str, Any]) -> dict[str, Any]:
    try:
        begin, end = (datetime.fromisoformat(stats[name]) for name in ("started_at", "completed_at"))
    except (KeyError, TypeError, ValueError):
        return {}
    return {"seconds": (end - begin).total_seconds()}


def _load(path: Path) -> dict[str, Any]:
    """A log as plain data, long texts put back where the format moved them to `attachments`."""
    if not path.is_file():
        raise ValueError(f"There is no log {path}. Give one .json or .eval file.")
    if importlib.util.find_spec("inspect_ai") is not None:
        log = importlib.import_module("inspect_ai.log").read_eval_log(str(path), resolve_attachments=True)
        found: dict[str, Any] = json.loads(log.model_dump_json(exclude_none=True))
        return found
    if path.suffix != ".json":
        raise ValueError(
            f"{path} is a packed log, which inspect_ai reads: pip install inspect-ai. Without it, convert the log "
            f"where it is installed: inspect log convert {path} --to json --output-dir FOLDER"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}). Give a log that inspect_ai or to_inspect wrote.") from None
    if not isinstance(found, dict) or not {"version", "eval"} <= found.keys():
        raise ValueError(f"{path} is no log of inspect_ai: version and eval are missing. For tables: read_table.")
    found["samples"] = [_attached(each, each.get("attachments") or {}) for each in found.get("samples") or []]
    return found


def _attached(value: Any, texts: dict[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: item if key == "attachments" else _attached(item, texts) for key, item in value.items()}
    if isinstance(value, list):
        return [_attached(item, texts) for item in value]
    if isinstance(value, str) and value.startswith("attachment://"):
        return texts.get(value.removeprefix("attachment://"), value)
    return value
