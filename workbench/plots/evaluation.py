"""Figures of an evaluation beyond one score: accuracy against its cost, calibration, robustness."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from workbench.plots.drawing import Table, error_bars, finish, in_brackets, is_missing, listed, log_axis, rows_of
from workbench.plots.palette import GRID, INK, colour, faded, symbol
from workbench.results import pareto

LIMITS = ("accuracy_low", "accuracy_high")
UNITS = {
    "gflops": "billions of operations a question (2 a weight and token)",
    "tokens_out": "tokens out, mean a question",
    "tokens_in": "tokens in, mean a question",
    "calls": "model calls a question",
    "seconds": "seconds for all questions",
}


def cost_front(table: Table, cost: str = "gflops") -> go.Figure:
    """Accuracy against a cost on a logarithmic axis, with the conditions that no other one beats joined by a line.

    Rows: `condition`, `accuracy`, `low`, `high` (or `n`) and the cost; those that are beaten are drawn open, those of
    unknown cost (nan) are named in the title. Those that fall on one point share a marker and an entry of the legend.
    """
    given = rows_of(table, ("condition", "accuracy"))
    rows = rows_of([row for row in given if cost not in row or not is_missing(row[cost])], (cost,))
    front = pareto(pd.DataFrame(listed(rows)), cost).tolist()
    fig, words = go.Figure(), []
    best = sorted((row for row, kept in zip(rows, front, strict=True) if kept), key=lambda row: row[cost])
    pairs = zip([best[0], *best[:-1]], best, strict=True)
    steps = [(row[cost], level["accuracy"]) for before, row in pairs for level in (before, row)]
    fig.add_scatter(
        x=[place for place, _ in steps], y=[level for _, level in steps], mode="lines",
        line={"color": INK, "width": 1.5, "dash": "dot"}, name="not beaten", hoverinfo="skip",
    )  # fmt: skip
    spots: dict[tuple[Any, ...], list[tuple[Any, bool]]] = defaultdict(list)
    for row, kept in zip(rows, front, strict=True):
        spots[row["accuracy"], row.get("n"), f"{row[cost]:.2g}"].append((row, kept))
        beaten = "" if kept else ", beaten"
        words.append(
            f"{row['condition']} {row['accuracy']:.2f} {in_brackets(row, 'accuracy')} at {row[cost]:.3g}{beaten}"
        )
    for spot in spots.values():
        row, kept = next((each for each in spot if each[1]), spot[0])
        name = str(row["condition"])
        fig.add_scatter(
            x=[row[cost]],
            y=[row["accuracy"]],
            error_y=error_bars([row], "accuracy", thickness=2) | {"color": colour(name)},
            mode="markers",
            marker={"color": colour(name), "symbol": symbol(name) + ("" if kept else "-open"), "size": 13},
            name="<br>".join(str(one["condition"]) for one, _ in spot),
        )
    fig.update_yaxes(range=[-0.03, 1.05], tickformat=".0%")
    log_axis(fig, [row[cost] for row in rows])
    unknown = [str(row["condition"]) for row in given if is_missing(row[cost])]
    missing = f" (not drawn, cost unknown: {', '.join(unknown)})" if unknown else ""
    title = f"Accuracy and its cost{missing}"
    return finish(fig, title, UNITS.get(cost, cost), "right answers", "; ".join(words) + ".")


def reliability(table: Table) -> go.Figure:
    """How often answers of a stated confidence are right, a line a condition, against the diagonal of the honest.

    Rows: `confidence` (mean of the bin), `accuracy`, `n`, `accuracy_low` and `accuracy_high` (else Wilson's from n),
    `condition` where there are several; `measures.confidence.reliability_table` makes them. Markers grow with n.
    """
    rows = [row for row in rows_of(table, ("confidence", "accuracy", "n")) if row["n"] > 0]
    fig, words = go.Figure(), []
    fig.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", name="as right as sure", line={"color": INK, "width": 1.5, "dash": "dash"}
    )
    most = max(row["n"] for row in rows)
    for name in dict.fromkeys(str(row.get("condition", "answers")) for row in rows):
        own = sorted(
            (row for row in rows if str(row.get("condition", "answers")) == name), key=lambda row: row["confidence"]
        )
        fig.add_scatter(
            x=[row["confidence"] for row in own],
            y=[row["accuracy"] for row in own],
            error_y=error_bars(own, "accuracy", *LIMITS, thickness=2) | {"color": colour(name)},
            mode="lines+markers",
            line={"color": faded(colour(name), 0.5), "width": 2},
            marker={
                "color": colour(name),
                "symbol": symbol(name),
                "size": [8 + 10 * (row["n"] / most) ** 0.5 for row in own],
            },
            name=name,
        )
        said = (
            f"{row['confidence']:.2f}: {row['accuracy']:.2f} {in_brackets(row, 'accuracy', *LIMITS)}" for row in own
        )
        words.append(f"{name}: sure and right {', '.join(said)}")
    fig.update_xaxes(range=[-0.02, 1.02], tickformat=".0%")
    fig.update_yaxes(range=[-0.03, 1.05], tickformat=".0%")
    return finish(fig, "Is it right as often as it is sure?", "confidence", "right answers", "; ".join(words) + ".")


def robustness(table: Table) -> go.Figure:
    """What changed questions do: keep-rates and adapt-rates as bars with intervals, grouped by condition.

    Rows: `perturbation`, `rate`, `low`, `high`, `n`, and `condition` where there are several.
    """
    rows = rows_of(table, ("perturbation", "rate", "n"))
    fig, words = go.Figure(), []
    for name in dict.fromkeys(str(row.get("condition", "answers")) for row in rows):
        own = [row for row in rows if str(row.get("condition", "answers")) == name]
        fig.add_bar(
            x=[row["perturbation"] for row in own],
            y=[row["rate"] for row in own],
            error_y=error_bars(own, "rate", thickness=2) | {"color": INK},
            marker={"color": faded(colour(name), 0.45), "line": {"color": colour(name), "width": 1.5}},
            name=name,
        )
        said = (f"{row['perturbation']} {row['rate']:.2f} {in_brackets(row, 'rate')}, n = {row['n']}" for row in own)
        words.append(f"{name}: {', '.join(said)}")
    fig.update_layout(barmode="group")
    fig.update_yaxes(range=[0, 1.05], tickformat=".0%", gridcolor=GRID)
    title = "What a changed question does to a right answer"
    return finish(fig, title, "what was changed", "right after the change", "; ".join(words) + ".")
