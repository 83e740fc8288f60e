"""Prompt and prefix tuning as interventions, against PEFT's own model with one row alone."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model

from tests.test_interventions import PROMPTS, TOKENS, assert_same, cache_edit, fingerprint, tokens, vector
from tests.tiny import greedy, make_tiny
from workbench.interventions import Adapter
from workbench.models import LM, ModelError, load_model

VIRTUAL = 5


def make_virtual(lm: LM, kind: str, folder: Path) -> Adapter:
    """A random adapter of virtual tokens, strong enough to change tokens."""
    config = lm.model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind == "prompt":
        chosen = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
    else:
        chosen = PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, num_layers=len(lm.blocks), num_attention_heads=heads,
            token_dim=heads * width,
        )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        wrapped = get_peft_model(load_model(lm.name).model, chosen)
        with torch.no_grad():
            wrapped.prompt_encoder["default"].embedding.weight.normal_(0, 1.0)
        wrapped.save_pretrained(folder)
    return Adapter(folder)


def peft_logits(lm: LM, adapter: Adapter, ids: torch.Tensor) -> torch.Tensor:
    """PEFT's own forward over one row, without a cache; the virtual tokens' own logits cut off."""
    wrapped = PeftModel.from_pretrained(load_model(lm.name).model, str(adapter.path)).eval()
    with torch.no_grad():
        return wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]


def peft_greedy(lm: LM, adapter: Adapter, prompt: str, count: int) -> list[int]:
    """Greedy tokens by PEFT's forward, the whole text anew for every token."""
    wrapped = PeftModel.from_pretrained(load_model(lm.name).model, str(adapter.path)).eval()
    ids = torch.tensor([lm.encode(prompt)])
    start = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            token = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, token[:, None]], dim=1)
        if token.item() == lm.tokenizer.eos_token_id:
            break
    return ids[0, start:].tolist()


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3"])
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_model(make_tiny(request.param, tmp_path_factory.mktemp("virtual") / request.param))


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_equal_peft_batched_and_alone(lm: LM, kind: str, tmp_path: Path) -> None:
    adapter = make_virtual(lm, kind, tmp_path / kind)
    before, plain = fingerprint(lm), tokens(lm, PROMPTS)
    ids = torch.tensor([lm.encode(PROMPTS[0])])
    with torch.no_grad(), lm.apply(adapter):
        for cached in (True, False):
            found = lm.model(input_ids=ids, use_cache=cached).logits
            torch.testing.assert_close(found, peft_logits(lm, adapter, ids), atol=1e-4, rtol=1e-4)
    together = tokens(lm, PROMPTS, adapter)
    assert together == [tokens(lm, [prompt], adapter)[0] for prompt in PROMPTS]
    assert together == [peft_greedy(lm, adapter, prompt, TOKENS) for prompt in PROMPTS]
    assert together != plain
    assert_same(before, fingerprint(lm))
    assert "forward" not in vars(lm.base)
    assert tokens(lm, PROMPTS, 0 * adapter) == tokens(lm, PROMPTS) == plain
    with lm.apply(adapter):
        assert [greedy(lm, prompt, TOKENS) for prompt in PROMPTS] == together


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_in_rows_with_other_kinds_and_shared_beginnings(lm: LM, kind: str, tmp_path: Path) -> None:
    adapter, v = make_virtual(lm, kind, tmp_path / kind), vector(lm)
    prompts = [*PROMPTS, PROMPTS[0], "a long beginning of all of these, one", "a long beginning of all of these, two!"]
    mixture = [adapter, adapter + v, v, None, adapter, adapter + v, adapter]
    prompts, mixture = prompts[: len(mixture)], mixture[: len(prompts)]
    together = tokens(lm, prompts, mixture)
    assert together == [tokens(lm, [prompt], x)[0] for prompt, x in zip(prompts, mixture, strict=True)]
    shared = ["a long beginning of all of these, " + end for end in ("one", "two!", "one", "one")]
    assert tokens(lm, shared, adapter) == [tokens(lm, [prompt], adapter)[0] for prompt in shared]
    assert tokens(lm, PROMPTS, adapter + v) != tokens(lm, PROMPTS, adapter)


def test_what_virtual_tokens_cannot_do_is_refused(tmp_path: Path) -> None:
    lm = load_model(make_tiny("llama", tmp_path / "model"))
    one, two = make_virtual(lm, "prompt", tmp_path / "one"), make_virtual(lm, "prefix", tmp_path / "two")
    with pytest.raises(ModelError, match=r"puts 5 virtual tokens before the text.*got strength 0.5"):
        tokens(lm, PROMPTS, 0.5 * one)
    with pytest.raises(ModelError, match="both put virtual tokens"):
        tokens(lm, PROMPTS, one + two)
    with pytest.raises(ModelError, match="Edits of the cache count its entries"):
        tokens(lm, PROMPTS, two + cache_edit(lm))
    for architecture, message in (("gemma3", "layers of another kind"), ("qwen2", "does not fit")):
        other = load_model(make_tiny(architecture, tmp_path / architecture))
        if architecture == "qwen2":
            make_virtual(other, "prefix", tmp_path / "wide")
            (tmp_path / "wide" / "adapter_model.safetensors").write_bytes(
                (tmp_path / "one" / "adapter_model.safetensors").read_bytes()
            )
            wrong = Adapter(tmp_path / "wide")
        else:
            wrong = one
        with pytest.raises(ModelError, match=message):
            tokens(other, PROMPTS, wrong)


def test_virtual_tokens_go_together_with_lora(tmp_path: Path) -> None:
    """The prompt's keys and values are worked out by the model as LoRA has changed it."""
    lm = load_model(make_tiny("llama", tmp_path / "model"))
    prompt = make_virtual(lm, "prompt", tmp_path / "prompt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        wrapped = get_peft_model(load_model(lm.name).model, config)
        wrapped.save_pretrained(tmp_path / "lora")
        merged = wrapped.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    lm.tokenizer.save_pretrained(tmp_path / "merged")
    other = load_model(tmp_path / "merged")
    ids = torch.tensor([lm.encode(PROMPTS[0])])
    with torch.no_grad(), lm.apply(prompt + Adapter(tmp_path / "lora")), other.apply(prompt):
        torch.testing.assert_close(lm.model(ids).logits, other.model(ids).logits, atol=1e-4, rtol=1e-4)


def test_dora_is_applied_as_peft_does_and_not_in_part(tmp_path: Path) -> None:
    """DoRA divides by the norm of the changed weights, so its change is no multiple of its scaling."""
    lm = load_model(make_tiny("llama", tmp_path / "model"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=True)
        wrapped = get_peft_model(load_model(lm.name).model, config).eval()
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.data *= 1.3
        wrapped.save_pretrained(tmp_path / "dora")
    adapter, before = Adapter(tmp_path / "dora"), fingerprint(lm)
    ids = torch.tensor([lm.encode(PROMPTS[0])])
    with torch.no_grad(), lm.apply(adapter):
        torch.testing.assert_close(lm.model(ids).logits, wrapped(ids).logits, atol=1e-5, rtol=1e-5)
    assert_same(before, fingerprint(lm))
    assert tokens(lm, PROMPTS, 0 * adapter) == tokens(lm, PROMPTS) != tokens(lm, PROMPTS, adapter)
    with pytest.raises(ModelError, match=r"DoRA adapter.*can't be scaled; got strength 0.5"):
        tokens(lm, PROMPTS, 0.5 * adapter)
