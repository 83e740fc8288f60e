"""The command line: `python -m workbench run | sweep | status | compare | report | site | class | doctor | ...`.

Thin: each command reads its words, calls one function and prints. Bad input ends with exit code 2 before any work, a
failed run with 1 and the next command to type.
"""

import shlex
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from workbench import runs
from workbench.runs import comparison, params, points
from workbench.runs import status as state
from workbench.runs.heartbeats import duration
from workbench.runs.stages import project_root

TOLD = (
    "ModelError",
    "RecordError",
    "StageError",
    "Diverged",
    "ShortOfMemory",
)  # their text says all: no source and no traceback beside it

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=(__doc__ or "").split("\n")[0]
)

Notebooks = Annotated[list[str] | None, typer.Argument(help="notebooks, or names in notebooks/; all by default")]
Given = Annotated[list[str] | None, typer.Option("-p", "--parameter", metavar="NAME=VALUE", help="repeat as needed")]
File = Annotated[Path | None, typer.Option("-f", "--file", help="YAML or JSON file of NAME: VALUE")]
Out = Annotated[Path | None, typer.Option("--out", help="run folder; by default one named after the parameters")]
Home = Annotated[Path, typer.Option("--out", help="folder for the runs, one folder for each combination")]
Limit = Annotated[
    float | None, typer.Option("--timeout", min=0.001, help="seconds of wall-clock time for each notebook")
]
Fresh = Annotated[bool, typer.Option("--fresh", help="redo everything, also what is proven done")]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Folder = Annotated[Path | None, typer.Argument(help="a run folder; by default the last one in outputs/")]


@app.command()
def run(
    notebooks: Notebooks = None,
    parameter: Given = None,
    file: File = None,
    out: Out = None,
    timeout: Limit = None,
    fresh: Fresh = False,
) -> None:
    """Run notebooks in order; a second start redoes only what is missing or changed."""
    signal.signal(signal.SIGTERM, interrupt)
    try:
        given = params.gather(parameter or [], file)
        done = runs.run(notebooks, given, out, timeout=timeout, fresh=fresh, say=say)
    except ValueError as error:  # ParameterError included: refused before work
        end(str(error), 2)
    except runs.RunFailed as error:
        end_failed(error)
    except OSError as error:
        end(f"the run's files could not be written: {error}. Free space or choose another --out.", 1)
    except KeyboardInterrupt:
        end(f"interrupted. Continue with: {again()}", 130)
    print_times(done)
    print(comparison.main_table(done.folder))
    print(f"report: {done.report}" if done.report else f"results: {done.folder}")


@app.command()
def sweep(
    out: Home,
    notebooks: Notebooks = None,
    parameter: Given = None,
    file: File = None,
    timeout: Limit = None,
    fresh: Fresh = False,
) -> None:
    """Run notebooks once for every combination of -p NAME=V1,V2 and compare the runs; a second start goes on."""
    signal.signal(signal.SIGTERM, interrupt)
    failed: list[str] = []
    try:
        paths = runs.find_notebooks(notebooks)
        found = points.combinations(points.split_values(params.gather(parameter or [], file)))
        if (out / runs.OWN).is_dir():
            raise params.ParameterError(f"{out} is a single run. Choose another folder for the sweep: --out FOLDER")
        for name, given in found.items():  # all of them, before the first is run
            runs.choose_folder(out / name, runs.plan(paths, given))
        for number, (name, given) in enumerate(found.items(), start=1):
            say(f"{name} ({number} of {len(found)})")
            try:
                runs.run(paths, given, out / name, timeout=timeout, fresh=fresh, say=say)
            except runs.RunFailed as error:
                say(str(error))
                failed.append(name)
    except ValueError as error:
        end(str(error), 2)
    except OSError as error:
        end(f"the runs' files could not be written: {error}. Free space or choose another --out.", 1)
    except KeyboardInterrupt:
        end(f"interrupted. Continue with: {again()}", 130)
    if done := [out / name for name in found if name not in failed]:
        print(comparison.compare(done).text())
    if failed:
        end(f"failed: {', '.join(failed)}. What is done is kept; continue with: {again()}", 1)


@app.command()
def status(folder: Folder = None, json: Json = False) -> None:
    """Tell what is completed, running, stalled, interrupted or failed in a run folder."""
    home = folder or state.latest(project_root() / "outputs")
    if home is None:
        end("there is no run in outputs/ yet. Start one: python -m workbench run", 2)
    try:
        found = state.status(home)
    except FileNotFoundError as error:
        end(str(error), 2)
    print(state.as_data(found) if json else comparison.status_text(found))


