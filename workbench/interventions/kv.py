"""Edit the key-value cache once, after the prompt is cached: K <- K + c_k S_K, V <- V + c_v S_V at one cached token.

The edited token is n-2 of a prompt of n tokens, or an earlier one by choice: token n-1 is processed afterwards and is
the first to see the edit (KV cache steering, arXiv 2507.08799). Keys are stored un-rotated and rotated to the edited
position of each row. Layers without a plain cache are refused by name. Other operations on a filled cache: `kv_ops`,
`kv_blocks`, `kv_compress`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from workbench.cache import GrowingLayer, ThinnedSlidingLayer
from workbench.interventions.concept import Intervention, check_layers, check_origin
from workbench.interventions.rotary import Rotary
from workbench.models import LM, ModelError

LAST_CACHED = -2  # token n-1 still has to be processed after an edit
PLAIN = (DynamicLayer, DynamicSlidingWindowLayer, GrowingLayer, ThinnedSlidingLayer)


@dataclass(frozen=True, eq=False)
class KV(Intervention):
    """What is added to the keys and values of one cached token; used as it is, both strengths are 1 and layer 0 is left
    out.

    keys are un-rotated (as if the token stood at position 0) for the layers in `rotated`; the other layers have no
    rotary embedding. A sum of several with their own layers, heads, positions and strengths gives each its own c_k and
    c_v: `kv.at(1, heads=0).scaled(0, 2) + kv.at(2, position=-3)`.
    """

    keys: dict[int, Float[Tensor, "kv_heads head_dim"]]
    values: dict[int, Float[Tensor, "kv_heads head_dim"]]
    layers: tuple[int, ...] | None = None  # None: all but layer 0
    key_strength: float = 1.0
    value_strength: float = 1.0
    rotated: tuple[int, ...] = ()
    model: str = ""
    revision: str = ""
    details: dict[str, str] = field(default_factory=dict)
    heads: tuple[int, ...] | None = None  # of the key-value heads; None: all
    position: int = LAST_CACHED  # from the end of the prompt

    @property
    def chosen(self) -> tuple[int, ...]:
        """The layers that are edited."""
        return tuple(layer for layer in sorted(self.values) if layer >= 1) if self.layers is None else self.layers

    def scaled(self, keys: float = 1.0, values: float = 1.0) -> "KV":
        """Keys and values times their own factors (c_k and c_v of the paper)."""
        return replace(self, key_strength=self.key_strength * keys, value_strength=self.value_strength * values)

    def at(
        self,
        layers: Iterable[int] | int | None = None,
        heads: Iterable[int] | int | None = None,
        position: int | None = None,
    ) -> "KV":
        """The same edit at exactly these layers, key-value heads and prompt position; None leaves a choice as it is.

        layers: layer 0 too, if it is named. position: negative, from the end of the prompt; -2 is the last token that
        is cached when the edit is made, and earlier tokens are edited then too, after all of the prompt but its last
        token has been processed.
        """
        new = replace(self, layers=_tuple(layers, self.layers), heads=_tuple(heads, self.heads))
        missing = [layer for layer in new.chosen if layer not in self.values]
        if missing or not new.chosen:
            raise ModelError(
                f"layers={list(new.chosen)} asked for; there are keys and values for layers {sorted(self.values)}."
            )
        count = min(len(self.values[layer]) for layer in new.chosen)
        if new.heads is not None and (not new.heads or not set(new.heads) <= set(range(count))):
            raise ModelError(f"heads={list(new.heads)} asked for; there are key-value heads 0 to {count - 1}.")
        return new if position is None else replace(new, position=_cached(position))

    def scale(self, factor: float) -> "KV":
        return self.scaled(factor, factor)

    def check(self, lm: LM) -> None:
        check_layers(self.chosen, lm)
        _cached(self.position)
        check_origin(self, lm)


@dataclass
class KVPlan:
    """All rows' edits of one layer and position: distinct edits and every row's strength of each."""

    layer: int
    keys: Float[Tensor, "atoms kv_heads head_dim"]
    values: Float[Tensor, "atoms kv_heads value_dim"]
    key_strengths: Float[Tensor, "rows atoms"]
    value_strengths: Float[Tensor, "rows atoms"]
    rotate: bool
    position: int = LAST_CACHED

    def touches(self) -> Bool[Tensor, " rows"]:
        """Rows for which this edit is not nothing."""
        return ((self.key_strengths != 0) | (self.value_strengths != 0)).any(1)

    def edit(
        self,
        cache: Any,
        now: Bool[Tensor, " rows"],
        rows: Int[Tensor, " rows"],
        places: Int[Tensor, " rows"],
        rotary: Rotary | None,
    ) -> None:
        """Add to the token at `position` of the rows marked `now`, whose last cached token is that at -2.

        places: the last cached tokens' rotary positions.
        """
        entry = plain_layer(cache, self.layer, (*PLAIN, StaticLayer))
        self._check_shapes(entry)
        device = entry.keys.device
        back = LAST_CACHED - self.position
        self._check_reach(entry, places, now & self.touches()[rows], back)
        keys = torch.einsum("ra,ahd->rhd", self.key_strengths[rows] * now[:, None], self.keys).to(device)
        values = torch.einsum("ra,ahd->rhd", self.value_strengths[rows] * now[:, None], self.values).to(device)
        if self.rotate and rotary is not None:
            keys = rotary.turn(keys, (places - back).clamp(min=0).to(device), self.layer)
        for name, change in (("keys", keys), ("values", values)):
            old = getattr(entry, name)
            column = _stored(entry) - 1 - back
            if isinstance(entry, StaticLayer):  # compiled forwards know its tensors by their address
                old[:, :, column] += change.to(old.dtype)
            elif column >= 0:
                token = old[:, :, column : column + 1] + change[:, :, None].to(old.dtype)
                setattr(entry, name, torch.cat([old[:, :, :column], token, old[:, :, column + 1 :]], dim=2))

    def _check_reach(
        self, entry: DynamicLayer, places: Int[Tensor, " rows"], touched: Bool[Tensor, " rows"], back: int
    ) -> None:
        """Refuse a position before a row's text, or one whose entry has left the cache."""
        if not touched.any():
            return
        shortest = int(places.to(touched.device)[touched].min())
        if shortest < back:
            raise ModelError(
                f"A KV edit at position {self.position} needs prompts of {-self.position} tokens; one has "
                f"{shortest + 2}. Give a longer prompt, or kv.at(position=-2)."
            )
        stored, seen = _stored(entry), int(entry.get_seq_length())
        if stored != seen and (back >= stored or not isinstance(entry, DynamicSlidingWindowLayer)):
            raise ModelError(
                f"Layer {self.layer} ({type(entry).__name__}) stores {stored} of {seen} tokens, so that position "
                f"{self.position} is gone or cannot be told. Choose other layers or a later position."
            )

    def _check_shapes(self, entry: DynamicLayer) -> None:
        for name, mine in (("keys", self.keys), ("values", self.values)):
            theirs = getattr(entry, name)
            if mine.shape[1:] != (theirs.shape[1], theirs.shape[3]):
                raise ModelError(
                    f"The KV edit has {name} of shape {tuple(mine.shape[1:])} (kv_heads, head_dim), but layer "
                    f"{self.layer} of this model caches {(theirs.shape[1], theirs.shape[3])}: it was made on another "
                    "model. Extract it again on this one."
                )


