"""Tokens as a reader sees them, one box each, coloured by what was done there: trained on, steered at, cache edited.

Spaces and line breaks are made visible, since where a token ends is what such a picture is for. Leans on plotly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from workbench.plots.drawing import PlotError, Table, finish, rows_of
from workbench.plots.palette import INK, colour, faded

CHOSEN, OTHER = "#bfe3f7", "#ececec"
LINE = 78  # characters of one row of boxes
WIDTH = 740  # px: the boxes of a line then stand close, as far as fonts agree
MOST = 400  # tokens: more can't be read, and the figure would pass 200 KB


def token_mask(
    tokens: Sequence[str], mask: Sequence[bool], chosen: str = "trained on", other: str = "context only"
) -> go.Figure:
    """Strip of token texts; those with a true mask are blue. `tokens` and `mask` have equal lengths, at most 400.

    >>> fig = token_mask(["2", " + 2", "\\n", "4"], [False, False, False, True])
    >>> [note.text for note in fig.layout.annotations]
    ['2', '·+·2', '↵', '4']
    """
    if len(tokens) != len(mask) or not 0 < len(tokens) <= MOST:
        raise PlotError(
            f"token_mask needs 1 to {MOST} tokens and as many mask values; got {len(tokens)} and {len(mask)}."
        )
    boxes, row = _boxes(((token, CHOSEN if marked else OTHER) for token, marked in zip(tokens, mask, strict=True)), 0)
    fig = _figure(boxes, row, {chosen: CHOSEN, other: OTHER})
    count = sum(map(bool, mask))
    return finish(fig, f"{count} of {len(tokens)} tokens are {chosen}", "", "", f"Token texts; the rest is {other}.")


def trace_strip(traces: Mapping[str, Table]) -> go.Figure:
    """Prompt and answer under each condition; the darker a token, the further an intervention moved it.

    traces: by condition, rows of `workbench.trace(..., untouched=True)`: `position`, `token`, `part`, `amount`. What
    acts in several layers at one token counts by its largest amount. Of a long text the last 60 prompt tokens and the
    first 140 of the answer are drawn; the words count all.
    """
    boxes: list[dict[str, Any]] = []
    line, words, legend = -1.0, [], {}
    for name, table in traces.items():
        tokens = _tokens(rows_of(table, ("position", "token", "part", "amount")))
        most = max(amount for _, _, amount in tokens) or 1.0
        for part, (start, stop) in {"prompt": (-60, None), "generated": (None, 140)}.items():
            own = [(token, amount) for token, where, amount in tokens if where == part]
            shown = [
                (token, faded(colour(name), 0.15 + 0.4 * a / most) if a else OTHER) for token, a in own[start:stop]
            ]
            left_out = len(own) - len(shown)
            if left_out:
                shown.insert(0 if part == "prompt" else len(shown), (f"… {left_out} more …", "#ffffff"))
            said = f"<b>{name}</b>: the {'prompt' if part == 'prompt' else 'answer'}"
            boxes.append(_box(0.0, line + 1.2, said) | {"font": {"size": 13, "color": colour(name)}})
            row, line = _boxes(shown, line + 2.1)
            boxes += row
        count = {part: sum(a > 0 for _, where, a in tokens if where == part) for part in ("prompt", "generated")}
        words.append(f"{name}: acted at {count['prompt']} prompt and {count['generated']} answer tokens")
        if sum(count.values()):
            legend[f"{name} acted here"] = faded(colour(name), 0.55)
    fig = _figure(boxes, line, legend | {"untouched": OTHER})
    return finish(fig, "Where it acted, token by token", "", "", "; ".join(words) + ".")


def visible(token: str, width: int = 0) -> str:
    """A token's text with its spaces and line breaks to be seen, safe in a figure's label.

    width: centre it among no-break spaces, and cut what is longer.

    >>> visible(" a\\n"), visible("<|end|>"), visible("")
    ('·a↵', '&lt;|end|>', '∅')
    """
    text = token.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥") or "∅"
    if width:
        text = (text if len(text) <= width else f"{text[: width - 1]}…").center(width, "\u00a0")
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _tokens(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, float]]:
    """Text, part and largest amount of every position, in order."""
    found: dict[int, tuple[str, str, float]] = {}
    for row in rows:
        before = found.get(row["position"], ("", "", 0.0))[2]
        found[row["position"]] = (row["token"], row["part"], max(before, float(row["amount"])))
    return [found[position] for position in sorted(found)]


def _boxes(tokens: Iterable[tuple[str, str]], row: float) -> tuple[list[dict[str, Any]], float]:
    """One box a token, in lines from `row` on; and the last line used."""
    boxes, column = [], 0.0
    for token, fill in tokens:
        text = visible(token)
        width = len(token) or 1
        if column and column + width > LINE:
            column, row = 0.0, row + 1
        boxes.append(_box(column, row, text) | {"bgcolor": fill})
        column += width + 0.8
    return boxes, row


def _box(column: float, row: float, text: str) -> dict[str, Any]:
    return {"x": column, "y": row, "text": text, "showarrow": False, "xanchor": "left"}


def _figure(boxes: list[dict[str, Any]], last: float, legend: Mapping[str, str]) -> go.Figure:
    mono = {"family": "DejaVu Sans Mono, monospace", "size": 12, "color": INK}
    # all boxes at once: adding them one by one takes a time that grows with their square
    fig = go.Figure(layout={"annotations": [{"font": mono} | box for box in boxes]})
    for name, fill in legend.items():
        fig.add_scatter(
            x=[None], y=[None], mode="markers", name=name, marker={"color": fill, "symbol": "square", "size": 13}
        )
    fig.update_xaxes(range=[-0.5, LINE + 2], visible=False)
    fig.update_yaxes(range=[last + 0.7, -0.7], visible=False)
    return fig.update_layout(
        height=150 + round(30 * (last + 1)),
        width=WIDTH,
        legend={"orientation": "h", "y": 0.0, "yanchor": "top"},
        showlegend=True,
    )
