"""Loading: what comes back, why it sits where it sits, and errors that say what to do."""

import logging
import shutil
from pathlib import Path

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import QuantState
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    FalconConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
)

from tests.test_interventions import cache_edit, vector
from tests.tiny import ARCHITECTURES, OWN, TYPES, greedy, make_tiny, tiny_lm, tiny_tokenizer
from workbench.finetuning.packing import encode
from workbench.interventions import extract
from workbench.models import LM, ModelError, find_blocks, load_model
from workbench.placement import (
    CACHES,
    _cached_bytes,
    _four_bit_bytes,
    _four_bit_layers,
    bytes_a_token,
    choose_quantization,
)

PAIRS = type("Pairs", (), {"positive": ["one two:", "abc:"], "negative": ["one:", "a longer one:"]})
PROMPTS = ["<|user|>What is 2+3?<|end|><|assistant|>\n", "x y z", "abcdefgh " * 3]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folder_loads_with_reasons(architecture: str) -> None:
    lm = tiny_lm(architecture)
    assert set(lm.reasons) == {"device", "dtype", "quantization"}
    assert len(lm.blocks) == (4 if architecture == "gemma3" else 3)
    assert lm.d_model == 64
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    assert len(lm.revision) == 12


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_are_in_order_and_are_the_residual_stream(architecture: str) -> None:
    lm = tiny_lm(architecture)
    outputs: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output)) for block in lm.blocks
    ]
    with torch.no_grad():
        states = lm.model(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    assert all(torch.equal(output, state) for output, state in zip(outputs[:-1], states[1:-1], strict=True))
    assert not torch.equal(outputs[-1], states[-1])  # the library's last one is after the final norm


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=64),
        FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64),
        OPTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, vocab_size=64),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_other_shapes_are_found_by_structure(config: object) -> None:
    blocks = find_blocks(AutoModelForCausalLM.from_config(config))
    assert len(blocks) == 2
    assert "Layer" in type(blocks[0]).__name__


def test_a_model_without_blocks_is_refused_with_names() -> None:
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    )
    model.config.num_hidden_layers = 9
    with pytest.raises(ModelError, match=r"9 decoder blocks; module lists: model\.layers \(1\)"):
        find_blocks(model)


