"""Pieces of HTML that the panels share: text in a frame that follows the light or dark theme of the page around it.

JupyterLab's colours are CSS variables; a page without them gets readable ones. Nothing here runs or loads anything.
"""

from html import escape
from typing import Any

INK = "var(--jp-ui-font-color1, currentColor)"
FAINT = "var(--jp-ui-font-color2, GrayText)"
EDGE = "var(--jp-border-color1, #888)"
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;margin:0;background:none;color:inherit"


def prose(name: str, text: str) -> str:
    """Somebody's words in a frame under their name, escaped.

    >>> "&lt;b&gt;" in prose("user", "<b>")
    True
    """
    return (
        f"<div style='border:1px solid {EDGE};border-radius:6px;padding:8px;margin:4px 0;color:{INK}'>"
        f"<div style='color:{FAINT};font-size:0.85em'>{escape(name)}</div>"
        f"<pre style='{_TEXT}'>{escape(text)}</pre></div>"
    )


def html(text: str) -> Any:
    """HTML as IPython displays it."""
    from IPython.display import HTML

    return HTML(text)
