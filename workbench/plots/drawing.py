"""What every figure shares: rows in, error bars that cannot be left out, numbers in words, one frame.

Leans on plotly and pandas; which figures there are is in `plots`, colours and fonts are in `palette`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from workbench.plots.palette import template
from workbench.statistics import wilson

Row = Mapping[str, Any]
Table = Iterable[Any] | pd.DataFrame
POINTS = 1000  # of one line: more can't be seen and would make a figure larger than 200 KB
FEW = 5  # points of a curve from which on its line alone is enough


class PlotError(ValueError):
    """Rows that a figure cannot be drawn from; the message names the field that is missing."""


def listed(table: Table) -> list[Any]:
    """Rows of a data frame as dicts, dataclass objects as dicts, anything else as it is."""
    items = table.to_dict("records") if isinstance(table, pd.DataFrame) else list(table)
    return [asdict(item) if is_dataclass(item) and not isinstance(item, type) else item for item in items]


def rows_of(table: Table, needed: Sequence[str]) -> list[Row]:
    """Rows that all hold the needed fields; no row, or a missing field, is refused by name."""
    rows = listed(table)
    if not rows:
        raise PlotError(f"no rows to draw; this figure needs rows with {', '.join(needed)}.")
    for number, row in enumerate(rows):
        if missing := [name for name in needed if not isinstance(row, Mapping) or is_missing(row.get(name))]:
            found = ", ".join(map(str, row)) if isinstance(row, Mapping) else repr(row)
            raise PlotError(f"row {number} has no {', '.join(missing)}; found: {found or 'nothing'}.")
    return rows


def is_missing(value: Any) -> bool:
    """True for None and for nan, which data frames put where a row has no value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def limits(row: Row, key: str, low: str = "low", high: str = "high") -> tuple[float, float]:
    """Confidence limits of `row[key]`: the fields `low` and `high`, else Wilson's from `n` for a share."""
    if not is_missing(row.get(low)) and not is_missing(row.get(high)):
        return float(row[low]), float(row[high])
    if not is_missing(row.get("n")) and 0 <= row[key] <= 1:
        interval = wilson(round(row[key] * row["n"]), int(row["n"]))
        return interval.low, interval.high
    raise PlotError(
        f"{key} = {row[key]} has no interval: give the fields {low} and {high}, or n for a share of n questions. "
        f"Found: {', '.join(map(str, row))}."
    )


def error_bars(
    rows: Sequence[Row], key: str, low: str = "low", high: str = "high", thickness: float = 1.5
) -> dict[str, Any]:
    """Plotly's `error_x` or `error_y` for `key`: lengths above and below each value, never negative."""
    bounds = [limits(row, key, low, high) for row in rows]
    above = [max(0.0, top - row[key]) for row, (_, top) in zip(rows, bounds, strict=True)]
    below = [max(0.0, row[key] - bottom) for row, (bottom, _) in zip(rows, bounds, strict=True)]
    shape = {"thickness": thickness, "width": 5}
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below} | shape


def in_brackets(row: Row, key: str, low: str = "low", high: str = "high") -> str:
    """Limits as text.

    >>> in_brackets({"difference": 0.1, "low": -0.02, "high": 0.2}, "difference")
    '[-0.02, 0.20]'
    """
    bottom, top = limits(row, key, low, high)
    return f"[{bottom:.2f}, {top:.2f}]"


def p_text(p: float) -> str:
    """A p-value as a paper prints it.

    >>> p_text(0.0312), p_text(0.0000021)
    ('p = 0.031', 'p < 0.001')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def series(rows: Sequence[Row], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of the rows that hold `key`, at most `POINTS` of them, evenly thinned, the last one kept."""
    found = [(float(row.get("step", number)), float(row[key])) for number, row in enumerate(rows, 1) if key in row]
    stride = math.ceil(len(found) / POINTS) if found else 1
    thinned = found[::stride] if (len(found) - 1) % stride == 0 else [*found[::stride], found[-1]]
    return [step for step, _ in thinned], [float(f"{value:.6g}") for _, value in thinned]


def drawn_as(steps: Sequence[float]) -> str:
    """Plotly's mode for a curve: a few points get marks too, because a line through one point can't be seen.

    >>> drawn_as([1.0]), drawn_as([1.0, 2.0, 3.0, 4.0, 5.0])
    ('lines+markers', 'lines')
    """
    return "lines" if len(steps) >= FEW else "lines+markers"


def log_axis(fig: go.Figure, values: Sequence[float]) -> None:
    """A logarithmic x axis over the values, with ticks at 1, 2 and 5 times the powers of ten."""
    low, high = (math.log10(max(end, 1e-6)) for end in (min(values), max(values)))
    spare = max(0.0, 1 - (high - low)) / 2  # at least one power of ten, so that near points look near
    low, high = low - spare, high + spare
    leaders = (1, 2, 5) if high - low < 4 else (1,)
    steps = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in leaders]
    ticks = [step for step in steps if low - 0.1 <= math.log10(step) <= high + 0.1]
    text = [f"{tick:g}" for tick in ticks]
    fig.update_xaxes(type="log", range=[low - 0.1, high + 0.1], tickvals=ticks, ticktext=text)


def finish(fig: go.Figure, title: str, x: str, y: str, alt: str) -> go.Figure:
    """The frame: template, title, axis titles, and the alt text where `svg` and a reader of the JSON find it."""
    fig.update_layout(template=template(), title={"text": title}, meta={"alt": f"{title}. {alt}"})
    fig.update_xaxes(title={"text": x})
    fig.update_yaxes(title={"text": y})
    if fig.layout.height is None:
        fig.update_layout(height=440)  # else a page without a height of its own stretches the figure
    return fig
