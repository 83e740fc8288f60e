"""What a playground leaves in a saved notebook: its last state as plain HTML and as plain text, without scripts.

Text first, since some web sites strip pictures from saved output; then each answer's strip of tokens, and the strength
map. Kept below 200 KB: long texts and strips are cut, and it is said where.
"""

from collections.abc import Sequence
from dataclasses import replace
from html import escape

from workbench.token_readings import MEASURES, TokenReadings
from workbench.widgets.live import Column
from workbench.widgets.strip import strip_svg

MOST = 200_000  # bytes of one output
STRIP_TOKENS = 160  # of each strip
TEXT = 12_000  # letters of each answer and of the prompt
_CELL = "border:1px solid #888;padding:8px;vertical-align:top;text-align:left;width:50%"
_PRE = "white-space:pre-wrap;font-size:1.1em;text-align:left"
__all__ = ["twin_html", "twin_text"]


def twin_html(
    name: str,
    state: str,
    prompt: str,
    columns: Sequence[Column],
    by: str = "kl",
    lines: Sequence[str] = (),
    picture: str = "",
) -> str:
    """The state as HTML. name: class by which the live view hides it. lines: of code; picture: SVG of a figure."""
    heads = "".join(f"<th style='{_CELL}'>{escape(column.title)}</th>" for column in columns)
    cells = "".join(
        f"<td style='{_CELL}'><pre style='{_PRE}'>{escape(_cut(text_of(column)))}</pre>{escape(column.note)}</td>"
        for column in columns
    )
    parts = [
        f"<details open class='wb-twin {escape(name)}'><summary>Saved state of the playground</summary>",
        f"<p>{escape(state)}</p><pre style='{_PRE}'>{escape(_cut(prompt))}</pre>",
        f"<table style='width:100%;table-layout:fixed'><tr>{heads}</tr><tr>{cells}</tr></table>",
    ]
    parts += [f"<pre style='{_PRE}'>{escape(line)}</pre>" for line in lines]
    drawn = [picture] if picture else []
    if by in MEASURES:
        drawn += [_strip(column, by) for column in columns if column.readings is not None]
    left = MOST - sum(len(part.encode()) for part in parts) - 1000
    for svg in drawn:
        size = len(svg.encode())
        parts.append(f"<p>{svg}</p>" if size <= left else "<p>A picture was left out: it is too large to be saved.</p>")
        left -= size if size <= left else 0
    return "".join([*parts, "</details>"])


def twin_text(state: str, prompt: str, columns: Sequence[Column], lines: Sequence[str] = ()) -> str:
    """The same as plain text, for viewers that show no HTML."""
    parts = [state, _cut(prompt), *(f"{column.title}: {_cut(text_of(column))} {column.note}" for column in columns)]
    return "\n".join([*parts, *lines])


def text_of(column: Column) -> str:
    """An answer's tokens as one text."""
    return "".join(column.tokens)


def _strip(column: Column, by: str) -> str:
    read = column.readings
    assert read is not None
    many = len(read.tokens)
    title = column.title if many <= STRIP_TOKENS else f"{column.title} (first {STRIP_TOKENS} of {many} tokens)"
    return strip_svg(_first(read, STRIP_TOKENS), by, title)


def _first(read: TokenReadings, most: int) -> TokenReadings:
    cut = {name: getattr(read, name)[:most] for name in ("tokens", "kl", "entropy", "logprob", "acted")}
    return replace(read, **cut)


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]} … ({len(text) - TEXT} more letters)"
