"""Choices, pairs and perplexity are those of plain forwards; as a solver of `evaluate`, too, in any batch and order."""

import math
from random import Random
from typing import Any

import pytest
import torch

import workbench as wb
from tests.test_kinds import residual
from tests.tiny import tiny_lm
from workbench.evaluation import Ask
from workbench.evaluation.cost import forward_flops
from workbench.likelihood import NORMALISATIONS, minimal_pairs, multiple_choice, perplexity, rolling_likelihoods
from workbench.likelihood.requests import prefix_token
from workbench.models import LM, ModelError
from workbench.solvers import Likelihood
from workbench.statistics import beta_binomial_interval
from workbench.tasks import Task, load_task

ROWS = [
    {"id": "a", "question": "How many?\nOptions:\n(A) 12\n(B) 1234\n(C) 7 é", "answer": "B"},
    {"id": "b", "question": "Which one, then?\nOptions:\n(A) no\n(B) yes, of course", "answer": "(A)"},
    {"id": "c", "question": "What?", "options": ["x", "y y", "zz"], "answer": "y y"},
]
TEXTS = [["12", "1234", "7 é"], ["no", "yes, of course"], ["x", "y y", "zz"]]
LETTERS = [["A", "B", "C"], ["(A)", "(B)"], ["A", "B", "C"]]


def total(lm: LM, context: str, text: str) -> tuple[float, int]:
    """Summed log-probability and number of tokens of " text" behind a context, by one plain forward."""
    start, whole = lm.encode(context), lm.encode(f"{context} {text}")
    with torch.no_grad():
        logits = lm.model(torch.tensor([whole[:-1]])).logits[0].double().log_softmax(-1)
    own = whole[len(start) :]
    return float(sum(logits[len(start) - 1 + place, token] for place, token in enumerate(own))), len(own)


def by_hand(lm: LM, context: str, options: list[str], how: str, free: str = "Answer:") -> list[float]:
    scores = []
    for text in options:
        score, tokens = total(lm, context, text)
        sizes = {"token": tokens, "character": len(text), "byte": len(text.encode())}
        scores.append(score - total(lm, free, text)[0] if how == "unconditional" else score / sizes.get(how, 1))
    return scores


@pytest.mark.parametrize("how", NORMALISATIONS)
@pytest.mark.parametrize("style", ["text", "letter"])
def test_choices_are_those_of_plain_forwards(style: str, how: str) -> None:
    lm = tiny_lm("llama")
    found = multiple_choice(lm, ROWS, style=style, normalisation=how)
    for row, texts, letters, one in zip(ROWS, TEXTS, LETTERS, found, strict=True):
        asked = row["question"].partition("\nOptions")[0] if style == "text" else row["question"]
        options = texts if style == "text" else letters
        scores = by_hand(lm, f"Question: {asked}\nAnswer:", options, how)
        assert one.options == tuple(options) and one.scores == pytest.approx(scores, abs=1e-4)
        assert one.chosen == scores.index(max(scores)) and one.correct == (one.chosen == one.gold)
        assert one.gold == {"a": 1, "b": 0, "c": 1}[row["id"]]
        others = [score for place, score in enumerate(scores) if place != one.gold]
        assert one.margin == pytest.approx(scores[one.gold] - max(others), abs=1e-4)
        sums = torch.tensor(by_hand(lm, f"Question: {asked}\nAnswer:", options, "sum"))
        assert one.confidence == pytest.approx(float(sums.softmax(0)[one.chosen]), abs=1e-4)


@pytest.mark.parametrize("window", [None, 5, 16])
def test_perplexity_is_that_of_a_plain_loop_over_windows(window: int | None) -> None:
    lm = tiny_lm("gpt2")
    texts = ["One text that is longer than its window, by far.", "short", "Ein  anderer\nText, é."]
    nats = []
    for text in texts:
        line, score = [prefix_token(lm), *lm.encode(text)], 0.0
        size = window or len(line)
        for start in range(1, len(line), size):
            stop = min(start + size, len(line))
            with torch.no_grad():  # a last window reaches back until it is full
                logits = lm.model(torch.tensor([line[max(0, stop - 1 - size) : stop - 1]])).logits[0].log_softmax(-1)
            score -= sum(float(logits[place - stop, line[place]]) for place in range(start, stop))
        nats.append(score)
    documents = rolling_likelihoods(lm, texts, window=window)
    assert [each.nats for each in documents] == pytest.approx(nats, rel=1e-5)
    found = perplexity(lm, texts, window=window)
    words, size = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    assert found.word_perplexity.estimate == pytest.approx(math.exp(sum(nats) / words))
    assert found.byte_perplexity.estimate == pytest.approx(math.exp(sum(nats) / size))
    assert found.bits_per_byte.estimate == pytest.approx(sum(nats) / size / math.log(2))
    assert found.byte_perplexity.low < found.byte_perplexity.estimate < found.byte_perplexity.high


def options_task() -> Task:
    return Task("options", "option", "test", lambda split, n, seed: [dict(row) for row in ROWS][:n], _judge)


def _judge(row: dict[str, Any], text: str) -> Any:
    raise AssertionError("a choice needs no verifier")


