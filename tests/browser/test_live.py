"""The playground and a training's panel under a person's hands: a slider, the stop buttons, the text that follows.

The time from a key on the slider to the first changed token is written to latency.json beside the pictures; nothing
here asserts it. `make bench ARGS="--only playground"` asks for 50 moves and shows their median.
"""

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat.v4 as v4
import pytest
from playwright.sync_api import Page

from tests.browser.conftest import SHOTS, ConsoleErrors, LabServer

pytestmark = [pytest.mark.browser, pytest.mark.slow]
MOVES = int(os.environ.get("BROWSER_MOVES", "5"))
PLAY = """
import workbench as wb
lm = wb.load_model("lab")
task = wb.load_task("word-problems")
vector = wb.extract(lm, wb.contrast(task, n=20, shots=3, lm=lm)).at(layers=[3], positions="last")
panel = wb.playground(lm, {"steps": vector, "plain": None}, task=task, max_new_tokens=64, out="conditions")
panel
"""
TRAIN = """
from threading import Thread
rows = [{"messages": task.messages(row) + [{"role": "assistant", "content": str(row["answer"])}]}
        for row in task.rows("train", n=64)]
before = {name: value.clone() for name, value in lm.model.state_dict().items()}
watched = wb.watch("training")
watched
"""
FIT = """
try:
    wb.finetune(lm, rows, "training", epochs=400.0, batch_size=8)
    print("ended by itself")
except RuntimeError as reason:
    print(type(reason).__name__, reason)
same = all(bool((before[name] == value).all()) for name, value in lm.model.state_dict().items())
print("the model is as it was:", same)
"""
SETTLED = """run => {
  const root = document.querySelector('.wb-live');
  return root && +root.dataset.run > run && root.dataset.state === 'done';
}"""
READ = """() => {
  const root = document.querySelector('.wb-live'), column = root.querySelectorAll('.wb-column')[1];
  const text = [...column.querySelectorAll('.wb-token')].map(token => token.dataset.text).join('');
  const {run, state, firstToken} = root.dataset;
  return {run: +run, state, text, first: +firstToken, key: window.lastKey};
}"""
NOTE_KEYS = "() => document.addEventListener('keydown', () => { window.lastKey = performance.now() }, true)"


def write(path: Path, *sources: str) -> None:
    """A notebook of these cells."""
    cells = [v4.new_code_cell(source.strip()) for source in sources]
    book = v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    path.write_text(json.dumps(book), encoding="utf-8")


@pytest.fixture
def playing(
    lab_server: LabServer, page: Page, open_notebook: Callable[..., None], run_all: Callable[..., dict[str, Any]]
) -> Page:
    """A notebook with a playground that has written its first answers."""
    write(lab_server.home / "live.ipynb", PLAY, "len(panel.generations)")
    open_notebook(page, "live.ipynb")
    assert run_all(page)["errors"] == []
    page.wait_for_function(SETTLED, arg=0)
    page.evaluate(NOTE_KEYS)
    return page


def strength(page: Page) -> Any:
    """The handle of the strength slider."""
    return page.locator(".widget-slider", has_text="strength").locator(".noUi-handle")


def test_a_moved_slider_changes_the_text(
    playing: Page, console_errors: ConsoleErrors, shoot: Callable[..., Path]
) -> None:
    handle, seen, waits = strength(playing), [playing.evaluate(READ)], []
    handle.focus()
    for move in range(MOVES):
        key = "ArrowRight" if move % 40 < 20 else "ArrowLeft"
        playing.keyboard.press(key)
        playing.wait_for_function(SETTLED, arg=seen[-1]["run"])
        seen.append(playing.evaluate(READ))
        waits.append(seen[-1]["first"] - seen[-1]["key"])
    shoot(playing, "playground", tall=False)
    told = {"moves": MOVES, "median_ms": statistics.median(waits), "largest_ms": max(waits), "all_ms": waits}
    (SHOTS / "latency.json").write_text(json.dumps(told), encoding="utf-8")
    assert len({one["text"] for one in seen}) >= 2
    assert all(one["state"] == "done" and one["text"] for one in seen)
    assert min(waits) > 0
    assert console_errors.found == []


def test_stop_ends_what_is_written_and_the_next_run_is_whole(playing: Page, console_errors: ConsoleErrors) -> None:
    tokens = playing.locator(".widget-text", has_text="new tokens").locator("input")
    before = playing.evaluate(READ)
    map_button = playing.get_by_role("button", name="Strength map")
    map_button.click()
    playing.wait_for_function("document.querySelector('.wb-live').dataset.state === 'running'")
    playing.get_by_role("button", name="Stop", exact=True).click()
    playing.wait_for_function("document.querySelector('.wb-live').dataset.state === 'cancelled'")
    now = playing.evaluate(READ)["run"]
    playing.get_by_role("button", name="Write again").click()
    playing.wait_for_function(SETTLED, arg=now)
    assert playing.evaluate(READ)["text"] == before["text"]
    assert tokens.count() == 1
    assert console_errors.found == []


def test_cancel_stops_a_training_of_the_same_kernel(
    lab_server: LabServer, page: Page, open_notebook: Callable[..., None], console_errors: ConsoleErrors
) -> None:
    """The training keeps the kernel busy; the panel's button is heard all the same."""
    write(lab_server.home / "training.ipynb", PLAY.partition("vector =")[0], TRAIN, FIT)
    open_notebook(page, "training.ipynb")
    page.evaluate("() => { jupyterapp.commands.execute('runmenu:run-all') }")
    page.wait_for_function("document.body.innerText.match(/step [1-9]/)")
    page.get_by_role("button", name="Cancel").click()
    page.get_by_text("the model is as it was: True").wait_for()
    assert page.get_by_text("Cancelled").count() >= 1
    assert page.get_by_text("ended by itself").count() == 1  # in the cell's source alone
    assert console_errors.found == []
