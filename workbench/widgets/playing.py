"""A steering playground: dials for one intervention, and the plain and the changed answer side by side.

Both answers appear while they are written, as two rows of one generation. One thread of the playground's own does the
work, always on the newest state of the dials; other cells may use the model in between, each in its turn
(`workbench.turns`). The strength map is measured on tuning questions: report what you keep with `wb.evaluate` on
others. Leans on ipywidgets and anywidget.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.generate import Generation
from workbench.grid import best
from workbench.interventions import Intervention
from workbench.interventions.session import ACTIVE
from workbench.models import LM, ModelError
from workbench.plots.palette import colour
from workbench.tasks import Task
from workbench.token_readings import MEASURES, acted_on, read_tokens
from workbench.turns import turn
from workbench.widgets.busy import answer_while_busy
from workbench.widgets.conditions import SavedCondition, save_condition
from workbench.widgets.controls import Controls
from workbench.widgets.live import Column, LiveTokens
from workbench.widgets.strength_map import measure
from workbench.widgets.twin import text_of, twin_html, twin_text
from workbench.widgets.wishes import Wish, changed, refuse_too_large, spent, title
from workbench.widgets.worker import Dropped, Job, Worker

if TYPE_CHECKING:
    import pandas as pd

PATIENCE = 0.1  # seconds after which it is said that the model is busy elsewhere
__all__ = ["Playground", "State"]


@dataclass(frozen=True)
class State:
    """run: number of the newest run. status: idle, waiting, running, done, cancelled or error. texts: by column."""

    run: int
    status: str
    message: str
    texts: dict[str, str]
    wish: Wish


class Playground:
    """The panel; show it as the last line of a cell. Every method does what a button or dial does.

    controls: the dials. live: the tokens. generations: plain and changed, of the last finished run. table: of the last
    strength map. error: what stopped the last run, if something did.
    """

    def __init__(
        self,
        lm: LM,
        interventions: Mapping[str, Intervention | None],
        task: Task | None,
        examples: Mapping[str, dict[str, Any] | None],
        out: Path | None,
        controls: Controls,
        by: str,
        n: int,
    ) -> None:
        self.lm, self.interventions, self.task, self.examples = lm, dict(interventions), task, dict(examples)
        self.out, self.controls, self.n = out, controls, n
        self.live = LiveTokens(by)
        self.generations: list[Generation] = []
        self.table: pd.DataFrame | None = None
        self.error: BaseException | None = None
        self.saved: SavedCondition | None = None
        self.panel = controls.panel(self.live)
        self._run, self._status, self._message, self._picture = 0, "idle", "", ""
        self._prompted = controls.wish().prompt  # of the answers shown
        self._ids: dict[str, list[int]] = {}
        self._words: dict[int, str] = {}
        self._twin: Any = None
        self._worker = Worker(self._work)
        controls.changed = self._ask
        controls.buttons["map"].disabled = task is None
        for name, action in {"run": self.run, "cancel": self.cancel, "map": self.strength_map}.items():
            controls.buttons[name].on_click(lambda _, action=action: action())
        controls.buttons["save"].on_click(lambda _: self._save_in_words())
        self.live.observe(lambda _: self._show_twin(), names="by")

    @property
    def state(self) -> State:
        """What is shown now."""
        texts = {column.title: text_of(column) for column in self.live.columns}
        return State(self._run, self._status, self._message, texts, self.controls.wish())

    @property
    def intervention(self) -> Intervention | None:
        """The change that the dials describe, ready for `lm.generate` and `wb.evaluate`; None for the plain model."""
        return changed(self.controls.wish(), self.interventions)

    def set(self, **dials: Any) -> "Playground":
        """Turn dials without a run: name, layer, strength, positions, prompt, max_new_tokens, temperature, seed."""
        self.controls.put(**dials)
        return self

    def run(self, wait: bool = False) -> State:
        """Write both answers with the dials as they are; what was under way stops. Errors are shown in the panel."""
        self._ask()
        return self._waited() if wait else self.state

    def strength_map(self, wait: bool = False) -> State:
        """Measure accuracy over strengths at the chosen layer and span, on `n` tuning questions; `table` keeps it."""
        self._ask("map")
        return self._waited() if wait else self.state

    def cancel(self) -> State:
        """Stop what is under way; the model is then as it was."""
        if self._worker.cancel():
            self._tell(self._run, "cancelled", "the text so far is kept")
        return self.state

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is under way; False where `timeout` seconds were not enough."""
        return self._worker.wait(timeout)

    def save_condition(self, name: str | None = None) -> SavedCondition:
        """Write the change that the dials describe to `out`, with the code that makes it again.

        No name: one made of the dials. Raises ModelError without a run folder, for the plain model, for a name that is
        no plain file name or is taken.
        """
        wish = self.controls.wish()
        self.saved = save_condition(self.out, name, wish, self.interventions)
        self.controls.said.value = f"<pre>{escape(self.saved.code)}</pre>"
        self._show_twin()
        return self.saved

    def _save_in_words(self) -> None:
        try:
            self.save_condition(self.controls.file.value.strip() or None)
        except (ValueError, OSError, TypeError) as reason:
            self.controls.said.value = f"<pre>Not saved. {escape(str(reason))}</pre>"

    def _ask(self, kind: str = "answer") -> None:
        self._run = self._worker.ask((kind, self.controls.wish()))

    def _waited(self) -> State:
        """Wait for the worker, whose turn would never come if this thread held the model."""
        mine = turn(self.lm).acquire(blocking=False)
        try:
            if mine and ACTIVE.get(self.lm.model):
                self.cancel()
                raise ModelError(
                    "The playground can't run inside of lm.apply, which holds the model. Run it behind it."
                )
        finally:
            if mine:
                turn(self.lm).release()
        try:
            self._worker.wait()
        except KeyboardInterrupt:
            self.cancel()
            raise
        return self.state

    def _work(self, job: Job) -> None:
        """In the worker's thread: one wish, with every way that it may end."""
        kind, wish = job.wish
        try:
            with self._turn(job):
                self.error = None
                (self._map if kind == "map" else self._answer)(job, wish)
        except Dropped:
            if self._worker.wanted == 0:
                self._tell(job.number, "cancelled", "the text so far is kept", rest=True)
        except (ModelError, ValueError) as reason:
            self._fail(job, reason, str(reason))
        except BaseException as reason:
            self._fail(job, reason, f"{type(reason).__name__}: {reason} (the whole error is in .error of this panel)")

    def _fail(self, job: Job, reason: BaseException, words: str) -> None:
        self.error = reason
        self._tell(job.number, "error", words, rest=True)

    @contextmanager
    def _turn(self, job: Job) -> Iterator[None]:
        """The model for this job alone; it may be dropped while another cell has it."""
        lock, told = turn(self.lm), False
        while not lock.acquire(timeout=PATIENCE):
            job.check()
            if not told:
                self._tell(job.number, "waiting", "another cell is using the model")
                told = True
        try:
            job.check()
            yield
        finally:
            lock.release()

    def _tell(self, run: int, status: str, message: str = "", *, rest: bool = False) -> None:
        if run < self._run:
            return
        self._status, self._message = status, message
        self.live.say(status, message, run)
        if rest:
            self.live.rest(status, message)
            self._show_twin()

    def _answer(self, job: Job, wish: Wish) -> None:
        x, ids = changed(wish, self.interventions), self._prompt(wish.prompt)
        refuse_too_large(self.lm, len(ids), wish.max_new_tokens)
        acted = acted_on(x, len(ids), wish.max_new_tokens).tolist() if x is not None and wish.strength else []
        columns = [
            Column("plain", colour("plain"), plain=True),
            Column(title(wish, x), colour(wish.name), acted=acted),
        ]
        self._status, self._message, self._prompted = "running", "", wish.prompt
        self.live.start(job.number, columns)
        order = columns[::-1]  # the changed answer first: kinds that change the weights run one after the other

        def heard(new: dict[int, list[int]]) -> None:
            job.check()
            for row, tokens in new.items():
                column = order[row]
                del column.tokens[len(tokens) :]  # a batch that ran out of memory begins anew
                column.tokens.extend(self._word(token) for token in tokens[len(column.tokens) :])
            self.live.grow()

        found = self.lm.generate(
            [ids, ids],
            [x, None],
            wish.max_new_tokens,
            temperature=wish.temperature,
            seed=[wish.seed, wish.seed],
            on_token=heard,
        )
        self.generations = found[::-1]
        self.live.grow(now=True)
        self._tell(job.number, "done", spent(found))
        self._read(job, wish, columns)
        self._tell(job.number, "done", spent(found), rest=True)

    def _read(self, job: Job, wish: Wish, columns: Sequence[Column]) -> None:
        """What stands behind every token, and whether the answers are right; after the text, which must not wait."""
        row = self.examples.get(wish.prompt)
        for column, generation in zip(columns, self.generations, strict=True):
            job.check()
            column.readings = read_tokens(generation)
            if self.task is not None and row is not None:
                right = self.task.verify(row, generation.text).correct
                column.note = "right" if right else f"not right: the answer is {row['answer']}"

    def _map(self, job: Job, wish: Wish) -> None:
        def tell(words: str) -> None:
            self._tell(job.number, "running", words)

        strengths = self.controls.strengths()
        found = measure(self.lm, self.task, self.interventions, wish, strengths, self.n, job.check, tell)
        self.table, self._picture = found.table, found.picture
        self.controls.figure.value = f"<div class='wb-figure'>{found.picture}</div>"
        self._tell(job.number, "done", found.words, rest=True)

    def sweet_spot(self) -> float:
        """The best strength of the last map, the weakest of equals; ModelError before there is a map."""
        if self.table is None:
            raise ModelError("There is no strength map yet. Next: panel.strength_map(wait=True).")
        return float(best(self.table)["strength"])

    def _prompt(self, text: str) -> list[int]:
        """Token ids of a question, asked as the task asks it."""
        if text not in self._ids:
            row = {"question": text}
            asked = self.task.messages(row) if self.task is not None else [{"role": "user", "content": text}]
            self._ids = {text: self.lm.encode(self.lm.render(asked))}
        return self._ids[text]

    def _word(self, token: int) -> str:
        if token not in self._words:
            self._words[token] = self.lm.tokenizer.decode([token])
        return self._words[token]

    @property
    def html(self) -> str:
        """The state as plain HTML, as a saved notebook holds it."""
        told, lines = self._told()
        name = f"wb-twin-{self.live.twin}"
        return twin_html(name, told, self._prompted, self.live.columns, self.live.by, lines, self._picture)

    def _told(self) -> tuple[str, list[str]]:
        state = f"{self._status}{': ' if self._message else ''}{self._message}. Coloured by: "
        return state + MEASURES.get(self.live.by, "nothing"), [self.saved.code] if self.saved else []

    def _bundle(self) -> dict[str, str]:
        told, lines = self._told()
        plain = twin_text(told, self._prompted, self.live.columns, lines)
        return {"text/html": self.html, "text/plain": plain}

    def _show_twin(self) -> None:
        if self._twin is not None:
            self._twin.update(self._bundle(), raw=True)

    def _ipython_display_(self) -> None:
        from IPython.display import display

        answer_while_busy(self.panel)
        display(self.panel)
        self._twin = display(self._bundle(), raw=True, display_id=True)
        if not self._run:
            self.run(wait=True)  # so that the saved picture holds an answer where nobody turns dials
