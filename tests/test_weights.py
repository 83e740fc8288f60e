"""Weight edits against loops from the definition, strength zero, and the original tensors afterwards."""

from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.test_adapter import make_adapter
from tests.test_interventions import PROMPTS, assert_same, cache_edit, fingerprint, vector
from tests.tiny import ARCHITECTURES, FAMILIES, greedy, tiny_config, tiny_lm, tiny_tokenizer
from workbench.interventions import Gate, Residual
from workbench.interventions.heads import gains_of, heads_of, heads_writing
from workbench.interventions.weights import Weights, changed, isolate, project_out
from workbench.models import LM, ModelError, load_model

WRITTEN = {
    "gpt2": "attn.c_proj", "gpt_neox": "attention.dense", "falcon": "self_attention.dense",
}  # fmt: skip
COVERED = tuple(sorted({*ARCHITECTURES, *FAMILIES} - {"qwen3_next"}))
TASK = ["2+3=5 and 40-7=33", "17*2=34", "9-8=1"]
OTHER = ["the cat sat on the mat", "a house by the sea", "green grass"]


@pytest.fixture(scope="session")
def wide_heads(tmp_path_factory: pytest.TempPathFactory) -> LM:
    """A Qwen 3 of width 64 with four heads of 32: the projection has 128 inputs, and hidden / heads would say 16."""
    folder, tokenizer = tmp_path_factory.mktemp("wide"), tiny_tokenizer()
    config = tiny_config("qwen3", len(tokenizer))
    config.head_dim = 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_model(folder)


def model_of(name: str, request: pytest.FixtureRequest) -> LM:
    return request.getfixturevalue("wide_heads") if name == "wide" else tiny_lm(name)


def direction(lm: LM, seed: int = 0) -> dict[int, torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(lm.d_model, generator=stream) for layer in range(len(lm.blocks))}


def all_heads(lm: LM, *layers: int) -> list[tuple[int, int]]:
    return [(layer, head) for layer in layers for head in range(lm.model.config.num_attention_heads)]


def projection(lm: LM, name: str, layer: int) -> nn.Module:
    return lm.blocks[layer].get_submodule(WRITTEN.get(name, "self_attn.o_proj"))


def columns(lm: LM, name: str, layer: int) -> list[torch.Tensor]:
    """W_o of each head, (d_model, head_dim), cut by hand."""
    weight = projection(lm, name, layer).weight
    weight = weight.T if name == "gpt2" else weight
    size = weight.shape[1] // lm.model.config.num_attention_heads
    return [weight[:, start : start + size] for start in range(0, weight.shape[1], size)]


def to_stream(lm: LM, name: str, layer: int, prompt: str) -> torch.Tensor:
    """What attention adds to the residual stream, without the projection's bias: after the norm, if one follows."""
    module = projection(lm, name, layer)
    if name in ("gemma2", "gemma3", "olmo2"):
        module = lm.blocks[layer].post_attention_layernorm
    kept = []
    handle = module.register_forward_hook(lambda module, inputs, output: kept.append(output[0]))
    with torch.no_grad():
        lm.model(torch.tensor([lm.encode(prompt)]))
    handle.remove()
    bias = getattr(module, "bias", None)
    return kept[0] - bias if isinstance(bias, torch.Tensor) else kept[0]


def tokens(lm: LM) -> list[list[int]]:
    return [greedy(lm, prompt, 10) for prompt in PROMPTS]


@pytest.mark.parametrize("name", [*COVERED, "wide"])
def test_nothing_along_the_direction_is_left_after_full_projection(name: str, request: pytest.FixtureRequest) -> None:
    lm = model_of(name, request)
    v, plain = direction(lm), tokens(lm)
    x = project_out(lm, v, all_heads(lm, 0, 2))
    before = [to_stream(lm, name, layer, PROMPTS[0]) @ v[layer] for layer in range(3)]
    for strength, left in ((1.0, 0.0), (0.25, 0.75), (-1.0, 2.0)):
        with changed(lm, [strength * x]):
            after = [to_stream(lm, name, 0, PROMPTS[0]) @ v[0]]
            if strength == 1:
                after.append(to_stream(lm, name, 2, PROMPTS[0]) @ v[2])
                assert tokens(lm) != plain
        for layer, along in zip((0, 2), after, strict=False):
            if strength == 1:
                assert along.abs().max() < 1e-5 * before[layer].abs().max()
            elif name not in ("gemma2", "gemma3", "olmo2"):  # there the norm divides by the new length
                torch.testing.assert_close(along, left * before[layer], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [*COVERED, "wide"])
