"""Draw the traces of a plotly figure on matplotlib axes: scatter, bar, their error bars; any other is refused by name.

The half of `svg` that knows trace types. Data are plain lists; a category is drawn at its place in the axis's names.
"""

from __future__ import annotations

import html
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from workbench.plots.palette import INK

Spec = dict[str, Any]  # a figure, trace or layout as `to_dict` gives it

DASHES: dict[str | None, Any] = {None: "-", "solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
CYCLE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
    "triangle-left": "<",
    "triangle-right": ">",
    "star": "*",
    "x": "X",
    "cross": "P",
    "hexagon": "h",
    "pentagon": "p",
}


class SvgError(ValueError):
    """A figure with a part that has no still picture here; the message names the part."""


def plain(text: Any) -> str:
    r"""Plotly's label markup as plain text: `<br>` is a line break, other tags go.

    >>> plain("<b>a</b><br>1 &lt; 2")
    'a\n1 < 2'
    """
    return html.unescape(re.sub(r"</?[a-zA-Z][^<>]*>", "", re.sub(r"<br ?/?>", "\n", str(text))))


def draw_traces(axes: Axes, spec: Spec, names: dict[str, list[str]]) -> None:
    """Draw every trace with its error bars; `names` holds the categories of both axes."""
    tops: dict[tuple[str, float], float] = defaultdict(float)
    bars = [trace for trace in spec["data"] if trace.get("type") == "bar"]
    for number, trace in enumerate(spec["data"]):
        kind = trace.get("type", "scatter")
        if kind not in ("scatter", "bar") or trace.get("xaxis", "x") != "x" or trace.get("yaxis", "y") != "y":
            where = "" if kind not in ("scatter", "bar") else f" on a second axis ({trace.get('xaxis')})"
            raise SvgError(
                f"trace {number} is a {kind}{where}; still pictures cover scatter and bar on one pair of axes."
            )
        x = positions(trace.get("x", range(len(trace.get("y", ())))), names["x"])
        y = positions(trace.get("y", range(len(x))), names["y"])
        colours = nested(trace, "marker", "color") or nested(trace, "line", "color") or CYCLE[number % len(CYCLE)]
        if kind == "scatter":
            _draw_scatter(axes, trace, x, y, colours)
        else:
            share = bars.index(trace), len(bars)
            x, y = _draw_bars(axes, trace, x, y, colours, (spec["layout"].get("barmode", "group"), *share), tops)
        _draw_error_bars(axes, trace, x, y, INK if kind == "bar" else colours)


def _draw_scatter(axes: Axes, trace: Spec, x: np.ndarray, y: np.ndarray, colours: Any) -> None:
    mode = trace.get("mode", "lines+markers" if len(x) < 20 else "lines")
    line, label = trace.get("line", {}), legend_label(trace)
    if trace.get("fill") == "toself":
        axes.fill(x, y, color=matplotlib_colour(trace.get("fillcolor", colours)), linewidth=0, label=label)
        return
    if "lines" in mode:
        dash = DASHES.get(line.get("dash"), "-")
        tint = matplotlib_colour(line.get("color", colours if isinstance(colours, str) else INK))
        axes.plot(
            x, y, linestyle=dash, color=tint, linewidth=line.get("width", 2), label=None if "markers" in mode else label
        )
    if "text" in mode:
        for left, bottom, words in zip(x, y, trace.get("text", ()), strict=False):
            axes.annotate(plain(words), (left, bottom), (0, 8), textcoords="offset points", ha="center")
    if "markers" not in mode:
        return
    symbols, size = nested(trace, "marker", "symbol") or "circle", nested(trace, "marker", "size") or 7
    dash = DASHES.get(line.get("dash"), "-") if "lines" in mode else "None"
    for place, (left, bottom) in enumerate(zip(x, y, strict=True)):
        tint = matplotlib_colour(_nth(colours, place))
        shape = _nth(symbols, place)
        face = "white" if shape.endswith("-open") else tint
        marker = MARKERS.get(shape.removesuffix("-open"), "o")
        points = _nth(size, place) * (1.35 if marker == "*" else 1.0)
        style = {"marker": marker, "markersize": points, "markerfacecolor": face, "markeredgecolor": tint}
        axes.plot([left], [bottom], linestyle=dash, color=tint, **style, zorder=3, label=None if place else label)


