"""Maps of low rank against their definition, recomputed for every token, and trained ones against single vectors."""

from pathlib import Path

import jaxtyping
import pytest
import torch

from tests.test_interventions import PROMPTS, TOKENS, assert_same, cache_edit, fingerprint, tokens, vector
from tests.test_trained import PREFERENCES, SFT, likelihood
from tests.tiny import ARCHITECTURES, greedy, tiny_lm
from workbench.interventions import LowRank, load_intervention, random_like, train_vector
from workbench.models import LM, ModelError
from workbench.readouts import trace


def low_rank(lm: LM, positions: object = "all", rank: int = 3, strength: float = 4.0) -> LowRank:
    """A random map whose change is about as long as the state."""
    noise = torch.Generator().manual_seed(1)
    down, up = (torch.randn(rank, lm.d_model, generator=noise) / lm.d_model**0.5 for _ in "du")
    bias = torch.randn(rank, generator=noise)
    return LowRank({1: down}, {1: bias}, {1: up}, positions, strength, lm.name, lm.revision)


def loop(lm: LM, prompt: str, x: LowRank) -> list[int]:
    """From the definition: one text alone, no cache, token by token."""
    ids = lm.encode(prompt)
    length = len(ids)

    def change(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
        result = output.clone()
        for place in range(output.shape[1]):
            if {"all": True, "last": place == length - 1, "generated": place >= length}[str(x.positions)]:
                read = x.down[1] @ output[0, place] + x.bias[1]
                result[0, place] += x.strength * x.up[1].T @ read
        return result

    handle = lm.blocks[1].register_forward_hook(change)
    with torch.no_grad():
        for _ in range(TOKENS):
            ids.append(int(lm.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
    handle.remove()
    return ids[length:]


@pytest.mark.parametrize("positions", ["all", "last", "generated"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_map_is_its_definition_alone_and_in_mixed_batches(architecture: str, positions: str) -> None:
    lm = tiny_lm(architecture)
    x, other = low_rank(lm, positions), vector(lm, 1, "last")
    before, plain = fingerprint(lm), tokens(lm, PROMPTS)
    expected = [loop(lm, prompt, x) for prompt in PROMPTS]
    assert tokens(lm, PROMPTS, x) == expected != plain
    with lm.apply(x):
        assert [greedy(lm, prompt, TOKENS) for prompt in PROMPTS] == expected
    mixed = tokens(lm, [p for p in PROMPTS for _ in "123"], [x, None, other] * len(PROMPTS))
    assert (mixed[::3], mixed[1::3]) == (expected, plain)
    assert mixed[2::3] == tokens(lm, PROMPTS, other)
    assert tokens(lm, PROMPTS, 0 * x) == plain
    assert_same(before, fingerprint(lm))


def test_rank_one_that_reads_nothing_is_a_vector() -> None:
    lm = tiny_lm("llama")
    v = vector(lm, 1, "generated")
    x = LowRank({1: torch.zeros(1, lm.d_model)}, {1: torch.ones(1)}, {1: v.vectors[1][None]}, "generated")
    assert tokens(lm, PROMPTS, 0.7 * x) == tokens(lm, PROMPTS, 0.7 * v)
    both = x.at(positions="last") + v + cache_edit(lm)
    assert tokens(lm, PROMPTS, both) == tokens(lm, PROMPTS, v.at(positions="last") + v + cache_edit(lm))
    table = trace(lm, PROMPTS[0], 0.5 * x, 6)
    assert table.amount.tolist() == pytest.approx([0.5 * float(v.vectors[1].norm())] * len(table), rel=1e-4)


def test_it_is_saved_and_its_random_twin_is_as_large(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    x = 0.5 * low_rank(lm, slice(-2, None))
    back = load_intervention(x.save(tmp_path / "x.safetensors"))
    assert tokens(lm, PROMPTS, back) == tokens(lm, PROMPTS, x)
    twin = random_like(x)
    torch.testing.assert_close(twin.up[1].norm(dim=1), x.up[1].norm(dim=1))
    assert tokens(lm, PROMPTS, twin) != tokens(lm, PROMPTS, x)


@pytest.mark.parametrize("loss", ["sft", "preference"])
def test_a_trained_map_makes_its_answers_likelier(loss: str) -> None:
    lm = tiny_lm("llama")
    records, before = (SFT if loss == "sft" else PREFERENCES), fingerprint(lm)
    x = train_vector(lm, records[:8], 1, rank=2, loss=loss, steps=60)
    assert isinstance(x, LowRank)
    assert x.down[1].shape == x.up[1].shape == (2, lm.d_model)
    assert x.details["rank"] == "2"
    turns = [{"role": "user", "content": "Say bow"}]
    gain = likelihood(lm, turns, "aaa bbb", x) - likelihood(lm, turns, "aaa bbb", 0 * x)
    loss_of_other = likelihood(lm, turns, "zzz yyy x", x) - likelihood(lm, turns, "zzz yyy x", 0 * x)
    assert gain > max(1.0, loss_of_other)
    again = train_vector(lm, records[:8], 1, rank=2, loss=loss, steps=60)
    assert all(torch.equal(part[1], same[1]) for part, same in ((x.up, again.up), (x.down, again.down)))
    assert_same(before, fingerprint(lm))


def test_mistakes_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own shape checks would come first
    lm = tiny_lm("llama")
    one = torch.ones(2, lm.d_model)
    with pytest.raises(ModelError, match=r"Layer 1 has down, bias and up of shapes"):
        LowRank({1: one}, {1: torch.ones(3)}, {1: one})
    with pytest.raises(ModelError, match="Train it again"):
        lm.generate(PROMPTS, LowRank({1: one[:, :5]}, {1: torch.ones(2)}, {1: one[:, :5]}))
    with pytest.raises(ModelError, match=r"layers=\[2\] asked for"):
        low_rank(lm).at(2)
    with pytest.raises(ModelError, match="rank=0"):
        train_vector(lm, SFT, 1, rank=0)
