"""Ablation and clamping of a direction against their definition, recomputed in full for every token, batch 1."""

from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import torch

from tests.test_interventions import PROMPTS, TOKENS, assert_same, cache_edit, fingerprint, tokens, vector
from tests.tiny import ARCHITECTURES, greedy, tiny_lm
from workbench.interventions import Residual, load_intervention
from workbench.models import LM, ModelError


def loop(lm: LM, prompt: str, parts: list[Residual]) -> list[int]:
    """From the definition: every part reads the state as the block left it; spans all, last and generated."""
    ids = lm.encode(prompt)
    length = len(ids)

    def change(module: object, inputs: object, output: torch.Tensor, layer: int) -> torch.Tensor:
        result = output.clone()
        for x in parts:
            if layer not in x.vectors:
                continue
            start = {"all": 0, "last": length - 1, "generated": length}[str(x.positions)]
            stop = length if x.positions == "last" else output.shape[1]
            v = x.vectors[layer]
            u, h = v / v.norm(), output[0, start:stop]
            along = (h @ u)[:, None] * u
            result[0, start:stop] += x.strength * {
                "add": v.expand_as(h), "ablate": -along, "clamp": x.level * v - along
            }[x.operation]  # fmt: skip
        return result

    handles = [
        block.register_forward_hook(lambda m, i, o, layer=layer: change(m, i, o, layer))
        for layer, block in enumerate(lm.blocks)
    ]
    with torch.no_grad():
        for _ in range(TOKENS):
            ids.append(int(lm.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
    for handle in handles:
        handle.remove()
    return ids[length:]


def mixtures(lm: LM) -> list[list[Residual]]:
    v, w = vector(lm, 0), vector(lm, 1)
    return [
        [v.ablate()],
        [w.clamp(2.0)],
        [w.clamp(-1.0).at(positions="generated")],
        [0.5 * v.ablate().at(positions="last"), w.ablate()],
        [v.clamp(3.0), 0.5 * v.at(positions="generated"), w.ablate().at(positions="generated")],
        [w, w.ablate()],
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ablate_and_clamp_are_the_definition(architecture: str) -> None:
    lm = tiny_lm(architecture)
    cases = mixtures(lm)
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(len(cases))]
    expected = [loop(lm, prompt, parts) for prompt, parts in zip(prompts, cases, strict=True)]
    assert tokens(lm, prompts, [sum(parts[1:], parts[0]) for parts in cases]) == expected
    for prompt, parts, answer in zip(prompts, cases, expected, strict=True):
        with lm.apply(sum(parts[1:], parts[0])):
            assert greedy(lm, prompt, TOKENS) == answer
    assert sum(a != b for a, b in zip(expected, tokens(lm, prompts), strict=True)) >= 3  # they do change something


def test_after_ablation_nothing_of_the_direction_is_left() -> None:
    lm = tiny_lm("llama")
    x, ids = vector(lm, 1).ablate(), torch.tensor([lm.encode(PROMPTS[0])])
    unit = x.vectors[1] / x.vectors[1].norm()
    for change, left in ((x, 0.0), (0.25 * x, 0.75), (x.clamp(2.0), None)):
        with torch.no_grad():
            plain = lm.model(ids, output_hidden_states=True).hidden_states[2] @ unit
            with lm.apply(change):
                moved = lm.model(ids, output_hidden_states=True).hidden_states[2] @ unit
        wanted = left * plain if left is not None else torch.full_like(plain, 2 * x.vectors[1].norm().item())
        torch.testing.assert_close(moved, wanted, atol=1e-4, rtol=1e-4)


def test_clamping_to_nothing_is_ablation_and_strength_zero_is_nothing() -> None:
    lm = tiny_lm("llama")
    x = vector(lm, 1)
    assert tokens(lm, PROMPTS, x.clamp(0.0)) == tokens(lm, PROMPTS, x.ablate())
    for change in (0 * x.ablate(), 0 * x.clamp(5.0)):
        assert tokens(lm, PROMPTS, change) == tokens(lm, PROMPTS)


def test_operations_are_saved(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    x = vector(lm, 1).clamp(2.0)
    back = load_intervention(x.save(tmp_path / "x.safetensors"))
    assert isinstance(back, Residual)
    assert (back.operation, back.level) == ("clamp", 2.0)
    assert tokens(lm, PROMPTS, back) == tokens(lm, PROMPTS, x)


def test_an_unknown_operation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own type checks would come first
    with pytest.raises(ModelError, match=r"operation='remove'.*add, ablate, clamp"):
        replace(vector(tiny_lm("llama")), operation="remove")


def test_an_outer_block_may_be_left_before_an_inner_one() -> None:
    lm = tiny_lm("llama")
    one, other = vector(lm, 1), cache_edit(lm)
    before, plain = fingerprint(lm), tokens(lm, PROMPTS)
    outer, inner = lm.apply(one), lm.apply(other)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert [greedy(lm, prompt, TOKENS) for prompt in PROMPTS] == tokens(lm, PROMPTS)  # the inner one goes on
    assert tokens(lm, PROMPTS) != plain
    inner.__exit__(None, None, None)
    assert_same(before, fingerprint(lm))
    assert tokens(lm, PROMPTS) == plain