def test_projection_is_the_definition_on_the_chosen_heads_only(name: str, request: pytest.FixtureRequest) -> None:
    lm = model_of(name, request)
    x = 0.5 * project_out(lm, direction(lm), [(1, 2), (1, 0), (2, 3)])
    old = {layer: [block.clone() for block in columns(lm, name, layer)] for layer in range(3)}
    with changed(lm, [x]):
        for layer in range(3):
            for head, (was, now) in enumerate(zip(old[layer], columns(lm, name, layer), strict=True)):
                if (layer, head) not in x.heads:
                    assert torch.equal(was, now)
                    continue
                unit = direction(lm)[layer] / direction(lm)[layer].norm()
                torch.testing.assert_close(now, was - 0.5 * torch.outer(unit, unit @ was), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "olmo2"])
def test_a_norm_behind_the_projection_does_not_bring_the_direction_back(name: str, tmp_path: Path) -> None:
    source, v = tiny_lm(name), direction(tiny_lm(name))
    source.model.save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    lm = load_model(tmp_path)
    for block in lm.blocks:
        block.post_attention_layernorm.weight.data = torch.rand(lm.d_model) * 3 - 1
    assert sorted(gains_of(lm)) == list(range(len(lm.blocks)))
    before = to_stream(lm, name, 1, PROMPTS[0]) @ v[1]
    with changed(lm, [project_out(lm, v, all_heads(lm, 1))]):
        assert (to_stream(lm, name, 1, PROMPTS[0]) @ v[1]).abs().max() < 1e-5 * before.abs().max()


