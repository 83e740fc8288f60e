"""Gates against deciding each prompt by hand and generating it alone, with or without the intervention."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.test_interventions import PROMPTS, TOKENS, assert_same, cache_edit, fingerprint, tokens, vector
from tests.tiny import ARCHITECTURES, greedy, make_tiny, tiny_lm
from workbench.interventions import Gate, Logits, fit_gate, load_intervention
from workbench.interventions.gate import _threshold, auroc, last_states
from workbench.interventions.heads import unsteered
from workbench.models import LM, ModelError, load_model

MANY = [*PROMPTS, *(f"{word} and {word}" * 3 for word in ("one", "a longer word", "x", "12345"))]


def state(lm: LM, prompt: str, layer: int) -> torch.Tensor:
    """The last token's state, one prompt at a time, from the block itself."""
    kept = []
    handle = lm.blocks[layer].register_forward_hook(lambda module, inputs, output: kept.append(output[0, -1]))
    with torch.no_grad():
        lm.model(torch.tensor([lm.encode(prompt)]))
    handle.remove()
    return kept[0]


def half(lm: LM, layer: int = 1) -> Gate:
    """A gate that fires for half of the prompts, whichever they are."""
    direction = torch.randn(lm.d_model, generator=torch.Generator().manual_seed(7))
    gate = Gate(direction, torch.zeros(lm.d_model), layer, 0.0, "cosine", lm.name, lm.revision)
    scores = gate.score(torch.stack([state(lm, prompt, layer) for prompt in MANY]))
    return replace(gate, threshold=scores.median().item() + 1e-4)


def decided(lm: LM, gate: Gate) -> list[bool]:
    return [bool(gate.fires(state(lm, prompt, gate.layer)[None])[0]) for prompt in MANY]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_row_is_decided_as_if_alone(architecture: str) -> None:
    lm = tiny_lm(architecture)
    gate = half(lm)
    fired = decided(lm, gate)
    assert 0 < sum(fired) < len(fired)
    for inner in (vector(lm, 1, "generated"), vector(lm, 0, "prompt") + cache_edit(lm)):
        expected = [tokens(lm, [p], inner if on else None)[0] for p, on in zip(MANY, fired, strict=True)]
        assert tokens(lm, MANY, inner.when(gate)) == expected
        assert tokens(lm, MANY, inner.when(gate), batch_size=3) == expected
        assert expected != tokens(lm, MANY, inner) and expected != tokens(lm, MANY)
        with lm.apply(inner.when(gate)):
            assert [greedy(lm, prompt, TOKENS) for prompt in MANY] == expected
            assert tokens(lm, MANY) == expected


def test_gates_beside_other_rows_and_beside_ungated_parts() -> None:
    lm = tiny_lm("llama")
    gate, other = half(lm), replace(half(lm, 0), measure="probe")
    v, w = vector(lm, 1, "generated"), vector(lm, 0, "last")
    rows = [v.when(gate), None, w + v.when(gate), v.when(gate) + w.when(other), v, cache_edit(lm).when(other)]
    prompts = MANY[: len(rows)]
    expected = []
    for prompt, row in zip(prompts, rows, strict=True):
        parts = []
        for part in row.parts if row is not None else ():
            own = getattr(part, "gate", None)
            if own is None or bool(own.fires(state(lm, prompt, own.layer)[None])[0]):
                parts.append(part if own is None else part.inner)
        expected.append(tokens(lm, [prompt], sum(parts[1:], parts[0]) if parts else None)[0])
    assert tokens(lm, prompts, rows) == expected
    assert (
        lm.generate(prompts, rows, TOKENS)[4].forward_passes == len(expected[4]) + 2
    )  # the gate, and a KV edit's split


def test_padded_forwards_decide_on_the_last_real_token() -> None:
    lm = tiny_lm("llama")
    x = vector(lm, 1, "all").when(half(lm))
    rows = [lm.encode(prompt) for prompt in MANY]
    width = max(map(len, rows))
    for side in ("left", "right"):
        ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            place = slice(width - len(row), width) if side == "left" else slice(len(row))
            ids[number, place], mask[number, place] = torch.tensor(row), 1
        places = (mask.cumsum(1) - 1).clamp(min=0)
        with lm.apply(x), torch.no_grad():
            logits = lm.model(ids, attention_mask=mask, position_ids=places).logits
            for number, row in enumerate(rows):
                alone = lm.model(torch.tensor([row])).logits[0]
                torch.testing.assert_close(logits[number][mask[number] > 0], alone, atol=1e-3, rtol=1e-3)


