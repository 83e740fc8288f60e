"""torch.compile takes a steered forward as one graph, without a break, and it says the same."""

import jaxtyping
import pytest
import torch
from torch import _dynamo
from transformers import CompileConfig, DynamicCache

from tests.test_interventions import PROMPTS, cache_edit, vector
from tests.tiny import tiny_lm
from workbench.interventions import Residual
from workbench.interventions.fold import folded
from workbench.models import LM, ModelError


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No graphs of other tests, and none of the tests' own shape checks, which can't be traced."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    _dynamo.reset()


def whole(lm: LM, ids: torch.Tensor, **arguments: object) -> torch.Tensor:
    """Logits of one forward, compiled with breaks forbidden."""
    forward = torch.compile(lambda tokens: lm.model(tokens, **arguments).logits, fullgraph=True, backend="eager")
    with torch.no_grad():
        return forward(ids)


@pytest.mark.parametrize("positions", ["all", "last", "generated", slice(2, -1)], ids=str)
def test_a_steered_forward_is_one_graph(positions: object) -> None:
    lm = tiny_lm("llama")
    ids = torch.tensor([lm.encode(PROMPTS[0]), lm.encode(PROMPTS[0])[::-1]])
    for x in (vector(lm, 1, positions), vector(lm, 1, positions).ablate() + vector(lm, 0, positions).clamp(2.0)):
        each = [x, 0.5 * x]  # rows of their own
        with lm.apply(each, prompt_lengths=[7, 9]), torch.no_grad():
            expected = lm.model(ids, use_cache=False).logits
            torch.testing.assert_close(whole(lm, ids, use_cache=False), expected, atol=1e-4, rtol=1e-4)


def test_a_decode_step_on_a_filled_cache_is_one_graph() -> None:
    lm = tiny_lm("llama")
    ids = torch.tensor([lm.encode(PROMPTS[0])])
    for x in (vector(lm, 1, "generated"), vector(lm, 1, "generated") + cache_edit(lm)):
        outputs = []
        for step in (lambda token, cache: lm.model(token, past_key_values=cache).logits, None):
            cache = DynamicCache(config=lm.model.config)
            with lm.apply(x), torch.no_grad():
                lm.model(ids, past_key_values=cache)
                token = torch.tensor([[9]])
                outputs.append(step(token, cache) if step else whole(lm, token, past_key_values=cache))
        torch.testing.assert_close(*outputs, atol=1e-4, rtol=1e-4)


def test_a_folded_vector_is_one_graph() -> None:
    lm = tiny_lm("llama")
    ids, x = torch.tensor([lm.encode(PROMPTS[0])]), vector(lm, 1)
    with lm.apply(x), torch.no_grad():
        expected = lm.model(ids, use_cache=False).logits
    with folded(lm, x):
        torch.testing.assert_close(whole(lm, ids, use_cache=False), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_steered_generation_on_a_static_cache_is_one_graph(name: str) -> None:
    lm = tiny_lm(name)
    ids = torch.tensor([lm.encode(PROMPTS[0])] * 2)
    arguments = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 10}
    compiled = CompileConfig(backend="eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True  # else transformers compiles on a GPU only
    residual, edit = vector(lm, 1, "generated"), cache_edit(lm)
    for x in (residual, vector(lm, 1, "last"), edit, 0.5 * residual + edit, [residual, 0.3 * residual]):
        expected = [row.token_ids for row in lm.generate([PROMPTS[0]] * 2, x, max_new_tokens=10)]
        with lm.apply(x):
            if name == "qwen3" and not isinstance(x, (Residual, list)):
                with pytest.raises(ModelError, match="brings a prepared one"):
                    lm.model.generate(ids, cache_implementation="static", **arguments)
                continue
            for options in ({}, {"compile_config": compiled}):
                found = lm.model.generate(ids, cache_implementation="static", **arguments, **options)
                rows = [
                    row[: len(wanted)].tolist() for row, wanted in zip(found[:, ids.shape[1] :], expected, strict=True)
                ]
                assert rows == expected