@pytest.mark.parametrize("name", [*ARCHITECTURES, "wide"])
def test_strength_zero_is_plain_generation_and_the_tensors_come_back(name: str, request: pytest.FixtureRequest) -> None:
    lm = model_of(name, request)
    v = direction(lm)
    edits = [project_out(lm, v, all_heads(lm, 0, 1)), isolate(lm, TASK, OTHER).multiplied(3.0)]
    plain, before = tokens(lm), fingerprint(lm)
    owned = [id(parameter) for parameter in lm.model.parameters()]
    for x in edits:
        with changed(lm, [0 * x]):
            assert [id(parameter) for parameter in lm.model.parameters()] == owned
            assert tokens(lm) == plain
        with changed(lm, [x]), changed(lm, edits):
            assert tokens(lm) != plain
    with pytest.raises(ZeroDivisionError), changed(lm, edits), changed(lm, edits):
        tokens(lm)[1 // 0]
    with pytest.raises(ModelError), changed(lm, [edits[0], Weights(v, ((1, 99),))]):
        pass
    assert [id(parameter) for parameter in lm.model.parameters()] == owned
    assert_same(before, fingerprint(lm))
    assert tokens(lm) == plain


@pytest.mark.parametrize("name", [*COVERED, "wide"])
def test_head_scores_equal_a_slow_loop(name: str, request: pytest.FixtureRequest) -> None:
    lm = model_of(name, request)
    v = direction(lm)
    table = heads_writing(lm, Residual(v, model=lm.name, revision=lm.revision))
    assert len(table) == len(lm.blocks) * lm.model.config.num_attention_heads
    for row in table.itertuples():
        block, unit = columns(lm, name, row.layer)[row.head], v[row.layer] / v[row.layer].norm()
        along = sum(float(unit @ column) ** 2 for column in block.T) ** 0.5
        size = sum(float(value) ** 2 for value in block.flatten()) ** 0.5
        assert row.score == pytest.approx(along / size, rel=1e-4)
        assert row.norm == pytest.approx(size, rel=1e-4)
    assert heads_writing(lm, {2: v[2]}).layer.unique().tolist() == [2]


@pytest.mark.parametrize("name", [*COVERED, "wide"])
@pytest.mark.parametrize("positions", ["all", "last", slice(1, -1)], ids=str)
def test_contributions_are_what_vanishes_with_the_head(
    name: str, positions: object, request: pytest.FixtureRequest
) -> None:
    """A head writes what the projection's output loses when that head's columns are zero."""
    lm = model_of(name, request)
    v, norm = direction(lm), name in ("gemma2", "gemma3", "olmo2")
    table = heads_writing(lm, {1: v[1]}, prompts=PROMPTS, positions=positions).set_index("head")
    chosen = slice(None) if positions == "all" else slice(-1, None) if positions == "last" else positions
    expected = [0.0] * len(table)
    for prompt in PROMPTS:
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        handle = projection(lm, name, 1).register_forward_hook(
            lambda module, inputs, output, kept=kept: kept.append((inputs[0][0], output[0]))
        )
        with torch.no_grad():
            lm.model(torch.tensor([lm.encode(prompt)]))
        handle.remove()
        heads, output = kept[0]
        for head, block in enumerate(columns(lm, name, 1)):
            size = block.shape[1]
            wrote = heads[:, head * size : (head + 1) * size] @ block.T
            if norm:
                wrote = wrote / output.square().mean(-1, keepdim=True).sqrt()
            expected[head] += float((wrote[chosen] @ (v[1] / v[1].norm())).mean()) / len(PROMPTS)
    assert table.contribution.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", [*ARCHITECTURES, "mixtral", "falcon", "wide"])
def test_isolated_weights_equal_a_slow_loop(name: str, request: pytest.FixtureRequest) -> None:
    lm = model_of(name, request)
    x = isolate(lm, TASK, OTHER, share=0.03)
    matrices = {n: m for n, m in lm.model.named_modules() if type(m).__name__ in ("Linear", "Conv1D", "FalconLinear")}
    matrices = {n: m for n, m in matrices.items() if not n.endswith("lm_head")}
    assert set(x.chosen) <= set(matrices)
    assert len(x.chosen) > len(matrices) // 2
    kept: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda module, inputs, output, n=n: kept.update({n: inputs[0][0]}))
        for n, module in matrices.items()
    ]
    scores: dict[tuple[str, int], torch.Tensor] = {}
    for side, texts in enumerate((TASK, OTHER)):
        for text in texts:
            with torch.no_grad():
                lm.model(torch.tensor([lm.encode(text)]))
            for n, seen in kept.items():
                norms = torch.tensor([sum(float(value) ** 2 for value in column) ** 0.5 for column in seen.T])
                weight = matrices[n].weight.abs()
                score = weight * (norms[:, None] if type(matrices[n]).__name__ == "Conv1D" else norms)
                scores[n, side] = scores.get((n, side), 0) + score.flatten()
    for handle in handles:
        handle.remove()
    for n, module in matrices.items():
        count = int(0.03 * module.weight.numel())
        mine, theirs = (set(scores[n, side].argsort(descending=True)[:count].tolist()) for side in (0, 1))
        found = set(x.chosen.get(n, torch.empty(0)).tolist())
        assert len(found ^ (mine - theirs)) <= 2, n  # the loop's sums round differently at the edge
    with changed(lm, [0.5 * x.multiplied(1.5)]):
        now = {n: module.weight.clone() for n, module in matrices.items()}
    for n, module in matrices.items():
        expected = module.weight.flatten().clone()
        expected[x.chosen.get(n, torch.empty(0)).long()] *= 1.25
        assert torch.equal(now[n].flatten(), expected)
    with changed(lm, [x]):
        assert all(not matrices[n].weight.flatten()[places.long()].any() for n, places in x.chosen.items())


def test_edits_follow_each_other_and_scaling_is_the_strength() -> None:
    lm = tiny_lm("llama")
    v, w = direction(lm), direction(lm, 1)
    x, y = project_out(lm, v, [(1, 0)]), project_out(lm, w, [(1, 0)])
    with changed(lm, [x, y]):
        together = columns(lm, "llama", 1)[0].clone()
    with changed(lm, [x]), changed(lm, [y]):
        assert torch.equal(columns(lm, "llama", 1)[0], together)
    assert (w[1] @ together).abs().max() < 1e-5
    assert (x.scale(0.5).strength, (-x).strength, (2 * (0.25 * x)).strength) == (0.5, -1.0, 0.5)
    assert (2 * (0.5 * x)).key == x.key
    assert (2 * x).key != x.key != y.key
    assert [part.strength for part in (0.5 * (x + y)).parts] == [0.5, 0.5]


