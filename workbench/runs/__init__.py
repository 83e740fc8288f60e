"""Run notebooks without a screen: checked parameters, one child process a notebook, and proof of what is done.

A run is a pure function of (notebooks, parameters, package, model revisions, libraries). It may be killed at any moment
and started again, or started twice at once: what is proven by a manifest is kept, the rest is redone. Folder:

    FOLDER/manifest.json, report.html        written when all stages are done
    FOLDER/<stage>/result.json, <stage>.ipynb, ..., manifest.json (last)
    FOLDER/.run/                             the runner's own notes: lock, owner, journal, heartbeats, logs

Leans on papermill (called in `execute`). Parameters are `params`' matter, the truth about a run is told by `status`.
"""

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.files import content_key, sha256, to_json, write_atomic
from workbench.runs import locks
from workbench.runs.heartbeats import duration, heartbeat, progress
from workbench.runs.journal import Journal
from workbench.runs.launch import Failure, launch
from workbench.runs.manifest import NAME, damage, proven, read_manifest, seal, sweep, write_manifest
from workbench.runs.params import ParameterError, assign, read_parameters
from workbench.runs.provenance import PACKAGE, commit, ingredients, libraries, machine, package_source, package_version
from workbench.runs.stages import RESULT, begin, earlier, finish, project_root

__all__ = [
    "Run",
    "RunFailed",
    "begin",
    "content_key",
    "earlier",
    "finish",
    "heartbeat",
    "progress",
    "run",
    "sha256",
    "write_atomic",
]

OWN = ".run"  # the runner's folder inside a run folder


class RunFailed(RuntimeError):
    """A stage failed; `stage` is its name, `failure` the record of what went wrong."""

    def __init__(self, stage: str, failure: Failure, folder: Path) -> None:
        self.stage, self.failure, self.folder = stage, failure, folder
        where = f" in cell {failure.cell}" if failure.cell else ""
        super().__init__(f"{stage} failed{where}: {failure.name}: {failure.message}")


@dataclass(frozen=True)
class Stage:
    """One notebook of a run with all its parameter values; `source` is the file's content when the run began."""

    name: str
    path: Path
    source: bytes
    values: dict[str, Any]

    @property
    def needs(self) -> list[str] | None:
        """The earlier stages whose files it reads, from metadata.workbench.needs; None means all of them."""
        found = json.loads(self.source).get("metadata", {}).get("workbench", {}).get("needs")
        return None if found is None else [str(name) for name in found]


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, seconds by stage (None: kept from before), and the report if one was made."""

    folder: Path
    seconds: dict[str, float | None]
    report: Path | None


def run(
    notebooks: Sequence[Path | str] | None = None,
    parameters: Mapping[str, object] | None = None,
    out: Path | str | None = None,
    *,
    timeout: float | None = None,
    fresh: bool = False,
    say: Callable[[str], None] = print,
) -> Run:
    """Run notebooks in order and return the finished run; work that is already proven is not repeated.

    notebooks: paths; all of `notebooks/` by default. parameters: NAME: value, given to the notebooks that declare them.
    out: the run folder; `outputs/run-KEY` by default, where KEY comes from the parameters, so that the same command
    continues the same run. timeout: seconds of wall-clock time for each notebook. fresh: redo everything.
    Raises ParameterError before anything starts, RunFailed when a notebook fails.
    """
    paths = find_notebooks(notebooks)
    stages = plan(paths, parameters or {})
    folder = choose_folder(out, stages)
    with locks.hold(folder / OWN, say) as owner:
        journal = Journal.open(folder / OWN / "journal.json")
        journal.expect({stage.name: own_key(ingredients(stage.source, stage.values, {})) for stage in stages})
        if fresh:
            journal.forget(stage.name for stage in stages)
        seconds: dict[str, float | None] = {}
        for stage in stages:
            owner.beat()
            seconds[stage.name] = run_stage(
                stage, stages, folder, journal, owner, timeout=timeout, fresh=fresh, say=say
            )
        report = complete(
            folder, stages, parameters or {}, changed=any(value is not None for value in seconds.values()), say=say
        )
    return Run(folder, seconds, report)


def find_notebooks(notebooks: Sequence[Path | str] | None) -> list[Path]:
    """Return the notebooks to run, in order; a bare name such as `05_evaluate` is looked for in `notebooks/`."""
    home = project_root() / "notebooks"
    if not notebooks:
        found = sorted(path for path in home.glob("*.ipynb") if not path.name.startswith("."))
        if not found:
            raise ParameterError(f"there are no notebooks in {home}. Name some: python -m workbench run PATH.ipynb")
        return found
    paths = []
    for name in notebooks:
        choices = [Path(name), home / f"{name}", home / f"{name}.ipynb"]
        path = next((choice for choice in choices if choice.is_file()), None)
        if path is None:
            known = ", ".join(sorted(item.stem for item in home.glob("*.ipynb"))) or "none"
            raise ParameterError(f"there is no notebook {name}. In {home}: {known}.")
        paths.append(path.resolve())
    if len({path.stem for path in paths}) < len(paths):
        raise ParameterError(
            f"two notebooks have the same name: {', '.join(path.stem for path in paths)}. Names are folders."
        )
    return paths


def plan(paths: Sequence[Path], parameters: Mapping[str, object]) -> list[Stage]:
    """Check all parameters of all notebooks and return the stages; raises ParameterError."""
    values = assign({path.stem: read_parameters(path) for path in paths}, parameters)
    return [Stage(path.stem, path, path.read_bytes(), values[path.stem]) for path in paths]


def choose_folder(out: Path | str | None, stages: Sequence[Stage]) -> Path:
    """Return the run folder; refuse one that holds something else."""
    if out is None:
        values = {
            stage.name: {name: value for name, value in stage.values.items() if name != "out"} for stage in stages
        }
        return project_root() / "outputs" / f"run-{content_key(values=values)[:8]}"
    folder = Path(out).expanduser().resolve()
    if folder.is_file() or (folder.is_dir() and not (folder / OWN).is_dir() and any(folder.iterdir())):
        raise ParameterError(f"{folder} exists and is no run folder. Choose a new or empty one: --out outputs/NAME")
    return folder


def own_key(found: Mapping[str, Any]) -> str:
    """Return the key of a stage's ingredients without its inputs."""
    return content_key(**{name: value for name, value in found.items() if name != "inputs"})


