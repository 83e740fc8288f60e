"""Results as Parquet (nothing is lost) and as CSV for spreadsheets (nothing in it can run).

Parquet keeps dtypes, None, costs and `about`. In CSV a text that a spreadsheet would take for a formula gets an
apostrophe in front (OWASP, "CSV Injection"), which `read_table` takes away again; costs and None against '' are lost.
"""

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.files import write_atomic
from workbench.results import Results

FORMULA = re.compile(
    r"^'*[=+\-@\t\r\n|%]"
)  # what Excel, LibreOffice and Sheets may run, or an apostrophe put before it
NUMBER = re.compile(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?")
KEY = b"workbench"


def to_parquet(results: Results, path: str | Path) -> Path:
    """Write rows, costs and about into one Parquet file; `read_parquet` gives equal results back."""
    import pyarrow
    import pyarrow.parquet

    columns, stored = {}, {}
    for name in results.rows.columns:
        column = results.rows[name]
        stored[str(name)] = str(column.dtype)
        if column.dtype == object:
            values = column.tolist()
            if not all(value is None or isinstance(value, str) for value in values):
                values = [json.dumps(value, ensure_ascii=False) for value in values]
                stored[str(name)] = "json"
            columns[str(name)] = pyarrow.array(values, type=pyarrow.string())
        else:
            columns[str(name)] = pyarrow.array(column, from_pandas=False)
    about = {"costs": results.costs, "about": results.about, "dtypes": stored}
    table = pyarrow.table(columns).replace_schema_metadata({KEY: json.dumps(about)})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    write_atomic(Path(path), buffer.getvalue())
    return Path(path)


def read_parquet(path: str | Path) -> Results:
    """Results that `to_parquet` wrote; raises ValueError for another Parquet file (see `read_table`)."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    if KEY not in (table.schema.metadata or {}):
        raise ValueError(
            f"{path} was not written by to_parquet. Read it as a table: exchange.read_table({str(path)!r})"
        )
    about = json.loads(table.schema.metadata[KEY])
    columns = {}
    for name, dtype in about["dtypes"].items():
        values: Any = table[name].to_pylist()
        if dtype == "json":
            values, dtype = [json.loads(value) for value in values], "object"
        columns[name] = pd.Series(values, dtype=dtype)
    return Results(pd.DataFrame(columns), about["costs"], about["about"])


def to_csv(results: Results, path: str | Path) -> Path:
    """Write the rows as CSV: UTF-8, every text in quotes, formulas made harmless, None empty."""
    target = io.StringIO(newline="")
    writer = csv.writer(target, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow([guarded(str(name)) for name in results.rows.columns])
    for row in results.rows.itertuples(index=False, name=None):
        writer.writerow([_cell(value) for value in row])
    write_atomic(Path(path), target.getvalue())
    return Path(path)


def guarded(text: str) -> str:
    """A text that no spreadsheet takes for a formula; plain numbers stay as they are.

    >>> [guarded(text) for text in ("=1+1", "-5", "-5+cmd", "'=x", "fine")]
    ["'=1+1", '-5', "'-5+cmd", "''=x", 'fine']
    """
    return f"'{text}" if FORMULA.match(text) and not NUMBER.fullmatch(text) else text


def unguarded(text: str) -> str:
    """What `guarded` was given.

    >>> [unguarded(guarded(text)) for text in ("=1+1", "-5", "'=x", "'quoted'")]
    ['=1+1', '-5', "'=x", "'quoted'"]
    """
    return text[1:] if text.startswith("'") and FORMULA.match(text) else text


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bool | int | float):
        return str(value) if isinstance(value, bool) else value
    return guarded(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))
