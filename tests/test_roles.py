"""Roles: the scorer against plain forwards, who decides what, costs against the calls made, chunks against one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.tiny import make_tiny
from workbench.finetuning import finetune
from workbench.generate import Generation
from workbench.models import LM, load_model
from workbench.statistics import Interval
from workbench.synthesis import synthesize
from workbench.synthesis.agreement import krippendorff, review_report
from workbench.synthesis.recipes import rejection
from workbench.synthesis.roles import REVIEWERS, Role, critique, named, option_scores, review_records, reviewed
from workbench.synthesis.sampling import Settings
from workbench.tasks import Task, load_task

SETTINGS = Settings(samples=2, temperature=1.0, max_new_tokens=12)
PROMPTS = ["<|user|>Is 2+2=4 right?<|end|><|assistant|>\n", "<|user|>Hm?<|end|><|assistant|>\n", "What?"]
RECIPES = {
    "reviewed": reviewed,
    "written": partial(reviewed, reviewers=(Role(how="written"), Role(options=tuple("abcd"), how="written"))),
    "critique": critique,
}


@pytest.fixture(scope="module")
def lm(tiny) -> LM:
    return load_model(tiny("llama"))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    file = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    rows = [{"question": f"{a}+{b}", "answer": str(a + b)} for a in range(8) for b in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_task("sums", path=file, split="train")


@contextmanager
def counted(lm: LM, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Generation]]:
    """All generations that `lm.generate` really made inside the block."""
    found: list[Generation] = []
    real = LM.generate

    def generate(self: LM, *args: object, **options: object) -> list[Generation]:
        made = real(self, *args, **options)
        found.extend(made)
        return made

    with monkeypatch.context() as patched:
        patched.setattr(LM, "generate", generate)
        yield found


def log_probability(lm: LM, prompt: str, option: str) -> float:
    start, end = lm.encode(prompt), lm.encode(option)
    with torch.no_grad():
        scores = lm.model(torch.tensor([start + end])).logits[0].log_softmax(-1)
    return sum(float(scores[len(start) + place - 1, token]) for place, token in enumerate(end))


def test_option_scores_equal_a_forward_of_each_option_alone(lm: LM) -> None:
    role = Role(options=("no", "yes", "q"))
    for batch in (None, 1, 2):
        found = option_scores(lm, PROMPTS, role, batch)
        for prompt, (scores, cost) in zip(PROMPTS, found, strict=True):
            alone = [log_probability(lm, prompt, option) for option in role.options]
            assert scores == pytest.approx(alone, abs=1e-4)
            assert cost == {"calls": 3, "tokens_in": 3 * len(lm.encode(prompt)) + 6, "tokens_out": 0}


def test_an_adapter_acts_in_its_own_role_alone(lm: LM, task: Task, tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "right?"}, {"role": "assistant", "content": "yes"}]}
    adapter = finetune(lm, [record] * 8, tmp_path / "yes", epochs=12, quantization="none", learning_rate=5e-3)
    plain = [scores for scores, _ in option_scores(lm, PROMPTS, Role())]
    taught = Role("right?", adapter=adapter)
    (scores, _), *_ = option_scores(lm, [lm.render([{"role": "user", "content": "right?"}])], taught)
    assert scores[1] > scores[0] + 1
    assert [found for found, _ in option_scores(lm, PROMPTS, Role())] == plain
    rows = task.rows("train")[:6]
    every = reviewed(lm, task, rows, SETTINGS, reviewers=(taught,))
    assert all(sample["correct"] and sample["grades"] == [1] for attempt in every for sample in attempt["samples"])
    before = rejection(lm, task, rows, SETTINGS)
    assert [[s["text"] for s in a["samples"]] for a in every] == [[s["text"] for s in a["samples"]] for a in before]
    other = reviewed(lm, task, rows, SETTINGS, generator=Role("{question}", adapter=adapter), reviewers=(taught,))
    assert [a["samples"][0]["text"] for a in other] != [a["samples"][0]["text"] for a in before]


def test_all_agree_or_the_adjudicator_decides(lm: LM, task: Task) -> None:
    rows = task.rows("train")[:20]
    prompts = ("{question} {answer}", "{answer}", "{answer} {question}?", "{grades} {answer}")
    *roles, judge = (Role(prompt, options=("n", "y")) for prompt in prompts)  # one token each: both are found
    found = reviewed(lm, task, rows, SETTINGS, reviewers=tuple(roles), adjudicator=judge)
    strict = reviewed(lm, task, rows, SETTINGS, reviewers=tuple(roles), adjudicator=None)
    kinds = set()
    for row, attempt, alone in zip(rows, found, strict, strict=True):
        for sample, same in zip(attempt["samples"], alone["samples"], strict=True):
            assert sample["by"] == "reviewers"
            assert sample["verified"] == task.verify(row, sample["text"]).correct
            assert sample["grades"] == same["grades"]
            for role, grade in zip(roles, sample["grades"], strict=True):
                prompt = lm.render(
                    [{"role": "user", "content": role.fill(question=row["question"], answer=sample["text"])}]
                )
                assert grade == int(log_probability(lm, prompt, "y") > log_probability(lm, prompt, "n"))
            agree = len(set(sample["grades"])) == 1
            assert ("adjudicated" in sample) == (not agree)
            assert sample["correct"] == bool(sample["grades"][0] if agree else sample["adjudicated"])
            assert same["correct"] == (sample["grades"] == [1, 1, 1])
            kinds.add((agree, sample["correct"]))
    assert len(kinds) >= 3  # of agreed and split, accepted and not: most kinds are there


@pytest.mark.parametrize("name", RECIPES)
def test_costs_are_the_calls_really_made(lm: LM, task: Task, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with counted(lm, monkeypatch) as made:
        attempts = RECIPES[name](lm, task, task.rows("train")[:7], SETTINGS)
    cost = {key: sum(attempt["cost"][key] for attempt in attempts) for key in ("calls", "tokens_in", "tokens_out")}
    assert cost["tokens_out"] == sum(generation.tokens_out for generation in made)
    if name == "reviewed":  # scored: two options a reviewer and, where they split, the adjudicator
        samples = [sample for attempt in attempts for sample in attempt["samples"]]
        assert len(made) == 14
        assert cost["calls"] == 14 + 14 * 3 * 2 + 2 * sum("adjudicated" in sample for sample in samples)
    else:
        assert cost["calls"] == len(made)
        assert cost["tokens_in"] == sum(generation.tokens_in for generation in made)


@pytest.mark.parametrize("name", RECIPES)
def test_chunks_and_batches_do_not_matter_and_a_second_start_reads(
    lm: LM, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked = {"n": 9, "samples": 2, "temperature": 1.0, "max_new_tokens": 12, "max_overlap": 1.0, "threshold": 1.0}
    files = []
    for size, batch in ((9, None), (2, 3)):
        out = tmp_path / str(size)
        data = synthesize(lm, task, RECIPES[name], out=out, chunk_size=size, batch_size=batch, **asked)
        files.append((out / "records.jsonl").read_bytes())
    assert files[0] == files[1]
    assert len({record["id"] for record in data}) == len(data) == 9
    (out / "card.json").unlink()
    last = sorted((out / "steps").rglob("*.json"))[-1]
    last.unlink()
    with counted(lm, monkeypatch) as made:
        synthesize(lm, task, RECIPES[name], out=out, chunk_size=2, batch_size=3, **asked)
    assert (out / "records.jsonl").read_bytes() == files[1]
    assert 0 < len(made) <= 2 * 5  # the last chunk's one row


def test_critique_rewrites_each_draft_and_the_task_judges_the_rewrite(lm: LM, task: Task) -> None:
    rows = task.rows("train")[:6]
    drafts = rejection(lm, task, rows, SETTINGS)
    for row, before, attempt in zip(rows, drafts, critique(lm, task, rows, SETTINGS), strict=True):
        assert [s["draft"] for s in attempt["samples"]] == [s["text"] for s in before["samples"]]
        assert [s["draft_correct"] for s in attempt["samples"]] == [s["correct"] for s in before["samples"]]
        for sample in attempt["samples"]:
            assert sample["correct"] == task.verify(row, sample["text"]).correct
            assert "by" not in sample
        assert len({sample["critique"] for sample in attempt["samples"]}) == 2
        assert attempt["plain"] == task.messages(row)


def test_review_records_hold_the_verdict_and_the_role_s_own_prompt(task: Task) -> None:
    samples = [
        {"text": "4", "correct": True, "finished": True},
        {"text": "5", "correct": False, "finished": True},
        {"text": "4", "correct": True, "finished": False},
        {"text": "6", "correct": True, "verified": False, "finished": True},  # accepted by reviewers, and wrong
        {"text": "7", "correct": True, "verified": None, "finished": True},
    ]
    role = Role("{question} -> {answer}?", options=("bad", "so-so", "good"))
    records = review_records([{"row_id": "a", "question": "2+2", "samples": samples}], role)
    assert [[m["content"] for m in r["messages"]] for r in records] == [
        ["2+2 -> 4?", "good"], ["2+2 -> 5?", "bad"], ["2+2 -> 6?", "bad"],
    ]  # fmt: skip
    assert len({record["id"] for record in records}) == 3


def test_the_report_counts_what_reviewers_accept() -> None:
    truth = [1, 1, 1, 0, 0, 1, 0, 1]
    grades = [[1, 1], [1, 1], [0, 1], [0, 0], [1, 1], [0, 0], [0, None], [1, 1]]
    attempts = []
    for n, (right, given) in enumerate(zip(truth, grades, strict=True)):
        sample = {"verified": bool(right), "correct": given == [1, 1], "grades": given, "finished": True}
        attempts.append({"row_id": str(n // 2), "samples": [sample | ({"adjudicated": 0} if n == 2 else {})]})
    report = review_report(attempts)
    assert {name: report[name] for name in ("answers", "accepted", "right", "adjudicated")} == {
        "answers": 8, "accepted": 4, "right": 5, "adjudicated": 1,
    }  # fmt: skip
    precision, recall, base, gain, alpha = (report[name] for name in ("precision", "recall", "base", "gain", "alpha"))
    assert isinstance(gain, Interval) and isinstance(alpha, Interval)
    assert (precision.estimate, recall.estimate, base.estimate) == (3 / 4, 3 / 5, 5 / 8)
    assert gain.estimate == 3 / 4 - 5 / 8
    assert gain.low < gain.estimate < gain.high
    assert alpha.estimate == krippendorff(list(zip(*grades, strict=True)), "ordinal")
    nothing = review_report([{"row_id": "a", "samples": [{**attempts[3]["samples"][0]}]}])
    assert "precision" not in nothing and "gain" not in nothing


def test_written_grades_take_the_last_option_that_is_a_word() -> None:
    assert [named(("no", "yes"), text) for text in ("Yes!", "yes, or rather No.", "nothing", "")] == [1, 0, None, None]
    assert named(tuple("012345"), "From 0 to 5 I give it 4.") == 4
    assert not Role().accepts(None)
    assert [Role(options=tuple("12345")).accepts(grade) for grade in range(5)] == [False, False, False, True, True]


def test_a_role_refuses_options_that_cannot_be_told_apart(lm: LM, task: Task) -> None:
    for options in (("yes",), ("1", "10"), ("no", ""), (" no", " yes"), ("no", "no"), ("No", "no")):
        with pytest.raises(ValueError, match="give two or more words"):
            Role(options=options)
    with pytest.raises(ValueError, match="how='spoken' is not known"):
        Role(how="spoken")
    with pytest.raises(ValueError, match="reviewers is empty"):
        reviewed(lm, task, [], SETTINGS, reviewers=())


def test_the_card_names_the_reviewers(lm: LM, task: Task, tmp_path: Path) -> None:
    folder = make_tiny("qwen3", tmp_path / "other")
    other = load_model(folder)
    recipe = partial(reviewed, reviewers=(REVIEWERS[0], Role("{answer}", lm=other)))
    data = synthesize(lm, task, recipe, n=4, out=tmp_path / "out", samples=1, max_new_tokens=8, max_overlap=1.0)
    own = data.card["parameters"]["own"]["reviewers"]
    assert own[0]["prompt"] == REVIEWERS[0].prompt
    assert own[1]["lm"] == {"name": other.name, "revision": other.revision, "dtype": "float32"}
    assert {record["verdict"]["by"] for record in data} == {"reviewers"}


def test_where_no_sandbox_is_reviewers_still_judge_code(lm: LM, tmp_path: Path, monkeypatch) -> None:
    from workbench.sandbox import jail

    file = tmp_path / "code.jsonl"
    rows = [{"question": f"def f{n}():", "answer": "return 1", "entry_point": f"f{n}", "test": "def check(f): f()"}
            for n in range(3)]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = load_task("code", path=file, kind="code", split="train")
    monkeypatch.setattr(jail, "probe", lambda program="bwrap": ("", "no bubblewrap here"))
    for attempt in reviewed(lm, code, code.rows("train"), SETTINGS):
        for sample in attempt["samples"]:
            assert sample["verified"] is None
            assert sample["correct"] in (True, False)
