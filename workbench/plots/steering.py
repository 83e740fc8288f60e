"""Figures of an intervention's dials: what strength does, which layer works, what it costs; `plots` offers them too.

Choose strength and layer on the tuning split and report on another: the best of many points is partly luck.
"""

from __future__ import annotations

import math

import plotly.graph_objects as go

from workbench.plots.drawing import (
    PlotError,
    Row,
    Table,
    error_bars,
    finish,
    in_brackets,
    is_missing,
    limits,
    log_axis,
    rows_of,
)
from workbench.plots.palette import INK, colour, faded, symbol

BROKEN = "#882255"  # wine, which no condition has
SIZE = 10.0  # px of a marker


def strength_curve(table: Table) -> go.Figure:
    """Accuracy and share of answers with steps against steering strength; the sweet spot and the breakdown are marked.

    Rows: `strength`, `accuracy`, `low`, `high` (or `n`), optionally `steps`, `steps_low`, `steps_high` (or `n`) and
    `condition`. Sweet spot: the highest accuracy. Breakdown: strengths beyond it whose interval lies wholly below the
    sweet spot's. Marks are drawn where a single condition is left beside random ones.
    """
    rows = sorted(rows_of(table, ("strength", "accuracy")), key=lambda row: row["strength"])
    names = list(dict.fromkeys(row.get("condition", "residual-steered") for row in rows))
    fig, words = go.Figure(), []
    for name in names:
        own = [row for row in rows if row.get("condition", "residual-steered") == name]
        lead = f"{name}: " if len(names) > 1 else ""
        x, bars, look = [row["strength"] for row in own], error_bars(own, "accuracy", thickness=2), symbol(name)
        line, marker = {"color": colour(name), "width": 2.5}, {"color": colour(name), "symbol": look, "size": 10}
        y = [row["accuracy"] for row in own]
        fig.add_scatter(x=x, y=y, error_y=bars, mode="lines+markers", name=f"{lead}right", line=line, marker=marker)
        if not any(is_missing(row.get("steps")) for row in own):
            bars, y = error_bars(own, "steps", "steps_low", "steps_high"), [row["steps"] for row in own]
            line, marker = line | {"width": 1.5, "dash": "dot"}, marker | {"symbol": f"{look}-open", "size": 8}
            fig.add_scatter(
                x=x, y=y, error_y=bars, mode="lines+markers", name=f"{lead}with steps", line=line, marker=marker
            )
        best, broken, said = _sweet_spot(own)
        words.append(lead + said)
        if [other for other in names if colour(other) != colour("random")] == [name]:
            _mark_strengths(fig, own, best, broken)
    fig.update_yaxes(range=[-0.03, 1.08], tickformat=".0%")
    said = "Accuracy by strength. " + " ".join(words)
    return finish(fig, "What steering strength does", "strength", "share of answers", said)


def _sweet_spot(rows: list[Row]) -> tuple[Row, list[Row], str]:
    best = max(rows, key=lambda row: (row["accuracy"], -abs(row["strength"])))
    words = f"Best at strength {best['strength']:g} with {best['accuracy']:.2f}."
    base = next((row for row in rows if row["strength"] == 0), None)
    if base is not None and limits(best, "accuracy")[0] <= limits(base, "accuracy")[1]:
        words += " Its interval overlaps that of strength 0."
    floor = limits(best, "accuracy")[0]
    broken = [r for r in rows if r["strength"] > max(0, best["strength"]) and limits(r, "accuracy")[1] < floor]
    if broken:
        words += f" Breaks down from strength {broken[0]['strength']:g} ({broken[0]['accuracy']:.2f})."
    return best, broken, words


def _mark_strengths(fig: go.Figure, rows: list[Row], best: Row, broken: list[Row]) -> None:
    place = {"showarrow": False, "yref": "paper", "y": 1.0, "yanchor": "bottom", "font": {"size": 13}}
    label = f"sweet spot {best['strength']:g}" if best["strength"] else "no strength beats 0"
    fig.add_vline(x=best["strength"], line={"color": INK, "dash": "dash", "width": 1})
    fig.add_annotation(x=best["strength"], text=label, **place)
    if broken:
        before = max(row["strength"] for row in rows if row["strength"] < broken[0]["strength"])
        left, right = (before + broken[0]["strength"]) / 2, rows[-1]["strength"]
        fig.add_vrect(x0=left, x1=right, fillcolor=faded(BROKEN, 0.10), line_width=0, layer="below")
        red = {"font": {"size": 13, "color": BROKEN}}
        fig.add_annotation(x=right, xanchor="right", text="breakdown", **(place | red))


