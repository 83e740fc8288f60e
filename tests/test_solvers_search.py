"""Strategies at neutral settings equal greedy decoding; batch size, order and a kill change nothing; costs add up."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.tiny import tiny_lm
from workbench.choosing import Chooser, Decoding, Row
from workbench.divergence import PlainAnswers
from workbench.evaluation import Ask, Solver, asking, evaluate
from workbench.evaluation.cost import forward_flops
from workbench.generate import Generation, generate
from workbench.interventions import Residual
from workbench.models import LM, ModelError, load_model
from workbench.prompts import instruction
from workbench.results import Results
from workbench.solvers.budget import Budget, StopBias, ending, first_token
from workbench.solvers.cascade import DraftVerify, HandOver, choose_threshold
from workbench.solvers.correction import Correct
from workbench.solvers.tree_search import StepBeam, TreeSearch
from workbench.tasks import Task

STEPS = instruction("steps")
TOKENS = 90
ENDS = ("The answer is", "La respuesta es")
SAME = ["id", "output", "extracted", "correct", "calls", "tokens_in", "tokens_out", "flops"]


@pytest.fixture(scope="module")
def small() -> LM:
    return load_model("lab-small")


def run(lm: LM, task: Task, solver: Solver | None, n: int = 6, **arguments: Any) -> pd.DataFrame:
    condition = [STEPS] if solver is None else [STEPS, solver]
    arguments = {"max_new_tokens": TOKENS} | arguments
    return evaluate(lm, task, {"one": condition}, n=n, split="tuning", **arguments).rows


@pytest.fixture(scope="module")
def plain(lab: LM, word_problems: Task) -> pd.DataFrame:
    return run(lab, word_problems, None, n=8)


@pytest.fixture(scope="module")
def plain_small(small: LM, word_problems: Task) -> pd.DataFrame:
    return run(small, word_problems, None, n=8)


NEUTRAL = {
    "budget larger than any chain": Budget(most=TOKENS),
    "no budget": Budget(),
    "budget that ends in the middle of the answer": Budget(most=TOKENS - 1, least=1),
    "bias 0": StopBias(0.0),
    "0 rounds": Correct(0),
    "tree of one": TreeSearch(1, 1, temperature=0.0),
    "tree of one path": TreeSearch(2, 1, temperature=0.0, value="likelihood"),
    "beam of one": StepBeam(1, 1, temperature=0.0),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_settings_equal_greedy(lab: LM, word_problems: Task, plain: pd.DataFrame, name: str) -> None:
    rows = run(lab, word_problems, NEUTRAL[name], n=8)
    assert rows.output.tolist() == plain.output.tolist()


def test_an_exact_verifier_leaves_right_answers_alone(lab: LM, word_problems: Task, plain: pd.DataFrame) -> None:
    rows = run(lab, word_problems, Correct(2, verifier="exact", temperature=0.7), n=8)
    right = plain.correct.to_numpy(bool)
    assert 0 < right.sum() < len(right)
    assert rows.output[right].tolist() == plain.output[right].tolist()
    assert (rows.calls == 1 + rows.asked).all()
    assert (rows.asked[right] == 0).all()
    assert (rows.asked[~right] > 0).all()
    assert not rows.right_to_wrong.any()
    assert rows.wrong_to_right.tolist() == (rows.correct & ~plain.correct).tolist()


def test_what_review_changed_is_counted_from_both_answers(lab: LM, word_problems: Task, plain: pd.DataFrame) -> None:
    rows = run(lab, word_problems, Correct(1, temperature=1.0), n=8)
    assert [samples[0]["output"] for samples in rows.samples] == plain.output.tolist()
    assert rows.right_to_wrong.tolist() == (plain.correct & ~rows.correct).tolist()
    assert rows.changed.tolist() == (plain.extracted != rows.extracted).tolist()
    assert (rows.calls == 2).all()
    assert (rows.tokens_in > 2 * plain.tokens_in).all()  # the second turn holds the first


def test_a_budget_is_kept_and_the_answer_forced(lab: LM, word_problems: Task, plain: pd.DataFrame) -> None:
    short = run(lab, word_problems, Budget(most=10), n=8)
    assert short.forced.all()
    assert (short.thinking == 10).all()
    for text, whole in zip(short.output, plain.output, strict=True):
        said, _, answer = text.partition(" The answer is")
        assert whole.startswith(said)
        assert answer
    longer = run(lab, word_problems, Budget(least=TOKENS, waits=2), n=8)
    assert (longer.waits == [text.count("Wait") for text in longer.output]).all()
    assert (longer.waits > 0).all()
    assert longer.thinking.sum() > plain.tokens_out.sum()
    assert max(len(lab.encode(text)) for text in longer.output) <= TOKENS


def test_a_bias_moves_the_end_both_ways_and_0_changes_no_logit(lab: LM, word_problems: Task) -> None:
    early, never = (run(lab, word_problems, StopBias(nats, ends=ENDS)).tokens_out for nats in (14.0, -30.0))
    greedy = run(lab, word_problems, None).tokens_out
    assert early.sum() < greedy.sum() < never.sum()
    assert lab.tokenizer.decode([first_token(lab, ending(lab))]) == " The"
    prompts = [lab.render(word_problems.messages(row, STEPS)) for row in word_problems.rows("tuning", n=4)]
    for temperature in (0.0, 1.0):
        zero = lab.generate(prompts, None, 40, temperature=temperature, bias={5: 0.0, 9: 0.0})
        assert [g.token_ids for g in zero] == [
            g.token_ids for g in lab.generate(prompts, None, 40, temperature=temperature)
        ]
    one = lab.generate(prompts, None, 1, bias={7: 1e4})
    assert all(each.token_ids == [7] for each in one)
    with pytest.raises(ModelError, match="names token 99999"):
        lab.generate(prompts, None, 4, bias={99999: 1.0})


@pytest.mark.parametrize("heat", [0.5, 3.0])
def test_a_temperature_of_the_end_changes_the_odds_of_ending_alone(lab: LM, heat: float) -> None:
    ids, tokens = [lab.encode("7+9=16. The")], [40, 41]
    with torch.no_grad():
        logits = lab.model(torch.tensor(ids)).logits[0, -1:].float()
    chooser = Chooser(lab, [Row(0, 0, ids[0], 0, 4)], Decoding(4, bias={40: 0.5, 41: 0.5}, bias_temperature=heat))
    moved = logits.index_add(1, chooser.biased, chooser._moves(logits))
    others = torch.ones(logits.shape[1], dtype=torch.bool).index_fill(0, torch.tensor(tokens), False)
    before, after = ((x[0, tokens].logsumexp(-1) - x[0, others].logsumexp(-1)).item() for x in (logits, moved))
    assert after == pytest.approx(before / heat + 0.5, abs=1e-4)
    torch.testing.assert_close(moved[:, others], logits[:, others])
    within = (x[0, 40] - x[0, 41] for x in (logits, moved))
    torch.testing.assert_close(*within, atol=1e-4, rtol=1e-4)


def test_a_hot_end_comes_sooner(lab: LM, word_problems: Task) -> None:
    same, drawn, sooner = (
        run(lab, word_problems, StopBias(decision=heat, temperature=drawing, ends=ENDS))
        for heat, drawing in ((1.0, 0.0), (1.0, 1.0), (30.0, 1.0))
    )
    assert same.output.tolist() == run(lab, word_problems, None).output.tolist()
    assert sooner.tokens_out.sum() < drawn.tokens_out.sum()
    with pytest.raises(ModelError, match="finite number above 0"):
        lab.generate(["1"], None, 4, bias={5: 0.0}, bias_temperature=0.0)


def test_a_cascade_is_the_small_model_or_the_large_one_at_its_ends(
    lab: LM, small: LM, word_problems: Task, plain: pd.DataFrame, plain_small: pd.DataFrame
) -> None:
    for make in (HandOver, DraftVerify):
        never, always = (run(lab, word_problems, make(small, end), n=8) for end in (inf, -inf))
        assert never.output.tolist() == plain_small.output.tolist()
        assert always.output.tolist() == plain.output.tolist()
        assert always.handed_over.all()
        assert not never.handed_over.any()
        assert np.allclose(always.flops - never.flops, plain.flops)  # the large model's own, and no more
        middle = run(lab, word_problems, make(small, float(never.doubt.median())), n=8)
        assert 0 < middle.handed_over.sum() < 8
        expected = np.where(middle.handed_over, plain.output, plain_small.output)
        assert middle.output.tolist() == expected.tolist()


@pytest.mark.parametrize("over", ["mean", "max"])
def test_doubt_is_read_from_the_small_models_own_tokens(lab: LM, small: LM, word_problems: Task, over: str) -> None:
    rows = run(lab, word_problems, HandOver(small, inf, "probability", over), n=3)
    for row, asked in zip(rows.itertuples(), word_problems.rows("tuning", n=3), strict=True):
        ids = small.encode(word_problems.messages(asked, STEPS))
        answer = small.generate([ids], None, TOKENS)[0].token_ids
        with torch.no_grad():
            said = small.model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        nats = -said.gather(1, torch.tensor(answer)[:, None])
        assert row.doubt == pytest.approx(float(nats.max() if over == "max" else nats.mean()), abs=1e-4)


def test_a_threshold_is_the_best_of_all() -> None:
    doubts, small, large = [0.1, 0.2, 0.3, 0.4], [True, True, False, False], [True, False, True, True]
    held = [{"doubt": d, "samples": [{"correct": s}]} for d, s in zip(doubts, small, strict=True)]
    rows = [{"id": str(i), "condition": "both", "correct": True, **each} for i, each in enumerate(held)]
    rows += [{"id": str(i), "condition": "large", "correct": right} for i, right in enumerate(large)]
    results = Results(pd.DataFrame(rows), {"both": {}, "large": {}}, {"split": "tuning"})
    found = choose_threshold(results, "both", "large")
    assert (found.threshold, found.share, found.accuracy, found.n) == (0.2, 0.5, 1.0, 4)
    assert choose_threshold(results, "both", "large", share=0.25).accuracy == 0.75
    assert choose_threshold(results, "both", "large", loss=0.5).share == 0.0
    with pytest.raises(ValueError, match="tuning"):
        choose_threshold(replace(results, about={"split": "test"}), "both", "large")
    with pytest.raises(ValueError, match="no doubts"):
        choose_threshold(results, "large", "large")


SEARCHES: dict[str, Any] = {
    "budget": lambda small: Budget(most=40, least=30),
    "hand over": lambda small: HandOver(small, 0.5, measure="disagreement", samples=3),
    "draft": lambda small: DraftVerify(small, 0.02),
    "correct": lambda small: Correct(2, verifier="exact", temperature=0.7),
    "tree": lambda small: TreeSearch(3, 2, depth=2),
    "likely tree": lambda small: TreeSearch(2, 2, value="likelihood", choose="value"),
    "beam": lambda small: StepBeam(2, 2, depth=2),
}


@pytest.mark.parametrize("name", SEARCHES)
def test_batches_and_order_change_nothing_and_costs_add_up(
    lab: LM, small: LM, word_problems: Task, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tokens: list[tuple[int, int, float]] = []
    original, scoring, reading = LM.generate, PlainAnswers.token_scores, asking.loglikelihoods

    def generate_and_note(self: LM, *args: Any, **named: Any) -> list[Generation]:
        found = original(self, *args, **named)
        for one in found:
            flops = forward_flops(self, one.tokens_in + one.tokens_out - 1, one.tokens_out)
            tokens.append((one.tokens_in, one.tokens_out, flops))
        return found

    def score_and_note(self: PlainAnswers, x: Any) -> Any:
        for prompt, answer in zip(self.prompts, self.answers, strict=True):
            read = len(prompt) + len(answer)
            tokens.append((read, 0, forward_flops(self.lm, read - 1, len(answer))))
        return scoring(self, x)

    def read_and_note(lm: LM, requests: Any, *args: Any, **named: Any) -> Any:
        for prompt, answer in requests:
            read = len(prompt) + len(answer)
            tokens.append((read, 0, forward_flops(lm, read - 1, len(answer))))
        return reading(lm, requests, *args, **named)

    solver = SEARCHES[name](small)
    with monkeypatch.context() as patch:
        patch.setattr(asking, "loglikelihoods", read_and_note)
        patch.setattr(LM, "generate", generate_and_note)
        patch.setattr(PlainAnswers, "token_scores", score_and_note)
        first = run(lab, word_problems, solver, n=3, batch_size=7)
    assert first.calls.sum() == len(tokens)
    for column, values in zip(("tokens_in", "tokens_out", "flops"), zip(*tokens, strict=True), strict=True):
        assert first[column].sum() == pytest.approx(sum(values))
    turned = replace(word_problems, draw=lambda *asked: word_problems.draw(*asked)[::-1])
    other = run(lab, turned, solver, n=3, batch_size=1)[first.columns]
    timed = ["seconds", "forward_passes"]  # prompts shared by rows are read in a pass of their own
    left, right = (each.set_index("id").sort_index().drop(columns=timed) for each in (first, other))
    pd.testing.assert_frame_equal(left, right)


@pytest.mark.parametrize("name", SEARCHES)
def test_killed_and_resumed_equals_straight_through(
    lab: LM, small: LM, word_problems: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("workbench.evaluation.CHUNK", 1)
    solver, left = SEARCHES[name](small), 0
    whole = run(lab, word_problems, solver, n=2)
    original = type(solver).solve

    def killed(self: Solver, ask: Ask) -> Any:
        nonlocal left
        left += 1
        if left == 2:
            raise KeyboardInterrupt
        return original(self, ask)

    monkeypatch.setattr(type(solver), "solve", killed)
    with pytest.raises(KeyboardInterrupt):
        run(lab, word_problems, solver, n=2, out=tmp_path)
    resumed = run(lab, word_problems, solver, n=2, out=tmp_path)
    assert left == 3  # the first chunk was not answered again
    pd.testing.assert_frame_equal(whole[SAME], resumed[SAME])


def test_a_tree_shares_its_rollouts_votes(lab: LM, word_problems: Task) -> None:
    rows = run(lab, word_problems, TreeSearch(4, 2, temperature=1.0, choose="value"), n=6)
    assert rows.answers.max() > 1  # it did search
    for _, row in rows.iterrows():
        said = [sample["extracted"] for sample in row.samples]
        votes = {answer: said.count(answer) for answer in said if answer is not None}
        assert votes.get(row.extracted, 0) == max(votes.values())
        assert row.worth == pytest.approx(votes[row.extracted] / len(said), abs=1e-6)


def test_limits_of_their_own_and_token_ids_continue_as_if_alone(word_problems: Task) -> None:
    lm = tiny_lm("llama")
    prompts: Sequence[str] = [lm.render(word_problems.messages(row)) for row in word_problems.rows(n=5)]
    limits = [3, 12, 1, 7, 12]
    for temperature in (0.0, 1.0):
        whole = lm.generate(prompts, None, 12, temperature=temperature)
        cut = lm.generate(prompts, None, limits, temperature=temperature)
        assert [g.token_ids for g in cut] == [g.token_ids[:most] for g, most in zip(whole, limits, strict=True)]
    greedy = lm.generate(prompts, None, 12)
    begun = [lm.encode(prompt) + one.token_ids[:5] for prompt, one in zip(prompts, greedy, strict=True)]
    assert [g.token_ids for g in lm.generate(begun, None, 7)] == [g.token_ids[5:] for g in greedy]
    with pytest.raises(ModelError, match="2 limits for 5 prompts"):
        generate(lm, prompts, None, Decoding(12), limits=[1, 2])


def test_scores_are_those_of_a_plain_forward_under_the_change(word_problems: Task) -> None:
    lm = tiny_lm("llama")
    push = Residual({1: torch.randn(lm.d_model, generator=torch.Generator().manual_seed(1))}, positions="all")
    rows = word_problems.rows(n=3)
    texts = [[7, 9, 11], [30], [8, 8]]
    for change in (None, 2.0 * push):
        ask = Ask(lm, word_problems, rows, change=change, batch_size=2)
        prompts = [ask.prompt(row) for row in range(3)]
        found = ask.score(prompts, texts, range(3))
        for prompt, text, scores in zip(prompts, texts, found, strict=True):
            ids = torch.tensor([[*lm.encode(prompt), *text]])
            with lm.apply(change or 0.0 * push, prompt_lengths=[len(lm.encode(prompt))]), torch.no_grad():
                said = lm.model(ids).logits[0, -len(text) - 1 : -1].log_softmax(-1)
            best = said.exp().sort(descending=True).values
            assert np.allclose(scores.logprobs, [said[i, token] for i, token in enumerate(text)], atol=1e-4)
            assert np.allclose(scores.entropy, -(said.exp() * said).sum(-1), atol=1e-4)
            assert np.allclose(scores.margin, best[:, 0] - best[:, 1], atol=1e-4)
        assert [(cost.calls, cost.tokens_out) for cost in ask.spent] == [(1, 0)] * 3


def test_impossible_settings_are_refused() -> None:
    for make in (
        lambda: Budget(most=5, least=6),
        lambda: Budget(most=0),
        lambda: HandOver(None, 0.5, measure="vibes"),  # type: ignore[arg-type]
        lambda: Correct(1, verifier="oracle"),
        lambda: TreeSearch(0),
        lambda: TreeSearch(value="gold"),
        lambda: StepBeam(step=""),
    ):
        with pytest.raises(ValueError, match=r"give|one of|is "):
            make()
