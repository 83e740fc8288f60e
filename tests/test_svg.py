"""Still pictures against the figures they were drawn from: places, error bars, text, refusals."""

import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import numpy as np
import plotly.graph_objects as go
import pytest

from tests.test_plots import every_figure
from workbench.report.svg import StillRenderer, figure_to_svg
from workbench.report.svg_traces import SvgError

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_every_figure_of_plots_has_a_still_picture_that_repeats():
    for name, fig in every_figure().items():
        svg = figure_to_svg(fig)
        root = ET.fromstring(svg)
        assert root.attrib["aria-label"] == fig.layout.meta["alt"], name
        assert fig.layout.title.text in texts(svg), name
        assert figure_to_svg(fig) == svg, name
        assert len(svg) < 120_000, name


def test_points_and_error_bars_lie_where_the_numbers_say():
    error = {"type": "data", "symmetric": False, "array": [0, 3, 1], "arrayminus": [0, 1, 2]}
    fig = go.Figure(go.Scatter(x=[0, 1, 3], y=[0, 10, 5], error_y=error, mode="lines"))
    paths = [
        np.array(re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", element.attrib["d"]), dtype=float)
        for element in ET.fromstring(figure_to_svg(fig)).iter(f"{SVG}path")
    ]
    line = next(path for path in paths if path.shape == (3, 2) and len(set(path[:, 0])) == 3)
    (x0, y0), (x1, y1), (x3, _) = line
    assert (x3 - x0) / (x1 - x0) == pytest.approx(3, rel=1e-3)
    unit = (y0 - y1) / 10  # pixels of one step upwards
    bar = next(p for p in paths if p.shape == (2, 2) and np.allclose(p[:, 0], x1) and p[:, 1].max() < y0)
    assert sorted((y0 - bar[:, 1]) / unit) == pytest.approx([9, 13], rel=1e-3)


def test_stacked_bars_start_where_the_ones_below_end():
    fig = go.Figure([go.Bar(x=["a", "b"], y=[1, 2]), go.Bar(x=["a", "b"], y=[3, 1])], layout={"barmode": "stack"})
    boxes = []
    for element in ET.fromstring(figure_to_svg(fig)).iter(f"{SVG}path"):
        points = np.array(re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", element.attrib["d"]), dtype=float)
        if element.attrib["d"].rstrip().endswith("z") and "clip-path" in element.attrib and len(points) == 4:
            boxes.append((points[:, 1].min(), points[:, 1].max()))
    heights = [high - low for low, high in boxes]
    assert len(boxes) == 4
    assert [height / heights[0] for height in heights] == pytest.approx([1, 2, 3, 1], rel=1e-3)
    assert boxes[2][1] == pytest.approx(boxes[0][0])


def test_packed_arrays_and_log_axes_are_understood():
    packed = go.Figure(go.Scatter(x=np.arange(1, 4), y=np.array([1.0, 10.0, 100.0]), mode="lines"))
    packed.update_yaxes(type="log")
    unpacked = go.Figure(go.Scatter(x=[1, 2, 3], y=[1.0, 10.0, 100.0], mode="lines"))
    unpacked.update_yaxes(type="log")
    assert figure_to_svg(packed) == figure_to_svg(unpacked)
    paths = [
        np.array(re.findall(r"[ML] (-?[\d.]+) (-?[\d.]+)", element.attrib["d"]), dtype=float)
        for element in ET.fromstring(figure_to_svg(packed)).iter(f"{SVG}path")
    ]
    line = next(path for path in paths if path.shape == (3, 2) and len(set(path[:, 0])) == 3)
    steps = [second - first for first, second in pairwise(line[:, 1])]
    assert steps[0] == pytest.approx(steps[1], rel=1e-3)


def test_labels_are_text_not_markup_or_formulas():
    fig = go.Figure(go.Bar(x=["$x^2$", "<script>&", "a<br>b"], y=[1, 2, 3]))
    svg = figure_to_svg(fig)
    assert "<script" not in svg
    found = texts(svg)
    assert "$x^2$" in found
    assert any("&" in text for text in found)
    assert {"a", "b"} <= set(found)


def test_what_is_not_covered_is_refused_by_name():
    with pytest.raises(SvgError, match="trace 0 is a pie"):
        figure_to_svg(go.Figure(go.Pie(values=[1, 2])))
    with pytest.raises(SvgError, match="second axis"):
        figure_to_svg(go.Figure(go.Scatter(x=[1], y=[1], xaxis="x2")))
    with pytest.raises(SvgError, match="circle"):
        figure_to_svg(go.Figure(go.Scatter(x=[1], y=[1])).add_shape(type="circle", x0=0, x1=1, y0=0, y1=1))


def test_notebook_output_holds_the_live_figure_and_its_still_twin():
    fig = every_figure()["forest"]
    bundle = StillRenderer().to_mimebundle(fig.to_dict())
    assert bundle["image/svg+xml"] == figure_to_svg(fig)
    assert bundle["application/vnd.plotly.v1+json"]["data"]
    assert "text/html" not in bundle
    refused = StillRenderer().to_mimebundle(go.Figure(go.Pie(values=[1])).to_dict())
    assert "image/svg+xml" not in refused
    assert "pie" in refused["text/plain"]
