"""Edits: what each leaves of a chain, judged again, and which step is done anew when one changes."""

import json
from functools import partial
from pathlib import Path

import pytest

from workbench.models import LM
from workbench.synthesis import edits, synthesize
from workbench.synthesis.recipes import oracle, rejection, student_paced
from workbench.synthesis.sampling import Attempt, Settings
from workbench.synthesis.selection import usable
from workbench.tasks import Task, load_task

LONG = "First there are 57. Then 31 more, so 57+31=88. Wait, let me think. Then half, so 88/2=44. The answer is 44."


def attempt(text: str, answer: str = "44") -> Attempt:
    sample = {"text": text, "correct": True, "extracted": answer, "tokens_in": 5, "tokens_out": 50, "finished": True}
    plain = [{"role": "user", "content": "Ben has 57 books. He finds 31 more. He gives half away. How many?"}]
    return {"row_id": "r", "question": plain[0]["content"], "answer": answer, "plain": plain, "prompt": "p", "row": {},
            "samples": [sample]}  # fmt: skip


def edited(lab: LM, task: Task, edit, text: str, answer: str = "44") -> dict:
    (made,) = edit(lab, task, [attempt(text, answer)], settings=Settings())
    return made["samples"][0]


@pytest.mark.parametrize(
    ("edit", "text", "left"),
    [
        (edits.equations, LONG, "57+31=88. 88/2=44. The answer is 44."),
        (edits.equations, "She pays $8 x 5.5 = $44 in all.\nThe answer is 44.", "8x5.5=44. The answer is 44."),
        (edits.equations, "So 57+31=88, then 1,000/2=500. The answer is 44.",
         "57+31=88. 1,000/2=500. The answer is 44."),
        (edits.in_words, "1+2+3=6, 9 - 2 - 3 = 4, (57+31=88) and - 88/2=44. The answer is 44.",
         "1+2+3=6, 9 - 2 - 3 = 4, (57 plus 31 is 88) and - 88 divided by 2 is 44. The answer is 44."),
        (edits.in_words, "57+31=88. 88/2=44. The answer is 44.",
         "57 plus 31 is 88. 88 divided by 2 is 44. The answer is 44."),
        (partial(edits.compact, most=0), LONG,
         "There are 57. 31 more, so 57+31=88. Half, so 88/2=44. The answer is 44."),
        (partial(edits.compact, most=1), LONG,
         "There are 57. Then 31 more, so 57+31=88. Half, so 88/2=44. The answer is 44."),
        (partial(edits.compact, connectors=["first"]), LONG,
         "First there are 57. 31 more, so 57+31=88. Half, so 88/2=44. The answer is 44."),
        (partial(edits.without_steps, removed=0), "57+31=88. 88/2=44. The answer is 44.",
         "57+31=88. 88/2=44. The answer is 44."),
        (partial(edits.without_steps, removed=1), "57+31=88. 88/2=44. The answer is 44.", "88/2=44. The answer is 44."),
        (partial(edits.without_steps, removed=9), "57+31=88. 88/2=44. The answer is 44.", "The answer is 44."),
    ],
)  # fmt: skip
def test_what_an_edit_leaves(lab: LM, word_problems: Task, edit, text: str, left: str) -> None:
    sample = edited(lab, word_problems, edit, text)
    assert sample["text"] == left
    assert sample["correct"]
    assert sample["tokens_out"] == len(lab.encode(left)) + 1


def test_an_edit_is_judged_again_and_an_impossible_one_says_why(lab: LM, word_problems: Task) -> None:
    assert not edited(lab, word_problems, edits.equations, "88/2=44. The answer is 43.")["correct"]
    lost = edited(lab, word_problems, edits.equations, "The answer is 44.")
    assert not usable(lost)
    assert lost["why"] == "no equation in it"
    with pytest.raises(ValueError, match="removed=-1"):
        edits.without_steps(lab, word_problems, [attempt(LONG)], Settings(), removed=-1)


