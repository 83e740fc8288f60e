"""A sweep against the fine-tunes it is made of: same bytes, nothing twice, the worse half stopped, failures told."""

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner, Result

import workbench as wb
from tests.faults.small import FINISH, SETUP, write_notebook
from tests.test_finetune import RECORDS, record
from workbench import plots
from workbench.__main__ import app
from workbench.finetuning import finetune
from workbench.models import LM, load_model
from workbench.plots.drawing import PlotError
from workbench.plots.palette import GRID as GRID_LINE
from workbench.report.svg import figure_to_svg
from workbench.runs.points import combinations, split_values
from workbench.runs.values import Text
from workbench.sweeps import Sweep, sweep

HELD_OUT = [record(f"{a}+9?", f"The answer is {a + 9}.") for a in range(2, 8)]
SHORT: dict[str, Any] = {"batch_tokens": 1024, "quantization": "none", "epochs": 8, "save_steps": 50}  # 8 steps
RATES = [1e-5, 5e-3, 2e-2]
GRID = {"learning_rate": RATES, "rank": [4]}


@pytest.fixture(scope="module")
def lm(tiny) -> LM:
    return load_model(tiny("llama"))


@pytest.fixture(scope="module")
def swept(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return sweep(lm, RECORDS, tmp_path_factory.mktemp("sweep"), GRID, held_out=HELD_OUT, rung=0.25, keep=0.4, **SHORT)


def times(folder: Path) -> dict[str, int]:
    """When each file was last written, but for the index."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != "sweep.json")
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in files}


def curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]


def rung_loss(found: Sweep, rate: float) -> float:
    """Held-out loss of a point after two steps, from its curve."""
    (folder,) = {path for name in ("", ",rank=4") if (path := found.folder / f"learning_rate={rate}{name}").exists()}
    return curve(folder)[1]["eval_loss"]


def test_the_best_go_on_and_have_the_bytes_of_a_plain_finetune(lm: LM, swept: Sweep, tmp_path: Path) -> None:
    table = swept.table()
    alone = {}  # each point by itself, never paused
    for rate in RATES:
        folder = finetune(lm, RECORDS, tmp_path / f"{rate}", held_out=HELD_OUT, learning_rate=rate, rank=4,
                          **{**SHORT, "save_steps": 2}).path  # fmt: skip
        alone[rate] = folder, {row["step"]: row.get("eval_loss") for row in curve(folder)}
    best = sorted(RATES, key=lambda rate: alone[rate][1][2])[:1]
    assert set(table[~table.stopped].learning_rate) == set(best)
    assert list(table.held_out_loss[:1]) == sorted(alone[rate][1][8] for rate in best)
    for row in table.itertuples():
        folder, scores = alone[row.learning_rate]
        assert row.held_out_loss == scores[2 if row.stopped else 8]
        assert row.steps == (2 if row.stopped else 8)
        assert row.tokens == curve(folder)[row.steps - 1]["tokens"]
        assert row.loss == pytest.approx(np.mean([line["loss"] for line in curve(folder)[: row.steps][-5:]]))
        same = (Path(row.adapter) / "adapter_model.safetensors").read_bytes()
        assert (same == (folder / "adapter_model.safetensors").read_bytes()) != row.stopped
        assert ("the best 1 went on" in row.reason) == row.stopped
    assert swept.best().path == Path(table.adapter[0])
    assert swept.saved == pytest.approx(12 / 24)
    assert Sweep(swept.folder).table().equals(table)


def test_a_second_call_writes_nothing_and_another_grid_adds_its_points(lm: LM, swept: Sweep) -> None:
    before = times(swept.folder)
    sweep(lm, RECORDS, swept.folder, GRID, held_out=HELD_OUT, rung=0.25, keep=0.4, **SHORT)
    assert times(swept.folder) == before
    # fixed and varied change places: the same fine-tune under another name is not made again
    rates = {"learning_rate": [2e-2, 6e-3]}
    more = sweep(lm, RECORDS, swept.folder, rates, held_out=HELD_OUT, rung=0.25, keep=0.4, rank=4, **SHORT)
    assert len(more.table()) == 4
    assert set(more.table()["rank"]) == {4}
    after = times(swept.folder)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in after.keys() - before.keys()} == {"learning_rate=0.006"}
    ranked = sorted((*RATES, 6e-3), key=lambda rate: rung_loss(more, rate))
    assert [more_name.split(",")[0] for more_name in more.chosen()] == [f"learning_rate={rate}" for rate in ranked[:1]]
    with pytest.raises(ValueError, match=r"holds learning_rate=0.006 with other settings \(rank: 4 there, 8 now; "):
        sweep(lm, RECORDS, swept.folder, rates, held_out=HELD_OUT, rung=0.25, rank=8, **SHORT)
    with pytest.raises(ValueError, match=r"started by sweep with other settings \(rung: 0.25 there, 0.5 now\)"):
        sweep(lm, RECORDS, swept.folder, GRID, held_out=HELD_OUT, rung=0.5, **SHORT)


def test_a_sweep_that_was_cut_off_ends_like_one_that_was_not(lm: LM, swept: Sweep, tmp_path: Path) -> None:
    class CutError(Exception):
        """Stands for a kill."""

    grid, steps = {"learning_rate": [1e-5, 2e-2], "rank": [4]}, []

    def cut_at(number: int):
        def watch(rows: list[dict[str, float]]) -> None:
            steps.append(rows[-1]["step"])
            if len(steps) == number:
                raise CutError

        return watch

    for number in (3, 6, None):  # in the second point, then after the rung, then to the end
        try:
            sweep(lm, RECORDS, tmp_path, grid, held_out=HELD_OUT, rung=0.25, watch=cut_at(number or 99), **SHORT)
        except CutError:
            assert number
            if number == 3:
                assert set(Sweep(tmp_path).table().stopped) == {False}
                assert "not begun" in set(Sweep(tmp_path).table().reason)
                with pytest.raises(ValueError, match=r"no point of .* is finished"):
                    Sweep(tmp_path).best()
    assert steps == [1, 2, 1, 1, 2, 3, 3, 4, 5, 6, 7, 8]  # the first point's rung was not run twice
    name = "learning_rate=0.02,rank=4"
    assert Sweep(tmp_path).best().path == tmp_path / name
    for file in ("adapter_model.safetensors", "losses.jsonl"):
        assert (tmp_path / name / file).read_bytes() == (swept.folder / name / file).read_bytes()


def test_a_point_that_fails_stops_no_other(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {**SHORT, "epochs": 4, "rank": 4}
    grid, options = {"learning_rate": [1e30, 5e-3]}, {"held_out": HELD_OUT, "keep": 1.0, "rung": 0.75}
    measured = []
    found = sweep(
        lm, RECORDS, tmp_path / "a", grid, **options, **quick,
        measure=lambda adapter: measured.append(adapter.path) or {"right": 0.5},
    )  # fmt: skip
    table = found.table()
    assert list(table.learning_rate) == [5e-3, 1e30]
    assert re.search(r"loss became nan at step \d. Start again .* smaller learning_rate", table.reason[1])
    assert list(table.stopped) == [False, False]
    assert table.right[0] == 0.5
    assert np.isnan(table.right[1])
    assert measured == [found.best().path]
    assert found.saved == 0
    before = times(found.folder)
    sweep(lm, RECORDS, tmp_path / "a", grid, **options, **quick)  # it would diverge again, so it is not tried
    assert times(found.folder) == before
    # memory: refused today, there tomorrow
    small = {"batch_tokens": [1024], "rank": [4]}
    quick = {**quick, "learning_rate": 5e-3}
    del quick["batch_tokens"], quick["rank"]
    short = sweep(lm, RECORDS, tmp_path / "b", small, memory=1000, **options, **quick)
    assert "Training needs about" in short.table().reason[0]
    assert not short.table().stopped.any()
    with pytest.raises(ValueError, match="no point of"):
        short.best()
    sweep(lm, RECORDS, tmp_path / "b", small, **options, **quick)
    assert short.best().path == tmp_path / "b" / "batch_tokens=1024,rank=4"
    assert (short.best().path / "adapter_model.safetensors").read_bytes() == (
        found.best().path / "adapter_model.safetensors"
    ).read_bytes()


def test_without_held_out_records_the_table_says_what_ranked(lm: LM, tmp_path: Path) -> None:
    options = {**SHORT, "epochs": 4, "rank": 4}
    table = sweep(lm, RECORDS, tmp_path, {"learning_rate": [1e-5, 5e-3]}, held_out=None, rung=0.75, **options).table()
    assert all("by training loss" in reason for reason in table.reason)
    assert table.held_out_loss.isna().all()
    assert list(table.learning_rate) == [5e-3, 1e-5]
    fig = plots.sweep_map(table.assign(rank=4), "learning_rate", "rank")
    assert fig.layout.title.text == "Sweep: training loss"


@pytest.mark.parametrize(
    ("grid", "options", "message"),
    [
        ({}, {}, "the grid is empty"),
        ({"rank": []}, {}, r"rank=\[\] gives the grid nothing to vary"),
        ({"method": "lora"}, {}, "method='lora' gives the grid nothing to vary"),
        ({"rnk": [1]}, {}, "rnk can't be varied by a sweep. Choose from: .*rank"),
        ({"max_length": [64]}, {}, "max_length can't be varied"),
        ({"rank": [4, 0]}, {}, "rank=0: rank=0 is too small"),
        ({"rank": [4, 4.5]}, {}, "rank=4.5 is no whole number"),
        ({"learning_rate": [1e-3, "1e-3"]}, {}, "learning_rate='1e-3' is no number"),
        (
            {"method": ["lora", "full"]},
            {},
            "method=full: until=0.15 pauses with an adapter, and method='full' makes none",
        ),
        ({"method": ["lora", "lore"]}, {}, "method='lore' is not known"),
        ({"quantization": ["none", "int3"]}, {}, "quantization='int3' is not known"),
        ({"targets": ["all-linear", "absent"]}, {}, "targets=absent: .*absent"),
        ({"rank": [4]}, {"rank": 8}, "rank is in the grid and beside it"),
        ({"rank": [4]}, {"until": 0.5}, "until: finetune has no such setting"),
        ({"rank": [4]}, {"keep": 0}, "keep=0 and rung=0.15"),
        ({"rank": [4]}, {"rung": 1}, "keep=0.5 and rung=1"),
        ({"rank": [4]}, {"held_out": [{**HELD_OUT[0], "split": "test"}]}, "of the test split"),
        ({"rank": [4]}, {"held_out": RECORDS[:2]}, "are also trained on"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    lm: LM, tmp_path: Path, grid: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(lm, RECORDS, tmp_path / "a", grid, **{"held_out": HELD_OUT, **options})
    assert not (tmp_path / "a").exists()
    with pytest.raises(ValueError, match="holds no sweep"):
        Sweep(tmp_path / "a")


def test_names_of_points_are_folders_and_differ() -> None:
    found = combinations({"learning_rate": np.array([1e-3, 1e-5]), "targets": ["all-linear", "a/b", "a|b"]})
    assert len(found) == 6
    assert found["learning_rate=1e-05,targets=all-linear"] == {"learning_rate": 1e-5, "targets": "all-linear"}
    assert all(re.fullmatch(r"[\w.+=,-]+", name) for name in found)
    assert len(combinations({"n": [1, 1, 2]})) == 2
    long = combinations({"text": ["x" * 300 + "1", "x" * 300 + "2"]})
    assert len(long) == 2
    assert max(map(len, long)) < 130
    assert split_values({"a": Text("1,2"), "b": Text("[1,2]")}) == {"a": ["1", "2"], "b": ["[1,2]"]}


POINTS = [
    {"rate": 1e-3, "rank": 4, "held_out_loss": 0.9, "steps": 80, "stopped": False},
    {"rate": 3e-3, "rank": 4, "held_out_loss": 0.5, "steps": 80, "stopped": False},
    {"rate": 3e-3, "rank": 4, "held_out_loss": 0.4, "steps": 12, "stopped": True},  # the finished one is shown
    {"rate": 1e-2, "rank": 4, "held_out_loss": 1.7, "steps": 12, "stopped": True},
    {"rate": 1e-3, "rank": 16, "held_out_loss": 0.7, "steps": 80, "stopped": False},
    {"rate": 3e-3, "rank": 16, "held_out_loss": 1.1, "steps": 12, "stopped": True},
    {"rate": 1e-2, "rank": 16, "held_out_loss": float("nan"), "steps": 0, "stopped": False},
]


def test_the_map_shows_values_stopped_points_and_failures() -> None:
    fig = plots.sweep_map(pd.DataFrame(POINTS), "rate", "rank")
    notes = {(note.x, note.y): note.text for note in fig.layout.annotations}
    assert notes == {
        (0, 0): "0.9", (1, 0): "0.5", (2, 0): "1.7<br>stopped at 12",
        (0, 1): "0.7", (1, 1): "1.1<br>stopped at 12", (2, 1): "failed",
    }  # fmt: skip
    cells = {((s.x0 + s.x1) / 2, (s.y0 + s.y1) / 2): s.fillcolor for s in fig.layout.shapes if s.type == "rect"}
    opacity = {at: float(re.search(r"([\d.]+)\)", fill)[1]) for at, fill in cells.items() if fill.startswith("rgba")}
    assert sorted(opacity, key=opacity.get) == [(0, 0), (0, 1), (1, 0)]  # the lowest loss is the fullest
    assert opacity[0, 1] == pytest.approx((opacity[0, 0] + opacity[1, 0]) / 2)
    crosses = [((s.x0 + s.x1) / 2, (s.y0 + s.y1) / 2) for s in fig.layout.shapes if s.type == "line"]
    assert {at: crosses.count(at) for at in cells} == {
        (0, 0): 0, (1, 0): 0, (2, 0): 1, (0, 1): 0, (1, 1): 1, (2, 1): 2,
    }  # fmt: skip
    assert "rate 0.01, rank 4: 1.7, stopped at 12" in fig.layout.meta["alt"]
    svg = figure_to_svg(fig)
    words = ["".join(one.itertext()) for one in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"0.9", "stopped at 12", "failed", "0.003", "16", "Sweep: held-out loss"} <= set(words)
    assert figure_to_svg(plots.sweep_map(POINTS, "rate", "rank")) == svg
    assert GRID_LINE not in svg  # showgrid=False: no line runs through a cell
    with pytest.raises(PlotError, match="no point has a finite held_out_loss"):
        plots.sweep_map([{**POINTS[0], "held_out_loss": float("inf")}], "rate", "rank")


def test_the_map_takes_words_and_a_single_stopped_point() -> None:
    rows = [{**POINTS[3], "method": "lora"}, {**POINTS[3], "method": "dora"}]
    fig = plots.sweep_map(rows, "method", "rank")
    assert fig.layout.xaxis.ticktext == ("dora", "lora")
    assert figure_to_svg(fig).count("stopped at 12") >= 2


def call(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one notebook, which fails for n=13, as working directory."""
    monkeypatch.chdir(tmp_path)
    cells = [SETUP.format(stage="00_start"), "if n == 13: raise RuntimeError('unlucky')\nseed = n", FINISH]
    write_notebook(tmp_path / "notebooks" / "00_start.ipynb", cells)
    return tmp_path


def test_notebooks_run_over_a_grid_and_are_compared(project: Path) -> None:
    first = call("sweep", "-p", "n=5", "-p", "mode=none,fast", "--out", "outputs/grid")
    assert first.exit_code == 0, first.output
    folders = [project / "outputs/grid" / name for name in ("n=5,mode=none", "n=5,mode=fast")]
    assert first.stdout == call("compare", *folders).stdout
    result = folders[0] / "00_start" / "result.json"
    before = result.stat().st_mtime_ns
    more = call("sweep", "00_start", "-p", "n=5,13", "-p", "mode=none", "--out", "outputs/grid")
    assert result.stat().st_mtime_ns == before
    assert "00_start: kept" in more.stderr
    assert more.exit_code == 1
    assert "RuntimeError: unlucky" in more.stderr
    assert "failed: n=13,mode=none. What is done is kept; continue with: python -m workbench" in more.stderr
    assert more.stdout == call("compare", folders[0]).stdout


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["-p", "n=5,many"], "n = 'many' is refused"),
        (["-p", "n=5,6", "-p", "mode=none,slow"], "mode = 'slow' is refused"),
        (["-p", "m=5,6"], "no parameter m"),
        (["-p", "n=5"], "needs a parameter with several values"),
        ([], "needs a parameter with several values"),
        (["-p", "out=a,b"], "set by --out"),
        (["06_absent", "-p", "n=1,2"], "no notebook 06_absent"),
    ],
)
def test_a_bad_grid_of_notebooks_is_refused_whole(project: Path, words: list[str], problem: str) -> None:
    found = call("sweep", *words, "--out", "outputs/grid")
    assert found.exit_code == 2
    assert problem in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (project / "outputs").exists()


def test_the_package_exports_the_sweep() -> None:
    assert wb.sweep is sweep
    assert wb.Sweep is Sweep
