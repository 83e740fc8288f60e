"""One look: the colour of a condition in every figure, what colour-blind readers see, contrast of text, dark pages."""

import re
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from tests.test_plots import TABLE, every_figure, lens_rows, strip_rows
from workbench import plots
from workbench.plots import evaluation
from workbench.plots.palette import OTHER_COLOURS, RESERVED, colour, contrast, faded, ink_on, luminance
from workbench.report.page import CSS
from workbench.report.svg import alt_text, figure_to_svg
from workbench.token_readings import TokenReadings
from workbench.widgets.cards import card
from workbench.widgets.strip import HIGH, LOW, shown, strip_svg

NAMES = ("plain", "tuned", "mine", "KV-steered", "another")
# Machado, Oliveira and Fernandes 2009 (doi 10.1109/TVCG.2009.113), table of severity 1.0, on linear RGB
BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def rgb(text: str) -> tuple[float, float, float]:
    """A colour as plotly or SVG writes it, on white where it is faded."""
    if text.startswith("#"):
        red, green, blue = (int(text[i : i + 2], 16) for i in (1, 3, 5))
        return red, green, blue
    *numbers, alpha = [*map(float, re.findall(r"[\d.]+", text)), 1.0][:4]
    red, green, blue = (alpha * number + (1 - alpha) * 255 for number in numbers)
    return red, green, blue


def lab_of(value: tuple[float, float, float], matrix: Any = ((1, 0, 0), (0, 1, 0), (0, 0, 1))) -> np.ndarray:
    """CIELAB (D65) of a colour, as somebody with this matrix sees it."""
    c = np.array(value) / 255
    linear = np.clip(np.array(matrix) @ np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4), 0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    t = np.array(to_xyz) @ linear / np.array([0.95047, 1.0, 1.08883])
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


FIGURES: dict[str, Callable[[list[str]], go.Figure]] = {
    "accuracy_tokens": lambda names: plots.accuracy_tokens([{**TABLE[0], "condition": name} for name in names]),
    "cost_front": lambda names: plots.cost_front(  # conditions on one point share a marker
        [{**TABLE[0], "condition": name, "gflops": 1.0 + sum(map(ord, name))} for name in names]
    ),
    "forest": lambda names: plots.forest(
        [{"a": "base", "b": name, "difference": 0.1, "low": 0.0, "high": 0.2} for name in names]
    ),
    "damage": lambda names: plots.behaviour_damage(
        [{**TABLE[0], "condition": name, "kl_p95": 0.5, "kl_p95_low": 0.4, "kl_p95_high": 0.6} for name in names]
    ),
    "strength": lambda names: plots.strength_curve(
        [{"condition": name, "strength": s, "accuracy": 0.5, "n": 9} for name in names for s in (0, 1)]
    ),
    "reliability": lambda names: plots.reliability(
        [{"condition": name, "confidence": 0.5, "accuracy": 0.5, "n": 9} for name in names]
    ),
    "robustness": lambda names: plots.robustness(
        [{"condition": name, "perturbation": "names", "rate": 0.5, "n": 9} for name in names]
    ),
    "trace": lambda names: plots.trace_strip({name: strip_rows({2: 1.0}) for name in names}),
    "lens": lambda names: plots.lens_grid({name: lens_rows("4", 0.5) for name in names}),
}


def colours_in(fig: go.Figure, names: list[str]) -> dict[str, str]:
    """The opaque colour that stands for each condition in a figure."""
    found: dict[str, str] = {}
    for trace in fig.data:
        for name in names:
            if trace.name and re.match(rf"{re.escape(name)}(\W|$)", trace.name):
                found[name] = str(trace.marker.color)
    ticks = fig.layout.xaxis.ticktext
    if not found and ticks:  # the lens: a column a condition
        found = {ticks[int(note.x)]: note.bgcolor for note in fig.layout.annotations}
    return {name: re.sub(r"rgba\((.*), [\d.]+\)", r"\1", value) for name, value in found.items()}


@pytest.mark.parametrize("figure", FIGURES)
def test_a_condition_has_its_colour_in_any_order_and_company(figure: str) -> None:
    full = colours_in(FIGURES[figure](list(NAMES)), list(NAMES))
    assert set(full) == set(NAMES)
    assert colours_in(FIGURES[figure](list(NAMES[::-1])), list(NAMES)) == full
    fewer = ["mine", "plain"]
    assert colours_in(FIGURES[figure](fewer), list(NAMES)) == {name: full[name] for name in fewer}
    for name, value in full.items():
        numbers = rgb(value) if value.startswith("#") else tuple(map(float, value.split(", ")))
        assert numbers == rgb(colour(name))


def test_every_estimate_has_its_interval() -> None:
    for name, make in FIGURES.items():
        if name in ("trace", "lens"):  # exact readings of one text
            continue
        for trace in make(list(NAMES)).data:
            bars = [bar for bar in (trace.error_x, trace.error_y) if bar.array is not None]
            assert bars or trace.name in ("not beaten", "as right as sure"), (name, trace.name)


def test_well_known_conditions_are_told_apart_by_colour_blind_readers() -> None:
    """Distances in CIELAB; about 2 can just be seen. Markers differ as well."""
    looks = {name: rgb(tint) for name, (tint, _) in RESERVED.items()}
    for kind, matrix in {"none": np.eye(3), **BLINDNESS}.items():
        for one, other in combinations(looks, 2):
            distance = np.linalg.norm(lab_of(looks[one], matrix) - lab_of(looks[other], matrix))
            assert distance > 15, (kind, one, other, distance)


