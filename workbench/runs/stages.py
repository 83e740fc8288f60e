"""What a notebook calls to take part in a run: begin a stage, find an earlier one's files, leave a result.

The same calls work in JupyterLab, where the run folder is `outputs/interactive`. Leaves scheduling, keys and manifests
to `runs`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workbench.files import write_atomic

RESULT = "result.json"
COST = "cost.json"


class StageError(RuntimeError):
    """A stage can't begin or end; the text says which notebook to run first, or what is wrong with the result."""


def begin(stage: str, out: Path | str) -> Path:
    """Return this stage's own folder inside the run folder `out`, made if needed.

    A relative `out` is taken from the project's root (the folder that holds `notebooks`), so that a notebook writes
    to the same place from JupyterLab, from VS Code and from the command line.
    """
    folder = run_folder(out) / stage
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_folder(out: Path | str) -> Path:
    """Return the run folder as an absolute path; relative ones start at the project's root."""
    path = Path(out).expanduser()
    return path if path.is_absolute() else project_root() / path


def project_root() -> Path:
    """Return the nearest folder above the working one, or itself, that holds `notebooks`; else the working one."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "notebooks").is_dir()), here)


def earlier(stage: str, out: Path | str) -> Path:
    """Return the folder of an earlier stage of the same run; raise StageError if that stage has not finished."""
    folder = run_folder(out) / stage
    if not (folder / RESULT).is_file():
        raise StageError(
            f"this notebook needs what {stage} writes, and {folder} has no {RESULT}. Run {stage} first: open it in "
            f"JupyterLab, or type `python -m workbench run notebooks/{stage}.ipynb --out {run_folder(out)}`."
        )
    return folder


def finish(folder: Path | str, result: Mapping[str, Any], cost: Mapping[str, Any] | None = None) -> Path:
    """Write a stage's `result.json` (and `cost.json`) and return its path; call it in a notebook's last cell.

    `result` holds what the same start would give again; times and memory, which it would not, go into `cost`. Values
    may be plain data, NumPy or torch scalars and arrays, data frames (as lists of rows) and paths; not-a-number
    becomes null. Raises StageError for anything else.
    """
    target = Path(folder) / RESULT
    write_atomic(target.with_name(COST), ordered(plain_data(dict(cost or {}), "cost")))
    write_atomic(target, ordered(plain_data(dict(result), "result")))
    return target


def ordered(value: object) -> str:
    """Serialise plain data in the order given: the columns of a table keep their places."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2) + "\n"


def plain_data(value: Any, name: str) -> Any:
    """Return `value` as JSON data; `name` says where in the result an error is."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, Mapping):
        return {str(key): plain_data(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_data(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        return plain_data(value.to_dict(orient="records"), name)
    if hasattr(value, "tolist"):
        return plain_data(value.tolist(), name)
    raise StageError(f"{name} is a {type(value).__name__}: results hold plain data only (text, numbers, lists, dicts).")
