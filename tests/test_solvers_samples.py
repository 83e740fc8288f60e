"""Solvers against the work done by hand: votes over stored samples, scores from plain forwards, subsets enumerated."""

import copy
import math
from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from tests.test_templates import ALL, REFUSED, tokenizer_of
from tests.tiny import tiny_lm
from workbench.evaluation import Answer, Ask, evaluate
from workbench.evaluation import __name__ as evaluation
from workbench.evaluation.cost import forward_flops
from workbench.evaluation.stored import (
    average_at,
    best_of_at,
    elected,
    g_pass_at,
    g_pass_k,
    majority_at,
    mg_pass_at,
    pass_at,
    pass_k,
    subsets,
)
from workbench.generate import Generation
from workbench.interventions import Residual, extract
from workbench.models import LM
from workbench.prompts import Strategy, contrast, few_shot, messages, short_answer, zero_shot
from workbench.results import load_results
from workbench.sandbox import isolation
from workbench.solvers import (
    AskedVerifier,
    BestOf,
    Probe,
    Program,
    Samples,
    SelfConsistency,
    ThinkThenAnswer,
    fit_probe,
)
from workbench.solvers.probe import _held_out, _logistic
from workbench.solvers.sampling import Drawn
from workbench.solvers.verifier import verifier_records
from workbench.statistics import bootstrap_mean, wilson
from workbench.synthesis.programs import SHOTS, program_task
from workbench.tasks import Task, load_task

needs_sandbox = pytest.mark.skipif(
    not isolation(), reason="bubblewrap is missing or can't start here: python -m workbench doctor says what to do"
)
SHOTS_3 = few_shot("steps", 3)
PLAIN = ["id", "condition", "prompt", "output", "extracted", "correct", "calls", "tokens_in", "tokens_out", "samples"]
THINKING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% else %}{{ '<think>\n' }}{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def lm() -> LM:
    return tiny_lm("llama")


@pytest.fixture(scope="module")
def five(lab: LM, word_problems: Task) -> pd.DataFrame:
    """Five samples to each of six questions, after three worked examples."""
    return evaluate(lab, word_problems, {"five": [SHOTS_3, Samples(5, 1.0)]}, n=6, max_new_tokens=70).rows


def push(lm: LM) -> Residual:
    generator = torch.Generator().manual_seed(1)
    return 3.0 * Residual({1: torch.randn(lm.d_model, generator=generator)}, positions="all")


def templated(lm: LM, template: str | None) -> LM:
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.chat_template = template
    return replace(lm, tokenizer=tokenizer)


class Scripted:
    """A model that answers from a list, in the order asked; everything else is the tiny model's."""

    def __init__(self, lm: LM, texts: list[str]) -> None:
        self.lm, self.texts, self.prompts = lm, texts, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lm, name)

    def generate(self, prompts: list[str], *arguments: Any, **settings: Any) -> list[Generation]:
        self.prompts += prompts
        taken, self.texts = self.texts[: len(prompts)], self.texts[len(prompts) :]
        return [Generation(text, [7] * len(text), 3, len(text), 0.0, True, 1) for text in taken]


# One sample at temperature 0, votes, costs


def test_one_sample_at_temperature_0_is_greedy(lab: LM, word_problems: Task) -> None:
    conditions = {"greedy": [], "one": [Samples(1, 0.0)], "vote": [SelfConsistency(1, 0.0)]}
    conditions |= {"best": [BestOf(1, "likelihood", temperature=0.0)]}
    rows = evaluate(lab, word_problems, conditions, n=6, max_new_tokens=40).rows
    greedy, *others = (group.reset_index(drop=True) for _, group in rows.groupby("condition", sort=False))
    for other in others:
        pd.testing.assert_frame_equal(
            greedy[["output", "extracted", "correct"]], other[["output", "extracted", "correct"]]
        )
    assert (others[0].tokens_in == greedy.tokens_in).all()
    assert (others[0].flops == greedy.flops).all()


