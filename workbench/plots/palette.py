"""One look for every figure: a colour and marker per condition name that never changes, fonts that a back row can read.

Colours are those of Okabe and Ito 2008 ("Color Universal Design", safe for the common kinds of colour blindness), with
the muted set of Paul Tol 2021 for other names. A colour depends on the name alone, so the same condition looks the same
in every notebook, whatever stands beside it; markers differ too, for print in grey. A name that is not well known gets
one of eight colours and one of five markers by its hash, so two such names may share a colour, seldom both.
"""

from __future__ import annotations

import hashlib
import re

import plotly.graph_objects as go

INK, GRID, CARD = "#222222", "#e4e4e4", "#ffffff"
FONT = "DejaVu Sans, Verdana, Arial, sans-serif"

RESERVED = {
    "plain": ("#000000", "circle"),
    "few-shot steps": ("#E69F00", "square"),
    "tuned": ("#009E73", "diamond"),
    "residual-steered": ("#0072B2", "triangle-up"),
    "KV-steered": ("#CC79A7", "triangle-down"),
    "tuned + steered": ("#D55E00", "star"),
    "random": ("#666666", "x"),
}
ALIASES = {
    "base": "plain",
    "few-shot": "few-shot steps",
    "3 shots": "few-shot steps",
    "steered": "residual-steered",
    "residual": "residual-steered",
    "kv": "KV-steered",
    "random direction": "random",
}
OTHER_COLOURS = ("#332288", "#117733", "#999933", "#AA4499", "#44AA99", "#CC6677", "#DDCC77", "#6699CC")
OTHER_SYMBOLS = ("hexagon", "pentagon", "cross", "triangle-left", "triangle-right")


def colour(condition: str) -> str:
    """Colour of a condition as #rrggbb; well-known names have their own, any other name always gets the same one.

    >>> colour("tuned"), colour("Tuned"), colour("kv_steered") == colour("KV-steered")
    ('#009E73', '#009E73', True)
    """
    return _look(condition)[0]


def symbol(condition: str) -> str:
    """Plotly marker name of a condition, fixed like its colour.

    >>> symbol("plain")
    'circle'
    """
    return _look(condition)[1]


def faded(hex_colour: str, alpha: float) -> str:
    """The same colour with an opacity of 0..1, as plotly writes it.

    >>> faded("#0072B2", 0.2)
    'rgba(0, 114, 178, 0.2)'
    """
    red, green, blue = (int(hex_colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {alpha:g})"


def luminance(rgb: tuple[float, float, float]) -> float:
    """Relative luminance of a colour of 0..255 a channel, 0 for black and 1 for white, by WCAG 2.2's definition."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (channel / 255 for channel in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: tuple[float, float, float], other: tuple[float, float, float]) -> float:
    """WCAG's contrast ratio of two colours, from 1 to 21; text to be read by all needs 4.5.

    >>> contrast((0, 0, 0), (255, 255, 255))
    21.0
    """
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def ink_on(rgb: tuple[float, float, float]) -> str:
    """Black or white, whichever is read better on a colour: one of them always has a contrast above 4.5.

    >>> ink_on((255, 255, 255)), ink_on((0, 114, 178))
    ('#000000', '#ffffff')
    """
    return "#000000" if contrast(rgb, (0, 0, 0)) >= contrast(rgb, (255, 255, 255)) else "#ffffff"


def template() -> go.layout.Template:
    """Neutral plotly template: white ground, light grid, 14 px text; nothing global is changed."""
    axis = {
        "gridcolor": GRID,
        "linecolor": INK,
        "showline": True,
        "ticks": "outside",
        "automargin": True,
        "zeroline": False,
        "title": {"standoff": 12},  # else a title stands in wide tick labels
    }
    title = {"x": 0.0, "xref": "paper", "xanchor": "left", "font": {"size": 17}}
    return go.layout.Template(
        layout={
            "font": {"family": FONT, "size": 14, "color": INK},
            "title": title,
            "paper_bgcolor": CARD,
            "plot_bgcolor": CARD,
            "xaxis": axis,
            "yaxis": axis,
            "margin": {"l": 70, "r": 30, "t": 70, "b": 60},
            "hoverlabel": {"font": {"family": FONT, "size": 13}},
        }
    )


def _look(condition: str) -> tuple[str, str]:
    known = {_key(name): look for name, look in RESERVED.items()}
    known |= {_key(alias): RESERVED[name] for alias, name in ALIASES.items()}
    key = _key(condition)
    if key in known:
        return known[key]
    number = int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:4], "big")
    return OTHER_COLOURS[number % len(OTHER_COLOURS)], OTHER_SYMBOLS[number // len(OTHER_COLOURS) % len(OTHER_SYMBOLS)]


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", str(name)).lower()
