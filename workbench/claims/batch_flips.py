"""How many answers change with the batch size alone: none in float32 on a CPU, and how many in a shorter type.

Sums in another order round otherwise, and a greedy choice between near equals flips (Yuan et al. 2025, arXiv
2506.09501). Whatever it finds is noise of every other number measured in that type on that machine.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from workbench.evaluation import evaluate
from workbench.models import LM, load_model
from workbench.prompts import Strategy, few_shot
from workbench.report.tables import format_table
from workbench.results import Results
from workbench.statistics import wilson
from workbench.tasks import Task, load_task

SIZES = (1, 7, 64)


def flips(
    lm: LM, task: Task, strategy: Strategy | None = None, *, n: int = 200, sizes: Sequence[int] = SIZES, limit: int = 96
) -> pd.DataFrame:
    """One row a batch size against the first one: share of texts that differ, and of verdicts, with Wilson intervals.

    n: questions of the test split, answered greedily with at most `limit` new tokens.
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes={list(sizes)}: give two or more batch sizes to compare.")
    condition = [strategy] if strategy else []
    found = [evaluate(lm, task, {"x": condition}, n=n, batch_size=size, max_new_tokens=limit) for size in sizes]
    return pd.DataFrame(
        [_line(lm, sizes[0], size, found[0], other) for size, other in zip(sizes[1:], found[1:], strict=True)]
    )


def _line(lm: LM, size: int, other_size: int, one: Results, other: Results) -> dict[str, object]:
    a, b = (results.rows.set_index("id") for results in (one, other))
    b = b.loc[a.index]
    texts, verdicts = int((a.output != b.output).sum()), int((a.correct != b.correct).sum())
    line: dict[str, object] = {"model": lm.name, "type": str(lm.model.dtype).removeprefix("torch.")}
    line |= {"device": lm.device.type, "batch": f"{other_size} against {size}", "n": len(a)}
    for name, count in (("texts differ", texts), ("verdicts differ", verdicts)):
        interval = wilson(count, len(a))
        line |= {name: f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"}
    return line | {"accuracies": f"{a.correct.mean():.3f}, {b.correct.mean():.3f}"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m workbench.claims.batch_flips", description=(__doc__ or "")[:110])
    parser.add_argument("--model", default="lab")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--task", default="word-problems")
    parser.add_argument("--shots", type=int, default=3, help="worked examples in the prompt")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--limit", type=int, default=96, help="new tokens an answer")
    parser.add_argument("--out", type=Path, help="a CSV file for the table")
    options = parser.parse_args()
    task, strategy = load_task(options.task), few_shot("steps", options.shots) if options.shots else None
    tables = [
        flips(load_model(options.model, dtype=dtype), task, strategy, n=options.n, limit=options.limit)
        for dtype in options.dtype
    ]
    table = pd.concat(tables, ignore_index=True)
    print(format_table(table.to_dict("records")))
    if options.out:
        table.to_csv(options.out, index=False)


if __name__ == "__main__":
    main()
