"""BLiMP's pairs as a task: all of them, dealt out once, and scored as one sentence after the other would be."""

from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_lm
from workbench.likelihood import minimal_pairs, pair_accuracy
from workbench.likelihood.requests import prefix_token
from workbench.models import ModelError
from workbench.tasks import SPLITS, load_task
from workbench.tasks.blimp import PARADIGMS


def test_every_pair_has_one_split(data_folder: Path) -> None:
    task = load_task("blimp")
    rows = [row for split in SPLITS for row in task.rows(split)]
    assert len(rows) == len({row["id"] for row in rows}) == 67_000
    assert {row["paradigm"] for row in rows} == set(PARADIGMS) and task.kind == "pair"
    assert {"syntax", "semantics", "morphology"} < {row["field"] for row in rows}


def test_a_sample_has_as_many_of_each_paradigm(data_folder: Path) -> None:
    rows = load_task("blimp", per_paradigm=3).rows()
    assert [row["paradigm"] for row in rows] == [each for each in PARADIGMS for _ in range(3)]
    alone = load_task("blimp:passive_1", per_paradigm=3).rows()
    assert alone == [row for row in rows if row["paradigm"] == "passive_1"]
    assert load_task("blimp:passive_1", per_paradigm=3).rows(seed=1) != alone
    assert load_task("blimp:passive_1").rows(n=5, seed=2) == load_task("blimp:passive_1").rows(n=9, seed=2)[:5]


def test_the_chosen_sentence_is_the_answer(data_folder: Path) -> None:
    task = load_task("blimp:passive_1")
    row = task.rows(n=1)[0]
    assert task.verify(row, row["good"]).correct and not task.verify(row, row["bad"]).correct
    assert task.verify(row, "something else").unparsed


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pairs_are_scored_like_sentences_alone(name: str, data_folder: Path) -> None:
    lm = tiny_lm(name)
    rows = load_task("blimp", per_paradigm=1).rows()[::5]
    for row, pair in zip(rows, minimal_pairs(lm, rows), strict=True):
        scores = []
        for side in ("good", "bad"):
            ids = torch.tensor([[prefix_token(lm), *lm.encode(row[side])]])
            with torch.no_grad():
                logits = lm.model(ids[:, :-1]).logits[0].log_softmax(-1)
            scores.append(float(logits.gather(1, ids[0, 1:, None]).sum()))
        assert (pair.good, pair.bad) == pytest.approx(scores, abs=1e-4)
        assert pair.correct == (scores[0] > scores[1]) and pair.paradigm == row["paradigm"]


def test_accuracy_by_paradigm_and_field(data_folder: Path) -> None:
    pairs = minimal_pairs(tiny_lm("llama"), load_task("blimp", per_paradigm=2).rows())
    by = pair_accuracy(pairs)
    assert len(by) == 68 and by["all"].n == 134 and by["all"].low < by["all"].estimate < by["all"].high
    assert sum(each.n for name, each in pair_accuracy(pairs, "field").items() if name != "all") == 134


def test_wrong_names_and_rows_are_refused(data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Did you mean .*blimp:passive_1"):
        load_task("blimp:passive_3")
    with pytest.raises(ValueError, match="per_paradigm alone"):
        load_task("blimp", kind="text")
    with pytest.raises(ValueError, match=r"no blimp\.jsonl"):
        load_task("blimp", path=tmp_path)
    with pytest.raises(ValueError, match="per_paradigm is a number"):
        load_task("blimp", per_paradigm=0)
    with pytest.raises(ValueError, match="can't give 100 test pairs"):
        load_task("blimp:passive_1", per_paradigm=2).rows(n=100)
    with pytest.raises(ModelError, match="no pair"):
        minimal_pairs(tiny_lm("llama"), [{"id": "x", "question": "a"}])
