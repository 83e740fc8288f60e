"""Still pictures of plotly figures as SVG text, for pages that open offline and for viewers that run no scripts.

plotly's own export needs a Chrome browser, and its script is 4.8 MB a page. This draws the traces that `plots` makes
(scatter, bar; error bars, bands, lines, rectangles, annotations) with matplotlib; any other trace is refused by name.
Text stays text, so that it can be searched, read aloud and enlarged. Not covered: heatmaps, subplots, hover.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re
import threading
from typing import Any

import matplotlib
import numpy as np
import plotly.graph_objects as go
import plotly.io as pio
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.transforms import Transform, blended_transform_factory
from plotly.io.base_renderers import MimetypeRenderer

from workbench.plots.palette import FONT, GRID, INK
from workbench.report.svg_traces import (
    DASHES,
    Spec,
    SvgError,
    categories,
    draw_traces,
    legend_label,
    matplotlib_colour,
    nested,
    plain,
    position,
)

DRAWING = threading.Lock()  # matplotlib keeps its settings in one place for all threads
WIDTH, HEIGHT = 820, 440  # px; matplotlib is told 72 dpi, so that one point is one pixel


class StillRenderer(MimetypeRenderer):
    """Notebook output that holds the live figure and its still SVG; no script is embedded."""

    def to_mimebundle(self, fig_dict: dict[str, Any]) -> dict[str, Any]:
        """Both forms of one figure by media type; a figure that cannot be drawn still has its live form."""
        bundle = dict(pio.renderers["plotly_mimetype"].to_mimebundle(fig_dict))
        try:
            bundle["image/svg+xml"] = figure_to_svg(go.Figure(fig_dict))
        except SvgError as reason:
            bundle["text/plain"] = f"No still picture: {reason}"
        return bundle


def show_stills() -> None:
    """From here on every figure that this kernel shows carries its still picture, for readers without a kernel."""
    pio.renderers["still"] = StillRenderer()
    pio.renderers.default = "still"


def alt_text(fig: go.Figure) -> str:
    """What the figure shows, in words: `fig.layout.meta["alt"]`, else its title."""
    layout = fig.to_dict()["layout"]
    meta = layout.get("meta")
    if isinstance(meta, dict) and meta.get("alt"):
        return str(meta["alt"])
    return plain(nested(layout, "title", "text") or "Figure without a description")


def figure_to_svg(fig: go.Figure) -> str:
    """Draw a figure as one `<svg>` element with its alt text, the same bytes each time.

    Raises `SvgError` for trace types and subplots that are not covered.

    >>> svg = figure_to_svg(go.Figure(go.Scatter(x=[0, 1], y=[2, 3], name="a < b")))
    >>> svg.startswith("<svg role="), "<script" in svg
    (True, False)
    """
    spec = decoded(fig.to_dict())
    layout = spec["layout"]
    margin = {"l": 70, "r": 30, "t": 70, "b": 60} | (layout.get("margin") or {})
    width = (layout.get("width") or WIDTH) - margin["l"] - margin["r"]
    height = (layout.get("height") or HEIGHT) - margin["t"] - margin["b"]
    settings: Any = {"font.family": "DejaVu Sans", "svg.fonttype": "none", "svg.hashsalt": "workbench"}
    out = io.StringIO()
    with DRAWING, matplotlib.rc_context(settings | {"text.parse_math": False, "font.size": 13}):
        canvas = Figure(figsize=(max(200, width) / 72, max(60, height) / 72), dpi=72)
        above: Axes | None = None
        for (bottom, top), part in _panels(spec):
            axes = canvas.add_axes((0.0, bottom, 1.0, top - bottom), sharex=above)
            names = {letter: categories(part, letter) for letter in "xy"}
            draw_traces(axes, part, names)
            for letter in "xy":
                _draw_axis(axes, part["layout"], letter, names[letter])
            _draw_shapes(axes, part["layout"], names)
            _draw_notes(axes, part["layout"], names)
            _draw_frame(axes, part)
            if above is not None:
                above.tick_params(labelbottom=False)
            above = axes
        blank = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        canvas.savefig(out, format="svg", bbox_inches="tight", pad_inches=0.15, metadata=blank)
    return _inline(out.getvalue(), alt_text(fig))


def _panels(spec: Spec) -> list[tuple[tuple[float, float], Spec]]:
    """A figure's place and its parts: one, or two with a common x axis, a second y axis below the first."""
    layout = spec["layout"]
    below = layout.get("yaxis2") or {}
    if "domain" not in below or below.get("overlaying"):
        return [((0.0, 1.0), spec)]
    upper = [trace for trace in spec["data"] if trace.get("yaxis", "y") != "y2"]
    lower = [{**trace, "yaxis": "y"} for trace in spec["data"] if trace.get("yaxis") == "y2"]
    first = {**layout, "xaxis": {**layout.get("xaxis", {}), "title": {}}}
    second = {name: value for name, value in layout.items() if name not in ("title", "shapes", "annotations")}
    return [
        (tuple(layout["yaxis"]["domain"]), {"data": upper, "layout": first}),
        (tuple(below["domain"]), {"data": lower, "layout": second | {"yaxis": below}}),
    ]


