"""Tiny random models of five architectures, saved to folders: no download, loaded in milliseconds.

Weights are scaled up from the libraries' initial 0.02 so that tokens depend on context and interventions change them.
Widths are multiples of 64 so that NF4 runs on every CPU.
"""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from workbench.models import LM, load_model

ARCHITECTURES = ("llama", "qwen3", "gemma3", "gpt2", "mistral")
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


def tiny_config(architecture: str, vocabulary: int) -> PreTrainedConfig:
    """Three layers (Gemma 3: four, sliding and full attention in turns), width 64, two key-value heads."""
    shared = {
        "vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
        "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
    }  # fmt: skip
    if architecture == "llama":
        return LlamaConfig(**shared, tie_word_embeddings=True)
    if architecture == "qwen3":
        return Qwen3Config(**shared, tie_word_embeddings=False)
    if architecture == "mistral":
        return MistralConfig(**shared, sliding_window=None)
    if architecture == "gemma3":
        shared["num_hidden_layers"] = 4
        layers = ["sliding_attention", "full_attention"] * 2
        return Gemma3TextConfig(**shared, sliding_window=24, layer_types=layers, query_pre_attn_scalar=16)
    if architecture == "gpt2":
        return GPT2Config(
            vocab_size=vocabulary, n_embd=64, n_layer=3, n_head=4, n_positions=4096,
            pad_token_id=0, bos_token_id=None, eos_token_id=1,
        )  # fmt: skip
    raise ValueError(f"architecture={architecture!r}; allowed: {', '.join(ARCHITECTURES)}")


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
                    scale = 0.125 if "embed" in name and architecture == "gemma3" else scale  # it multiplies by 8
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
