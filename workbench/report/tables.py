"""Rows as tables that a person reads: for the terminal and for a page, an estimate always beside its interval.

A row is a dict; limits (`low`, `high`, or NAME_low and NAME_high) are folded into the cell of the value they belong to.
Every text is escaped for HTML. Not covered: sorting and filtering, which a notebook does on the data frame.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

from workbench.plots.drawing import Table, is_missing, listed, p_text
from workbench.plots.palette import colour

Row = Mapping[str, Any]
OWNERS = ("accuracy", "difference", "effect", "mean", "estimate", "value")  # whom plain `low` and `high` belong to
FIRST = [
    *(
        "condition",
        "a",
        "b",
        "layer",
        "strength",
        "n",
        "accuracy",
        "difference",
        "effect",
        "p_value",
        "p_holm",
        "steps",
        "unparsed",
    ),
    *("tokens_in", "tokens_out", "seconds", "peak_memory_mb", "model_calls", "forward_passes"),
]
HEADS = {"p_value": "p", "p_holm": "p (Holm)", "peak_memory_mb": "peak memory (MB)", "a": "first", "b": "second"}
NAMES = ("condition", "a", "b")
CELL = 300  # characters of one cell; the full text is in the stage's own files


def format_table(rows: Table) -> str:
    """Plain-text table for a terminal.

    >>> print(format_table([{"condition": "plain", "n": 400, "accuracy": 0.43, "low": 0.38, "high": 0.48}]))
    condition    n           accuracy
    plain      400  0.43 [0.38, 0.48]
    """
    items = listed(rows)
    if not items:
        return "(no rows)"
    names = columns(items)
    digits = {name: _digits(items, name) for name in names}
    lines = [[head(name) for name in names], *([cell(row, name, digits[name]) for name in names] for row in items)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(names))]
    right = [_is_numeric(items, name) for name in names]
    padded = (
        "  ".join(text.rjust(width) if flush else text.ljust(width) for text, width, flush in zip(*parts, strict=True))
        for parts in ((line, widths, right) for line in lines)
    )
    return "\n".join(line.rstrip() for line in padded)


def html_table(rows: Table, caption: str = "", most: int = 100) -> str:
    """Escaped HTML table of at most `most` rows; conditions carry the dot of their colour in the figures."""
    items = listed(rows)
    names = columns(items)
    kinds = {name: "number" if _is_numeric(items, name) else "name" if name in NAMES else "text" for name in names}
    digits = {name: _digits(items, name) for name in names}
    top = "".join(f'<th scope="col" class="{kinds[name]}">{html.escape(head(name))}</th>' for name in names)
    body = ""
    for row in items[:most]:
        cells = ((kinds[name], _dot(row, name) + html.escape(cell(row, name, digits[name]))) for name in names)
        body += "<tr>" + "".join(f'<td class="{kind}">{text}</td>' for kind, text in cells) + "</tr>"
    if len(items) > most:
        caption += f" The first {most} of {len(items)} rows; all are in the stage's result.json."
    told = f"<caption>{html.escape(caption.strip())}</caption>" if caption else ""
    return f'<div class="scroll"><table>{told}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def columns(rows: Sequence[Row]) -> list[str]:
    """Column names: the well-known ones first, limits folded away, the others in the order met."""
    found = list(dict.fromkeys(name for row in rows for name in row))
    folded = {limit for name in found for limit in (f"{name}_low", f"{name}_high")}
    if any(owner in found for owner in OWNERS):
        folded |= {"low", "high"}
    known = [name for name in FIRST if name in found]
    return [*known, *(name for name in found if name not in known and name not in folded)]


def head(name: str) -> str:
    """Column name as a reader sees it.

    >>> head("tokens_out"), head("p_holm")
    ('tokens out', 'p (Holm)')
    """
    return HEADS.get(name, str(name).replace("_", " "))


def cell(row: Row, name: str, digits: int = 2) -> str:
    """One value as text, with its limits when the row has them; `digits` follow the decimal point.

    >>> cell({"difference": 0.1, "low": -0.02, "high": 0.2}, "difference")
    '+0.10 [-0.02, 0.20]'
    """
    value = row.get(name)
    if is_missing(value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return _number(row, name, value, digits)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= CELL else text[:CELL] + f" … ({len(text):,} characters)"


def _number(row: Row, name: str, value: float, digits: int) -> str:
    if name in ("p_value", "p_holm"):
        return p_text(value).removeprefix("p = ").removeprefix("p ")
    own = next((owner for owner in OWNERS if owner in row), None)
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if name == own and is_missing(low):
        low, high = row.get("low"), row.get("high")
    sign = "+" if name in ("difference", "effect") else ""
    if not is_missing(low) and not is_missing(high):
        return f"{value:{sign},.{digits}f} [{low:,.{digits}f}, {high:,.{digits}f}]"
    if isinstance(value, int):
        return f"{value:{sign},}"
    return f"{value:{sign},.{digits}f}" if value == 0 or abs(value) >= 0.5 * 10**-digits else f"{value:.2g}"


def _digits(rows: Sequence[Row], name: str) -> int:
    """Decimals of a column: as many as its largest value needs, none where all values are whole."""
    values = [abs(row[name]) for row in rows if isinstance(row.get(name), (int, float)) and not is_missing(row[name])]
    limits = any(f"{name}_low" in row or (name in OWNERS and "low" in row) for row in rows)
    if not values or (all(value == int(value) for value in values) and not limits):
        return 0
    return 2 if max(values) < 10 else 1 if max(values) < 1000 else 0


def _is_numeric(rows: Sequence[Row], name: str) -> bool:
    values = [row[name] for row in rows if not is_missing(row.get(name))]
    return bool(values) and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _dot(row: Row, name: str) -> str:
    if name not in ("condition", "b") or not isinstance(row.get(name), str):
        return ""
    return f'<span class="dot" style="background:{colour(row[name])}"></span>'
