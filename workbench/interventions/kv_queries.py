"""See the queries and keys that a model's attention really uses, by standing in front of its attention function.

transformers calls one function for every attention layer, with queries after rotation and normalisation; it is replaced
inside a `with` block and put back after it. Models that compute attention without that function show nothing.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from workbench.models import LM


@dataclass(frozen=True, eq=False)
class LastQueries:
    """One layer's queries of the last tokens, times the model's scaling; `softcap` bounds the logits (Gemma 2).

    sinks: a logit a head that takes its share of every query's attention and leads nowhere (gpt-oss).
    """

    queries: Float[Tensor, "rows heads last head_dim"]
    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None

    def weights(
        self, keys: Float[Tensor, "rows kv_heads seq head_dim"], padding: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows heads last seq"]:
        """Attention of these queries to the keys from `padding` to their own token; the last key is the last query's.

        Queries that are padding themselves get weights of zero.
        """
        groups = self.queries.shape[1] // keys.shape[1]
        logits = self.queries.float() @ keys.float().repeat_interleave(groups, dim=1).transpose(2, 3)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        last, seq = logits.shape[2:]
        columns = torch.arange(seq, device=logits.device)
        later = columns > columns[seq - last :, None]
        hidden = later | (columns < padding[:, None])[:, None, None]
        logits = logits.masked_fill(hidden, float("-inf"))
        if self.sinks is not None:
            nowhere = self.sinks.float().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, nowhere], dim=-1)
        return logits.softmax(-1)[..., :seq].nan_to_num(0.0)


@contextmanager
def watch_queries(lm: LM, last: int = 32) -> Iterator[dict[int, LastQueries]]:
    """Collect the queries of the last tokens of the forward passes inside the block, layer by layer.

    >>> import torch
    >>> from workbench.cache import new_cache
    >>> from workbench.models import load_model
    >>> lm = load_model("lab-small")
    >>> cache, ids = new_cache(lm), torch.tensor([lm.encode("One and one is two.")])
    >>> with torch.no_grad(), watch_queries(lm, last=4) as queries:
    ...     _ = lm.base(ids, past_key_values=cache)
    >>> queries[0].queries.shape[2], len(queries) == len(lm.blocks)
    (4, True)
    """
    seen: dict[int, LastQueries] = {}

    def see(layer: int, query: Tensor, key: Tensor, options: dict[str, Any]) -> None:
        scaling = options.get("scaling")
        new = query[:, :, -last:].detach() * (query.shape[3] ** -0.5 if scaling is None else scaling)
        old = seen.get(layer)
        joined = new if old is None else torch.cat([old.queries, new], dim=2)[:, :, -last:]
        seen[layer] = LastQueries(joined, options.get("softcap"), options.get("s_aux"))

    with watch_attention(lm, see):
        yield seen


@contextmanager
def watch_attention(lm: LM, see: Callable[[int, Tensor, Tensor, dict[str, Any]], None]) -> Iterator[None]:
    """Call `see(layer, query, key, options)` before every attention of the model's decoder blocks."""
    layers = {id(module): layer for layer, block in enumerate(lm.blocks) for module in block.modules()}
    name = lm.model.config.get_text_config()._attn_implementation
    before = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
    function = None if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]

    def attend(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **options: Any) -> Any:
        if id(module) in layers:
            see(layers[id(module)], query, key, options)
        inner = function or before or sys.modules[type(module).__module__].eager_attention_forward
        return inner(module, query, key, *args, **options)

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield
    finally:
        if before is None:
            del ALL_ATTENTION_FUNCTIONS[name]
        else:
            ALL_ATTENTION_FUNCTIONS[name] = before
