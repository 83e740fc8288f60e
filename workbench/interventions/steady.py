"""Decoding behind a finished prompt: there a constant change is the same for every new token, and is made only once.

Positions need not be worked out again for each token as long as no span depends on which of the generated tokens it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.interventions.residual import Positions
from workbench.interventions.residual_plan import ResidualPlan


def behind_prompt(positions: Positions) -> bool | None:
    """Whether a span holds all generated tokens (True), none of them (False), or some (None).

    >>> [behind_prompt(span) for span in ("all", "last", slice(-1, None), slice(2, -1), (0, -1), slice(2, None), 7)]
    [True, False, True, False, None, None, None]
    """
    if isinstance(positions, str):
        return positions in ("all", "generated")
    if isinstance(positions, slice):
        start, stop, step = positions.start, positions.stop, positions.step
        if stop is not None and stop < 0:
            return False
        return True if stop is None and step in (None, 1) and (start or 0) <= 0 else None
    places = (positions,) if isinstance(positions, int) else positions
    return False if all(place < 0 for place in places) else None


@dataclass
class Steady:
    """What is known once all prompts of a cache have been read: it has `columns` columns then.

    inside: by span, whether generated tokens are in it. changes: what every layer gets, made for the rows at hand.
    """

    cache: ref[Any]
    columns: int
    inside: Sequence[bool]
    changes: dict[int, Tensor] = field(default_factory=dict)
    count: int = -1

    @classmethod
    def after(cls, cache: Any, columns: int, spans: Sequence[Positions]) -> "Steady | None":
        """None where generated tokens differ."""
        inside = [behind_prompt(span) for span in spans]
        if cache is None or None in inside:
            return None
        return cls(ref(cache), columns, [bool(each) for each in inside])

    def holds(self, cache: Any, width: int) -> bool:
        """Whether a forward brings one new token a row behind these prompts; a cache that was cropped does not."""
        known: Any = self.cache()
        if width != 1 or known is None or known is not cache:
            return False
        # a compiled step can't branch on how full a static cache is
        return torch.compiler.is_compiling() or bool(known.get_seq_length() >= self.columns)

    def forget_rows(self) -> None:
        """Other rows come next."""
        self.changes, self.count = {}, -1

    def prepare(self, plans: Mapping[int, ResidualPlan], rows: Int[Tensor, " rows"]) -> None:
        """The changes for these rows."""
        self.changes = {}
        for layer, plan in plans.items():
            inside = [self.inside[span] for span in plan.spans]
            if any(inside):
                shares = plan.additions[rows.to(plan.additions.device)]
                self.changes[layer] = (shares @ (plan.vectors * shares.new_tensor(inside)[:, None]))[:, None]
        self.count = len(rows)

    def change(self, layer: int, hidden: Float[Tensor, "rows 1 d_model"]) -> Float[Tensor, "rows 1 d_model"]:
        """Hidden states with every row's additions."""
        total = self.changes.get(layer)
        if total is None:
            return hidden
        if total.dtype != hidden.dtype or total.device != hidden.device:
            total = self.changes[layer] = total.to(hidden)
        return hidden + total
