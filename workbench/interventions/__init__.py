"""Interventions: changes inside a model while it runs, as values that can be scaled, added, saved and applied.

`Residual` and `LowRank` change the residual stream, `KV` adds to the cached prompt once, `DropTokens`, `ScaleTokens`,
`ReplaceTokens`, `SpliceBlock`, `CompressCache` and `QuantizeCache` edit it otherwise, `Adapter` puts a LoRA adapter on,
`Weights` edits weights, `Logits` adds what other models say; `x.when(gate)` acts on the rows that a gate lets through.
What the kinds share is in `concept`, how they reach a forward pass in `session`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from workbench.interventions.adapter import Adapter
from workbench.interventions.cache_edits import (
    CompressCache,
    DropTokens,
    QuantizeCache,
    ReplaceTokens,
    ScaleTokens,
    SpliceBlock,
)
from workbench.interventions.concept import Intervention, Sum
from workbench.interventions.extraction import extract, random_like
from workbench.interventions.files import load_intervention
from workbench.interventions.gate import Conditional, Gate, fit_gate
from workbench.interventions.kv import KV
from workbench.interventions.logits import Logits
from workbench.interventions.low_rank import LowRank
from workbench.interventions.reading import Reading, read_pairs
from workbench.interventions.residual import Positions, Residual
from workbench.interventions.session import Session, inherit
from workbench.interventions.trained import train_vector
from workbench.interventions.weights import Weights, heads_writing, isolate, project_out
from workbench.models import LM
from workbench.turns import turn

__all__ = [
    "KV",
    "Adapter",
    "CompressCache",
    "Conditional",
    "DropTokens",
    "Gate",
    "Intervention",
    "Logits",
    "LowRank",
    "Positions",
    "QuantizeCache",
    "Reading",
    "ReplaceTokens",
    "Residual",
    "ScaleTokens",
    "SpliceBlock",
    "Sum",
    "Weights",
    "apply",
    "extract",
    "fit_gate",
    "heads_writing",
    "isolate",
    "load_intervention",
    "project_out",
    "random_like",
    "read_pairs",
    "train_vector",
]


@contextmanager
def apply(
    lm: LM, x: Intervention | Sequence[Intervention | None], *, prompt_lengths: Sequence[int] | None = None
) -> Iterator[None]:
    """Intervene in everything that calls `lm.model` inside the block: `model.generate`, scoring, your own loop.

    x: one for all rows, or one (or None) a row of the batches to come. `last`, `prompt` and `generated` refer to the
    prompt of the first forward on an empty cache, unless `prompt_lengths` says how many tokens of each row are prompt
    (needed to score a prompt and its answer in one forward). A prompt that is prefilled in chunks needs
    `prompt_lengths` too. A KV edit is made when the last prompt token arrives. Nested blocks add up; afterwards the
    model is as it was, exceptions included.
    """
    rows = [x] if isinstance(x, Intervention) else list(x)
    with turn(lm), Session(lm, inherit(lm, rows), prompt_lengths):
        yield
