"""Runs side by side: what differed in their parameters, and what each stage's result says.

Reads manifests and `result.json` files only, so that it works on runs made elsewhere. Statistics of paired questions
are `evaluate`'s and `statistics`' matter; here the numbers of the tables are only put next to each other.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.runs.heartbeats import duration
from workbench.runs.manifest import NAME, read_manifest
from workbench.runs.stages import COST, RESULT
from workbench.runs.status import RunStatus

MAIN = "05_evaluate"  # the stage whose table stands for the run
LIMITS = {"difference": "", "low": "_low", "high": "_high"}  # of a comparison, as suffixes in the main table
Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Runs by name, what differs between them (parameters, versions, models), and their tables with a `run` column."""

    runs: list[str]
    differences: list[Row]
    rows: list[Row]

    def text(self) -> str:
        """Return both tables for a terminal."""
        head = (
            _format(self.differences)
            if self.differences
            else "no difference in parameters, package, models or libraries"
        )
        return f"What differed\n{head}\n\nWhat came out\n{_format(self.rows) if self.rows else 'no results'}"

    def as_data(self) -> str:
        """Return JSON text."""
        return json.dumps({"runs": self.runs, "differences": self.differences, "rows": self.rows})


def compare(folders: Sequence[Path]) -> Comparison:
    """Compare run folders; raises ValueError for a folder without any finished stage."""
    found = differences(folders)
    names = run_names(folders)
    rows = [{"run": name, **row} for name, folder in zip(names, folders, strict=True) for row in result_rows(folder)]
    return Comparison(names, found, rows)


def differences(folders: Sequence[Path]) -> list[Row]:
    """What differs between run folders, one row a parameter, model, package or library; a column a run.

    Raises ValueError for a folder without any finished stage, and for one that is named twice.
    """
    names = run_names(folders)
    facts = [ingredients_of(folder) for folder in folders]
    for folder, found in zip(folders, facts, strict=True):
        if not found:
            raise ValueError(f"{folder} holds no finished stage. Look at it: python -m workbench status {folder}")
    keys = sorted({key for found in facts for key in found})
    return [
        {"what": key, **{name: found.get(key) for name, found in zip(names, facts, strict=True)}}
        for key in keys
        if len({json.dumps(found.get(key), sort_keys=True) for found in facts}) > 1
    ]


def run_names(folders: Sequence[Path]) -> list[str]:
    """Return short names that tell the folders apart."""
    resolved = [folder.resolve() for folder in folders]
    names = [folder.name for folder in resolved]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in resolved]
    if len(set(names)) < len(names):
        raise ValueError("the same run folder is named twice.")
    return names


def ingredients_of(folder: Path) -> dict[str, Any]:
    """Return what a run was made from, flat: parameters by name, models, package, libraries."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob(f"*/{NAME}")):
        manifest = read_manifest(path.parent)
        if manifest is None:
            continue
        made = manifest["ingredients"]
        found |= made["parameters"]
        found |= {f"revision of {name}": value[:12] for name, value in made["models"].items()}
        found |= {f"library {name}": value for name, value in made["libraries"].items()}
        found |= {
            "package source": made["package"]["source"][:12],
            f"notebook {path.parent.name}": made["notebook"][:12],
        }
    return found


def result_rows(folder: Path) -> list[Row]:
    """Return the rows of the main table; where that stage is absent, one row a stage of its plain values."""
    if rows := table_of(folder / MAIN):
        return rows
    rows = []
    for path in sorted(folder.glob(f"*/{RESULT}")):
        result = read_result(path.parent)
        rows += [{"stage": path.parent.name, **row} for row in table_of(path.parent)] or [
            {
                "stage": path.parent.name,
                **{key: value for key, value in result.items() if not isinstance(value, list | dict)},
            }
        ]
    return rows


def table_of(stage: Path) -> list[Row]:
    """Return the `table` of a stage's result."""
    rows = read_result(stage).get("table", [])
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def read_result(stage: Path, name: str = RESULT) -> dict[str, Any]:
    """Return a stage's result (or another JSON file of it), empty if there is none that can be read."""
    try:
        found = json.loads((stage / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def main_table(folder: Path) -> str:
    """Return the main table of a run as text, empty if it has none: accuracy, difference to plain, cost."""
    rows = main_rows(folder / MAIN)
    return f"\n{_format(rows)}\n" if rows else ""


def main_rows(stage: Path) -> list[Row]:
    """Return an evaluation's table, each row with its paired difference, corrected p-value and cost beside it."""
    result, costs = read_result(stage), read_result(stage, COST).get("costs", {})
    against = {row.get("b"): row for row in result.get("comparisons", [])}
    names = ("condition", "n", "accuracy", "low", "high", "steps", "steps_low", "steps_high", "unparsed", "tokens_out")
    rows = []
    for row in table_of(stage):
        other, spent = against.get(row.get("condition"), {}), costs.get(row.get("condition"), {})
        paired = {f"difference{end}": other[name] for name, end in LIMITS.items() if name in other}
        paired |= {"p_holm": other["p_holm"]} if "p_holm" in other else {}
        cost = {name: spent[name] for name in ("seconds", "peak_memory_mb") if name in spent}
        rows.append({**{name: row[name] for name in names if name in row}, **paired, **cost})
    return rows


def _format(rows: Sequence[Row]) -> str:
    from workbench.report.tables import format_table  # brings plotly, which `status` can do without

    return format_table(rows)


def status_text(found: RunStatus) -> str:
    """Return a run's status for a terminal."""
    rows = [
        {
            "stage": item.stage,
            "state": item.state,
            "time": duration(item.seconds) if item.seconds else "",
            "": item.detail,
        }
        for item in found.stages
    ]
    lines = [f"{found.folder}: {f'held by {found.owner}' if found.owner else 'not running'}", table(rows)]
    if found.leftovers:
        lines.append(
            f"processes {', '.join(map(str, found.leftovers))} of a killed run still live; the next run ends them"
        )
    if not found.owner and any(item.state != "completed" for item in found.stages):
        lines.append(f"continue with: python -m workbench run --out {found.folder} (and the same parameters)")
    return "\n".join(lines)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as an aligned text table with a column for every key.

    >>> print(table([{"run": "a", "accuracy": 0.5}, {"run": "b", "n": 3}]))
    run  accuracy  n
    a    0.5
    b              3
    """
    kept = list(rows)
    columns = list(dict.fromkeys(key for row in kept for key in row))
    cells = [columns, *([cell(row.get(column)) for column in columns] for row in kept)]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def cell(value: Any) -> str:
    """Return one value of a table: four significant digits, nothing for null."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value)