@app.command()
def compare(folders: Annotated[list[Path], typer.Argument(help="two or more run folders")], json: Json = False) -> None:
    """Show what differed between runs and what came out of each."""
    try:
        found = comparison.compare(folders)
    except ValueError as error:
        end(str(error), 2)
    print(found.as_data() if json else found.text())


@app.command()
def parameters(notebooks: Notebooks = None) -> None:
    """List the parameters that notebooks declare: name, type, default."""
    try:
        found = [params.read_parameters(path) for path in runs.find_notebooks(notebooks)]
    except ValueError as error:
        end(str(error), 2)
    for declaration in found:
        print(declaration.notebook)
        for item in declaration.parameters.values():
            print(f"  {item.name}: {item.annotation} = {item.default!r}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="a run folder")]) -> None:
    """Write report.html for a run folder."""
    from workbench.report import write_report

    if not folder.is_dir():
        end(f"there is no folder {folder}. Start a run: python -m workbench run --out {folder}", 2)
    print(write_report(folder))


@app.command()
def site(
    folder: Annotated[Path | None, typer.Argument(help="a run folder; by default the newest complete one")] = None,
    out: Annotated[Path, typer.Option("--out", help="folder for the pages")] = Path("outputs/site"),
) -> None:
    """Write a run's executed notebooks as pages that open offline."""
    from workbench.report.site import TOOL, newest, write_site

    home = project_root()
    try:
        print(write_site(folder or newest(home / "outputs", say), out, tool=home / TOOL, say=say))
    except ValueError as error:
        end(str(error), 2)
    except OSError as error:
        end(f"the pages could not be written: {error}. Free space or choose another --out.", 1)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="a folder of results, or a run folder that holds one such")],
    to: Annotated[str, typer.Option("--to", help="inspect, csv or parquet")],
    out: Annotated[Path, typer.Option("--out", help="a file; for inspect a folder, one log for each condition")],
) -> None:
    """Write results for other tools: spreadsheets, data frames, inspect_ai's viewer."""
    from workbench.exchange.exporting import export_folder

    try:
        written = export_folder(folder, to, out)
    except ValueError as error:
        end(str(error), 2)
    except OSError as error:
        end(f"the export could not be written: {error}. Free space or choose another --out.", 1)
    for path in written:
        print(path)


@app.command("class")
def class_(
    notebooks: Notebooks = None,
    out: Annotated[Path | None, typer.Option("--out", help="folder for both; by default outputs/class")] = None,
) -> None:
    """Build the student's and the teacher's version of notebooks with exercises."""
    from workbench.runs.provenance import commit
    from workbench.teaching.editions import build_class

    try:
        written = build_class(
            runs.find_notebooks(notebooks), out or project_root() / "outputs" / "class", commit() or "unknown"
        )
    except ValueError as error:
        end(str(error), 2)
    except OSError as error:
        end(f"the versions could not be written: {error}. Free space or choose another --out.", 1)
    for path in written:
        print(path)


@app.command()
def doctor() -> None:
    """Check this machine and installation."""
    from workbench.doctor import main

    sys.exit(main())


def say(text: str) -> None:
    """Print progress where it does not mix with results."""
    print(text, file=sys.stderr, flush=True)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Treat a request to terminate like Ctrl-C, so that the kernel is ended too."""
    raise KeyboardInterrupt


def end(text: str, code: int) -> NoReturn:
    """Print one paragraph to standard error and leave."""
    say(text)
    sys.exit(code)


def end_failed(error: runs.RunFailed) -> NoReturn:
    """Print a failed cell's error, where to look, and what to type next."""
    failure = error.failure
    if failure.source and failure.name not in TOLD:
        say("\n".join(f"    {line}" for line in failure.source.splitlines()[:20]))
    if failure.traceback and failure.name not in TOLD:
        say("\n".join(failure.traceback.splitlines()[-12:]))
    executed = error.folder / error.stage / f"{error.stage}.ipynb"
    where = f" The notebook as far as it came: {executed}." if executed.exists() else ""
    end(f"{str(error).rstrip('.')}.{where} What is done is kept; continue with: {again()}", 1)


def again() -> str:
    """Return the command line that was typed."""
    return shlex.join(["python", "-m", "workbench", *sys.argv[1:]])


def print_times(done: runs.Run) -> None:
    """Print how long each stage took."""
    width = max((len(name) for name in done.seconds), default=0)
    for name, seconds in done.seconds.items():
        print(f"{name:<{width}}  {'kept' if seconds is None else duration(seconds)}")


if __name__ == "__main__":
    app(prog_name="python -m workbench")
