"""A report made from a run folder as notebooks leave it: numbers, escaping, size, nothing loaded, nothing hidden."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.test_plots import COMPARISONS, TABLE, every_figure
from workbench.report import ReportError, format_table, save_figure, write_report

HOSTILE = "<script>alert('x')</script> \"quoted\" & <img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """Tags, attributes, visible text and unclosed tags of a page."""

    VOID = ("meta", "br", "path", "use", "rect", "line", "img", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def leave(folder: Path, stage: str, figures=(), cost=None, manifest=None, **result) -> Path:
    """Write a stage as a notebook and the runner leave it."""
    place = folder / stage
    place.mkdir(parents=True, exist_ok=True)
    drawn = every_figure() if figures else {}
    names = [save_figure(drawn[name], place, name) for name in figures]
    (place / "result.json").write_text(json.dumps({**result, "figures": names}), encoding="utf-8")
    for name, value in (("cost.json", cost), ("manifest.json", manifest)):
        if value is not None:
            (place / name).write_text(json.dumps(value), encoding="utf-8")
    return place


@pytest.fixture
def run(tmp_path: Path) -> Path:
    manifest = {
        "parameters": {"model": "lab", "seed": 0, "style": HOSTILE},
        "ingredients": {"package": {"version": "0.1.0"}, "models": {"model": "9f3c1e"}},
        "machine": {"system": "Linux", "cores": 2, "memory_bytes": 8e9},
        "seconds": 41.5,
        "peak_memory_bytes": 812_345_678,
        "finished": "2026-01-02T03:04:05+00:00",
    }
    table = [*TABLE, TABLE[0] | {"condition": HOSTILE}]
    leave(
        tmp_path,
        "05_evaluate",
        ("forest", "tokens"),
        manifest=manifest,
        title="Evaluate",
        summary="Four conditions.",
        table=table,
        comparisons=COMPARISONS,
        limits=["One seed only."],
    )
    examples = [{"prompt": "1 + 1?", "output": HOSTILE}]
    leave(tmp_path, "01_synthesize_data", ("kept", "lengths"), title=HOSTILE, summary=HOSTILE, examples=examples)
    leave(tmp_path, "03_steering_vectors", ("strength", "layer", "loss"), limits=[HOSTILE], cost={"calls": 77})
    return tmp_path


def test_report_holds_the_numbers_and_where_they_come_from(run):
    page = Page(write_report(run).read_text(encoding="utf-8"))
    for part in ("0.55 [0.49, 0.60]", "+0.35 [0.28, 0.42]", "< 0.001", "0.210", "One seed only.", "Four conditions."):
        assert part in page.text
    for part in ("9f3c1e", "0.1.0", "memory 8.0 GB", "812 MB", "41.5 s", "parameter seed", "cost: calls"):
        assert part in page.text
    assert page.text.index("0.55 [0.49, 0.60]") < page.text.index("1 + 1?")  # the main table comes first
    labels = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert len(labels) == 7
    assert all(len(label) > 40 for label in labels)
    assert page.open == []


def test_report_is_small_self_contained_and_opens_offline(run):
    path = write_report(run)
    assert path.stat().st_size < 3_000_000
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "link",
        "iframe",
        "object",
        "embed",
        "img",
        "base",
        "foreignobject",
    }
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href", "action"):
                assert value.startswith("#"), (tag, name, value)
    assert "url(http" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text


def test_ids_are_unique_and_links_lead_somewhere(run):
    page = Page(write_report(run).read_text(encoding="utf-8"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {attributes["href"][1:] for _, attributes in page.tags if "href" in attributes}
    assert targets <= set(ids)


def test_hostile_text_is_shown_and_never_run(run):
    text = write_report(run).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img" not in text
    assert Page(text).text.count(HOSTILE) >= 5  # condition, title, summary, example, limit, parameter


def test_a_hostile_figure_label_stays_text(tmp_path):
    rows = [row | {"b": HOSTILE} for row in COMPARISONS]
    from workbench import plots

    place = leave(tmp_path, "05_evaluate", table=TABLE, comparisons=rows)
    name = save_figure(plots.forest(rows), place, "forest")
    (place / "result.json").write_text(json.dumps({"table": TABLE, "figures": [name]}), encoding="utf-8")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img" not in text
    assert text.count("<svg") == 1


def test_what_is_missing_or_broken_is_said(run):
    (run / "02_finetune_qlora").mkdir()
    (run / "02_finetune_qlora" / "result.json").write_text('{"title": "Tor', encoding="utf-8")
    (run / "05_evaluate" / "forest.plotly.json").unlink()
    (run / "05_evaluate" / "tokens.plotly.json").write_text('{"data": [{"type": "nonsense"}]}', encoding="utf-8")
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "02_finetune_qlora: result.json cannot be read" in text
    assert "04_kv_cache left no result" in text
    assert "python -m workbench run 04_kv_cache --out" in text
    assert "forest.plotly.json is listed in result.json but is not there" in text
    assert "tokens.plotly.json cannot be read" in text
    assert "3 of 5 stages left a result" in text


def test_a_run_without_evaluation_says_so(tmp_path):
    leave(tmp_path, "01_synthesize_data", table="no list")
    text = Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    assert "05_evaluate left no result" in text
    assert "`table` in result.json is no list of rows" in text
    assert "No stage recorded a limit" in text


def test_figures_outside_the_stage_are_refused(tmp_path):
    place = leave(tmp_path, "05_evaluate", table=TABLE)
    (place / "result.json").write_text(json.dumps({"figures": ["../../secret.plotly.json"]}), encoding="utf-8")
    assert "is no file name" in Page(write_report(tmp_path).read_text(encoding="utf-8")).text


def test_a_run_with_much_in_it_stays_below_three_megabytes(tmp_path):
    rows = [{f"column {i}": "x" * 5_000 for i in range(12)}] * 500
    for number in range(5):
        leave(tmp_path, f"{number:02}_stage", ("loss",), table=rows, examples=rows)
    path = write_report(tmp_path)
    assert path.stat().st_size < 3_000_000
    assert "of 500 rows" in path.read_text(encoding="utf-8")


def test_the_same_run_gives_the_same_page(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_an_unknown_folder_is_refused_with_the_next_command(tmp_path):
    with pytest.raises(ReportError, match="python -m workbench run --out"):
        write_report(tmp_path / "nothing")


def test_save_figure_round_trips_and_refuses_what_is_too_large(tmp_path):
    import plotly.graph_objects as go
    import plotly.io as pio

    fig = every_figure()["forest"]
    assert save_figure(fig, tmp_path, "forest") == "forest.plotly.json"
    assert pio.from_json((tmp_path / "forest.plotly.json").read_text(encoding="utf-8")) == fig
    with pytest.raises(ReportError, match="at most 200"):
        save_figure(go.Figure(go.Scatter(x=list(range(50_000)), y=[0.123456] * 50_000)), tmp_path, "large")
    with pytest.raises(ReportError, match="plain file name"):
        save_figure(fig, tmp_path, "../forest")


def test_format_table_lines_up_and_folds_limits():
    text = format_table([*TABLE, {"condition": "broken", "n": 240, "accuracy": None}])
    lines = text.splitlines()
    assert re.split(r"\s{2,}", lines[0].strip()) == ["condition", "n", "accuracy", "tokens out"]
    assert "0.55 [0.49, 0.60]" in lines[1]
    assert lines[-1].split() == ["broken", "240", "–", "–"]
    assert len({line.index("240") for line in lines[1:]}) == 1
    assert format_table([]) == "(no rows)"
    assert "low" not in format_table(COMPARISONS).splitlines()[0]


def test_a_run_that_compared_nothing_is_not_blamed_for_telling_no_limits(tmp_path):
    leave(tmp_path, "02_finetune_qlora", summary="180 records, final loss 0.041.")
    assert "No stage recorded a limit" not in Page(write_report(tmp_path).read_text(encoding="utf-8")).text
    leave(tmp_path, "05_evaluate", table=TABLE)
    assert "No stage recorded a limit" in Page(write_report(tmp_path).read_text(encoding="utf-8")).text
