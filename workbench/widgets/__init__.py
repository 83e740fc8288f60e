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
    from workbench.widgets.opening import playground
    from workbench.widgets.playing import Playground

__all__ = [
    "Following", "Playground", "Rating", "Reviewing", "playground", "rate", "review", "show_tokens", "watch",
]  # fmt: skip


_LATER = {"Playground": "playing", "playground": "opening"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(import_module(f"workbench.widgets.{_LATER[name]}"), name)
    raise AttributeError(f"workbench.widgets has no {name!r}. It has: {', '.join(__all__)}.")