def test_jitter_removes_at_least_as_many_steps_and_repeats(lab: LM, word_problems: Task) -> None:
    rows = word_problems.rows("train", n=40)
    made = oracle(lab, word_problems, rows, Settings())
    plain = edits.without_steps(lab, word_problems, made, Settings(), removed=1)
    shaken = edits.without_steps(lab, word_problems, made, Settings(), removed=1, jitter=0.5)
    steps = [[len(edits.sentences(a["samples"][0]["text"])) for a in found] for found in (plain, shaken)]
    assert all(a >= b for a, b in zip(*steps, strict=True))
    assert sum(steps[0]) > sum(steps[1])
    assert shaken == edits.without_steps(lab, word_problems, made, Settings(), removed=1, jitter=0.5)


def test_least_likely_tokens_are_those_of_the_model_alone(lab: LM, word_problems: Task) -> None:
    import torch

    text = "57+31=88. 88/2=45. The answer is 45."
    made = attempt(text, "45")
    found = edits._least_likely(lab, [(made, text), (attempt(LONG), LONG)])[0]
    prompt = lab.encode(lab.render(made["plain"]))
    parts = [lab.encode(part) for part in ("57+31=88.", " 88/2=45.", " The answer is 45.")]
    ids = torch.tensor([prompt + [token for part in parts for token in part]])
    with torch.no_grad():
        chance = lab.model(input_ids=ids).logits[0].softmax(-1)
    seen = [float(chance[place - 1, ids[0, place]]) for place in range(len(prompt), ids.shape[1])]
    ends = [len(parts[0]), len(parts[0]) + len(parts[1]), len(seen)]
    expected = [min(seen[: ends[0]]), min(seen[ends[0] : ends[1]]), min(seen[ends[1] :])]
    assert found == pytest.approx(expected, rel=1e-3)
    kept = edits.drop_improbable(lab, word_problems, [made], Settings(), threshold=max(expected[:2]) * 0.99)
    assert len(edits.sentences(kept[0]["samples"][0]["text"])) == 2


def test_a_student_that_bars_nothing_changes_nothing(lab: LM, word_problems: Task) -> None:
    from workbench.models import load_model
    from workbench.prompts import few_shot

    student = load_model("lab-small")
    rows = word_problems.rows("train", n=4)
    settings = Settings(strategy=few_shot("steps", 2), samples=2, max_new_tokens=40, temperature=1.0)
    free = student_paced(student, word_problems, rows, settings, teacher=lab, plausible=0.0)
    alone = rejection(lab, word_problems, rows, settings)
    assert [a["samples"] for a in free] == [a["samples"] for a in alone]
    paced = student_paced(student, word_problems, rows, settings, teacher=lab, plausible=0.5)
    assert [a["samples"] for a in paced] != [a["samples"] for a in alone]


def test_changing_one_step_redoes_it_and_what_follows_and_nothing_before(
    lab: LM, word_problems: Task, tmp_path: Path
) -> None:
    def made(first, second, out: Path = tmp_path / "a"):
        before = {file: file.stat().st_mtime_ns for file in out.glob("steps/*/*.json")}
        data = synthesize(lab, word_problems, "oracle", n=20, out=out, chunk_size=8, edits=[first, second])
        after = {file: file.stat().st_mtime_ns for file in out.glob("steps/*/*.json")}
        new = {file.parent.name.rpartition("-")[0] for file in after if before.get(file) != after[file]}
        return data, new

    removed, words = partial(edits.without_steps, removed=1), edits.in_words
    first, new = made(removed, words)
    assert new == {"oracle", "1-without_steps", "2-in_words"}
    assert made(removed, words)[1] == set()
    assert made(removed, edits.equations)[1] == {"2-equations"}
    other, new = made(partial(edits.without_steps, removed=2), words)
    assert new == {"1-without_steps", "2-in_words"}
    again, new = made(removed, words)
    assert again.records == first.records != other.records
    straight = synthesize(lab, word_problems, "oracle", n=20, out=tmp_path / "b", edits=[removed, words])
    assert straight.records == first.records
    record = first.records[0]
    assert record["edits"] == [{"name": "without_steps", "removed": 1}, {"name": "in_words"}]
    steps = json.loads((tmp_path / "b" / "card.json").read_text())["cost"]["steps"]
    assert list(steps) == ["oracle", "1-without_steps", "2-in_words"]