def test_the_random_control_is_as_large_and_elsewhere() -> None:
    lm = tiny_lm("llama")
    x = project_out(lm, direction(lm), all_heads(lm, 1))
    for control in (x.random(1), x.random(2)):
        assert control.heads == x.heads
        assert control.directions[1].norm() == pytest.approx(1)
        assert abs(float(control.directions[1] @ x.directions[1])) < 0.6
    assert not torch.equal(x.random(1).directions[1], x.random(2).directions[1])
    y = isolate(lm, TASK, OTHER)
    control = y.random(1)
    for name, places in y.chosen.items():
        assert len(control.chosen[name].unique()) == len(places)
        assert len(set(places.tolist()) & set(control.chosen[name].tolist())) < len(places) / 2
    with changed(lm, [control, x.random(3)]):
        pass


def test_a_shared_tensor_is_changed_in_the_blocks_only() -> None:
    lm = tiny_lm("llama")  # its head is tied to the embedding
    head = lm.model.get_output_embeddings().weight
    x = isolate(lm, TASK, OTHER)
    assert not any("embed" in name or "head" in name for name in x.chosen)
    with changed(lm, [x]):
        assert lm.model.get_output_embeddings().weight is head


def test_under_an_adapter_the_weights_below_it_change(tmp_path: Path, tiny: Callable[[str], Path]) -> None:
    lm = load_model(tiny("llama"))
    adapter, v = make_adapter(lm, tmp_path / "a"), direction(lm)
    edits = [project_out(lm, v, all_heads(lm, 1)), isolate(lm, TASK, OTHER)]
    before = fingerprint(lm)
    with changed(lm, edits), lm.apply(adapter):
        expected = tokens(lm)
    with lm.apply(adapter):
        plain = tokens(lm)
        assert set(isolate(lm, TASK, OTHER).chosen) == set(edits[1].chosen)
        with changed(lm, edits):
            assert tokens(lm) == expected != plain
        assert tokens(lm) == plain
    assert_same(before, fingerprint(lm))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_half_precision_rounds_once(dtype: str, tiny: Callable[[str], Path]) -> None:
    lm = load_model(tiny("llama"), dtype=dtype)
    v = direction(lm)
    x = project_out(lm, v, all_heads(lm, 1))
    old = heads_of(lm, 1).weight.float()
    unit = v[1] / v[1].norm()
    with changed(lm, [x]):
        new = heads_of(lm, 1).weight
        assert new.dtype == getattr(torch, dtype)
        expected = old - torch.einsum("d,e,ehk->dhk", unit, unit, old)
        torch.testing.assert_close(new.float(), expected.to(new.dtype).float(), atol=1e-6, rtol=1e-2)
    assert torch.equal(heads_of(lm, 1).weight.float(), old)


def test_four_bit_weights_are_refused_with_the_reason(tiny: Callable[[str], Path]) -> None:
    plain = load_model(tiny("llama"))
    lm = load_model(tiny("llama"), quantization="nf4")
    made = project_out(plain, direction(plain), [(0, 0)])
    for attempt in (
        lambda: heads_writing(lm, direction(lm)),
        lambda: project_out(lm, direction(lm), [(0, 0)]),
        lambda: isolate(lm, TASK, OTHER),
        lambda: made.rebind(lm).check(lm),
        lambda: isolate(plain, TASK, OTHER).check(lm),
    ):
        with pytest.raises(ModelError, match=r"quantised weights.*without quantization.*Residual"):
            attempt()


