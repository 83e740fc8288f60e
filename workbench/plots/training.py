"""Figures of a run in training, drawn live or afterwards: loss above, gradient norm below; and the points of a sweep.

Leans on plotly. The loss alone is `plots.loss_curve`, which reports can print as SVG.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import product
from typing import Any

import plotly.graph_objects as go

from workbench.plots.drawing import PlotError, Row, Table, drawn_as, finish, is_missing, rows_of, series
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
    fig.add_scatter(
        x=steps, y=losses, mode=drawn_as(steps), name="training loss", line={"color": colour("tuned"), "width": 2}
    )
    words = f"Training loss from {losses[0]:.3g} at step {steps[0]:g} to {losses[-1]:.3g} at {steps[-1]:g}."
    if scores:
        marks = {"color": INK, "size": 9, "symbol": "diamond-open", "line": {"width": 2}}
        fig.add_scatter(x=scored, y=scores, mode="markers", name="held-out loss", marker=marks)
        words += f" Held-out loss {scores[-1]:.3g} at step {scored[-1]:g}."
    if norms:
        grey = {"color": faded(INK, 0.7), "width": 1.5}
        fig.add_scatter(x=normed, y=norms, mode=drawn_as(normed), name="gradient norm", line=grey, yaxis="y2")
        words += f" Gradient norm {norms[-1]:.3g} at the end."
        below = {"domain": [0, LOWER - 0.06], "type": "log", "title": {"text": "gradient"}, "anchor": "x"}
        fig.update_layout(yaxis2={**below, "gridcolor": GRID, "showline": True, "linecolor": INK})
    finish(fig, f"Training, step {last['step']:g}{_numbers(last)}", "optimizer step", "loss (nats a token)", words)
    if norms:
        fig.update_layout(yaxis={"domain": [LOWER, 1]}, xaxis={"anchor": "y2"}, yaxis2={"title": {"text": "gradient"}})
    return fig


def _numbers(row: Row) -> str:
    """Speed of the last step, for the title."""
    rate = row.get("tokens_per_second")
    said = f", {rate:{',.0f' if rate >= 100 else '.3g'}} tokens/s" if rate else ""
    return said + (f", MFU {row['mfu']:.0%}" if row.get("mfu") else "")


def sweep_map(table: Table, x: str, y: str, value: str | None = None) -> go.Figure:
    """Points of a sweep as a grid: the lower the value, the fuller the colour, among points trained to the end.

    Rows of `Sweep.table()`: the settings `x` and `y`, `value`, `steps` and `stopped`. `value` is held_out_loss unless
    given, or loss where nothing was held out. A stopped point is white, crossed by a line and says after which step;
    its value is not of the end and colours nothing. A failed point has two lines. Where further settings vary too, a
    cell shows its best point.

    >>> row = {"learning_rate": 1e-3, "rank": 4, "held_out_loss": 0.5, "steps": 9, "stopped": False}
    >>> sweep_map([row], "learning_rate", "rank").layout.annotations[0].text
    '0.5'
    """
    rows = rows_of(table, (x, y, "steps", "stopped"))
    if value is None:
        value = "loss" if all(is_missing(row.get("held_out_loss")) for row in rows) else "held_out_loss"
    ended = [row[value] for row in rows if not row["stopped"] and _counts(row, value)]
    if not any(_counts(row, value) for row in rows):
        raise PlotError(f"sweep_map: no point has a finite {value}.")
    columns, lines = (_places(row[name] for row in rows) for name in (x, y))
    fig, words = go.Figure(), []
    fig.add_scatter(x=[None], y=[None], mode="markers", showlegend=False)
    for (across, place), (up, line) in product(enumerate(columns), enumerate(lines)):
        cell = [row for row in rows if (row[x], row[y]) == (place, line)]
        if not cell:
            continue
        best = min(cell, key=lambda row: (row["stopped"], row[value]) if _counts(row, value) else (2, 0.0))
        failed = not _counts(best, value)
        text = "failed" if failed else f"{best[value]:.3g}"
        text += f"<br>stopped at {best['steps']:g}" if best["stopped"] else ""
        full = 0.0 if failed or best["stopped"] else _share(best[value], min(ended), max(ended))
        _draw_cell(fig, across, up, text, full, crossed=2 if failed else int(best["stopped"]))
        words.append(f"{x} {_said(place)}, {y} {_said(line)}: {text.replace('<br>', ', ')}")
    for update, values in ((fig.update_xaxes, columns), (fig.update_yaxes, lines)):
        ticks = {"tickvals": list(range(len(values))), "ticktext": [_said(one) for one in values]}
        update(range=[-0.6, len(values) - 0.4], showgrid=False, **ticks)
    title = {"held_out_loss": "held-out loss", "loss": "training loss"}.get(value, value.replace("_", " "))
    wide = max(180 + 120 * len(columns), 220 + 9 * len(title))
    fig.update_layout(height=170 + 56 * len(lines), width=wide)
    return finish(fig, f"Sweep: {title}", _title(x), _title(y), f"{title.capitalize()}. " + "; ".join(words) + ".")


def _counts(row: Row, value: str) -> bool:
    """Whether a point has a value at all: a failed one has none, or one that is no number."""
    return not is_missing(row.get(value)) and math.isfinite(row[value])


def _share(value: float, low: float, high: float) -> float:
    """Opacity of a cell: the lowest of the ended points is fullest, the highest palest but not white."""
    return round(0.15 + 0.65 * ((high - value) / (high - low) if high > low else 1.0), 3)


def _draw_cell(fig: go.Figure, across: int, up: int, text: str, full: float, crossed: int) -> None:
    """A rectangle with its text; `crossed` diagonals under it."""
    left, right, bottom, top = across - 0.46, across + 0.46, up - 0.43, up + 0.43
    fill = faded(CELL, full) if full else "#ffffff"
    edge = {"color": faded(INK, 0.35), "width": 1}
    fig.add_shape(type="rect", x0=left, x1=right, y0=bottom, y1=top, fillcolor=fill, line=edge, layer="below")
    for start, end in ((bottom, top), (top, bottom))[:crossed]:
        line = {"color": faded(INK, 0.35), "width": 1.5}
        fig.add_shape(type="line", x0=left, x1=right, y0=start, y1=end, line=line, layer="below")
    back = {"bgcolor": "#ffffff"} if crossed else {}
    fig.add_annotation(x=across, y=up, text=text, showarrow=False, font={"size": 13}, **back)


def _places(values: Iterable[Any]) -> list[Any]:
    """Different values in order: numbers by size, anything else by its name."""
    found = list(dict.fromkeys(values))
    numbers = all(isinstance(one, int | float) for one in found)
    return sorted(found) if numbers else sorted(found, key=str)


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _title(name: str) -> str:
    return name.replace("_", " ")
