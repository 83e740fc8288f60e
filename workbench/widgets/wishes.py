"""What a person asks of a playground: which change, how strong, where, on which prompt; and how to say it in code.

Values only: controls are `playing`'s matter. Layer l is the output of decoder block l, spans as in
`interventions.residual`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch

from workbench.generate import Generation
from workbench.interventions import KV, Intervention, LowRank, Residual
from workbench.interventions.residual import SPANS
from workbench.models import LM, ModelError
from workbench.placement import bytes_a_token

MOVABLE = (Residual, LowRank)  # kinds that take layers and a span
PLACED = (*MOVABLE, KV)  # kinds that take layers
__all__ = ["Wish", "changed", "code", "layers_of", "refuse_too_large", "spans_of", "spent", "title"]


@dataclass(frozen=True)
class Wish:
    """The state of the controls. layer None: the layers as given; positions None: the span as given."""

    name: str
    prompt: str
    strength: float = 1.0
    layer: int | None = None
    positions: str | None = None
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0


def layers_of(x: Intervention | None) -> list[int]:
    """Layers that this can be put at, one at a time; none where there is no choice."""
    if isinstance(x, Residual):
        return sorted(x.vectors)
    if isinstance(x, LowRank):
        return sorted(x.down)
    return list(x.chosen) if isinstance(x, KV) else []


def spans_of(x: Intervention | None) -> tuple[str, ...]:
    """Named spans that this can act on; none where there is no choice."""
    return SPANS if isinstance(x, MOVABLE) else ()


def changed(wish: Wish, interventions: Mapping[str, Intervention | None]) -> Intervention | None:
    """The intervention that a wish asks for; None for the plain model.

    >>> wish = Wish("v", "2+3?", strength=0.5, layer=1, positions="last")
    >>> x = changed(wish, {"v": Residual({0: torch.ones(4), 1: torch.ones(4)})})
    >>> sorted(x.vectors), x.positions, x.strength
    ([1], 'last', 0.5)
    """
    if wish.name not in interventions:
        raise ModelError(f"There is no intervention {wish.name!r}. There are: {', '.join(interventions)}.")
    x = interventions[wish.name]
    if x is None:
        return None
    layers = None if wish.layer is None else [wish.layer]
    if isinstance(x, MOVABLE) and (layers or wish.positions):
        x = x.at(layers=layers, positions=wish.positions)
    elif isinstance(x, KV) and layers:
        x = x.at(layers=layers)
    return x if wish.strength == 1 else wish.strength * x


def code(wish: Wish, x: Intervention | None, source: str) -> str:
    """The expression that makes `changed` from the value that `source` stands for.

    >>> code(Wish("v", "", 0.8, 3, "generated"), Residual({3: torch.ones(4)}), "wb.load_intervention('v.safetensors')")
    "0.8 * wb.load_intervention('v.safetensors').at(layers=[3], positions='generated')"
    """
    said = []
    if wish.layer is not None and isinstance(x, PLACED):
        said.append(f"layers=[{wish.layer}]")
    if wish.positions is not None and isinstance(x, MOVABLE):
        said.append(f"positions={wish.positions!r}")
    times = "" if wish.strength == 1 or x is None else f"{wish.strength!r} * "
    return f"{times}{source}" + (f".at({', '.join(said)})" if said else "")


def title(wish: Wish, x: Intervention | None) -> str:
    """A column's heading: what was done, in short.

    >>> title(Wish("plain twin", "", 2.0), None)
    'plain twin'
    """
    if x is None:
        return wish.name
    times = "" if wish.strength == 1 else f"{wish.strength:g} × "
    layer = "" if wish.layer is None else f", layer {wish.layer}"
    return f"{times}{wish.name}{layer}" + (f", {wish.positions}" if wish.positions else "")


def spent(found: Sequence[Generation]) -> str:
    """Tokens and time of one run, in words."""
    seconds = len(found) * max(answer.seconds for answer in found)  # each has its share of the batch's
    return " and ".join(str(answer.tokens_out) for answer in found[::-1]) + f" tokens in {seconds:.2f} s"


def refuse_too_large(lm: LM, prompt: int, new: int, free: int | None = None) -> None:
    """Raise ModelError where two rows of these tokens would not fit in memory: their cache, and what is read of them.

    free: bytes; None asks the machine.
    """
    words = lm.model.config.get_text_config().vocab_size
    need = 2 * 2 * (prompt + new) * bytes_a_token(lm)  # a step holds two copies of a layer's cache
    need += 6 * 2 * new * words * 4  # log-probabilities of both models, and what is computed from them
    if free is None:
        cuda = lm.device.type == "cuda"
        free = torch.cuda.mem_get_info(lm.device)[0] if cuda else psutil.virtual_memory().available
    if need > free:
        raise ModelError(
            f"{prompt} prompt tokens and {new} new ones in two rows take about {need / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free. Ask for fewer new tokens, or shorten the prompt."
        )