def test_the_revision_is_the_weights(tmp_path: Path) -> None:
    first, again = make_tiny("llama", tmp_path / "a"), make_tiny("llama", tmp_path / "b")
    assert load_model(first).revision == load_model(again).revision == tiny_lm("llama").revision
    weights = load_file(again / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, again / "model.safetensors", {"format": "pt"})
    assert load_model(first).revision != load_model(again).revision


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_nf4_runs_and_stays_near_full_precision(architecture: str, tmp_path: Path) -> None:
    folder = make_tiny(architecture, tmp_path)
    full, small = load_model(folder), load_model(folder, quantization="nf4")
    layers = [module for module in small.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert f"{len(layers)} layers in 4 bits" in small.reasons["quantization"]
    assert len(layers) == (21 if architecture == "llama" else 12)
    assert ("Conv1D" in small.reasons["quantization"]) == (architecture == "gpt2")
    ids = torch.tensor([full.encode(PROMPTS[0])])
    with torch.no_grad():
        a, b = full.model(ids).logits.flatten(), small.model(ids).logits.flatten()
    assert torch.cosine_similarity(a, b, dim=0) > 0.8
    v, kv = extract(small, PAIRS), extract(small, PAIRS, site="kv")
    zero = small.generate(PROMPTS, 0 * (v + kv), max_new_tokens=6, batch_size=1)
    assert [row.token_ids for row in zero] == [greedy(small, prompt, 6) for prompt in PROMPTS]
    moved = small.generate(PROMPTS, [8 * v.at([1]), 8 * kv, None], max_new_tokens=6)
    assert [row.token_ids for row in moved[:2]] != [row.token_ids for row in zero[:2]]


def test_nf4_works_in_any_width_and_passes_gradients_on_after_an_evaluation(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=96, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=101
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    lm = load_model(tmp_path, quantization="nf4")
    embedded = lm.model.get_input_embeddings()(torch.tensor([lm.encode(PROMPTS[0])]))
    gradients = []
    for _ in range(2):
        given = embedded.detach().clone().requires_grad_()
        lm.model(inputs_embeds=given).logits.square().sum().backward()
        gradients.append(given.grad)
        lm.generate(PROMPTS[:1], max_new_tokens=1)
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    again = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    assert all(torch.equal(tensor, again[name]) for name, tensor in lm.model.state_dict().items())


def test_auto_quantization_goes_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cpu = tiny_lm("llama").model.config, torch.device("cpu")
    wanted, reason = choose_quantization("auto", config, torch.float32, cpu)
    assert (wanted, "weights need" in reason) == (False, True)
    monkeypatch.setattr("workbench.placement.SHARE_FOR_WEIGHTS", 0.0)
    wanted, reason = choose_quantization("auto", config, torch.float32, cpu)
    assert (wanted, reason.startswith("nf4: weights need")) == (True, True)


GROUPED = {"num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 512}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
WIDE: dict[str, dict] = {
    "llama": GROUPED, "gpt_neox": {"intermediate_size": 512}, "falcon": {},
    "mixtral": {**GROUPED, "num_local_experts": 4},  # this and the next ones keep their experts in one tensor a layer
    "gpt_oss": {**GROUPED, "num_local_experts": 4},
    "qwen3_moe": {**GROUPED, **ROUTED, "num_experts": 4},
    "deepseek_v3": {
        **ROUTED, "intermediate_size": 512, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "kv_lora_rank": 64,
        "q_lora_rank": 64, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64, "first_k_dense_replace": 0,
    },
}  # fmt: skip


def wide(family: str) -> PreTrainedConfig:
    """A small configuration, but wider than the tiny ones, so that 4-bit scales weigh what they do at full size."""
    shape = {"vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return AutoConfig.for_model(family, **shape, **WIDE[family])


def in_memory(model: torch.nn.Module) -> int:
    """Bytes of all weights as they are: 4-bit ones with their scales, without the tables that a layer adds (1 KB)."""
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        scales: QuantState | None = getattr(parameter, "quant_state", None)
        if scales is not None:
            total += scales.absmax.nbytes + scales.state2.absmax.nbytes
    return total


@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("tied", [False, True])
def test_the_estimate_in_four_bits_is_what_is_loaded(family: str, tied: bool, tmp_path: Path) -> None:
    config = wide(family)
    config.tie_word_embeddings = tied
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    layers = dict(_four_bit_layers(skeleton))
    estimate = _four_bit_bytes(skeleton, layers, torch.float32)
    if family == "falcon":  # its linear layers are of a class of their own
        assert not layers and estimate == in_memory(load_model(tmp_path).model)
        return
    lm = load_model(tmp_path, quantization="nf4")
    packed = {name for name, module in lm.model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert packed == set(layers)
    assert estimate == pytest.approx(in_memory(lm.model), rel=0.01)
    if family in ("mixtral", "gpt_oss", "deepseek_v3", "qwen3_moe"):
        assert estimate > 0.4 * 4 * skeleton.num_parameters()  # all weights in 4 bits would be 0.13 of this


def test_auto_leaves_models_alone_that_have_nothing_to_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.placement.SHARE_FOR_WEIGHTS", 0.0)
    wanted, reason = choose_quantization("auto", wide("falcon"), torch.float32, torch.device("cpu"))
    assert (wanted, "no layer that bitsandbytes can hold" in reason) == (False, True)
    wanted, reason = choose_quantization("auto", wide("mixtral"), torch.float32, torch.device("cpu"))
    assert (wanted, reason.startswith("nf4: weights need")) == (True, True)


FAMILIES = [family for family in OWN if family not in ("mamba2", "qwen3_next", "opt")]  # OPT: see below


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_token_takes_in_the_cache_is_counted(family: str) -> None:
    lm = tiny_lm(family)
    cache = DynamicCache(config=lm.model.config)
    with torch.no_grad():
        lm.model(torch.arange(5, 10)[None], past_key_values=cache, use_cache=True)
    stored = [tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    assert bytes_a_token(lm) * 5 == _cached_bytes(lm) * 5 == sum(stored)


@pytest.mark.parametrize(("shared", "caching"), [(0, 4), (2, 2)])
def test_layers_of_different_widths_are_measured(
    shared: int, caching: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {**OWN["gemma3"], "global_head_dim": 32, "num_kv_shared_layers": shared, "hidden_size_per_layer_input": 64,
           "vocab_size_per_layer_input": len(tiny_tokenizer())}  # fmt: skip
    monkeypatch.setitem(OWN, "gemma4", own)
    monkeypatch.setitem(TYPES, "gemma4", "gemma4_text")
    lm = load_model(make_tiny("gemma4", tmp_path))
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        print(lm.model.config.head_dim)
    sliding, full = 2 * 2 * 16 * 4, 2 * 2 * 32 * 4  # keys and values, two heads, float32
    assert bytes_a_token(lm) == caching // 2 * (sliding + full)
    assert CACHES[lm.model] == bytes_a_token(lm)
    assert bytes_a_token(tiny_lm("gemma3")) == 4 * sliding


def test_layers_without_a_cache_count_as_if_they_had_one_and_opts_heads_are_measured() -> None:
    lm = tiny_lm("qwen3_next")  # two of four layers keep a state of fixed size
    assert bytes_a_token(lm) == 2 * _cached_bytes(lm) == 2 * 4 * 2 * 16 * 4
    lm = tiny_lm("opt")  # the tiny configuration names key-value heads that OPT knows nothing of
    assert (bytes_a_token(lm), _cached_bytes(lm)) == (768, 1536)


def test_measuring_the_cache_inside_of_a_block_changes_nothing() -> None:
    lm = tiny_lm("falcon")
    ids = torch.tensor([lm.encode(PROMPTS[0])])
    for x in (vector(lm), cache_edit(lm)):
        with lm.apply(x), torch.no_grad():
            alone = lm.model(ids).logits
        with lm.apply(x), torch.no_grad():
            assert _cached_bytes(lm) == bytes_a_token(lm)
            assert torch.equal(lm.model(ids).logits, alone)


def test_dtype_is_as_asked(tmp_path: Path) -> None:
    lm = load_model(make_tiny("llama", tmp_path), dtype="bfloat16")
    assert lm.model.dtype == torch.bfloat16
    assert lm.reasons["dtype"] == "bfloat16: asked for"
    assert len(lm.generate(PROMPTS, max_new_tokens=3)) == 3


def test_messages_without_a_template_use_the_plain_format() -> None:
    lm = tiny_lm("llama")
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert lm.render(chat) == "<|system|>S<|end|><|user|>U<|end|><|assistant|>\n"
    assert lm.render("as it is") == "as it is"
    template, lm.tokenizer.chat_template = lm.tokenizer.chat_template, None
    try:
        assert lm.render(chat) == "System: S\n\nQuestion: U\n\nAnswer:"
    finally:
        lm.tokenizer.chat_template = template


def test_a_base_model_gets_its_beginning_of_text_once(tmp_path: Path) -> None:
    lm = load_model(make_tiny("llama", tmp_path))
    lm.tokenizer.chat_template = None
    begin, chat = lm.tokenizer.get_vocab()["<|system|>"], [{"role": "user", "content": "U"}]
    plain = lm.encode(chat)
    lm.tokenizer.bos_token = "<|system|>"
    assert lm.encode(chat) == plain  # a tokenizer that knows the token but puts it nowhere, as GPT-2's
    lm.tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", begin)]
    )
    assert lm.tokenizer("x")["input_ids"][0] == begin
    assert lm.encode(chat) == [begin, *plain]
    assert encode(lm, {"messages": [*chat, {"role": "assistant", "content": "4"}]}, "r").input_ids.count(begin) == 1


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*refused"):
        load_model(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "no-such/model"}, "hf download no-such/model"),
        ({"name": "/no/such/folder"}, "no folder"),
        ({"name": "FOLDER", "dtype": "int3"}, "float32, bfloat16, float16"),
        ({"name": "FOLDER", "quantization": "int8"}, "'nf4', 'auto'"),
    ],
)
def test_mistakes_are_one_paragraph_with_the_next_step(
    arguments: dict, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    if arguments["name"] == "FOLDER":
        arguments = {**arguments, "name": make_tiny("llama", tmp_path)}
    with pytest.raises(ModelError, match=message) as caught:
        load_model(**arguments)
    assert "\n" not in str(caught.value)
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_broken_folder_is_explained(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="Could not load"):
        load_model(folder)
    shutil.copy(folder / "generation_config.json", folder / "config.json")
    with pytest.raises(ModelError, match="Could not load"):
        load_model(folder)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_missing_gpu_is_said() -> None:
    with pytest.raises(ModelError, match="no CUDA device"):
        load_model("anything", device="cuda")


def test_the_model_below_the_head_is_found() -> None:
    lm: LM = tiny_lm("gpt2")
    assert lm.base is lm.model.transformer


def test_only_the_advice_to_fetch_kernels_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_model(make_tiny("llama", tmp_path / "model"))
    source = logging.getLogger("bitsandbytes.backends.cpu.ops")
    source.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "no module")
    source.warning("something else")
    assert [record.getMessage() for record in caplog.records if record.name == source.name] == ["something else"]
