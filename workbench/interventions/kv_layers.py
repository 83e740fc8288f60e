"""What each layer of a model caches and which operations it allows, found by running one token.

Nothing here goes by a model's name. One token alone sees only itself: run at positions 0 and 7, its keys differ by
their rotation or not at all, and its values by nothing, unless positions are in the states (learned embeddings).
"""

import inspect
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from transformers.cache_utils import (
    DummyLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from workbench.cache import new_cache
from workbench.interventions.heads import unsteered
from workbench.interventions.kv import PLAIN
from workbench.interventions.kv_queries import watch_attention
from workbench.interventions.rotary import Rotary, rotary_of
from workbench.models import LM, ModelError

APART = 7  # positions between the two runs of a token
CLOSE = 0.02  # of the norm: bfloat16 keeps 8 bits


@dataclass(frozen=True)
class Placement:
    """How a model's cache entries know their position: layers with rotated keys, and why entries cannot move, if so."""

    rotated: tuple[int, ...]
    fixed: str = ""


def placement(lm: LM) -> Placement:
    """Run one token at two positions and compare what is cached."""
    return _compare(lm, _run(lm)[0])


def describe_cache(lm: LM) -> pd.DataFrame:
    """One row a layer: what it caches, and which operations it allows (`KV`, `kv_ops`, `kv_blocks`, ...).

    cache: plain, sliding, linear, shared (uses the entries of the layer in `shared_with`), none, or the type's name.
    window: tokens that a sliding layer sees; kv_heads, head_dim: of its keys; rotated: whether keys carry a rotary
    position. drop and splice change all layers together, so one layer that cannot forbids them everywhere. Raises
    ModelError where the model has no cache.

    >>> from workbench.models import load_model
    >>> table = describe_cache(load_model("lab-small"))
    >>> bool(table["rotated"].all() and table["splice"].all()), set(table["cache"])
    (True, {'plain'})
    """
    cache, sources = _run(lm)
    where = _compare(lm, cache)
    chunked = "chunked_attention" in (getattr(lm.model.config.get_text_config(), "layer_types", None) or ())
    rows = []
    for layer in range(len(lm.blocks)):
        entry = cache.layers[layer] if layer < len(cache.layers) else None
        rows.append(_row(layer, entry, sources.get(layer), layer in where.rotated))
    whole = all(row["add"] or row["cache"] in ("shared", "none") for row in rows)
    for row in rows:
        row["drop"] = row["add"] and whole and not chunked
        row["splice"] = row["add"] and whole and not where.fixed
        row["compress"] = row["quantize"] = row["add"] and whole and row["cache"] != "sliding"
    return pd.DataFrame(rows).astype(dict.fromkeys(("window", "shared_with", "kv_heads", "head_dim"), "Int64"))


def _row(layer: int, entry: Any, source: int | None, rotated: bool) -> dict[str, Any]:
    """One layer by itself."""
    plain = type(entry) in PLAIN and entry.is_initialized
    return {
        "layer": layer,
        "cache": _kind(entry, source),
        "window": entry.sliding_window if isinstance(entry, DynamicSlidingWindowLayer) else pd.NA,
        "shared_with": pd.NA if source is None else source,
        "kv_heads": entry.keys.shape[1] if plain else pd.NA,
        "head_dim": entry.keys.shape[3] if plain else pd.NA,
        "rotated": rotated,
        "add": plain,
        "replace": plain,
        "scale": plain,
    }


def _run(lm: LM) -> tuple[Any, dict[int, int]]:
    """The cache of one token at positions 0 and 7, and for each layer that stores nothing, whose keys it used."""
    cache = new_cache(lm)
    used: dict[int, Tensor] = {}

    def see(layer: int, query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
        used.setdefault(layer, key)

    token = torch.full((2, 1), lm.encode("a")[-1], device=lm.device)
    places: dict[str, Any] = {}
    if "position_ids" in inspect.signature(type(lm.base).forward).parameters:
        places["position_ids"] = torch.tensor([[0], [APART]], device=lm.device)
    with torch.no_grad(), unsteered(lm), watch_attention(lm, see):
        lm.base(input_ids=token, past_key_values=cache, use_cache=True, **places)
    if not cache.layers or all(isinstance(entry, DummyLayer) for entry in cache.layers):
        raise ModelError(f"{lm.name!r} cached nothing. Use a decoder with a key-value cache.")
    empty = [layer for layer, entry in enumerate(cache.layers) if isinstance(entry, DummyLayer)]
    return cache, {
        layer: source
        for layer in empty
        for source, key in used.items()
        if layer in used and source < layer and source not in empty and used[layer].data_ptr() == key.data_ptr()
    }


def _compare(lm: LM, cache: Any) -> Placement:
    """What the two runs of one token tell about keys and values."""
    plain = {layer: entry for layer, entry in enumerate(cache.layers) if type(entry) in PLAIN and entry.is_initialized}
    moved = [layer for layer, entry in plain.items() if _apart(entry.keys)]
    states = [layer for layer, entry in plain.items() if _apart(entry.values)]
    if states:
        return Placement((), f"the states of layer {states[0]} depend on the position (learned embeddings)")
    if not moved:
        return Placement(())
    try:
        rotary = rotary_of(lm)
    except ModelError as error:
        return Placement(tuple(moved), str(error))
    places = torch.tensor([0, APART], device=lm.device)
    for layer in moved:
        keys = plain[layer].keys[:, :, -1].float()
        try:
            apart = rotary is None or _apart(rotary.turn(keys, places.to(keys.device), layer, back=True))
        except TypeError:  # a rotary function that takes other arguments
            apart = True
        if apart:
            return Placement(tuple(moved), f"the rotary embedding of layer {layer} could not be taken off its keys")
    return Placement(tuple(moved), _stretched(lm, rotary))


def _stretched(lm: LM, rotary: Rotary | None) -> str:
    """Rotary variants whose angles depend on the length of the text: entries of two texts do not go together."""
    rope = getattr(lm.model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {part.get("rope_type", "default") for part in (rope, *rope.values()) if isinstance(part, dict)}
    changing = sorted(kinds & {"dynamic", "longrope"})
    return f"its rotary angles change with the text's length (rope_type {changing[0]!r})" if changing else ""


def _apart(pair: Tensor) -> bool:
    first, second = pair.float()
    return bool((first - second).norm() > CLOSE * first.norm())


def _kind(entry: Any, source: int | None) -> str:
    if entry is None or isinstance(entry, DummyLayer):
        return "none" if source is None else "shared"
    if isinstance(entry, DynamicSlidingWindowLayer) and type(entry) in PLAIN:
        return "sliding"
    if type(entry) in PLAIN:
        return "plain"
    if type(entry).__name__ == "LinearAttentionLayer" and isinstance(entry, LinearAttentionCacheLayerMixin):
        return "linear"
    return type(entry).__name__
