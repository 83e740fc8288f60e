"""Solvers at the edges: thoughts that a template opens, models without a template, one model in two parts, costs."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_solvers_samples import THINKING, push
from workbench.evaluation import Ask, evaluate
from workbench.evaluation.asking import following
from workbench.evaluation.cost import forward_flops
from workbench.generate import Generation
from workbench.interventions import DropTokens, Logits, QuantizeCache, extract
from workbench.models import LM, ModelError, find_blocks
from workbench.prompts import Strategy, contrast
from workbench.solvers import (
    AskedVerifier,
    BestOf,
    Budget,
    Correct,
    DraftVerify,
    HandOver,
    Likelihood,
    Samples,
    StepBeam,
    StopBias,
    ThinkThenAnswer,
    TreeSearch,
)
from workbench.solvers.probe import mean_state
from workbench.tasks import Task, load_task

OPTIONS = {"id": "a", "question": "1+1?\nOptions:\n(A) 2\n(B) 3", "answer": "A"}


def with_template(lm: LM, template: str | None) -> LM:
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = template
    return replace(lm, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def other(lab: LM) -> LM:
    """The lab model's weights in a module of their own."""
    model = copy.deepcopy(lab.model)
    return replace(lab, model=model, blocks=find_blocks(model))


class Scripted(LM):
    """Says the next of its texts to every prompt, and keeps what it was asked."""

    def generate(self, prompts: Any, *arguments: Any, **named: Any) -> list[Generation]:
        self.asked.append(list(prompts))  # type: ignore[attr-defined]
        text = self.texts.pop(0)  # type: ignore[attr-defined]
        return [Generation(text, self.encode(text), 1, 1, 0.0, True, 1) for _ in prompts]


def scripted(lm: LM, *texts: str) -> Any:
    found = Scripted(
        **{name: getattr(lm, name) for name in ("name", "model", "tokenizer", "blocks", "revision", "reasons")}
    )
    object.__setattr__(found, "texts", list(texts))
    object.__setattr__(found, "asked", [])
    return found


def test_thoughts_without_an_end_are_no_answer_to_any_solver(lab: LM, word_problems: Task) -> None:
    thinking = with_template(lab, THINKING)
    solvers = [StopBias(), Budget(), Correct(0), HandOver(thinking, 1e9), DraftVerify(thinking, 1e9)]
    solvers += [HandOver(thinking, -1e9), TreeSearch(2, 2, depth=2), StepBeam(1, 1, temperature=0.0)]
    conditions: dict[str, Any] = {"greedy": []} | {str(place): [each] for place, each in enumerate(solvers)}
    results = evaluate(thinking, word_problems, conditions, n=1, max_new_tokens=30)
    assert results.rows.unparsed.all()  # the lab model never closes the block
    assert results.rows.output.str.startswith("<think>").all()


def test_the_small_model_is_unchanged_even_where_it_is_the_large_one(lab: LM, word_problems: Task) -> None:
    x = 50.0 * push(lab)
    conditions = {"plain": [], "kept": [x, HandOver(lab, float("inf"))], "over": [x, HandOver(lab, -1e9)], "x": [x]}
    results = evaluate(lab, word_problems, conditions, n=2, max_new_tokens=8)
    assert results.column("kept", "output").equals(results.column("plain", "output"))
    assert results.column("over", "output").equals(results.column("x", "output"))
    assert not results.column("plain", "output").equals(results.column("x", "output"))


def test_a_draft_without_an_answer_is_in_doubt_and_equal_numbers_agree(lab: LM, word_problems: Task) -> None:
    row = {"id": "a", "question": "1/2?", "answer": "0.5"}
    for greedy, sample, doubt in (
        ("nothing", "nothing", 1.0),
        ("The answer is 0.5.", "The answer is 1/2.", 0.0),
        ("The answer is 0.5.", "The answer is 3.", 1.0),
    ):
        small = scripted(lab, greedy, sample)
        (found,) = HandOver(small, 2.0, "disagreement", samples=2).solve(Ask(lab, word_problems, [row]))
        assert found.facts["doubt"] == doubt


def test_rollouts_that_end_in_equal_numbers_agree(lab: LM, word_problems: Task) -> None:
    lm = scripted(lab, *["The answer is 0.5.", "The answer is 1/2."] * 2)
    (found,) = TreeSearch(2, 1, depth=1, temperature=0.0, step="\n").solve(
        Ask(lm, word_problems, [{"id": "a", "question": "1/2?", "answer": "0.5"}])
    )
    assert found.facts["worth"] == 1.0 and found.facts["answers"] == 1


def test_later_turns_hold_the_answer_alone(lab: LM, word_problems: Task) -> None:
    """Neither thoughts, nor the next question that a model without a template asks itself."""
    row = {"id": "a", "question": "2+2?", "answer": "4"}
    base = scripted(with_template(lab, None), " 4\n\nQuestion: 3+3?\n\nAnswer: 6", " 4")
    Correct(1).solve(Ask(base, word_problems, [row]))
    assert "3+3" not in base.asked[1][0] and "Answer: 4\n\nQuestion: Review" in base.asked[1][0]
    thinks = scripted(with_template(lab, THINKING), "2+2=7?</think>4", "</think>4")
    Correct(1).solve(Ask(thinks, word_problems, [row]))
    assert "7?" not in thinks.asked[1][0] and "<|assistant|>4<|end|>" in thinks.asked[1][0]


def test_the_conclusion_stands_behind_its_own_question(lab: LM, word_problems: Task) -> None:
    base = scripted(with_template(lab, None), " 2+2=4.\n\nQuestion: 3+3?\n\nAnswer: 6", " 4.")
    row = {"id": "a", "question": "2+2?", "answer": "4"}
    (found,) = ThinkThenAnswer().solve(Ask(base, word_problems, [row]))
    assert (
        base.asked[1][0].endswith("2+2=4.\nTherefore, the answer is") and word_problems.verify(row, found.text).correct
    )