def test_other_names_differ_from_each_other_and_from_the_well_known_ones() -> None:
    for one, other in combinations([*OTHER_COLOURS, *(tint for tint, _ in RESERVED.values())], 2):
        assert np.linalg.norm(lab_of(rgb(one)) - lab_of(rgb(other))) > 10, (one, other)


def test_contrast_is_that_of_the_definition() -> None:
    assert contrast((255, 255, 255), (119, 119, 119)) == pytest.approx(4.48, abs=0.005)  # WCAG's known borderline
    assert luminance((255, 0, 0)) == pytest.approx(0.2126)
    for value in range(256):
        assert contrast(rgb(ink_on((value, value, value))), (value, value, value)) >= 4.5


def strip_of(n: int) -> dict[str, Any]:
    """Readings of `n` tokens with evenly spread values."""
    values = np.linspace(0, 1, n)
    return {
        "prompt": "?", "tokens": [" a"] * n, "kl": values, "entropy": values, "logprob": -values,
        "acted": np.zeros(n, dtype=bool), "alternatives": [], "plain_alternatives": [],
    }  # fmt: skip


@pytest.mark.parametrize("by", ["kl", "logprob"])
def test_text_on_every_cell_of_a_strip_can_be_read(by: str) -> None:
    n = 101
    readings = TokenReadings(**strip_of(n))
    svg = strip_svg(readings, by, "title")
    cells = re.findall(r'fill="(rgb\([^"]*\))"/><text [^>]*fill="(#\w+)"', svg)
    assert len(cells) == n and len({fill for fill, _ in cells}) > 90
    assert rgb(cells[0][0]) == LOW or rgb(cells[-1][0]) == HIGH
    for fill, ink in cells:
        assert contrast(rgb(fill), rgb(ink)) >= 4.5, (fill, ink)
    assert 'role="img"' in svg and "tokens coloured by" in svg


def test_text_on_shaded_cells_of_figures_can_be_read() -> None:
    for name in [*NAMES, *RESERVED]:
        lens = plots.lens_grid({name: lens_rows("4", 1.0)})
        acted = plots.trace_strip({name: strip_rows({2: 1.0})}) if name != "plain" else lens
        for fig in (lens, acted):
            for note in fig.layout.annotations:
                if note.bgcolor:
                    assert contrast(rgb(note.bgcolor), rgb(note.font.color)) >= 4.5, (name, note.text)
    for fig in every_figure().values():
        assert contrast(rgb(fig.layout.template.layout.font.color), (255, 255, 255)) >= 4.5


def test_every_still_has_its_words_and_no_formula_code() -> None:
    figures = {**every_figure(), **{name: make(list(NAMES)) for name, make in FIGURES.items()}}
    figures["training"] = plots.training_curve([{"step": i, "loss": 1 / i, "grad_norm": 10 / i} for i in (1, 50, 99)])
    for name, fig in figures.items():
        svg = figure_to_svg(fig)
        assert 'role="img"' in svg and "mathdefault" not in svg, name
        assert len(alt_text(fig)) > 40, name


def test_a_second_axis_below_the_first_is_drawn() -> None:
    """The curve with its gradient is the curve without it and one more line."""
    rows = [{"step": i, "loss": 1.0 / i} for i in range(1, 9)]
    alone = figure_to_svg(plots.training_curve(rows))
    both = figure_to_svg(plots.training_curve([{**row, "grad_norm": 100.0 * row["loss"]} for row in rows]))
    assert "gradient" in both and "gradient" not in alone
    for words in ("loss (nats a token)", "optimizer step"):
        assert both.count(f">{words}<") == alone.count(f">{words}<") == 1
    axes = [len(re.findall(r'id="[^"]*-axes_\d"', svg)) for svg in (alone, both)]
    assert axes == [1, 2]


def test_spaces_are_seen_and_look_the_same_everywhere() -> None:
    from workbench.plots.token_strip import visible

    for token in (" a", "a\n", "\t", "", "x"):
        assert shown(token) == visible(token)


def test_pages_are_light_and_dark_and_figures_stand_on_a_light_card() -> None:
    parts = CSS.split("@media (prefers-color-scheme: dark)")
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", part)) for part in parts)
    for theme in (light, dark):
        for text, ground in (("ink", "card"), ("ink", "ground"), ("soft", "card"), ("link", "card"), ("ink", "note")):
            assert contrast(rgb(theme[text]), rgb(theme[ground])) >= 4.5, (text, ground)
    assert luminance(rgb(dark["card"])) < 0.1 < luminance(rgb(light["card"]))
    assert re.search(r"figure > svg \{ background: #ffffff", CSS)
    framed = card(every_figure()["forest"])
    assert framed.startswith("<div style='background:#ffffff") and 'role="img"' in framed


def test_robustness_bars_stay_lighter_than_their_intervals() -> None:
    for trace in evaluation.robustness([{"perturbation": "x", "rate": 0.5, "n": 9, "condition": "plain"}]).data:
        assert contrast(rgb(trace.marker.color), rgb(trace.error_y.color)) >= 3  # WCAG's bound for graphics
        assert trace.marker.color == faded(colour("plain"), 0.45)
