"""How far a cached key is from itself when its text moves: why keys are un-rotated before they are averaged.

The same text is run at positions shifted by some tokens. With rotary embedding values stay and keys turn; with learned
positions both change, and nothing can be taken off. Not covered: what averaging over lengths does to an edit
(`kv_claims` runs both). Rotary embedding: arXiv 2104.09864.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch

from workbench.cache import new_cache
from workbench.interventions.kv import plain_layer
from workbench.interventions.kv_layers import describe_cache
from workbench.interventions.rotary import rotary_of
from workbench.models import LM, ModelError


def key_shift(
    lm: LM, prompt: str | list[dict[str, str]], shifts: Sequence[int] = (1, 2, 5, 10, 20, 50, 100, 200)
) -> pd.DataFrame:
    """Relative change of the last token's cached key and value when the whole text moves by `shift` tokens.

    One row a layer and shift: layer, shift, key (as cached), key_unrotated (as cached where keys do not turn), value;
    each is |moved - original| / |original| over all heads. Shifts beyond the model's positions are left out. Raises
    ModelError for models that take no positions (ALiBi, for instance) or whose cache cannot be read.

    >>> from workbench.models import load_model
    >>> row = key_shift(load_model("lab-small"), "2+3=", shifts=[5]).iloc[-1]
    >>> bool(row.key > 0.1), bool(row.key_unrotated < 1e-3), bool(row.value < 1e-3)
    (True, True, True)
    """
    if "position_ids" not in inspect.signature(type(lm.base).forward).parameters:
        raise ModelError(f"{type(lm.model).__name__} takes no position_ids, so a text cannot be moved.")
    ids = lm.encode(prompt)
    most = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or 10**9
    moves = [0, *(shift for shift in shifts if shift > 0 and len(ids) + shift <= most)]
    table = describe_cache(lm)
    kinds = table[table["add"]]
    rotary = rotary_of(lm) if kinds.rotated.any() else None
    cache = new_cache(lm)
    places = torch.tensor([[place + move for place in range(len(ids))] for move in moves], device=lm.device)
    with torch.no_grad():
        lm.base(
            input_ids=torch.tensor([ids] * len(moves), device=lm.device),
            position_ids=places, past_key_values=cache, use_cache=True,
        )  # fmt: skip
    rows: list[dict[str, Any]] = []
    for layer, turned in zip(kinds.layer.tolist(), kinds.rotated.tolist(), strict=True):
        entry = plain_layer(cache, layer)
        keys, values = entry.keys[:, :, -1].float(), entry.values[:, :, -1].float()
        back = keys
        if turned and rotary is not None:
            back = rotary.turn(keys, places[:, -1].to(keys.device), layer, back=True)
        for number, move in enumerate(moves[1:], start=1):
            line: dict[str, Any] = {"layer": layer, "shift": move}
            for name, tensor in (("key", keys), ("key_unrotated", back), ("value", values)):
                line[name] = float((tensor[number] - tensor[0]).norm() / tensor[0].norm())
            rows.append(line)
    return pd.DataFrame(rows)
