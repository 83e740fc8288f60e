"""How the cache edits of a batch are made: row by row, on one cache, and what later forwards have to be told.

Dropped tokens stay as columns with mask 0; compressed rows keep their entries in the last columns; spliced blocks are
put behind all others, where their keys carry the right positions all the same. `cache_layout` remembers this.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from workbench.interventions.cache_edits import (
    CacheEdit,
    CompressCache,
    DropTokens,
    QuantizeCache,
    ReplaceTokens,
    ScaleTokens,
    SpliceBlock,
)
from workbench.interventions.cache_layout import Layout, Moment
from workbench.interventions.concept import Intervention
from workbench.interventions.kv import PLAIN, plain_layer
from workbench.interventions.kv_blocks import Block, check_place, turned
from workbench.interventions.kv_compress import ranks
from workbench.interventions.kv_ops import thinned, token_layers, whole_text
from workbench.interventions.kv_quantize import GROUP, pack, quantize
from workbench.interventions.kv_queries import LastQueries, watch_queries
from workbench.interventions.rotary import rotary_of
from workbench.models import LM, ModelError


class CachePlan:
    """The cache edits of all rows of a session."""

    def __init__(self, rows: Sequence[Sequence[Intervention]], lm: LM) -> None:
        self.lm = lm
        self.rows: list[list[Any]] = [[p for p in row if isinstance(p, CacheEdit) and p.strength != 0] for row in rows]
        for row in self.rows:
            for kinds in ((SpliceBlock, CompressCache), (SpliceBlock, QuantizeCache)):
                once = [type(part).__name__ for part in row if isinstance(part, kinds)]
                if len(once) > 1:
                    raise ModelError(
                        f"A row splices, compresses or quantises once, and a spliced one does neither; got "
                        f"{' and '.join(once)}. Do the other to a cache in hand (kv_blocks, kv_compress, kv_quantize)."
                    )
        edits = [part for row in self.rows for part in row]
        self.window = max((p.window for p in edits if isinstance(p, CompressCache) and p.score == "snapkv"), default=0)
        blocks = [part.block for part in edits if isinstance(part, (SpliceBlock, ReplaceTokens))]
        self.rotary = rotary_of(lm) if any(block.rotated and not block.fixed for block in blocks) else None
        self.splices = any(isinstance(part, SpliceBlock) for part in edits)
        self.starts = any(isinstance(part, SpliceBlock) and part.at == "start" for part in edits)

    def __bool__(self) -> bool:
        return any(self.rows)

    @property
    def shares(self) -> bool:
        """Whether rows may have the beginning of their prompts computed together."""
        return not self.window and not self.starts

    def touches(self) -> Bool[Tensor, " rows"]:
        """Rows that have an edit."""
        return torch.tensor([bool(row) for row in self.rows], device=self.lm.device)

    def watching(self) -> AbstractContextManager[dict[int, LastQueries]]:
        """Around the prefill: the queries that a score looks at."""
        return watch_queries(self.lm, self.window) if self.window else nullcontext({})

    def _of(self, moment: Moment, row: int, kind: type) -> list[Any]:
        return [part for part in self.rows[moment.layout.numbers[row]] if isinstance(part, kind)]

    def begin(self, cache: Any, layout: Layout, padded: bool) -> None:
        """Splice the blocks that stand before the text into an empty cache."""
        blocks = {
            row: part.block
            for row, number in enumerate(layout.numbers)
            for part in self.rows[number]
            if isinstance(part, SpliceBlock) and part.at == "start"
        }
        if blocks:
            for layer, entry in enumerate(cache.layers):
                if isinstance(entry, DynamicSlidingWindowLayer) and padded:
                    raise ModelError(
                        f"Layer {layer} is a sliding window, which counts padding: a block before the text needs rows "
                        "of one length. Use batch_size=1."
                    )
            self._append(cache, layout, blocks, dict.fromkeys(blocks, 0))

    def before(self, moment: Moment) -> None:
        """Replace and scale: what changes entries."""
        for row in moment.now:
            for part in self._of(moment, row, ReplaceTokens):
                self._replace(moment, row, part)
            for part in self._of(moment, row, ScaleTokens):
                _scale(moment, row, part)

    def after(self, moment: Moment, queries: dict[int, LastQueries]) -> None:
        """Drop, compress and splice: what changes which entries there are."""
        for row in moment.now:
            for part in self._of(moment, row, DropTokens):
                gone = [moment.first(row) + place for place in moment.positions(row, part.positions)]
                moment.layout.visible[row, gone] = False
                moment.layout.changed = True
        if any(self._of(moment, row, CompressCache) for row in moment.now):
            self._compress(moment, queries)
        self._quantize(moment)
        self._splice(moment)

    def _replace(self, moment: Moment, row: int, part: ReplaceTokens) -> None:
        block = part.block
        start = moment.positions(row, part.at)[0]
        places = moment.positions(row, tuple(range(start, start + len(block))))
        targets = moment.rotary(row, places)
        check_place(block, targets, behind=0)
        for layer in sorted(block.values) if part.layers is None else part.layers:
            entry, index = moment.entries(row, places, layer)
            keys, values = self._placed(block, layer, targets)
            for old, new in ((entry.keys, keys), (entry.values, values)):
                was = old[row][:, index].float()
                old[row, :, index] = (was + part.strength * (new.to(was) - was)).to(old.dtype)

    def _placed(
        self, block: Block, layer: int, targets: Int[Tensor, "1 tokens"]
    ) -> tuple[Float[Tensor, "kv_heads tokens head_dim"], Float[Tensor, "kv_heads tokens value_dim"]]:
        """A block's keys at their new places, and its values."""
        keys = block.keys[layer]
        if self.rotary is not None and layer in block.rotated:
            keys = turned(self.rotary, keys.float(), targets, layer)
        return keys[0].float(), block.values[layer][0].float()

    def _compress(self, moment: Moment, queries: dict[int, LastQueries]) -> None:
        layout, rows = moment.layout, len(moment.layout.numbers)
        device = layout.visible.device
        sizes = {row: self._size(moment, row) for row in moment.now}
        if all(sizes[row] >= moment.lengths[row] - 1 for row in moment.now):
            return  # every row keeps all
        kept = max(sizes.values()) if len(sizes) == rows else moment.end
        layers = [(layer, plain_layer(moment.cache, layer)) for layer in token_layers(moment.cache)]
        sliding = [layer for layer, entry in layers if isinstance(entry, DynamicSlidingWindowLayer)]
        if len(sliding) == len(layers):
            raise ModelError(
                "All layers of this model are sliding windows, short already: there is nothing to compress."
            )
        if sliding and (set(sizes.values()) != {kept} or not layout.visible.all()):
            raise ModelError(
                f"Layer {sliding[0]} is a sliding window, which stays whole: the rows of a batch have to keep the same "
                "number of tokens, and drop none. Use batch_size=1, or keep=N that every prompt reaches."
            )
        first = torch.tensor([max(moment.first(row), 0) for row in range(rows)], device=device)
        columns = torch.arange(moment.end, device=device)
        absent = ~layout.visible | (columns < first[:, None])
        for layer, entry in layers:
            if layer not in sliding:
                whole_text(entry, layer)
                index = self._chosen(moment, layer, entry, queries, first, absent, sizes, kept)
                moment.cache.layers[layer] = thinned(entry, index.to(entry.keys.device))
        if not sliding:
            for row in moment.now:
                if self._of(moment, row, CompressCache):
                    layout.visible[row] = columns >= moment.end - sizes[row]
            layout.changed = moment.thinned = True

    def _size(self, moment: Moment, row: int) -> int:
        """How many of its last columns a row keeps: all of its own, dropped ones included, if it is not compressed."""
        cached = moment.lengths[row] - 1
        if any(part.at == "start" for part in self._of(moment, row, SpliceBlock)):
            return moment.end
        for part in self._of(moment, row, CompressCache):
            wanted = ceil(part.keep * cached) if part.keep < 1 else int(part.keep)
            return min(int(moment.layout.visible[row, moment.first(row) :].sum()), max(wanted, 1))
        return cached

    def _chosen(
        self,
        moment: Moment,
        layer: int,
        entry: DynamicLayer,
        queries: dict[int, LastQueries],
        first: Int[Tensor, " rows"],
        absent: Bool[Tensor, "rows seq"],
        sizes: dict[int, int],
        kept: int,
    ) -> Int[Tensor, "rows kv_heads kept"]:
        """Which entries of a layer stay: every row's own in its last places, anything before them."""
        heads = entry.keys.shape[1]
        index = torch.arange(moment.end - kept, moment.end, device=absent.device).repeat(len(absent), heads, 1)
        scored: dict[tuple[str, int], Tensor] = {}
        for row, size in sizes.items():
            part = next(iter(self._of(moment, row, CompressCache)), None)
            if part is None:
                continue  # its last entries, all of its own
            own = part.score, part.window
            if own not in scored:
                last = {number: replace(q, queries=q.queries[:, :, -part.window :]) for number, q in queries.items()}
                scored[own] = ranks(part.score, entry.keys, layer, last, first.to(entry.keys.device))
            worth = scored[own][row].to(absent.device).masked_fill(absent[row], float("-inf"))
            best = worth.argsort(dim=-1, descending=True, stable=True)
            index[row, :, kept - size :] = best[:, :size].sort(dim=-1).values
        return index

    def _quantize(self, moment: Moment) -> None:
        """Round the rows' own last entries: into few bits if all rows want that, else in place."""
        bits = {row: part.bits for row in moment.now for part in self._of(moment, row, QuantizeCache)}
        if not bits:
            return
        sizes = {row: self._size(moment, row) for row in moment.now}
        if len(bits) == len(moment.layout.numbers) and len(set(bits.values())) == 1 and not self.splices:
            layers = [plain_layer(moment.cache, layer) for layer in token_layers(moment.cache)]
            stored = next((e.keys.shape[2] for e in layers if not isinstance(e, DynamicSlidingWindowLayer)), 0)
            padding = [stored - sizes[row] for row in range(len(bits))]
            return quantize(moment.cache, bits[0], padding=padding)
        for layer in token_layers(moment.cache):
            entry = plain_layer(moment.cache, layer)
            if not isinstance(entry, DynamicSlidingWindowLayer):
                entry.keys, entry.values = entry.keys.clone(), entry.values.clone()
                for row, few in bits.items():
                    for old, group in ((entry.keys, GROUP), (entry.values, None)):
                        own = old[row, :, old.shape[2] - sizes[row] :]
                        own.copy_(pack(own[None], few, group).unpack()[0])

    def _splice(self, moment: Moment) -> None:
        parts = {row: part for row in moment.now for part in self._of(moment, row, SpliceBlock) if part.at != "start"}
        if not parts:
            return
        if not moment.level:
            raise ModelError(
                "A block is spliced into prompts that end in one column: pad the batch on the left (lm.generate does)."
            )
        starts = {}
        for row, part in parts.items():
            last = moment.lengths[row] - 1
            start = last if part.at is None else moment.positions(row, part.at)[0]
            starts[row] = moment.places[row] - (last - 1 - start)
            check_place(part.block, starts[row] + torch.arange(len(part.block))[None], behind=last - start)
            if start < last:
                self._push(moment, row, list(range(start, last)), part.block)
        self._append(moment.cache, moment.layout, {row: part.block for row, part in parts.items()}, starts)

    def _push(self, moment: Moment, row: int, places: list[int], block: Block) -> None:
        """Turn the keys of these text positions to where the block moves them."""
        old = moment.rotary(row, places)
        for layer in token_layers(moment.cache):
            entry, index = moment.entries(row, places, layer)
            if isinstance(entry, DynamicSlidingWindowLayer):
                raise ModelError(
                    f"Layer {layer} ({type(entry).__name__}) is a sliding window: a block goes behind its last token. "
                    "Use at=None."
                )
            if self.rotary is not None and layer in block.rotated:
                keys = entry.keys[row][None][:, :, index].float()
                plain = turned(self.rotary, keys, old, layer, back=True)
                entry.keys[row, :, index] = turned(self.rotary, plain, old + len(block), layer)[0].to(entry.keys)

    def _append(self, cache: Any, layout: Layout, blocks: dict[int, Block], starts: dict[int, int]) -> None:
        """Put each row's block behind all columns; a row with a shorter one, or none, does not see the rest.

        starts: the rotary position of each block's first token.
        """
        rows, most = len(layout.numbers), max(map(len, blocks.values()))
        any_block = next(iter(blocks.values()))
        equal = len(blocks) == rows and {len(block) for block in blocks.values()} == {most}
        for layer in sorted(any_block.values):
            entry = cache.layers[layer]
            if type(entry) not in PLAIN or (isinstance(entry, DynamicSlidingWindowLayer) and not equal):
                raise ModelError(
                    f"Layer {layer} ({type(entry).__name__}) takes a block only if it is plain, and a sliding window "
                    "only if all rows take as many tokens. Use batch_size=1."
                )
            _, heads, _, dim = any_block.keys[layer].shape
            keys = torch.zeros(rows, heads, most, dim, device=self.lm.device, dtype=self.lm.model.dtype)
            values = keys.new_zeros(rows, heads, most, any_block.values[layer].shape[3])
            for row, block in blocks.items():
                targets = starts[row] + torch.arange(len(block))[None]
                new = self._placed(block, layer, targets)
                keys[row, :, : len(block)], values[row, :, : len(block)] = (part.to(keys) for part in new)
            cache.update(keys, values, layer)
        sizes = torch.tensor([len(blocks[row]) if row in blocks else 0 for row in range(rows)])
        layout.insert(torch.arange(most) < sizes[:, None], sizes)


def _scale(moment: Moment, row: int, part: ScaleTokens) -> None:
    places = moment.positions(row, part.positions)
    for layer in token_layers(moment.cache) if part.layers is None else part.layers:
        entry, index = moment.entries(row, places, layer)
        heads = list(range(entry.keys.shape[1])) if part.heads is None else list(part.heads)
        if not set(heads) <= set(range(entry.keys.shape[1])):
            raise ModelError(f"heads={heads}: layer {layer} has key-value heads 0 to {entry.keys.shape[1] - 1}.")
        for old, factor in ((entry.keys, part.keys), (entry.values, part.values)):
            where = (row, torch.tensor(heads, device=old.device)[:, None], index)
            old[where] = old[where] * (1 + part.strength * (factor - 1))
