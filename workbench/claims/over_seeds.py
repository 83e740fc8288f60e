"""Arms of training compared over seeds: one cell an arm and seed, saved when done, and a table paired by question.

A seed draws the training questions, the samples and the training's own randomness; the test questions are the same
for all arms and seeds. Intervals are over questions, each with its seeds as one cluster; the spread over seeds stands
beside them, because three seeds are too few to draw from. Not covered: choosing settings, which belongs on tuning rows.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.files import content_key, write_atomic
from workbench.results import Results
from workbench.runs import heartbeat
from workbench.statistics import bootstrap_mean, holm, paired_difference

Work = Callable[
    [int, Path], tuple[Results, dict[str, Any]]
]  # seed, folder of the cell -> results of one condition, facts


@dataclass(frozen=True)
class Cell:
    """One arm with one seed: right or wrong and tokens by question id, and facts (kept, cost, seconds)."""

    arm: str
    seed: int
    correct: dict[str, bool]
    tokens_out: dict[str, int]
    facts: dict[str, Any]


def run_cells(arms: Mapping[str, Work], seeds: Sequence[int], out: Path, settings: Mapping[str, Any]) -> list[Cell]:
    """Every arm with every seed, seed by seed; a cell that was saved under the same settings is read.

    An arm that raises ValueError is told and left out of the table: a recipe may make nothing that can be learnt from.
    It is not saved, so the next start tries it again.
    """
    cells = []
    for number, (seed, name) in enumerate((seed, name) for seed in seeds for name in arms):
        file = out / "cells" / f"{content_key(arm=name)[:8]}-{seed}.json"
        key = content_key(arm=name, seed=seed, settings=dict(settings))
        saved = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        if saved.get("key") != key:
            begin = time.perf_counter()
            heartbeat(f"{name}, seed {seed}", number, len(arms) * len(seeds))
            try:
                results, facts = arms[name](seed, out / f"seed-{seed}")
                rows = results.rows.set_index("id")
                saved = {"correct": rows.correct.map(bool).to_dict(), "tokens_out": rows.tokens_out.map(int).to_dict()}
                saved["facts"] = {**facts, "seconds": time.perf_counter() - begin}
                saved |= {"key": key, "arm": name, "seed": seed}
                write_atomic(file, json.dumps(saved, ensure_ascii=False))
            except ValueError as error:
                saved = {"correct": {}, "tokens_out": {}, "facts": {"failed": str(error)}}
        cells.append(Cell(name, seed, saved["correct"], saved["tokens_out"], saved["facts"]))
    return cells


def table(cells: Sequence[Cell], baseline: str) -> pd.DataFrame:
    """A line an arm: accuracy, its spread over seeds, the paired difference to `baseline`, facts as means over seeds.

    Columns: arm, seeds, n (questions), accuracy, low, high, by_seed, difference, difference_low, difference_high,
    p_holm (sign-flip over questions, Holm over the arms), tokens_out, then every number among the facts, and note (why
    a seed failed). seconds is a cell's own wall clock: what an earlier cell had saved already is not in it.
    """
    by_arm: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        by_arm.setdefault(cell.arm, {})[cell.seed] = cell
    lines, p_values = [], []
    for name, own in by_arm.items():
        done = {seed: cell for seed, cell in own.items() if cell.correct}
        line: dict[str, Any] = {"arm": name, "seeds": len(done)}
        failed = [f"seed {seed}: {cell.facts['failed']}" for seed, cell in own.items() if "failed" in cell.facts]
        line |= {"note": "; ".join(failed)} if failed else {}
        if not done:
            lines.append(line)
            continue
        ids = list(next(iter(done.values())).correct)
        right = [float(cell.correct[question]) for cell in done.values() for question in ids]
        clusters = ids * len(done)
        accuracy = bootstrap_mean(right, clusters=clusters)
        line |= {"n": len(ids), "accuracy": accuracy.estimate, "low": accuracy.low, "high": accuracy.high}
        line["by_seed"] = " ".join(f"{sum(cell.correct.values()) / len(ids):.2f}" for cell in done.values())
        shared = [seed for seed in done if baseline in by_arm and by_arm[baseline][seed].correct]
        if name != baseline and shared:
            first = [float(by_arm[baseline][seed].correct[q]) for seed in shared for q in ids]
            second = [float(done[seed].correct[q]) for seed in shared for q in ids]
            found = paired_difference(first, second, clusters=ids * len(shared))
            line |= {"difference": found.difference, "difference_low": found.low, "difference_high": found.high}
            p_values.append((len(lines), found.p_value))
        line["tokens_out"] = sum(sum(cell.tokens_out.values()) for cell in done.values()) / len(right)
        numbers = [name for name, value in next(iter(done.values())).facts.items() if isinstance(value, int | float)]
        line |= {name: sum(cell.facts.get(name, 0) for cell in done.values()) / len(done) for name in numbers}
        lines.append(line)
    for (place, _), adjusted in zip(p_values, holm([p for _, p in p_values]) if p_values else [], strict=True):
        lines[place]["p_holm"] = adjusted
    return pd.DataFrame(lines)
