"""Figures of a comparison at equal damage: the arms side by side, what each buys for its KL, keys that move, attention.

Rows come from `claims` and `readouts`. The arms of `claims.arms` have looks of their own here, kin to those of
the plain, residual and KV conditions everywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from workbench.claims import arms
from workbench.plots.drawing import Table, error_bars, finish, in_brackets, is_missing, limits, rows_of
from workbench.plots.palette import GRID, colour, symbol
from workbench.plots.steering import behaviour_damage

LARGEST = 14  # px of a marker that lies on others
LOOKS = {
    arms.TOLD: ("#E69F00", "square"),
    arms.LAST: ("#0072B2", "triangle-up"),
    arms.EACH: ("#56B4E9", "triangle-left"),
    arms.VALUES: ("#CC79A7", "triangle-down"),
    arms.KEYS: ("#882255", "triangle-right"),
    arms.AS_CACHED: ("#D55E00", "diamond"),
    **dict.fromkeys(arms.FLOORS, ("#666666", "x")),
}


def equal_damage(table: Table, budget: float | None = None) -> go.Figure:
    """Right answers (filled) and answers with steps (open) of every arm, each with its interval; at the right its KL.

    Rows as `cache_steering.report` gives them: `condition`, `accuracy`, `low`, `high`, `steps`, `steps_low`,
    `steps_high`,
    `kl`, `kl_low`, `kl_high` (of a prompt `kl_prompt`, ...). An arm without numbers keeps its line and says so.
    """
    rows = rows_of(table, ("condition",))
    fig, words = go.Figure(), []
    for row in rows:
        name = str(row["condition"])
        tint, shape = LOOKS.get(name, (colour(name), symbol(name)))
        if is_missing(row.get("accuracy")):
            text = "not brought to the budget"
            fig.add_scatter(x=[None], y=[name], showlegend=False)
        else:
            for key, low, high, mark, size in (
                ("steps", "steps_low", "steps_high", f"{shape}-open", 11),
                ("accuracy", "low", "high", shape, 13),
            ):
                bars = error_bars([row], key, low, high, thickness=2) | {"color": tint}
                marker = {"color": tint, "symbol": mark, "size": size, "line": {"width": 2, "color": tint}}
                fig.add_scatter(x=[row[key]], y=[name], error_x=bars, mode="markers", marker=marker, showlegend=False)
            kl = "kl_prompt" if is_missing(row.get("kl")) else "kl"
            bottom, top = limits(row, kl, f"{kl}_low", f"{kl}_high")
            text = "0" if row[kl] == 0 else f"{row[kl]:.2f} [{bottom:.2f}, {top:.2f}]"
            words.append(f"{name} right {row['accuracy']:.2f} {in_brackets(row, 'accuracy')}, steps {row['steps']:.2f}")
        fig.add_annotation(x=1.02, xref="paper", xanchor="left", y=name, text=text, showarrow=False, font={"size": 13})
    top_line = "KL, nats" if budget is None else f"KL, nats (budget {budget:g})"
    place = {"x": 1.02, "xref": "paper", "xanchor": "left", "y": 1.0, "yref": "paper", "yanchor": "bottom"}
    fig.add_annotation(**place, text=f"<b>{top_line}</b>", showarrow=False, font={"size": 13})
    fig.update_yaxes(autorange="reversed", type="category", gridcolor=GRID)
    fig.update_xaxes(range=[-0.03, 1.05], tickformat=".0%")
    fig.update_layout(height=190 + 40 * len(rows), margin={"r": 190})
    said = "On questions that nothing was chosen on: " + "; ".join(words) + "."
    return finish(fig, "Every arm at the same KL", "share of answers (filled: right; open: with steps)", "", said)


def bought(curve: Table, behaviour: str = "accuracy", budget: float | None = None) -> go.Figure:
    """`behaviour_damage` of `cache_steering.around`: each arm at fractions and multiples of its calibrated strength."""
    fig = behaviour_damage(curve, behaviour, budget)
    for trace in fig.data:
        if trace.name in LOOKS:
            tint, shape = LOOKS[trace.name]
            opened = "-open" if str(trace.marker.symbol).endswith("-open") else ""
            trace.update(line={"color": tint}, marker={"color": tint, "symbol": shape + opened})
            trace.marker.size = min(trace.marker.size, LARGEST)
            trace.update(error_x={"color": tint}, error_y={"color": tint})
    return fig


def moved_keys(table: Table) -> go.Figure:
    """How far a cached key is from itself when its text moves, as it is and un-rotated; a value beside it.

    Rows as `key_shift` gives them. Lines are means over layers (an exact calculation on one text: no interval).
    """
    rows = pd.DataFrame(rows_of(table, ("layer", "shift", "key", "key_unrotated", "value")))
    means = rows.groupby("shift")[["key", "key_unrotated", "value"]].mean()
    fig, words = go.Figure(), []
    for column, name, arm, dash in (
        ("key", "key as cached", arms.AS_CACHED, "solid"),
        ("key_unrotated", "key, un-rotated", arms.KEYS, "solid"),
        ("value", "value", arms.VALUES, "dot"),
    ):
        tint, shape = LOOKS[arm]
        line = {"color": tint, "width": 2.5, "dash": dash}
        fig.add_scatter(
            x=means.index.tolist(), y=means[column].tolist(), mode="lines+markers", name=name, line=line,
            marker={"color": tint, "symbol": shape, "size": 10},
        )  # fmt: skip
        words.append(f"{name} {means[column].iloc[-1]:.2g} at a shift of {means.index[-1]}")
    fig.update_xaxes(type="log", tickvals=means.index.tolist(), ticktext=[str(shift) for shift in means.index])
    fig.update_yaxes(rangemode="tozero")
    said = "Relative distance, mean over layers: " + "; ".join(words) + "."
    return finish(fig, "The same token, further along", "shift (tokens)", "distance from itself (relative)", said)


def attention_heads(tables: Mapping[str, Table]) -> go.Figure:
    """Attention from the last token to one position: a point a head, layers along; one colour a condition.

    tables: by condition, rows as `workbench.attention_to` gives them: `layer`, `head`, `weight`. One text, so no
    interval.

    >>> row = {"layer": 0, "head": 0, "position": 2, "token": "a", "weight": 0.5}
    >>> attention_heads({"plain": [row]}).data[0].y
    (0.5,)
    """
    fig, words = go.Figure(), []
    for place, (name, table) in enumerate(tables.items()):
        rows = rows_of(table, ("layer", "head", "weight"))
        tint, shape = LOOKS.get(name, (colour(name), symbol(name)))
        aside = 0.16 * (place - (len(tables) - 1) / 2)  # so that conditions stand side by side
        fig.add_scatter(
            x=[row["layer"] + aside for row in rows], y=[row["weight"] for row in rows], mode="markers", name=name,
            marker={"color": tint, "symbol": f"{shape}-open", "size": 10, "line": {"width": 2, "color": tint}},
            text=[f"layer {row['layer']}, head {row['head']}" for row in rows], showlegend=True,
        )  # fmt: skip
        most = max(rows, key=lambda row: row["weight"])
        words.append(f"{name}: most {most['weight']:.2f}, by head {most['head']} of layer {most['layer']}")
    layers = sorted({row["layer"] for table in tables.values() for row in rows_of(table, ("layer",))})
    fig.update_xaxes(tickvals=layers[:: max(1, len(layers) // 16)])
    fig.update_yaxes(range=[-0.03, 1.05])
    return finish(fig, "Who looks at the edited token", "layer", "attention of each head", "; ".join(words) + ".")
