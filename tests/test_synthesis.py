"""Synthesis: what survives the checker, what is removed and why, and a killed run against an uninterrupted one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.tiny import make_tiny
from workbench.files import sha256
from workbench.lab.families import FAMILIES
from workbench.models import LM, load_model
from workbench.prompts import Strategy
from workbench.synthesis import overlap, synthesize
from workbench.synthesis.recipes import HINT, rejection, star
from workbench.synthesis.records import RecordError, load_data
from workbench.synthesis.sampling import Settings
from workbench.synthesis.selection import ranked, usable
from workbench.tasks import Task, load_task

SUMS = [(a, b) for a in range(10) for b in range(10)]
SAMPLED = {"samples": 4, "temperature": 1.0, "max_new_tokens": 8, "chunk_size": 8, "max_overlap": 1.0}


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    file.write_text("".join(json.dumps({"question": f"{a}+{b}", "answer": str(a + b)}) + "\n" for a, b in SUMS))
    return file


@pytest.fixture(scope="module")
def task(task_file: Path) -> Task:
    return load_task("sums", path=task_file, split="train")


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    """A tiny model that learnt half of the sums: some of its answers are right, some wrong."""
    folder = make_tiny("llama", tmp_path_factory.mktemp("model") / "llama")
    student = load_model(folder)
    prompts = [f"<|user|>{a}+{b}<|end|><|assistant|>\n" for a, b in SUMS]
    pairs = [(p, f"{a + b}<|end|>") for p, (a, b) in zip(prompts, SUMS, strict=True) if a <= 4]
    rows = [student.tokenizer(p + answer, add_special_tokens=False)["input_ids"] for p, answer in pairs]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    labels = ids.masked_fill(ids == 0, -100)
    labels[:, : len(rows[0]) - 2] = -100
    student.model.requires_grad_(True)
    optimizer = torch.optim.Adam(student.model.parameters(), 3e-3)
    with torch.random.fork_rng(devices=[]):
        for _ in range(60):
            optimizer.zero_grad()
            student.model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
    student.model.save_pretrained(folder)
    return load_model(folder)


def test_rejection_keeps_only_what_the_verifier_accepts(lm: LM, task: Task, tmp_path: Path) -> None:
    data = synthesize(lm, task, n=60, out=tmp_path, threshold=1.0, **SAMPLED)
    rows = {str(row["id"]): row for row in task.rows("train")}
    assert len(data) == 60
    assert 10 < len(data.kept) < 60
    for record in data:
        text = record["messages"][-1]["content"]
        assert task.verify(rows[record["row_id"]], text).correct == record["verdict"]["correct"]
        assert not record["kept"] or record["verdict"]["correct"]
        assert (record["reason"] == "verified") == record["kept"]
    counts = data.card["counts"]
    assert counts["kept"] == len(data.kept)
    assert counts["kept"] + sum(counts["rejected"].values()) == counts["questions"] == 60
    assert data.card["cost"]["calls"] == 240
    assert data.card["cost"]["tokens_out"] >= sum(record["tokens_out"] for record in data)
    assert f"60 questions gave {len(data.kept)} records" in (tmp_path / "card.md").read_text()


def test_provenance_is_complete_and_the_question_is_plain(lm: LM, task: Task, tmp_path: Path) -> None:
    strategy = Strategy(name="told", system="Add.")
    data = synthesize(lm, task, n=20, out=tmp_path, strategy=strategy, **SAMPLED)
    names = [
        "id",
        "task",
        "row_id",
        "messages",
        "answer",
        "verdict",
        "recipe",
        "model",
        "decoding",
        "prompt",
        "tokens_in",
        "tokens_out",
        "kept",
        "reason",
        "solve_rate",
    ]
    rows = {str(row["id"]): row for row in task.rows("train")}
    assert len({record["id"] for record in data}) == 20
    for record in data:
        assert list(record) == names
        row = rows[record["row_id"]]
        assert record["messages"][:-1] == [{"role": "user", "content": row["question"]}]
        assert record["prompt"] == f"<|system|>Add.<|end|><|user|>{row['question']}<|end|><|assistant|>\n"
        assert record["model"] == {"name": lm.name, "revision": lm.revision, "dtype": "float32"}
        assert record["decoding"]["strategy"]["system"] == "Add."
        assert record["decoding"]["temperature"] == 1.0
        assert 0 <= record["decoding"]["sample"] < 4
        assert record["tokens_in"] == len(lm.encode(record["prompt"]))
    assert data.card["parameters"]["model"]["revision"] == lm.revision


def test_a_sample_depends_on_its_own_seed_alone(lm: LM, task: Task, tmp_path: Path) -> None:
    files = []
    for size, batch in ((8, None), (3, 2), (20, 1)):
        out = tmp_path / str(size)
        synthesize(lm, task, n=20, out=out, **{**SAMPLED, "chunk_size": size, "batch_size": batch})
        files.append((out / "records.jsonl").read_bytes())
    assert files[0] == files[1] == files[2]
    other = synthesize(lm, task, n=20, seed=1, out=tmp_path / "seed", **SAMPLED)
    assert [r["messages"][-1] for r in other] != [r["messages"][-1] for r in load_data(tmp_path / "8")]


def test_a_recipe_is_a_function(lm: LM, task: Task, tmp_path: Path) -> None:
    row = task.rows("train", n=1)[0]
    settings = Settings(samples=3, temperature=1.0, max_new_tokens=8)
    (attempt,) = rejection(lm, task, [row], settings)
    assert [sample["correct"] for sample in attempt["samples"]] == [
        task.verify(row, sample["text"]).correct for sample in attempt["samples"]
    ]

    def doubled(lm: LM, task: Task, rows: list[dict], settings: Settings) -> list[dict]:
        made = rejection(lm, task, rows, settings)
        return [{**attempt, "samples": attempt["samples"] * 2} for attempt in made]

    data = synthesize(lm, task, doubled, n=5, out=tmp_path, **SAMPLED)
    assert data.records[0]["recipe"] == "doubled"


CHILD = """
import sys
from workbench.models import load_model
from workbench.synthesis import synthesize
from workbench.tasks import load_task
task = load_task("sums", path=sys.argv[2], split="train")
synthesize(load_model(sys.argv[1]), task, n=60, out=sys.argv[3], samples=4, temperature=1.0, max_new_tokens=8,
           chunk_size=2, max_overlap=1.0)
