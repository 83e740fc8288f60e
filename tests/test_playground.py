"""The playground without a browser: texts against `lm.generate` alone, cancelling, the newest wish, files, turns."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch

import workbench as wb
from workbench.generate import Generation
from workbench.interventions.session import ACTIVE
from workbench.models import LM, ModelError
from workbench.tasks import Task
from workbench.turns import turn
from workbench.widgets import Playground
from workbench.widgets.live import Column
from workbench.widgets.twin import twin_html
from workbench.widgets.wishes import refuse_too_large
from workbench.widgets.worker import Dropped, Job, Worker


@pytest.fixture(scope="module")
def vector(lab: LM, word_problems: Task) -> wb.Residual:
    pairs = wb.contrast(word_problems, positive="steps", negative="direct", shots=3, n=12, seed=0, lm=lab)
    found = wb.extract(lab, pairs)
    assert isinstance(found, wb.Residual)
    return found.at(positions="last")


@pytest.fixture
def panel(lab: LM, word_problems: Task, vector: wb.Residual, tmp_path: Path) -> Iterator[Playground]:
    made = wb.playground(lab, {"steps": vector}, task=word_problems, out=tmp_path / "kept", n=6, max_new_tokens=48)
    yield made
    made.cancel()
    assert made.wait(20)


def alone(panel: Playground, x: Any) -> Generation:
    """What the dials' prompt gives by itself, in a batch of one."""
    wish = panel.controls.wish()
    assert panel.task is not None
    prompt = panel.lm.render(panel.task.messages({"question": wish.prompt}))
    options = {"temperature": wish.temperature, "seed": [wish.seed]}
    return panel.lm.generate([prompt], x, wish.max_new_tokens, **options)[0]


def texts(panel: Playground) -> list[str]:
    return list(panel.state.texts.values())


def written(panel: Playground, x: Any) -> str:
    return "".join(panel.lm.tokenizer.decode([token]) for token in alone(panel, x).token_ids)


def hooks(lm: LM) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in lm.model.modules())


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_streamed_answers_equal_each_alone(panel: Playground, temperature: float) -> None:
    panel.set(strength=2.0, layer=3, positions="last", temperature=temperature, seed=3)
    assert panel.run(wait=True).status == "done"
    assert panel.error is None
    assert texts(panel) == [written(panel, None), written(panel, panel.intervention)]
    assert [each.token_ids for each in panel.generations] == [
        alone(panel, None).token_ids,
        alone(panel, panel.intervention).token_ids,
    ]
    assert texts(panel)[0] != texts(panel)[1]
    panel.set(strength=0.0).run(wait=True)
    assert texts(panel)[0] == texts(panel)[1]


def test_the_readings_are_those_of_read_tokens(panel: Playground) -> None:
    panel.set(strength=2.0).run(wait=True)
    plain, changed = (column.readings for column in panel.live.columns)
    assert plain is not None
    assert changed is not None
    assert not plain.kl.any()
    assert changed.kl.tolist() == wb.show_tokens(panel.generations[1]).readings.kl.tolist()
    assert panel.live.frame["columns"][1]["acted"][: len(changed.acted)] == changed.acted.astype(int).tolist()


def test_a_cancelled_run_leaves_the_model_clean(panel: Playground) -> None:
    lm = panel.lm
    weights = {name: value.clone() for name, value in lm.model.state_dict().items()}
    before, forward = hooks(lm), vars(lm.base).get("forward")
    panel.set(strength=1.5, positions="all", max_new_tokens=1500)
    reached, sending = Event(), panel.live.grow

    def grow(*, now: bool = False) -> None:
        sending(now=now)
        reached.set()

    panel.live.grow = grow  # type: ignore[method-assign]
    panel.run()
    assert reached.wait(20)
    assert panel.cancel().status == "cancelled"
    assert panel.wait(20)
    del panel.live.grow
    assert panel.state.status == "cancelled"
    assert panel.live.frame["state"] == "cancelled"
    assert hooks(lm) == before
    assert vars(lm.base).get("forward") is forward
    assert not ACTIVE.get(lm.model)
    assert all(torch.equal(value, weights[name]) for name, value in lm.model.state_dict().items())
    panel.set(max_new_tokens=48).run(wait=True)
    assert texts(panel) == [written(panel, None), written(panel, panel.intervention)]


