"""A live view of a training, a sweep or a run, with a button that cancels; its last state stays in the saved notebook.

The picture is plain HTML that a thread brings up to date every second from the files (`workbench.following`), so that
what runs in this kernel, in another one or on another machine with the same disk looks the same. Button clicks come
while the kernel trains where JupyterLab sends them over subshells (4.4 and later, its default); elsewhere they wait for
the cell, and the kernel's stop button does the same. Under papermill there is one state and no thread.
"""

import contextlib
import os
import threading
from html import escape
from pathlib import Path
from typing import Any

from workbench.following import Seen, look
from workbench.runs.heartbeats import FOLDER, duration, in_notebook
from workbench.widgets.busy import answer_while_busy
from workbench.widgets.cards import FAINT, INK, card, html

EVERY = 1.0  # seconds between two looks
_OPEN: dict[Path, "Following"] = {}  # a cell that is run again takes the place of its earlier panel


class Following:
    """The view of one folder; show it as the last line of a cell. `seen` is the last state, `close()` ends it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        self.seen = look(self.folder)
        self.told = ""
        self._picture: tuple[Any, str] = (None, "")
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._twin: Any = None
        self._buttons: tuple[Any, ...] = ()

    @property
    def live(self) -> bool:
        """Whether the view is still brought up to date."""
        return self._thread is not None and self._thread.is_alive()

    def refresh(self) -> Seen:
        """Look at the files and show what they say."""
        try:
            self.seen = look(self.folder)
        except (OSError, ValueError, KeyError) as error:  # a file that is being replaced, or was changed by hand
            self.told = f"The files could not be read just now: {error}"
        for button in self._buttons:
            button.disabled = self.seen.stop_at is None if button.description == "cancel" else self.seen.over
        if self._twin is not None:
            self._twin.update(html(self.html()))
        return self.seen

    def cancel(self) -> None:
        """Ask what is trained here to stop; it does within a step, and the same call goes on later."""
        from workbench.finetuning.stopping import ask_to_cancel

        if self.seen.stop_at is None:
            self.told = "Nothing is trained here now, so there is nothing to cancel."
        else:
            ask_to_cancel(self.seen.stop_at, "a panel")
            self.told = "Asked to stop."
        self.refresh()

    def start(self) -> None:
        """Bring the view up to date every second until the run ends or the panel is closed."""
        if (earlier := _OPEN.get(self.folder)) is not None and earlier is not self:
            earlier.close()
        _OPEN[self.folder] = self
        self._thread = threading.Thread(target=self._follow, name=f"watching {self.folder.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leave the last state as it is."""
        self._closed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(5)
        if _OPEN.get(self.folder) is self:
            del _OPEN[self.folder]

    def html(self) -> str:
        """The state as HTML that needs no script."""
        key = (self.seen.kind, self.seen.step, len(self.seen.rows), self.seen.said)
        if self._picture[0] != key:
            self._picture = (key, picture(self.seen))
        return state_html(self.seen, self.told) + self._picture[1]

    def _follow(self) -> None:
        while not self.refresh().over and not self._closed.wait(EVERY):
            pass
        with contextlib.suppress(KeyError):
            if _OPEN.get(self.folder) is self:
                del _OPEN[self.folder]

    def _ipython_display_(self) -> None:
        from IPython.display import display

        looked_at = in_notebook() and not os.environ.get(FOLDER)
        if looked_at and not self.seen.over:
            import ipywidgets

            cancel, close = (ipywidgets.Button(description=name) for name in ("cancel", "close"))
            cancel.button_style = "warning"
            cancel.on_click(lambda _: self.cancel())
            close.on_click(lambda _: self.close())
            self._buttons = (cancel, close)
            box = ipywidgets.HBox([*self._buttons])
            answer_while_busy(box)
            display(box)
        self._twin = display(html(self.html()), display_id=True)
        if looked_at and not self.seen.over:
            self.start()


def watch(run: str | Path) -> Following:
    """A live view of a folder that `finetune`, `prefer`, `reinforce`, `sweep` or a run writes, in any process.

    It shows stage, step, loss, gradient norm, tokens a second, held-out scores, seconds left and the age of the last
    sign of life; of a sweep also its points so far. A folder that is not there yet is waited for. Its `cancel` button
    ends a training, which the same call goes on with.
    """
    return Following(run)


def state_html(seen: Seen, told: str = "") -> str:
    """The state in words and numbers."""
    lines: dict[str, str] = {}
    if seen.stage:
        lines["stage"] = seen.stage
    if seen.total:
        lines["step"] = f"{seen.step} of {seen.total}"
    lines |= {name: f"{value:.4g}" for name, value in seen.numbers.items()}
    if seen.left is not None:
        lines["left"] = f"about {duration(seen.left)}"
    if seen.age is not None and not seen.over:
        lines["last sign of life"] = f"{duration(seen.age)} ago"
    cells = "".join(
        f"<span style='margin-right:1.6em'><span style='color:{FAINT}'>{escape(name)}</span> "
        f"<b>{escape(text)}</b></span>"
        for name, text in lines.items()
    )
    bar = f"<progress value='{seen.step}' max='{seen.total}' style='width:100%'></progress>" if seen.total else ""
    return (
        f"<div style='color:{INK};line-height:1.7'><div>{escape(str(seen.folder))}: {escape(seen.said)} "
        f"{escape(told)}</div>{bar}<div>{cells}</div></div>"
    )


def picture(seen: Seen) -> str:
    """The curve, the map of a sweep's points, and the table of points or stages."""
    from workbench import plots
    from workbench.report.tables import html_table

    parts = []
    if seen.rows:
        parts.append(card(plots.training_curve(seen.rows)))
    if seen.table is not None and len(seen.table):
        varied = [name for name in seen.names if seen.table[name].astype(str).nunique() > 1]
        if len(varied) >= 2:
            with contextlib.suppress(plots.PlotError):  # no point has a number yet
                parts.append(card(plots.sweep_map(seen.table, *varied[:2])))
        parts.append(f"<div style='color:{INK};overflow-x:auto'>{html_table(seen.table)}</div>")
    return "".join(parts)