def test_strength_zero_restoring_and_saving(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    x = (vector(lm, 1, "generated") + cache_edit(lm)).when(half(lm))
    before = fingerprint(lm)
    assert tokens(lm, MANY, 0 * x) == tokens(lm, MANY)
    with pytest.raises(ZeroDivisionError), lm.apply(x), lm.apply(vector(lm)):
        tokens(lm, MANY)[1 // 0]
    assert_same(before, fingerprint(lm))
    back = load_intervention((x + vector(lm, 0)).save(tmp_path / "x.safetensors"))
    assert tokens(lm, MANY, back) == tokens(lm, MANY, x + vector(lm, 0))


@pytest.mark.parametrize("measure", ["cosine", "probe"])
def test_a_fitted_gate_tells_kinds_of_prompts_apart(measure: str) -> None:
    lm = tiny_lm("llama")
    fire = [f"{number} plus {number + 1} =" for number in range(24)]
    rest = [f"name {number} the {chr(97 + number)}!" for number in range(24)]
    gate = fit_gate(lm, fire, rest, measure=measure)
    assert gate.details["auroc"] > 0.95
    assert gate.details["fire_rate"] > 0.7
    assert gate.details["false_fire_rate"] <= 0.25
    assert (gate.details["n_fire"], gate.details["n_rest"]) == (12, 12)
    scores = gate.score(torch.stack([state(lm, prompt, gate.layer) for prompt in fire[1::2] + rest[1::2]]))
    assert gate.details["auroc"] == pytest.approx(auroc(scores[:12], scores[12:]))
    assert gate.details["fire_rate"] == pytest.approx((scores[:12] >= gate.threshold).float().mean().item())


def test_mistakes_are_explained(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    other = load_model(make_tiny("llama", tmp_path / "other", seed=1))
    with pytest.raises(ModelError, match="a Logits can't follow"):
        Logits(other).when(half(lm))
    with pytest.raises(ModelError, match="made on"):
        tokens(other, MANY, vector(lm).rebind(other).when(half(lm)))
    assert tokens(other, MANY, vector(lm).when(half(lm)).rebind(other))
    with pytest.raises(ModelError, match="at least 8"):
        fit_gate(lm, MANY[:4], MANY[4:])
    with pytest.raises(ModelError, match="between 0 and 1"):
        fit_gate(lm, MANY, MANY, false_fires=0)


@pytest.mark.parametrize("measure", ["cosine", "probe"])
def test_layer_and_threshold_come_from_prompts_that_a_gate_did_not_see(
    measure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any direction parts the few states that it was made from: at layer 0, which is noise, perfectly so."""
    lm, stream = tiny_lm("llama"), torch.Generator().manual_seed(0)
    chosen, false = [], []
    for _ in range(10):
        noise, other = (torch.randn(2, 320, lm.d_model, generator=stream) for _ in range(2))
        other[0] += 0.4  # layer 1 tells the sides apart
        for layers in ({0: noise, 1: other}, {0: noise}):
            states = iter({layer: each[side, :40] for layer, each in layers.items()} for side in (0, 1))
            monkeypatch.setattr("workbench.interventions.gate.last_states", lambda *_, states=states: next(states))
            gate = fit_gate(lm, MANY * 5, MANY * 5, layers=list(layers), measure=measure, false_fires=0.1)
            if len(layers) == 2:
                chosen.append(gate.layer)
            else:
                false.append(gate.fires(noise[1, 40:]).float().mean().item())
                assert auroc(*(gate.score(noise[side, :40:2]) for side in (0, 1))) > 0.8
    assert sum(chosen) >= 9
    assert sum(false) / len(false) < 0.25  # set on the direction's own prompts, a threshold lets half of them through


def test_threshold_lets_at_most_the_share_through() -> None:
    on = torch.tensor([0.9, 0.2])
    off = torch.tensor([0.1, 0.5, 0.3, 0.7, 0.3, 0.6, -0.2, 0.0, 0.4, 0.05])
    for share, fired in ((0.1, 1), (0.19, 1), (0.2, 2), (0.05, 0), (0.61, 6), (0.55, 4)):  # 0.3 stands twice
        threshold = _threshold(on, off, share)
        assert int((off >= threshold).sum()) == fired
        assert not ((torch.cat([on, off]) - threshold).abs() < 0.02).any()
    assert _threshold(torch.tensor([0.1]), off, 0.05) > 0.7


def test_a_gate_is_fitted_on_the_plain_model_whatever_is_in_force() -> None:
    lm = tiny_lm("llama")
    fire, rest = [f"{number} plus" for number in range(10)], [f"name {number}" for number in range(10)]
    plain, states = fit_gate(lm, fire, rest), torch.stack([state(lm, prompt, 1) for prompt in fire])
    for x in (vector(lm, 0, "all"), cache_edit(lm), vector(lm, 0, "all").when(half(lm))):
        with lm.apply(x):
            assert torch.equal(last_states(lm, fire, [1])[1], states)
            assert fit_gate(lm, fire, rest).threshold == plain.threshold
            with pytest.raises(ZeroDivisionError), unsteered(lm):
                1 / 0
            assert tokens(lm, MANY[:2]) == tokens(lm, MANY[:2], None) != []