@pytest.mark.parametrize("style", ["text", "letter"])
def test_the_strategy_asks_and_the_lead_begins_the_answer(style: str) -> None:
    lm, task = tiny_lm("llama"), options_task()
    strategy = wb.few_shot("direct", 2)
    ask = Ask(lm, task, task.rows(), strategy)
    found = Likelihood("unconditional", style).solve(ask)
    for place, (texts, letters) in enumerate(zip(TEXTS, LETTERS, strict=True)):
        prompt = found[place].facts["prompt"]
        if style == "letter":
            assert prompt == ask.prompt(place) + "The answer is"
        else:
            assert "Options" not in prompt and ROWS[place - 1]["answer"] not in prompt.split("answer is")[1][:3]
        options = texts if style == "text" else letters
        scores = by_hand(lm, prompt, options, "unconditional", "The answer is")
        chosen = scores.index(max(scores))
        assert found[place].text == options[chosen]
        lengths = [(len(lm.encode(prompt)), total(lm, prompt, text)[1]) for text in options]
        lengths += [(len(lm.encode("The answer is")), total(lm, "The answer is", text)[1]) for text in options]
        spent = ask.spent[place]
        assert (spent.tokens_in, spent.tokens_out) == (sum(map(sum, lengths)), 0)
        assert spent.calls == spent.forward_passes == 2 * len(options)
        assert spent.flops == pytest.approx(sum(forward_flops(lm, sum(each) - 1, each[1]) for each in lengths))


def test_a_choice_is_the_same_in_any_batch_and_order_and_alone(data_folder: object) -> None:
    lm, task = tiny_lm("gpt2"), load_task("aqua")
    rows, solver = task.rows(n=10), Likelihood("byte")
    plain = Ask(lm, task, rows)
    found = solver.solve(plain)
    order = Random(1).sample(range(10), 10)
    for size in (1, 7, 64):
        again = solver.solve(Ask(lm, task, [rows[place] for place in order], batch_size=size))
        assert [one.text for one in again] == [found[place].text for place in order]
        margins = [found[place].facts["margin"] for place in order]
        assert [one.facts["margin"] for one in again] == pytest.approx(margins, abs=1e-5)
    assert solver.solve(Ask(lm, task, rows[:1]))[0].text == found[0].text
    x = residual(lm, "generated")
    nothing = solver.solve(Ask(lm, task, rows, change=0.0 * x))
    assert [one.text for one in nothing] == [one.text for one in found]
    steered = solver.solve(Ask(lm, task, rows, change=x))
    assert [one.facts["margin"] for one in steered] != pytest.approx([one.facts["margin"] for one in found], abs=1e-3)


def test_evaluate_scores_pairs_and_clusters_paradigms(data_folder: object, tmp_path: Any) -> None:
    lm, task = tiny_lm("llama"), load_task("blimp", per_paradigm=2)
    x = residual(lm, "generated")
    conditions = {"plain": [], "asked": [Likelihood()], "none": [0.0 * x], "steered": [x, Likelihood("byte")]}
    found = wb.evaluate(lm, task, conditions, n=None, out=tmp_path)
    rows = task.rows()
    alone = minimal_pairs(lm, rows, x, normalisation="byte")
    assert found.correct("steered").tolist() == [pair.correct for pair in alone]
    plain = minimal_pairs(lm, rows)
    for name in ("plain", "asked", "none"):
        assert found.correct(name).tolist() == [pair.correct for pair in plain]
    first = found.rows[found.rows.condition == "plain"]
    assert first.output.tolist() == [
        row["good" if pair.correct else "bad"] for row, pair in zip(rows, plain, strict=True)
    ]
    assert first.margin.tolist() == pytest.approx([pair.good - pair.bad for pair in plain], abs=1e-5)
    expected = beta_binomial_interval([pair.correct for pair in plain], [row["paradigm"] for row in rows])
    table = found.table().set_index("condition")
    assert (table.low["plain"], table.high["plain"]) == (expected.low, expected.high)
    assert "cluster" in found.compare("plain", "steered").method and not first.unparsed.any()
    again = wb.evaluate(lm, task, conditions, n=None, out=tmp_path)
    assert again.rows.equals(found.rows) and again.costs == found.costs


def test_what_cannot_be_chosen_from_is_refused(word_problems: Task, data_folder: object) -> None:
    lm = tiny_lm("llama")
    with pytest.raises(ModelError, match="has no options"):
        wb.evaluate(lm, word_problems, {"a": [Likelihood()]}, n=2)
    with pytest.raises(ModelError, match="sentences of task 'blimp:passive_1' stand alone"):
        wb.evaluate(lm, load_task("blimp:passive_1"), {"a": [wb.instruction("steps")]}, n=2)
    with pytest.raises(ModelError, match="none for sentences"):
        minimal_pairs(lm, load_task("blimp:passive_1").rows(n=2), normalisation="unconditional")
    with pytest.raises(ModelError, match="style='word' is unknown"):
        Likelihood(style="word")
    with pytest.raises(ModelError, match="normalisation='words' is unknown"):
        multiple_choice(lm, ROWS, normalisation="words")
    with pytest.raises(ModelError, match="none of its 3 options"):
        multiple_choice(lm, [ROWS[2] | {"answer": "w"}])
    with pytest.raises(ModelError, match="2 interventions for 3 rows"):
        multiple_choice(lm, ROWS, [None, None])
