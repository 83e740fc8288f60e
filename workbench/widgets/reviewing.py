"""A panel to review training records one by one: buttons and single keys, a text area for edits, and a static twin.

The panel is ipywidgets; decisions go to the file at once (`synthesis.reviewing`). Below it stands plain HTML that is
brought up to date after every decision, so that the saved notebook tells without a kernel who reviewed how much.
"""

from html import escape
from pathlib import Path
from typing import Any

from workbench.synthesis.records import Data, Record
from workbench.synthesis.reviewing import Review, answer_of, open_review
from workbench.widgets.cards import html, on_keys, prose

KEYS = {"k": "keep", "r": "reject", "e": "edit", "s": "skip", "u": "undo"}
LABELS = {"keep": "k  keep", "reject": "r  reject", "edit": "e  edit", "skip": "s  skip", "undo": "u  undo"}
STYLES = {"keep": "success", "reject": "danger", "edit": "info", "skip": "", "undo": ""}


class Reviewing:
    """The panel of one review; show it as the last line of a cell. `buttons` by choice, `keys` the box for keys.

    `why` takes an optional reason, which goes with the next decision. 'edit' opens `editor`, with `save` and `cancel`.
    """

    def __init__(self, review: Review) -> None:
        import ipywidgets

        wide = ipywidgets.Layout(width="100%")
        self.review = review
        self.screen, self.told = ipywidgets.HTML(), ipywidgets.HTML()
        self.progress = ipywidgets.IntProgress(max=len(review.records), description="reviewed")
        self.buttons = {
            choice: ipywidgets.Button(description=label, button_style=STYLES[choice])
            for choice, label in LABELS.items()
        }
        for choice, button in self.buttons.items():
            button.on_click(lambda _, choice=choice: self.choose(choice))
        self.keys = ipywidgets.Text(placeholder="click here, then press k r e s u", continuous_update=True)
        on_keys(self.keys, KEYS, self.choose)
        self.why = ipywidgets.Text(placeholder="why (optional)", layout=wide)
        self.editor = ipywidgets.Textarea(layout=ipywidgets.Layout(width="100%", height="12em"))
        self.save = ipywidgets.Button(description="save the edit", button_style="info")
        self.cancel = ipywidgets.Button(description="don't edit")
        self.save.on_click(lambda _: self._decide("edit", self.editor.value))
        self.cancel.on_click(lambda _: self.refresh())
        self.editing = ipywidgets.VBox([self.editor, ipywidgets.HBox([self.save, self.cancel])])
        rows = [self.progress, self.screen, self.editing, self.why, ipywidgets.HBox([*self.buttons.values()])]
        self.panel = ipywidgets.VBox([*rows, self.keys, self.told])
        self._twin: Any = None
        self.refresh()

    def choose(self, choice: str) -> None:
        """Do what a button says: decide on the record shown, open the editor, or take the last decision back."""
        record = self.review.current
        if choice == "undo":
            self.review.undo()
            self.refresh()
        elif record is not None and choice == "edit":
            self.editor.value = answer_of(record)
            self.editing.layout.display = ""
        elif record is not None:
            self._decide(choice)

    def refresh(self, told: str = "") -> None:
        """Show the file's state: the next record with the editor closed, or that all are done."""
        done, record = len(self.review.decided), self.review.current
        self.progress.value = done
        self.screen.value = record_html(record, len(self.review.records))
        self.editing.layout.display = "none"
        self.told.value = escape(told)
        for choice, button in self.buttons.items():
            button.disabled = done == 0 if choice == "undo" else record is None
        if self._twin is not None:
            self._twin.update(html(twin_html(self.review)))

    def _decide(self, decision: str, text: str | None = None) -> None:
        try:
            self.review.decide(decision, why=self.why.value.strip(), text=text)
        except ValueError as error:  # an edit that can't be: the text stays in the editor
            self.told.value = escape(str(error))
            return
        self.why.value = ""
        self.refresh()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.panel)
        self._twin = display(html(twin_html(self.review)), display_id=True)


def review(
    records: Data | str | Path | list[Record], *, out: str | Path, reviewer: str, seed: int = 0, n: int | None = None
) -> Reviewing:
    """A panel on which a person keeps, rejects or edits training records, each decision with an optional reason.

    Every decision is appended at once to the reviewer's own file in the folder `out`; the same call goes on where the
    reviewer left off, and several reviewers may share the folder. `wb.reviewed(records, out)` gives the records that
    are left, for `wb.finetune`. `n` records are drawn by `seed`, the same for all reviewers; all kept ones unless
    given. Errors as for `synthesis.reviewing.open_review`.
    """
    return Reviewing(open_review(records, out=out, reviewer=reviewer, seed=seed, n=n))


def record_html(record: Record | None, total: int) -> str:
    """A record's messages and provenance, nothing of it run or rendered as markup."""
    if record is None:
        return f"<p>All {total} records are reviewed. Thank you.</p>"
    about = {name: record[name] for name in ("id", "recipe", "model", "answer") if record.get(name)}
    verdict = record.get("verdict")
    if isinstance(verdict, dict):
        about["verifier"] = "right" if verdict.get("correct") else "wrong"
    said = ", ".join(f"{name}: {value}" for name, value in about.items())
    turns = "".join(prose(str(turn["role"]), str(turn["content"])) for turn in record["messages"])
    return f"<p>{escape(said)}</p>{turns}"


def twin_html(review: Review) -> str:
    """The state as plain HTML: who reviewed how much, the decisions, the next record."""
    counts = review.counts()
    cells = "".join(f"<tr><td>{choice}</td><td>{count}</td></tr>" for choice, count in counts.items())
    state = f"{escape(review.reviewer)} has reviewed {len(review.decided)} of {len(review.records)} records."
    where = f"Decisions are in {escape(str(review.file))}; run this cell to go on."
    table = f"<table><tr><th>decision</th><th>n</th></tr>{cells}</table>"
    return f"<p>{state} {where}</p>{table}{record_html(review.current, len(review.records))}"
