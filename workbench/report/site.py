"""The executed notebooks of a run as a small site that opens from disk: no server, no network, light and dark.

Gathers what the pages are made of (notebooks, a line about commit, date, machine and run time for each, a first page)
and calls Sphinx with MyST-NB and Furo, which live in an environment of their own (`make site` installs it) and write
all HTML. Pages show what has a still form: of a widget or a live figure, the picture or text that the notebook left
beside it. Not covered: several runs in one site, exploring (JupyterLab's matter) and tables (`report.html` has them).
"""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.io as pio

from workbench.files import write_atomic
from workbench.report import SUFFIX, site_conf
from workbench.report.svg import SvgError, alt_text, figure_to_svg
from workbench.runs import OWN
from workbench.runs.heartbeats import duration
from workbench.runs.manifest import NAME, read_manifest
from workbench.runs.status import status

TOOL = Path(".outside") / "site"
MARK = ".buildinfo"  # Sphinx leaves it in every site, so a folder that holds one may be replaced
WIDGET = "application/vnd.jupyter.widget-view+json"
STILL = ("text/html", "image/svg+xml", "image/png", "image/jpeg", "image/gif", "text/markdown", "text/plain")
LIVE = "A live control without a still form: open the notebook in JupyterLab to see it."
CSS = """
.content { width: min(100%, 58em) }
div.stamp { color: var(--color-foreground-secondary); font-size: .88rem; margin: 1rem 0;
  border-left: 3px solid var(--color-brand-primary); padding: 0 0 0 .8rem }
div.stamp p { margin: 0 }
.cell_output img, .cell_output svg, .first-figure { max-width: 100%; height: auto; background: #fff;
  border-radius: 6px }
.cell_output div.output.text_html { overflow-x: auto }
.cell_output table.dataframe { border: 0; border-collapse: collapse; font-size: .88rem; margin: .5rem 0 }
.cell_output table.dataframe :is(td, th) { border: 0; border-bottom: 1px solid var(--color-background-border);
  padding: .2rem .7rem; text-align: right }
"""

Say = Callable[[str], None]


class SiteError(ValueError):
    """A site that can't be made; the message says what is missing and what to type."""


@dataclass(frozen=True)
class Page:
    """One executed notebook and the manifest of the stage that left it."""

    name: str
    notebook: dict[str, Any]
    manifest: Mapping[str, Any]

    @property
    def title(self) -> str:
        """The first heading of the notebook, or its name."""
        first = "".join(self.notebook["cells"][0]["source"]).splitlines() if self.notebook["cells"] else []
        return first[0][2:].strip() if first and first[0].startswith("# ") else self.name


