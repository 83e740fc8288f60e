"""Conditions x task -> one row per question and condition; tables are made from rows, never the other way round.

A condition is a list of what differs from the plain model: interventions, adapters, at most one prompt `Strategy`, at
most one `Solver` (how the question is answered; greedily, if none is given). All conditions answer the same questions,
so that every difference is paired. Statistics follow `workbench.statistics`, ways to answer are in `workbench.solvers`.
Not covered: judging by a model or a person (`workbench.judging`).
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from workbench import __version__
from workbench.evaluation.asking import Answer, Ask, Greedy, Solver, identity
from workbench.evaluation.conditions import Condition, Plan, around, fingerprint, planned
from workbench.evaluation.cost import Cost, peak_memory
from workbench.evaluation.judging import SECONDS, judge
from workbench.evaluation.storing import Answered, chunk_file, joined, kept, store
from workbench.files import content_key
from workbench.interventions import Intervention, Logits
from workbench.models import LM
from workbench.results import Results, shows_steps
from workbench.runs.heartbeats import heartbeat
from workbench.sandbox import jail
from workbench.tasks import Task

__all__ = ["Answer", "Ask", "Condition", "Greedy", "Solver", "evaluate", "fingerprint", "peak_memory"]

CHUNK = 64  # questions answered between two writes; a solver may say another number as `chunk`


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
    verify_seconds: float = SECONDS,
    out: str | Path | None = None,
) -> Results:
    """Answer the same n questions under every condition and verify each answer.

    Args:
        conditions: name -> what differs from the plain model, asked and answered greedily ([] for nothing); pairs of
            sentences (BLiMP) are answered by `solvers.Likelihood`.
        n: questions; None takes the task's default.
        seed: which sample of the split; also of the random streams of conditions that sample.
        batch_size: rows a batch; None fits them into memory. Scores in float32 on a CPU do not depend on it.
        verify_seconds: after which a verifier is stopped and the answer counts as unparsed and `hung`.
        out: folder for the rows, written while they are made: a killed evaluation goes on where it stopped, and what is
            there already, with the same content key, is not run again.

    Raises:
        ValueError: no conditions, or one that holds something else than interventions, one strategy and one solver.
            ModelError: an intervention that doesn't fit the model. Also what a strategy or a solver can't do with this
            task. All before anything is generated.
    """
    plans = planned(task, conditions)
    if task.kind == "code":
        jail.required()
    rows = task.rows(split, n=n, seed=seed)
    asks = [Ask(lm, task, rows, plan.strategy, plan.change, max_new_tokens, batch_size, seed) for plan in plans]
    for ask, plan in zip(asks, plans, strict=True):
        _check(ask, plan)
    folder = Path(out) if out is not None else None
    parts, costs = [], {}
    for place, (ask, plan) in enumerate(zip(asks, plans, strict=True)):
        tell = _teller(plan.name, place * len(rows), len(rows) * len(plans))
        answered = _answer(ask, plan, folder, verify_seconds, tell)
        parts.append(_frame(answered["rows"]).assign(condition=plan.name, task=task.name))
        costs[plan.name] = answered["cost"]
    about = {"task": task.name, "parameters": task.parameters, "split": split, "seed": seed, "n": len(rows)}
    about |= {"model": lm.name, "revision": lm.revision, "reasons": lm.reasons, "max_new_tokens": max_new_tokens}
    results = Results(pd.concat(parts, ignore_index=True), costs, about)
    if folder is not None:
        results.save(folder)
    return results


def _check(ask: Ask, plan: Plan) -> None:
    """Raise what would stop a condition, before hours of the conditions in front of it and not after."""
    identity(plan.solver)
    if plan.change is not None:
        plan.change.check(ask.lm)
    ask.prompt(0)  # a strategy whose examples the task has no solutions for
    check = getattr(plan.solver, "check", None)
    if check is not None:
        check(ask)


def _frame(lines: list[dict[str, Any]]) -> pd.DataFrame:
    extracted = pd.Series([line["extracted"] for line in lines], dtype=object)  # else None becomes nan
    return pd.DataFrame(lines).assign(extracted=extracted)


def _answer(
    ask: Ask, plan: Plan, folder: Path | None, verify_seconds: float, tell: Callable[[int, int], None]
) -> Answered:
    """Rows and cost of one condition, chunk by chunk: from its file if all it depends on is the same, else run."""
    size = getattr(plan.solver, "chunk", CHUNK)
    base: dict[str, Any] = {"lm": identity(ask.lm), "change": fingerprint(ask.change), "solver": identity(plan.solver)}
    base |= {"limit": ask.max_new_tokens, "batch": ask.batch_size, "seed": ask.seed, "kind": ask.task.kind}
    base |= {"strategy": identity(plan.strategy), "task": ask.task.name, "around": around(ask.lm)}
    base |= {"verify_seconds": identity(float(verify_seconds)), "version": __version__}
    parts = []
    for number, start in enumerate(range(0, len(ask.rows), size)):
        alive = partial(tell, start, len(ask.rows))
        part = replace(ask, rows=ask.rows[start : start + size], pulse=alive, spent=[])
        prompts = [part.prompt(place) for place in range(len(part.rows))]
        own = getattr(plan.solver, "prompts", None)
        asked = own(part) if own is not None else prompts
        key = content_key(**base, prompts=asked, rows=json.dumps(part.rows, sort_keys=True, default=str))
        file = None if folder is None else chunk_file(folder, plan.name, number)
        answered = kept(file, key)
        if answered is None:
            answered = _run(part, plan.solver, prompts, verify_seconds)
            store(file, key, answered)
        parts.append(answered)
        tell(start + len(part.rows), len(ask.rows))
    return joined(parts)


def _run(ask: Ask, solver: Solver, prompts: list[str], verify_seconds: float) -> Answered:
    calls = 0

    def count(module: Any, arguments: Any, output: Any) -> None:
        nonlocal calls
        calls += 1

    watched = {id(model.blocks[0]): model.blocks[0] for model in (ask.lm, *_models(ask.change), *_models(solver))}
    handles = [block.register_forward_hook(count) for block in watched.values()]
    began = time.perf_counter()
    try:
        with peak_memory(ask.lm.device) as peak:
            found = solver.solve(ask)
    finally:
        for handle in handles:
            handle.remove()
    seconds = time.perf_counter() - began
    lines = [_line(ask.task, *each, verify_seconds) for each in zip(ask.rows, prompts, found, ask.spent, strict=True)]
    return {"rows": lines, "cost": {"seconds": seconds, "peak_memory_mb": peak(), "model_calls": calls}}


def _models(value: Any) -> Iterator[LM]:
    """Every model that a change or a solver holds, at any depth."""
    if isinstance(value, LM):
        yield value
    elif isinstance(value, Intervention):
        yield from (other for part in value.parts if isinstance(part, Logits) for other in part.others)
    elif isinstance(value, Mapping):
        yield from (model for item in value.values() for model in _models(item))
    elif isinstance(value, list | tuple):
        yield from (model for item in value for model in _models(item))
    elif is_dataclass(value) and not isinstance(value, type):
        yield from (model for each in fields(value) for model in _models(getattr(value, each.name)))


def _line(
    task: Task, row: dict[str, Any], prompt: str, found: Answer, spent: Cost, verify_seconds: float
) -> dict[str, Any]:
    told = {text: judge(task, row, text, verify_seconds) for text in dict.fromkeys(found.samples)}  # each text once
    if found.verdict:
        verdict, hung = found.verdict, False
    else:
        verdict, hung = told.get(found.text) or judge(task, row, found.text, verify_seconds)
    line = {
        "id": str(row["id"]),
        "prompt": prompt,
        "output": found.text,
        "answer": str(row["answer"]),
        "extracted": verdict.extracted,
        "correct": bool(verdict.correct),
        "unparsed": verdict.extracted is None,
        "steps": shows_steps(found.text),
        "hung": hung,
        **asdict(spent),
    }
    if found.samples:
        verdicts = [(text, told[text][0]) for text in found.samples]
        line["samples"] = [
            {"output": text, "extracted": v.extracted, "correct": bool(v.correct)} for text, v in verdicts
        ]
        line["solve_rate"] = sum(bool(v.correct) for _, v in verdicts) / len(verdicts)
    if verdict.score is not None:
        line["score"] = verdict.score
    for name in ("cluster", "difficulty"):
        if name in row:
            line[name] = row[name]
    return line | found.facts


def _teller(name: str, before: int, total: int) -> Callable[[int, int], None]:
    return lambda done, rows: heartbeat(f"evaluate {name}", before + done, total)
