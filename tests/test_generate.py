"""Batched generation against transformers' own greedy generation of each prompt alone."""

from itertools import pairwise

import jaxtyping
import pytest
import torch

from tests.tiny import ARCHITECTURES, greedy, tiny_lm
from workbench.choosing import Decoding, sample
from workbench.generate import generate
from workbench.models import ModelError

PROMPTS = [
    "<|user|>What is 2+3?<|end|><|assistant|>\n",
    "x y",
    "abcdefgh " * 5,
    "<|user|>Hi<|end|><|assistant|>\n",
    "<|user|>What is 2+3? And then 7 times 8?<|end|><|assistant|>\n",
]
SHOTS = "<|user|>What is 1+1?<|end|><|assistant|>\n2<|end|>"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 4, None])
def test_greedy_equals_transformers_row_by_row(architecture: str, batch_size: int | None) -> None:
    lm = tiny_lm(architecture)
    found = lm.generate(PROMPTS, max_new_tokens=12, batch_size=batch_size)
    assert [row.token_ids for row in found] == [greedy(lm, prompt) for prompt in PROMPTS]
    assert [row.tokens_in for row in found] == [len(lm.encode(prompt)) for prompt in PROMPTS]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_that_end_leave_the_batch_and_change_nobody(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm(architecture)
    common = [token for prompt in PROMPTS[:3] for token in greedy(lm, prompt)[2:6]]
    monkeypatch.setattr(lm.model.generation_config, "eos_token_id", [*common, 1])
    found = lm.generate(PROMPTS, max_new_tokens=12)
    assert [row.token_ids for row in found] == [greedy(lm, prompt) for prompt in PROMPTS]
    assert len({row.tokens_out for row in found}) > 1
    assert [row.finished for row in found] == [row.token_ids[-1] in [*common, 1] for row in found]
    assert all(row.forward_passes == row.tokens_out for row in found)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_shared_prefix_changes_no_token(architecture: str) -> None:
    lm = tiny_lm(architecture)
    prompts = [SHOTS + prompt for prompt in PROMPTS]
    found = lm.generate(prompts, max_new_tokens=8)
    assert [row.token_ids for row in found] == [greedy(lm, prompt, 8) for prompt in prompts]
    shared = architecture != "gemma3"  # its sliding cache counts padding, so the prefix is not shared
    assert all(row.forward_passes == row.tokens_out + shared for row in found)


def test_repetition_penalty_of_the_model_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    plain = [greedy(lm, prompt) for prompt in PROMPTS]
    monkeypatch.setattr(lm.model.generation_config, "repetition_penalty", 3.0)
    found = [row.token_ids for row in lm.generate(PROMPTS, max_new_tokens=12)]
    assert found == [greedy(lm, prompt) for prompt in PROMPTS]
    assert found != plain


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    lm = tiny_lm("qwen3")
    options = {"max_new_tokens": 12, "temperature": 1.5, "top_p": 0.9}
    together = [row.token_ids for row in lm.generate(PROMPTS * 2, seed=3, **options)]
    assert together == [row.token_ids for row in lm.generate(PROMPTS * 2, seed=3, batch_size=1, **options)]
    assert together[:5] != together[5:]  # the same prompt twice gets two samples
    assert together != [row.token_ids for row in lm.generate(PROMPTS * 2, seed=4, **options)]
    seeds = list(range(10))
    one = lm.generate([PROMPTS[2]], seed=[seeds[7]], **options)[0]
    assert one.token_ids == lm.generate(PROMPTS * 2, seed=seeds, **options)[7].token_ids


def test_a_tiny_nucleus_is_greedy() -> None:
    lm = tiny_lm("llama")
    found = lm.generate(PROMPTS, max_new_tokens=12, temperature=1.0, top_p=1e-6)
    assert [row.token_ids for row in found] == [greedy(lm, prompt) for prompt in PROMPTS]


def test_sample_follows_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(20_000, 1)
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(sample(logits, draws), minlength=4) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015, rtol=0)
    nucleus = torch.bincount(sample(logits, draws, top_p=0.7), minlength=4) / 20_000
    torch.testing.assert_close(nucleus, torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0)


def test_stop_strings_cut_the_text() -> None:
    lm = tiny_lm("llama")
    plain = lm.generate(PROMPTS[:2], max_new_tokens=12)
    word = plain[0].text[4:6]
    found = lm.generate(PROMPTS[:2], max_new_tokens=12, stop=[word])
    assert found[0].text == plain[0].text.split(word)[0]
    assert found[0].finished
    assert plain[0].token_ids[: found[0].tokens_out] == found[0].token_ids
    assert found[1].token_ids == plain[1].token_ids or word in plain[1].text


def test_out_of_memory_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    forward, sizes = lm.model.forward, []

    def small_memory(*args: object, **kwargs: object) -> object:
        sizes.append(len(kwargs["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    plain = lm.generate(PROMPTS, max_new_tokens=6)
    monkeypatch.setattr(lm.model, "forward", small_memory)
    found = lm.generate(PROMPTS, max_new_tokens=6)
    assert [row.token_ids for row in found] == [row.token_ids for row in plain]
    assert sizes[0] == 5


def test_progress_counts_rows() -> None:
    seen: list[tuple[int, int]] = []
    generate(tiny_lm("llama"), PROMPTS, None, Decoding(2), batch_size=2, progress=lambda *now: seen.append(now))
    assert [total for _, total in seen] == [5, 5, 5]
    assert all(a < b for (a, _), (b, _) in pairwise(seen))


def test_chat_messages_go_through_the_template() -> None:
    lm = tiny_lm("llama")
    chat = [{"role": "user", "content": "What is 2+3?"}]
    assert lm.generate([chat], max_new_tokens=5)[0].token_ids == lm.generate(PROMPTS[:1], max_new_tokens=5)[0].token_ids


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "one string"}, "Give a list of prompts"),
        ({"prompts": [""]}, "no tokens"),
        ({"prompts": ["a"], "max_new_tokens": 0}, "at least 1"),
        ({"prompts": ["a"], "temperature": -1.0}, "temperature"),
        ({"prompts": ["a"], "top_p": 0.0}, "top_p"),
        ({"prompts": ["a"], "stop": [""]}, "empty string"),
        ({"prompts": ["a"], "max_new_tokens": 4096}, "4096 positions"),
        ({"prompts": ["a", "b"], "seed": [1]}, "1 seeds for 2 prompts"),
        ({"prompts": ["a", "b"], "interventions": [None]}, "1 interventions for 2 prompts"),
        ({"prompts": ["a"], "interventions": ["v"]}, "every entry is an intervention or None"),
    ],
)
def test_mistakes_are_explained(arguments: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        tiny_lm("llama").generate(**arguments)


def test_no_prompts_no_generations() -> None:
    assert tiny_lm("llama").generate([]) == []


def test_a_tensor_of_another_shape_than_annotated_is_noticed_here() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="draws"):
        sample(torch.zeros(2, 5), torch.zeros(3))
