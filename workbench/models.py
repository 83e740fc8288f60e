"""Load a causal language model and say why it sits where it sits: device, dtype, quantisation, revision.

Covers the lab models, folders and Hugging Face names, safetensors only. Does not train, download datasets or run code
that comes with a checkpoint. Leans on transformers and bitsandbytes.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import logging

from workbench.placement import (
    ModelError,
    choose_device,
    choose_dtype,
    choose_quantization,
    share_in_four_bits,
    without_kernel_advice,
)

if TYPE_CHECKING:
    from workbench.generate import Generation
    from workbench.interventions import Intervention

DATA = Path(__file__).resolve().parent.parent / "data"
LAB = ("lab", "lab-small")
Prompt = str | list[dict[str, str]]
__all__ = ["LM", "ModelError", "choose_device", "choose_dtype", "find_blocks", "load_model"]


@dataclass(frozen=True, eq=False)
class LM:
    """A causal language model, its tokenizer and its decoder blocks in order."""

    name: str
    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    blocks: list[nn.Module] = field(repr=False)
    revision: str
    reasons: dict[str, str]

    @property
    def base(self) -> PreTrainedModel:
        """The model without its language-model head: what its forward calls (OPT's goes to the decoder inside)."""
        return _below_head(self.model)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def d_model(self) -> int:
        return self.model.config.get_text_config().hidden_size

    def render(self, prompt: Prompt) -> str:
        """A finished string: strings stay as they are, chat messages go through the tokenizer's template.

        A tokenizer without a template gets `System: ...`, `Question: ...`, `Answer: ...` parts with a blank line
        between, ending in `Answer:`, behind the token for the beginning of a text where the tokenizer would add one.
        """
        if isinstance(prompt, str):
            return prompt
        if self.tokenizer.chat_template:
            return self.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        first = self.tokenizer("x")["input_ids"][0]  # base models of Llama and Gemma are lost without it
        start = self.tokenizer.bos_token if first == self.tokenizer.bos_token_id else ""
        titles = {"system": "System", "user": "Question", "assistant": "Answer"}
        parts = [f"{titles.get(turn['role'], turn['role'].title())}: {turn['content']}" for turn in prompt]
        return start + "\n\n".join([*parts, "Answer:"])

    def encode(self, prompt: Prompt | list[int]) -> list[int]:
        """Token ids of a prompt (ids stay as they are); nothing is added, templates carry their own special tokens."""
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            return prompt
        ids = self.tokenizer(self.render(cast(Prompt, prompt)), add_special_tokens=False)["input_ids"]
        if not ids:
            raise ModelError(f"The prompt {prompt!r} has no tokens. Give at least one character.")
        return ids

    def generate(
        self,
        prompts: Sequence[Prompt | list[int]],
        interventions: "Intervention | Sequence[Intervention | None] | None" = None,
        max_new_tokens: int | Sequence[int] = 256,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        batch_size: int | None = None,
        stop: Sequence[str] | None = None,
        bias: dict[int, float] | None = None,
        bias_temperature: float = 1.0,
        progress: Callable[[int, int], None] | None = None,
        on_token: Callable[[dict[int, list[int]]], None] | None = None,
    ) -> "list[Generation]":
        """Continue every prompt; see `workbench.generate.generate` and, for how tokens are chosen, `decode.Decoding`.

        max_new_tokens: one for all, or one a prompt.
        """
        from workbench.choosing import Decoding
        from workbench.generate import generate

        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        decoding = Decoding(max(limits, default=1), temperature, top_p, tuple(stop or ()), bias or {}, bias_temperature)
        own: dict[str, Any] = {"seed": seed, "limits": limits, "batch_size": batch_size, "progress": progress}
        return generate(self, prompts, interventions, decoding, **own, on_token=on_token)

    def apply(
        self, x: "Intervention | Sequence[Intervention | None]", *, prompt_lengths: Sequence[int] | None = None
    ) -> AbstractContextManager[None]:
        """Intervene in everything that calls `lm.model` inside the block; see `workbench.interventions.apply`."""
        from workbench.interventions import apply

        return apply(self, x, prompt_lengths=prompt_lengths)


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    quantization: str | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
) -> LM:
    """Load `name`: "lab", "lab-small", a folder, or a Hugging Face name; in eval mode, without gradients.

    dtype: "float32", "bfloat16", "float16" or None (float32 on a CPU, bfloat16 on a GPU that has it).
    quantization: None, "nf4" (4-bit weights, arXiv 2305.14314) or "auto" (nf4 only where memory is short).
    Raises ModelError where the model is missing, needs a login, is not in safetensors or has an unknown shape.
    """
    without_kernel_advice()
    source = _source(str(name))
    reasons: dict[str, str] = {}
    place, reasons["device"] = choose_device(device)
    number, reasons["dtype"] = choose_dtype(dtype, place)
    with _teaching(str(name)):
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    four_bit, reasons["quantization"] = choose_quantization(quantization, config, number, place)
    arguments: dict[str, Any] = {"dtype": number, "use_safetensors": True, "trust_remote_code": False}
    arguments["revision"] = revision
    if four_bit:
        arguments["quantization_config"] = _nf4(number)
    with _teaching(str(name)), _quiet(Path(source)):
        model = AutoModelForCausalLM.from_pretrained(source, device_map={"": place}, **arguments)
    if four_bit:
        reasons["quantization"] += share_in_four_bits(model, str(name))
        _keep_format(model)
    model.eval().requires_grad_(False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    identity = (
        _hash_weights(Path(source)) if Path(source).is_dir() else getattr(config, "_commit_hash", None) or "unknown"
    )
    return LM(str(name), model, tokenizer, find_blocks(model), identity, reasons)


def _nf4(compute: torch.dtype) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def end_tokens(lm: LM) -> frozenset[int]:
    """Tokens that end a row: the generation config's, else the tokenizer's."""
    listed: Any = lm.model.generation_config.eos_token_id
    if listed is None:
        listed = lm.tokenizer.eos_token_id
    return frozenset(() if listed is None else [listed] if isinstance(listed, int) else listed)


def takes_last_only(lm: LM) -> bool:
    """Whether the model can leave out the logits of all but the last token."""
    return "logits_to_keep" in inspect.signature(type(lm.model).forward).parameters


def find_blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Decoder blocks in order, found by structure: the module list as long as the model is deep.

    Covers `model.layers` (Llama and its kin), `transformer.h` (GPT-2, Falcon), `gpt_neox.layers`, `decoder.layers`
    (OPT) and the language part of multi-modal wrappers.
    """
    if "past_key_values" not in inspect.signature(type(_below_head(model)).forward).parameters:
        raise ModelError(
            f"{type(model).__name__} keeps a recurrent state of its own instead of a cache of keys and values. "
            "Use a decoder with attention, in all or some of its layers."
        )
    depth = model.config.get_text_config().num_hidden_layers
    foreign = ("vision", "visual", "audio", "image", "encoder", "speech")
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and not any(word in name for word in foreign)
    }
    found = [module for module in lists.values() if len(module) == depth and _has_attention(module)]
    if len(found) == 1:
        return list(found[0])
    seen = ", ".join(f"{name} ({len(module)})" for name, module in lists.items()) or "none"
    raise ModelError(
        f"Cannot tell which module list of {type(model).__name__} holds its {depth} decoder blocks; module lists: "
        f"{seen}. Use a decoder-only model of the Llama, GPT-2, GPT-NeoX, Falcon or OPT shape."
    )


def _keep_format(model: PreTrainedModel) -> None:
    """Hold bitsandbytes 0.50 back from repacking 4-bit weights in their first evaluation on CPUs with AVX512-BF16.

    That format's kernel passes no gradients on, so training after an evaluation would be silently wrong; it rounds by
    the number of rows, and its scales change whenever the state dictionary is read.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _below_head(model: PreTrainedModel) -> PreTrainedModel:
    inner = model.base_model
    return getattr(inner, "decoder", inner)


def _has_attention(layers: nn.ModuleList) -> bool:
    names = " ".join(child for layer in layers for child, _ in layer.named_children()).lower()
    return any(word in names for word in ("attn", "attention", "mixer"))


def _source(name: str) -> str:
    if name in LAB:
        if not (DATA / name).is_dir():
            raise ModelError(
                f"The lab model {name!r} is not at {DATA / name}. Restore the data folder: git checkout -- data"
            )
        return str(DATA / name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any(folder.glob("*.safetensors")):
            other = ", ".join(
                sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            )
            raise ModelError(
                f"{folder} holds no .safetensors file (weight files there: {other or 'none'}). Pickled weights can "
                "run code and are refused. Convert: model.save_pretrained(FOLDER, safe_serialization=True)"
            )
        return str(folder)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(
            f"There is no folder {name!r}. Give an existing folder, a Hugging Face name, or one of {', '.join(LAB)}."
        )
    return name


@contextmanager
def _quiet(folder: Path) -> Iterator[None]:
    """No progress bar for a folder that loads in a moment."""
    shown = logging.is_progress_bar_enabled()
    if sum(file.stat().st_size for file in folder.glob("*.safetensors")) < 100e6 and folder.is_dir():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _teaching(AbstractContextManager["_teaching"]):
    """Turn a library's loading error into one paragraph with the next command."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, (OSError, ValueError, ImportError, KeyError, SafetensorError)) or isinstance(
            error, ModelError
        ):
            return
        first = " ".join(str(error).split())[:300]
        text = f"{type(error).__name__} {first}".lower()
        if "gated" in text or "401" in text or "403" in text:
            hint = f"It needs a login and the licence accepted on its page: hf auth login, then hf download {self.name}"
        elif "safetensors" in text:
            hint = "Only safetensors weights are loaded; look for a revision or a copy that has them."
        elif "trust_remote_code" in text or "custom code" in text:
            hint = "It brings its own code, which is never run here. Choose a model that transformers knows."
        else:
            hint = (
                f"Check the spelling and the network (HF_HUB_OFFLINE unset?): hf download {self.name}, "
                "or start with load_model('lab')."
            )
        raise ModelError(f"Could not load {self.name!r}. {hint} The library said: {first}") from None


def _hash_weights(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:12]
