"""Per-question rows of an evaluation, and the tables and paired comparisons that are made from them.

Answering the questions is `workbench.evaluation`'s matter; intervals and tests are `workbench.statistics`'.
"""

import json
import math
import re
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.files import write_atomic
from workbench.statistics import (
    Comparison,
    Interval,
    beta_binomial_interval,
    bootstrap_mean,
    holm,
    minimum_detectable_effect,
    paired_difference,
    wilson,
)

# two numbers, with decimals, currency, per cent and brackets, and what they make: "9 * 2 = $18", "2*(1.5+1)=5"
_EQUATION = re.compile(
    r"\d[)%]*\s*[-+*/×÷]\s*[($€£]*\d[\d.,]*[)%]*(?:\s*[-+*/×÷]\s*[($€£]*\d[\d.,]*[)%]*)*\s*=\s*[-$€£]*\d"
)


def shows_steps(text: str) -> bool:
    """Whether an answer works something out: it holds at least one written equation.

    >>> shows_steps("34+27=61. The answer is 61."), shows_steps("The answer is 61.")
    (True, False)
    >>> shows_steps("He makes 9 * 2 = $18 every day."), shows_steps("2*1.5=3")
    (True, True)
    """
    return _EQUATION.search(text) is not None


@dataclass(frozen=True)
class Results:
    """Per-question rows and the cost of each condition.

    rows: id, condition, prompt, output, extracted, correct, unparsed, steps, hung (its verifier was stopped), calls,
    tokens_in, tokens_out, forward_passes, seconds, flops, task, score (0 to 1, of tasks with partial credit), and
    columns of the condition's solver. costs: by condition, seconds (wall clock), peak_memory_mb, model_calls.
    """

    rows: pd.DataFrame
    costs: dict[str, dict[str, float]]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def conditions(self) -> list[str]:
        """Names of the conditions, in the order given to `evaluate`."""
        return list(self.costs)

    def table(self, level: float = 0.95) -> pd.DataFrame:
        """One row a condition: accuracy with its Wilson interval (over clusters, where rows have a `cluster`), share of
        answers with steps, cost.

        tokens_in, tokens_out, calls and gflops (`evaluation.cost`) are means a question; tokens_out has a bootstrap
        interval; seconds are wall clock for all n; peak_memory_mb is the process's (or the GPU's) peak while the
        condition ran; model_calls are forward passes of batches. Tasks with partial credit (orders, spans) also have
        the mean score with its bootstrap interval (over clusters, where there are any). A cost that is unknown (nan)
        for one answer, as in files of other tools, is nan for its condition.
        """
        lines = []
        for name, group in self.rows.groupby("condition", sort=False):
            related = _clusters(group)
            accuracy: Any = wilson(int(group.correct.sum()), len(group), level)
            if related is not None:
                accuracy = beta_binomial_interval(group.correct.tolist(), related, level)
            style = wilson(int(group.steps.sum()), len(group), level)
            length = _mean_length(group.tokens_out, level)
            line = {
                "condition": name,
                "n": len(group),
                "accuracy": accuracy.estimate,
                "low": accuracy.low,
                "high": accuracy.high,
            }
            if "score" in group and group.score.notna().all():
                credit: Any = bootstrap_mean(group.score.to_numpy(float), clusters=related, level=level)
                line |= {"score": credit.estimate, "score_low": credit.low, "score_high": credit.high}
            line |= {"steps": style.estimate, "steps_low": style.low, "steps_high": style.high}
            line |= {"unparsed": float(group.unparsed.mean()), "tokens_in": _mean(group.tokens_in)}
            line |= {"tokens_out": length.estimate, "tokens_out_low": length.low, "tokens_out_high": length.high}
            line |= {column: _mean(group[column]) for column in ("calls",) if column in group}
            if "flops" in group:
                line["gflops"] = _mean(group.flops) / 1e9
            lines.append(line | self.costs[str(name)])
        return pd.DataFrame(lines)

    def correct(self, condition: str) -> pd.Series:
        """Right or wrong by question id, for one condition."""
        return self.column(condition, "correct")

    def column(self, condition: str, name: str) -> pd.Series:
        """A column of the rows by question id, for one condition."""
        if condition not in self.costs:
            raise ValueError(f"No condition {condition!r} in these results. Conditions: {', '.join(self.conditions)}.")
        if name not in self.rows:
            raise ValueError(f"These rows have no column {name!r}. Columns: {', '.join(self.rows.columns)}.")
        return self.rows[self.rows.condition == condition].set_index("id")[name]

    def compare(self, a: str, b: str, level: float = 0.95, of: str = "correct") -> Comparison:
        """The paired difference in accuracy, b - a: interval, exact McNemar p-value, n; see `paired_difference`.

        Rows with a `cluster` (a paradigm of BLiMP) are related: interval and test are those over clusters. of: another
        column of numbers, such as `score` or `tokens_out`.
        """
        first, second = self.column(a, of), self.column(b, of)
        _check_paired(a, first, b, second)
        related = _clusters(self.rows[self.rows.condition == a])
        return paired_difference(first.tolist(), second.loc[first.index].tolist(), level, clusters=related)

    def comparisons(self, baseline: str | None = None, level: float = 0.95) -> pd.DataFrame:
        """Every other condition against `baseline` (default: the first); p-values corrected by Holm over the family.

        `detectable` is the smallest difference that this n would have shown with 80 % power, at the discordance seen.
        """
        baseline = baseline or self.conditions[0]
        others = [name for name in self.conditions if name != baseline]
        found = [self.compare(baseline, name, level) for name in others]
        corrected = holm([c.p_value for c in found]) if found else []
        lines = []
        for name, comparison, adjusted in zip(others, found, corrected, strict=True):
            seen = max(comparison.discordant, 1) / comparison.n
            found_here = {key: value for key, value in asdict(comparison).items() if key not in ("method", "note")}
            line = {"a": baseline, "b": name, **found_here, "p_holm": adjusted}
            lines.append(line | {"detectable": minimum_detectable_effect(comparison.n, discordant_rate=seen)})
        return pd.DataFrame(lines)

    def disagreements(self, a: str, b: str, most: int = 10) -> pd.DataFrame:
        """Questions that exactly one of two conditions gets right, the most telling first, for a person to read.

        Telling is what goes against the other conditions: `b` right where most are wrong, `a` right where most are
        right and `b` is not. Gains and losses alternate as long as there are both. Columns: id, right (who), question
        (the prompt of `a`), answer, others (share of all conditions that are right), and output_a, output_b.
        """
        first, second = (self.rows[self.rows.condition == name].set_index("id") for name in (a, b))
        right = pd.DataFrame({"a": self.correct(a), "b": self.correct(b)}).dropna().astype(bool)
        others = self.rows.groupby("id").correct.mean()
        split = right[right.a != right.b].index
        gains = sorted(split[right.b[split]], key=lambda name: (others[name], name))
        losses = sorted(split[right.a[split]], key=lambda name: (-others[name], name))
        both = [name for pair in zip_longest(gains, losses) for name in pair if name is not None][:most]
        lines = [
            {
                "id": name,
                "right": b if right.b[name] else a,
                "question": first.prompt[name],
                "answer": first.answer[name],
                "others": float(others[name]),
                "output_a": first.output[name],
                "output_b": second.output[name],
            }
            for name in both
        ]
        return pd.DataFrame(lines, columns=["id", "right", "question", "answer", "others", "output_a", "output_b"])

    def save(self, folder: Path) -> None:
        """Write rows.jsonl and costs.json; `load_results` reads them."""
        lines = [json.dumps(_bare(row), ensure_ascii=False, default=str) for row in self.rows.to_dict("records")]
        write_atomic(folder / "rows.jsonl", "".join(f"{line}\n" for line in lines))
        about = {"costs": self.costs, "about": self.about}
        write_atomic(folder / "costs.json", json.dumps(about, indent=1, default=str))


