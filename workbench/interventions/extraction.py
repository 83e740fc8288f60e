"""Read directions out of contrastive pairs: a token's state at the end of a positive prompt minus of a negative one.

`extract` gives one vector set, from the residual stream after every decoder block or from the cached keys (un-rotated)
and values; `read_pairs` in `reading` gives all of them from one pass. `random_like` makes the control to run beside.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from workbench.interventions.concept import Intervention, Sum
from workbench.interventions.kv import KV
from workbench.interventions.low_rank import LowRank
from workbench.interventions.probes import METHODS
from workbench.interventions.reading import Pairs, read_texts
from workbench.interventions.residual import Residual
from workbench.interventions.weights import Weights
from workbench.models import LM, ModelError
from workbench.turns import in_turn

SITES = ("residual", "kv")


@in_turn
def extract(
    lm: LM,
    pairs: Pairs,
    site: str = "residual",
    method: str = "mean_diff",
    *,
    token: int | None = None,
    layers: Iterable[int] | int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """A `Residual` (site "residual") or a `KV` (site "kv") from one token of each prompt in `pairs`.

    token: which one, counted from the end; None reads -1 (the last prompt token) for the residual stream and -2 for kv:
    the last token must still be processed after an edit, so -2 is the last cached one, the one that `KV` changes.

    method: "mean_diff" = mean(positive) - mean(negative); "pca" = first direction of the uncentred pair differences, so
    that their mean survives; "pca_pairwise" = the same from states centred pair by pair (repeng's pca_center);
    "logistic" = normal of a logistic probe. All but the first point the way of, and are as long as, the mean
    difference, so that strengths compare. kv knows mean_diff only (arXiv 2507.08799).

    layers: those to read (None: all); the model is not run above the deepest. For several methods, both sites or
    AUROCs read once with `read_pairs`.
    """
    if site not in SITES or method not in METHODS or (site == "kv" and method != "mean_diff"):
        raise ModelError(
            f"site={site!r}, method={method!r}: allowed are site='residual' with {', '.join(METHODS)}, and site='kv' "
            "with mean_diff."
        )
    token = token if token is not None else -2 if site == "kv" else -1
    if token >= 0:
        raise ModelError(f"token={token} counts from the end of each prompt: give -1 (the last) or less.")
    if site == "kv":
        return read_texts(lm, pairs, layers, None, token, batch_size, progress).kv()
    return read_texts(lm, pairs, layers, token, None, batch_size, progress).vector(method)


def random_like(x: Intervention, seed: int = 0) -> Intervention:
    """A random direction of equal norm in place of every vector of `x`: the control to run beside a steering result."""
    generator = torch.Generator().manual_seed(seed)

    def like(vector: Tensor) -> Tensor:
        noise = torch.randn(vector.shape, generator=generator)
        return (noise * (vector.float().cpu().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))).to(vector)

    if isinstance(x, Residual):
        return replace(x, vectors={layer: like(vector) for layer, vector in x.vectors.items()})
    if isinstance(x, LowRank):
        down, up = ({layer: like(part) for layer, part in side.items()} for side in (x.down, x.up))
        return replace(x, down=down, up=up)
    if isinstance(x, KV):
        keys = {layer: like(tensor) for layer, tensor in x.keys.items()}
        return replace(x, keys=keys, values={layer: like(tensor) for layer, tensor in x.values.items()})
    if isinstance(x, Weights):
        return x.random(seed)
    if isinstance(x, Sum):
        return Sum(tuple(random_like(part, seed + number) for number, part in enumerate(x.members)))
    raise ModelError(
        f"There is no random {type(x).__name__}; use a Residual, a LowRank, a KV, a Weights or a sum of them."
    )
