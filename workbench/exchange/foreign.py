"""Read any result file by what is in it: an own folder, lm-eval's samples, an inspect_ai log, a table."""

import json
from pathlib import Path
from typing import Any

from workbench.exchange.inspect_logs import read_inspect
from workbench.exchange.lm_eval_samples import read_lm_eval
from workbench.exchange.spreadsheets import KEY, read_parquet
from workbench.exchange.tables import read_table
from workbench.results import Results, load_results


def read_results(path: str | Path, **options: Any) -> Results:
    """Results from a file or folder of any known kind; `options` are those of the reader that fits.

    A folder with rows.jsonl is an own one, a folder with one samples_*.jsonl is lm-eval's; `.eval` and `.json` are
    inspect_ai's; `.parquet` written by `to_parquet` comes back as it was. All else is a table (`read_table`).
    """
    path = Path(path)
    if path.is_dir():
        if (path / "rows.jsonl").exists():
            return load_results(path)
        return read_lm_eval(path, **options)
    if not path.exists():
        raise ValueError(
            f"There is no file or folder {path}. Give results of evaluate, lm-eval, inspect_ai or a table."
        )
    if path.suffix in (".eval", ".json"):
        return read_inspect(path, **options)
    if path.suffix == ".parquet" and not options and _is_own(path):
        return read_parquet(path)
    if path.suffix == ".jsonl" and _is_samples(path):
        return read_lm_eval(path, **options)
    return read_table(path, **options)


def _is_own(path: Path) -> bool:
    import pyarrow.parquet

    return KEY in (pyarrow.parquet.read_schema(path).metadata or {})


def _is_samples(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as handle:
        try:
            first = json.loads(handle.readline())
        except ValueError:
            return False
    return isinstance(first, dict) and {"doc_id", "filtered_resps"} <= first.keys()