def test_the_newest_of_many_moves_is_what_is_shown(panel: Playground) -> None:
    for step in range(10):
        panel.controls.dials["strength"].value = 0.2 * step
        panel.controls.dials["layer"].value = step % 6
    assert panel.wait(30)
    state = panel.state
    assert (state.status, state.wish.strength, state.wish.layer) == ("done", 1.8, 3)
    assert state.run == panel.live.frame["run"]
    assert texts(panel) == [written(panel, None), written(panel, panel.intervention)]


def test_an_overtaken_job_stops_and_the_newest_is_done() -> None:
    begun, done, dropped = Event(), [], []

    def work(job: Job) -> None:
        begun.set()
        try:
            while job.wish == "endless":
                job.check()
                time.sleep(0.001)
        except Dropped:
            dropped.append(job.number)
            raise
        done.append(job.wish)

    worker = Worker(work)
    worker.ask("endless")
    assert begun.wait(10)
    for number in range(20):
        worker.ask(number)
    assert worker.wait(10)
    assert dropped == [1]
    assert done[-1] == 19
    begun.clear()
    worker.ask("endless")
    assert begun.wait(10)
    assert worker.cancel()
    assert worker.wait(10)
    assert not worker.cancel()


def test_a_saved_condition_gives_the_same_text(panel: Playground, tmp_path: Path) -> None:
    panel.set(strength=1.5, layer=3, positions="generated").run(wait=True)
    saved = panel.save_condition("my choice")
    assert saved.file.parent == tmp_path / "kept"
    again = eval(saved.expression, {"wb": wb})
    assert written(panel, wb.load_intervention(saved.file)) == texts(panel)[1] == written(panel, again)
    assert ".at(layers=[3], positions='generated')" in saved.expression
    assert panel.save_condition("my choice") == saved
    with pytest.raises(ModelError, match="holds something else"):
        panel.set(strength=2.0).save_condition("my choice")
    for name in ("../outside", "a/b", "", ".hidden"):
        with pytest.raises(ModelError, match="no name for a file"):
            panel.save_condition(name)
    panel.out = None
    with pytest.raises(ModelError, match="no folder"):
        panel.save_condition("x")


def test_the_twin_holds_both_texts_and_stays_small(panel: Playground) -> None:
    panel.set(strength=2.0).run(wait=True)
    page = panel.html
    for text in texts(panel):
        assert text.replace("<", "&lt;").replace(">", "&gt;") in page
    assert page.count("<svg") == 2
    assert "<script" not in page
    assert len(page.encode()) < 200_000
    huge = [Column("plain", "#000000", ["<b>word"] * 40_000, note="x"), panel.live.columns[1]]
    page = twin_html("twin", "done", "p" * 50_000, huge, lines=["x"], picture="<svg>" + "p" * 250_000)
    assert len(page.encode()) < 200_000
    assert "too large" in page
    assert "<b>" not in page


def test_errors_are_told_in_words_and_the_next_run_works(panel: Playground) -> None:
    question = panel.controls.wish().prompt
    state = panel.set(prompt="word " * 4000).run(wait=True)
    assert state.status == "error"
    assert "2048 positions" in state.message
    assert panel.live.frame["message"] == state.message
    assert "2048 positions" in panel.html
    assert panel.set(prompt=question).run(wait=True).status == "done"
    with pytest.raises(ModelError, match="to be had"):
        panel.set(layer=17)
    with pytest.raises(ModelError, match="-2 to 6"):
        panel.set(strength=99.0)
    with pytest.raises(ModelError, match="no dial"):
        panel.set(strenght=1.0)
    with pytest.raises(ModelError, match="GB are free"):
        refuse_too_large(panel.lm, 100, 1000, free=1_000_000)
    refuse_too_large(panel.lm, 100, 100)


def test_a_fault_in_the_thread_is_shown(panel: Playground) -> None:
    panel.interventions["steps"] = object()  # type: ignore[assignment]
    state = panel.set(strength=2.0).run(wait=True)
    assert state.status == "error"
    assert "TypeError" in state.message
    assert isinstance(panel.error, TypeError)


def test_what_cannot_be_played_with_is_refused(lab: LM, vector: wb.Residual, word_problems: Task) -> None:
    with pytest.raises(ValueError, match="nothing to play with"):
        wb.playground(lab, {}, task=word_problems)
    with pytest.raises(ValueError, match="no prompt"):
        wb.playground(lab, {"v": vector})
    with pytest.raises(ValueError, match="coloured by"):
        wb.playground(lab, {"v": vector}, task=word_problems, by="colour")
    with pytest.raises(ValueError, match="above 0"):
        wb.playground(lab, {"v": vector}, task=word_problems, strengths=[0.0])
    with pytest.raises(ModelError, match="width"):
        wb.playground(lab, {"v": wb.Residual({0: torch.ones(3)})}, task=word_problems)


