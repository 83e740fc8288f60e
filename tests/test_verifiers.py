"""Verifiers against labels that others made, against gold answers, and against texts that tempt a loose rule."""

import gzip
import json
import os
import threading
from pathlib import Path

import pytest

from workbench.tasks import latex
from workbench.tasks.answers import final_text
from workbench.tasks.verifiers import extract, verify, verify_many

DATA = os.environ.get("WORKBENCH_DATA")
needs_data = pytest.mark.skipif(not DATA, reason="WORKBENCH_DATA names no folder with benchmark files")
TOWER = "9^{9^{9^{9^{9}}}}"  # SymPy tries to write it out: it really hangs


def lines(*path: str) -> list[dict]:
    file = Path(DATA or "", *path)
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in data.decode().split("\n") if line.strip()]


@needs_data
def test_gsm8k_labels_of_its_authors():
    rows = lines("gsm8k", "example_model_solutions.jsonl.gz")
    golds = [row["answer"].rpartition("#### ")[2] for row in lines("gsm8k", "test.jsonl")]
    counts = {}
    for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
        verdicts = verify_many("number", golds, [row[model]["solution"] for row in rows])
        assert [verdict.correct for verdict in verdicts] == [row[model]["is_correct"] for row in rows]
        counts[model] = sum(verdict.correct for verdict in verdicts)
    assert list(counts.values()) == [286, 515, 458, 742]


@needs_data
def test_gsm8k_reference_solutions_are_right():
    rows = lines("gsm8k", "test.jsonl")
    assert all(verify("number", row["answer"].rpartition("#### ")[2], row["answer"]).correct for row in rows)


@needs_data
def test_math500_gold_answers_and_solutions():
    rows = lines("math500", "test.jsonl")
    golds = [row["answer"] for row in rows]
    for wrapped in (r"Therefore $\boxed{%s}$.", "The answer is $%s$.", "The answer is %s."):
        assert all(verdict.correct for verdict in verify_many("latex", golds, [wrapped % gold for gold in golds]))
    assert sum(verdict.correct for verdict in verify_many("latex", golds, [row["solution"] for row in rows])) >= 499
    shifted = verify_many("latex", golds[:120], [rf"\boxed{{{gold}}}" for gold in golds[1:121]])
    assert sum(verdict.correct for verdict in shifted) <= 2  # two neighbours happen to have the same answer


@needs_data
def test_math_verify_itself_accepts_every_gold_answer():
    worker = latex._worker()
    golds = [row["answer"] for row in lines("math500", "test.jsonl")[:150]]
    assert all(worker.ask({"gold": gold, "given": gold}, latex.LIMIT) for gold in golds)


@needs_data
def test_aqua_rationales():
    rows = lines("aqua", "test.json") + lines("aqua", "dev.json")
    verdicts = verify_many("option", [row["correct"] for row in rows], [row["rationale"] for row in rows])
    wrong = sum(not verdict.correct and not verdict.unparsed for verdict in verdicts)
    assert sum(verdict.correct for verdict in verdicts) >= 0.9 * len(rows)
    assert wrong <= 1  # one rationale ends in another letter than its label


@needs_data
def test_bbh_chain_of_thought_prompts_are_read():
    for file in sorted(Path(DATA or "", "bbh", "cot-prompts").glob("*.txt")):
        targets = json.loads(Path(DATA or "", "bbh", "bbh", f"{file.stem}.json").read_text())["examples"]
        kind = "option" if targets[0]["target"].startswith("(") else "text"
        for shot in file.read_text().split("\nA: ")[1:]:
            gold = shot.partition("So the answer is ")[2].partition("\n")[0].removesuffix(".")
            assert verify(kind, gold, shot).correct, (file.stem, shot[-200:])


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 61.", "61"),
        ("La respuesta es 61.", "61"),
        ("La respuesta final es: 61", "61"),
        ("It costs $1,234.50 in total.", "1234.5"),
        ("**Answer:**\n\n61 apples", "61"),
        ("The answer is:\n$$\n61\n$$", "61"),
        (r"The answer is $\frac{3}{4}$.", "3/4"),
        (r"so \boxed{-3.50}", "-3.5"),
        (r"\boxed{1{,}234} eggs", "1234"),
        ("### Final Answer\n61\nThat is 5 more.", "61"),
        ("<answer>61</answer> and 7", "61"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("the answer is 3 + 4 = 7.", "7"),
        ("the answer is 18 dollars (= 1800 cents).", "18"),
        ("The answer is 5. I hope this answer is helpful!", "5"),
        ("The answer is 4. Wait, no. The answer is 5.", "5"),
        ("### Plan\n#### Step 2: add 3\nso 8", "8"),
        ("10 - 5", "5"),
        ("about 50%", "50"),
        ("1 1/2 cups", "3/2"),
        ("The answer is 2.5 × 10^3.", "2500"),
        ("3" * 5000, "3" * 5000),
        ("I don't know.", None),
        ("Tom has 12. The answer is unclear.", None),
        ("", None),
        (r"\boxed{}", None),
    ],
)
def test_numbers(text, answer):
    assert extract("number", text) == answer


