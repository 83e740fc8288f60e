"""One page for a whole run that opens offline: the main table first, then figures, stages, provenance and limits.

The page holds no script and loads nothing; a policy in its head forbids both, and every text is escaped, since it holds
outputs of models. A stage that left nothing, or something unreadable, is said plainly. Not covered: comparing two runs.
Reads what `runs` leaves: <stage>/result.json, cost.json, manifest.json and the figures that `save_figure` wrote.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io as pio

from workbench.files import write_atomic
from workbench.report.page import CSS, POLICY
from workbench.report.svg import SvgError, alt_text, decoded, figure_to_svg, show_stills
from workbench.report.tables import format_table, html_table
from workbench.runs.heartbeats import duration

__all__ = ["ReportError", "format_table", "save_figure", "show_stills", "write_report"]

SUFFIX = ".plotly.json"
FIGURE_BYTES = 200_000  # one saved figure: larger ones make notebooks and reports slow to open
SVG_BYTES = 1_500_000  # all pictures of one report
PAGE_BYTES = 3_000_000
STAGES = ("01_synthesize_data", "02_finetune_qlora", "03_steering_vectors", "04_kv_cache", "05_evaluate")
EMPTY: tuple[Any, ...] = (None, "", [], {})
SHOWN = ("title", "summary", "table", "tables", "comparisons", "figures", "limits", "examples")


class ReportError(ValueError):
    """A report or figure that cannot be written; the message says what to do instead."""


@dataclass(frozen=True)
class Stage:
    """What one stage left: its result, cost and manifest as read, and what could not be read."""

    name: str
    folder: Path
    result: dict[str, Any] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def save_figure(fig: go.Figure, folder: Path | str, name: str) -> str:
    """Write a figure as `<name>.plotly.json` into a stage's folder and return the file's name, for `result["figures"]`.

    Raises `ReportError` above 200 KB: a figure that large has more points than can be seen.
    """
    text = fig.to_json()
    if len(text.encode("utf-8")) > FIGURE_BYTES:
        raise ReportError(
            f"figure {name} is {len(text) / 1000:,.0f} KB, at most 200: draw fewer points, or a histogram."
        )
    if not name or Path(name).name != name:
        raise ReportError(f"a figure's name is a plain file name such as 'forest'; got {name!r}.")
    file = name.removesuffix(SUFFIX) + SUFFIX
    write_atomic(Path(folder) / file, text)
    return file


def write_report(run_folder: Path | str) -> Path:
    """Write `report.html` (under 3 MB, self-contained) into a run folder and return its path.

    Raises `ReportError` when the folder does not exist; anything missing inside it is told on the page.
    """
    folder = Path(run_folder)
    if not folder.is_dir():
        raise ReportError(f"there is no run folder {folder}; make one with: python -m workbench run --out {folder}")
    manifest, _ = _read(folder / "manifest.json")
    found = {path.parent.name for name in ("result.json", "manifest.json") for path in folder.glob(f"*/{name}")}
    expected = manifest.get("order") or STAGES
    stages = [_stage(folder / name) for name in sorted(found.union(expected))]
    drawn: dict[Path, str] = {}
    page = _page(folder, stages, manifest, drawn, rows=100)
    if len(page.encode("utf-8")) > PAGE_BYTES:
        page = _page(folder, stages, manifest, drawn, rows=10)
    target = folder / "report.html"
    write_atomic(target, page)
    return target


def _stage(folder: Path) -> Stage:
    (result, bad), (cost, worse), (manifest, worst) = (
        _read(folder / name) for name in ("result.json", "cost.json", "manifest.json")
    )
    return Stage(folder.name, folder, result, cost, manifest, tuple(text for text in (bad, worse, worst) if text))


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """A JSON object, or an empty one and what is wrong with the file."""
    if not path.is_file():
        return {}, ""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return {}, f"{path.name} cannot be read ({error})."
    return (value, "") if isinstance(value, dict) else ({}, f"{path.name} holds no JSON object.")


def _page(folder: Path, stages: list[Stage], manifest: Mapping[str, Any], drawn: dict[Path, str], rows: int) -> str:
    main = next((stage for stage in stages if "evaluate" in stage.name), None)
    others = [stage for stage in stages if stage is not main]
    parts = [_header(folder, stages, manifest), '<main><section id="result"><h2>Result</h2>']
    parts += [
        _contents(main, drawn, rows) if main else _note("This run has no evaluation stage, so there is no main table.")
    ]
    parts += [_facts(main) if main else "", "</section>"]
    for stage in others:
        name = html.escape(stage.name)
        heading = html.escape(str(stage.result.get("title") or stage.name))
        parts.append(f'<section id="{name}"><h2>{heading}</h2>{_contents(stage, drawn, rows)}{_facts(stage)}</section>')
    parts += [_limits(stages), "</main>"]
    title = _title(folder)
    start = f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>{POLICY}'
    view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f"{start}{view}<style>{CSS}</style></head><body>{''.join(parts)}</body></html>\n"


def _header(folder: Path, stages: list[Stage], manifest: Mapping[str, Any]) -> str:
    done = [stage for stage in stages if stage.result]
    seconds = sum(_seconds(stage) or 0.0 for stage in stages)
    finished = max((str(stage.manifest.get("finished", "")) for stage in stages), default="")
    package: Any = manifest.get("package") or next((p for s in done if (p := _ingredient(s, "package"))), {})
    told = [f"{len(done)} of {len(stages)} stages left a result"]
    told += [f"{duration(seconds)} in all"] if seconds else []
    told += [f"finished {finished}"] if finished else []
    told += [f"package version {package['version']}"] if isinstance(package, dict) and package.get("version") else []
    links = ""
    for stage in stages:
        place, style = (
            ("result" if "evaluate" in stage.name else stage.name),
            "" if stage.result else ' class="missing"',
        )
        links += f'<a href="#{html.escape(place)}"{style}>{html.escape(stage.name)}</a>'
    title = _title(folder)
    return f"<header><h1>{title}</h1><p>{html.escape('; '.join(told))}.</p><nav>{links}</nav></header>"


def _title(folder: Path) -> str:
    return html.escape(f"Run report: {folder.resolve().name}")


def _contents(stage: Stage, drawn: dict[Path, str], rows: int) -> str:
    """Summary, table, comparisons, figures and examples of one stage, or why there are none."""
    parts = [_note(f"{stage.name}: {problem}") for problem in stage.problems]
    if not stage.result:
        command = f"python -m workbench run {stage.name} --out {stage.folder.parent}"
        parts.append(_note(f"{stage.name} left no result: it was not run, or did not finish. To run it:", command))
        return "".join(parts)
    parts.append(_prose(stage.result.get("summary")))
    for name, caption in (
        ("table", "Shares carry 95 % intervals in brackets." if _has(stage, "accuracy") else ""),
        ("comparisons", "Paired on the same questions: second minus first, with 95 % intervals."),
    ):
        if name in stage.result:
            parts.append(_table(stage, name, caption, rows))
        elif "evaluate" in stage.name:
            parts.append(_note(f"{stage.name} recorded no {name}."))
    more = stage.result.get("tables")
    for caption, lines in more.items() if isinstance(more, dict) else ():
        parts.append(html_table(lines, str(caption), rows) if _is_table(lines) else "")
    names = stage.result.get("figures") or []
    parts += [_figure(stage, str(name), drawn, rows) for name in (names if isinstance(names, list) else [names])]
    if "examples" in stage.result:
        parts.append(f"<details><summary>Examples</summary>{_table(stage, 'examples', '', rows)}</details>")
    return "".join(parts)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _table(stage: Stage, name: str, caption: str, rows: int) -> str:
    value = stage.result[name]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        return _note(f"{stage.name}: `{name}` in result.json is no list of rows, so it is not shown.")
    return html_table(value, caption, rows) if value else _note(f"{stage.name}: `{name}` has no rows.")


def _has(stage: Stage, column: str) -> bool:
    rows = stage.result.get("table")
    return isinstance(rows, list) and any(column in row for row in rows if isinstance(row, dict))


def _figure(stage: Stage, name: str, drawn: dict[Path, str], rows: int) -> str:
    path = stage.folder / name
    if Path(name).name != name or not name.endswith(SUFFIX):
        return _note(f"{stage.name}: figure {name!r} is no file name ending in {SUFFIX}.")
    if not path.is_file():
        return _note(f"{stage.name}: figure {name} is listed in result.json but is not there.")
    try:
        fig = pio.from_json(path.read_text(encoding="utf-8"))
        svg = drawn.get(path) or figure_to_svg(fig)
    except SvgError as error:
        return _note(f"{stage.name}: figure {name} has no still picture ({error}) Open it in the notebook.")
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return _note(f"{stage.name}: figure {name} cannot be read ({str(error).strip()[:200]}).")
    if path not in drawn and sum(map(len, drawn.values())) + len(svg) > SVG_BYTES:
        return _note(f"{stage.name}: figure {name} is left out, so that this page stays below 3 MB.")
    drawn[path] = svg
    numbers = html_table(_points(fig), "", rows)
    words = html.escape(alt_text(fig))
    return f"<figure>{svg}<details><summary>In words and numbers</summary><p>{words}</p>{numbers}</details></figure>"


def _points(fig: go.Figure) -> list[dict[str, Any]]:
    """The drawn values of a figure as rows, in the place of hover."""
    rows: list[dict[str, Any]] = []
    for number, trace in enumerate(decoded(fig.to_dict())["data"]):
        label = (trace.get("name") or f"series {number + 1}").replace("<br>", ", ")
        axis = (
            "x" if (trace.get("error_x") or {}).get("array") and not (trace.get("error_y") or {}).get("array") else "y"
        )
        bars = trace.get(f"error_{axis}") or {}
        above, below = bars.get("array") or [], bars.get("arrayminus") or bars.get("array") or []
        for place, (x, y) in enumerate(zip(trace.get("x") or [], trace.get("y") or [], strict=False)):
            row = {"series": label, "x": x, "y": y}
            if place < len(above):
                row |= {f"{axis}_low": row[axis] - below[place], f"{axis}_high": row[axis] + above[place]}
            rows.append(row)
    return rows


def _facts(stage: Stage) -> str:
    """What was run on what: model, revision, parameters, package, machine, times, and any other number of the stage."""
    if not stage.result and not stage.manifest:
        return ""
    parameters = stage.manifest.get("parameters") or stage.result.get("parameters") or {}
    facts: dict[str, Any] = {"stage": stage.name}
    facts |= {f"revision of {name}": value for name, value in (_ingredient(stage, "models") or {}).items()}
    facts |= {name: stage.result[name] for name in ("model", "revision") if name in stage.result}
    facts |= {"package": _ingredient(stage, "package"), "commit": stage.manifest.get("commit")}
    facts |= {"machine": stage.manifest.get("machine"), "libraries": _ingredient(stage, "libraries")}
    facts |= {
        "time": duration(spent) if (spent := _seconds(stage)) else None,
        "finished": stage.manifest.get("finished"),
    }
    if peak := stage.manifest.get("peak_memory_bytes"):
        facts["peak memory"] = f"{peak / 1e6:,.0f} MB"
    facts |= {f"parameter {name}": value for name, value in dict(parameters).items()}
    facts |= {f"cost: {name}": value for name, value in stage.cost.items()}
    known = {*SHOWN, "parameters", "model", "revision", "seconds"}
    facts |= {name: value for name, value in stage.result.items() if name not in known}
    rows = [
        {"fact": name.replace("_", " "), "value": _words(value)} for name, value in facts.items() if value not in EMPTY
    ]
    return f"<details><summary>What was run on what</summary>{html_table(rows, most=200)}</details>"


def _limits(stages: list[Stage]) -> str:
    told = [(stage.name, str(text)) for stage in stages for text in _as_list(stage.result.get("limits"))]
    if not told and not any(stage.result.get(name) for stage in stages for name in ("table", "tables", "comparisons")):
        return ""  # nothing was claimed that could have a limit
    items = "".join(f"<li>{html.escape(text)} <small>({html.escape(name)})</small></li>" for name, text in told)
    body = f"<ul>{items}</ul>" if items else _note("No stage recorded a limit of what it shows. That is an omission.")
    return f'<section id="limits"><h2>Limits</h2>{body}</section>'


def _prose(value: Any) -> str:
    if isinstance(value, Mapping):
        return html_table([{"fact": name, "value": _words(item)} for name, item in value.items()])
    return "".join(f"<p>{html.escape(str(text))}</p>" for text in _as_list(value))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _note(text: str, command: str = "") -> str:
    code = f"<br><code>{html.escape(command)}</code>" if command else ""
    return f'<p class="note">{html.escape(text)}{code}</p>'


def _ingredient(stage: Stage, name: str) -> Any:
    return (stage.manifest.get("ingredients") or {}).get(name) or stage.result.get(name)


def _seconds(stage: Stage) -> float | None:
    value = stage.manifest.get("seconds") or stage.result.get("seconds") or stage.cost.get("seconds")
    return float(value) if isinstance(value, (int, float)) else None


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(_words_of(name, item) for name, item in value.items() if item not in EMPTY)
    return ", ".join(map(_words, value)) if isinstance(value, list) else str(value)


def _words_of(name: str, value: Any) -> str:
    if name.endswith("_bytes") and isinstance(value, (int, float)):
        return f"{name.removesuffix('_bytes')} {value / 1e9:.1f} GB"
    return f"{name} {_words(value)}"