def layer_effect(table: Table, condition: str = "residual-steered") -> go.Figure:
    """Effect of an intervention by layer with its interval; filled markers exclude 0, open ones do not.

    Rows: `layer`, `effect` (or `difference`, in shares of answers), and its limits: `low` and `high`, or
    `difference_low` and `difference_high`. Layer l is the output of block l.
    """
    rows = sorted(rows_of(table, ("layer",)), key=lambda row: row["layer"])
    name = next((name for name in ("effect", "difference") if name in rows[0]), None)
    if name is None:
        raise PlotError(f"layer_effect needs rows with effect or difference; found {', '.join(map(str, rows[0]))}.")
    rows = [
        {**row, "low": row.get(f"{name}_low", row.get("low")), "high": row.get(f"{name}_high", row.get("high"))}
        for row in rows
    ]
    bounds = [limits(row, name) for row in rows]
    shape = symbol(condition)
    fig = go.Figure(
        go.Scatter(
            x=[row["layer"] for row in rows],
            y=[row[name] for row in rows],
            error_y=error_bars(rows, name, thickness=2) | {"color": colour(condition)},
            mode="lines+markers",
            line={"color": faded(colour(condition), 0.5), "width": 1.5},
            marker={
                "color": colour(condition),
                "size": 11,
                "symbol": [shape if low > 0 or high < 0 else f"{shape}-open" for low, high in bounds],
            },
            name=condition,
            showlegend=False,
        )
    )
    fig.add_hline(y=0, line={"color": INK, "width": 1})
    fig.update_xaxes(dtick=max(1, math.ceil(len(rows) / 16)))
    best = max(rows, key=lambda row: abs(row[name]))
    largest = f"{best[name]:+.2f} {in_brackets(best, name)}"
    words = f"Effect by layer for {len(rows)} layers; largest at layer {best['layer']}: {largest}."
    return finish(fig, f"Effect by layer ({condition})", "layer (decoder block)", "change in accuracy", words)


def behaviour_damage(table: Table, behaviour: str = "accuracy", budget: float | None = None) -> go.Figure:
    """Behaviour against damage: share of right answers (or "steps") by the KL it costs; up and to the left is better.

    Rows as `compare_at_budget` gives them: `condition`, `kl_p95` (nats) and the behaviour, each with its limits. The
    points of one condition are joined in the order of their KL; `budget` (nats) is marked. A condition that lies on
    earlier ones has larger, open markers, so that all are seen.
    """
    limit = ("low", "high") if behaviour == "accuracy" else (f"{behaviour}_low", f"{behaviour}_high")
    rows = rows_of(table, ("condition", behaviour, "kl_p95", "kl_p95_low", "kl_p95_high"))
    groups: dict[str, list[Row]] = {str(row["condition"]): [] for row in rows}
    for row in sorted(rows, key=lambda row: row["kl_p95"]):
        groups[str(row["condition"])].append(row)
    fig, words = go.Figure(), []
    for name, size in reversed(_sizes(groups, behaviour).items()):  # the largest first, beneath the others
        own, tint = groups[name], {"color": colour(name)}
        fig.add_scatter(
            x=[row["kl_p95"] for row in own],
            y=[row[behaviour] for row in own],
            error_x=error_bars(own, "kl_p95", "kl_p95_low", "kl_p95_high", thickness=1) | tint,
            error_y=error_bars(own, behaviour, *limit, thickness=2) | tint,
            mode="lines+markers",
            line=tint | {"width": 1.5},
            marker=tint | {"symbol": symbol(name) + ("-open" if size > SIZE else ""), "size": size},
            name=name,
            showlegend=True,
        )
        words.append(f"{name} {'; '.join(_point(row, behaviour, *limit) for row in own)}.")
    if budget is not None:
        fig.add_vline(x=budget, line={"color": INK, "dash": "dash", "width": 1})
    log_axis(fig, [end for row in rows for end in limits(row, "kl_p95", "kl_p95_low", "kl_p95_high")])
    fig.update_yaxes(range=[-0.03, 1.05], tickformat=".0%")
    what = "right answers" if behaviour == "accuracy" else f"answers with {behaviour}"
    axis = "damage: KL from the plain model (nats, 95th percentile over tokens)"
    said = f"Share of {what} by KL in nats. " + " ".join(reversed(words))
    return finish(fig, "What it buys for what it damages", axis, what, said)


def _point(row: Row, behaviour: str, low: str, high: str) -> str:
    bottom, top = limits(row, behaviour, low, high)
    return f"{row[behaviour]:.2f} [{bottom:.2f}, {top:.2f}] at {row['kl_p95']:.2g}"


def _sizes(groups: dict[str, list[Row]], behaviour: str) -> dict[str, float]:
    """Marker size by condition: larger by 6 px for every earlier condition that has a point at the same place."""

    def same(a: Row, b: Row) -> bool:
        return abs(a[behaviour] - b[behaviour]) < 0.02 and abs(a["kl_p95"] - b["kl_p95"]) <= 0.1 * abs(a["kl_p95"])

    names = list(groups)
    return {
        name: SIZE + 6 * sum(any(same(a, b) for a in groups[name] for b in groups[other]) for other in names[:place])
        for place, name in enumerate(names)
    }
