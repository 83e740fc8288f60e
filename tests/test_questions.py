"""Made questions: their template, their checks on real strings, what is kept against the rule, costs, chunks."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.tiny import make_tiny
from workbench.generate import Generation
from workbench.lab.families import generate
from workbench.models import LM, load_model
from workbench.prompts import few_shot
from workbench.synthesis import synthesize
from workbench.synthesis.corpus import located, parsed, passages
from workbench.synthesis.questions import (
    Draft,
    evolve,
    from_corpus,
    magpie,
    majority,
    not_among,
    self_instruct,
    user_prefix,
)
from workbench.synthesis.records import NEGATIVE
from workbench.synthesis.roles import Role
from workbench.synthesis.sampling import Settings
from workbench.tasks import Task

SETTINGS = Settings(samples=3, temperature=0.8, max_new_tokens=100, strategy=few_shot("steps", 2))
STORY = (
    "Ana came first. She had 3 apples,\nall of them red.\n\n"
    "Ben came second: he had nothing.\r\n \r\n\nZoë left. Über.\n"
)
SAMPLED = {
    "n": 4, "samples": 2, "temperature": 0.8, "max_new_tokens": 100, "max_overlap": 1.0, "threshold": 1.0,
    "strategy": few_shot("steps", 2),
}  # fmt: skip
DOES = {
    r"(?:She|He|\w+) (?:buys|finds|brings) (\d+) more\.": lambda v, n: v + n,
    r"(?:She|He) (?:loses|sells) (\d+)\.|(?:She|He) gives (\d+) to \w+\.": lambda v, n: v - n,
    r"(?:She|He) gives half to \w+\.": lambda v, n: v / 2,
    r"The number doubles\.": lambda v, n: v * 2,
    r"The number triples\.": lambda v, n: v * 3,
}


def solved(question: str) -> int | None:
    """The answer of a word problem by its sentences; None where one is not of the lab's, or the numbers fail."""
    found = re.fullmatch(r"(\w+) has (\d+) (\w+)\. ((?:[A-Z][^.]*\. )*)How many (\w+) does (\w+) have now\?", question)
    if not found or (found[1], found[3]) != (found[6], found[5]):
        return None
    value: float = int(found[2])
    for sentence in re.findall(r"[A-Z][^.]*\.", found[4]):
        rule = next((rule for rule in DOES if re.fullmatch(rule, sentence)), None)
        if rule is None:
            return None
        number = re.search(r"\d+", sentence)
        value = DOES[rule](value, int(number[0]) if number else 0)
        if value < 0 or value != int(value):
            return None
    return int(value)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Generation]]:
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


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "story.txt"
    file.write_bytes(STORY.encode())
    return file


@pytest.fixture(scope="module")
def recipes(story: Path) -> dict[str, partial]:
    return {
        "magpie": partial(magpie),
        "self_instruct": partial(self_instruct),
        "list": partial(self_instruct, show="list"),
        "evolve": partial(evolve),
        "from_corpus": partial(from_corpus, corpus=story),
    }


NAMES = ("magpie", "self_instruct", "list", "evolve", "from_corpus")


def test_the_oracle_solves_the_lab_s_word_problems() -> None:
    for index in range(200):
        item = generate("word-problems", 5, index)
        assert solved(item["question"]) == int(item["answer"])
    assert solved("Ana has 3 cats. She gives half to Bo. How many cats does Ana have now?") is None


def test_the_users_place_is_read_from_the_template(lab: LM, tmp_path: Path) -> None:
    assert user_prefix(lab) == ("<|user|>", ())
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    start, _ = user_prefix(lab, turns)
    assert lab.render([*turns, {"role": "user", "content": "3+3?"}]).startswith(start + "3+3?")
    other = load_model(make_tiny("llama", tmp_path / "m"))
    bracketed = "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
    for template, expected in (
        (bracketed, ("[INST] ", ("[/INST]",))),
        ("{{ 'You help.' }}" + bracketed + "{{ '<|end|>' }}", ("You help.[INST] ", ("[/INST]",))),
        (None, ("Question: ", ("Answer:",))),
    ):
        other.tokenizer.chat_template = template
        assert user_prefix(other) == expected
    other.tokenizer.chat_template = "no words of the user"
    with pytest.raises(ValueError, match=r"shows the user's words 0 times.*prefix="):
        user_prefix(other)


