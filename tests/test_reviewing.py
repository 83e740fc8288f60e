"""The reviewing panel: clicks on real widgets, the file after each, and the records that training gets."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

import workbench as wb
from tests.test_finetune import QUICK
from workbench.finetuning.recipe import kept_records, records_key
from workbench.synthesis.records import Data, RecordError, load_data
from workbench.synthesis.reviewing import open_review, read_reviews, record_key, review_agreement, reviewed
from workbench.widgets import Reviewing, review

N = 8


def record(number: int, **more: object) -> dict:
    messages = [{"role": "user", "content": f"{number} + 1 < 9?"}, {"role": "assistant", "content": f"= <b>{number}"}]
    verdict = {"correct": True, "extracted": "1"}
    return {"id": f"sum/{number}", "messages": messages, "verdict": verdict, "tokens_out": 3, "kept": True, **more}


@pytest.fixture
def records() -> list[dict]:
    return [record(number) for number in range(N)]


def opened(records: list[dict], out: Path, reviewer: str = "Ada", **more: object) -> Reviewing:
    return review(records, out=out, reviewer=reviewer, **more)


def test_every_click_is_in_the_file_at_once_and_a_reopened_panel_goes_on(records: list[dict], tmp_path: Path) -> None:
    panel = opened(records, tmp_path)
    file = panel.review.file
    panel.why.value = "  clear "
    panel.buttons["keep"].click()
    panel.buttons["reject"].click()
    panel.buttons["edit"].click()
    assert panel.editing.layout.display == "" and panel.editor.value == "= <b>2"
    assert len(file.read_text().splitlines()) == 1 + 2  # opening the editor decides nothing
    panel.editor.value = "= 3"
    panel.save.click()
    panel.buttons["skip"].click()
    assert len(file.read_text().splitlines()) == 1 + 4 and panel.progress.value == 4
    table = read_reviews(tmp_path)
    assert table.decision.tolist() == ["keep", "reject", "edit", "skip"]
    assert table.record.tolist() == [record_key(one) for one in records[:4]]
    assert table.id.tolist() == ["sum/0", "sum/1", "sum/2", "sum/3"]
    assert table.why.tolist() == ["clear", "", "", ""] and table.text.tolist() == [None, None, "= 3", None]
    assert set(table.reviewer) == {"Ada"} and table.when.str.endswith("+00:00").all()
    again = opened(records, tmp_path)
    assert again.progress.value == 4 and again.screen.value == panel.screen.value
    more = opened([*records[4:], record(99)], tmp_path)  # other records: decisions on those that are gone stay
    assert more.progress.value == 0 and len(more.review.records) == 5 and len(read_reviews(tmp_path)) == 4


def test_keys_do_what_buttons_do_and_undo_takes_back(records: list[dict], tmp_path: Path) -> None:
    clicked, typed = opened(records, tmp_path / "a"), opened(records, tmp_path / "b")
    first = typed.screen.value
    assert typed.buttons["undo"].disabled
    for choice, key in (("keep", "k"), ("reject", "r"), ("undo", "u"), ("skip", "s"), ("edit", "E")):
        clicked.buttons[choice].click()
        typed.keys.value = key
        assert typed.keys.value == "" and typed.screen.value == clicked.screen.value
        assert typed.editing.layout.display == clicked.editing.layout.display
    for panel in (clicked, typed):
        panel.editor.value = "better"
        panel.save.click()
    drop = ["when"]
    assert read_reviews(tmp_path / "a").drop(columns=drop).equals(read_reviews(tmp_path / "b").drop(columns=drop))
    assert read_reviews(tmp_path / "b").decision.tolist() == ["keep", "skip", "edit"]
    for _ in range(5):
        typed.keys.value = "u"
    assert typed.screen.value == first and typed.progress.value == 0 and len(read_reviews(tmp_path / "b")) == 0
    assert reviewed(records, tmp_path / "a")[2]["messages"][-1]["content"] == "better"


def test_edits_that_can_not_be_stay_in_the_editor(records: list[dict], tmp_path: Path) -> None:
    panel = opened([record(0, given="= "), *records[1:]], tmp_path)
    panel.buttons["edit"].click()
    for text, said in (("= <b>0", "changes nothing"), (" \n", "is empty"), ("3", "must begin with its control text")):
        panel.editor.value = text
        panel.save.click()
        assert said in panel.told.value and panel.editor.value == text and panel.editing.layout.display == ""
    panel.cancel.click()
    assert panel.editing.layout.display == "none" and panel.progress.value == 0
    assert "<b>" not in panel.screen.value and "&lt;b&gt;0" in panel.screen.value
    with pytest.raises(ValueError, match="only an edit, has a text"):
        panel.review.decide("keep", text="x")


def test_reviewed_records_are_the_ones_left_with_edits_in(records: list[dict], tmp_path: Path) -> None:
    weighted = record(2, token_weights=[1.0, 2.0])
    given = [*records[:2], weighted, *records[3:], record(50, kept=False)]
    ada = open_review(given, out=tmp_path, reviewer="Ada")
    assert len(ada.records) == N  # what is not kept is not shown
    for decision in ("keep", "reject", "edit", "skip"):
        ada.decide(decision, text="= 3" if decision == "edit" else None)
    bob = open_review(given, out=tmp_path, reviewer="Bob")
    bob.decide("reject", why="dull")
    found = reviewed(given, tmp_path)
    assert [one["id"] for one in found] == ["sum/2", "sum/3", "sum/4", "sum/5", "sum/6", "sum/7", "sum/50"]
    edited = found[0]
    assert edited["messages"] == [weighted["messages"][0], {"role": "assistant", "content": "= 3"}]
    assert edited["edited"]["by"] == "Ada" and edited["edited"]["record"] == record_key(weighted)
    assert not {"verdict", "tokens_out", "token_weights"} & edited.keys()
    assert found[1:] == [*records[3:], given[-1]] and weighted["messages"][-1]["content"] == "= <b>2"
    assert [one["id"] for one in reviewed(given, tmp_path, only_reviewed=True)] == ["sum/2"]
    assert [one["id"] for one in reviewed(given, tmp_path, reviewers=["Ada"], only_reviewed=True)] == ["sum/0", "sum/2"]
    data = Data(tmp_path, given, {"a": 1})
    assert reviewed(data, tmp_path) == Data(tmp_path, found, {"a": 1})
    file = tmp_path / "given" / "records.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(one) + "\n" for one in given))
    assert reviewed(file, tmp_path).records == reviewed(load_data(file), tmp_path).records == found
    with pytest.raises(ValueError, match=r"None of the 4 decisions .* these 1 records"):
        reviewed([record(77)], tmp_path)
    with pytest.raises(ValueError, match="no decision of Eve; there are: Ada, Bob"):
        reviewed(given, tmp_path, reviewers=["Eve"])


def test_finetune_takes_what_is_left(tiny, tmp_path: Path) -> None:
    lm = wb.load_model(tiny("llama"))
    given = [record(number) for number in range(N)]
    panel = opened(given, tmp_path / "reviews")
    for choice in ("reject", "keep", "edit"):
        panel.buttons[choice].click()
    panel.editor.value = "The answer is 3."
    panel.save.click()
    by_hand = [*given[1:2], {**given[2], "messages": [*given[2]["messages"][:-1],
               {"role": "assistant", "content": "The answer is 3."}]}, *given[3:]]  # fmt: skip
    left = wb.reviewed(given, tmp_path / "reviews")
    assert records_key(kept_records(left)[0]) == records_key(by_hand)
    one = wb.finetune(lm, left, tmp_path / "a", **QUICK)
    other = wb.finetune(lm, by_hand, tmp_path / "b", **QUICK)
    assert (one.path / "adapter_model.safetensors").read_bytes() == (
        other.path / "adapter_model.safetensors"
    ).read_bytes()


def test_reviewers_share_a_folder_and_a_sample_and_agree_as_counted_by_hand(
    records: list[dict], tmp_path: Path
) -> None:
    decisions = {"Ada Á/.": "kkrrkkrr", "Bob": "kkrrkkkk"}  # 6 of 8 alike
    words = {"k": "keep", "r": "reject"}
    for reviewer, said in decisions.items():
        made = open_review(records, out=tmp_path, reviewer=reviewer)
        for letter in said:
            made.decide(words[letter])
    assert len(list(tmp_path.iterdir())) == 2
    found = review_agreement(tmp_path, resamples=50)
    (pair,) = found.pairs.itertuples()
    assert (pair.n, pair.share) == (8, 0.75)
    assert pair.kappa == pytest.approx((0.75 - 0.5) / 0.5)  # chance: 4/8 * 6/8 + 4/8 * 2/8 = 0.5
    assert found.confusion["Ada Á/.", "Bob"].loc["reject", "keep"] == 2
    samples = [open_review(records, out=tmp_path / "s", reviewer=name, n=3, seed=1).records for name in ("A", "B")]
    assert samples[0] == samples[1] and len(samples[0]) == 3
    doubled = open_review([*records, records[0]], out=tmp_path / "d", reviewer="A")
    assert len(doubled.records) == N
    doubled.decide("reject")
    assert len(reviewed([*records, records[0]], tmp_path / "d")) == N - 1


def test_a_torn_line_is_read_past_in_words_and_decided_again(
    records: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    panel = opened(records, tmp_path)
    file = panel.review.file
    panel.buttons["keep"].click()
    whole = file.read_bytes()
    panel.buttons["reject"].click()
    both = file.read_bytes()
    for torn in (both[: len(whole) + 1], both[:-1], whole + b'{"reviewer": "\xc3'):
        file.write_bytes(torn)
        assert len(read_reviews(tmp_path)) == 1
        assert "only half written and is left out" in capsys.readouterr().err
    again = opened(records, tmp_path)
    assert again.progress.value == 1 and file.read_bytes() == whole
    again.buttons["skip"].click()
    assert read_reviews(tmp_path).decision.tolist() == ["keep", "skip"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"decision": "maybe"}, r"line 2: decision 'maybe' is none of"),
        ({"when": "yesterday"}, r"line 2: when='yesterday' is no ISO 8601 time"),
        ({"reviewer": "Bob"}, r"line 2: reviewer 'Bob' in the file of 'Ada'"),
        ({"record": None}, r"line 2: no text in record"),
        ({"decision": "edit"}, r"line 2: no text in text"),
        ({"text": "x"}, r"line 2: unknown field text"),
        (None, r"line 2: not JSON"),
    ],
)
def test_a_line_changed_by_hand_is_refused_with_file_and_line(
    records: list[dict], tmp_path: Path, change: dict | None, said: str
) -> None:
    made = open_review(records, out=tmp_path, reviewer="Ada")
    made.decide("keep")
    first, line = made.file.read_text().splitlines()
    wrong = "{keep" if change is None else json.dumps({**json.loads(line), **change})
    made.file.write_text(f"{first}\n{wrong}\n")
    before = made.file.read_bytes()
    for read in (
        lambda: read_reviews(tmp_path),
        lambda: opened(records, tmp_path),
        lambda: reviewed(records, tmp_path),
    ):
        with pytest.raises(ValueError, match=rf"Ada\.jsonl, {said}"):
            read()
    assert made.file.read_bytes() == before


def test_what_can_not_be_reviewed_is_refused(records: list[dict], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reviewer is empty"):
        opened(records, tmp_path / "a", " ")
    with pytest.raises(ValueError, match="n=0 is too small"):
        opened(records, tmp_path / "a", n=0)
    with pytest.raises(RecordError, match="no record to train on"):
        opened([record(0, kept=False)], tmp_path / "a")
    with pytest.raises(ValueError, match="holds no reviews"):
        reviewed(records, tmp_path / "a")
    (tmp_path / "b").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        opened(records, tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "Ada.jsonl").write_text('{"settings": {"kind": "votes"}}\n')
    with pytest.raises(ValueError, match=r"Ada\.jsonl, line 1: a file of reviews begins"):
        opened(records, tmp_path / "c")
    done = open_review(records[:1], out=tmp_path / "d", reviewer="Ada")
    done.decide("keep")
    with pytest.raises(ValueError, match="has decided on all 1 records"):
        done.decide("keep")


def test_a_saved_notebook_shows_the_state_without_a_kernel(tmp_path: Path) -> None:
    """Run in a real kernel: the first cell's output follows the decisions that later cells (or clicks) make."""
    first = (
        "import workbench as wb\nturns = lambda i: [{'role': 'user', 'content': f'{i}?'}, "
        "{'role': 'assistant', 'content': f'= <b>{i}'}]\n"
        "records = [{'messages': turns(i)} for i in range(3)]\n"
        f"panel = wb.review(records, out={str(tmp_path / 'r')!r}, reviewer='Ada')\npanel"
    )
    cells = [nbformat.v4.new_code_cell(first), nbformat.v4.new_code_cell("panel.buttons['keep'].click()")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    where = {"metadata": {"path": str(Path(__file__).parents[1])}}
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=120, resources=where).execute()
    outputs = [output["data"] for output in notebook.cells[0].outputs]
    assert any("application/vnd.jupyter.widget-view+json" in data for data in outputs)
    (twin,) = [data["text/html"] for data in outputs if "text/html" in data]
    assert "Ada has reviewed 1 of 3 records" in twin and "= &lt;b&gt;1" in twin
