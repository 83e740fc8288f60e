"""Tiny random models of many architectures, saved to folders: no download, loaded in milliseconds.

Weights are scaled up from the libraries' initial 0.02 so that tokens depend on context and interventions change them.
Widths are multiples of 64 so that NF4 runs on every CPU. `ARCHITECTURES` are the five that most tests run on,
`FAMILIES` the sixteen of test_architectures.
"""

from collections.abc import Container
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from workbench.models import LM, load_model

ARCHITECTURES = ("llama", "qwen3", "gemma3", "gpt2", "mistral")
SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
HALVES = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 24}
OWN: dict[str, dict] = {
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 4096},  # learned positions
    "gpt_neox": {"num_key_value_heads": 4, "rope_parameters": {**PARTIAL, "partial_rotary_factor": 0.25}},
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
    "mistral_sliding": {"sliding_window": 12},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
    "phi3": {"rope_parameters": PARTIAL, "num_attention_heads": 4},
    "gemma2": {**HALVES, "query_pre_attn_scalar": 16},
    "gemma3": {**HALVES, "query_pre_attn_scalar": 16},
    "olmo2": {},
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},  # 0: this layer has no rotary embedding
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2,
                "logits_scaling": 4.0},
    "falcon": {"multi_query": True, "parallel_attn": True, "alibi": False},  # one key-value head
    "stablelm": {"use_parallel_residual": True, "rope_parameters": {**PARTIAL, "partial_rotary_factor": 0.25}},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_next": {  # the gated delta rule in its first and last layer
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2, "linear_num_value_heads": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "mlp_only_layers": [0, 1, 2, 3], "rope_parameters": {**PARTIAL, "partial_rotary_factor": 0.25},
    },
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},  # the head calls the decoder inside of the base model
    "gpt_oss": {**HALVES, "num_local_experts": 4, "num_experts_per_tok": 2},  # cos and sin of half the width
    "gemma4": {  # layers of other widths, some of which share the keys and values of earlier ones
        **HALVES, "global_head_dim": 32, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 64,
        "vocab_size_per_layer_input": 101,
    },
    "gptj": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 4096, "rotary_dim": 8},
    "deepseek_v3": {  # caches latents
        "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 64,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16},  # no attention at all
}  # fmt: skip
SAYS_OTHERWISE: dict[str, Container[str]] = {
    "gpt2": SHAPE, "gptj": SHAPE, "falcon": ("head_dim", "num_key_value_heads"),
    "deepseek_v3": ("head_dim", "num_key_value_heads"), "mamba2": ("head_dim",),
}  # fmt: skip
# transformers' names, where they differ
TYPES = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "mistral_sliding": "mistral"}
ASIDE = ("mistral", "opt", "gpt_oss", "gemma4", "gptj", "deepseek_v3", "mamba2")
FAMILIES = tuple(family for family in OWN if family not in ASIDE)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{{ '\n' }}{% endif %}"
    "{{ m['content'] + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, plus the five special tokens of the lab's template."""
    alphabet = ["\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", extra_special_tokens=SPECIAL[2:]
    )
    fast.chat_template = TEMPLATE
    return fast


def tiny_config(family: str, vocabulary: int) -> PreTrainedConfig:
    """Three or four layers, width 64, mostly two key-value heads; what sets a family apart is in `OWN`."""
    if family not in OWN:
        raise ValueError(f"architecture={family!r}; allowed: {', '.join(OWN)}")
    ends = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}
    model_type = TYPES.get(family, family)
    shape = {key: value for key, value in SHAPE.items() if key not in SAYS_OTHERWISE.get(model_type, ())}
    return AutoConfig.for_model(model_type, **{**ends, **shape, **OWN[family]})


def embedding_scale(config: PreTrainedConfig) -> float:
    """What makes embeddings of unit length: some families multiply them before the first block."""
    if config.model_type.startswith("gemma"):
        return config.hidden_size**-0.5
    return 1.0 / getattr(config, "embedding_multiplier", 1.0)


def make_tiny(architecture: str, folder: Path, seed: int = 0) -> Path:
    """Save a tiny random model and its tokenizer under `folder`; the same seed gives the same weights."""
    tokenizer = tiny_tokenizer()
    config = tiny_config(architecture, len(tokenizer))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    scale = 1.0 if "embed" in name or "wte" in name or "wpe" in name else 2.0
                    scale = embedding_scale(config) if "embed_tokens" in name else scale
                    parameter.normal_(0, scale / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def tiny_lm(architecture: str) -> LM:
    """The tiny model of an architecture, loaded once a test session; leave it as it is."""
    with TemporaryDirectory() as folder:
        return load_model(make_tiny(architecture, Path(folder)))


def greedy(lm: LM, prompt: str, tokens: int = 12, **arguments: object) -> list[int]:
    """The reference: transformers' own greedy generation of one prompt alone."""
    ids = torch.tensor([lm.encode(prompt)])
    output = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, **arguments
    )
    return output[0, ids.shape[1] :].tolist()