def test_magpie_keeps_the_majority_and_nothing_else(lab: LM, word_problems: Task) -> None:
    rows = word_problems.rows("train", n=12)
    attempts = magpie(lab, word_problems, rows, SETTINGS, agree=0.6)
    read = []
    for row, attempt in zip(rows, attempts, strict=True):
        said = [sample["extracted"] for sample in attempt["samples"]]
        best = majority(said, 0.6)
        assert [sample["correct"] for sample in attempt["samples"]] == [best is not None and s == best for s in said]
        assert attempt["row_id"] == f"{row['id']}/magpie"
        assert attempt["answer"] == (best or "")
        assert ("dropped" in attempt) == (best is None)
        assert {sample["by"] for sample in attempt["samples"]} == {"agreement"}
        if best is not None and (truth := solved(attempt["question"])) is not None:
            read.append(str(truth) == best)
    assert len(read) >= 3
    assert sum(read) >= 2  # most of what the model agrees with itself on is true


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_the_calls_really_made(
    lab: LM, word_problems: Task, recipes: dict[str, partial], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with counted(monkeypatch) as made:
        attempts = recipes[name](lab, word_problems, word_problems.rows("train", n=4), SETTINGS)
    cost = {key: sum(attempt["cost"][key] for attempt in attempts) for key in ("calls", "tokens_in", "tokens_out")}
    assert cost == {
        "calls": len(made),
        "tokens_in": sum(g.tokens_in for g in made),
        "tokens_out": sum(g.tokens_out for g in made),
    }
    assert len({attempt["row_id"] for attempt in attempts}) == len(attempts) == (12 if name == "from_corpus" else 4)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_and_batches_do_not_matter(
    lab: LM, word_problems: Task, recipes: dict[str, partial], tmp_path: Path, name: str
) -> None:
    files = []
    for size, batch in ((4, None), (1, 2)):
        out = tmp_path / str(size)
        data = synthesize(lab, word_problems, recipes[name], out=out, chunk_size=size, batch_size=batch, **SAMPLED)
        files.append((out / "records.jsonl").read_bytes())
    assert files[0] == files[1]
    counts = data.card["counts"]
    assert counts["kept"] + sum(counts["rejected"].values()) == len(data) == (8 if name == "from_corpus" else 4)
    for record in data.kept:
        assert record["verdict"]["by"] == "agreement"
        assert record["verdict"]["extracted"] == record["answer"]


def test_why_a_question_was_dropped_is_counted(lab: LM, word_problems: Task, tmp_path: Path) -> None:
    short = synthesize(lab, word_problems, magpie, out=tmp_path / "a", negatives=2, **(SAMPLED | {"max_new_tokens": 4}))
    assert short.card["counts"]["rejected"] == {"unfinished question": 4}
    assert not short.negatives
    ended = synthesize(
        lab, word_problems, partial(magpie, prefix="<|user|>2+3=5<|end|>"), out=tmp_path / "b", **SAMPLED
    )
    assert set(ended.card["counts"]["rejected"]) <= {"empty question", "no agreement between answers"}
    unsure = synthesize(
        lab, word_problems, partial(magpie, agree=1.0), out=tmp_path / "c", negatives=2, **SAMPLED
    )  # fmt: skip
    assert all(r["verdict"]["by"] == "agreement" for r in unsure)
    assert not any(r["reason"] == NEGATIVE for r in unsure)  # all agree, or nobody knows who is wrong


def test_self_instruct_shows_other_seeds_to_other_rows_and_drops_their_repeats(lab: LM, word_problems: Task) -> None:
    rows = word_problems.rows("train", n=5)
    settings = Settings(samples=1, max_new_tokens=100, strategy=few_shot("steps", 2))
    together = self_instruct(lab, word_problems, rows, settings)
    alone = [self_instruct(lab, word_problems, [row], settings)[0] for row in rows]
    assert together == alone
    assert len({attempt["question"] for attempt in together}) > 1
    with pytest.raises(ValueError, match="show='table' is not known"):
        self_instruct(lab, word_problems, rows, settings, show="table")


def test_evolve_keeps_changed_questions_only_and_says_by_which_operator(lab: LM, word_problems: Task) -> None:
    rows = word_problems.rows("train", n=8)
    settings = Settings(samples=1, max_new_tokens=60, strategy=few_shot("steps", 2))
    attempts = evolve(lab, word_problems, rows, settings, operators={"a": "Longer.", "b": "Shorter."})
    assert {attempt["source"]["operator"] for attempt in attempts} == {"a", "b"}
    assert [attempt["source"]["from"] for attempt in attempts] == [row["id"] for row in rows]
    with pytest.raises(ValueError, match="operators is empty"):
        evolve(lab, word_problems, rows, settings, operators={})


def test_a_known_question_is_dropped_whatever_its_case_and_spaces() -> None:
    draft = Draft({"id": "a", "question": "What is  2 + 2 ?"}, {})
    assert not_among(["What is 2 + 3?", "what is 2+2?"], draft, "repeats").dropped == "repeats"
    assert not_among(["What is 2 + 3?"], draft, "repeats").dropped is None
    assert not_among(["what is 2+2?"], replace(draft, dropped="first reason"), "repeats").dropped == "first reason"


def test_passages_are_the_file_s_own_characters(story: Path) -> None:
    text = story.read_bytes().decode()
    found = passages(story)
    assert [passage.text[:8] for passage in found] == ["Ana came", "Ben came", "Zoë left"]
    for longest in (1200, 40, 20, 7, 1):
        found = passages(story, longest)
        assert [passage.number for passage in found] == list(range(len(found)))
        for passage in found:
            assert text[passage.start : passage.start + len(passage.text)] == passage.text
            assert 0 < len(passage.text) <= longest
            assert passage.text == passage.text.strip()
        assert "".join("".join(p.text.split()) for p in found) == "".join(text.split())
    assert passages(story, 30)[0].text == "Ana came first."  # the sentence's end, and not the last word that fits


def test_broken_files_are_told_by_line(tmp_path: Path) -> None:
    bad = tmp_path / "latin.txt"
    bad.write_bytes("fine\ncafé\n\nfine\nnaïve\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"line 2 \(byte 0xe9 after 3 bytes\), line 5 .*iconv -f latin1"):
        passages(bad)
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match="holds no text"):
        passages(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="is no file"):
        passages(tmp_path / "none.txt")
    marked = tmp_path / "bom.txt"
    marked.write_bytes(b"\xef\xbb\xbfOne two three.")
    assert passages(marked)[0].text == "One two three."


def test_three_labelled_parts_are_read_and_others_refused() -> None:
    good = "Question: Who was first?\nAnswer: Ana.\nQuote: “Ana came first.”"
    assert parsed(good) == {"question": "Who was first?", "answer": "Ana.", "quote": "Ana came first."}
    assert parsed(f"Sure!\n\n**{good}**") is not None
    assert parsed(good.lower()) is not None
    for bad in ("", "Question: Who?\nAnswer: Ana.", "Question:\nAnswer:\nQuote:", good.replace("Quote: ", "Source: "),
                "Quote: a b c\nAnswer: d\nQuestion: e"):  # fmt: skip
        assert parsed(bad) is None


def test_a_quote_is_found_word_for_word_or_not_at_all() -> None:
    text = passages_text = "She had 3 apples,\nall of them red. (Really?) She had 3 apples."
    for quote in ("had 3 apples, all of", "them red. (Really?)", "She had 3 apples."):
        start, end = located(text, quote)
        assert passages_text[start:end].split() == quote.split()
    for quote in (
        "had 3 apples all",
        "She had 4 apples",
        "she had 3 apples,",
        "had 3 appl",
        "3 apples",
        "",
        "d 3 apples,",
    ):
        assert located(text, quote) is None


def test_from_corpus_keeps_only_quotes_that_are_there(
    lab: LM, word_problems: Task, story: Path, tmp_path: Path
) -> None:
    parrot = Role("Question: Who was first?\nAnswer: Ana\nQuote: Ana came first.\n{passage}")
    attempts = from_corpus(lab, word_problems, word_problems.rows("train", n=4), SETTINGS, corpus=story, writer=parrot)
    text = story.read_bytes().decode()
    for attempt in attempts:
        (sample,) = attempt["samples"]
        assert sample["correct"] == ("dropped" not in attempt)
        assert attempt["source"]["file"] == "story.txt"
        if sample["correct"]:
            start, end = attempt["source"]["span"]
            assert text[start:end].split() == attempt["source"]["quote"].split()
    data = synthesize(lab, word_problems, partial(from_corpus, corpus=story), out=tmp_path / "a", **SAMPLED)
    assert data.card["parameters"]["own"]["corpus"]["file"] == "story.txt"
    assert data.card["counts"]["rejected"] == {"no question, answer and quote": 8}  # the lab model can't read
    assert {record["source"]["passage"] for record in data} <= {0, 1, 2}


def test_a_wrong_share_is_told_before_any_work(lab: LM, word_problems: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    for recipe in (magpie, self_instruct, evolve):
        for agree in (0, 1.5):
            with counted(monkeypatch) as made, pytest.raises(ValueError, match=r"agree=.* is no share"):
                recipe(lab, word_problems, word_problems.rows("train", n=1), SETTINGS, agree=agree)
            assert not made


def test_the_majority_needs_its_share_of_all_samples() -> None:
    assert majority(["7"] * 3 + [None] * 3, 0.5) == "7"
    assert majority(["7"] * 3 + [None] * 3, 0.6) is None
    assert majority([], 0.5) is None


def test_a_record_of_a_corpus_counts_its_answer_and_not_what_was_written_around_it(
    lab: LM, word_problems: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story = tmp_path / "story.txt"
    story.write_text("Ana came first.")
    said = Generation("Question: Who came?\nAnswer: Ana\nQuote: Ana came first.", [1], 3, 40, 0.0, True, 1)
    monkeypatch.setattr(LM, "generate", lambda self, prompts, *a, **k: [said for _ in prompts])
    rows, settings = word_problems.rows("train", n=6), Settings(samples=1)
    good = [a for a in from_corpus(lab, word_problems, rows, settings, corpus=story) if "dropped" not in a]
    assert good
    assert {attempt["samples"][0]["tokens_out"] for attempt in good} == {len(lab.encode("Ana")) + 1}
    assert {attempt["cost"]["tokens_out"] for attempt in good} == {40}
