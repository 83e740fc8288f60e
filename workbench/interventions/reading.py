"""Read contrastive pairs in one pass: hidden states after decoder blocks, and one cached key and value a text.

Texts are cut behind the last token that is wanted, a beginning that many share is computed once, the language-model
head and the blocks above the deepest wanted layer are not run, and hooks keep the wanted tokens only. Does not
intervene; read inside `lm.apply(x)` to see the states under residual interventions.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.files import content_key
from workbench.interventions.concept import check_layers
from workbench.interventions.kv import KV
from workbench.interventions.probes import METHODS, direction_of, held_out_auroc
from workbench.interventions.reading_batches import TextRow, batches_of, groups_of
from workbench.interventions.reading_pass import ReadingPass
from workbench.interventions.residual import Positions, Residual, normal_positions, span_mask
from workbench.interventions.session import ACTIVE
from workbench.models import LM, ModelError
from workbench.turns import in_turn

# Tokens of one batch. On a CPU a few rows fill the cores, and more of them leave the processor's own memory.
CPU_TOKENS = 4096  # of 512 to 8192 the best; with shared prefixes small batches cost up to 1.6 times as much
DEVICE_TOKENS = 32_768


@runtime_checkable
class Pairs(Protocol):
    """Finished strings; `positive[i]` and `negative[i]` end in the same tokens."""

    @property
    def positive(self) -> Sequence[str]: ...
    @property
    def negative(self) -> Sequence[str]: ...


@dataclass(frozen=True, eq=False)
class Reading:
    """What one pass over contrastive pairs saw.

    states: for each layer the state (or the mean over a span) of every text in float32, positive texts first.
    keys, values: mean differences of one cached token, keys un-rotated in the layers `rotated`; None if not read.
    cached_keys: the same with every key's rotary position still in it.
    """

    states: dict[int, Float[Tensor, "two pairs d_model"]] = field(repr=False)
    keys: dict[int, Float[Tensor, "kv_heads head_dim"]] | None = field(default=None, repr=False)
    values: dict[int, Float[Tensor, "kv_heads value_dim"]] | None = field(default=None, repr=False)
    rotated: tuple[int, ...] = ()
    model: str = ""
    revision: str = ""
    details: dict[str, str] = field(default_factory=dict)
    cached_token: int = -2
    cached_keys: dict[int, Float[Tensor, "kv_heads head_dim"]] | None = field(default=None, repr=False)

    def vector(self, method: str = "mean_diff", layers: Iterable[int] | int | None = None) -> Residual:
        """One direction a layer, as long as the mean difference and on its side, so that strengths compare.

        method: "mean_diff" = mean(positive) - mean(negative); "pca" = first direction of the uncentred differences;
        "pca_pairwise" = of all states, each pair centred at its midpoint (the same up to sign); "logistic" = normal of
        a logistic probe.
        """
        if method not in METHODS:
            raise ModelError(f"method={method!r} is unknown. Allowed: {', '.join(METHODS)}.")
        vectors = {layer: direction_of(self.states[layer], method) for layer in self._chosen(layers)}
        details = {"method": method, **self.details}
        return Residual(vectors, model=self.model, revision=self.revision, details=details)

    def kv(self, as_cached: bool = False) -> KV:
        """The mean differences of the cached keys and values, as an edit of the cache (arXiv 2507.08799).

        as_cached: keys averaged and added with their rotary position in them, as that paper's code does: for
        comparison only, since the positions of the pairs are mixed with what they say.
        """
        keys, rotated = (self.cached_keys, ()) if as_cached else (self.keys, self.rotated)
        if keys is None or self.values is None:
            raise ModelError("This reading holds no keys and values. Read again: read_pairs(lm, pairs, kv=True).")
        pairs = {name: text for name, text in self.details.items() if name in ("pairs", "data_sha256")}
        details = {"method": "mean_diff", **pairs, "token": str(self.cached_token)}
        details |= {"keys": "as cached"} if as_cached else {}
        return KV(keys, self.values, rotated=rotated, model=self.model, revision=self.revision,
                  details=details)  # fmt: skip

    def auroc(self, folds: int = 5, clusters: Sequence[Any] | None = None) -> pd.DataFrame:
        """How well each layer tells the sides apart, on pairs that the probe has not seen: 0.5 is chance, 1 is always.

        One row a layer: layer, auroc, low, high (95 %, bootstrap over pairs), n (pairs). Every fold is scored by a
        logistic probe fitted on the others. clusters: a label a pair; pairs of one label stay together, for instance
        those that share their examples: `[i % g for i in range(n)]` after `contrast(..., groups=g)`.
        """
        found = {layer: held_out_auroc(self.states[layer], folds, clusters) for layer in self._chosen(None)}
        lines = [
            {"layer": layer, "auroc": each.estimate, "low": each.low, "high": each.high, "n": each.n}
            for layer, each in found.items()
        ]
        return pd.DataFrame(lines)

    def _chosen(self, layers: Iterable[int] | int | None) -> list[int]:
        chosen = sorted(self.states) if layers is None else [layers] if isinstance(layers, int) else list(layers)
        missing = [layer for layer in chosen if layer not in self.states]
        if missing or not chosen:
            raise ModelError(f"layers={chosen} asked for; layers {sorted(self.states)} were read.")
        return chosen


@in_turn
def read_pairs(
    lm: LM,
    pairs: Pairs,
    *,
    layers: Iterable[int] | int | None = None,
    positions: Positions = "last",
    kv: bool = True,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reading:
    """Read all texts of `pairs` once; vectors of every method, a KV edit and held-out AUROCs come from the result.

    layers: those to read (None: all); blocks above the deepest one are not run.
    positions: "last", "prompt", an int, several ints or a slice, counted in each text; of a span the mean is read.
    kv: also read keys and values at token -2, the last one that is cached when generation starts.
    batch_size: rows a batch; None packs by tokens. progress: called with texts done and texts in all.
    Raises ModelError for unequal sides, layers or positions that a text does not have, and caches that are not plain.
    """
    return read_texts(lm, pairs, layers, positions, -2 if kv else None, batch_size, progress)


def read_texts(
    lm: LM,
    pairs: Pairs,
    layers: Iterable[int] | int | None,
    positions: Positions | None,
    cached: int | None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reading:
    """`read_pairs` with any `positions` for states (None reads none) and any token from the end for keys and values."""
    positive, negative = list(pairs.positive), list(pairs.negative)
    if not positive or len(positive) != len(negative):
        raise ModelError(
            f"{len(positive)} positive and {len(negative)} negative texts: give at least one pair, and as many of each."
        )
    texts = [lm.encode(text) for text in (*positive, *negative)]
    rows = [_cut(number, ids, positions, cached) for number, ids in enumerate(texts)]
    depths = _depths(lm, layers)
    watched = _intervened(lm)
    equal = watched or not _length_free(lm)
    done = 0
    task = ReadingPass(lm, depths, len(positive), positions is not None, cached is not None)
    with torch.no_grad(), task.hooked():
        for group in groups_of(rows, share=not equal and task.sharable()):
            prefix = task.prefix(group.rows[0].ids[: group.prefix]) if group.prefix else None
            for batch in batches_of(group, CPU_TOKENS if lm.device.type == "cpu" else DEVICE_TOKENS, batch_size, equal):
                task.read(batch, prefix, group.prefix)
                done += len(batch)
                if progress is not None:
                    progress(done, len(texts))
    place = -1 if positions == "last" else positions
    states = {layer: store.cpu().unflatten(0, (2, len(positive))) for layer, store in sorted(task.states.items())}
    details = {"pairs": str(len(positive)), "token" if isinstance(place, int) else "positions": str(place)}
    sides = {"positive": positive, "negative": negative}
    details["data_sha256"] = content_key(**{name: [lm.render(text) for text in side] for name, side in sides.items()})
    if cached is None:
        return Reading(states, model=lm.name, revision=lm.revision, details=details)
    stores = (task.keys, task.values, task.cached_keys)
    keys, values, raw = ({layer: total.cpu() for layer, total in sorted(store.items())} for store in stores)
    return Reading(states, keys, values, task.rotated, lm.name, lm.revision, details, cached, raw)


def _depths(lm: LM, layers: Iterable[int] | int | None) -> list[int]:
    depths = range(len(lm.blocks)) if layers is None else [layers] if isinstance(layers, int) else sorted(set(layers))
    check_layers(depths, lm)
    if not depths:
        raise ModelError(f"layers=[] asked for; give some of 0 to {len(lm.blocks) - 1}, or None for all.")
    return list(depths)


def _cut(number: int, ids: list[int], positions: Positions | None, cached: int | None) -> TextRow:
    """A text up to the last token that is read, which causal attention lets nothing after it change."""
    length = len(ids)
    wanted: tuple[int, ...] = ()
    if positions is not None:
        span = normal_positions(positions)
        if isinstance(span, str) and span not in ("last", "prompt"):
            raise ModelError(f"positions={span!r}: a prompt is read, so give 'last', 'prompt', ints or a slice.")
        wrong = [place for place in span if not -length <= place < length] if isinstance(span, tuple) else []
        places = span_mask(span, torch.arange(length)[None], torch.tensor([length]))[0].nonzero()[:, 0]
        wanted = tuple(places.tolist())
        if wrong or not wanted:
            raise ModelError(
                f"positions={positions!r} of a prompt of {length} tokens: give -1 (the last) to {-length}, "
                f"0 to {length - 1}, or a slice that holds some."
            )
    if cached is not None and not -length <= cached < 0:
        raise ModelError(
            f"token={cached} of a prompt of {length} tokens: give -1 (the last) to {-length}, or kv=False."
        )
    column = None if cached is None else length + cached
    last = max([*wanted, *([] if column is None else [column])])
    return TextRow(number, ids[: last + 1], wanted, column)


def _intervened(lm: LM) -> bool:
    """Whether an enclosing block changes states, whose positions are then worked out from every forward."""
    stack = ACTIVE.get(lm.model)
    if not stack or not (stack[-1].residual or stack[-1].kv):
        return False
    if stack[-1].kv:
        raise ModelError("Pairs cannot be read under a KV edit, which runs each prompt in two parts. Leave its block.")
    return True


def _length_free(lm: LM) -> bool:
    """Whether rotary embedding is the same however long the batch is: dynamic NTK and LongRoPE look at the longest."""
    config = lm.model.config.get_text_config()
    found: list[Any] = [getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)]
    while found:
        each = found.pop()
        if isinstance(each, dict):
            if each.get("rope_type", each.get("type")) in ("dynamic", "longrope"):
                return False
            found += each.values()
    return True
