"""What the panels share: text in a frame that follows the light or dark theme of the page, and keys that act.

JupyterLab's colours are CSS variables; a page without them gets readable ones. Nothing here runs or loads anything.
"""

from collections.abc import Callable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import plotly.graph_objects as go

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


def card(fig: "go.Figure") -> str:
    """A figure's still picture with its alt text on a card of its own, light in every theme: its colours need it."""
    from workbench.plots.palette import CARD
    from workbench.report.svg import figure_to_svg

    look = f"background:{CARD};border:1px solid {EDGE};border-radius:8px;padding:10px;margin:6px 0;max-width:960px"
    return f"<div style='{look}'>{figure_to_svg(fig)}</div>"


def html(text: str) -> Any:
    """HTML as IPython displays it."""
    from IPython.display import HTML

    return HTML(text)


def on_keys(box: Any, keys: Mapping[str, str], act: Callable[[str], None]) -> None:
    """Call `act` with what a key stands for, for each one typed into a text box, and empty the box."""

    def typed(change: dict[str, Any]) -> None:
        for key in change["new"].lower():
            if key in keys:
                act(keys[key])
        if change["new"]:
            box.value = ""

    box.observe(typed, names="value")
