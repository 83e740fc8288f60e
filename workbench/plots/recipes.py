"""Recipes for data side by side: what each kept, how long and how varied it is, and what it cost."""

from __future__ import annotations

import plotly.graph_objects as go

from workbench.plots.drawing import Table, error_bars, finish, rows_of

BAR = "#56B4E9"  # sky blue, which no condition has
COLUMNS = (("tokens", "tokens", "{:g}"), ("variety", "variety", "{:.0f} %"), ("cost", "sampled", "{:.0f}"))


def recipes_beside(table: Table) -> go.Figure:
    """One bar a recipe, with three numbers beside it. Rows need `recipe`, `n`, `share`, `tokens`, `variety`, `cost`.

    share: kept of `n` asked, with Wilson's interval. Exact, over all of a set's records, are `tokens` (median of an
    answer), `variety` (Vendi score as a share of the records, in per cent) and `cost` (sampled tokens a kept record).

    >>> row = {"recipe": "rejection", "n": 10, "share": 0.8, "tokens": 50, "variety": 40, "cost": 90}
    >>> recipes_beside([row]).data[0].x
    (0.8,)
    """
    rows = rows_of(table, ("recipe", "n", "share", *(name for name, *_ in COLUMNS)))
    names = [str(row["recipe"]) for row in rows]
    fig = go.Figure(
        go.Bar(
            x=[row["share"] for row in rows], y=names, orientation="h", showlegend=False,
            marker={"color": BAR}, error_x=error_bars(rows, "share"),
        )
    )  # fmt: skip
    for place, (field, heading, form) in enumerate(COLUMNS):
        x = 1.12 + 0.16 * place
        fig.add_annotation(x=x, y=1.0, yref="paper", yanchor="bottom", text=heading, showarrow=False)
        for name, row in zip(names, rows, strict=True):
            fig.add_annotation(x=x, y=name, text=form.format(row[field]), showarrow=False)
    words = "; ".join(
        f"{row['recipe']}: kept {row['share']:.0%} of {row['n']}, {row['tokens']:g} tokens an answer, variety "
        f"{row['variety']:.0f} %, {row['cost']:.0f} sampled tokens a record"
        for row in rows
    )
    fig.update_yaxes(autorange="reversed", type="category", showgrid=False)
    fig.update_xaxes(range=[0, 1.52], tickvals=[0, 0.25, 0.5, 0.75, 1], tickformat=".0%")
    fig.update_layout(height=170 + 42 * len(rows))
    return finish(fig, "Recipes side by side", "share of the questions asked that gave a record", "", f"Bars: {words}.")
