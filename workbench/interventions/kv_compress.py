"""Keep only some entries of a filled cache, chosen by a score without training; decoding goes on where the text ends.

Key norm (arXiv 2406.11430), attention sinks and a recent window (StreamingLLM, arXiv 2309.17453, with positions of the
text where the paper uses those in the cache), and the attention of the last queries (SnapKV, arXiv 2404.14469). Nothing
is trained, and the budget is the same in every layer. kvpress, which collects such methods, needs transformers below
5.3 and does not run here, so these are written from the papers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import DynamicSlidingWindowLayer

from workbench.interventions.kv import plain_layer
from workbench.interventions.kv_ops import first_tokens, thinned, token_layers, whole_text
from workbench.interventions.kv_queries import LastQueries
from workbench.models import ModelError

SCORES = ("knorm", "streaming", "snapkv")
SINKS = 4  # first tokens that streaming always keeps; the paper's number
KERNEL = 5  # neighbouring tokens over which snapkv averages; the authors' code


def compress(
    cache: Any,
    keep: int,
    score: str = "knorm",
    *,
    queries: Mapping[int, LastQueries] | None = None,
    padding: Sequence[int] | None = None,
) -> None:
    """Keep `keep` entries of each row, layer and key-value head, in their order, and forget the others, in place.

    score: "knorm" keeps the keys of smallest norm, "streaming" the first 4 tokens and the latest, "snapkv" the tokens
    that `queries` look at, and those of the queries themselves; get them with `kv_queries.watch_queries` around the
    prefill. Models that normalise their keys (Qwen 3, Gemma 3) leave knorm little to choose by, and its authors' code
    leaves the first layer or two whole, which one budget for all layers does not. keep at or above the length changes
    nothing. padding: columns in front of each row of a left-padded batch; they go first, and the attention mask stays
    as it is. Sliding windows are short already and stay whole; linear, hybrid and quantised layers
    are refused by number and type.
    """
    if score not in SCORES or keep < 1:
        raise ModelError(f"score={score!r}, keep={keep}: allowed are {', '.join(SCORES)}, and 1 entry or more.")
    if (score == "snapkv") != (queries is not None):
        raise ModelError(
            f"score={score!r} with queries={'given' if queries is not None else None}: snapkv needs them, from "
            "kv_queries.watch_queries around the prefill, and the others do not use them."
        )
    entries = {layer: plain_layer(cache, layer) for layer in token_layers(cache)}
    full = {layer: entry for layer, entry in entries.items() if not isinstance(entry, DynamicSlidingWindowLayer)}
    if not full:
        raise ModelError("All layers of this model are sliding windows, short already. There is nothing to compress.")
    new = {}
    for layer, entry in full.items():
        whole_text(entry, layer)
        rows, _, length = entry.keys.shape[:3]
        first = first_tokens(padding, rows).to(entry.keys.device)
        if keep >= length:
            return
        worth = ranks(score, entry.keys, layer, queries or {}, first)
        columns = torch.arange(length, device=worth.device)
        worth = worth.masked_fill((columns < first[:, None])[:, None], float("-inf"))
        best = worth.argsort(dim=-1, descending=True, stable=True)[..., :keep]
        new[layer] = thinned(entry, best.sort(dim=-1).values)
    for layer, thin in new.items():
        cache.layers[layer] = thin


def ranks(
    score: str,
    keys: Float[Tensor, "rows kv_heads seq head_dim"],
    layer: int,
    queries: Mapping[int, LastQueries],
    first: Int[Tensor, " rows"],
) -> Float[Tensor, "rows kv_heads seq"]:
    """How much each entry is worth keeping."""
    if score == "knorm":
        return -keys.float().norm(dim=-1)
    return _streaming(keys, first) if score == "streaming" else _snapkv(keys, layer, queries, first)


def _streaming(
    keys: Float[Tensor, "rows kv_heads seq head_dim"], first: Int[Tensor, " rows"]
) -> Float[Tensor, "rows kv_heads seq"]:
    """Later is better, and the first tokens of the text are best."""
    places = torch.arange(keys.shape[2], device=keys.device) - first[:, None]
    worth = torch.where((places >= 0) & (places < SINKS), float("inf"), places.float())
    return worth[:, None].expand(*keys.shape[:3])


def _snapkv(
    keys: Float[Tensor, "rows kv_heads seq head_dim"],
    layer: int,
    queries: Mapping[int, LastQueries],
    first: Int[Tensor, " rows"],
) -> Float[Tensor, "rows kv_heads seq"]:
    """Attention of the last queries, averaged over queries, the heads of a group and neighbouring tokens.

    The queries' own tokens come first, the latest best.
    """
    seen = queries.get(layer)
    rows, heads, length, dim = keys.shape
    if seen is None or (len(seen.queries), seen.queries.shape[3]) != (rows, dim) or seen.queries.shape[2] > length:
        raise ModelError(
            f"There are no queries for layer {layer} that fit its {rows} rows of {length} keys of width {dim}. Run the "
            "prefill of this cache inside kv_queries.watch_queries, or choose knorm or streaming: a model with an "
            "attention function of its own shows no queries."
        )
    window = seen.queries.shape[2]
    weights = seen.weights(keys, first)[..., : length - window]
    mean = weights.unflatten(1, (heads, -1)).mean((2, 3))
    pooled = nn.functional.avg_pool1d(mean, KERNEL, stride=1, padding=KERNEL // 2) if length > window else mean
    own = 1 + torch.arange(1, window + 1, device=keys.device) / window
    return torch.cat([pooled, own.expand(rows, heads, window)], dim=-1)
