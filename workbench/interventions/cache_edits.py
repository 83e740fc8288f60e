"""Changes to a prompt's cache beyond adding a vector: replace, scale, drop, splice, compress, quantise.

Each is made once per row, on the cache of all prompt tokens but the last, which then sees it; nothing is done per
generated token. Positions are those of the row's own text, negative ones from the end of the prompt; they mean the text
as it was before any of this, and within a row the order is fixed, however the parts were added up: replace, scale, add
(`KV`), drop, compress, quantise, splice. On a cache in hand: `kv_ops`, `kv_blocks`, `kv_compress`, `kv_quantize`.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from transformers.cache_utils import DummyLayer

from workbench.cache import new_cache
from workbench.interventions.concept import Intervention, check_layers, check_origin
from workbench.interventions.kv import PLAIN
from workbench.interventions.kv_blocks import Block
from workbench.interventions.kv_compress import SCORES
from workbench.interventions.kv_quantize import BITS
from workbench.models import LM, ModelError

Where = int | slice | tuple[int, ...]


@dataclass(frozen=True, eq=False)
class DropTokens(Intervention):
    """Cached prompt tokens that nothing after them sees, as if they were masked out; all else keeps its position.

    What was cached behind a dropped token has seen it. The entries stay in memory: rows of a batch drop what they like.
    A slice ends at the last prompt token at the latest, which is not cached yet.
    """

    positions: Where
    strength: float = 1.0

    def scale(self, factor: float) -> "DropTokens":
        return replace(self, strength=_whole(self, factor))

    def check(self, lm: LM) -> None:
        _cached(self.positions)
        _removable(lm)


@dataclass(frozen=True, eq=False)
class ScaleTokens(Intervention):
    """Keys and values of cached prompt tokens times a factor each; strength 0 leaves them, 1 multiplies in full.

    A key of zero has attention logit 0, not minus infinity (`DropTokens` does that). layers, heads (of the key-value
    heads): None for all.
    """

    positions: Where
    keys: float = 1.0
    values: float = 1.0
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    strength: float = 1.0

    def scale(self, factor: float) -> "ScaleTokens":
        return replace(self, strength=self.strength * factor)

    def check(self, lm: LM) -> None:
        _cached(self.positions)
        check_layers(self.layers or (), lm)


@dataclass(frozen=True, eq=False)
class ReplaceTokens(Intervention):
    """The entries of as many prompt tokens, from position `at` on, become those of a block of one row; strength between
    0 and 1 stops on the way there.

    The block (`kv_blocks.take`) comes from another text; its keys are moved to their new positions.
    """

    block: Block
    at: int
    layers: tuple[int, ...] | None = None
    strength: float = 1.0

    def scale(self, factor: float) -> "ReplaceTokens":
        return replace(self, strength=self.strength * factor)

    def rebind(self, lm: LM) -> "ReplaceTokens":
        return replace(self, block=self.block.rebind(lm))

    def check(self, lm: LM) -> None:
        _cached(self.at)
        check_origin(self.block, lm)
        check_layers(self.layers or (), lm)
        _one_row(self.block)


@dataclass(frozen=True, eq=False)
class SpliceBlock(Intervention):
    """A block of one row put into the cached prompt before its token `at`, or (None) before its last token.

    The tokens behind it move up by its length, and so does all that follows; what is cached behind it has not seen it.
    at="start" puts it before the text is read, so that all of it sees the block: with `kv_blocks.prefix_of` this is
    PEFT's prefix tuning.
    """

    block: Block
    at: int | Literal["start"] | None = None
    strength: float = 1.0

    def scale(self, factor: float) -> "SpliceBlock":
        return replace(self, strength=_whole(self, factor))

    def rebind(self, lm: LM) -> "SpliceBlock":
        return replace(self, block=self.block.rebind(lm))

    def check(self, lm: LM) -> None:
        if isinstance(self.at, int):
            _cached(self.at)
        elif self.at not in (None, "start"):
            raise ModelError(
                f"at={self.at!r}: give a position of the prompt, 'start', or None for behind what is cached."
            )
        check_origin(self.block, lm)
        _removable(lm)
        _one_row(self.block)


@dataclass(frozen=True, eq=False)
class CompressCache(Intervention):
    """Keep `keep` cached prompt tokens (a share of them below 1, else a number) in every layer and key-value head.

    score: "knorm", "streaming" or "snapkv", which reads the attention of the prompt's last `window` cached tokens; see
    `kv_compress`. Sliding windows stay whole. The memory is freed where all rows of a batch are compressed.
    """

    keep: float
    score: str = "knorm"
    window: int = 8
    strength: float = 1.0

    def scale(self, factor: float) -> "CompressCache":
        return replace(self, strength=_whole(self, factor))

    def check(self, lm: LM) -> None:
        if self.score not in SCORES or not (0 < self.keep < 1 or self.keep == int(self.keep) >= 1) or self.window < 1:
            raise ModelError(
                f"CompressCache(keep={self.keep}, score={self.score!r}, window={self.window}): keep is a share between "
                f"0 and 1 or a whole number of tokens, score one of {', '.join(SCORES)}, window at least 1."
            )
        _removable(lm)


@dataclass(frozen=True, eq=False)
class QuantizeCache(Intervention):
    """Cached prompt tokens rounded to 8 or 4 bits, keys by channel and values by token (`kv_quantize`; KIVI).

    Tokens that are generated stay as they are, and so do sliding windows. The memory is freed where all rows of a batch
    have the same number of bits and none splices a block; else a row's entries are rounded and stored as before.
    """

    bits: int = 8
    strength: float = 1.0

    def scale(self, factor: float) -> "QuantizeCache":
        return replace(self, strength=_whole(self, factor))

    def check(self, lm: LM) -> None:
        if self.bits not in BITS:
            raise ModelError(f"QuantizeCache(bits={self.bits}): allowed are {', '.join(map(str, BITS))}.")
        _removable(lm)


CacheEdit = DropTokens | ScaleTokens | ReplaceTokens | SpliceBlock | CompressCache | QuantizeCache


def _whole(x: Intervention, factor: float) -> float:
    """The new strength of what is done or not done: nothing between."""
    if factor not in (0.0, 1.0):
        raise ModelError(
            f"{type(x).__name__} is done or not done: its strength is 1 or 0, not {factor:g} times that. Choose other "
            "positions or another size instead."
        )
    return float(factor * x.strength)  # type: ignore[attr-defined]


def _one_row(block: Block) -> None:
    if len(block.positions) != 1:
        raise ModelError(
            f"This block has {len(block.positions)} rows; an intervention takes a block of one. Use block.row(0), and "
            "give each prompt an intervention of its own."
        )


def _cached(positions: Where) -> None:
    """Refuse the last prompt token, which is not cached when the edit is made, and what is no position."""
    places: Iterable[int] = (
        () if isinstance(positions, slice) else (positions,) if isinstance(positions, int) else positions
    )
    if -1 in places or (not isinstance(positions, (int, slice)) and not positions):
        raise ModelError(
            f"positions={positions!r}: give positions of cached prompt tokens, 0 (the first) or -2 (the last token but "
            "one) and away from there. -1, the last prompt token, is not cached yet when the edit is made."
        )


def _removable(lm: LM) -> None:
    """Refuse models in which tokens cannot come or go: layers without plain entries, positions counted by columns."""
    for layer, entry in enumerate(new_cache(lm).layers):
        if type(entry) not in PLAIN and not isinstance(entry, DummyLayer):
            raise ModelError(
                f"Layer {layer} keeps a {type(entry).__name__}, not one plain key and value a token, so that no token "
                "can be dropped, spliced or compressed in this model. Scale or replace tokens in its other layers."
            )
    told = "position_ids" in inspect.signature(type(lm.base).forward).parameters
    if getattr(lm.model.config.get_text_config(), "alibi", False) or not told:
        raise ModelError(
            f"{type(lm.model).__name__} counts positions by the columns of its cache (ALiBi), so that tokens cannot be "
            "dropped, spliced or compressed. Scale or replace them."
        )
