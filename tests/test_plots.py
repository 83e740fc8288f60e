"""Figures against the rows they were made from: values, error bars, colours, words, size."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch

from workbench import plots, tracing
from workbench.interventions import Residual
from workbench.plots.drawing import POINTS, PlotError
from workbench.plots.palette import RESERVED, colour, symbol
from workbench.statistics import paired_difference, wilson

CONDITIONS = [("plain", 0.55, 9.0), ("few-shot steps", 0.78, 61.0), ("tuned", 0.9, 55.0), ("random", 0.5, 11.0)]
TABLE = [
    {"condition": name, "n": 240, "accuracy": a, "low": a - 0.06, "high": a + 0.05, "tokens_out": t}
    for name, a, t in CONDITIONS
]
STRENGTHS = [
    {"strength": s, "accuracy": a, "steps": t, "n": 240}
    for s, a, t in [(4, 0.08, 1.0), (0, 0.82, 0.0), (0.5, 0.99, 0.94), (1, 0.985, 1.0), (2, 0.43, 1.0)]
]
COMPARISONS = [
    {"a": "plain", "b": "tuned", "difference": 0.35, "low": 0.28, "high": 0.42, "p_holm": 0.0001, "n": 240},
    {"a": "plain", "b": "random", "difference": -0.05, "low": -0.12, "high": 0.02, "p_holm": 0.21, "n": 240},
]
AT_BUDGET = [
    {"condition": name, "kl_p95": kl, "kl_p95_low": kl * 0.8, "kl_p95_high": kl * 1.3, "accuracy": a, "n": 40,
     "low": a - 0.1, "high": a + 0.1, "steps": a, "steps_low": a - 0.05, "steps_high": a + 0.1}
    for name, kl, a in [
        ("residual-steered", 0.5, 0.6), ("residual-steered", 0.1, 0.3), ("pca", 0.52, 0.6), ("random", 0.5, 0.1),
    ]
]  # fmt: skip
CARD = {"counts": {"questions": 90, "kept": 60, "rejected": {"too long": 8, "wrong answer": 22}}}


def records(n=300):
    rng = np.random.default_rng(0)
    return [{"tokens_out": int(x), "kept": bool(rng.random() < 0.7)} for x in rng.gamma(6, 8, n)]


def strip_rows(acted, tokens=("<|user|>", " 2", "\n", "The", " answer", "4"), prompt=3):
    return [
        {"position": i, "token": t, "part": "prompt" if i < prompt else "generated", "amount": acted.get(i, 0.0)}
        for i, t in enumerate(tokens)
    ]


def lens_rows(guess, probability):
    return [
        {"layer": layer, "rank": rank, "guess": guess, "probability": probability / rank}
        for layer in range(4)
        for rank in (1, 2)
    ]


@functools.cache
def every_figure():
    return {
        "lengths": plots.data_lengths(records()),
        "kept": plots.kept_share(CARD),
        "loss": plots.loss_curve(
            [{"step": i, "loss": 3 / i} for i in range(1, 1500)] + [{"step": 900, "eval_loss": 1}]
        ),
        "strength": plots.strength_curve(STRENGTHS),
        "layer": plots.layer_effect([{"layer": i, "effect": 0.1, "low": 0.0, "high": 0.2} for i in range(36)]),
        "forest": plots.forest(COMPARISONS),
        "tokens": plots.accuracy_tokens(TABLE),
        "damage": plots.behaviour_damage(AT_BUDGET, budget=0.5),
        "strip": plots.trace_strip({"plain": strip_rows({}), "residual-steered": strip_rows({2: 3.0, 5: 1.5})}),
        "lens": plots.lens_grid({"plain": lens_rows(" The", 0.6), "residual-steered": lens_rows("<|end|>", 0.2)}),
        "sweep": plots.sweep_map(
            [{"rate": r, "rank": 4, "held_out_loss": 1 - r, "steps": 9, "stopped": r > 0.1} for r in (0.1, 0.2)],
            "rate",
            "rank",
        ),
        "mask": plots.token_mask(
            ["<|user|>", "2 + 2", "?", "<|end|>", "4", "\n"] * 40, [False, False, False, False, True, True] * 40
        ),
    }


def bars(trace, axis="y"):
    """Limits that a reader would read off the error bars of a trace."""
    error = trace[f"error_{axis}"]
    assert error.symmetric is False
    values = np.array(trace[axis], dtype=float)
    return np.array([values - np.array(error.arrayminus), values + np.array(error.array)]).T


def test_every_figure_has_words_is_small_and_holds_no_script():
    for name, fig in every_figure().items():
        text = fig.to_json()
        assert len(text.encode()) < 200_000, name
        assert "<script" not in text, name
        assert len(fig.layout.meta["alt"]) > 40, name
        assert fig.layout.title.text, name
        assert fig.layout.xaxis.title.text or fig.layout.xaxis.visible is False, name


def test_accuracy_tokens_draws_the_rows():
    fig = plots.accuracy_tokens(pd.DataFrame(TABLE))
    for row, trace in zip(TABLE, fig.data, strict=True):
        assert (trace.name, trace.x[0], trace.y[0]) == (row["condition"], row["tokens_out"], row["accuracy"])
        np.testing.assert_allclose(bars(trace), [[row["low"], row["high"]]])
        assert trace.error_x.array is None
    ranged = plots.accuracy_tokens([TABLE[0] | {"tokens_out_low": 8.0, "tokens_out_high": 10.5}])
    np.testing.assert_allclose(bars(ranged.data[0], "x"), [[8.0, 10.5]])


def test_forest_draws_the_comparisons():
    fig = plots.forest(COMPARISONS)
    for row, trace in zip(COMPARISONS, fig.data, strict=True):
        assert trace.x[0] == row["difference"]
        np.testing.assert_allclose(bars(trace, "x"), [[row["low"], row["high"]]])
        assert trace.marker.symbol.endswith("-open") == (row["p_holm"] >= 0.05)
    assert [shape.x0 for shape in fig.layout.shapes] == [0]
    assert "p = 0.210 (Holm)" in fig.layout.meta["alt"]


def test_forest_takes_a_comparison_of_statistics():
    result = paired_difference([True, False] * 20, [True] * 40)
    row = {"a": "plain", "b": "tuned", **result.__dict__}
    trace = plots.forest([row]).data[0]
    np.testing.assert_allclose(bars(trace, "x"), [[result.low, result.high]])


def test_strength_curve_is_sorted_and_marks_sweet_spot_and_breakdown():
    fig = plots.strength_curve(STRENGTHS)
    right, steps = fig.data
    assert right.x == (0, 0.5, 1, 2, 4)
    assert right.y == (0.82, 0.99, 0.985, 0.43, 0.08)
    interval = wilson(round(0.43 * 240), 240)
    np.testing.assert_allclose(bars(right)[3], [interval.low, interval.high], atol=1e-12)
    assert steps.y == (0.0, 0.94, 1.0, 1.0, 1.0)
    texts = [note.text for note in fig.layout.annotations]
    assert texts == ["sweet spot 0.5", "breakdown"]
    line, area = fig.layout.shapes
    assert line.x0 == 0.5
    assert (area.x0, area.x1) == (1.5, 4)
    assert "Breaks down from strength 2 (0.43)" in fig.layout.meta["alt"]


def test_strength_curve_does_not_claim_what_the_rows_do_not_show():
    flat = [{"strength": s, "accuracy": a, "n": 50} for s, a in [(0, 0.6), (1, 0.62), (2, 0.58)]]
    alt = plots.strength_curve(flat).layout.meta["alt"]
    assert "overlaps that of strength 0" in alt
    assert "Breaks down" not in alt
    worse = [{"strength": s, "accuracy": a, "n": 50} for s, a in [(0, 0.6), (1, 0.5)]]
    assert plots.strength_curve(worse).layout.annotations[0].text == "no strength beats 0"
    two = [row | {"condition": name} for row in STRENGTHS for name in ("KV-steered", "residual-steered")]
    fig = plots.strength_curve(two)
    assert {trace.line.color for trace in fig.data} == {colour("KV-steered"), colour("residual-steered")}
    assert not fig.layout.annotations


def test_strength_curve_marks_one_condition_beside_a_random_one():
    floor = [{"condition": "random", "strength": s, "accuracy": 0.8, "n": 240} for s in (0, 4)]
    rows = [row | {"condition": "residual-steered"} for row in STRENGTHS]
    fig = plots.strength_curve(rows + floor)
    assert [note.text for note in fig.layout.annotations] == ["sweet spot 0.5", "breakdown"]
    assert not plots.strength_curve(floor).layout.annotations
    risen = [{"strength": s, "accuracy": a, "n": 40} for s, a in [(0, 0.05), (1, 0.65), (8, 0.4), (12, 0.2)]]
    words = plots.strength_curve(risen).layout.meta["alt"]  # below the best, though not below strength 0
    assert "Best at strength 1 with 0.65. Breaks down from strength 12 (0.20)." in words


def test_behaviour_damage_draws_both_intervals_and_shows_points_that_coincide():
    fig = plots.behaviour_damage(pd.DataFrame(AT_BUDGET), budget=0.5)
    assert [trace.name for trace in fig.data] == ["random", "pca", "residual-steered"]  # first condition on top
    traces = {trace.name: trace for trace in fig.data}
    steered = traces["residual-steered"]
    assert (steered.x, steered.y) == ((0.1, 0.5), (0.3, 0.6))
    np.testing.assert_allclose(bars(steered), [[0.2, 0.4], [0.5, 0.7]])
    np.testing.assert_allclose(bars(steered, "x"), [[0.08, 0.13], [0.4, 0.65]])
    assert steered.line.color == colour("residual-steered")
    assert (traces["pca"].marker.size, traces["pca"].marker.symbol) == (16, symbol("pca") + "-open")
    assert traces["random"].marker.size == steered.marker.size == 10
    assert [shape.x0 for shape in fig.layout.shapes] == [0.5]
    assert fig.layout.xaxis.tickvals == (0.1, 0.2, 0.5)
    near = plots.behaviour_damage(AT_BUDGET[:1]).layout.xaxis.range
    assert near[1] - near[0] > 1
    assert "random 0.10 [0.00, 0.20] at 0.5." in fig.layout.meta["alt"]
    steps = plots.behaviour_damage(AT_BUDGET, "steps")
    np.testing.assert_allclose(bars(steps.data[-1])[1], [0.55, 0.7])
    assert steps.layout.yaxis.title.text == "answers with steps"


def test_trace_strip_darkens_where_it_acted():
    rows = strip_rows({2: 3.0, 5: 1.5})
    rows.insert(3, rows[2] | {"amount": 1.0})  # another layer at the same token: the largest counts
    fig = plots.trace_strip({"plain": strip_rows({}), "random": pd.DataFrame(rows)})
    notes = {(note.y, note.text): note.bgcolor for note in fig.layout.annotations}
    assert [text for (_, text), fill in notes.items() if fill is None] == [
        f"<b>{name}</b>: the {part}" for name in ("plain", "random") for part in ("prompt", "answer")
    ]
    marked = {text: fill for (_, text), fill in notes.items() if fill and fill.startswith("rgba")}
    assert marked == {"↵": "rgba(102, 102, 102, 0.55)", "4": "rgba(102, 102, 102, 0.35)"}
    assert "random: acted at 1 prompt and 1 answer tokens" in fig.layout.meta["alt"]
    assert "plain: acted at 0 prompt and 0 answer tokens" in fig.layout.meta["alt"]
    assert [trace.name for trace in fig.data] == ["random acted here", "untouched"]
    long = plots.trace_strip({"plain": strip_rows({}, tokens=["a"] * 400, prompt=100)})
    texts = [note.text for note in long.layout.annotations]
    assert (texts.count("a"), texts[1], texts[-1]) == (200, "…·40·more·…", "…·160·more·…")


def test_a_real_trace_holds_every_token_of_the_text(lab):
    v = Residual({2: torch.ones(lab.d_model)}, positions="generated")
    prompt = "<|user|>2+3?<|end|><|assistant|>\n"
    answer = lab.generate([prompt], v, 6)[0]
    table = tracing.trace(lab, prompt, v, 6, untouched=True)
    assert table.token.tolist() == [lab.tokenizer.decode([i]) for i in lab.encode(prompt) + answer.token_ids]
    assert table.position.tolist() == list(range(len(table)))
    acted = table[table.amount > 0]
    assert acted.reset_index(drop=True).equals(tracing.trace(lab, prompt, v, 6).astype({"layer": "Int64"}))
    assert acted.position.tolist() == table[table.part == "generated"].position.tolist()[:-1]  # the last is not run
    assert table[table.amount == 0].layer.isna().all()
    assert f"{len(acted)} answer tokens" in plots.trace_strip({"steered": table}).layout.meta["alt"]


def test_lens_grid_shows_the_first_guess_of_every_layer():
    fig = plots.lens_grid({"plain": lens_rows(" The", 0.6), "random": lens_rows("a very long token indeed", 0.2)})
    notes = fig.layout.annotations
    assert [note.text.split() for note in notes] == [["·The", "0.60"]] * 4 + [["a·very·long·t…", "0.20"]] * 4
    assert len({len(note.text) for note in notes}) == 1  # one width, whatever the guess
    assert {(note.x, note.y) for note in notes} == {(x, y) for x in (0, 1) for y in range(4)}
    assert notes[0].bgcolor == "rgba(0, 0, 0, 0.27)"
    assert fig.layout.xaxis.ticktext == ("plain", "random")
    assert "plain: 0 ' The' 0.60" in fig.layout.meta["alt"]


def test_layer_effect_fills_only_what_excludes_zero():
    rows = [{"layer": 1, "effect": 0.2, "low": 0.1, "high": 0.3}, {"layer": 0, "effect": 0.0, "low": -0.1, "high": 0.1}]
    trace = plots.layer_effect(rows).data[0]
    assert trace.x == (0, 1)
    np.testing.assert_allclose(bars(trace), [[-0.1, 0.1], [0.1, 0.3]])
    assert [shape.endswith("-open") for shape in trace.marker.symbol] == [True, False]


def test_data_lengths_counts_every_record_once():
    rows = records()
    fig = plots.data_lengths(rows)
    kept = sum(row["kept"] for row in rows)
    assert [sum(trace.y) for trace in fig.data] == [kept, len(rows) - kept]
    assert fig.data[0].x == fig.data[1].x
    assert plots.data_lengths([{"tokens_out": 7}]).data[0].y == (1,)


def test_kept_share_has_wilson_bars_in_falling_order():
    trace = plots.kept_share(CARD).data[0]
    assert trace.x == (60 / 90, 22 / 90, 8 / 90)
    assert trace.y == ("kept (60)", "wrong answer (22)", "too long (8)")
    expected = [[wilson(k, 90).low, wilson(k, 90).high] for k in (60, 22, 8)]
    np.testing.assert_allclose(bars(trace, "x"), expected)


def test_loss_curve_keeps_ends_and_median():
    values = [3.0 - i / 100 for i in range(200)]
    fig = plots.loss_curve(values)
    assert fig.data[0].y == tuple(float(f"{value:.6g}") for value in values)
    median = next(trace for trace in fig.data if trace.name == "running median")
    assert abs(median.y[100] - values[100]) < 1e-4
    long = plots.loss_curve([1.0 / (i + 1) for i in range(30_000)])
    assert len(long.data[0].x) <= POINTS + 1
    assert long.data[0].x[-1] == 30_000
    logged = plots.loss_curve([{"step": 10, "loss": 2.0}, {"step": 20, "loss": 1.0}, {"step": 20, "eval_loss": 1.5}])
    assert (logged.data[0].x, logged.data[-1].y) == ((10, 20), (1.5,))


def test_a_few_steps_of_training_are_seen_as_marks():
    def modes(count: int) -> list[str]:
        rows = [{"step": step, "loss": 1.0, "grad_norm": 2.0} for step in range(1, count + 1)]
        figures = plots.loss_curve(rows), plots.training_curve(rows)
        return [trace.mode for figure in figures for trace in figure.data]

    assert modes(1) == modes(4) == ["lines+markers"] * 3
    assert modes(5) == ["lines"] * 3


def test_token_mask_shows_every_token_with_its_mask():
    tokens, mask = ["a", " b\n", "<|end|>"], [False, True, True]
    notes = plots.token_mask(tokens, mask).layout.annotations
    assert [note.text for note in notes] == ["a", "·b↵", "&lt;|end|>"]
    assert [note.bgcolor == notes[1].bgcolor for note in notes] == mask
    wrapped = plots.token_mask(["x" * 30] * 5, [True] * 5).layout.annotations
    assert [note.y for note in wrapped] == [0, 0, 1, 1, 2]


def test_colours_belong_to_names():
    assert colour("plain") == "#000000"
    assert colour("KV-steered") == colour("kv_steered") == colour("KV steered")
    assert len({colour(name) for name in RESERVED}) == len({symbol(name) for name in RESERVED}) == len(RESERVED)
    others = [f"condition {i}" for i in range(40)]
    assert [colour(name) for name in others] == [colour(name) for name in others]
    assert not {colour(name) for name in others} & {look for look, _ in RESERVED.values()}
    assert colour("mine") == "#999933"  # pinned: a change would recolour every earlier figure
    forward, backward = plots.accuracy_tokens(TABLE), plots.accuracy_tokens(TABLE[::-1])
    assert {t.name: t.marker.color for t in forward.data} == {t.name: t.marker.color for t in backward.data}
    forest = {t.name.split(" ")[0]: t.marker.color for t in plots.forest(COMPARISONS).data}
    assert forest["tuned"] == colour("tuned")


def test_figures_are_plain_data_that_repeats():
    again = every_figure.__wrapped__()
    for name, fig in every_figure().items():
        assert "bdata" not in fig.to_json(), name
        assert fig.to_json() == again[name].to_json(), name


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plots.forest([]), "no rows"),
        (lambda: plots.forest([{"a": "plain", "b": "tuned"}]), "row 0 has no difference"),
        (lambda: plots.forest([{"a": "x", "b": "y", "difference": -0.1}]), "give the fields low and high"),
        (lambda: plots.accuracy_tokens([{"condition": "x", "accuracy": 0.5, "tokens_out": 3}]), "no interval"),
        (lambda: plots.accuracy_tokens([{"condition": "x", "accuracy": float("nan"), "tokens_out": 3}]), "accuracy"),
        (lambda: plots.layer_effect([{"layer": 0, "effect": 0.1}]), "no interval"),
        (lambda: plots.layer_effect([{"layer": 0}]), "effect or difference"),
        (lambda: plots.data_lengths([{"kept": True}]), "tokens_out"),
        (lambda: plots.kept_share({"counts": {"kept": 3}}), "questions, rejected"),
        (lambda: plots.kept_share({"counts": {"questions": 0, "kept": 0, "rejected": {}}}), "0 questions"),
        (lambda: plots.loss_curve([]), "no loss"),
        (lambda: plots.token_mask(["a"], []), "got 1 and 0"),
        (lambda: plots.behaviour_damage([{"condition": "x", "accuracy": 0.5}]), "kl_p95"),
        (lambda: plots.behaviour_damage([AT_BUDGET[0] | {"kl_p95_low": None}]), "no kl_p95_low"),
        (lambda: plots.trace_strip({"x": []}), "no rows"),
        (lambda: plots.lens_grid({"x": [{"layer": 0, "rank": 1}]}), "guess, probability"),
    ],
)
def test_errors_name_what_is_missing(call, words):
    with pytest.raises(PlotError, match=words):
        call()
