"""The rating panel: clicks on real widgets, the file after each, a reopened panel, nothing that names a condition."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.judging_results import results_of
from workbench.judging import agreement, open_ballot, read_votes
from workbench.results import Results
from workbench.widgets import Rating, rate
from workbench.widgets.rating import question_html, twin_html

N = 12


@pytest.fixture
def results() -> Results:
    plain = [(f"plainly <b>{i}</b>", False) for i in range(N)]
    return results_of({"baseline-name": plain, "treated-name": [(f"= {i}", True) for i in range(N)]})


def opened(results: Results, file: Path, rater: str = "Ada", **more: object) -> Rating:
    return rate(results, "baseline-name", "treated-name", out=file, rater=rater, **more)


def test_every_click_is_in_the_file_at_once_and_a_reopened_panel_goes_on(results: Results, tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    panel = opened(results, file)
    shown = []
    for number, choice in enumerate(["left", "right", "tie", "skip"], start=1):
        shown.append(panel.ballot.current.duel.id)
        panel.buttons[choice].click()
        assert len(file.read_text().splitlines()) == 1 + number
    assert panel.progress.value == 4
    again = opened(results, file)
    assert again.progress.value == 4 and again.screen.value == panel.screen.value
    assert again.ballot.current.duel.id not in shown
    votes = read_votes(file)
    assert votes.id.tolist() == shown and votes.choice.tolist() == ["left", "right", "tie", "skip"]
    for vote in votes.itertuples():
        other = "b" if vote.left == "a" else "a"
        assert vote.verdict == {"left": vote.left, "right": other, "tie": "tie", "skip": None}[vote.choice]
    assert set(votes.rater) == {"Ada"} and votes.when.str.endswith("+00:00").all()


def test_keys_do_what_buttons_do_and_undo_takes_back(results: Results, tmp_path: Path) -> None:
    clicked, typed = opened(results, tmp_path / "a"), opened(results, tmp_path / "b")
    first = typed.screen.value
    assert typed.buttons["undo"].disabled
    for choice, key in (("left", "1"), ("right", "2"), ("tie", "3"), ("undo", "u"), ("skip", "4")):
        clicked.buttons[choice].click()
        typed.keys.value = key
        assert typed.keys.value == "" and typed.screen.value == clicked.screen.value
    drop = ["when"]
    assert read_votes(tmp_path / "a").drop(columns=drop).equals(read_votes(tmp_path / "b").drop(columns=drop))
    for _ in range(5):
        typed.keys.value = "U"
    assert typed.screen.value == first and typed.progress.value == 0
    assert len(read_votes(tmp_path / "b")) == 0
    typed.keys.value = "xyz"
    assert typed.progress.value == 0


def test_sides_are_balanced_and_the_panel_names_no_condition(results: Results, tmp_path: Path) -> None:
    for rater in ("Ada", "Bob", "Eve"):
        panel = opened(results, tmp_path / "votes.jsonl", rater)
        assert sorted(showing.left for showing in panel.ballot.showings) == ["a"] * (N // 2) + ["b"] * (N // 2)
        while panel.ballot.current:
            for text in (panel.screen.value, question_html(panel.ballot), twin_html(panel.ballot)):
                assert "baseline-name" not in text and "treated-name" not in text and "<b>" not in text
            panel.buttons["tie"].click()
        assert all(button.disabled == (name != "undo") for name, button in panel.buttons.items())
        panel.buttons["tie"].click()
        assert panel.progress.value == N
    orders = [[s.duel.id for s in opened(results, tmp_path / "votes.jsonl", r).ballot.showings] for r in ("Ada", "Bob")]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    assert len(read_votes(tmp_path / "votes.jsonl")) == 3 * N


def test_a_saved_notebook_shows_the_state_without_a_kernel(tmp_path: Path) -> None:
    """Run in a real kernel: the first cell's output follows the votes that later cells (or clicks) make."""
    first = (
        "from tests.judging_results import results_of\nfrom workbench.widgets import rate\n"
        "results = results_of({'x': [('plainly <b>1</b>', False)] * 3, 'y': [('good', True)] * 3})\n"
        f"panel = rate(results, 'x', 'y', out={str(tmp_path / 'votes')!r}, rater='Ada')\npanel"
    )
    cells = [nbformat.v4.new_code_cell(first), nbformat.v4.new_code_cell("panel.buttons['left'].click()")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    where = {"metadata": {"path": str(Path(__file__).parents[1])}}
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120, resources=where).execute()
    outputs = [output["data"] for output in notebook.cells[0].outputs]
    assert any("application/vnd.jupyter.widget-view+json" in data for data in outputs)
    (twin,) = [data["text/html"] for data in outputs if "text/html" in data]
    assert "Ada has rated 1 of 3 questions" in twin and "plainly &lt;b&gt;1&lt;/b&gt;" in twin
    assert len(read_votes(tmp_path / "votes")) == 1


def test_a_half_written_line_is_cut_off_and_asked_again(results: Results, tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    panel = opened(results, file)
    panel.buttons["left"].click()
    whole = file.read_bytes()
    panel.buttons["right"].click()
    file.write_bytes(whole + b'{"rater": "Ada", "when"')
    again = opened(results, file)
    assert again.progress.value == 1 and file.read_bytes() == whole
    again.buttons["tie"].click()
    assert read_votes(file).choice.tolist() == ["left", "tie"]


def test_other_answers_and_empty_names_are_refused(results: Results, tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    opened(results, file)
    before = file.read_bytes()
    other = Results(results.rows.assign(output="changed"), results.costs, results.about)
    with pytest.raises(ValueError, match=r"other settings .*answers"):
        opened(other, file)
    with pytest.raises(ValueError, match="rater is empty"):
        opened(results, file, rater=" ")
    with pytest.raises(ValueError, match="no vote"):
        open_ballot(results, "baseline-name", "treated-name", out=file, rater="Ada").vote("best")
    with pytest.raises(ValueError, match="There is no file"):
        read_votes(tmp_path / "nothing")
    assert file.read_bytes() == before


def test_raters_agree_with_each_other_and_with_gold(results: Results, tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    for rater, knows in (("Ada", "b"), ("Bob", "a")):
        ballot = open_ballot(results, "baseline-name", "treated-name", out=file, rater=rater)
        while (showing := ballot.current) is not None:
            ballot.vote("left" if showing.left == knows else "right")
    found = agreement({"people": read_votes(file)}, gold=results, resamples=100)
    assert found.right["people/Ada"].estimate == 1.0 and found.right["people/Bob"].estimate == 0.0
    assert found.pairs.set_index(["one", "other"]).share["people/Ada", "people/Bob"] == 0.0
    assert json.loads(file.read_text().splitlines()[0])["settings"]["kind"] == "votes"
