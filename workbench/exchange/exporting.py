"""Export of a folder's results by the name of a format; what the command line calls."""

from collections.abc import Callable
from pathlib import Path

from workbench.exchange.inspect_logs import to_inspect
from workbench.exchange.spreadsheets import to_csv, to_parquet
from workbench.results import Results, load_results

FORMATS: dict[str, Callable[[Results, Path], list[Path]]] = {
    "inspect": to_inspect,
    "csv": lambda results, out: [to_csv(results, out)],
    "parquet": lambda results, out: [to_parquet(results, out)],
}


def export_folder(folder: Path, to: str, out: Path) -> list[Path]:
    """Write the results in `folder` as `to` ('inspect', 'csv', 'parquet') and return what was written.

    `folder` holds rows.jsonl, or is a run folder in which exactly one folder does. Raises ValueError for an unknown
    format, no results or several (with their names), and an `out` that is of the wrong kind.
    """
    if to not in FORMATS:
        raise ValueError(f"--to {to} is not known. Use one of: {', '.join(FORMATS)}.")
    if to == "inspect" and out.is_file():
        raise ValueError(f"{out} is a file; --to inspect writes one log a condition. Give a folder: --out logs")
    if to != "inspect" and out.is_dir():
        raise ValueError(f"{out} is a folder; --to {to} writes one file. Give its name: --out {out / f'results.{to}'}")
    return FORMATS[to](load_results(_results_folder(folder)), out)


def _results_folder(folder: Path) -> Path:
    if (folder / "rows.jsonl").is_file():
        return folder
    found = sorted(path.parent for path in folder.rglob("rows.jsonl") if (path.parent / "costs.json").is_file())
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{folder} holds several results: {', '.join(map(str, found))}. Export one of these folders.")
    raise ValueError(f"{folder} holds no results (rows.jsonl is missing). Make them: wb.evaluate(..., out='{folder}')")
