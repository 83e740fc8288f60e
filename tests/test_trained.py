"""Trained vectors: the loss falls, held-out answers of the same kind become likelier, the base stays as it was."""

import math

import pytest
import torch

from tests.test_interventions import cache_edit, vector
from tests.tiny import ARCHITECTURES, tiny_lm
from workbench.interventions import Intervention
from workbench.interventions.trained import Answered, log_likelihood, train_vector
from workbench.models import LM, ModelError

WORDS = ["cat", "dog", "sun", "map", "fig", "oak", "elm", "ink", "jam", "key", "log", "net"]
QUESTIONS = [[{"role": "user", "content": f"Say {word}{'!' * (number % 3)}"}] for number, word in enumerate(WORDS)]
SFT = [{"messages": [*turns, {"role": "assistant", "content": "aaa bbb"}]} for turns in QUESTIONS]
PREFERENCES = [{"messages": turns, "chosen": "aaa bbb", "rejected": "zzz yyy x"} for turns in QUESTIONS]


def likelihood(lm: LM, turns: list[dict], answer: str, x: Intervention) -> float:
    """From the definition: one text alone, under `lm.apply`, token by token."""
    prompt = lm.encode(turns)
    ids = prompt + lm.encode(answer) + [lm.tokenizer.eos_token_id]
    with torch.no_grad(), lm.apply(x, prompt_lengths=[len(prompt)]):
        scores = lm.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
    return sum(scores[place - 1, ids[place]].item() for place in range(len(prompt), len(ids)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("positions", ["generated", "last"])
def test_answers_become_likelier_and_the_base_is_untouched(architecture: str, positions: str) -> None:
    lm = tiny_lm(architecture)
    hooks = [len(module._forward_hooks) for module in lm.model.modules()]
    before = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    losses: list[float] = []
    v = train_vector(
        lm, SFT[:8], [1], positions=positions, steps=30, batch_size=4, learning_rate=0.1,
        progress=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    assert len(losses) == 30
    assert sum(losses[-5:]) < sum(losses[:5])
    gains = [likelihood(lm, turns, "aaa bbb", v) - likelihood(lm, turns, "aaa bbb", 0 * v) for turns in QUESTIONS[8:]]
    assert min(gains) > 0
    assert v.positions == positions
    assert all(torch.equal(tensor, before[name]) for name, tensor in lm.model.state_dict().items())
    assert [len(module._forward_hooks) for module in lm.model.modules()] == hooks
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in lm.model.parameters())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_preference_moves_both_ways(architecture: str) -> None:
    lm = tiny_lm(architecture)
    losses: list[float] = []
    v = train_vector(
        lm, PREFERENCES[:8], [0, 1], loss="preference", steps=40, batch_size=4, learning_rate=0.1,
        progress=lambda step, loss: losses.append(loss),
    )  # fmt: skip
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: without a vector neither is preferred
    assert sum(losses[-5:]) < sum(losses[:5])

    def margin(turns: list[dict], strength: float) -> float:
        return likelihood(lm, turns, "aaa bbb", strength * v) - likelihood(lm, turns, "zzz yyy x", strength * v)

    for turns in QUESTIONS[8:]:
        assert margin(turns, -1) < margin(turns, 0) < margin(turns, 1)


def test_gradient_and_likelihood_are_the_definition() -> None:
    lm = tiny_lm("llama")
    rows = [Answered(lm.encode(turns), [*lm.encode("aaa bbb"), lm.tokenizer.eos_token_id]) for turns in QUESTIONS[:3]]
    alone = [likelihood(lm, turns, "aaa bbb", 0 * train_vector(lm, SFT[:1], 1, steps=1)) for turns in QUESTIONS[:3]]
    torch.testing.assert_close(log_likelihood(lm, rows), torch.tensor(alone), atol=1e-4, rtol=1e-5)
    v = train_vector(lm, SFT[:3], 1, steps=1, learning_rate=1e-3, batch_size=3)  # Adam's first step: -rate * sign

    def change(axis: int) -> float:
        bump = torch.zeros(lm.d_model)
        bump[axis] = 0.05
        up, down = (type(v)({1: sign * bump}, positions="generated") for sign in (1, -1))
        return sum(likelihood(lm, turns, "aaa bbb", up) - likelihood(lm, turns, "aaa bbb", down)
                   for turns in QUESTIONS[:3])  # fmt: skip

    slopes = torch.tensor([change(axis) for axis in range(8)])
    clear = slopes.abs() > slopes.abs().max() / 10
    assert torch.equal(v.vectors[1][:8].sign()[clear], slopes.sign()[clear])


def test_the_same_seed_gives_the_same_vector() -> None:
    lm = tiny_lm("llama")
    a, b, c = (train_vector(lm, SFT, 1, steps=3, batch_size=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a.vectors[1], b.vectors[1])
    assert not torch.equal(a.vectors[1], c.vectors[1])


@pytest.mark.parametrize(
    ("records", "arguments", "message"),
    [
        (SFT, {"loss": "dpo"}, "sft, preference"),
        (SFT, {"steps": 0}, "steps=0.*at least 1"),
        ([], {}, "records=0"),
        (SFT, {"layers": [7]}, r"got \[7\]"),
        (SFT, {"layers": []}, "layers=0"),
        (PREFERENCES, {}, "end in an assistant turn"),
        (SFT, {"loss": "preference"}, "texts chosen and rejected"),
        ([{"messages": []}], {}, "end in an assistant turn"),
    ],
)
def test_what_cannot_be_trained_on_is_explained(records: list, arguments: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        train_vector(tiny_lm("llama"), records, **{"layers": [1], **arguments})


def test_the_preference_loss_is_bipo_term_by_term() -> None:
    """-log s(d b ((log p(chosen | d v) - log p(chosen)) - (log p(rejected | d v) - log p(rejected)))), d = 1 or -1."""
    lm, records, signs = tiny_lm("llama"), PREFERENCES[:3], set()
    losses: list[float] = []
    options = {"loss": "preference", "batch_size": 3, "learning_rate": 0.3, "positions": "all", "seed": 0}
    train_vector(lm, records, [0, 2], steps=6, progress=lambda step, loss: losses.append(loss), **options)
    for step in range(1, 6):
        v = train_vector(lm, records, [0, 2], steps=step, **options)
        expected = {}
        for sign in (1.0, -1.0):
            values = []
            for record in records:
                chosen, rejected = (
                    likelihood(lm, record["messages"], record[side], sign * v)
                    - likelihood(lm, record["messages"], record[side], 0 * v)
                    for side in ("chosen", "rejected")
                )
                values.append(math.log1p(math.exp(-sign * 0.1 * (chosen - rejected))))
            expected[sign] = sum(values) / len(values)
        near = min(expected, key=lambda sign: abs(expected[sign] - losses[step]))
        assert losses[step] == pytest.approx(expected[near], rel=1e-3)
        assert abs(expected[1.0] - expected[-1.0]) > 10 * abs(losses[step] - expected[near])
        signs.add(near)
    assert signs == {1.0, -1.0}


def test_an_enclosing_block_that_counts_from_the_prompt_is_refused() -> None:
    lm = tiny_lm("llama")
    for x in (vector(lm, 0, "generated"), vector(lm, 0, slice(-2, None)), cache_edit(lm)):
        with lm.apply(x), pytest.raises(ModelError, match=r"where a prompt ends.*'all' positions"):
            train_vector(lm, SFT, 1, steps=1)
    outer, losses = vector(lm, 0, "all"), list[float]()
    with lm.apply(outer):
        train_vector(lm, SFT[:2], 1, steps=1, batch_size=2, progress=lambda step, loss: losses.append(loss))
    lengths = [len(lm.encode("aaa bbb")) + 1] * 2
    expected = [likelihood(lm, turns, "aaa bbb", outer) for turns in QUESTIONS[:2]]
    assert losses[0] == pytest.approx(-sum(expected) / sum(lengths), rel=1e-4)
