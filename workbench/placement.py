"""Choose where and how a model sits in memory, and say why: device, dtype, 4-bit weights; what its cache takes.

Leans on bitsandbytes for NF4 (QLoRA, arXiv 2305.14314). `models` uses this; nothing here loads weights.
"""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import psutil
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

if TYPE_CHECKING:
    from workbench.models import LM

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARE_FOR_WEIGHTS = 0.7  # of free memory; the rest is for the cache and activations
NF4_BYTES = 4.127 / 8  # a weight: 4 bits, and 0.127 of double-quantised scales (QLoRA, arXiv 2305.14314, section 3)
CACHES: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # bytes a token, by model, where it had to be run


class ModelError(ValueError):
    """A model that cannot be loaded or used as asked; the message says what to do next."""


def without_kernel_advice() -> None:
    """Keep bitsandbytes from asking, on CPUs with AVX512-BF16, for a faster kernel that is fetched from the hub.

    It does so once, when peft or transformers import it; its own kernel is then used and gives the same numbers.
    """
    source = logging.getLogger("bitsandbytes.backends.cpu.ops")
    if _is_other not in source.filters:
        source.addFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    return "from kernels-community" not in record.msg


def choose_device(device: str | torch.device | None) -> tuple[torch.device, str]:
    """The device and the reason for it."""
    if device is not None:
        place = torch.device(device)
        if place.type == "cuda" and not torch.cuda.is_available():
            raise ModelError(
                f"device={device!r} asked for, but torch finds no CUDA device. Use device='cpu' or leave it out."
            )
        return place, f"{place}: asked for"
    if torch.cuda.is_available():
        return torch.device("cuda", 0), f"cuda:0: {torch.cuda.get_device_name(0)}"
    return torch.device("cpu"), "cpu: no CUDA device found"


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype of weights and activations, and the reason for it."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ModelError(f"dtype={dtype!r} is unknown. Allowed: {', '.join(DTYPES)}.")
        dtype = DTYPES[dtype]
    if dtype is not None:
        return dtype, f"{str(dtype).removeprefix('torch.')}: asked for"
    if device.type == "cpu":
        return torch.float32, "float32: exact and quickest for small models on a CPU"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "bfloat16: half the memory, same range as float32"
    return torch.float16, f"float16: {device.type} without native bfloat16"


def choose_quantization(wanted: str | None, config: Any, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
    """Whether to load in 4 bits, and the reason; refuses widths that bitsandbytes cannot run on this CPU."""
    if wanted is None:
        return False, "none: not asked for"
    if wanted not in ("nf4", "auto"):
        raise ModelError(f"quantization={wanted!r} is unknown. Allowed: None, 'nf4', 'auto'.")
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    layers = dict(_four_bit_layers(skeleton))
    if wanted == "auto":
        whole = skeleton.num_parameters() * dtype.itemsize
        small = _four_bit_bytes(skeleton, layers, dtype)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        size = f"weights need {whole / 1e9:.2f} GB of {free / 1e9:.1f} GB free"
        if whole <= SHARE_FOR_WEIGHTS * free:
            return False, f"none: {size}; 4 bits would only slow it down"
        if not layers:
            return False, f"none: {size}, but there is no layer that bitsandbytes can hold in 4 bits"
        reason = f"nf4: {size}, more than {SHARE_FOR_WEIGHTS:.0%}; about {small / 1e9:.2f} GB in 4 bits"
    else:
        reason = "nf4: asked for"
    if any(isinstance(layer, Conv1D) for layer in layers.values()):
        reason += "; Conv1D layers are transposed into 4-bit linear layers"
    return True, f"{reason}; {len(layers)} layers in 4 bits, embeddings and head in {str(dtype).removeprefix('torch.')}"


def _four_bit_layers(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The layers that transformers would hand to bitsandbytes: no heads, no tied ones, no subclasses of linear ones."""
    kept = Bnb4BitHfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, Conv1D) and should_convert_module(name, kept):
            yield name, module


def _four_bit_bytes(model: Any, layers: dict[str, nn.Module], dtype: torch.dtype) -> float:
    """Bytes of all weights, these layers' in 4 bits: embeddings, biases and experts that share a tensor stay whole."""
    packed = sum(layer.get_parameter("weight").numel() for layer in layers.values())
    return packed * NF4_BYTES + (model.num_parameters() - packed) * dtype.itemsize


def share_in_four_bits(model: nn.Module, name: str) -> str:
    """What of the model the 4-bit layers hold: some architectures have linear layers that bitsandbytes leaves alone.

    Falcon's are of a class of its own, and experts that sit in one tensor are no linear layers: both stay as they are.
    """
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} ({name!r}) has no linear layer that bitsandbytes can hold in 4 bits. Load it "
            "with quantization=None, and with dtype='bfloat16' if memory is short."
        )
    packed = sum(layer.weight.numel() for layer in layers)
    small = sum(layer.in_features * layer.out_features for layer in layers)
    share = small / (small + sum(parameter.numel() for parameter in model.parameters()) - packed)
    return f"; that is {share:.0%} of all weights"


def bytes_a_token(lm: "LM") -> int:
    """Bytes that one token of one row takes in the cache, all layers together, each as if it kept every token.

    Read from the config where it says how many key-value heads there are, the same in all layers; else one token is run
    through the plain model, once, and what it left in the cache is counted (Gemma 4, latents, multi-query Falcon).
    """
    config = lm.model.config.get_text_config()
    try:
        heads, latent = getattr(config, "num_key_value_heads", None), getattr(config, "kv_lora_rank", None)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    except RuntimeError:  # transformers' word for values that differ between layers
        heads = None
    if heads is not None and latent is None:
        return 2 * len(lm.blocks) * heads * width * lm.model.dtype.itemsize
    if lm.model not in CACHES:
        CACHES[lm.model] = _cached_bytes(lm)
    return CACHES[lm.model]


def _cached_bytes(lm: "LM") -> int:
    from workbench.interventions.heads import unsteered

    cache = DynamicCache(config=lm.model.config)
    one = torch.ones(1, 1, dtype=torch.long, device=lm.device)  # any token will do; as a mask: it is no padding
    with torch.no_grad(), unsteered(lm):
        lm.base(input_ids=one, attention_mask=one, past_key_values=cache, use_cache=True)
    stored = [getattr(entry, name, None) for entry in cache.layers for name in ("keys", "values")]
    return max(1, sum(tensor.nbytes for tensor in stored if isinstance(tensor, torch.Tensor)))