def _draw_bars(
    axes: Axes,
    trace: Spec,
    x: np.ndarray,
    y: np.ndarray,
    colours: Any,
    layout: tuple[str, int, int],
    tops: dict[tuple[str, float], float],
) -> tuple[np.ndarray, np.ndarray]:
    mode, index, count = layout
    flat = trace.get("orientation") == "h"
    places, lengths = (y, x) if flat else (x, y)
    width = trace.get("width") or (0.7 if mode != "group" else 0.7 / count)
    if mode == "group":
        places = places + (index - (count - 1) / 2) * width
    sign = ["+" if length >= 0 else "-" for length in lengths]
    starts = np.array([tops[key] if mode in ("stack", "relative") else 0.0 for key in zip(sign, places, strict=True)])
    for key, length in zip(zip(sign, places, strict=True), lengths, strict=True):
        tops[key] += length
    tint = [matplotlib_colour(_nth(colours, place)) for place in range(len(places))]
    draw, thickness, start = (axes.barh, "height", "left") if flat else (axes.bar, "width", "bottom")
    style: Spec = {thickness: width, start: starts, "color": tint, "label": legend_label(trace)}
    draw(places, lengths, **style)
    return (starts + lengths, places) if flat else (places, starts + lengths)


def _draw_error_bars(axes: Axes, trace: Spec, x: np.ndarray, y: np.ndarray, colours: Any) -> None:
    for name in ("error_x", "error_y"):
        bars = trace.get(name) or {}
        if "array" not in bars or bars.get("visible") is False:
            continue
        above = positions(bars["array"], [])
        below = positions(bars.get("arrayminus", bars["array"]), [])
        tint = matplotlib_colour(bars.get("color") or _nth(colours, 0))
        style: Spec = {"ecolor": tint, "elinewidth": bars.get("thickness", 2), "capsize": bars.get("width", 4)}
        style[f"{name[-1]}err"] = [below, above]
        axes.errorbar(x, y, fmt="none", **style)


def categories(spec: Spec, letter: str) -> list[str]:
    """Names on a category axis in the order of the traces; empty for an axis of numbers."""
    values = [value for trace in spec["data"] for value in trace.get(letter, ()) if isinstance(value, str)]
    return list(dict.fromkeys(values))


def positions(values: Sequence[Any], names: list[str]) -> np.ndarray:
    """Values as numbers: missing ones are nan, categories their place."""
    return np.array([np.nan if value is None else position(value, names) for value in values], dtype=float)


def position(value: Any, names: list[str]) -> float:
    """One value as a number; a category that the axis lacks is refused."""
    if isinstance(value, str):
        if value not in names:
            raise SvgError(f"the position {value!r} is no category of its axis: {', '.join(names) or 'none'}.")
        return float(names.index(value))
    return float(value)


def matplotlib_colour(value: Any) -> Any:
    """A plotly colour as matplotlib takes it; only rgb() and rgba() differ."""
    numbers = re.findall(r"[\d.]+", value) if str(value).startswith("rgb") else None
    if not numbers:
        return value
    return tuple(float(n) / 255 for n in numbers[:3]) + tuple(float(n) for n in numbers[3:])


def legend_label(trace: Spec) -> str | None:
    """The name that a trace has in the legend, or None."""
    return plain(trace["name"]) if trace.get("name") and trace.get("showlegend") is not False else None


def _nth(value: Any, place: int) -> Any:
    return value[place] if isinstance(value, list) else value


def nested(spec: Spec, *names: str) -> Any:
    """The value at a path of names, or None."""
    for name in names:
        spec = spec.get(name) or {}
    return spec or None
