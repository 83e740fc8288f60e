"""Read and cut the arguments of a forward pass: where its tokens stand in their texts, and how to run it in parts."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.models import LM, ModelError


def parameters_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a forward's arguments, in order."""
    return tuple(inspect.signature(forward).parameters)


def named(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def wants_cache(call: dict[str, Any], lm: LM) -> bool:
    """Whether a forward fills a cache."""
    asked = call.get("use_cache")
    return bool(lm.model.config.get_text_config().use_cache if asked is None else asked)


def text_positions(call: dict[str, Any], seen: int, rows: int, width: int) -> Int[Tensor, "rows seq"]:
    """Where each token of a forward stands in its own row's text, counted from 0; -1 for padding.

    From the attention mask where it covers cache and tokens, else from the position ids, else from the cache's length.
    """
    mask, places = call.get("attention_mask"), call.get("position_ids")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == seen + width:
        real = mask[:, seen:] > 0
        return ((mask > 0).long().cumsum(1) - 1)[:, seen:].masked_fill(~real, -1)
    if isinstance(places, Tensor) and places.ndim == 2:
        return places.expand(rows, width)
    return torch.arange(seen, seen + width).expand(rows, width)


def refuse_unsplittable(call: dict[str, Any]) -> None:
    """Refuse what a forward that runs in two parts cannot honour."""
    mask, places = call.get("attention_mask"), call.get("position_ids")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise ModelError(
            "A KV edit needs a two-dimensional attention mask (rows, tokens); this forward brings a prepared one."
        )
    if isinstance(places, Tensor) and places.ndim != 2:
        raise ModelError(f"A KV edit needs position ids of shape (rows, tokens); got {tuple(places.shape)}.")
    if call.get("output_attentions"):
        raise ModelError(
            "A KV edit runs the prompt in two parts, so attention maps of it cannot be returned. Leave "
            "output_attentions off."
        )


def columns(call: dict[str, Any], start: int, stop: int, seen: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """The arguments of a forward, cut to the tokens start..stop; the mask also covers everything before."""
    cut = dict(call)
    for name, value in call.items():
        if name == "attention_mask" and value is not None:
            cut[name] = value[:, : seen + stop]
        elif (
            isinstance(value, Tensor)
            and value.ndim >= 2
            and value.shape[1] == shape[1]
            and value.shape[0] in (1, shape[0])
        ):
            cut[name] = value[:, start:stop]
    return cut


def rotary_positions(call: dict[str, Any], column: int, seen: int, rows: int) -> Int[Tensor, " rows"]:
    """Rotary positions of the tokens in `column` (-1 = the last cached one): as the model was told, else by count."""
    places = call.get("position_ids")
    if places is None:
        return torch.full((rows,), seen + column)
    first = places[:, 0] - 1 if column < 0 else places[:, column]
    return first.expand(rows)


def joined(outputs: list[Any]) -> Any:
    """One output, as if the parts had been a single forward."""
    result = outputs[-1]
    if len(outputs) > 1:
        result.last_hidden_state = torch.cat([part.last_hidden_state for part in outputs], dim=1)
        if result.hidden_states is not None:
            result.hidden_states = tuple(
                torch.cat(layer, dim=1) for layer in zip(*(part.hidden_states for part in outputs), strict=True)
            )
    return result
