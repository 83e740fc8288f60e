"""Virtual tokens before the text: prompt tuning (arXiv 2104.08691) and prefix tuning (arXiv 2101.00190) of PEFT.

Prefix tuning learns keys and values of every layer, prompt tuning embeddings whose keys and values the model works out.
A later token sees of either only what lies in the cache, so both are one thing here: entries that stand in the cache
before the first token of the text, the same for every row. The text's rotary positions start behind them, as in PEFT.
Positions of other interventions still count the row's own text. Not covered: sliding windows and linear attention.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from workbench.cache import GrowingLayer, new_cache
from workbench.interventions.forward import named, parameters_of
from workbench.models import LM, ModelError

KINDS = ("PROMPT_TUNING", "PREFIX_TUNING")
Entries = list[tuple[Float[Tensor, "1 heads virtual head_dim"], Float[Tensor, "1 heads virtual head_dim"]]]


def virtual_tokens(folder: Path) -> int:
    """How many virtual tokens an adapter puts before the text; 0 for LoRA and its kin."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return int(config["num_virtual_tokens"]) if config.get("peft_type") in KINDS else 0


def check_virtual(lm: LM, folder: Path) -> None:
    """Raise ModelError where the model has other layers than plain caches, or other widths than the adapter."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    check_plain_cache(lm)
    learnt = load_file(folder / "adapter_model.safetensors").get("prompt_embeddings")
    shape = None if learnt is None else tuple(learnt.shape)
    if config["peft_type"] == "PROMPT_TUNING":
        wanted = (config["num_virtual_tokens"], lm.model.get_input_embeddings().weight.shape[1])
    else:
        heads, width = cache_shape(lm.model.config.get_text_config())
        wanted = (config["num_virtual_tokens"], len(lm.blocks) * 2 * heads * width)
    if shape != wanted:
        raise ModelError(
            f"The adapter {folder} does not fit {lm.name!r}: its virtual tokens are {shape}, the model needs "
            f"{wanted}. Use the model it was trained on (base_model_name_or_path in its adapter_config.json)."
        )


def check_plain_cache(lm: LM) -> None:
    """Raise ModelError for a model whose layers do not all keep every key and value."""
    kinds = sorted({type(layer).__name__ for layer in new_cache(lm).layers if type(layer) is not GrowingLayer})
    if kinds:
        raise ModelError(
            f"Virtual tokens stand in a plain cache before the text, but {lm.name!r} has layers of another kind "
            f"({', '.join(kinds)}), which would let go of them. Use a LoRA adapter (method='lora') with this model."
        )


def refuse_edits(virtual: int) -> None:
    """Raise ModelError where virtual tokens would stand among the entries that an edit of the cache counts."""
    if virtual:
        raise ModelError(
            f"Edits of the cache count its entries from the first token of the text, but the adapter puts {virtual} "
            "virtual tokens before it. Use one of them at a time, or a LoRA adapter."
        )


@contextmanager
def prefixed(lm: LM, folder: Path) -> Iterator[None]:
    """Every forward on an empty cache finds the adapter's entries in it; the others go on behind them."""
    entries = _entries(lm, folder)
    count, base = virtual_tokens(folder), lm.base
    limit = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    own, original = vars(base).get("forward"), base.forward
    names = parameters_of(original)

    @wraps(original)  # its argument names are read by those who wrap it again
    def forward(*args: Any, **kwargs: Any) -> Any:
        call = named(names, args, kwargs)
        _place(lm, call, entries)
        tokens = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        total = call["past_key_values"].get_seq_length() + tokens.shape[1]
        if limit is not None and total > limit:
            raise ModelError(
                f"{count} virtual tokens and {total - count} tokens of text are more than the {limit} positions of "
                f"{lm.name!r}. Shorten the prompt, or ask for fewer new tokens."
            )
        _move(call, count)
        return original(**call)

    base.forward = forward
    try:
        yield
    finally:
        del base.forward
        if own is not None:
            base.forward = own


def _place(lm: LM, call: dict[str, Any], entries: Entries) -> None:
    """Fill an empty cache, or one made for this call where there is none."""
    tokens = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    if call.get("past_key_values") is None:
        call["past_key_values"] = new_cache(lm)
    cache = call["past_key_values"]
    if cache.get_seq_length() == 0:
        for layer, (keys, values) in enumerate(entries):
            cache.update(keys.expand(len(tokens), -1, -1, -1), values.expand(len(tokens), -1, -1, -1), layer)


def _move(call: dict[str, Any], count: int) -> None:
    """Mask and positions of the text, `count` further on."""
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor):
        if mask.ndim != 2:
            raise ModelError("Virtual tokens need a two-dimensional attention mask (rows, tokens).")
        call["attention_mask"] = torch.cat([mask.new_ones(len(mask), count), mask], dim=1)
    elif mask is not None:
        raise ModelError("Virtual tokens need a two-dimensional attention mask (rows, tokens); got a prepared one.")
    if call.get("position_ids") is not None:
        call["position_ids"] = call["position_ids"] + count


@torch.no_grad()
def _entries(lm: LM, folder: Path) -> Entries:
    """Keys and values of one row, by layer."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    learnt = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"].to(lm.device, lm.model.dtype)
    if config["peft_type"] == "PREFIX_TUNING":
        # PEFT's order: token, then layer by layer keys before values, then head
        shape = cache_shape(lm.model.config.get_text_config())
        whole = learnt.view(len(learnt), len(lm.blocks), 2, *shape).permute(1, 2, 3, 0, 4)
        return [(layer[0][None], layer[1][None]) for layer in whole]
    cache = new_cache(lm)
    forward: Callable[..., Any] = lm.base.forward
    forward(inputs_embeds=learnt[None], past_key_values=cache, use_cache=True)
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers if isinstance(layer, GrowingLayer)]


def cache_shape(config: Any) -> tuple[int, int]:
    """Key-value heads of a layer and the width of one, from the configuration of a text model."""
    heads = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(heads or config.num_attention_heads), int(width)
