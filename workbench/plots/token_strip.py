"""Tokens as a reader sees them, one box each, coloured by a yes or no: trained on, steered at, edited in the cache.

Spaces and line breaks are made visible, since where a token ends is what such a picture is for. Leans on plotly.
"""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from workbench.plots.drawing import PlotError, finish

CHOSEN, OTHER = "#bfe3f7", "#ececec"
LINE = 78  # characters of one row of boxes
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
    boxes, column, row = [], 0.0, 0
    for token, marked in zip(tokens, mask, strict=True):
        text = token.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥") or "∅"
        if column and column + len(text) > LINE:
            column, row = 0.0, row + 1
        shown = text.replace("&", "&amp;").replace("<", "&lt;")
        fill = CHOSEN if marked else OTHER
        boxes.append({"x": column, "y": row, "text": shown, "showarrow": False, "xanchor": "left", "bgcolor": fill})
        column += len(text) + 0.8
    mono = {"family": "DejaVu Sans Mono, monospace", "size": 12}
    # all boxes at once: adding them one by one takes a time that grows with their square
    fig = go.Figure(layout={"annotations": [box | {"font": mono} for box in boxes]})
    for name, fill in ((chosen, CHOSEN), (other, OTHER)):
        fig.add_scatter(
            x=[None], y=[None], mode="markers", name=name, marker={"color": fill, "symbol": "square", "size": 13}
        )
    fig.update_xaxes(range=[-0.5, LINE + 2], visible=False)
    fig.update_yaxes(range=[row + 0.7, -0.7], visible=False)
    fig.update_layout(
        height=150 + 30 * (row + 1), legend={"orientation": "h", "y": 0.0, "yanchor": "top"}, showlegend=True
    )
    count = sum(map(bool, mask))
    return finish(fig, f"{count} of {len(tokens)} tokens are {chosen}", "", "", f"Token texts; the rest is {other}.")