def test_linear_attention_is_refused_by_name_and_other_layers_work() -> None:
    lm = tiny_lm("qwen3_next")
    v = direction(lm)
    with pytest.raises(ModelError, match=r"Layer 0 of Qwen3Next.*linear_attn.*Choose other layers"):
        heads_writing(lm, v)
    assert len(heads_writing(lm, {1: v[1], 2: v[2]})) == 8
    with changed(lm, [project_out(lm, v, all_heads(lm, 1))]):
        assert (to_stream(lm, "qwen3_next", 1, PROMPTS[0]) @ v[1]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda lm, v: project_out(lm, v, [(1, 4)]), "heads 0 to 3; got 4"),
        (lambda lm, v: project_out(lm, v, []), "give \\(layer, head\\) pairs"),
        (lambda lm, v: project_out(lm, {1: v[1]}, [(2, 0)]), "layers \\[1\\], none for \\[2\\]"),
        (lambda lm, v: project_out(lm, {1: 0 * v[1]}, [(1, 0)]), "no length at layers \\[1\\]"),
        (lambda lm, v: project_out(lm, {7: v[1]}, [(7, 0)]), "layers 0 to 2"),
        (lambda lm, v: project_out(lm, {1: torch.ones(32)}, [(1, 0)]), "width 32.*width 64"),
        (
            lambda lm, v: project_out(lm, Residual(v, model="other", revision="abc"), [(1, 0)]),
            "made on 'other'.*rebind",
        ),
        (lambda lm, v: Weights(v, ((1, 0),), model="other", revision="abc").check(lm), "made on 'other'.*rebind"),
        (lambda lm, v: Weights({}, ((1, 0),)).check(lm), "Head 0 of layer 1 needs a direction of width 64"),
        (
            lambda lm, v: isolate(tiny_lm("gpt2"), TASK, OTHER).rebind(lm).check(lm),
            "transformer.h.0.*no such matrix.*isolate\\(",
        ),
        (lambda lm, v: isolate(lm, TASK, TASK), "No weight is in the top 5.00%"),
        (lambda lm, v: isolate(lm, TASK, OTHER, share=5), "share=5.*between 0 and 1"),
        (lambda lm, v: isolate(lm, "text", OTHER), "lists with at least one text"),
        (lambda lm, v: isolate(lm, TASK, []), "0 other texts"),
        (lambda lm, v: heads_writing(lm, v, prompts=["abc"], positions=9), "positions=9 names no token"),
    ],
)
def test_mistakes_are_explained(
    make: Callable[[LM, dict], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the tests' own shape checks would come first
    lm = tiny_lm("llama")
    with pytest.raises(ModelError, match=message):
        make(lm, direction(lm))


def test_blocks_may_be_left_in_any_order(tiny: Callable[[str], Path]) -> None:
    lm = load_model(tiny("llama"))
    v, w = direction(lm), direction(lm, 1)
    edits = [project_out(lm, v, all_heads(lm, 1)), project_out(lm, w, [(1, 0), (2, 1)]), isolate(lm, TASK, OTHER)]
    before, owned = fingerprint(lm), [id(parameter) for parameter in lm.model.parameters()]
    for order in permutations(range(3)):
        blocks = [changed(lm, [edit]) for edit in edits]
        for block in blocks:
            block.__enter__()
        left = [0, 1, 2]
        for number in order:
            blocks[number].__exit__(None, None, None)
            left.remove(number)
            found = [block.self_attn.o_proj.weight.clone() for block in lm.blocks]
            again = load_model(tiny("llama"))
            with changed(again, [edits[other] for other in left]):
                for mine, block in zip(found, again.blocks, strict=True):
                    assert torch.equal(mine, block.self_attn.o_proj.weight)
        assert [id(parameter) for parameter in lm.model.parameters()] == owned
        assert_same(before, fingerprint(lm))


def test_a_tensor_that_two_layers_share_is_changed_where_it_was_asked_for(tiny: Callable[[str], Path]) -> None:
    lm = load_model(tiny("llama"))
    first, second = (lm.blocks[layer].self_attn.o_proj for layer in (0, 1))
    second.weight = first.weight
    v, old = direction(lm), first.weight.clone()
    for heads, changes in (([(0, 0)], (True, False)), ([(0, 0), (1, 0)], (True, True))):
        with changed(lm, [project_out(lm, {0: v[0], 1: v[0]}, heads)]):
            unit = v[0] / v[0].norm()
            once = old.clone()
            once[:, :16] -= torch.outer(unit, unit @ old[:, :16])
            for module, one in zip((first, second), changes, strict=True):
                torch.testing.assert_close(module.weight, once if one else old, atol=1e-6, rtol=1e-5)
        assert first.weight is second.weight
        assert torch.equal(first.weight, old)


def test_counting_under_a_kv_edit_or_a_gate_is_refused() -> None:
    lm = tiny_lm("llama")
    gate = Gate(torch.ones(64), torch.zeros(64), 1, -2.0, "cosine", lm.name, lm.revision)
    v, steer = direction(lm), vector(lm, 1, "all")
    expected = heads_writing(lm, v).score.tolist()
    for x in (cache_edit(lm), steer.when(gate)):
        with lm.apply(x):
            for act in (lambda: isolate(lm, TASK, OTHER), lambda: heads_writing(lm, v, prompts=PROMPTS)):
                with pytest.raises(ModelError, match=r"in two parts or twice\. Leave its block"):
                    act()
            assert heads_writing(lm, v).score.tolist() == expected  # weights alone, and the norms behind them
            assert project_out(lm, v, [(1, 0)]).heads == ((1, 0),)
    with lm.apply(steer):
        assert isolate(lm, TASK, OTHER).chosen