@pytest.mark.parametrize(
    ("gold", "text", "correct"),
    [
        ("18", "18.00", True),
        ("1/3", "0.3333333333333333", True),
        ("0.5", "1/2", True),
        ("1000000000000", "1000000000001", False),
        ("-4", "4", False),
        ("5", "5/0", True),
        ("3", "3" * 5000, False),
    ],
)
def test_numbers_are_compared_as_numbers(gold, text, correct):
    assert verify("number", gold, text).correct is correct


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(A)", "A"),
        ("B", "B"),
        ("B.", "B"),
        ("D) 20", "D"),
        ("The answer is (b).", "B"),
        ("The correct option is C because of that.", "C"),
        (r"\boxed{\text{(D)}}", "D"),
        ("**E**", "E"),
        ("(A) is wrong.\nSo the answer is (B).", "B"),
        ("correct answer B", "B"),
        ("I think so.", None),
        ("A car goes fast", None),
        ("The answer is A car.", None),
        ("The answer is A or B.", None),
        ("(A) 1\n(B) 2\n(C) 3", None),
        ("A) 1\nB) 2\nE) 10", None),
        ("So the answer is not known.", None),
        ("X = 12", None),
        ("", None),
    ],
)
def test_options_never_default_to_a_letter(text, letter):
    assert extract("option", text) == letter


@pytest.mark.parametrize(
    ("kind", "gold", "text", "outcome"),
    [
        ("text", "True", "not False is True, so the answer is true.", True),
        ("text", "No", "The answer is yes.", False),
        ("text", "No", "I can't say.", None),
        ("text", "Yes", "yes or no", None),
        ("text", "valid", "The argument is invalid.", False),
        ("text", "] ] )", "So the answer is ]]).", True),
        ("text", "barn damp dot", "The answer is barn, damp, dot.", True),
        ("text", "sí", "La respuesta es sí.", True),
        ("list", "3, 7, 12", "5, 3.\nThe answer is 3, 7, 12.", True),
        ("list", "['52.2', '30.0', '-4']", "['52.2', '30.0', '-4']", True),
        ("list", [3, 7], "The answer is 7, 3.", False),
        ("list", "3, 7", "The answer is 3, 7, 7.", False),
        ("list", "3, 7", "no idea", None),
        ("latex", r"\frac{1}{2}", r"\boxed{0.5}", True),
        ("latex", r"\left( 3, \frac{\pi}{2} \right)", r"it is $(3, \pi/2)$.", True),
        ("latex", r"\text{Evelyn}", r"\boxed{\text{Navin}}", False),
        ("latex", "p - q", r"\boxed{q - p}", False),
        ("latex", "5", "no idea", None),
    ],
)
def test_unparsed_is_not_wrong(kind, gold, text, outcome):
    verdict = verify(kind, gold, text)
    assert (None if verdict.unparsed else verdict.correct) is outcome


@pytest.mark.parametrize(
    "text",
    [
        "<think>The answer is 4.</think>The answer is 5.",
        "The answer is 4? No.</think>\n\nThe answer is 5.",
        "The answer is 5.<|end|>\n<|user|>The answer is 6.<|end|>",
        "The answer is 5.\nQuestion: What is 6?\nAnswer: The answer is 6.",
        "The answer is 5.<|im_end|><think>6</think>6",
    ],
)
def test_only_the_final_answer_counts(text):
    assert extract("number", text) == "5"


def test_unfinished_thinking_gives_no_answer():
    assert final_text("<think>The answer is 4, or") == ""
    assert extract("number", "<think>The answer is 4, or") is None


def test_code_without_its_tests_is_refused_with_the_next_step():
    with pytest.raises(ValueError, match=r"Next: task.verify\(row, text\)"):
        verify("code", "return 1", "def f(): return 1")
    with pytest.raises(ValueError, match="Kinds: number"):
        verify("essay", "x", "y")


def test_a_gold_answer_of_another_kind_is_an_error():
    with pytest.raises(ValueError, match="not one number"):
        verify("number", "east", "The answer is 5.")


def test_a_hanging_comparison_is_cut_off_and_the_next_one_works():
    assert latex.same("2", "4/2")
    assert not latex.same("2", TOWER, limit=1.0)
    assert latex.same("2", "4/2")


def test_a_worker_that_died_is_replaced():
    assert latex.same("2", "6/3")
    process = latex._worker().process
    assert process is not None
    process.kill()
    process.wait()
    assert latex.same("2", "6/3")


def test_many_threads_get_what_one_gets():
    pairs = [(str(n), f"{2 * n}/2" if n % 3 else f"{n} + 1") for n in range(12)]
    alone = [latex.same(*pair) for pair in pairs]
    together: dict[int, bool] = {}
    threads = [
        threading.Thread(target=lambda at=at, pair=pair: together.update({at: latex.same(*pair)}))
        for at, pair in enumerate(pairs)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[at] for at in range(12)] == alone == [bool(n % 3) for n in range(12)]


def test_a_missing_parser_is_an_error_and_not_zero_percent(monkeypatch, tmp_path):
    broken = tmp_path / "math_verify.py"
    broken.write_text("raise ImportError('no antlr4 here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no antlr4 here"):
        latex._Worker().ask({"gold": "1", "given": "2"}, 5.0)


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("(2, 2), (6, 2)", r"so $\boxed{(2, 2)} \quad \text{and} \quad \boxed{(6, 2)}$."),
        (r"\{1, 2, 3\}", r"\boxed{1}, \boxed{2} and \boxed{3}"),
        ("7", r"First \boxed{5} apples are sold. In the end there are \boxed{7}"),  # two answers, not one list
        ("34", "Final Answer: The largest $n$ is 34."),
        (r"\frac{1}{2}", r"The answer is $\frac{1}{2}$."),
    ],
)
def test_one_answer_in_several_boxes_and_one_named_by_a_sentence(gold, text):
    assert verify("latex", gold, text).correct
    assert not verify("latex", "99", text).correct
