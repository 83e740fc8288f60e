"""A grid of what each layer would say next, by condition: the logit lens as a table that can be read across the room.

Leans on plotly; the numbers are `workbench.logit_lens`'s. Not covered: whole texts, one column a token.
"""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go

from workbench.plots.drawing import Table, finish, rows_of
from workbench.plots.palette import INK, colour, faded
from workbench.plots.token_strip import visible

WIDTH = 14  # characters of a guess
MONO = {"family": "DejaVu Sans Mono, monospace", "size": 13, "color": INK}


def lens_grid(lenses: Mapping[str, Table]) -> go.Figure:
    """Most likely next token after each layer, one column a condition; the fuller the colour, the more probable.

    lenses: by condition, rows of `workbench.logit_lens` at one position: `layer`, `guess`, `probability` and `rank`;
    rows below rank 1 are left out. The deepest layer, which is the model's own output, stands on top.

    >>> row = {"layer": 0, "rank": 1, "guess": "4", "probability": 0.9}
    >>> [note.text.split() for note in lens_grid({"plain": [row]}).layout.annotations]
    [['4', '0.90']]
    """
    columns = {name: _firsts(table) for name, table in lenses.items()}
    layers = sorted({layer for guesses in columns.values() for layer in guesses})
    notes = [
        {
            "x": place, "y": layer, "bgcolor": faded(colour(name), 0.45 * share), "showarrow": False,
            "text": f"{visible(guess, WIDTH)} {share:.2f} ".replace(" ", "\u00a0"), "font": MONO,
        }
        for place, (name, guesses) in enumerate(columns.items())
        for layer, (guess, share) in guesses.items()
    ]  # fmt: skip
    fig = go.Figure(layout={"annotations": notes})
    fig.add_scatter(x=[None], y=[None], mode="markers", showlegend=False)
    ticks = {"tickvals": list(range(len(columns))), "ticktext": list(columns)}
    fig.update_xaxes(range=[-0.6, len(columns) - 0.4], showgrid=False, **ticks)
    fig.update_yaxes(range=[layers[0] - 0.7, layers[-1] + 0.7], showgrid=False, tickvals=layers, ticktext=layers)
    fig.update_layout(height=150 + 25 * len(layers), width=160 + 190 * len(columns))
    words = [
        f"{name}: " + ", ".join(f"{layer} {guess!r} {share:.2f}" for layer, (guess, share) in sorted(guesses.items()))
        for name, guesses in columns.items()
    ]
    title, below = "What each layer would say next", "condition: first guess and its probability"
    return finish(fig, title, below, "layer (decoder block)", "First guess by layer. " + "; ".join(words) + ".")


def _firsts(table: Table) -> dict[int, tuple[str, float]]:
    """The first guess of each layer and its probability."""
    rows = rows_of(table, ("layer", "rank", "guess", "probability"))
    return {int(row["layer"]): (str(row["guess"]), float(row["probability"])) for row in rows if row["rank"] == 1}