@pytest.mark.parametrize(
    ("template", "end"),
    [(None, "Answer: The answer is"), (THINKING, "<|assistant|><think>\n</think>\n\nThe answer is")],
)
def test_options_stand_behind_a_space_and_outside_of_thoughts(
    lab: LM, word_problems: Task, template: str | None, end: str
) -> None:
    ask = Ask(with_template(lab, template), word_problems, [dict(OPTIONS)])
    assert Likelihood(style="letter").solve(ask)[0].facts["prompt"].endswith(end)


def test_a_probe_reads_the_answer_under_an_edit_of_the_cache(lab: LM, word_problems: Task) -> None:
    kv = extract(lab, contrast(word_problems, n=2, shots=1), site="kv").at()
    prompt, answer = lab.encode(lab.render(word_problems.messages(word_problems.rows(n=1)[0]))), lab.encode("It is 5.")
    states: list[torch.Tensor] = []
    with torch.no_grad(), lab.apply(kv, prompt_lengths=[len(prompt)]):
        hook = lab.blocks[2].register_forward_hook(lambda module, given, output: states.append(output[0]))
        lab.base(input_ids=torch.tensor([prompt + answer]), use_cache=False)
        hook.remove()
    whole = torch.cat(states)
    assert len(whole) == len(prompt + answer)
    torch.testing.assert_close(mean_state(lab, kv, prompt, answer, 2), whole[len(prompt) :].mean(0))


def test_models_inside_of_a_solver_and_beside_a_change_are_counted(lab: LM, other: LM, word_problems: Task) -> None:
    conditions = {
        "plain": [],
        "own": [BestOf(2, AskedVerifier())],
        "other": [BestOf(2, AskedVerifier(lm=other))],
        "beside": [Logits(amateur=other, strength=1e-6)],
    }
    results = evaluate(lab, word_problems, conditions, n=2, max_new_tokens=8)
    assert results.costs["own"]["model_calls"] == results.costs["other"]["model_calls"]
    plain, beside = (results.column(name, "flops") for name in ("plain", "beside"))
    assert beside.tolist() == (2 * plain).tolist()
    with lab.apply(Logits(amateur=other, strength=1e-6)):
        around = evaluate(lab, word_problems, {"plain": []}, n=2, max_new_tokens=8)
    assert around.rows.flops.tolist() == beside.tolist()


def test_pairs_refuse_an_edit_of_the_cache_before_work(lab: LM, word_problems: Task, tmp_path: Path) -> None:
    row = {
        "id": "a",
        "question": "",
        "good": "The cat is here.",
        "bad": "The cat are here.",
        "answer": "good",
        "paradigm": "x",
    }
    pairs = replace(word_problems, kind="pair", draw=lambda split, n, seed: [row])
    kv = extract(lab, contrast(word_problems, n=2, shots=1), site="kv").at()
    for edit in (kv, DropTokens((0,)), QuantizeCache(4)):
        with pytest.raises(ModelError, match="edits the cache of the prompt"):
            evaluate(lab, pairs, {"plain": [], "edited": [edit]}, n=1, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert evaluate(lab, pairs, {"plain": [], "none": [0 * kv]}, n=1).rows.correct.nunique() == 1


def test_the_last_scored_token_is_not_read(lab: LM, word_problems: Task) -> None:
    ask = Ask(lab, word_problems, [dict(OPTIONS)])
    ask.score([[5, 6, 7]], [[8, 9]], [0])
    assert ask.spent[0].flops == forward_flops(lab, 4, 2) and ask.spent[0].tokens_in == 5


def test_a_word_is_tokenized_where_it_stands(lab: LM) -> None:
    base = with_template(lab, None)
    prompt = "Question: 1+1?\n\nAnswer:"
    assert base.tokenizer.decode(following(base, prompt, "A")) == " A"
    assert following(lab, "<|assistant|>\n", "A") == lab.encode("A")


@pytest.mark.parametrize(
    "make",
    [
        lambda lab: HandOver(lab, 0.5, "disagreement", temperature=0.0),
        lambda lab: TreeSearch(temperature=0.0),
        lambda lab: StepBeam(temperature=-1.0),
        lambda lab: StopBias(temperature=-1.0),
        lambda lab: StopBias(decision=0.0),
        lambda lab: Correct(temperature=-1.0),
    ],
)
def test_temperatures_that_make_no_samples_are_refused_at_once(lab: LM, make: Any) -> None:
    with pytest.raises(ValueError, match="temperature"):
        make(lab)


@pytest.mark.parametrize(
    "condition", [[Likelihood()], [Strategy(shots=2, style="program")]], ids=["no options", "no worked programs"]
)
def test_what_a_later_condition_cannot_do_is_said_before_the_first(
    lab: LM, word_problems: Task, condition: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"options|worked solution"):
        evaluate(lab, word_problems, {"plain": [], "late": condition}, n=2, max_new_tokens=4, out=tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def test_pairs_of_sentences_are_not_sampled(lab: LM, tmp_path: Path) -> None:
    lines = [
        f'{{"sentence_good": "It is {n}.", "sentence_bad": "Is it {n}.", "UID": "passive_1"}}\n' for n in range(30)
    ]
    (tmp_path / "blimp.jsonl").write_text("".join(lines))
    task = load_task("blimp:passive_1", path=tmp_path)
    with pytest.raises(ValueError, match=r"'sampled' answers by Samples.*Likelihood"):
        evaluate(lab, task, {"sampled": [Samples(2)]}, n=2)