def _stored(entry: DynamicLayer | StaticLayer) -> int:
    """How many tokens have an entry; a static layer has room for more."""
    return int(entry.get_seq_length()) if isinstance(entry, StaticLayer) else entry.keys.shape[2]


def plain_layer(cache: Any, layer: int, kinds: Sequence[type] = PLAIN) -> DynamicLayer:
    """Layer `layer` of a cache that holds one key and one value a token; anything else is refused by name."""
    if layer >= len(cache.layers):
        raise ModelError(
            f"Layer {layer} has no cache of its own (it shares another layer's keys and values). Choose other layers."
        )
    entry = cache.layers[layer]
    if type(entry) not in kinds:
        raise ModelError(
            f"Layer {layer} keeps a {type(entry).__name__}, not one plain key and value a token, and cannot be edited. "
            "Choose other layers, or leave cache_implementation at its default."
        )
    if not entry.is_initialized or entry.keys.shape[2] == 0:
        raise ModelError(f"Layer {layer} cached nothing (a shared or too narrow sliding cache). Choose other layers.")
    return entry


def plan_kv(rows: Sequence[Sequence[KV]], lm: LM) -> list[KVPlan]:
    """Tensors for a batch, one plan a layer and position. Rows with both strengths zero leave no trace."""
    atoms: dict[tuple[int, int, bool], dict[tuple[Any, ...], tuple[KV, dict[int, tuple[float, float]]]]] = {}
    for number, row in enumerate(rows):
        for part in row:
            if part.key_strength == 0.0 and part.value_strength == 0.0:
                continue
            for layer in part.chosen:
                identity = (id(part.keys[layer]), id(part.values[layer]), part.heads)
                group = atoms.setdefault((layer, part.position, layer in part.rotated), {})
                _, strengths = group.setdefault(identity, (part, {}))
                key, value = strengths.get(number, (0.0, 0.0))
                strengths[number] = (key + part.key_strength, value + part.value_strength)
    plans = []
    for (layer, position, rotate), entries in sorted(atoms.items()):
        device = next(lm.blocks[layer].parameters()).device
        table = torch.zeros(2, len(rows), len(entries))
        for column, (_, strengths) in enumerate(entries.values()):
            table[:, list(strengths), column] = torch.tensor(list(strengths.values()), dtype=torch.float32).T
        parts = [part for part, _ in entries.values()]
        keys = torch.stack([_at_heads(part.keys[layer], part.heads) for part in parts]).to(device)
        values = torch.stack([_at_heads(part.values[layer], part.heads) for part in parts]).to(device)
        plans.append(KVPlan(layer, keys, values, table[0].to(device), table[1].to(device), rotate, position))
    return plans


def _at_heads(tensor: Float[Tensor, "kv_heads dim"], heads: tuple[int, ...] | None) -> Float[Tensor, "kv_heads dim"]:
    """The tensor with zeros for all other heads."""
    if heads is None:
        return tensor.float()
    only = torch.zeros_like(tensor, dtype=torch.float32)
    only[list(heads)] = tensor[list(heads)].float()
    return only


def _tuple(choice: Iterable[int] | int | None, old: tuple[int, ...] | None) -> tuple[int, ...] | None:
    return old if choice is None else (choice,) if isinstance(choice, int) else tuple(choice)


def _cached(position: int) -> int:
    """A position that is cached when the edit is made; others are refused."""
    if position > LAST_CACHED:
        raise ModelError(
            f"position={position}: a KV edit changes a cached prompt token, -2 (the last token but one, the last that "
            "is cached when the edit is made) or further from the end. Give -2 or less."
        )
    return position
