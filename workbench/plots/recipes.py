"""Recipes for data side by side: what each kept, how long and how varied it is, and what it cost."""

from __future__ import annotations

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.plots.drawing import Table, error_bars, finish, rows_of
from workbench.plots.palette import colour

PANELS = (
    ("share", "kept of what was asked"),
    ("tokens", "median tokens of an answer"),
    ("variety", "different records, of 100"),
    ("cost", "sampled tokens a kept record"),
)


def recipes_beside(table: Table) -> go.Figure:
    """Four bars a recipe. Rows need `recipe`, `n` (asked), `share` (kept, of n), `tokens`, `variety` and `cost`.

    The share has Wilson's interval from n; the others are counts over all of a set's records, and exact. `variety` is
    a Vendi score as a share of the records, in per cent.

    >>> row = {"recipe": "rejection", "n": 10, "share": 0.8, "tokens": 50, "variety": 40, "cost": 90}
    >>> [bar.x for bar in recipes_beside([row]).data]
    [(0.8,), (50,), (40,), (90,)]
    """
    rows = rows_of(table, ("recipe", "n", *(name for name, _ in PANELS)))
    names = [str(row["recipe"]) for row in rows]
    fig = make_subplots(rows=1, cols=len(PANELS), shared_yaxes=True, horizontal_spacing=0.03)
    for place, (field, _) in enumerate(PANELS, start=1):
        bars = go.Bar(
            x=[row[field] for row in rows], y=names, orientation="h", showlegend=False,
            marker={"color": [colour(name) for name in names]},
            error_x=error_bars(rows, "share") if field == "share" else None,
        )  # fmt: skip
        fig.add_trace(bars, row=1, col=place)
    words = "; ".join(
        f"{row['recipe']}: kept {row['share']:.0%}, {row['tokens']:g} tokens, variety {row['variety']:.0f} %, "
        f"{row['cost']:.0f} sampled tokens a record"
        for row in rows
    )
    fig.update_yaxes(autorange="reversed", type="category")
    fig.update_layout(height=150 + 46 * len(rows), bargap=0.35)
    done = finish(fig, "Recipes side by side", "", "", f"Bars: {words}.")
    for place, (_, title) in enumerate(PANELS, start=1):
        done.update_xaxes(title={"text": title, "font": {"size": 12}}, row=1, col=place)
    return done
