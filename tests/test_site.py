"""The offline site: a page a notebook with its stamp, pictures in place, nothing from elsewhere, faults in words."""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from tests.faults.small import FINISH, SETUP, write_notebook
from workbench import runs
from workbench.report import site
from workbench.runs import RunFailed
from workbench.runs.heartbeats import duration
from workbench.runs.manifest import read_manifest

ROOT = Path(__file__).parents[1]
TOOL = ROOT / site.TOOL
PICTURES = """import plotly.graph_objects as go
from workbench.report import save_figure, show_stills
show_stills()
figure = go.Figure(go.Scatter(x=[1, 2], y=[3, 4], name="line"), layout={"title": {"text": "A line"}})
save_figure(figure, folder, "forest")
figure
"""
WIDGETS = """import ipywidgets
from IPython.display import HTML, display
display(ipywidgets.IntSlider(value=7))
display(HTML("<b id='twin'>slider at 7</b>"))
"""
ALONE = """display(ipywidgets.IntSlider(value=3))
"""
HOSTILE = "print('<script>alert(1)</script>')\n"
FORMULA = "Weight $w_l = 1/2$, and\n\n$$\\sum_l w_l = 1$$\n\n### A heading that skips a level\n"
needs_tool = pytest.mark.skipif(
    not (TOOL / ".complete").is_file(), reason=f"Sphinx is not in {site.TOOL}; install it: make {site.TOOL}/.complete"
)


def quiet(text: str) -> None:
    """Take progress lines and drop them."""


def add_text(path: Path, source: str) -> None:
    """Add a Markdown cell to a notebook."""
    book = json.loads(path.read_text(encoding="utf-8"))
    book["cells"].append({"cell_type": "markdown", "id": "added", "metadata": {}, "source": source})
    path.write_text(json.dumps(book), encoding="utf-8")


def make_run(home: Path) -> Path:
    """Run two notebooks: a figure; widgets with and without a still form, a formula, hostile text."""
    cells = {"00_figures": [PICTURES], "01_widgets": [WIDGETS, ALONE, HOSTILE]}
    paths = [
        write_notebook(home / "notebooks" / f"{name}.ipynb", [SETUP.format(stage=name), "seed = 1", *made, FINISH])
        for name, made in cells.items()
    ]
    add_text(paths[1], FORMULA)
    return runs.run(paths, {"n": 8}, home / "run", say=quiet).folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that run in `run`."""
    return make_run(tmp_path_factory.mktemp("site")).parent


@pytest.fixture(scope="module")
def built(finished: Path) -> tuple[Path, list[str]]:
    """The site of that run, and what was said while it was made."""
    told: list[str] = []
    index = site.write_site(finished / "run", finished / "site", tool=TOOL, say=told.append)
    assert index == finished / "site" / "index.html"
    return index.parent, told


class Parts(HTMLParser):
    """Tags with attributes, and the visible text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@needs_tool
def test_every_notebook_has_a_page_with_its_own_stamp(finished: Path, built: tuple[Path, list[str]]) -> None:
    folder, _ = built
    first = Parts(folder / "index.html")
    links = [attributes.get("href") for tag, attributes in first.tags if tag == "a"]
    assert "report.html" in links
    assert (folder / "report.html").read_bytes() == (finished / "run" / "report.html").read_bytes()
    for name in ("00_figures", "01_widgets"):
        manifest: dict[str, Any] = read_manifest(finished / "run" / name) or {}
        page = Parts(folder / f"{name}.html")
        assert f"{name}.html" in links
        for part in (
            manifest["finished"][:10],
            manifest["machine"]["system"],
            f"run time {duration(manifest['seconds'])}",
        ):
            assert part in page.text
        assert (manifest["commit"] or "no git checkout")[:12] in page.text
        assert duration(manifest["seconds"]) in first.text


@needs_tool
def test_nothing_is_loaded_from_elsewhere_and_every_own_file_is_there(built: tuple[Path, list[str]]) -> None:
    folder, _ = built
    loaded = 0
    for path in folder.glob("*.html"):
        for tag, attributes in Parts(path).tags:
            for name, value in attributes.items():
                if name not in ("src", "href", "srcset", "data", "poster") or not value or value.startswith("#"):
                    continue
                address = urlsplit(value)
                if address.scheme or address.netloc:
                    assert (tag, name) == ("a", "href"), f"{path.name}: <{tag} {name}={value}>"
                    continue
                target = folder / unquote(address.path)
                assert target.is_file(), f"{path.name}: {value} leads nowhere"
                assert target.stat().st_size > 0
                loaded += tag in ("img", "script", "link")
    assert loaded > 10
    for path in folder.rglob("*.css"):
        addresses = re.findall(r"(?:@import\s+|url\()\s*['\"]?([^'\")\s;]+)", path.read_text(encoding="utf-8"))
        assert not [found for found in addresses if urlsplit(found).scheme not in ("", "data")], path
    for path in folder.rglob("*.js"):
        assert not re.findall(r"(?:import|fetch|src\s*=)\s*\(?['\"](?:https?:)?//", path.read_text(encoding="utf-8")), (
            path
        )


