"""A blind rating panel: two answers side by side without names, buttons and single keys, and a static twin.

The panel is ipywidgets; votes go to the file at once (`judging.votes`). Below it stands plain HTML that is brought up
to date after every vote, so that the saved notebook tells without a kernel who rated how much and what comes next.
"""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.judging.votes import Ballot, open_ballot
from workbench.results import Results
from workbench.widgets.cards import EDGE, INK, html, on_keys

if TYPE_CHECKING:
    from workbench.tasks import Task

KEYS = {"1": "left", "2": "right", "3": "tie", "4": "skip", "u": "undo"}
LABELS = {"left": "1  left is better", "right": "2  right is better", "tie": "3  tie", "skip": "4  skip",
          "undo": "u  undo"}  # fmt: skip
_TEXT = "white-space:pre-wrap;overflow-wrap:anywhere;margin:0;background:none;color:inherit"
_CELL = f"border:1px solid {EDGE};color:{INK};padding:8px;vertical-align:top;text-align:left;width:50%"


class Rating:
    """The panel of one ballot; show it as the last line of a cell. `buttons` by choice, `keys` the box for keys."""

    def __init__(self, ballot: Ballot) -> None:
        import ipywidgets

        self.ballot = ballot
        self.screen = ipywidgets.HTML()
        self.progress = ipywidgets.IntProgress(max=len(ballot.showings), description="rated")
        self.buttons = {choice: ipywidgets.Button(description=label) for choice, label in LABELS.items()}
        for choice, button in self.buttons.items():
            button.on_click(lambda _, choice=choice: self.choose(choice))
        self.keys = ipywidgets.Text(placeholder="click here, then press 1 2 3 4 u", continuous_update=True)
        on_keys(self.keys, KEYS, self.choose)
        self.panel = ipywidgets.VBox([self.progress, self.screen, ipywidgets.HBox([*self.buttons.values()]), self.keys])
        self._twin: Any = None
        self.refresh()

    def choose(self, choice: str) -> None:
        """Do what a button says: vote on the question shown, or take the last vote back."""
        if choice == "undo":
            self.ballot.undo()
        elif self.ballot.current is not None:
            self.ballot.vote(choice)
        self.refresh()

    def refresh(self) -> None:
        """Show the file's state: the next question, or that all are done."""
        done, showing = len(self.ballot.answered), self.ballot.current
        self.progress.value = done
        self.screen.value = question_html(self.ballot)
        for choice, button in self.buttons.items():
            button.disabled = done == 0 if choice == "undo" else showing is None
        if self._twin is not None:
            self._twin.update(html(twin_html(self.ballot)))

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.panel)
        self._twin = display(html(twin_html(self.ballot)), display_id=True)


def rate(
    results: Results,
    a: str,
    b: str,
    *,
    out: str | Path,
    rater: str,
    seed: int = 0,
    n: int | None = None,
    questions: "Mapping[str, str] | Task | None" = None,
) -> Rating:
    """A panel on which a person says which of two conditions answered better, without seeing which is which.

    Every vote is appended to `out` at once; the same call goes on where the rater left off. `n` questions are drawn by
    `seed`; sides are balanced. `judging.read_votes(out)` gives the votes, `agreement` what they are worth. Errors as
    for `judging.open_ballot`.
    """
    return Rating(open_ballot(results, a, b, out=out, rater=rater, seed=seed, n=n, questions=questions))


def question_html(ballot: Ballot) -> str:
    """The question to be rated with both answers, nothing of it run or rendered as markup."""
    showing = ballot.current
    if showing is None:
        return f"<p>All {len(ballot.showings)} questions are rated. Thank you.</p>"
    left, right = (f"<td style='{_CELL}'><pre style='{_TEXT}'>{escape(text)}</pre></td>" for text in showing.texts)
    return (
        f"<pre style='{_TEXT}'>{escape(showing.duel.question)}</pre><table style='width:100%;table-layout:fixed'>"
        f"<tr><th style='{_CELL}'>Left</th><th style='{_CELL}'>Right</th></tr><tr>{left}{right}</tr></table>"
    )


def twin_html(ballot: Ballot) -> str:
    """The state as plain HTML: who rated how much, the votes by side, the next question; no condition is named."""
    counts = ballot.counts()
    cells = "".join(f"<tr><td>{choice}</td><td>{count}</td></tr>" for choice, count in counts.items())
    state = f"{escape(ballot.rater)} has rated {len(ballot.answered)} of {len(ballot.showings)} questions."
    where = f"Votes are in {escape(str(ballot.file))}; run this cell to go on."
    return f"<p>{state} {where}</p><table><tr><th>vote</th><th>n</th></tr>{cells}</table>{question_html(ballot)}"
