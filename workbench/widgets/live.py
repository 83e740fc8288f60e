"""Tokens that appear in columns while models write them: the kernel's side of `live.js`, one anywidget module.

Small messages carry the text while it is written; at rest the whole state, with the measures, is one synchronised
value. What is computed, and when, is decided by `playing`. Leans on anywidget; the browser's side is plain files of
this package.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import anywidget
import traitlets

from workbench.token_readings import TokenReadings

HERE = Path(__file__).parent
BEAT = 0.016  # seconds between messages while text streams: a screen shows no more
__all__ = ["Column", "LiveTokens"]


@dataclass
class Column:
    """One answer. acted: by token, for as many tokens as may come. readings: once they were made."""

    title: str
    colour: str
    tokens: list[str] = field(default_factory=list)
    acted: list[bool] = field(default_factory=list)
    note: str = ""
    plain: bool = False
    readings: TokenReadings | None = None

    def packed(self) -> dict[str, Any]:
        """As live.js takes it."""
        packed: dict[str, Any] = {
            "title": self.title,
            "colour": "" if self.plain else self.colour,  # black does not show on a dark theme
            "tokens": self.tokens,
            "acted": [int(each) for each in self.acted],
            "note": self.note,
        }
        read = self.readings
        if read is not None:
            packed["readings"] = {
                **{name: [float(f"{x:.4g}") for x in read.values(name)] for name in ("kl", "entropy", "logprob")},
                "alternatives": _rounded(read.alternatives),
                "plain_alternatives": [] if self.plain else _rounded(read.plain_alternatives),
                "plain": self.plain,
            }
        return packed


def _rounded(alternatives: list[list[tuple[str, float]]]) -> list[list[tuple[str, float]]]:
    return [[(token, float(f"{share:.3g}")) for token, share in each] for each in alternatives]


class LiveTokens(anywidget.AnyWidget):
    """Columns of tokens. `frame` is the state at rest, `by` the measure chosen, `twin` names the saved picture."""

    _esm = HERE / "live.js"
    _css = HERE / "live.css"
    frame = traitlets.Dict().tag(sync=True)
    by = traitlets.Unicode("kl").tag(sync=True)
    twin = traitlets.Unicode().tag(sync=True)

    def __init__(self, by: str = "kl") -> None:
        super().__init__(by=by, twin=uuid4().hex[:12])
        self.columns: list[Column] = []
        self.run = 0
        self._sent: list[int] = []
        self._last = 0.0

    def start(self, run: int, columns: Sequence[Column]) -> None:
        """A new run with empty columns."""
        self.run, self.columns, self._sent, self._last = run, list(columns), [0] * len(columns), 0.0
        self.send({"kind": "start", "run": run, "columns": [column.packed() for column in columns]})

    def grow(self, *, now: bool = False) -> None:
        """Send what was added to the columns' tokens since the last time; not more often than a screen shows it."""
        moment = time.perf_counter()
        fresh = any(
            not sent and column.tokens  # a column's first token is what a person waits for
            for sent, column in zip(self._sent, self.columns, strict=True)
        )
        if not (now or fresh or moment - self._last >= BEAT):
            return
        add = [
            [place, sent, column.tokens[sent:]]
            for place, (sent, column) in enumerate(zip(self._sent, self.columns, strict=True))
            if len(column.tokens) > sent
        ]
        if add:
            self.send({"kind": "tokens", "run": self.run, "add": add})
            self._sent, self._last = [len(column.tokens) for column in self.columns], moment

    def say(self, state: str, message: str = "", run: int | None = None) -> None:
        """Tell the state in words; a later run than the one shown may have one too."""
        self.run = self.run if run is None else run
        self.send({"kind": "state", "run": self.run, "state": state, "message": message})

    def rest(self, state: str, message: str = "") -> None:
        """Keep the whole state, for views that are opened later."""
        self.frame = {
            "run": self.run,
            "state": state,
            "message": message,
            "readings": any(column.readings is not None for column in self.columns),
            "columns": [column.packed() for column in self.columns],
        }
