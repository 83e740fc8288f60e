"""Live controls for notebooks, each with a static twin that a saved notebook shows without a kernel.

Leans on ipywidgets and anywidget, which are loaded when a control is first made. What a control does is decided
elsewhere (`judging.votes`, `synthesis.reviewing`, `following`, `generate`, `grid`); here it gets buttons and pictures.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from workbench.widgets.following import Following, watch
from workbench.widgets.rating import Rating, rate
from workbench.widgets.reviewing import Reviewing, review
from workbench.widgets.strip import show_tokens

if TYPE_CHECKING:
    from workbench.widgets.playing import Playground, playground

__all__ = [
    "Following", "Playground", "Rating", "Reviewing", "playground", "rate", "review", "show_tokens", "watch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("Playground", "playground"):
        return getattr(import_module("workbench.widgets.playing"), name)
    raise AttributeError(f"workbench.widgets has no {name!r}. It has: {', '.join(__all__)}.")
