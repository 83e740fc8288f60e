"""Live controls for notebooks, each with a static twin that a saved notebook shows without a kernel.

Leans on ipywidgets. What a control does is decided elsewhere (`judging.votes`, `synthesis.reviewing`, `following`);
here it only gets buttons.
"""

from workbench.widgets.following import Following, watch
from workbench.widgets.rating import Rating, rate
from workbench.widgets.reviewing import Reviewing, review
from workbench.widgets.strip import show_tokens

__all__ = ["Following", "Rating", "Reviewing", "rate", "review", "show_tokens", "watch"]