def _bare(value: Any) -> Any:
    """A cell as JSON: every digit of a number, and null for one that is unknown."""
    if isinstance(value, dict):
        return {str(name): _bare(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_bare(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value


def _check_paired(a: str, first: pd.Series, b: str, second: pd.Series) -> None:
    for name, side in ((a, first), (b, second)):
        if not side.index.is_unique:
            raise ValueError(
                f"Condition {name!r} answers question {side.index[side.index.duplicated()][0]!r} more than once, and a "
                "paired comparison needs one answer each. Average or choose first: read_results(..., repeats='first')."
            )
    if set(first.index) != set(second.index):
        alone = [*first.index.difference(second.index)[:2], *second.index.difference(first.index)[:2]]
        raise ValueError(
            f"{a!r} and {b!r} do not answer the same questions ({len(first.index.intersection(second.index))} shared; "
            f"alone stand for example {', '.join(map(str, alone))}). Join them: exchange.joined(..., shared_only=True)."
        )


def _mean(costs: pd.Series) -> float:
    """nan where any is unknown: the mean of the known ones would be that of a chosen part."""
    return float(costs.astype(float).mean(skipna=False))


def _mean_length(tokens: pd.Series, level: float) -> Interval:
    if tokens.isna().any():
        return Interval(math.nan, math.nan, math.nan, len(tokens), f"unknown for {int(tokens.isna().sum())} answers")
    return bootstrap_mean(tokens.to_numpy(float), level=level)


def _clusters(rows: pd.DataFrame) -> list[Any] | None:
    """The cluster of every row, where all have one and there are two or more."""
    given = "cluster" in rows and bool(rows.cluster.notna().all()) and rows.cluster.nunique() > 1
    return rows.cluster.tolist() if given else None


def pareto(table: pd.DataFrame, cost: str = "gflops", score: str = "accuracy") -> pd.Series:
    """Which conditions no other one beats: none is at least as good and as cheap, and better or cheaper.

    A condition of unknown cost (nan) is never among them: it can't be placed.

    >>> pareto(pd.DataFrame({"gflops": [1, 2, 3], "accuracy": [0.5, 0.4, 0.7]})).tolist()
    [True, False, True]
    """
    for name in (cost, score):
        if name not in table:
            raise ValueError(f"The table has no column {name!r}. It has: {', '.join(map(str, table.columns))}.")
    pairs = list(zip(table[cost], table[score], strict=True))
    beaten = [
        math.isnan(own) or any(c <= own and s >= got and (c, s) != (own, got) for c, s in pairs) for own, got in pairs
    ]
    return pd.Series([not each for each in beaten], index=table.index)


def load_results(folder: str | Path) -> Results:
    """Results that `evaluate(..., out=folder)` left."""
    folder = Path(folder)
    if not (folder / "rows.jsonl").exists():
        raise ValueError(
            f"{folder} holds no results (rows.jsonl is missing). Make them: wb.evaluate(..., out={str(folder)!r})."
        )
    # pandas' own reader takes texts that look like numbers or dates for such
    lines = (folder / "rows.jsonl").read_text(encoding="utf-8").split("\n")
    rows = pd.DataFrame([json.loads(line) for line in lines if line])
    rows["id"] = rows.id.astype(str)
    rows["extracted"] = pd.Series([text if isinstance(text, str) else None for text in rows.extracted], dtype=object)
    stored = json.loads((folder / "costs.json").read_text())
    return Results(rows, stored["costs"], stored["about"])