def test_gsm8k_rationales_go_through_the_same_steps(lab: LM, data_folder: Path, tmp_path: Path) -> None:
    task = load_task("gsm8k", path=data_folder / "gsm8k")
    others = [task, load_task("svamp", path=data_folder / "svamp")]
    data = synthesize(
        lab, task, "oracle", n=120, out=tmp_path, edits=[edits.equations], evaluation=others, dedup="minhash"
    )
    assert len(data.kept) > 80
    assert set(data.card["counts"]["rejected"]) <= {
        "no equation in it",
        "no verified answer",
        "overlap with evaluation",
    }
    assert data.card["overlap"]["by_task"] == {"gsm8k": 1319, "svamp": 584}
    assert all(set(r["messages"][-1]["content"]) <= set("0123456789.,+-*/×÷x=()% \nTheanswrisAm$") for r in data.kept)


def test_what_one_edit_could_not_do_no_later_edit_makes_usable(lab: LM, word_problems: Task) -> None:
    failed = edits.equations(lab, word_problems, [attempt("The answer is 44.")], Settings())
    for later in (edits.compact, edits.in_words, edits.as_programs, edits.drop_improbable):
        (again,) = later(lab, word_problems, failed, settings=Settings())
        assert again == failed[0]


def test_a_right_answer_that_can_not_be_edited_is_no_wrong_chain(lab: LM, word_problems: Task, tmp_path: Path) -> None:
    def bare(lm: LM, task: Task, rows: list[dict], settings: Settings) -> list[Attempt]:
        """A right answer without an equation, a wrong one with one, and an empty one."""
        made = oracle(lm, task, rows, settings)
        for one in made:
            (sample,) = one["samples"]
            wrong = {**sample, "text": "1+1=3. The answer is -1.", "correct": False, "extracted": "-1"}
            empty = {**sample, "text": "", "correct": False, "extracted": None}
            one["samples"] = [{**sample, "text": f"The answer is {one['answer']}."}, wrong, empty]
        return made

    data = synthesize(lab, word_problems, bare, n=4, out=tmp_path, negatives=3, edits=[edits.equations], threshold=1.0)
    assert data.card["counts"] == {"questions": 4, "kept": 0, "rejected": {"no equation in it": 4}, "negative": 4}
    assert {record["messages"][-1]["content"] for record in data.negatives} == {"1+1=3. The answer is -1."}
    assert {record["solve_rate"] for record in data} == {1 / 3}
    programs = synthesize(lab, word_problems, bare, n=4, out=tmp_path / "b", edits=[edits.as_programs])
    assert programs.card["counts"]["rejected"] == {"no program in it": 4}


def test_an_empty_answer_does_not_move_what_the_student_finds_improbable(lab: LM, word_problems: Task) -> None:
    text = "57+31=88. 88/2=45. The answer is 44."
    alone = attempt(text)
    likely = edits._least_likely(lab, [(alone, text)])[0]
    drop = partial(edits.drop_improbable, threshold=sum(likely[:2]) / 2)
    beside = {**alone, "samples": [{**alone["samples"][0], "text": "", "correct": False}, *alone["samples"]]}
    (expected,) = drop(lab, word_problems, [alone], Settings())[0]["samples"]
    assert len(edits.sentences(expected["text"])) == 2
    assert drop(lab, word_problems, [beside], Settings())[0]["samples"][1] == expected


def test_an_edit_does_not_bring_the_gold_answer_in(lab: LM, word_problems: Task) -> None:
    text = "57+31=88. 88/2=44. The answer is 44."
    for verdict, answer in ((True, "44"), (False, "44"), (True, "7")):
        one = attempt(text, answer)
        one["samples"][0] |= {"by": "reviewers", "correct": verdict, "extracted": "44"}
        (found,) = edits.in_words(lab, word_problems, [one], Settings())[0]["samples"]
        assert found["correct"] == verdict
    undecided = attempt(text, "") | {"dropped": "no agreement between answers"}
    (left,) = edits.in_words(lab, word_problems, [undecided], Settings())
    assert left["samples"][0]["text"] == text