def test_the_strength_map_is_the_grid_of_those_strengths(panel: Playground, vector: wb.Residual) -> None:
    from workbench.grid import best, grid

    panel.set(layer=3)
    state = panel.strength_map(wait=True)
    assert state.status == "done", state.message
    assert "strength" in state.message
    assert panel.table is not None
    place = vector.at(layers=[3], positions="last")
    cells = [({"strength": c}, c * place) for c in panel.table.strength]
    expected = grid(panel.lm, panel.task, cells, n=6, max_new_tokens=48)  # type: ignore[arg-type]
    assert panel.table[list(expected)].equals(expected)
    assert panel.sweet_spot() == best(expected)["strength"]
    assert "<svg" in panel.controls.figure.value
    panel.task = None
    assert "needs questions" in panel.strength_map(wait=True).message


def test_kinds_without_layers_lock_those_dials(lab: LM, word_problems: Task, vector: wb.Residual) -> None:
    pairs = wb.contrast(word_problems, positive="steps", negative="direct", shots=2, n=4, seed=0, lm=lab)
    heads = wb.project_out(lab, vector.at(layers=[3]), [(3, 0)])
    kv = wb.extract(lab, pairs, site="kv")
    one = vector.at(layers=[2])
    kinds = {"one": one, "cache": kv, "weights": heads, "none": None, "sum": one + kv}
    panel = wb.playground(lab, kinds, task=word_problems, max_new_tokens=16)
    dials = panel.controls.dials
    for name, x in kinds.items():
        panel.set(name=name, strength=1.0)
        assert dials["layer"].disabled == (name != "cache")
        assert dials["positions"].disabled == (name != "one")
        assert panel.run(wait=True).status == "done", (name, panel.state.message)
        assert texts(panel)[-1] == written(panel, x)
        assert panel.error is None


def test_other_architectures(tiny: Callable[[str], Path]) -> None:
    lm = wb.load_model(tiny("gemma3"))
    vector = wb.Residual({layer: torch.ones(lm.d_model) for layer in range(len(lm.blocks))}, "generated")
    panel = wb.playground(lm, {"ones": vector}, prompts=["What is 2+3?"], max_new_tokens=8)
    assert panel.run(wait=True).status == "done", panel.state.message
    assert panel.live.columns[1].readings is not None
    assert panel.controls.buttons["map"].disabled


def test_two_threads_on_one_model_equal_each_alone(lab: LM, vector: wb.Residual, word_problems: Task) -> None:
    prompts = [lab.render(word_problems.messages(row)) for row in word_problems.rows("tuning", n=3, seed=1)]
    jobs = [2.0 * vector.at(layers=[3]), 1.0 * vector.at(layers=[1], positions="all"), None]
    expected = [[answer.text for answer in lab.generate(prompts, x, 32)] for x in jobs]
    found: list[list[list[str]]] = [[], [], []]

    def work(place: int) -> None:
        for _ in range(4):
            found[place].append([answer.text for answer in lab.generate(prompts, jobs[place], 32)])

    threads = [Thread(target=work, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[each] * 4 for each in expected]


def test_a_run_waits_for_another_cells_turn_and_can_be_cancelled_meanwhile(panel: Playground) -> None:
    panel.set(strength=2.0)
    expected = [written(panel, None), written(panel, panel.intervention)]
    with panel.lm.apply(panel.intervention or []):
        panel.run()
        for _ in range(500):
            if panel.state.status == "waiting":
                break
            time.sleep(0.01)
        assert panel.state.status == "waiting"
        assert panel.cancel().status == "cancelled"
        assert panel.wait(10)
        with pytest.raises(ModelError, match=r"inside of lm\.apply"):
            panel.run(wait=True)
        assert panel.wait(10)
        panel.run()
    assert panel.wait(20)
    assert texts(panel) == expected  # the block's own change did not leak into the other thread
    assert turn(panel.lm).acquire(blocking=False)
    turn(panel.lm).release()


def test_the_browser_files_are_shipped_and_fetch_nothing() -> None:
    folder = Path(wb.__file__).parent / "widgets"
    script, sheet = ((folder / name).read_text() for name in ("live.js", "live.css"))
    assert "export default" in script
    for text in (script, sheet):
        assert "http" not in text
        assert "import " not in text
        assert max(map(len, text.splitlines())) <= 120
