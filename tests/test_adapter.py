"""Adapters as interventions, against PEFT's own model and against the model before."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.test_interventions import PROMPTS, TOKENS, assert_same, cache_edit, fingerprint, tokens, vector
from tests.tiny import greedy, make_tiny
from workbench.interventions import Adapter, load_intervention
from workbench.models import LM, ModelError, load_model


def make_adapter(lm: LM, folder: Path, seed: int = 0, **options: object) -> Adapter:
    """A random LoRA adapter, strong enough to change tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, **options)
        wrapped = get_peft_model(lm.model, config)
        wrapped.save_pretrained(folder)
        wrapped.unload()
    lm.model.eval().requires_grad_(False)
    return Adapter(folder)


@pytest.fixture
def lm(tmp_path: Path) -> LM:
    return load_model(make_tiny("llama", tmp_path / "model"))


def test_an_adapter_equals_peft(lm: LM, tmp_path: Path) -> None:
    adapter = make_adapter(lm, tmp_path / "a")
    plain, before = tokens(lm, PROMPTS), fingerprint(lm)
    found = tokens(lm, PROMPTS, adapter)
    assert_same(before, fingerprint(lm))
    with lm.apply(adapter):
        assert [greedy(lm, prompt, TOKENS) for prompt in PROMPTS] == found
    assert_same(before, fingerprint(lm))
    assert tokens(lm, PROMPTS) == tokens(lm, PROMPTS, 0 * adapter) == plain
    wrapped = PeftModel.from_pretrained(lm.model, str(adapter.path))
    assert [greedy(lm, prompt, TOKENS) for prompt in PROMPTS] == found
    wrapped.unload()
    assert found != plain


def test_strength_scales_the_adapter(lm: LM, tmp_path: Path) -> None:
    adapter = make_adapter(lm, tmp_path / "a")
    ids = torch.tensor([[5, 6, 7]])
    weight = lm.blocks[0].self_attn.q_proj
    with torch.no_grad():
        x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
        base = weight(x)
        changes = []
        for strength in (1.0, 0.5, -1.0):
            with lm.apply(strength * adapter):
                changes.append(lm.blocks[0].self_attn.q_proj(x) - base)
                lm.model(ids)
    torch.testing.assert_close(changes[1], 0.5 * changes[0])
    torch.testing.assert_close(changes[2], -changes[0])


def test_rows_with_different_adapters_and_kinds(lm: LM, tmp_path: Path) -> None:
    a, b = make_adapter(lm, tmp_path / "a"), make_adapter(lm, tmp_path / "b", seed=1)
    v, kv = vector(lm), cache_edit(lm)
    mixture = [a, None, b, a + v, b + kv, v, a + b, 0 * a]
    prompts = PROMPTS * 2
    together = tokens(lm, prompts, mixture)
    assert together == [tokens(lm, [prompt], x)[0] for prompt, x in zip(prompts, mixture, strict=True)]
    with lm.apply(a), lm.apply(b):
        assert tokens(lm, [prompts[6]])[0] == together[6]
    outer, inner = [v, kv, None, v, 0 * v, kv, v, None], [a, None, b, None, b, 0 * a, a, b]
    both = [sum(x for x in pair if x is not None) for pair in zip(outer, inner, strict=True)]
    with lm.apply(outer):  # one a row, around rows that are sorted by adapter
        nested = tokens(lm, prompts, inner)
    assert nested == tokens(lm, prompts, both)
    with pytest.raises(ModelError, match="cannot have different adapters"), lm.apply([a, b]):
        pass


def test_saving_an_adapter_keeps_its_folder_and_strength(lm: LM, tmp_path: Path) -> None:
    x = 0.5 * make_adapter(lm, tmp_path / "a") + vector(lm)
    back = load_intervention(x.save(tmp_path / "x.safetensors"))
    assert tokens(lm, PROMPTS, back) == tokens(lm, PROMPTS, x)


def test_an_adapter_of_another_model_leaves_no_trace(lm: LM, tmp_path: Path) -> None:
    other = make_adapter(load_model(make_tiny("gpt2", tmp_path / "model2")), tmp_path / "gpt2", fan_in_fan_out=True)
    wide = make_tiny("llama", tmp_path / "wide")
    before = fingerprint(lm)
    with pytest.raises(ModelError, match="does not fit"):
        tokens(lm, PROMPTS, other)
    assert_same(before, fingerprint(lm))
    with pytest.raises(ModelError, match="is not an adapter"):
        Adapter(wide)


def test_nf4_models_take_adapters_too(tmp_path: Path) -> None:
    small = load_model(make_tiny("llama", tmp_path / "model"), quantization="nf4")
    adapter = make_adapter(small, tmp_path / "a")
    plain = tokens(small, PROMPTS)  # after saving, which makes bitsandbytes unpack and pack its weights anew
    ids = torch.tensor([small.encode(PROMPTS[0])])
    before = small.model(ids).logits
    for _ in range(2):
        assert tokens(small, PROMPTS, adapter) != plain
    assert torch.equal(small.model(ids).logits, before)
    assert tokens(small, PROMPTS) == plain


def test_adapters_that_change_the_model_itself_are_refused(tmp_path: Path) -> None:
    """PEFT copies trained biases into the model's own: nothing would take them out again."""
    folder = make_tiny("qwen2", tmp_path / "model")
    lm = load_model(folder)
    before = fingerprint(lm)
    adapter = make_adapter(load_model(folder), tmp_path / "bias", bias="all")
    with pytest.raises(ModelError, match=r"trained the model's own biases .bias='all'"):
        tokens(lm, PROMPTS, adapter)
    assert_same(before, fingerprint(lm))
    lm = load_model(make_tiny("qwen3", tmp_path / "untied"))
    whole = make_adapter(load_model(tmp_path / "untied"), tmp_path / "whole", modules_to_save=["lm_head"])
    before = fingerprint(lm)
    with pytest.raises(ModelError, match=r"modules_to_save.*strength 0.5"):
        tokens(lm, PROMPTS, 0.5 * whole)
    assert tokens(lm, PROMPTS, whole)
    assert_same(before, fingerprint(lm))
