"""The forward passes of a reading: hooks that keep the wanted tokens, caches with a shared beginning, an early stop.

Rows are padded on the right, without a mask. Means over a row's tokens are taken in float32, on the layer's device.
`reading` decides what is read and in which batches.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from workbench.cache import GrowingLayer
from workbench.interventions.kv import plain_layer
from workbench.interventions.reading_batches import TextRow
from workbench.interventions.rotary import Rotary, rotary_of
from workbench.models import LM, ModelError


class _DeepEnough(Exception):
    """Raised behind the deepest wanted block, to leave the forward."""


class _WindowLayer(GrowingLayer):
    """A sliding layer's cache that keeps all tokens: rows of other lengths are read behind the window too."""

    is_sliding = True


class _ShortCache(DynamicCache):
    """Leaves the forward once the deepest wanted layer has its keys and values, without the rest of that block."""

    deepest = -1

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append the new tokens, and return all of them or leave."""
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self.deepest:
            raise _DeepEnough
        return found


@dataclass
class ReadingPass:
    """Stores of a pass, filled by hooks on the blocks."""

    lm: LM
    layers: list[int]
    pairs: int
    want_states: bool
    want_kv: bool
    rotary: Rotary | None = None
    rotated: tuple[int, ...] = ()
    states: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    cached_keys: dict[int, Tensor] = field(default_factory=dict)
    batch: list[TextRow] | None = None
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    columns: Tensor = field(default_factory=lambda: torch.empty(0))

    def __post_init__(self) -> None:
        if self.want_kv:
            self.rotary = rotary_of(self.lm)
            self.rotated = _rotated_layers(self.lm, self.rotary, self.layers)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Read states, and stop behind the deepest wanted block, inside the block of this context."""
        handles = [self.lm.blocks[layer].register_forward_hook(self._hook(layer)) for layer in self.layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, layer: int) -> Callable[..., None]:
        def take(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if self.batch is not None and self.want_states:
                hidden = output[0] if isinstance(output, tuple) else output
                self._keep(layer, self.batch, hidden)
            if layer == self.layers[-1]:
                raise _DeepEnough

        return take

    def _keep(self, layer: int, batch: list[TextRow], hidden: Float[Tensor, "rows seq d_model"]) -> None:
        """Put the mean over each row's wanted tokens into the store; sums run in float32."""
        rows = self.rows.to(hidden.device)
        picked = hidden[rows, self.columns.to(hidden.device)].float()
        total = torch.zeros(len(batch), picked.shape[-1], device=hidden.device).index_add_(0, rows, picked)
        counts = torch.tensor([len(row.wanted) for row in batch], device=hidden.device)
        if layer not in self.states:
            self.states[layer] = torch.empty(2 * self.pairs, picked.shape[-1], device=hidden.device)
        self.states[layer][torch.tensor([row.number for row in batch], device=hidden.device)] = total / counts[:, None]

    def sharable(self) -> bool:
        """Whether every cache layer is one that can be filled once and copied to several rows."""
        layers = DynamicCache(config=self.lm.model.config).layers
        return bool(layers) and all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)

    def prefix(self, ids: list[int]) -> DynamicCache:
        """The cache of a beginning that a group shares, one row."""
        cache = self._cache(stop=True)
        self.batch = None
        self._forward(torch.tensor([ids], device=self.lm.device), cache)
        return cache

    def read(self, batch: list[TextRow], prefix: DynamicCache | None, start: int) -> None:
        """One forward of the rows' tokens from `start` on, padded on the right, behind the shared `prefix`."""
        width = max(len(row.ids) for row in batch) - start
        ids = torch.full((len(batch), width), self.lm.tokenizer.pad_token_id or 0)
        for number, row in enumerate(batch):
            ids[number, : len(row.ids) - start] = torch.tensor(row.ids[start:])
        places = [(number, place - start) for number, row in enumerate(batch) for place in row.wanted]
        self.rows, self.columns = torch.tensor(places, dtype=torch.long).reshape(-1, 2).to(self.lm.device).unbind(1)
        self.batch = batch
        cache = None if prefix is None and not self.want_kv else self._cache(prefix, len(batch), not self.want_states)
        self._forward(ids.to(self.lm.device), cache)
        if cache is not None and self.want_kv:
            self._add_cached(batch, cache)

    def _forward(self, ids: Int[Tensor, "rows seq"], cache: DynamicCache | None) -> None:
        with suppress(_DeepEnough):
            self.lm.base(input_ids=ids, past_key_values=cache, use_cache=cache is not None)

    def _cache(self, prefix: DynamicCache | None = None, rows: int = 1, stop: bool = False) -> DynamicCache:
        """An empty cache that keeps every token, or one that already holds the prefix for every row.

        stop: keys and values are all that is wanted of the deepest layer, so the forward ends when it has them.
        """
        cache = (_ShortCache if stop else DynamicCache)(config=self.lm.model.config)
        if isinstance(cache, _ShortCache):
            cache.deepest = self.layers[-1]
        kinds: dict[type, type] = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: _WindowLayer}
        cache.layers = [kinds[type(layer)]() if type(layer) in kinds else layer for layer in cache.layers]
        if prefix is not None:
            for layer, filled in zip(cache.layers, prefix.layers, strict=True):
                if filled.is_initialized:
                    layer.lazy_initialization(filled.keys, filled.values)
                    layer.keys = filled.keys.expand(rows, -1, -1, -1)  # copied once, when the rest is appended
                    layer.values = filled.values.expand(rows, -1, -1, -1)
        return cache

    def _add_cached(self, batch: list[TextRow], cache: DynamicCache) -> None:
        """Add the rows' cached keys, un-rotated and as they are, and values to the mean differences."""
        for layer in self.layers:
            kept = layer < len(cache.layers) and isinstance(cache.layers[layer], _WindowLayer)
            entry = cache.layers[layer] if kept else plain_layer(cache, layer)
            device = entry.keys.device
            places = torch.tensor([row.cached for row in batch], device=device)
            signs = torch.tensor([1.0 if row.number < self.pairs else -1.0 for row in batch], device=device)
            each = torch.arange(len(batch), device=device)
            keys, values = entry.keys[each, :, places].float(), entry.values[each, :, places].float()
            cached = keys
            if layer in self.rotated and self.rotary is not None:
                keys = self.rotary.turn(keys, places, layer, back=True)
            for store, tensor in ((self.keys, keys), (self.values, values), (self.cached_keys, cached)):
                store[layer] = store.get(layer, 0) + torch.einsum("r,rhd->hd", signs / self.pairs, tensor)


