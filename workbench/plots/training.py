"""Figures of a run in training, drawn live or afterwards: loss above, gradient norm below; and the points of a sweep.

Leans on plotly. The loss alone is `plots.loss_curve`, which reports can print as SVG.
"""

from __future__ import annotations

import math

import plotly.graph_objects as go

from workbench.plots.drawing import PlotError, Row, Table, finish, is_missing, rows_of, series
from workbench.plots.palette import GRID, INK, colour, faded

LOWER = 0.26  # of the height, for the gradient norm
CELL = "#56B4E9"  # sky blue, which no condition has


def training_curve(rows: Table) -> go.Figure:
    """Loss by step with held-out marks, and under it the norm of the gradient before clipping, on a logarithmic axis.

    Rows of losses.jsonl, or those that `finetune(watch=)` hands out: `step` and `loss` (nats a token), and where they
    are there `eval_loss`, `grad_norm`, `learning_rate`, `tokens_per_second`, `mfu` (a share).

    >>> fig = training_curve([{"step": 1, "loss": 2.0, "grad_norm": 3.0}, {"step": 2, "loss": 1.0, "eval_loss": 1.5}])
    >>> [(trace.name, trace.y) for trace in fig.data]
    [('training loss', (2.0, 1.0)), ('held-out loss', (1.5,)), ('gradient norm', (3.0,))]
    """
    found = rows_of(rows, ("step", "loss"))
    last, fig = found[-1], go.Figure()
    (steps, losses), (scored, scores), (normed, norms) = (
        series([row for row in found if not is_missing(row.get(name))], name)
        for name in ("loss", "eval_loss", "grad_norm")
    )
    fig.add_scatter(x=steps, y=losses, mode="lines", name="training loss", line={"color": colour("tuned"), "width": 2})
    words = f"Training loss from {losses[0]:.3g} at step {steps[0]:g} to {losses[-1]:.3g} at {steps[-1]:g}."
    if scores:
        marks = {"color": INK, "size": 9, "symbol": "diamond-open", "line": {"width": 2}}
        fig.add_scatter(x=scored, y=scores, mode="markers", name="held-out loss", marker=marks)
        words += f" Held-out loss {scores[-1]:.3g} at step {scored[-1]:g}."
    if norms:
        grey = {"color": faded(INK, 0.7), "width": 1.5}
        fig.add_scatter(x=normed, y=norms, mode="lines", name="gradient norm", line=grey, yaxis="y2")
        words += f" Gradient norm {norms[-1]:.3g} at the end."
        below = {"domain": [0, LOWER - 0.06], "type": "log", "title": {"text": "gradient"}, "anchor": "x"}
        fig.update_layout(yaxis2={**below, "gridcolor": GRID, "showline": True, "linecolor": INK})
    finish(fig, f"Training, step {last['step']:g}{_numbers(last)}", "optimizer step", "loss (nats a token)", words)
    if norms:
        fig.update_layout(yaxis={"domain": [LOWER, 1]}, xaxis={"anchor": "y2"}, yaxis2={"title": {"text": "gradient"}})
    return fig


def _numbers(row: Row) -> str:
    """Speed of the last step, for the title."""
    said = f", {row['tokens_per_second']:.3g} tokens/s" if row.get("tokens_per_second") else ""
    return said + (f", MFU {row['mfu']:.0%}" if row.get("mfu") else "")


def sweep_map(table: Table, x: str, y: str, value: str = "held_out_loss") -> go.Figure:
    """Points of a sweep as a grid: the lower the value, the fuller the colour; stopped points say after which step.

    Rows of `sweep`'s table: the settings `x` and `y`, `value`, `steps` and `stopped`. Where other settings vary
    too, the best point of each cell is shown.

    >>> row = {"learning_rate": 1e-3, "rank": 4, "held_out_loss": 0.5, "steps": 9, "stopped": False}
    >>> sweep_map([row], "learning_rate", "rank").layout.annotations[0].text
    '0.5'
    """
    rows = rows_of(table, (x, y, value, "steps", "stopped"))
    columns, lines = (sorted({row[name] for row in rows}) for name in (x, y))
    low, high = (pick(row[value] for row in rows) for pick in (min, max))
    if not math.isfinite(low):
        raise PlotError(f"sweep_map: no point has a finite {value}.")
    notes, words = [], []
    for place, line in ((place, line) for place in columns for line in lines):
        cell = [row for row in rows if (row[x], row[y]) == (place, line)]
        if not cell:
            continue
        best = min(cell, key=lambda row: (row["stopped"], row[value]))
        share = (high - best[value]) / (high - low) if high > low else 1.0
        text = f"{best[value]:.3g}" + (f"<br>stopped at {best['steps']:g}" if best["stopped"] else "")
        fill = faded(CELL, round(0.1 + 0.7 * share, 3))
        where = {"x": columns.index(place), "y": lines.index(line), "showarrow": False, "font": {"size": 13}}
        notes.append({**where, "text": text, "bgcolor": fill, "width": 96, "height": 40})
        words.append(f"{x} {place:g}, {y} {line:g}: {text.replace('<br>', ', ')}")
    fig = go.Figure(layout={"annotations": notes})
    fig.add_scatter(x=[None], y=[None], mode="markers", showlegend=False)
    for update, values in ((fig.update_xaxes, columns), (fig.update_yaxes, lines)):
        ticks = {"tickvals": list(range(len(values))), "ticktext": [f"{number:g}" for number in values]}
        update(range=[-0.6, len(values) - 0.4], showgrid=False, **ticks)
    fig.update_layout(height=170 + 56 * len(lines), width=180 + 120 * len(columns))
    title = value.replace("_", " ").replace("held out", "held-out")
    return finish(fig, f"Sweep: {title}", _title(x), _title(y), f"{title}. " + "; ".join(words) + ".")


def _title(name: str) -> str:
    return name.replace("_", " ")
