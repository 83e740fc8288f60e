"""One function, one figure: the pictures of every stage, each with its intervals and a text that says what it shows.

A function takes plain rows (a list of dicts, or a data frame) and returns a `plotly` figure; it neither shows nor
writes. `fig.layout.meta["alt"]` holds the same facts in words. A measured share or mean without an interval is refused:
give `low` and `high`, or `n` for a share. Not covered: live controls, and static pictures, which `svg` makes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.plots.drawing import (
    PlotError,
    Table,
    drawn_as,
    error_bars,
    finish,
    in_brackets,
    listed,
    p_text,
    rows_of,
    series,
)
from workbench.plots.evaluation import cost_front, reliability, robustness
from workbench.plots.lens import lens_grid
from workbench.plots.palette import GRID, INK, colour, faded, symbol
from workbench.plots.recipes import recipes_beside
from workbench.plots.steering import behaviour_damage, layer_effect, strength_curve
from workbench.plots.token_strip import token_mask, trace_strip
from workbench.plots.training import sweep_map, training_curve

__all__ = [
    "PlotError",
    "accuracy_tokens",
    "behaviour_damage",
    "cost_front",
    "data_lengths",
    "forest",
    "kept_share",
    "layer_effect",
    "lens_grid",
    "loss_curve",
    "recipes_beside",
    "reliability",
    "robustness",
    "strength_curve",
    "sweep_map",
    "token_mask",
    "trace_strip",
    "training_curve",
]

KEPT, REJECTED = "#56B4E9", "#882255"  # sky blue and wine, which no condition has


def data_lengths(records: Table, tokens: str = "tokens_out") -> go.Figure:
    """Histogram of token lengths, kept beside rejected; records need `tokens_out` (tokens) and `kept`. Exact counts.

    >>> fig = data_lengths([{"tokens_out": 4, "kept": True}, {"tokens_out": 9, "kept": False}])
    >>> [trace.name for trace in fig.data]
    ['kept (1)', 'rejected (1)']
    """
    rows = rows_of(records, (tokens,))
    lengths = np.array([float(row[tokens]) for row in rows])
    kept = np.array([bool(row.get("kept", True)) for row in rows])
    step = max(1, math.ceil((lengths.max() - lengths.min() + 1) / 40))
    edges = np.arange(math.floor(lengths.min()), lengths.max() + step + 1, step)
    fig, words = go.Figure(), []
    for name, chosen, fill in (("kept", kept, KEPT), ("rejected", ~kept, REJECTED)):
        if not chosen.any():
            continue
        counts = np.histogram(lengths[chosen], edges)[0]
        centres = (edges[:-1] + (step - 1) / 2).tolist()
        words.append(f"{chosen.sum()} {name}, median {np.median(lengths[chosen]):g} tokens")
        fig.add_bar(x=centres, y=counts.tolist(), name=f"{name} ({chosen.sum()})", marker={"color": fill}, width=step)
    fig.update_layout(barmode="stack", bargap=0)
    return finish(
        fig, "Length of the answers", "tokens in the answer", "records", "Histogram: " + "; ".join(words) + "."
    )


def kept_share(card: Mapping[str, Any]) -> go.Figure:
    """Share of questions kept, and rejected by reason, with Wilson intervals.

    `card` is a record card: {"counts": {"questions": 90, "kept": 60, "rejected": {"wrong answer": 30}}}.

    >>> kept_share({"counts": {"questions": 4, "kept": 3, "rejected": {"wrong answer": 1}}}).data[0].x
    (0.75, 0.25)
    """
    counts = card.get("counts", card)
    if missing := [name for name in ("questions", "kept", "rejected") if name not in counts]:
        raise PlotError(
            f"kept_share needs a card with counts of {', '.join(missing)}; found {', '.join(counts) or 'none'}."
        )
    n = int(counts["kept"]) + sum(counts["rejected"].values())  # more than the questions where each may give several
    if n < 1:
        raise PlotError("kept_share got a card of 0 questions: nothing was made, so there is no share to draw.")
    what = "questions" if n == counts["questions"] else "records"
    outcomes = [("kept", int(counts["kept"]))]
    outcomes += sorted(
        ((reason, int(number)) for reason, number in counts["rejected"].items()), key=lambda item: -item[1]
    )
    rows = [{"share": number / n, "n": n} for _, number in outcomes]
    names = [f"{reason[:48]} ({number})" for reason, number in outcomes]
    fig = go.Figure(
        go.Bar(
            x=[row["share"] for row in rows],
            y=names,
            orientation="h",
            marker={"color": [KEPT] + [faded(REJECTED, 0.55)] * (len(rows) - 1)},
            error_x=error_bars(rows, "share"),
            showlegend=False,
        )
    )
    fig.update_yaxes(autorange="reversed", type="category")
    fig.update_xaxes(range=[0, 1], tickformat=".0%")
    words = "; ".join(f"{reason} {number / n:.0%}" for reason, number in outcomes)
    fig.update_layout(height=170 + 42 * len(rows))
    return finish(fig, f"What became of {n} {what}", f"share of {what}", "", f"Bars of {n} {what}: {words}.")


def loss_curve(losses: Sequence[float] | Table) -> go.Figure:
    """Training loss (nats a token) by step: each logged value, the running median and the band that holds 80 % of them.

    `losses` are numbers in order, or rows with `step` and `loss` (and `eval_loss`), as a trainer logs them.

    >>> loss_curve([3.0, 2.0, 1.5]).data[0].y
    (3.0, 2.0, 1.5)
    """
    rows = [row if isinstance(row, Mapping) else {"loss": row} for row in listed(losses)]
    steps, values = series(rows, "loss")
    if not values:
        raise PlotError(
            "loss_curve got no loss: pass numbers, or rows with `step` and `loss`. Did the training log any step?"
        )
    window = max(1, len(values) // 25)
    fig, words = (
        go.Figure(),
        f"Training loss from {values[0]:.3g} at step {steps[0]:g} to {values[-1]:.3g} at {steps[-1]:g}.",
    )
    raw = {"color": colour("tuned") if window == 1 else faded(colour("tuned"), 0.35), "width": 2 if window == 1 else 1}
    fig.add_scatter(x=steps, y=values, mode=drawn_as(steps), name="training loss", line=raw)
    if window > 1:
        rolling = pd.Series(values).rolling(2 * window + 1, center=True, min_periods=1)
        low, middle, high = (rolling.quantile(q).round(5).tolist() for q in (0.1, 0.5, 0.9))
        band = faded(colour("tuned"), 0.18)
        outline = {"x": steps + steps[::-1], "y": high + low[::-1]}
        fig.add_scatter(
            **outline, fill="toself", fillcolor=band, line={"width": 0}, mode="lines", name="80 % of steps nearby"
        )
        fig.add_scatter(
            x=steps, y=middle, mode="lines", name="running median", line={"color": colour("tuned"), "width": 2.5}
        )
    held_steps, held = series(rows, "eval_loss")
    if held:
        words += f" Held-out loss ends at {held[-1]:.3g}."
        line = {"color": INK, "width": 2, "dash": "dash"}
        fig.add_scatter(x=held_steps, y=held, mode="lines+markers", name="held-out loss", line=line, marker={"size": 8})
    return finish(fig, "Training loss", "optimizer step", "loss (nats a token)", words)


def forest(comparisons: Table) -> go.Figure:
    """Paired differences b - a with intervals and a zero line; filled markers have p below 0.05 after Holm.

    Rows (dicts, or objects with these fields): `a`, `b`, `difference`, `low`, `high`, `p_holm` (or `p_value`), `n`.

    >>> forest([{"a": "plain", "b": "tuned", "difference": 0.2, "low": 0.1, "high": 0.3, "p_holm": 0.01}]).data[0].x
    (0.2,)
    """
    rows = rows_of(comparisons, ("a", "b", "difference"))
    fig, words = go.Figure(), []
    for row in rows:
        label = f"{row['b']} \u2212 {row['a']}"
        p = row.get("p_holm", row.get("p_value"))
        shape = symbol(row["b"]) + ("" if p is not None and p < 0.05 else "-open")
        fig.add_scatter(
            x=[row["difference"]],
            y=[label],
            error_x=error_bars([row], "difference", thickness=2.5) | {"color": colour(row["b"])},
            mode="markers",
            marker={
                "color": colour(row["b"]),
                "symbol": shape,
                "size": 12,
                "line": {"width": 2, "color": colour(row["b"])},
            },
            name=label,
            showlegend=False,
        )
        numbers = f"{row['difference']:+.2f} {in_brackets(row, 'difference')}"
        numbers += "" if p is None else f", {p_text(p)}{' (Holm)' if row.get('p_holm') is not None else ''}"
        fig.add_annotation(
            x=1.02, xref="paper", xanchor="left", y=label, text=numbers, showarrow=False, font={"size": 13}
        )
        words.append(f"{row['b']} minus {row['a']} {numbers}")
    fig.add_vline(x=0, line={"color": INK, "width": 1.5})
    fig.update_yaxes(autorange="reversed", type="category", gridcolor=GRID)
    fig.update_layout(height=170 + 46 * len(rows), margin={"r": 290})
    title = "Paired differences on the same questions"
    return finish(fig, title, "difference in share of right answers", "", "Differences: " + "; ".join(words) + ".")


def accuracy_tokens(table: Table) -> go.Figure:
    """Accuracy against the tokens an answer costs, one point a condition, with intervals; up and to the left is better.

    Rows: `condition`, `accuracy`, `low`, `high` (or `n`), `tokens_out` (mean a question), optionally `tokens_out_low`
    and `tokens_out_high`.
    """
    rows = rows_of(table, ("condition", "accuracy", "tokens_out"))
    fig, words = go.Figure(), []
    for row in rows:
        name = str(row["condition"])
        spread = {}
        if row.get("tokens_out_low") is not None:
            spread = {
                "error_x": error_bars([row], "tokens_out", "tokens_out_low", "tokens_out_high")
                | {"color": colour(name)}
            }
        fig.add_scatter(
            x=[row["tokens_out"]],
            y=[row["accuracy"]],
            error_y=error_bars([row], "accuracy", thickness=2) | {"color": colour(name)},
            mode="markers",
            marker={"color": colour(name), "symbol": symbol(name), "size": 13},
            name=name,
            showlegend=True,
            **spread,
        )
        words.append(f"{name} {row['accuracy']:.2f} {in_brackets(row, 'accuracy')} at {row['tokens_out']:.0f} tokens")
    fig.update_yaxes(range=[-0.03, 1.05], tickformat=".0%")
    if max(row["tokens_out"] for row in rows) > 20 * max(1, min(row["tokens_out"] for row in rows)):
        fig.update_xaxes(type="log")
    else:
        fig.update_xaxes(rangemode="tozero")
    title = "Accuracy and its price in tokens"
    return finish(fig, title, "tokens out, mean a question", "right answers", "By condition: " + "; ".join(words) + ".")