def _rotated_layers(lm: LM, rotary: Rotary | None, layers: Sequence[int]) -> tuple[int, ...]:
    """Those of `layers` whose keys depend on rotary position, found by running one token alone at positions 0 and 7.

    A token that only sees itself has the same state at both, so its keys differ by their rotation or not at all;
    un-rotated they must agree, or this model's keys are not understood and are refused.
    """
    if rotary is None:
        return ()
    token = torch.full((2, 1), lm.encode("a")[-1], device=lm.device)
    places = torch.tensor([[0], [7]], device=lm.device)
    cache = DynamicCache(config=lm.model.config)
    with torch.no_grad():
        lm.base(input_ids=token, position_ids=places, past_key_values=cache, use_cache=True)
    rotated = []
    for layer in layers:
        keys = plain_layer(cache, layer).keys[:, :, -1].float()
        close = 0.02 * keys.norm() if keys.norm() > 0 else 1.0  # bfloat16 keeps 8 bits
        if (keys[0] - keys[1]).norm() <= close:
            continue
        back = rotary.turn(keys, places[:, 0], layer, back=True)
        if (back[0] - back[1]).norm() > close:
            raise ModelError(
                f"The rotary embedding of layer {layer} of {lm.name!r} could not be taken off its keys. Use "
                "site='residual'."
            )
        rotated.append(layer)
    return tuple(rotated)
