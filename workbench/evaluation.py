"""Conditions x task -> one row per question and condition; tables are made from rows, never the other way round.

A condition is a list of what differs from the plain model: interventions, adapters, at most one prompt `Strategy`.
All conditions answer the same questions, so that every difference is paired. Not covered: log-likelihood scoring,
judges, several samples a question. Statistics follow `workbench.statistics`.
"""

import json
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch

from workbench.files import content_key, sha256, write_atomic
from workbench.generate import Generation
from workbench.interventions import Adapter, Intervention, Logits
from workbench.models import LM
from workbench.prompts import Strategy
from workbench.results import Results, shows_steps
from workbench.runs.heartbeats import heartbeat
from workbench.sandbox import jail
from workbench.tasks import Task

Condition = Intervention | Strategy | Sequence[Intervention | Strategy]


def evaluate(
    lm: LM,
    task: Task,
    conditions: Mapping[str, Condition],
    *,
    n: int | None = 200,
    seed: int = 0,
    split: str = "test",
    batch_size: int | None = None,
    max_new_tokens: int = 256,
    out: str | Path | None = None,
) -> Results:
    """Answer the same n questions under every condition, greedily, and verify each answer.

    Args:
        conditions: name -> what differs from the plain model ([] for nothing).
        n: questions; None takes the task's default.
        seed: which sample of the split.
        out: folder for the rows; a condition that is there already, with the same content key, is not run again.

    Raises:
        ValueError: no conditions, or one that holds something else than interventions and one strategy. ModelError:
            an intervention that doesn't fit the model. Both before anything is generated.
    """
    planned = {name: _plan(name, condition) for name, condition in conditions.items()}
    if not planned:
        raise ValueError('No conditions to evaluate. Give at least one, for example {"plain": []}.')
    for change, _ in planned.values():
        if change is not None:
            change.check(lm)
    if task.kind == "code":
        jail.required()  # before hours of generation, not after
    rows = task.rows(split, n=n, seed=seed)
    folder = Path(out) if out is not None else None
    parts, costs = [], {}
    for place, (name, plan) in enumerate(planned.items()):
        tell = _teller(name, place * len(rows), len(rows) * len(planned))
        answered = _answer(lm, task, rows, name, plan, max_new_tokens, batch_size, folder, tell)
        parts.append(
            pd.DataFrame(answered["rows"]).astype({"extracted": object}).assign(condition=name, task=task.name)
        )
        costs[name] = answered["cost"]
    about = {"task": task.name, "parameters": task.parameters, "split": split, "seed": seed, "n": len(rows)}
    about |= {"model": lm.name, "revision": lm.revision, "reasons": lm.reasons, "max_new_tokens": max_new_tokens}
    results = Results(pd.concat(parts, ignore_index=True), costs, about)
    if folder is not None:
        results.save(folder)
    return results


def _answer(
    lm: LM,
    task: Task,
    rows: list[dict[str, Any]],
    name: str,
    plan: tuple[Intervention | None, Strategy | None],
    limit: int,
    batch_size: int | None,
    folder: Path | None,
    tell: Callable[[int, int], None],
) -> dict[str, Any]:
    """Rows and cost of one condition: from its file if all that it depends on is the same, else run and filed."""
    change, strategy = plan
    prompts = [lm.render(task.messages(row, strategy)) for row in rows]
    asked = {"model": lm.revision, "quantization": lm.reasons.get("quantization", ""), "dtype": str(lm.model.dtype)}
    key = content_key(prompts=prompts, change=fingerprint(change), limit=limit, batch=batch_size, **asked)
    answered = _stored(folder, name, key)
    if answered is None:
        answered = _run(lm, task, rows, prompts, change, limit, batch_size, tell)
        _store(folder, name, key, answered)
    return answered


