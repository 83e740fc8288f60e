"""What rows may share under interventions: a token counts as the same only where the same changes fall on it.

A row's tokens become keys: the token, and a number for what is changed at its position; equal keys from the beginning
on mean equal hidden states and cache entries. Edits that look at a whole prompt have no such keys and share nothing.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int

from workbench.cache import GrowingLayer, new_cache
from workbench.interventions.adapter import Adapter
from workbench.interventions.concept import Intervention
from workbench.interventions.kv import KV
from workbench.interventions.low_rank import LowRank
from workbench.interventions.residual import Residual, span_mask
from workbench.interventions.weights import Weights
from workbench.models import LM

MOST_PARTS = 60  # of one sum: each has a bit in a token's key
BY_POSITION = (Residual, LowRank, KV, Adapter, Weights)


def can_share(row: Intervention | None) -> bool:
    """Whether it is known, position by position, what an intervention changes."""
    return row is None or (len(row.parts) <= MOST_PARTS and all(isinstance(part, BY_POSITION) for part in row.parts))


def layout(lm: LM) -> str:
    """How the model's cache can be shared: "rows" (any), "columns" (rows of equal length only) or "none".

    Sliding windows and linear attention count columns. Rotary variants that depend on the length of a forward, and
    biases by distance, change with what else is in it.
    """
    config = lm.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {each.get("rope_type") for each in rope.values() if isinstance(each, dict)} | {rope.get("rope_type")}
    if kinds & {"dynamic", "longrope"} or getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        return "none"
    if getattr(config, "num_kv_shared_layers", 0):
        return "none"
    return "rows" if all(isinstance(layer, GrowingLayer) for layer in new_cache(lm).layers) else "columns"


class Keys:
    """Numbers for what is changed at a token; the same number for the same change."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[object, ...], int] = {}

    def of(self, tokens: Sequence[int], prompt: int, row: Intervention | None) -> Int[np.ndarray, " tokens"]:
        """Keys of one row, whose first `prompt` tokens are its context."""
        keys = np.array(tokens, dtype=np.int64)
        parts = [part for part in (row.parts if row is not None else ()) if isinstance(part, Residual | LowRank | KV)]
        if not parts:
            return keys
        code = np.zeros(len(tokens), dtype=np.int64)
        name: tuple[object, ...] = tuple(id(part) for part in parts)
        text, length = torch.arange(len(tokens))[None], torch.tensor([prompt])
        for place, part in enumerate(parts):
            if isinstance(part, KV):
                if part.key_strength == 0 and part.value_strength == 0:
                    continue
                # the edited tokens and the one that reads them first stay together, in one forward
                reach = max(2, -part.position)
                code[max(prompt - reach, 0) :] |= 1 << place
                name = (*name, prompt, tuple(tokens[:prompt]))
            elif part.strength != 0:
                code |= span_mask(part.positions, text, length)[0].numpy().astype(np.int64) << place
        for each in np.unique(code):
            if each:
                number = self.numbers.setdefault((*name, int(each)), len(self.numbers) + 1)
                keys[code == each] += number << 32
        return keys
