"""What of a row's interventions changes the weights, and with them every row of a forward."""

from collections.abc import Sequence
from typing import Any

from workbench.interventions.adapter import Adapter
from workbench.interventions.concept import Intervention
from workbench.interventions.weights import Weights
from workbench.models import ModelError


def for_all_rows(row: Sequence[Intervention]) -> list[Adapter | Weights]:
    """What of a row changes the weights, and with them every row of a forward."""
    return [part for part in row if isinstance(part, Adapter | Weights) and part.strength != 0]


def weights_key(row: Sequence[Intervention]) -> tuple[Any, ...]:
    """Equal for rows that may share a forward: they change the weights in the same way."""
    return tuple(part.key if isinstance(part, Weights) else part for part in for_all_rows(row))


def common(parts: Sequence[Sequence[Intervention]]) -> list[Adapter | Weights]:
    """Every row has to change the weights in the same way."""
    if len({weights_key(row) for row in parts}) > 1:
        raise ModelError(
            "Rows of one forward cannot have different adapters or weight edits. lm.generate sorts such rows into "
            "groups of their own."
        )
    return for_all_rows(parts[0]) if parts else []