def test_self_consistency_is_a_vote_among_the_samples(lab: LM, word_problems: Task, five: pd.DataFrame) -> None:
    voted = evaluate(lab, word_problems, {"v": [SHOTS_3, SelfConsistency(5, 1.0)]}, n=6, max_new_tokens=70).rows
    assert voted.samples.tolist() == five.samples.tolist()
    asked = {row["id"]: row for row in word_problems.rows("test", n=6)}
    for row in voted.to_dict("records"):
        read = [word_problems.verify(asked[row["id"]], each["output"]).extracted for each in row["samples"]]
        votes = Counter(answer for answer in read if answer is not None)  # most_common keeps the order seen
        answer, most = votes.most_common(1)[0]
        assert (row["extracted"], row["votes"], row["agreement"]) == (answer, most, most / 5)
        assert row["voters"] == sum(votes.values())
    assert voted.agreement.nunique() > 1  # not all of one mind
    held = majority_at(voted, [5]).iloc[0]
    assert held.estimate == voted.correct.mean()
    assert voted.drop(columns=["votes", "voters", "agreement"]).tokens_out.tolist() == five.tokens_out.tolist()


def test_only_samples_with_an_answer_vote() -> None:
    assert elected([None, "3", None, "4", "4.0", None]) == 3
    assert elected(["3", "4", "4", "3"]) == 0  # equal: the one seen first
    assert elected([None, None]) == 0
    assert elected(["1/2", "3", "0.5"]) == 0


def test_a_row_tells_the_share_of_right_samples_and_the_answer_is_the_first(five: pd.DataFrame) -> None:
    for row in five.to_dict("records"):
        assert row["output"] == row["samples"][0]["output"]
        assert row["solve_rate"] == sum(each["correct"] for each in row["samples"]) / 5
    assert 0 < five.solve_rate.mean() < 1
    assert (five.calls == 5).all()


def test_fewer_samples_are_the_first_of_more(lab: LM, word_problems: Task, five: pd.DataFrame) -> None:
    three = evaluate(lab, word_problems, {"3": [SHOTS_3, Samples(3, 1.0)]}, n=6, max_new_tokens=70).rows
    assert three.samples.tolist() == [each[:3] for each in five.samples]
    taken = average_at(five, [3]).iloc[0]
    assert taken.estimate == pytest.approx(three.solve_rate.mean())
    assert average_at(five, [5]).estimate[0] == pytest.approx(five.solve_rate.mean())
    assert taken.tokens_in == three.tokens_in.mean()


def test_batch_sizes_do_not_matter(lab: LM, word_problems: Task) -> None:
    conditions = {"vote": [SHOTS_3, SelfConsistency(3)], "best": [SHOTS_3, BestOf(3, "likelihood")]}
    found = [
        evaluate(lab, word_problems, conditions, n=2, max_new_tokens=40, batch_size=size).rows for size in (1, 4, None)
    ]
    for other in found[1:]:
        pd.testing.assert_frame_equal(found[0][[*PLAIN, "scores", "votes"]], other[[*PLAIN, "scores", "votes"]])


@dataclass(frozen=True)
class Small(BestOf):
    """`BestOf` in chunks of two questions."""

    chunk: int = 2