def decoded(value: Any) -> Any:
    """The same figure with plotly's packed arrays ({"dtype", "bdata", "shape"}) as plain lists."""
    if isinstance(value, dict) and "bdata" in value:
        array = np.frombuffer(base64.b64decode(value["bdata"]), dtype=np.dtype(value["dtype"]))
        shape = [int(n) for n in str(value.get("shape", len(array))).split(",")]
        return array.reshape(shape).tolist()
    if isinstance(value, dict):
        return {name: decoded(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [decoded(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _draw_axis(axes: Axes, layout: Spec, letter: str, names: list[str]) -> None:
    spec, axis = layout.get(f"{letter}axis", {}), getattr(axes, f"{letter}axis")
    limit = getattr(axes, f"set_{letter}lim")
    getattr(axes, f"set_{letter}label")(plain(nested(spec, "title", "text") or ""), fontsize=14, color=INK)
    if spec.get("type") == "log":
        getattr(axes, f"set_{letter}scale")("log")
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))  # its own writes formulas
        axis.set_minor_formatter(ticker.NullFormatter())
    if names:
        axis.set_ticks(range(len(names)), [plain(name) for name in names])
        limit(-0.6, len(names) - 0.4)
    if spec.get("tickvals"):
        axis.set_ticks(spec["tickvals"], [plain(t) for t in spec.get("ticktext", spec["tickvals"])])
        axis.set_ticks([], minor=True)  # else a logarithmic axis writes labels of its own between them
        if spec.get("tickangle"):  # clockwise there, counter-clockwise here
            axis.set_tick_params(rotation=-spec["tickangle"], labelsize=nested(spec, "tickfont", "size") or 14)
    elif spec.get("dtick"):
        axis.set_major_locator(ticker.MultipleLocator(spec["dtick"]))
    if str(spec.get("tickformat", "")).endswith("%"):
        axis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
    if spec.get("range"):
        limit(*(10**end for end in spec["range"]) if spec.get("type") == "log" else spec["range"])
    elif spec.get("rangemode") == "tozero":
        limit(0)
    if spec.get("autorange") == "reversed":
        axis.set_inverted(True)
    if spec.get("visible") is False:
        axis.set_visible(False)


def _draw_shapes(axes: Axes, layout: Spec, names: dict[str, list[str]]) -> None:
    for shape in layout.get("shapes", ()):
        (x0, x1), (y0, y1) = ([position(shape[f"{a}{i}"], names[a]) for i in "01"] for a in "xy")
        line, where = shape.get("line", {}), _transform(axes, shape)
        tint, width = matplotlib_colour(line.get("color", INK)), line.get("width", 2)
        if shape["type"] == "line":
            style: Spec = {"linestyle": DASHES.get(line.get("dash"), "-"), "zorder": 1.5}
            axes.add_artist(Line2D([x0, x1], [y0, y1], color=tint, linewidth=width, transform=where, **style))
        elif shape["type"] == "rect":
            fill = matplotlib_colour(shape.get("fillcolor", "rgba(0, 0, 0, 0)"))
            style = {"facecolor": fill, "edgecolor": tint, "linewidth": width, "zorder": 0.5}
            axes.add_artist(Rectangle((x0, y0), x1 - x0, y1 - y0, transform=where, **style))
        else:
            raise SvgError(f"a shape is a {shape['type']}; still pictures cover line and rect.")


def _draw_notes(axes: Axes, layout: Spec, names: dict[str, list[str]]) -> None:
    for note in layout.get("annotations", ()):
        at = []
        for letter in "xy":
            place = position(note.get(letter, 0.5), names[letter])
            log = layout.get(f"{letter}axis", {}).get("type") == "log" and note.get(f"{letter}ref", letter) == letter
            at.append(10**place if log else place)
        vertical = {"middle": "center", "auto": "center"}.get(note.get("yanchor", "auto"), note.get("yanchor"))
        style: Spec = {"ha": note.get("xanchor", "center").replace("auto", "center"), "va": vertical}
        style |= {"color": nested(note, "font", "color") or INK, "fontsize": nested(note, "font", "size") or 13}
        style["family"] = "DejaVu Sans Mono" if "mono" in str(nested(note, "font", "family")).lower() else "DejaVu Sans"
        if note.get("bgcolor"):
            style["bbox"] = {"facecolor": matplotlib_colour(note["bgcolor"]), "edgecolor": "none", "pad": 1.5}
        shift = (note.get("xshift", 0), note.get("yshift", 0))
        if note.get("showarrow", True):
            shift = (note.get("ax", -10), -note.get("ay", -30))
            style["arrowprops"] = {"arrowstyle": "->", "color": INK}
        where = _transform(axes, note)
        axes.annotate(
            plain(note.get("text", "")), (at[0], at[1]), shift, xycoords=where, textcoords="offset points", **style
        )


def _draw_frame(axes: Axes, spec: Spec) -> None:
    layout = spec["layout"]
    axes.set_title(plain(nested(layout, "title", "text") or ""), loc="left", fontsize=17, pad=26, color=INK)
    axes.set_axisbelow(True)
    for name, axis in (("xaxis", axes.xaxis), ("yaxis", axes.yaxis)):
        if layout.get(name, {}).get("showgrid") is not False:
            axis.grid(True, color=GRID, linewidth=1)
    for side, spine in axes.spines.items():
        spine.set_visible(
            side in ("left", "bottom") and layout.get(f"{'xy'[side == 'left']}axis", {}).get("visible", True)
        )
    shown = [trace for trace in spec["data"] if legend_label(trace)]
    if len(shown) > 1 or any(trace.get("showlegend") for trace in shown):
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, fontsize=13)


def _inline(svg: str, alt: str) -> str:
    """Make a matplotlib page fit for the inside of an HTML page: own ids, own fonts, a name for readers aloud."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.S)
    head, rest = body.split(">", 1)
    width = float(re.search(r'width="([\d.]+)pt"', head)[1])  # type: ignore[index]  # matplotlib always writes it
    view = re.search(r'viewBox="[^"]+"', head)[0]  # type: ignore[index]
    prefix = "f" + hashlib.sha256(body.encode("utf-8")).hexdigest()[:8]
    rest = re.sub(r'\bid="', f'id="{prefix}-', rest)
    rest = (
        re.sub(r'href="#', f'href="#{prefix}-', rest).replace("url(#", f"url(#{prefix}-").replace("xlink:href", "href")
    )
    rest = rest.replace("'DejaVu Sans'", "'DejaVu Sans', " + FONT.split(", ", 1)[1])
    label = html.escape(alt, quote=True)
    start = f'<svg role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg" {view}'
    return f'{start} style="width:100%;max-width:{width:.0f}px;height:auto"><title>{label}</title>{rest.strip()}'


def _transform(axes: Axes, part: Spec) -> Transform:
    """Plotly's reference frames: `paper` and `x domain` are shares of the axes, `x` and `y` are data."""
    across, up = (axes.transData if part.get(f"{a}ref", a) == a else axes.transAxes for a in "xy")
    return blended_transform_factory(across, up)
