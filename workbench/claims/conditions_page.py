"""What `many_conditions` kept, as a Markdown page: all tasks of a model side by side, then each with its costs."""

import argparse
from pathlib import Path

import pandas as pd

from workbench.claims.many_conditions import table
from workbench.report.tables import format_table
from workbench.results import load_results


def page(folder: Path) -> str:
    """The page of a folder that holds MODEL/TASK/rows.jsonl, tasks in the order in which they were asked.

    Raises:
        ValueError: no results in it.
    """
    models: dict[str, dict[str, pd.DataFrame]] = {}
    for file in sorted(folder.glob("*/*/rows.jsonl"), key=lambda file: file.stat().st_mtime):
        models.setdefault(file.parents[1].name, {})[file.parent.name] = table(load_results(file.parent))
    if not models:
        raise ValueError(f"{folder} holds no results. Next: python -m workbench.claims.many_conditions --out {folder}")
    parts = []
    for model, tasks in models.items():
        parts.append(f"## {model}\n\n{beside(tasks)}")
        parts += [
            f"### {model}, {task}\n\n```\n{format_table(lines.to_dict('records'))}\n```"
            for task, lines in tasks.items()
        ]
    return "\n\n".join(parts) + "\n"


def beside(tasks: dict[str, pd.DataFrame]) -> str:
    """Accuracies with intervals, a row a condition, a column a task; * where p (Holm) is below 0.05."""
    cells: dict[str, dict[str, str]] = {}
    for task, lines in tasks.items():
        for line in lines.to_dict("records"):
            share = f"{line['accuracy']:.2f} [{line['low']:.2f}, {line['high']:.2f}]"
            cells.setdefault(line["condition"], {})[task] = share + ("\\*" if line["p_holm"] < 0.05 else "")
    names = [f"{task}, n {int(lines.n.iloc[0])}" for task, lines in tasks.items()]
    rows = [f"| condition | {' | '.join(names)} |", "|---" * (len(tasks) + 1) + "|"]
    rows += [f"| {name} | {' | '.join(own.get(task, '') for task in tasks)} |" for name, own in cells.items()]
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m workbench.claims.conditions_page", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs/many-conditions"))
    print(page(parser.parse_args().folder), end="")


if __name__ == "__main__":
    main()
