"""Results at the edges: texts that look like numbers, repeated answers, replies of judges, stop strings, adapters."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.tiny import tiny_lm
from workbench.evaluation import fingerprint
from workbench.evaluation.stored import pass_at
from workbench.exchange.columns import assembled
from workbench.harness import _Answers
from workbench.interventions import Adapter
from workbench.judging.replies import identity, read_choice, read_grade
from workbench.likelihood import loglikelihoods
from workbench.results import Results, load_results, shows_steps

LINE = {"prompt": "p", "correct": True, "unparsed": False, "steps": False, "tokens_in": 1, "tokens_out": 1}


def results(*rows: dict[str, Any]) -> Results:
    table = pd.DataFrame([LINE | row for row in rows])
    table["extracted"] = table["extracted"].astype(object)
    return Results(table, {str(name): {"seconds": 1.0} for name in table.condition.unique()}, {"n": 1})


def test_texts_that_look_like_numbers_come_back_as_texts(tmp_path: Path) -> None:
    one = {"condition": "a", "extracted": "7"}
    saved = results(
        one | {"id": "1", "output": "18", "answer": "7", "seconds": 1 / 3, "date": "2020"},
        one | {"id": "2", "output": "007", "answer": "1e400", "seconds": 1e-13, "date": "2021"},
    )
    saved.save(tmp_path)
    pd.testing.assert_frame_equal(load_results(tmp_path).rows, saved.rows, check_exact=True)


def test_comparisons_of_other_or_repeated_questions_say_so() -> None:
    a, b = {"condition": "a", "extracted": None}, {"condition": "b", "extracted": None}
    with pytest.raises(ValueError, match=r"same questions.*2, 3"):
        results(a | {"id": "1"}, a | {"id": "2"}, b | {"id": "1"}, b | {"id": "3"}).compare("a", "b")
    with pytest.raises(ValueError, match="'1' more than once"):
        results(a | {"id": "1"}, a | {"id": "1"}, b | {"id": "1"}).compare("a", "b")


def test_equations_with_decimals_and_currency_are_steps() -> None:
    assert all(map(shows_steps, ("9 * 2 = $18", "2*1.5=3", "$3 + $4 = $7", "(3+4)*2=14", "34+27=61")))
    assert not any(map(shows_steps, ("The answer is 61.", "x = 5", "2020-01-02", "3 + 4")))


def test_one_cluster_is_none() -> None:
    samples = [[{"output": "a", "extracted": "a", "correct": right}] for right in (True, False, True)]
    rows = pd.DataFrame([LINE | {"id": str(k), "condition": "a", "samples": s} for k, s in enumerate(samples)])
    assert pass_at(rows.assign(cluster="x")).equals(pass_at(rows))


@pytest.mark.parametrize(("repeats", "right"), [("majority", [True]), ("keep", [True, True, False])])
def test_equal_answers_of_one_question_are_votes(repeats: Any, right: list[bool]) -> None:
    said = [(True, "18"), (True, "18"), (False, "20")]
    lines = [{"id": "1", "condition": "m", "correct": ok, "output": text} for ok, text in said]
    assert assembled(lines, repeats, "s", "t", {}, {}).rows.correct.tolist() == right


@pytest.mark.parametrize(
    ("reply", "choice"),
    [
        ("Answer B is better than Answer A.", None),
        ("The answer is a matter of taste: B", "B"),
        ("I pick answer B. The choice is a close one", "B"),
        ("**Verdict:** A", "A"),
        ("The better answer is Answer B.", "B"),
        ("verdict: b", "B"),
    ],
)
def test_an_article_is_no_verdict(reply: str, choice: str | None) -> None:
    assert read_choice(reply) == choice


def test_grades_between_and_of_other_scales_are_none() -> None:
    assert [read_grade(text, range(1, 6)) for text in ("4.5/5", "Score: 4.5", "4/10", "**Score:** 4", "3/5.")] == [
        None, None, None, 4, 3,
    ]  # fmt: skip


def test_a_judge_in_other_precision_is_another_judge() -> None:
    lm = tiny_lm("llama")
    before = identity(lm, None)
    lm.reasons["quantization"], kept = "nf4", lm.reasons.get("quantization", "")
    try:
        assert identity(lm, None) != before
    finally:
        lm.reasons["quantization"] = kept


def test_stop_strings_of_special_tokens_stop() -> None:
    lm = tiny_lm("llama")
    special = lm.tokenizer.convert_tokens_to_ids("<|user|>")
    bias = {special: 1e4}
    (free,), (stopped,) = (lm.generate(["ab"], max_new_tokens=6, bias=bias, stop=stop) for stop in ((), ("<|user|>",)))
    assert free.token_ids[0] == special and len(free.token_ids) > 1
    assert stopped.token_ids == [special] and stopped.finished


def test_the_harness_keeps_to_its_own_length() -> None:
    lm, model = tiny_lm("llama"), _Answers()
    model.set_up(lm, None, None, 8, 4, 0)
    found = model._scores([("abcdefghijklmnop", "qr")])
    ids = lm.encode("abcdefghijklmnopqr")[-9:]
    (cut,) = loglikelihoods(lm, [(ids[:-2], ids[-2:])])
    (whole,) = loglikelihoods(lm, [("abcdefghijklmnop", "qr")])
    assert found[0][0] == pytest.approx(cut.logprob, abs=1e-4) and abs(cut.logprob - whole.logprob) > 1e-3


def test_an_adapter_is_its_settings_too(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    found = []
    for settings in (
        {"lora_alpha": 16, "target_modules": ["a", "b"], "base_model_name_or_path": "x"},
        {"lora_alpha": 16, "target_modules": ["b", "a"], "base_model_name_or_path": "y"},
        {"lora_alpha": 32, "target_modules": ["a", "b"], "base_model_name_or_path": "x"},
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        found.append(fingerprint(Adapter(tmp_path)))
    assert found[0] == found[1] != found[2]