@needs_tool
def test_pictures_are_shown_and_hold_something(finished: Path, built: tuple[Path, list[str]]) -> None:
    folder, _ = built
    for name in ("index", "00_figures"):
        sources = [attributes["src"] for tag, attributes in Parts(folder / f"{name}.html").tags if tag == "img"]
        assert len(sources) == 1
        picture = (folder / str(sources[0])).read_text(encoding="utf-8")
        assert "A line" in picture
        assert picture.count("<path") > 3


@needs_tool
def test_widgets_are_replaced_by_what_stands_still_beside_them(built: tuple[Path, list[str]]) -> None:
    folder, told = built
    page = Parts(folder / "01_widgets.html")
    assert any(attributes.get("id") == "twin" for _, attributes in page.tags)
    assert "IntSlider" not in page.text.replace("ipywidgets.IntSlider", "").replace("ipywidgets . IntSlider", "")
    assert page.text.count(site.LIVE) == 1
    assert "Loading widget" not in (folder / "01_widgets.html").read_text(encoding="utf-8")
    assert [line for line in told if "live control" in line] == [
        "01_widgets: cell 7 shows a live control and left nothing still beside it"
    ]
    assert [tag for tag, _ in page.tags].count("math") == 2
    assert "<script>alert(1)</script>" in page.text


@needs_tool
def test_a_second_site_replaces_the_first_and_other_folders_are_left_alone(finished: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    site.write_site(finished / "run", target, tool=TOOL, say=quiet)
    (target / "old.html").write_text("old", encoding="utf-8")
    site.write_site(finished / "run", target, tool=TOOL, say=quiet)
    assert not (target / "old.html").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "note.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(site.SiteError, match="exists and is no site"):
        site.write_site(finished / "run", tmp_path / "mine", tool=TOOL, say=quiet)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["note.txt"]


@needs_tool
def test_a_run_that_failed_half_way_shows_what_it_has_and_says_what_is_missing(finished: Path, tmp_path: Path) -> None:
    bad = write_notebook(tmp_path / "02_bad.ipynb", [SETUP.format(stage="02_bad"), "raise ValueError('too | hot')"])
    folder = Path(shutil.copytree(finished / "run", tmp_path / "run"))
    with pytest.raises(RunFailed):
        runs.run([bad], {"n": 8}, folder, say=quiet)
    told: list[str] = []
    index = site.write_site(folder, tmp_path / "site", tool=TOOL, say=told.append)
    assert "no page for 02_bad: failed: cell 4: ValueError: too | hot" in told
    text = Parts(index).text
    assert "02_bad has no page: failed: cell 4: ValueError: too | hot" in text
    assert (index.parent / "01_widgets.html").is_file()
    assert not (index.parent / "02_bad.html").exists()


@needs_tool
@pytest.mark.parametrize(
    ("source", "told"),
    [
        ('<img src="https://example.org/a.png">', "00_bad.html: <img src=https://example.org/a.png>"),
        ("![gone](nowhere.png)", "image file not readable: nowhere.png"),
    ],
)
def test_a_page_that_loads_from_elsewhere_and_a_warning_are_refused(tmp_path: Path, source: str, told: str) -> None:
    path = write_notebook(tmp_path / "00_bad.ipynb", [SETUP.format(stage="00_bad"), "seed = 1", FINISH])
    add_text(path, source)
    runs.run([path], {"n": 8}, tmp_path / "run", say=quiet)
    with pytest.raises(site.SiteError, match=re.escape(told)):
        site.write_site(tmp_path / "run", tmp_path / "site", tool=TOOL, say=quiet)
    assert not (tmp_path / "site").exists()


def test_what_is_missing_is_said_in_words(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(site.SiteError, match=r"are not in .*`make site` installs them"):
        site.write_site(finished / "run", tmp_path / "site", tool=tmp_path / "none")
    with pytest.raises(site.SiteError, match=r"no complete run in .*make run"):
        site.newest(tmp_path)
    with pytest.raises(site.SiteError, match=r"is no run folder\. Make one: make run"):
        site.gather(tmp_path)
    (tmp_path / "empty" / runs.OWN).mkdir(parents=True)
    with pytest.raises(site.SiteError, match=r"no finished notebook \(none was started"):
        site.gather(tmp_path / "empty")


def test_the_newest_complete_run_is_chosen(finished: Path, tmp_path: Path) -> None:
    for name in ("old", "whole", "half"):
        shutil.copytree(finished / "run", tmp_path / name)
        (tmp_path / name / runs.OWN / "journal.json").write_bytes(b"{}")
    (tmp_path / "half" / "manifest.json").unlink()
    for age, name in enumerate(("half", "whole", "old")):
        for path in (tmp_path / name / "manifest.json", tmp_path / name / runs.OWN / "journal.json"):
            if path.exists():
                os.utime(path, (1e9 - age, 1e9 - age))
    told: list[str] = []
    assert site.newest(tmp_path, told.append) == tmp_path / "whole"
    assert told == [
        f"{tmp_path / 'half'} is not complete and left out; to see what it has: make site RUN={tmp_path / 'half'}"
    ]