def input_keys(stage: Stage, stages: Sequence[Stage], folder: Path) -> dict[str, str]:
    """Return the output keys of the stages that come before this one, in this command or already in the folder."""
    names = [item.name for item in stages]
    before = set(names[: names.index(stage.name)])
    before |= {path.parent.name for path in folder.glob(f"*/{NAME}") if path.parent.name < stage.name} - set(names)
    if stage.needs is not None:
        before &= set(stage.needs)
    manifests = {name: read_manifest(folder / name) for name in sorted(before)}
    return {name: manifest["output_key"] for name, manifest in manifests.items() if manifest}


def run_stage(
    stage: Stage,
    stages: Sequence[Stage],
    folder: Path,
    journal: Journal,
    owner: locks.Owner,
    *,
    timeout: float | None,
    fresh: bool,
    say: Callable[[str], None],
) -> float | None:
    """Run one stage unless it is proven; return its seconds, or None if it was kept."""
    found = ingredients(stage.source, stage.values, input_keys(stage, stages, folder))
    key = content_key(**found)
    target = folder / stage.name
    manifest = None if fresh else proven(target)
    if manifest and manifest["key"] == key:
        journal.note(stage.name, state="completed", key=key)
        say(f"{stage.name}: kept")
        return None
    (folder / NAME).unlink(missing_ok=True)
    unfinished = journal.attempt(stage.name) == key and not (target / NAME).exists()
    sweep(target, keep=unfinished)
    say(f"{stage.name}: {'continued' if unfinished else 'started'}")
    values = stage.values | ({"out": str(folder)} if "out" in stage.values else {})
    began = time.time()
    journal.note(stage.name, state="running", key=key, began=began, error=None)
    try:
        outcome = launch(folder, stage.name, stage.source, values, owner, timeout=timeout, say=say)
    except BaseException:
        journal.note(stage.name, state="interrupted")
        raise
    if failure := outcome.failure or missing_result(target):
        journal.note(stage.name, state="failed", error=failure.record(), seconds=time.time() - began)
        raise RunFailed(stage.name, failure, folder)
    seconds = round(time.time() - began, 3)
    facts = {"seconds": seconds, "peak_memory_bytes": outcome.peak_memory_bytes, "parameters": stage.values}
    write_manifest(target, stage.name, key, found, facts)
    journal.note(stage.name, state="completed", seconds=seconds)
    say(f"{stage.name}: done in {duration(seconds)}")
    return seconds


def missing_result(target: Path) -> Failure | None:
    """Return a failure if a notebook ended without a readable result."""
    try:
        json.loads((target / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        hint = f"no readable {RESULT} was left ({error}); the last cell must call wb.runs.finish(folder, result)"
        return Failure("NoResult", hint)
    return None


def complete(
    folder: Path, stages: Sequence[Stage], given: Mapping[str, object], *, changed: bool, say: Callable[[str], None]
) -> Path | None:
    """Write the report and the manifest of a whole run, unless nothing changed; return the report's path."""
    report = folder / "report.html"
    existing = read_manifest(folder)
    if not changed and existing and not damage(folder, existing):
        return report if report.exists() else None
    with contextlib.suppress(FileNotFoundError):
        report.unlink()
    make_report(folder, say)
    manifests = {path.parent.name: read_manifest(path.parent) for path in sorted(folder.glob(f"*/{NAME}"))}
    content = {
        "given": {name: json.loads(to_json(value)) for name, value in given.items()},
        "stages": {
            name: {
                "key": item["key"],
                "output_key": item["output_key"],
                "seconds": item["seconds"],
                "parameters": item["parameters"],
            }
            for name, item in manifests.items()
            if item
        },
        "order": [stage.name for stage in stages],
        "package": {"version": package_version(), "source": package_source(PACKAGE), "commit": commit()},
        "libraries": libraries(),
        "machine": machine(),
        "files": {"report.html": {"size": report.stat().st_size, "sha256": sha256(report)}} if report.exists() else {},
    }
    seal(folder / NAME, content)
    return report if report.exists() else None


def make_report(folder: Path, say: Callable[[str], None]) -> None:
    """Write report.html; a report that fails costs a warning, never the run."""
    try:
        from workbench.report import write_report

        write_report(folder)
    except Exception as error:
        say(f"the report was not written ({type(error).__name__}: {error}); try: python -m workbench report {folder}")
