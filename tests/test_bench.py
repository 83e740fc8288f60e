"""`make bench` compares equal work: on a tiny model its plain loops and the workbench agree, and each has a ratio."""

import pytest
import torch

from bench import likelihood, static, steering
from bench.__main__ import main
from bench.generation import cells, evaluation, generation
from tests.tiny import tiny_lm
from workbench.tasks import Task


def test_plain_loops_and_the_workbench_agree(word_problems: Task) -> None:
    lm = tiny_lm("llama")
    lines = generation(lm, word_problems, 3, 6, 1)
    assert [line["same result"] for line in lines] == ["3 of 3 token for token"] * 4
    lines += (found := evaluation(lm, word_problems, 2, 6, 1))
    assert found[0]["same result"] == "6 of 6 verdicts"
    lines += (found := cells(lm, word_problems, 2, 4, 1))
    assert found[0]["same result"] == "32 of 32 token for token"  # two steered layers x eight strengths x two prompts
    assert all(line["ratio"] > 0 for line in lines)


def test_steering_by_hand_and_by_the_workbench_decode_the_same(word_problems: Task) -> None:
    lm = tiny_lm("llama")
    small = {"hidden_size": 28, "intermediate_size": 40, "num_hidden_layers": 3, "vocab_size": len(lm.tokenizer)}
    lines = steering.lines(lm, word_problems, 4, 1, tokens=16, real=small)
    assert len(lines) == 3 + 4 + 3
    for line in lines:
        rows = 4 if "batch 4" in line["what"] else 1
        assert line["same result"].startswith(f"{rows} of {rows} rows as ")
        assert line["verdict"] in ("within", "above", "not resolved")


def test_a_static_cache_decodes_the_same_under_steering(word_problems: Task) -> None:
    lm = tiny_lm("llama")
    small = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 640,
    }  # fmt: skip
    found = static.lines(lm.tokenizer, ("1.7B",), (1, 3), tokens=12, device="cpu", **small)
    assert [line["same result"] for line in found] == ["1 of 1 rows", "3 of 3 rows"]
    assert all(isinstance(line["workbench, ms"], float) for line in found)


def test_a_pass_over_strengths_scores_as_a_pass_each_and_as_plain_forwards() -> None:
    requests = [("one two three four", " five"), ("one two three four", " six"), ("two", " three four")]
    lines = likelihood.strengths(tiny_lm("llama"), requests, 1)
    assert [line["same scores"] for line in lines] == ["48 of 48"] * 2  # sixteen strengths x three requests
    assert all(line["ratio"] > 0 for line in lines)


@pytest.mark.parametrize(("low", "high", "said"), [(0.0, 0.01, "within"), (0.03, 0.05, "above"), (0.0, 0.05, "not")])
def test_a_verdict_needs_the_whole_interval(low: float, high: float, said: str) -> None:
    assert steering.verdict(low, high, 0.02).startswith(said)


def test_one_part_alone_says_what_it_ran_on(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    main(["--model", "lab-small", "--only", "grid", "--n", "2", "--limit", "3", "--repeats", "1"])
    torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert "torch threads" in said and "transformers" in said
    assert "token for token" in said and "extract," not in said
