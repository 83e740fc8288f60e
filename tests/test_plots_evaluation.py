"""Figures of an evaluation against the rows they were made from, and as still pictures."""

import numpy as np
import pandas as pd
import pytest

from workbench import plots
from workbench.plots.drawing import PlotError
from workbench.report.svg import figure_to_svg
from workbench.results import Results, pareto
from workbench.statistics import wilson

TABLE = pd.DataFrame(
    [
        {"condition": "plain", "accuracy": 0.1, "n": 100, "gflops": 0.1, "tokens_out": 9},
        {"condition": "few-shot steps", "accuracy": 0.7, "n": 100, "gflops": 2.0, "tokens_out": 60},
        {"condition": "tuned", "accuracy": 0.7, "n": 100, "gflops": 0.5, "tokens_out": 55},
        {"condition": "5 votes", "accuracy": 0.8, "n": 100, "gflops": 9.0, "tokens_out": 300},
    ]
)
BINS = [
    {"condition": name, "confidence": c, "accuracy": a, "n": n, "accuracy_low": a - 0.1, "accuracy_high": a + 0.1}
    for name, c, a, n in [("plain", 0.9, 0.4, 30), ("plain", 0.3, 0.2, 10), ("tuned", 0.8, 0.75, 90)]
]
RATES = [
    {"condition": name, "perturbation": p, "rate": r, "n": 40}
    for name in ("plain", "tuned")
    for p, r in [("other wording", 0.9), ("other numbers", 0.3)]
]


def test_the_front_holds_what_nothing_beats() -> None:
    assert pareto(TABLE).tolist() == [True, False, True, True]
    assert pareto(TABLE, "tokens_out").tolist() == [True, False, True, True]
    points = np.random.default_rng(0).integers(0, 9, (60, 2))
    table = pd.DataFrame({"gflops": points[:, 0], "accuracy": points[:, 1]})
    for (c, a), kept in zip(points, pareto(table), strict=True):  # by the definition
        assert kept == (not any((p <= c and q >= a and (p < c or q > a)) for p, q in points))
    with pytest.raises(ValueError, match="no column 'dollars'"):
        pareto(TABLE, "dollars")


def test_cost_front_joins_the_front_and_opens_the_beaten() -> None:
    fig = plots.cost_front(TABLE)
    line, *points = fig.data
    assert line.x == (0.1, 0.1, 0.5, 0.5, 9.0, 9.0)
    assert line.y == (0.1, 0.1, 0.1, 0.7, 0.7, 0.8)
    assert [point.marker.symbol.endswith("-open") for point in points] == [False, True, False, False]
    interval = wilson(70, 100)
    assert points[1].y[0] - points[1].error_y.arrayminus[0] == pytest.approx(interval.low)
    assert "few-shot steps 0.70 [0.60, 0.78] at 2, beaten" in fig.layout.meta["alt"]


def test_conditions_on_one_point_share_a_marker() -> None:
    twin = TABLE.iloc[[1]].assign(condition="twin", gflops=TABLE.gflops.iloc[1] * 1.001)
    fig, own = plots.cost_front(pd.concat([TABLE, twin])), plots.cost_front(TABLE)
    assert len(fig.data) == len(own.data)
    assert fig.data[2].name == f"{own.data[2].name}<br>twin"
    assert "twin 0.70" in fig.layout.meta["alt"]
    apart = plots.cost_front(pd.concat([TABLE, twin.assign(gflops=TABLE.gflops.iloc[1] * 1.2)]))
    assert [trace.name for trace in apart.data] == [*(trace.name for trace in own.data), "twin"]


def test_the_still_picture_of_near_costs_has_the_chosen_ticks_only() -> None:
    near = TABLE.assign(gflops=[0.3, 0.4, 1.0, 2.0])
    fig = plots.cost_front(near)
    assert "mathdefault" not in figure_to_svg(fig)


def test_a_condition_of_unknown_cost_is_named_and_not_drawn() -> None:
    foreign = pd.concat([TABLE, pd.DataFrame([{"condition": "theirs", "accuracy": 0.6, "n": 50, "gflops": np.nan}])])
    fig, own = plots.cost_front(foreign), plots.cost_front(TABLE)
    assert [trace.x for trace in fig.data] == [trace.x for trace in own.data]
    assert "cost unknown: theirs" in fig.layout.title.text
    with pytest.raises(PlotError, match="no rows to draw"):
        plots.cost_front(foreign[foreign.condition == "theirs"])
    with pytest.raises(PlotError, match="no dollars"):
        plots.cost_front(TABLE, "dollars")


def test_reliability_sorts_bins_and_draws_the_diagonal() -> None:
    diagonal, plain, tuned = plots.reliability(BINS).data
    assert diagonal.x == diagonal.y == (0, 1)
    assert plain.x == (0.3, 0.9)
    assert plain.marker.size[1] > plain.marker.size[0]
    assert tuned.error_y.array[0] == pytest.approx(0.1)
    with pytest.raises(PlotError, match="confidence"):
        plots.reliability([{"accuracy": 0.5, "n": 3}])


def test_robustness_groups_bars() -> None:
    fig = plots.robustness(RATES)
    assert [bar.name for bar in fig.data] == ["plain", "tuned"]
    assert fig.data[0].y == (0.9, 0.3)
    assert fig.layout.barmode == "group"


@pytest.mark.parametrize(
    "make", [lambda: plots.cost_front(TABLE), lambda: plots.reliability(BINS), lambda: plots.robustness(RATES)]
)
def test_they_have_words_and_a_still_picture(make) -> None:
    fig = make()
    assert len(fig.layout.meta["alt"]) > 60
    assert fig.layout.xaxis.title.text
    picture = figure_to_svg(fig)
    assert "<svg" in picture
    assert len(picture) > 3000


def test_disagreements_show_gains_and_losses_in_turn() -> None:
    right = {
        "plain": [True, True, False, False, False, True],
        "tuned": [True, False, True, True, False, False],
        "other": [True, True, True, False, False, False],
    }
    rows = pd.DataFrame(
        [
            {"id": str(i), "condition": name, "correct": c, "prompt": f"q{i}", "answer": "1", "output": f"{name} {i}"}
            for name, flags in right.items()
            for i, c in enumerate(flags)
        ]
    )
    found = Results(rows, {name: {} for name in right}).disagreements("plain", "tuned")
    assert found.id.tolist() == ["3", "1", "2", "5"]  # right against the others first, gains and losses in turn
    assert found.right.tolist() == ["tuned", "plain", "tuned", "plain"]
    assert found.output_b.tolist() == ["tuned 3", "tuned 1", "tuned 2", "tuned 5"]
    assert len(Results(rows, {name: {} for name in right}).disagreements("plain", "plain")) == 0
