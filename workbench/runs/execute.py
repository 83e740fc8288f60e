"""Execute one notebook in this process, for `runs`, which starts it as `python -m workbench.runs.execute FOLDER`.

Papermill does the work, on a copy of the notebook and with parameters that were checked before. What papermill gets
wrong is mended here: its output is written atomically, its cell statuses are not believed, the kernel is this
interpreter whatever is registered, and the values of secret environment variables are taken out of what is saved.
FOLDER holds `job.json` and `source.ipynb`; `partial.ipynb` and, at the end, `outcome.json` are written beside them.
"""

import json
import logging
import os
import re
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from workbench.files import to_json, write_atomic
from workbench.runs.params import is_secret
from workbench.runs.processes import die_with_parent

SCHEME = "workbench:"
COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
KIBIBYTE = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss differs between systems


@dataclass(frozen=True)
class Output:
    """Where papermill writes: one file, replaced as a whole, without secrets."""

    path: Path

    def write(self, buffer: str, path: str) -> None:
        """Replace the file; `path` is papermill's name for it."""
        write_atomic(self.path, without_secrets(buffer))

    def pretty_path(self, path: str) -> str:
        """Return the name for papermill's log."""
        return self.path.name


def without_secrets(text: str) -> str:
    """Replace the values of environment variables that look like credentials."""
    for name, value in os.environ.items():
        if is_secret(name) and len(value) >= 12:
            text = text.replace(value, f"[{name}]").replace(json.dumps(value)[1:-1], f"[{name}]")
    return text


def main(folder: Path) -> int:
    """Execute the job in `folder` and write its outcome; return 0 if every cell ran."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    die_with_parent(job["parent"])
    signal.signal(signal.SIGTERM, stop)
    try:
        error = execute(folder, job)
    except KeyboardInterrupt:
        error = {"name": "Stopped", "message": "the runner stopped it", "cell": None, "source": "", "traceback": ""}
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * KIBIBYTE
    if error:
        mark_unfinished(folder / "partial.ipynb", error)
    write_atomic(folder / "outcome.json", without_secrets(to_json({"error": error, "peak_memory_bytes": peak})))
    return 1 if error else 0


def stop(number: int, frame: FrameType | None) -> None:
    """Turn a termination signal into an interrupt, so that papermill ends its kernel and saves."""
    raise KeyboardInterrupt


def execute(folder: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """Run papermill; return None, or what went wrong: name, message, cell (counted from 1), source, traceback."""
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # jsonschema's extra: a second at import
    import nbformat
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.iorw import papermill_io
    from traitlets.config import Config

    logging.getLogger("papermill").setLevel(logging.ERROR)
    papermill_io.register(SCHEME, Output(folder / "partial.ipynb"))
    notebook = nbformat.read(folder / "source.ipynb", as_version=4)
    transport = {"transport": "ipc", "ip": f"{job['scratch']}/k"} if len(job["scratch"]) < 90 else {}
    try:
        papermill.execute_notebook(
            notebook,
            f"{SCHEME}partial.ipynb",
            parameters=job["parameters"],
            kernel_name="python3",
            language="python",
            progress_bar=False,
            start_timeout=300,
            cwd=job["cwd"],
            config=Config({"KernelManager": transport}),
        )
    except papermill.PapermillExecutionError as error:
        trace = COLOURS.sub("", "\n".join(error.traceback))
        return failure(error.ename, error.evalue, own_cell(notebook, error.cell_index, job), error.source, trace)
    except DeadKernelError:
        hint = "its kernel died (killed from outside; running out of memory is the usual cause)"
        return failure("KernelDied", hint)
    except Exception as error:
        return failure(type(error).__name__, str(error) or "no message")
    return None


def own_cell(notebook: Any, index: int, job: dict[str, Any]) -> int:
    """Return a cell's place in the source notebook, from 1; papermill counts the cell that it puts in, too."""
    tagged = [place for place, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    inserted = bool(job["parameters"]) and index > (tagged[0] if tagged else -1)
    return index + 1 - inserted


def failure(name: str, message: str, cell: int | None = None, source: str = "", trace: str = "") -> dict[str, Any]:
    """Return the record of a failed execution."""
    return {
        "name": name,
        "message": COLOURS.sub("", message)[-2000:],
        "cell": cell,
        "source": source,
        "traceback": trace[-20000:],
    }


def mark_unfinished(path: Path, error: dict[str, Any]) -> None:
    """Correct a saved notebook that calls every cell completed after its kernel died, and say what happened."""
    if not path.exists():
        return
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["metadata"]["workbench_run"] = {"state": "failed", "error": f"{error['name']}: {error['message']}"}
    notebook["metadata"].get("papermill", {})["exception"] = True
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code" and cell.get("execution_count") is None:
            cell["metadata"].get("papermill", {})["status"] = "pending"
    write_atomic(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