def _plan(name: str, condition: Condition) -> tuple[Intervention | None, Strategy | None]:
    """What a condition changes in the model (their sum), and how it prompts."""
    items = [condition] if isinstance(condition, Intervention | Strategy) else list(condition)
    wrong = [item for item in items if not isinstance(item, Intervention | Strategy)]
    if wrong:
        raise ValueError(
            f"Condition {name!r} holds a {type(wrong[0]).__name__}. It may hold interventions (residual, kv, adapter) "
            "and one Strategy; a vector becomes an intervention by v.at(layers=[3], positions='generated')."
        )
    strategies = [item for item in items if isinstance(item, Strategy)]
    if len(strategies) > 1:
        raise ValueError(f"Condition {name!r} holds {len(strategies)} prompt strategies: {strategies}. Keep one.")
    changes = [item for item in items if isinstance(item, Intervention)]
    return sum(changes[1:], changes[0]) if changes else None, strategies[0] if strategies else None


def fingerprint(change: Intervention | None) -> str:
    """A hash of what an intervention does: its numbers, and for adapters the weights that their path leads to."""
    if change is None:
        return "none"
    hashes = []
    for part in change.parts:
        if isinstance(part, Adapter):
            hashes.append(f"{part.strength}/{sha256(part.path / 'adapter_model.safetensors')}")
        else:
            with tempfile.TemporaryDirectory() as folder:
                bare = replace(part)  # type: ignore[type-var]  # leaves the record of a calibration behind
                hashes.append(sha256(bare.save(Path(folder) / "part.safetensors")))
    return "+".join(hashes)


def _run(
    lm: LM,
    task: Task,
    rows: list[dict[str, Any]],
    prompts: list[str],
    change: Intervention | None,
    limit: int,
    batch_size: int | None,
    tell: Callable[[int, int], None],
) -> dict[str, Any]:
    calls = 0

    def count(module: Any, arguments: Any, output: Any) -> None:
        nonlocal calls
        calls += 1

    beside = [other for part in (change.parts if change else ()) if isinstance(part, Logits) for other in part.others]
    watched = {id(model.blocks[0]): model.blocks[0] for model in (lm, *beside)}
    handles = [block.register_forward_hook(count) for block in watched.values()]
    began = time.perf_counter()
    try:
        with peak_memory(lm.device) as peak:
            found = lm.generate(prompts, change, limit, batch_size=batch_size, progress=tell)
    finally:
        for handle in handles:
            handle.remove()
    seconds = time.perf_counter() - began
    verdicts = task.verify_many(rows, [generation.text for generation in found])
    lines = [_line(*each) for each in zip(rows, prompts, found, verdicts, strict=True)]
    return {"rows": lines, "cost": {"seconds": seconds, "peak_memory_mb": peak(), "model_calls": calls}}


def _line(row: dict[str, Any], prompt: str, found: Generation, verdict: Any) -> dict[str, Any]:
    return {
        "id": str(row["id"]),
        "prompt": prompt,
        "output": found.text,
        "answer": str(row["answer"]),
        "extracted": verdict.extracted,
        "correct": bool(verdict.correct),
        "unparsed": verdict.extracted is None,
        "steps": shows_steps(found.text),
        "tokens_in": found.tokens_in,
        "tokens_out": found.tokens_out,
        "seconds": found.seconds,
        "forward_passes": found.forward_passes,
    }


@contextmanager
def peak_memory(device: torch.device, every: float = 0.02) -> Iterator[Callable[[], float]]:
    """Megabytes at the peak while the block runs: of the GPU's allocator, or of this process (sampled) on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device) / 2**20
        return
    process, over = psutil.Process(), threading.Event()
    most = [process.memory_info().rss]

    def watch() -> None:
        while not over.wait(every):
            most[0] = max(most[0], process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: most[0] / 2**20
    finally:
        over.set()
        watcher.join()


def _teller(name: str, before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, rows: heartbeat(f"evaluate {name}", before + done, total)


def _file(folder: Path, name: str) -> Path:
    return (
        folder
        / "conditions"
        / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{content_key(name=name)[:6]}.json"
    )


def _stored(folder: Path | None, name: str, key: str) -> dict[str, Any] | None:
    if folder is None or not _file(folder, name).exists():
        return None
    try:
        stored = json.loads(_file(folder, name).read_text(encoding="utf-8"))
    except ValueError:
        return None  # cut off or damaged: run it again
    return stored["answered"] if stored.get("key") == key else None


def _store(folder: Path | None, name: str, key: str, answered: dict[str, Any]) -> None:
    if folder is not None:
        write_atomic(_file(folder, name), json.dumps({"key": key, "answered": answered}))