def write_site(run: Path | str, out: Path | str, *, tool: Path | None = None, say: Say = print) -> Path:
    """Write the site of a run folder to `out` and return its `index.html`; an older site there is replaced at the end.

    tool: the environment that holds Sphinx, `.outside/site` by default. A run that ended half-way gives the pages that
    it has, for each is true by itself, and the first page says which are missing and why. Raises SiteError when there
    is nothing to show, when `out` holds something else, when the tool is missing or warns, or when a page would load
    something from elsewhere; then the old site stays.
    """
    folder, target = Path(run), Path(out).resolve()
    python = find_tool(tool or TOOL)
    if target.exists() and any(target.iterdir()) and not (target / MARK).is_file():
        raise SiteError(f"{out} exists and is no site. Choose a new or empty folder: --out outputs/site")
    pages, missing = gather(folder)
    for name, why in missing.items():
        say(f"no page for {name}: {why}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".site-", dir=target.parent) as work:
        source, html = Path(work, "source"), Path(work, "html")
        write_sources(folder, pages, missing, source, say)
        build(python, source, html, f"workbench: {folder.resolve().name}")
        if found := loaded_from_outside(html):
            raise SiteError("these pages would load something from elsewhere:\n" + "\n".join(found))
        if target.exists():
            target.rename(Path(work, "old"))
        html.rename(target)
    return target / "index.html"


def find_tool(environment: Path) -> Path:
    """Return the Python that has Sphinx; raises SiteError."""
    python = next(
        (path for path in (environment / "bin/python", environment / "Scripts/python.exe") if path.is_file()), None
    )
    if python is None or not (environment / ".complete").is_file():
        raise SiteError(
            f"Sphinx, MyST-NB and Furo, which make the pages, are not in {environment}. `make site` installs them there"
            " (0.2 GB); that needs a network or a filled pip cache once, and none later."
        )
    return python.absolute()


def newest(outputs: Path, say: Say = print) -> Path:
    """Return the newest complete run in `outputs`; raises SiteError. A newer one that is not complete is named."""
    found = sorted((path.parent for path in outputs.glob(f"*/{OWN}")), key=last_change, reverse=True)
    for folder in found:
        if "order" in (read_manifest(folder) or {}):
            return folder
        say(f"{folder} is not complete and left out; to see what it has: make site RUN={folder}")
    raise SiteError(f"there is no complete run in {outputs}. Make one: make run")


def last_change(folder: Path) -> float:
    """Return when the runner last wrote into a run folder."""
    notes = [folder / NAME, folder / OWN / "journal.json"]
    return max((path.stat().st_mtime for path in notes if path.is_file()), default=0.0)


def gather(folder: Path) -> tuple[list[Page], dict[str, str]]:
    """Return the pages of a run folder and, by name, why other notebooks have none; raises SiteError without any."""
    try:
        found = status(folder)
    except FileNotFoundError:
        raise SiteError(
            f"{folder} is no run folder. Make one: make run, or python -m workbench run --out {folder}"
        ) from None
    pages, missing = [], {}
    for stage in found.stages:
        manifest = read_manifest(folder / stage.stage)
        path = folder / stage.stage / f"{stage.stage}.ipynb"
        if manifest is None or stage.state not in ("completed", "outdated"):
            missing[stage.stage] = f"{stage.state}{': ' if stage.detail else ''}{stage.detail}"
        elif not path.is_file():
            missing[stage.stage] = "its executed notebook is gone"
        else:
            pages.append(Page(stage.stage, json.loads(path.read_text(encoding="utf-8")), manifest))
    if not pages:
        states = "; ".join(f"{name}: {why}" for name, why in missing.items()) or "none was started"
        raise SiteError(f"{folder} has no finished notebook ({states}). Continue it: make run")
    return pages, missing


def stamp(manifest: Mapping[str, Any]) -> str:
    """Commit, date, machine and run time of a stage, as one line of Markdown."""
    commit = str(manifest.get("commit") or "")
    source = f"commit `{commit[:12]}`" if commit else "no git checkout"
    source += " with uncommitted changes" if commit.endswith("+changes") else ""
    machine = manifest["machine"]
    parts = [machine["system"], machine["processor"], f"{machine['cores']} cores"]
    parts += [f"{machine['memory_bytes'] / 1e9:.0f} GB", *machine["gpus"]]
    when = datetime.fromisoformat(manifest["finished"]).strftime("%Y-%m-%d %H:%M %Z")
    return f"{source} · {when} · {plain(', '.join(parts))} · run time {duration(manifest['seconds'])}"


def plain(text: str) -> str:
    """Escape what Markdown would read as markup."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>|$#" else letter for letter in " ".join(text.split()))


def write_sources(folder: Path, pages: Sequence[Page], missing: Mapping[str, str], source: Path, say: Say) -> None:
    """Write all that Sphinx reads: its settings, the first page, one notebook a page."""
    for name in ("_static", "extra"):
        (source / name).mkdir(parents=True)
    shutil.copyfile(Path(site_conf.__file__), source / "conf.py")
    write_atomic(source / "_static" / "site.css", CSS)
    if (folder / "report.html").is_file():
        shutil.copyfile(folder / "report.html", source / "extra" / "report.html")
    for page in pages:
        write_atomic(source / f"{page.name}.ipynb", json.dumps(still(page, say)))
    write_atomic(source / "index.md", first_page(folder, pages, missing, first_figure(folder, pages, source)))


def still(page: Page, say: Say) -> dict[str, Any]:
    """Return a notebook with its stamp below the title and no output that needs a kernel or a script."""
    cells = [dict(cell) for cell in page.notebook["cells"]]
    first = (
        "".join(cells[0]["source"]).partition("\n") if cells and cells[0]["cell_type"] == "markdown" else ("", "", "")
    )
    titled = first[0].startswith("# ")
    rest = [{**cells[0], "source": first[2]}, *cells[1:]] if titled else cells
    head = (
        f"# {plain(page.name) if not titled else first[0][2:]}\n\n```{{container}} stamp\n{stamp(page.manifest)}\n```"
    )
    for number, cell in enumerate(rest, start=1):
        if cell["cell_type"] == "code":
            cell["outputs"], bare = still_outputs(cell["outputs"])
            if bare:
                say(f"{page.name}: cell {number} shows a live control and left nothing still beside it")
    top = {"cell_type": "markdown", "id": "stamp", "metadata": {}, "source": head}
    kept = {name: value for name, value in page.notebook["metadata"].items() if name in ("kernelspec", "language_info")}
    return {**page.notebook, "cells": [top, *rest], "metadata": kept}


def still_outputs(outputs: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
    """Return a cell's outputs in forms that a page can show, and if a live one had to be replaced by a sentence."""
    found, live = [], False
    for output in outputs:
        data = output.get("data")
        if data is None:  # text that was printed, or an error
            found.append(dict(output))
            continue
        kept = {kind: value for kind, value in data.items() if kind in STILL}
        if WIDGET in data:
            kept.pop("text/plain", None)  # the widget's name and settings, which say nothing to a reader
        live = live or not kept
        if kept:
            found.append({**output, "data": kept})
    bare = live and not any("data" in output for output in found)
    if bare:
        found.append({"output_type": "display_data", "metadata": {}, "data": {"text/plain": LIVE}})
    return found, bare


def first_figure(folder: Path, pages: Sequence[Page], source: Path) -> str:
    """Draw the run's main figure (paired differences, else the first of the last stage that has any) as Markdown."""
    order = sorted(pages, key=lambda page: ("evaluate" in page.name, page.name), reverse=True)
    for page in order:
        names = [path.name for path in sorted((folder / page.name).glob(f"*{SUFFIX}"))]
        for name in sorted(names, key=lambda name: name != f"forest{SUFFIX}"):
            try:
                figure = pio.from_json((folder / page.name / name).read_text(encoding="utf-8"))
                write_atomic(source / "figure.svg", figure_to_svg(figure))
            except (SvgError, ValueError):
                continue
            return f"```{{image}} figure.svg\n:alt: {' '.join(alt_text(figure).split())}\n:class: first-figure\n```\n"
    return ""


def first_page(folder: Path, pages: Sequence[Page], missing: Mapping[str, str], figure: str) -> str:
    """Return the Markdown of the first page."""
    rows = [f"| [{plain(page.title)}]({page.name}.ipynb) | {duration(page.manifest['seconds'])} |" for page in pages]
    latest = max((page.manifest for page in pages), key=lambda manifest: manifest["finished"])
    total = sum(page.manifest["seconds"] for page in pages)
    gaps = [f"- {plain(name)} has no page: {plain(why)}" for name, why in missing.items()]
    report = '<a href="report.html">The report of this run</a>: all tables and figures on one page.\n'
    parts = [
        f"# The run {plain(folder.resolve().name)}\n",
        "Notebooks of the workbench for experiments on small language models, as they were executed: every number,"
        " table and figure below came out of this one run. The pages need no network and no server.\n",
        f"```{{container}} stamp\n{stamp({**latest, 'seconds': total})}\n```\n",
        "\n".join(["```{warning}", *gaps, "```\n"]) if gaps else "",
        figure,
        "\n".join(["| notebook | run time |", "|---|---|", *rows]) + "\n",
        report if (folder / "report.html").is_file() else "",
        "\n".join(["```{toctree}", ":hidden:", *(page.name for page in pages), "```\n"]),
    ]
    return "\n".join(part for part in parts if part)


def build(python: Path, source: Path, html: Path, title: str) -> None:
    """Call Sphinx; raises SiteError with its words if it fails or warns."""
    words = ["-m", "sphinx", "-b", "html", "-q", "-W", "--keep-going", "-D", f"html_title={title}"]
    done = subprocess.run(
        [str(python), "-I", *words, str(source), str(html)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if done.returncode:
        told = "\n".join((done.stderr or done.stdout).replace(f"{source}/", "").strip().splitlines()[-20:])
        raise SiteError(f"Sphinx could not make the pages without warnings:\n{told}")


class Loads(HTMLParser):
    """What a page loads from other addresses by itself; links that a person follows are not among it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            loading = name in ("src", "srcset", "data", "poster") or (tag == "link" and name == "href")
            if loading and (value or "").strip().lower().startswith(("http:", "https:", "//")):
                self.found.append(f"<{tag} {name}={value}>")


def loaded_from_outside(folder: Path) -> list[str]:
    """Return which pages of a site load scripts, styles or pictures from elsewhere, one line each."""
    return [
        f"{path.name}: {item}"
        for path in sorted(folder.glob("*.html"))
        for item in Loads(path.read_text("utf-8")).found
    ]