"""


def test_killed_and_resumed_equals_uninterrupted(lm: LM, task: Task, task_file: Path, tmp_path: Path) -> None:
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    command = [sys.executable, "-c", CHILD, lm.name, str(task_file), str(killed)]
    steps = killed / "steps"
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}) as child:
        while not list(steps.glob("*/00003.json")):
            assert child.poll() is None, "the child ended before it could be killed"
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert not (killed / "card.json").exists()
    done = {file: file.stat().st_mtime_ns for file in steps.glob("*/*.json")}
    assert 4 <= len(done) < 30
    next(steps.glob("*/00001.json")).write_text('{"items": [')  # as a disk that filled up would leave it
    for out in (killed, straight):
        synthesize(lm, task, n=60, out=out, **{**SAMPLED, "chunk_size": 2})
    assert (killed / "records.jsonl").read_bytes() == (straight / "records.jsonl").read_bytes()
    kept = {file for file, written in done.items() if file.stat().st_mtime_ns == written}
    assert {file.name for file in done.keys() - kept} == {"00001.json"}
    ids = [record["id"] for record in load_data(killed)]
    assert len(ids) == len(set(ids)) == 60


def test_a_finished_folder_costs_nothing_and_another_selection_no_model_call(
    lm: LM, task: Task, tmp_path: Path
) -> None:
    first = synthesize(lm, task, n=20, out=tmp_path, select="shortest", **SAMPLED)
    card = (tmp_path / "card.json").stat().st_mtime_ns
    chunks = {file: file.stat().st_mtime_ns for file in (tmp_path / "steps").glob("*/*")}
    assert synthesize(lm, task, n=20, out=tmp_path, select="shortest", **SAMPLED) == first
    assert (tmp_path / "card.json").stat().st_mtime_ns == card
    longest = synthesize(lm, task, n=20, out=tmp_path, select="longest", **SAMPLED)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "steps").glob("*/*")} == chunks
    both = [(a, b) for a, b in zip(first, longest, strict=True) if a["kept"] and b["kept"]]
    assert all(a["tokens_out"] <= b["tokens_out"] for a, b in both)
    synthesize(lm, task, n=20, out=tmp_path, **{**SAMPLED, "temperature": 0.5})
    assert synthesize(lm, task, n=20, out=tmp_path, select="longest", **SAMPLED).records == longest.records
    assert {file: file.stat().st_mtime_ns for file in chunks} == chunks, "another temperature overwrote what was there"


def test_an_answer_that_was_cut_off_is_not_kept(lm: LM, task: Task, tmp_path: Path) -> None:
    data = synthesize(lm, task, n=40, out=tmp_path, **{**SAMPLED, "max_new_tokens": 1})
    assert not data.kept
    assert "cut off at max_new_tokens" in data.card["counts"]["rejected"]


def test_oracle_uses_worked_solutions_and_verifies_them(lm: LM, tmp_path: Path) -> None:
    task = load_task("word-problems")
    data = synthesize(lm, task, "oracle", n=30, out=tmp_path / "a", style="long")
    rows = {str(row["id"]): row for row in task.rows("train", n=30)}
    assert len(data.kept) == 30
    assert all(r["messages"][-1]["content"] == rows[r["row_id"]]["solutions"]["long"] for r in data)
    assert data.card["cost"]["calls"] == 0
    with pytest.raises(ValueError, match="no worked solution in style 'rhyme'; its styles are: direct, steps, long"):
        synthesize(lm, task, "oracle", n=3, out=tmp_path / "b", style="rhyme")


def test_parquet_holds_the_same_records(lm: LM, tmp_path: Path) -> None:
    task = load_task("gcd")
    lines = synthesize(lm, task, "oracle", n=12, out=tmp_path / "a")
    table = synthesize(lm, task, "oracle", n=12, out=tmp_path / "b", file_format="parquet")
    assert (tmp_path / "b" / "records.parquet").exists()
    assert table.records == lines.records


def solved(tmp_path: Path, name: str, questions: list[str], split: str) -> Task:
    """A task from a file, with a worked solution for every question."""
    file = tmp_path / f"{name}.jsonl"
    rows = [{"question": q, "answer": str(len(q)), "solution": f"The answer is {len(q)}."} for q in questions]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_task(name, path=file, split=split)


TEST_QUESTION = (
    "A baker in Lyon fills 14 trays with 23 rolls each and gives 35 of the rolls to a school. How many rolls are left?"
)
OTHERS = [f"On day {i} the museum of {name} sold {7 * i} tickets; how many?" for i, name in enumerate("abcdefghij", 3)]


@pytest.mark.parametrize(
    "planted",
    [
        TEST_QUESTION.upper().replace(";", ","),
        f"Here is a riddle for you. {TEST_QUESTION} Think well.",
        "A baker in Lyon fills 14 trays with 23 rolls each and gives 35 away. How many are sold?",
    ],
    ids=["shouted", "wrapped", "shared beginning"],
)
def test_a_planted_test_question_is_refused_or_dropped(lm: LM, tmp_path: Path, planted: str) -> None:
    evaluation = solved(tmp_path, "exam", [TEST_QUESTION, "What is 3 + 4?", "Name a prime above 90."], "test")
    task = solved(tmp_path, "drill", [*OTHERS, planted], "train")
    with pytest.raises(ValueError, match=r"1 of 11 verified records \(9.1%\) overlap .* at most 5.0% may"):
        synthesize(lm, task, "oracle", n=11, out=tmp_path / "a", evaluation=evaluation)
    assert not (tmp_path / "a" / "records.jsonl").exists()
    data = synthesize(lm, task, "oracle", n=11, out=tmp_path / "a", evaluation=evaluation, max_overlap=0.1)
    (dropped,) = [record for record in data if not record["kept"]]
    assert dropped["messages"][0]["content"] == planted
    assert data.card["counts"]["rejected"] == {"overlap with evaluation": 1}
    assert data.card["overlap"]["evaluation_questions"] == 3


def test_a_template_with_other_numbers_is_no_overlap() -> None:
    template = "Tom has {} apples and buys {} more at the market near the river. How many apples does Tom have now?"
    test = {str(i): template.format(i, i + 1) for i in range(50)}
    assert overlap.contamination([template.format(i, 90 - i) for i in range(60, 90)], test) == [None] * 30
    assert overlap.contamination([template.format(3, 4).lower()], test) == [
        "the whole question is evaluation question 3"
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_lab_questions_do_not_overlap_with_the_test_split(family: str) -> None:
    task = load_task(family)
    test = {row["id"]: row["question"] for row in task.rows("test", n=100)}
    fresh = [row["question"] for row in task.rows("train", n=200)]
    assert sum(reason is not None for reason in overlap.contamination(fresh, test)) <= 2
    assert all(overlap.contamination(list(test.values()), test))


def test_near_duplicates_are_removed_and_siblings_of_a_template_stay(lm: LM, tmp_path: Path) -> None:
    long = (
        "The ship sails at noon from the old harbour with 40 sailors, 12 goats and 7 sacks of rice on board. In the "
        "evening {} goats fall ill and the cook counts what is left of the rice. How many {} are well?"
    )
    questions = [*OTHERS, long.format("three", "of them all"), long.format("three", "of my goats")]
    data = synthesize(lm, solved(tmp_path, "drill", questions, "train"), "oracle", n=12, out=tmp_path / "a")
    asked = [record["messages"][0]["content"] for record in data]
    pair = [record for record, question in zip(data, asked, strict=True) if question in questions[-2:]]
    assert [record["kept"] for record in pair] == [True, False]
    assert pair[1]["reason"] == f"repeats record {pair[0]['id']}"
    assert len(data.kept) == 11


def test_near_duplicates_agree_with_comparing_every_pair() -> None:
    """The inverted index must find what the plain definition finds."""
    import math
    import random
    from collections import Counter

    words = random.Random(0)
    texts = [" ".join(words.choice("abcdefgh") for _ in range(12)) for _ in range(40)]
    texts += [text.replace("a", "b", 1) for text in texts[:20]] + texts[:5]
    shingles = [overlap.runs(overlap.tokens(text), 3) for text in texts]
    firsts = {overlap.tokens(text): i for i, text in reversed(list(enumerate(texts)))}
    count = Counter(s for i in firsts.values() for s in shingles[i])
    weight = {s: math.log((len(firsts) + 1) / n) for s, n in count.items()}
    kept: list[int] = []
    expected: list[int | None] = []
    for i in range(len(texts)):
        near = None
        for j in kept:
            both, either = (
                sum(weight[s] for s in group) for group in (shingles[i] & shingles[j], shingles[i] | shingles[j])
            )
            if texts[i] == texts[j] or both >= 0.4 * either:
                near = j
                break
        expected.append(near)
        if near is None:
            kept.append(i)
    assert overlap.near_duplicates(texts, 0.4) == expected
    assert any(near is not None for near in expected[40:60])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"recipe": "magic"}, "recipe='magic' is not known. Choose one of oracle, rejection, star, student_paced"),
        ({"select": "best"}, "select='best' is not known. Choose one of shortest, longest, diverse, random, first"),
        ({"file_format": "csv"}, "jsonl, parquet"),
        ({"temperature": 0}, "samples=4 with temperature=0 gives 4 equal answers"),
        ({"n": 0}, "n=0 is too small"),
        ({"max_overlap": 2}, "max_overlap=2 is no share"),
        ({"threshold": 0}, "threshold=0 is no similarity"),
        ({"negatives": -1}, "negatives=-1 is too small"),
        ({"tempreature": 1}, "unknown setting tempreature. Settings are: samples, temperature"),
    ],
)
def test_wrong_settings_are_refused_before_any_work(
    lm: LM, task: Task, tmp_path: Path, wrong: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        synthesize(lm, task, **{"n": 4, "out": tmp_path / "a", **wrong})
    assert not (tmp_path / "a").exists()


def test_an_edited_records_file_is_noticed(lm: LM, tmp_path: Path) -> None:
    data = synthesize(lm, load_task("gcd"), "oracle", n=4, out=tmp_path)
    assert sha256(tmp_path / "records.jsonl") == data.card["records"]["sha256"]
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(RecordError, match=r"is not the file that .*card.json describes"):
        load_data(tmp_path)


def test_diverse_prefers_an_unseen_answer(lm: LM, tmp_path: Path) -> None:
    task = solved(tmp_path, "drill", ["How many?", "How much?"], "train")
    texts = ["We count: one, two. The answer is {}.", "Adding up gives it. The answer is {}."]

    def canned(lm: LM, task: Task, rows: list[dict], settings: Settings) -> list[dict]:
        def sample(text: str) -> dict:
            return {"text": text, "correct": True, "extracted": "1", "tokens_in": 1, "tokens_out": 9, "finished": True}

        return [
            {
                "row_id": str(row["id"]), "question": row["question"], "answer": row["answer"], "prompt": "",
                "plain": task.messages(row), "samples": [sample(text.format(row["answer"])) for text in texts],
            }
            for row in rows
        ]  # fmt: skip

    answers = {}
    for select in ("first", "diverse"):
        data = synthesize(lm, task, canned, n=2, out=tmp_path / select, select=select)
        answers[select] = [record["messages"][-1]["content"][:9] for record in data]
    assert answers == {"first": ["We count:"] * 2, "diverse": ["We count:", "Adding up"]}


def test_star_tries_failed_questions_again_with_the_answer_given_away(lm: LM, task: Task, tmp_path: Path) -> None:
    plain = synthesize(lm, task, n=60, out=tmp_path / "plain", threshold=1.0, **SAMPLED)
    data = synthesize(lm, task, "star", n=60, out=tmp_path / "star", threshold=1.0, **SAMPLED)
    rows, failed = {str(row["id"]): row for row in task.rows("train")}, 0
    for before, record in zip(plain, data, strict=True):
        assert record["messages"][:-1] == before["messages"][:-1]  # what is learnt from shows no hint
        if before["kept"]:
            assert record == before | {"recipe": "star"}
            continue
        failed += 1
        if record["kept"]:
            answer = rows[record["row_id"]]["answer"]
            assert record["decoding"]["hinted"] and record["decoding"]["sample"] >= 4
            assert record["prompt"] == lm.render(
                [{"role": "user", "content": f"{rows[record['row_id']]['question']}\n{HINT.format(answer=answer)}"}]
            )
            assert record["verdict"]["correct"]
    assert data.card["cost"]["calls"] == 240 + 4 * failed
    assert len(data.kept) >= len(plain.kept)
    again = synthesize(lm, task, "star", n=60, out=tmp_path / "chunks", threshold=1.0, **(SAMPLED | {"chunk_size": 7}))
    assert [record["messages"] for record in again] == [record["messages"] for record in data]


def test_a_hinted_chain_is_used_and_a_repeated_hint_is_not(task: Task) -> None:
    class Told:
        """Knows nothing; makes an equation of an answer that it is told, or repeats it where it begins with 1."""

        def render(self, turns: list[dict[str, str]]) -> str:
            return turns[-1]["content"]

        def generate(self, prompts: list[str], **options: object) -> list[SimpleNamespace]:
            told = [prompt.partition("The answer is ")[2].partition(".")[0] for prompt in prompts]
            said = [text if text.startswith("1") or not text else f"{text}+0={text}. {text}" for text in told]
            return [SimpleNamespace(text=text or "?", tokens_in=3, tokens_out=1, finished=True) for text in said]

    rows = task.rows("train")[:30]
    before = rejection(Told(), task, rows, Settings())
    assert not any(usable(sample) for attempt in before for sample in attempt["samples"])
    echoes = [row["answer"].startswith("1") for row in rows]
    assert 0 < sum(echoes) < 30
    attempts = star(Told(), task, rows, Settings(samples=2))
    for attempt, row, echo in zip(attempts, rows, echoes, strict=True):
        assert [sample["correct"] for sample in attempt["samples"]] == [False, False, True, True]
        assert [usable(sample) for sample in attempt["samples"]] == [False, False, not echo, not echo]
        assert attempt["plain"] == task.messages(row)
        assert (attempt["prompt"] == row["question"]) == echo  # of the sample that a record shows
    kept = [bool(found) for found in ranked(attempts, "shortest")]
    assert kept == [not echo for echo in echoes]


def test_random_selection_is_drawn_row_by_row() -> None:
    samples = [{"text": f"{n}", "correct": n < 6, "finished": n != 5, "tokens_out": n} for n in range(8)]
    attempts = [{"row_id": str(row), "samples": samples} for row in range(300)]
    found = [good[0]["text"] for good in ranked(attempts, "random", 1)]
    assert {text: found.count(text) > 30 for text in "01234"} == dict.fromkeys("01234", True)
    assert set(found) == set("01234")  # verified and complete ones only
    assert [good[0]["text"] for good in ranked(attempts[100:], "random", 1)] == found[100:]
    assert found != [good[0]["text"] for good in ranked(attempts, "random", 2)]


def test_minhash_finds_what_exact_jaccard_finds() -> None:
    """Against all pairs compared one by one, on texts with repeats at every similarity."""
    from random import Random

    rng = Random(0)
    words = [f"w{number}" for number in range(400)]
    texts = [" ".join(rng.choices(words, k=40)) for _ in range(60)]
    for number in range(60):
        changed = texts[number].split()
        for _ in range(rng.randint(0, 12)):
            changed[rng.randrange(40)] = rng.choice(words)
        texts.append(" ".join(changed))
    sets = [overlap.runs(overlap.tokens(text), 3) for text in texts]
    for threshold in (0.5, 0.8):
        expected: list[int | None] = []
        for index, own in enumerate(sets):
            similar = (
                j for j in range(index) if expected[j] is None and len(own & sets[j]) / len(own | sets[j]) >= threshold
            )
            expected.append(next(similar, None))
        assert overlap.minhash_duplicates(texts, threshold) == expected
        assert sum(found is not None for found in expected) > 5
    with pytest.raises(ValueError, match="threshold=0 is no similarity"):
        overlap.minhash_duplicates(texts, 0)


def test_a_deleted_records_file_is_made_again(lm: LM, tmp_path: Path) -> None:
    data = synthesize(lm, load_task("gcd"), "oracle", n=4, out=tmp_path)
    (tmp_path / "records.jsonl").unlink()
    assert synthesize(lm, load_task("gcd"), "oracle", n=4, out=tmp_path).records == data.records


def test_an_empty_answer_is_a_record_that_can_be_read_back(lm: LM, task: Task, tmp_path: Path) -> None:
    def silent(lm: LM, task: Task, rows: list[dict], settings: Settings) -> list[dict]:
        made = rejection(lm, task, rows, settings)
        return [{**a, "samples": [{**s, "text": "", "correct": False} for s in a["samples"]]} for a in made]

    data = synthesize(lm, task, silent, n=5, out=tmp_path, negatives=1, **SAMPLED)
    assert data.card["counts"]["rejected"] == {"no verified answer": 5}
    assert len(data) == 5


def test_the_oracle_counts_tokens_as_sampling_does(lab: LM, word_problems: Task, tmp_path: Path) -> None:
    from workbench.finetuning.packing import encode

    for record in synthesize(lab, word_problems, "oracle", n=3, out=tmp_path):
        learnt = sum(label != -100 for label in encode(lab, record, "here").labels)
        assert record["tokens_out"] == learnt


def test_what_the_answers_depend_on_is_not_mixed_up_in_one_folder(lm: LM, lab: LM, tmp_path: Path) -> None:
    """Precision, interventions in force, gold answers, test questions and the kind of judging: each makes it anew."""
    from workbench.interventions import Residual

    words, out = load_task("word-problems"), tmp_path / "a"
    settings = {"n": 3, "samples": 1, "max_new_tokens": 24, "max_overlap": 1.0, "threshold": 1.0}
    models = {"plain": synthesize(lab, words, out=out, **settings).card["parameters"]["model"]}
    four = load_model("lab", quantization="nf4")
    models["nf4"] = synthesize(four, words, out=out, **settings).card["parameters"]["model"]
    push = Residual({3: 3 * torch.ones(lab.d_model)}, "all")
    with lab.apply(push):
        steered = synthesize(lab, words, out=out, **settings)
    models["steered"] = steered.card["parameters"]["model"]
    assert len({json.dumps(model) for model in models.values()}) == 3
    with lab.apply(push):
        assert steered.records == synthesize(lab, words, out=tmp_path / "b", **settings).records
    assert synthesize(lab, words, out=out, **settings).records != steered.records

    def sums(more: int, kind: str | None = None) -> Task:
        file = tmp_path / "sums.jsonl"
        rows = [{"question": f"{n}+1", "answer": f"{n + more}", "solution": f"Well {n + more} it is"} for n in range(4)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_task("sums", path=file, split="train", kind=kind)

    made = [
        synthesize(lm, each, "oracle", n=4, out=tmp_path / "c", threshold=1.0, max_overlap=1.0)
        for each in (sums(1), sums(1, "text"), sums(2))
    ]
    assert [data.card["parameters"]["kind"] for data in made] == ["number", "text", "number"]
    assert made[2].records[0]["answer"] != made[0].records[0]["answer"]
    exams = [solved(tmp_path, "exam", questions, "test") for questions in (["7?"], ["7?", "2+1"])]
    kept = [
        len(
            synthesize(
                lm, sums(1), "oracle", n=4, out=tmp_path / "d", threshold=1.0, max_overlap=1.0, evaluation=e
            ).kept
        )
        for e in exams
    ]
    assert kept == [4, 3]