def test_killed_and_resumed_equals_straight_through(
    lm: LM, word_problems: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    module = sys.modules[evaluation]
    store, written = module.store, []

    def dies(file: Path | None, key: str, answered: Any) -> None:
        store(file, key, answered)
        written.append(file)
        if len(written) == 2:
            raise KeyboardInterrupt

    conditions = {"best": [Small(3, "self-certainty")]}
    whole = evaluate(lm, word_problems, conditions, n=7, max_new_tokens=6).rows
    monkeypatch.setattr(module, "store", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate(lm, word_problems, conditions, n=7, max_new_tokens=6, out=tmp_path)
    resumed = evaluate(lm, word_problems, conditions, n=7, max_new_tokens=6, out=tmp_path).rows
    assert len(written) == 4
    pd.testing.assert_frame_equal(whole[[*PLAIN, "scores"]], resumed[[*PLAIN, "scores"]])
    loaded = load_results(tmp_path).rows
    pd.testing.assert_frame_equal(pass_at(loaded, [1, 3]), pass_at(whole, [1, 3]))


def test_costs_add_up(lab: LM, word_problems: Task, five: pd.DataFrame) -> None:
    best = evaluate(lab, word_problems, {"b": [SHOTS_3, BestOf(5, temperature=1.0)]}, n=6, max_new_tokens=70).rows
    assert best.samples.tolist() == five.samples.tolist()
    assert (five.tokens_in == [5 * len(lab.encode(prompt)) for prompt in five.prompt]).all()
    different = [len({each["output"] for each in samples}) for samples in five.samples]
    assert (best.calls == 5 + np.array(different)).all()
    assert (best.tokens_out == five.tokens_out).all()
    ask = Ask(lab, word_problems, word_problems.rows(n=1))
    prompt, answer = lab.encode("1+1?"), lab.encode("It is 2")
    ask.score([prompt], [answer], [0])
    assert ask.spent[0].flops == forward_flops(lab, len(prompt) + len(answer) - 1, len(answer))
    assert (best.flops > five.flops).all()


# Scores


def plain_log_probabilities(lm: LM, prompt: list[int], answer: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    return logits.log_softmax(-1)[len(prompt) - 1 : -1]


def test_likelihood_and_self_certainty_are_those_of_a_plain_forward(lm: LM, word_problems: Task) -> None:
    ask = Ask(lm, word_problems, word_problems.rows(n=3), max_new_tokens=9)
    for by in ("likelihood", "self-certainty"):
        solver = BestOf(3, by)
        for place, answer in enumerate(solver.solve(ask)):
            prompt = ask.prompt(place)
            made = ask.generate([prompt] * 3, [place] * 3, temperature=0.7, draws=[0, 1, 2])
            for one, score in zip(made, answer.facts["scores"], strict=True):
                found = plain_log_probabilities(lm, lm.encode(prompt), one.token_ids)
                uniform = torch.full_like(found, 1 / found.shape[1])
                wanted = {
                    "likelihood": found.gather(1, torch.tensor(one.token_ids)[:, None]).mean().exp(),
                    "self-certainty": torch.nn.functional.kl_div(found, uniform, reduction="none").sum(1).mean(),
                }[by]
                assert score == pytest.approx(float(wanted), rel=1e-5)
            best = max(range(3), key=lambda number: answer.facts["scores"][number])
            assert answer.text == answer.samples[best]


@pytest.mark.parametrize("kind", ["residual", "kv"])
def test_a_text_is_scored_under_the_change_that_made_it(lm: LM, word_problems: Task, kind: str) -> None:
    pairs = contrast(word_problems, shots=1, n=2, lm=lm)
    change = push(lm) if kind == "residual" else extract(lm, pairs, site="kv").scaled(values=4.0)
    ask = Ask(lm, word_problems, word_problems.rows(n=2), change=change, max_new_tokens=12)
    for place in range(2):
        (made,) = ask.generate([ask.prompt(place)], [place])
        prompt = lm.encode(ask.prompt(place))
        (under,) = ask.score([prompt], [made.token_ids], [place])
        (plain,) = ask.score([prompt], [made.token_ids], [place], by=(lm, None))
        found = plain_log_probabilities(lm, prompt, made.token_ids).gather(1, torch.tensor(made.token_ids)[:, None])
        assert plain.logprobs == pytest.approx(found[:, 0].numpy(), abs=1e-5)
        for scored, by in ((under, None), (plain, (lm, None))):
            (alone,) = ask.logprobs([prompt], [made.token_ids], [place], by=by)
            assert alone == pytest.approx(scored.logprobs, abs=1e-5)
        assert under.logprobs.sum() > plain.logprobs.sum()  # its own greedy answer is the more likely one under it


def test_best_by_the_oracle_is_pass_at_n(lab: LM, word_problems: Task, five: pd.DataFrame) -> None:
    conditions = {"exact": [SHOTS_3, BestOf(5, "exact", temperature=1.0)]}
    conditions |= {"short": [SHOTS_3, BestOf(5, "shortest", temperature=1.0)]}
    rows = evaluate(lab, word_problems, conditions, n=6, max_new_tokens=70).rows
    exact, short = rows[rows.condition == "exact"], rows[rows.condition == "short"]
    assert exact.samples.tolist() == five.samples.tolist()
    assert exact.correct.mean() == pass_at(five, [5]).estimate[0] > five.correct.mean()
    assert best_of_at(exact, [5]).estimate[0] == exact.correct.mean()
    assert best_of_at(short, [5]).estimate[0] == short.correct.mean()
    assert best_of_at(short, [1]).estimate[0] == pytest.approx(five.solve_rate.mean())
    lengths = [[len(lab.encode(each["output"])) for each in samples] for samples in short.samples]
    chosen = [len(lab.encode(output)) for output in short.output]
    assert chosen == [min(each) for each in lengths]


def test_a_weighted_vote_adds_the_scores(lab: LM, word_problems: Task) -> None:
    solver = BestOf(5, "likelihood", vote=True, temperature=1.0)
    rows = evaluate(lab, word_problems, {"vote": [SHOTS_3, solver]}, n=4, max_new_tokens=70).rows
    for row in rows.to_dict("records"):
        totals: Counter[str] = Counter()
        for each, score in zip(row["samples"], row["scores"], strict=True):
            if each["extracted"] is not None:
                totals[each["extracted"]] += score
        assert row["extracted"] == totals.most_common(1)[0][0]
    assert majority_at(rows, [5], weights="scores").estimate[0] == rows.correct.mean()


def test_the_asked_verifier_is_the_chance_of_yes_against_no(lm: LM, word_problems: Task) -> None:
    ask = Ask(lm, word_problems, word_problems.rows(n=1))
    sample = Drawn("", "<think>9?</think>It is {question} 4.", Generation("", [5], 1, 1, 0.0, True, 1))
    score = AskedVerifier().scores(ask, [0], [sample])[0]
    asked = f"{ask.rows[0]['question']}\n\nProposed answer: It is {{question}} 4.\n\n"
    asked += "Is this answer right? Answer Yes or No."
    prompt = lm.encode([{"role": "user", "content": asked}])
    yes, no = (
        plain_log_probabilities(lm, prompt, ids).gather(1, torch.tensor(ids)[:, None]).sum().exp()
        for ids in (lm.encode("Yes"), lm.encode("No"))
    )
    assert score == pytest.approx(float(yes / (yes + no)), rel=1e-5)
    assert AskedVerifier(yes="No", no="Yes").scores(ask, [0], [sample])[0] == pytest.approx(1 - score, rel=1e-5)
    assert AskedVerifier(change=push(lm)).scores(ask, [0], [sample])[0] != pytest.approx(score, rel=1e-3)
    assert (ask.spent[0].calls, ask.spent[0].tokens_out) == (6, 0)
    conditions = {"asked": [BestOf(2, AskedVerifier())], "other": [BestOf(2, AskedVerifier(tiny_lm("gpt2")))]}
    rows = evaluate(lm, word_problems, conditions, n=2, max_new_tokens=4).rows
    assert rows[rows.condition == "asked"].scores.tolist() != rows[rows.condition == "other"].scores.tolist()


def test_a_verifier_s_records_are_judged_solutions(five: pd.DataFrame, word_problems: Task) -> None:
    records = verifier_records(word_problems.rows("test", n=6), five.samples.tolist())
    assert len(records) == sum(len({each["output"] for each in samples}) for samples in five.samples)
    words = Counter(record["messages"][-1]["content"] for record in records)
    assert set(words) == {"Yes", "No"}


# The probe


def test_a_probe_reads_the_mean_state_and_says_where_it_came_from(lab: LM, word_problems: Task, tmp_path: Path) -> None:
    settings = {"strategy": SHOTS_3, "n": 10, "samples": 3, "temperature": 1.0, "max_new_tokens": 70}
    probe = fit_probe(lab, word_problems, tmp_path / "probe.safetensors", **settings)
    again = fit_probe(lab, word_problems, tmp_path / "again.safetensors", batch_size=20, **settings)
    assert (probe.digest, probe.auroc) == (again.digest, again.auroc)
    assert probe.layer == 2 * len(lab.blocks) // 3
    rows = evaluate(lab, word_problems, {"p": [SHOTS_3, BestOf(2, probe)]}, n=2, max_new_tokens=80).rows
    ask = Ask(lab, word_problems, word_problems.rows(n=2), SHOTS_3, max_new_tokens=80)
    from safetensors.torch import load_file

    held = load_file(probe.path)
    for place, scores in enumerate(rows.scores):
        prompt = ask.prompt(place)
        for one, score in zip(
            ask.generate([prompt] * 2, [place] * 2, temperature=0.7, draws=[0, 1]), scores, strict=True
        ):
            with torch.no_grad():
                ids = torch.tensor([lab.encode(prompt) + one.token_ids])
                states = lab.model(ids, output_hidden_states=True).hidden_states[probe.layer + 1][0]
            logit = states[-len(one.token_ids) :].mean(0) @ held["weights"] + held["bias"]
            assert score == pytest.approx(float(logit.sigmoid()), rel=1e-4)
    Path(probe.path).write_bytes(b"other")
    with pytest.raises(ValueError, match="is not the file"):
        BestOf(2, probe).solve(ask)
    with pytest.raises(ValueError, match=r"layers 0 to"):
        fit_probe(lab, word_problems, tmp_path / "x", layer=99)
    other = Probe(again.path, again.digest, 1)
    with pytest.raises(ValueError, match="Fit one for this model"):
        BestOf(2, other).solve(Ask(tiny_lm("llama"), word_problems, ask.rows, max_new_tokens=2))


def test_a_probe_of_states_that_differ_finds_it_and_of_noise_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    noise, right = torch.randn(400, 8, generator=generator), torch.rand(400, generator=generator) > 0.5
    owners = [place // 4 for place in range(400)]
    shifted = noise + right[:, None] * torch.tensor([6.0, *[0.0] * 7])
    assert _held_out(shifted, right, owners) > 0.99
    assert 0.35 < _held_out(noise, right, owners) < 0.65
    weights, bias = _logistic(shifted, right)
    assert ((shifted @ weights + bias > 0) == right).float().mean() > 0.98


# From stored samples


def test_pass_k_is_humaneval_s_formula_and_the_enumeration() -> None:
    for n in range(1, 8):
        for c, k in product(range(n + 1), range(1, n + 1)):
            right = [place < c for place in range(n)]
            drawn = list(combinations(right, k))
            published = 1.0 if n - c < k else 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))
            assert pass_k(n, c, k) == pytest.approx(published, abs=1e-12)
            assert pass_k(n, c, k) == pytest.approx(sum(map(any, drawn)) / len(drawn), abs=1e-12)
            for tau in (0.25, 0.5, 0.7, 1.0):
                enough = sum(sum(each) >= math.ceil(tau * k) for each in drawn)
                assert g_pass_k(n, c, k, tau) == pytest.approx(enough / len(drawn), abs=1e-12)
            assert g_pass_k(n, c, k, 1e-6) == pytest.approx(pass_k(n, c, k))
            if k == 1:
                assert pass_k(n, c, 1) == pytest.approx(c / n)


def stored_rows(seed: int, questions: int = 6, n: int = 6) -> pd.DataFrame:
    """Made-up rows whose right answer is 1; some samples have no answer."""
    generator = np.random.default_rng(seed)
    lines = []
    for number in range(questions):
        said = [["1", "2", "3", None][place] for place in generator.integers(0, 4, n)]
        samples = [{"output": f"{each}", "extracted": each, "correct": each == "1"} for each in said]
        line = {"id": str(number), "condition": "made", "samples": samples, "tokens_in": 60, "tokens_out": 12 * number}
        lines.append(line | {"scores": generator.random(n).round(1).tolist()})
    return pd.DataFrame(lines)


def plurality(samples: tuple[dict[str, Any], ...], weights: tuple[float, ...]) -> bool:
    """The vote, written once more: the heaviest answer, the first of equals; without any, the first sample."""
    totals: Counter[str] = Counter()
    for each, weight in zip(samples, weights, strict=True):
        if each["extracted"] is not None:
            totals[each["extracted"]] += weight
    return bool(totals) and totals.most_common(1)[0][0] == "1"


@pytest.mark.parametrize("seed", range(3))
def test_estimates_are_the_mean_over_all_subsets(seed: int) -> None:
    rows = stored_rows(seed)
    for k in (1, 2, 3, 5, 6):
        truth: dict[str, list[float]] = {}
        for samples, scores in zip(rows.samples, rows.scores, strict=True):
            drawn = [[(samples[place], scores[place]) for place in places] for places in combinations(range(6), k)]
            count = [sum(each["correct"] for each, _ in each_drawn) for each_drawn in drawn]
            sides = [tuple(zip(*each_drawn, strict=True)) for each_drawn in drawn]
            best = [max(each_drawn, key=lambda pair: pair[1])[0]["correct"] for each_drawn in drawn]
            found = {
                "pass": [c > 0 for c in count],
                "most": [c >= 0.5 * k for c in count],
                "area": [2 / k * max(0, c - math.ceil(k / 2)) for c in count],
                "majority": [plurality(s, (1.0,) * k) for s, _ in sides],
                "weighted": [plurality(s, w) for s, w in sides],
                "best": best,
            }
            for name, values in found.items():
                truth.setdefault(name, []).append(sum(map(float, values)) / len(drawn))
        tables = {
            "pass": pass_at(rows, [k]), "most": g_pass_at(rows, [k], tau=0.5), "area": mg_pass_at(rows, [k]),
            "majority": majority_at(rows, [k]), "weighted": majority_at(rows, [k], weights="scores"),
            "best": best_of_at(rows, [k]),
        }  # fmt: skip
        for name, table in tables.items():
            assert table.estimate[0] == pytest.approx(np.mean(truth[name]), abs=1e-12), name
            assert table.method[0] == "exact"
        interval = bootstrap_mean(truth["pass"])
        if 0 < interval.estimate < 1:
            assert (tables["pass"].low[0], tables["pass"].high[0]) == pytest.approx((interval.low, interval.high))
        assert tables["pass"].tokens_out[0] == pytest.approx(rows.tokens_out.mean() * k / 6)


def test_questions_of_a_cluster_are_resampled_together() -> None:
    rows = stored_rows(1)
    twice = pd.concat([rows, rows], ignore_index=True)
    alone, apart = pass_at(rows, [2]).iloc[0], pass_at(twice, [2]).iloc[0]
    together = pass_at(twice.assign(cluster=[*rows.id, *rows.id]), [2]).iloc[0]
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    assert apart.high - apart.low < alone.high - alone.low
    sure = pass_at(rows.assign(samples=[[{"extracted": "1", "correct": True, "output": "1"}]] * 6), [1]).iloc[0]
    assert (sure.estimate, sure.low, sure.high) == (1.0, wilson(6, 6).low, 1.0)


def test_many_subsets_are_drawn_and_said_to_be() -> None:
    rows = stored_rows(2, questions=2, n=20)
    table = majority_at(rows, [1, 10])
    assert table.method.tolist() == ["exact", "5000 subsets, seed 0"]
    pd.testing.assert_frame_equal(table, majority_at(rows, [1, 10]))
    picked = subsets(20, 10)
    assert len(set(picked)) > 4500
    assert all(list(each) == sorted(set(each)) for each in picked)
    drawn = np.bincount(np.concatenate(picked), minlength=20) / 5000
    assert np.abs(drawn - 0.5).max() < 0.04  # every place in half of them
    scored = best_of_at(rows, [3], score=lambda sample: float(sample["correct"]))
    assert scored.estimate[0] == pytest.approx(pass_at(rows, [3]).estimate[0])


def test_what_can_t_be_estimated_is_refused(five: pd.DataFrame) -> None:
    rows = stored_rows(0)
    with pytest.raises(ValueError, match="1 to 6"):
        pass_at(rows, [7])
    with pytest.raises(ValueError, match="of one"):
        pass_at(pd.concat([rows, rows.assign(condition="other")]), [1])
    with pytest.raises(ValueError, match="stored no samples"):
        pass_at(rows.drop(columns="samples"), [1])
    with pytest.raises(ValueError, match="no column 'scores'"):
        best_of_at(five, [2])
    with pytest.raises(ValueError, match="tau=0"):
        g_pass_at(rows, [1], tau=0)


# Programs and code


@needs_sandbox
def test_a_program_is_judged_as_by_the_task_of_programs(lab: LM, word_problems: Task) -> None:
    rows = evaluate(lab, word_problems, {"p": [Program()]}, n=4, max_new_tokens=70).rows
    asked = {"greedy": [SHOTS]}
    other = evaluate(lab, program_task(word_problems), asked, n=4, max_new_tokens=70).rows
    assert rows.program.tolist() == other.output.tolist()
    assert rows.prompt.tolist() == other.prompt.tolist()
    assert rows.correct.tolist() == other.correct.tolist()
    assert rows.extracted.fillna("").tolist() == other.extracted.fillna("").tolist()
    assert (rows.ran == "ran to its end").all() == (~rows.unparsed).all()


@needs_sandbox
def test_kept_rows_of_programs_depend_on_their_own_examples(lm: LM, word_problems: Task, tmp_path: Path) -> None:
    def rows(seed: int) -> list[str]:
        def draw(split: str, n: int | None, own: int) -> list[dict[str, Any]]:
            return word_problems.draw(split, n, seed if split == "tuning" else own)

        changed = replace(word_problems, draw=draw)
        found = evaluate(lm, changed, {"p": [Program(shots=1)]}, n=1, max_new_tokens=2, out=tmp_path / "out")
        return found.rows.prompt.tolist()

    assert rows(1) != rows(2)
    assert rows(1) == rows(1)


@needs_sandbox
def test_a_program_that_fails_says_why(lm: LM, word_problems: Task) -> None:
    rows = word_problems.rows(n=4)
    texts = [f"```python\nprint({rows[0]['answer']})\n```", "1/0", "x = 1", "<think>print(1)"]
    answers = Program(shots=1).solve(Ask(Scripted(lm, texts), word_problems, rows))  # type: ignore[arg-type]
    assert [answer.text for answer in answers] == [rows[0]["answer"], "", "", ""]
    assert [answer.facts["ran"] for answer in answers] == [
        "ran to its end", "exit code 1: ZeroDivisionError: division by zero", "printed nothing",
        "no program in the answer",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="can't go with it"):
        Program().solve(Ask(lm, word_problems, rows, zero_shot()))


@dataclass(frozen=True)
class Canned:
    """The question's own solution and two that are wrong, as samples."""

    def solve(self, ask: Ask) -> list[Answer]:
        return [
            Answer("    return None", samples=("    return None", str(row["answer"]), "    return None"))
            for row in ask.rows
        ]


@needs_sandbox
def test_pass_at_k_of_code_runs_the_unit_tests(lm: LM, data_folder: Path) -> None:
    task = load_task("humaneval", path=data_folder)
    rows = evaluate(lm, task, {"canned": [Canned()]}, n=3).rows
    assert [[each["correct"] for each in samples] for samples in rows.samples] == [[False, True, False]] * 3
    rows = rows.assign(tokens_in=0, tokens_out=0)
    assert pass_at(rows, [1, 2, 3]).estimate.tolist() == pytest.approx([1 / 3, 2 / 3, 1.0])
    sampled = evaluate(lm, task, {"s": [Samples(2)]}, n=2, max_new_tokens=8).rows
    assert pass_at(sampled, [1, 2]).estimate.tolist() == [0.0, 0.0]


# Prompts, base models, thinking


def test_wordings_stand_behind_the_question_in_the_user_s_turn(word_problems: Task) -> None:
    row = word_problems.rows(n=1)[0]
    assert messages(word_problems, row, zero_shot()) == [
        {"role": "user", "content": f"{row['question']}\n\nLet's think step by step."}
    ]
    assert messages(word_problems, row, short_answer())[-1]["content"].endswith("Answer with the number only.")
    assert zero_shot("Go slowly.").suffix == "Go slowly."
    with pytest.raises(ValueError, match="Kinds: number"):
        short_answer("poem")


def test_any_task_can_show_direct_answers(word_problems: Task) -> None:
    bare = [{key: row[key] for key in ("id", "question", "answer")} for row in word_problems.rows("tuning", n=5)]
    task = replace(word_problems, draw=lambda split, n, seed: bare)
    *shown, _ = messages(task, bare[0], few_shot("direct", 2))
    answers = {row["question"]: row["answer"] for row in bare}
    for question, answer in zip(shown[::2], shown[1::2], strict=True):
        assert answer["content"] == f"The answer is {answers[question['content']]}."
    with pytest.raises(ValueError, match="no worked solution in style 'steps'"):
        messages(task, bare[0], few_shot("steps", 2))


PICTURES = {name for name, (_, why) in REFUSED.items() if "leaves words" in why or "'text'" in why}
TEMPLATES = [*(name for name in ALL if name.removesuffix("_training") not in PICTURES), "none", "thinking"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_example_s_answer_stands_directly_behind_its_question(name: str, lm: LM, word_problems: Task) -> None:
    own = {"none": None, "thinking": THINKING}
    rendered = templated(lm, own[name]) if name in own else replace(lm, tokenizer=tokenizer_of(name))
    row = word_problems.rows(n=1)[0]
    turns = word_problems.messages(row, replace(SHOTS_3, suffix="Think."))
    text, ends, gaps = rendered.render(turns), 0, []
    for turn in turns:
        assert text.count(turn["content"]) == 1, turn
        start = text.index(turn["content"], ends)  # in the order asked
        gaps.append(text[ends:start])
        ends = start + len(turn["content"])
    opens_user, opens_answer, tail = gaps[2::2], gaps[1::2], text[ends:]
    assert len(set(opens_user)) == len(set(opens_answer)) == 1
    assert opens_user[0] != opens_answer[0]
    asked = rendered.render([turns[-1]])  # a question alone: what opens its turn, and the answer's
    assert asked.endswith(tail)
    alone = asked[: asked.index(turns[-1]["content"])]
    common = next(size for size in range(len(alone), -1, -1) if opens_user[0].endswith(alone[len(alone) - size :]))
    assert common >= min(4, len(alone))
    opening = opens_answer[0].partition("<think>")[0].rstrip()  # a closed block of no thoughts may stand in front
    assert tail.startswith(opening) or opening.startswith(tail)  # some go on with a channel, or with whom it is for


@pytest.mark.parametrize("template", [None, THINKING])
def test_all_solvers_work_without_a_template_and_with_thoughts(
    lm: LM, word_problems: Task, template: str | None
) -> None:
    other = templated(lm, template)
    conditions: dict[str, Any] = {
        "greedy": [], "told": [short_answer()], "shots": [few_shot("direct", 2)], "samples": [zero_shot(), Samples(2)],
        "vote": [SelfConsistency(2)], "best": [BestOf(2)], "asked": [BestOf(2, AskedVerifier())],
        "two": [ThinkThenAnswer(answer_tokens=4)],
    }  # fmt: skip
    rows = evaluate(other, word_problems, conditions, n=2, max_new_tokens=8).rows
    assert rows.groupby("condition").size().eq(2).all()
    unclosed = rows[rows.condition != "two"]
    if template:
        assert unclosed.output.str.startswith("<think>\n").all()
        assert unclosed.unparsed.all()  # eight tokens of thoughts are no answer, whatever numbers they hold
    else:
        assert rows.prompt.str.endswith("\n\nAnswer:").all()
        assert not rows.output.str.contains("<think>").any()


def test_votes_are_cast_by_final_answers_not_by_thoughts(lm: LM, word_problems: Task) -> None:
    said = ["<think>The answer is 5.</think>The answer is 7.", "<think>The answer is 5.", "The answer is 7."]
    said += ["<think>It is 7.</think>The answer is 5."]
    rows = word_problems.rows(n=1)
    (answer,) = SelfConsistency(4).solve(Ask(Scripted(lm, said), word_problems, rows))  # type: ignore[arg-type]
    assert (answer.text, answer.facts) == (said[0], {"votes": 2, "voters": 3, "agreement": 0.5})
    opened = templated(lm, THINKING)
    said = ["The answer is 5.", "The answer is 5.", "So 5.</think>The answer is 7."]
    (answer,) = SelfConsistency(3).solve(Ask(Scripted(opened, said), word_problems, rows))  # type: ignore[arg-type]
    assert word_problems.verify(rows[0], answer.text).extracted == "7"
    assert answer.facts["voters"] == 1


def test_two_stages_ask_for_the_answer_outside_of_the_thoughts(lm: LM, word_problems: Task) -> None:
    rows = word_problems.rows(n=1)
    for template, middle in ((THINKING, "\n</think>\n\n"), (None, "\n")):
        scripted = Scripted(templated(lm, template), [" 3+4=7", " 7."])
        (answer,) = ThinkThenAnswer().solve(Ask(scripted, word_problems, rows))  # type: ignore[arg-type]
        first, second = scripted.prompts
        assert first.endswith("Let's think step by step.")
        assert second == first + " 3+4=7" + middle + "Therefore, the answer is"
        assert word_problems.verify(rows[0], answer.text).extracted == "7"


def test_what_can_t_be_sampled_is_refused(lm: LM, word_problems: Task) -> None:
    for wrong, told in (
        (lambda: Samples(0), "whole number"),
        (lambda: Samples(3, 0.0), "all would be the same"),
        (lambda: SelfConsistency(3, top_p=0.0), "above 0 to 1"),
        (lambda: BestOf(3, "nicest"), "is no score"),
        (lambda: AskedVerifier(wording="Right?"), "must hold"),
        (lambda: AskedVerifier(no="Yes"), "two different words"),
    ):
        with pytest.raises(ValueError, match=told):
            wrong()
    keys = [Strategy(suffix=""), Strategy(suffix="x")]
    assert messages(word_problems, word_problems.rows(n=1)[0], keys[0]) != messages(
        word_problems, word_problems.rows(n=1)[0], keys[1]
    )
