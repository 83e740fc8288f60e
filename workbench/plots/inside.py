"""Pictures of a model's inside for a first look: the residual stream, what a cache saves, what a token's entry does.

Counts and lengths of one text: exact, so without intervals. Spaces in tokens are visible. Leans on plotly.
"""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from workbench.plots.drawing import PlotError, Table, finish, rows_of
from workbench.plots.palette import INK
from workbench.plots.token_strip import visible

ATTENTION, MLP, EMBEDDING, WHOLE = "#0072B2", "#E69F00", "#8C8C8C", "#009E73"  # of Okabe and Ito
PARTS = {"embedding": EMBEDDING, "attention": ATTENTION, "MLP": MLP, "block": WHOLE}
MOST = 120  # tokens on an axis


def stream_norms(rows: Table) -> go.Figure:
    """Length of what each part adds to the residual stream, by layer, and of the stream itself behind each layer.

    rows: `teaching.inside.Stream.norms`: `layer` (None for the embedding), `part`, `norm`, `stream`.

    >>> fig = stream_norms([{"layer": None, "part": "embedding", "norm": 1.0, "stream": 1.0},
    ...                     {"layer": 0, "part": "attention", "norm": 2.0, "stream": 2.5}])
    >>> [trace.name for trace in fig.data]
    ['embedding', 'attention', 'the stream so far']
    """
    found = rows_of(rows, ("part", "norm", "stream"))
    places = ["emb." if row.get("layer") is None else str(int(row["layer"])) for row in found]
    fig = go.Figure()
    for part, fill in PARTS.items():
        own = [(place, row["norm"]) for place, row in zip(places, found, strict=True) if row["part"] == part]
        if own:
            x, y = [place for place, _ in own], [norm for _, norm in own]
            fig.add_bar(x=x, y=y, name=part, marker={"color": fill})
    stream = dict(zip(places, [row["stream"] for row in found], strict=True))  # the last of a layer stays
    line = {"color": INK, "width": 2.5}
    fig.add_scatter(
        x=list(stream), y=list(stream.values()), mode="lines+markers", name="the stream so far", line=line,
        marker={"size": 9, "color": INK},
    )  # fmt: skip
    fig.update_layout(barmode="group")
    fig.update_xaxes(type="category", categoryorder="array", categoryarray=list(stream))
    largest = max(found, key=lambda row: row["norm"])
    where = "" if largest.get("layer") is None else f" of layer {int(largest['layer'])}"
    words = f"Bars by layer; the longest is {largest['part']}{where} ({largest['norm']:.3g}); "
    words += f"the stream ends at length {found[-1]['stream']:.3g}."
    return finish(fig, "What is added to the residual stream", "layer (decoder block)", "length (norm)", words)


def forwarded_tokens(rows: Table) -> go.Figure:
    """Tokens that went through the model up to each new token, one line a way of making them.

    rows: `way`, `step` (new tokens so far), `forwarded` (tokens in all up to there).

    >>> forwarded_tokens([{"way": "with the cache", "step": 1, "forwarded": 9}]).data[0].y
    (9,)
    """
    found = rows_of(rows, ("way", "step", "forwarded"))
    fig, words = go.Figure(), []
    looks = ((ATTENTION, "circle", "solid"), (MLP, "square", "dash"), (WHOLE, "diamond", "dot"))
    for way, (fill, shape, dash) in zip(dict.fromkeys(row["way"] for row in found), looks, strict=False):
        own = [row for row in found if row["way"] == way]
        steps, counts = [row["step"] for row in own], [row["forwarded"] for row in own]
        look = {"line": {"color": fill, "width": 2.5, "dash": dash}, "marker": {"symbol": shape, "size": 8}}
        fig.add_scatter(x=steps, y=counts, mode="lines+markers", name=way, **look)
        words.append(f"{way} {counts[-1]} after {steps[-1]} new tokens")
    fig.update_yaxes(rangemode="tozero")
    return finish(fig, "Tokens that the model had to read", "new tokens", "tokens read so far", "; ".join(words) + ".")


def token_effects(tokens: Sequence[str], effects: Sequence[float], title: str, unit: str) -> go.Figure:
    """One bar a token of a text, in order, with the tokens themselves on the axis; at most 120, spaces visible.

    >>> fig = token_effects(["2", " +"], [0.0, 0.4], "Effect", "nats")
    >>> fig.layout.xaxis.ticktext
    ('2', '·+')
    """
    if len(tokens) != len(effects) or not 0 < len(tokens) <= MOST:
        raise PlotError(
            f"token_effects needs 1 to {MOST} tokens and as many numbers; got {len(tokens)} and {len(effects)}."
        )
    places = list(range(len(tokens)))
    names = [visible(token) for token in tokens]
    fig = go.Figure(go.Bar(x=places, y=list(effects), marker={"color": ATTENTION}, showlegend=False))
    mono = {"family": "DejaVu Sans Mono, monospace", "size": 11}
    fig.update_xaxes(tickvals=places, ticktext=names, tickangle=-90, tickfont=mono, range=[-0.7, len(tokens) - 0.3])
    fig.update_layout(height=460)
    most = max(places, key=lambda place: effects[place])
    words = f"Bars over {len(tokens)} tokens; the highest is token {most}, {tokens[most]!r}, with {effects[most]:.3g}."
    return finish(fig, title, "token of the text", unit, words)


def adapter_sizes(ranks: Sequence[int], inputs: int, outputs: int) -> go.Figure:
    """Numbers that a LoRA of each rank holds for one matrix, beside the matrix itself.

    >>> adapter_sizes([1, 4], 256, 128).data[0].y
    (384, 1536)
    """
    sizes = [rank * (inputs + outputs) for rank in ranks]
    fig = go.Figure()
    look = {"line": {"color": ATTENTION, "width": 2.5}, "marker": {"size": 9}}
    fig.add_scatter(x=list(ranks), y=sizes, mode="lines+markers", name="B and A", **look)
    whole = {"line": {"color": MLP, "width": 2.5, "dash": "dash"}}
    fig.add_scatter(x=[ranks[0], ranks[-1]], y=[inputs * outputs] * 2, mode="lines", name="the whole matrix W", **whole)
    fig.update_yaxes(rangemode="tozero")
    words = (
        f"W has {inputs * outputs} numbers; a LoRA has {sizes[0]} at rank {ranks[0]}, {sizes[-1]} at rank {ranks[-1]}."
    )
    return finish(fig, "What a low-rank update holds", "rank", "numbers", words)
