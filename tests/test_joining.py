"""Rows that join a batch under way get what they get alone: other prompts, samples, changes and architectures."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.tiny import tiny_lm
from workbench import decode as decoding
from workbench.interventions import Intervention, Residual, ScaleTokens
from workbench.models import LM

WORDS = "What is 2+3? Then add 7, take 4 away and say how many apples are left of them all."
PROMPTS = [WORDS[: 4 + 3 * (7 * number % 23)] for number in range(23)]
SHARED = ["Answer as briefly as you can, one number is enough. " + prompt for prompt in PROMPTS]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows joined, each time that some did."""
    counts: list[int] = []
    real = decoding.Batch.go_on

    def go_on(batch: decoding.Batch, kept: list[int], others: list[decoding.Batch]) -> None:
        if others and len(kept) < len(batch.rows):
            counts.append(sum(len(other.rows) for other in others))
        real(batch, kept, others)

    monkeypatch.setattr(decoding.Batch, "go_on", go_on)
    return counts


def alone(lm: LM, prompts: list[str], changes: Sequence[Intervention | None], **options: Any) -> list[list[int]]:
    seeds = [1000 + number for number in range(len(prompts))]
    return [
        lm.generate([prompt], change, seed=[seed], **options)[0].token_ids
        for prompt, change, seed in zip(prompts, changes, seeds, strict=True)
    ]


def together(lm: LM, prompts: list[str], changes: Sequence[Intervention | None], **options: Any) -> list[list[int]]:
    seeds = [1000 + number for number in range(len(prompts))]
    return [one.token_ids for one in lm.generate(prompts, changes, seed=seeds, batch_size=5, **options)]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "mistral"])
@pytest.mark.parametrize("prompts", [PROMPTS, SHARED], ids=["different", "one beginning"])
def test_samples_equal_those_alone(architecture: str, prompts: list[str], joined: list[int]) -> None:
    lm, none = tiny_lm(architecture), [None] * len(prompts)
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 1.3, "stop": ("a", "e")}
    assert together(lm, prompts, none, **options) == alone(lm, prompts, none, **options)
    assert sum(joined) >= 10 or architecture == "mistral"  # a sliding window takes no others in


@pytest.mark.parametrize("span", ["last", "generated", "all", slice(3, -1), slice(2, None), (0, -1)])
def test_every_row_keeps_its_own_change(lab: LM, span: Any, joined: list[int]) -> None:
    torch.manual_seed(0)
    vectors = [torch.randn(lab.d_model) for _ in range(3)]
    changes = [None if number % 4 == 3 else Residual({2: vectors[number % 4]}, span, 3.0) for number in range(23)]
    options: dict[str, Any] = {"max_new_tokens": 16, "stop": ("a", "3")}
    found = together(lab, SHARED, changes, **options)
    assert found == alone(lab, SHARED, changes, **options)
    assert found != together(lab, SHARED, [None] * 23, **options)
    assert joined


def test_bias_and_penalty_follow_the_row(lab: LM, joined: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lab.model.generation_config, "repetition_penalty", 1.3)
    none = [None] * len(PROMPTS)
    options: dict[str, Any] = {"max_new_tokens": 16, "stop": ("a", "3"), "bias": {40: 3.0, 41: -2.0}}
    options |= {"bias_temperature": 2.0, "temperature": 0.7}
    assert together(lab, PROMPTS, none, **options) == alone(lab, PROMPTS, none, **options)
    assert joined


def test_edits_of_the_cache_take_no_others_in(lab: LM, joined: list[int]) -> None:
    changes: list[Intervention | None] = [ScaleTokens((0, 3), values=0.2)] * len(SHARED)
    options: dict[str, Any] = {"max_new_tokens": 8, "stop": ("a", "3")}
    assert together(lab, SHARED, changes, **options) == alone(lab, SHARED, changes, **options)
    assert not joined


def test_prompts_with_one_beginning_read_it_once(lab: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    real = lab.base.forward

    def forward(*args: Any, **call: Any) -> Any:
        if call["input_ids"].shape[1] > 1:
            read.append(tuple(call["input_ids"].shape))
        return real(*args, **call)

    monkeypatch.setattr(lab.base, "forward", forward)
    lab.generate(SHARED, max_new_tokens=16, stop=("a", "3"), batch_size=5)
    tokens = [len(lab.encode(prompt)) for prompt in SHARED]
    assert read[0][0] == 1 and read[0][1] >= min(tokens) - 2 and len(read) > 3
    assert sum(rows for rows, _ in read[1:]) == len(SHARED)
    assert max(width for _, width in read[1:]) == max(tokens) - read[0][1]


def test_memory_that_runs_out_when_others_join_costs_nothing_but_time(
    lab: LM, joined: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = [one.token_ids for one in lab.generate(PROMPTS, max_new_tokens=16, stop=("a", "3"), batch_size=8)]
    assert joined
    real, calls, told = decoding.Batch.go_on, [0], list[int]()

    def go_on(batch: decoding.Batch, kept: list[int], others: list[decoding.Batch]) -> None:
        calls[0] += bool(others)
        if calls[0] == 3:
            calls[0] += 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        real(batch, kept, others)

    monkeypatch.setattr(decoding.Batch, "go_on", go_on)
    found = lab.generate(
        PROMPTS, max_new_tokens=16, stop=("a", "3"), batch_size=8, progress=lambda done, total: told.append(done)
    )
    assert calls[0] > 3
    assert [one.token_ids for one in found] == plain
    assert told[-1] == len(PROMPTS) and all(a < b for a, b in pairwise(told))
