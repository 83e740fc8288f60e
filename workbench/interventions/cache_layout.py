"""The columns of a cache that was edited: whose they are, who sees them, and where in them a row's text is.

`Layout` stays with the cache and turns the caller's mask and position ids, which know only the text, into those of the
cache; `Moment` is the cache at the time of an edit. What is edited: `cache_plan`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from workbench.interventions.cache_edits import Where
from workbench.interventions.kv import plain_layer
from workbench.interventions.kv_ops import whole_text
from workbench.models import ModelError


class Layout:
    """The columns of an edited cache: whose they are, who sees them, and by how much a row's later tokens moved up."""

    def __init__(self, numbers: Sequence[int], device: torch.device) -> None:
        self.numbers = list(numbers)  # the rows, by their number in the session
        self.visible = torch.ones(len(self.numbers), 0, dtype=torch.bool, device=device)
        self.origin = torch.zeros(0, dtype=torch.long, device=device)  # the text's column, or -1
        self.shift = torch.zeros(len(self.numbers), dtype=torch.long, device=device)
        self.changed = False

    @property
    def added(self) -> int:
        """Columns that the text does not have."""
        return int((self.origin < 0).sum())

    def grow(self, text: int) -> int:
        """The text has this many columns now; how many the cache has."""
        start = len(self.origin) - self.added
        new = torch.arange(start, text, device=self.origin.device)
        self.origin = torch.cat([self.origin, new])
        self.visible = torch.cat([self.visible, self.visible.new_ones(len(self.visible), len(new))], dim=1)
        return len(self.origin)

    def insert(self, visible: Bool[Tensor, "rows tokens"], moved: Int[Tensor, " rows"]) -> None:
        """Columns that the text does not have, behind the others; what comes after them moves up."""
        self.origin = torch.cat([self.origin, self.origin.new_full((visible.shape[1],), -1)])
        self.visible = torch.cat([self.visible, visible.to(self.visible.device)], dim=1)
        self.shift, self.changed = self.shift + moved.to(self.shift.device), True

    def rows(self, selected: Sequence[int] | None, count: int) -> list[int]:
        """Which of its rows a forward's rows are: those that the session selected, else all, in order."""
        if selected is not None:
            place = {number: row for row, number in enumerate(self.numbers)}
            return [place[number] for number in selected]
        if count != len(self.numbers):
            raise ModelError(
                f"The cache was edited with {len(self.numbers)} rows, and this forward has {count}. Go on with all."
            )
        return list(range(count))

    def dress(self, call: dict[str, Any], rows: list[int], seen: int, width: int) -> dict[str, Any]:
        """A forward's arguments as the edited cache needs them; `seen` counts the text's columns before it."""
        mask, places = call.get("attention_mask"), call.get("position_ids")
        if mask is None:
            mask = self.origin.new_ones(len(rows), seen + width)
        text = mask[:, self.origin.clamp(min=0)].to(self.origin.device)
        old = torch.where(self.origin < 0, torch.ones_like(text), text) * self.visible[rows].to(text.dtype)
        if places is None:
            places = torch.arange(seen, seen + width, device=mask.device)[None]
        return {
            **call,
            "attention_mask": torch.cat([old, mask[:, len(self.origin) - self.added :]], dim=1),
            "position_ids": places + self.shift[rows][:, None].to(places.device),
        }


@dataclass
class Moment:
    """A cache that holds each row up to its last prompt token but one, for the rows `now`; their edits come next.

    lengths: tokens of the rows' prompts. places: rotary positions of the last cached tokens. end: the cache's columns.
    level: whether the prompts of all rows, edited or not, end in the same column.
    """

    cache: Any
    layout: Layout
    now: list[int]
    lengths: list[int]
    places: list[int]
    end: int
    level: bool
    thinned: bool = False
    owned: set[int] = field(default_factory=set)  # layers whose tensors are copies already

    def first(self, row: int) -> int:
        """The column of a row's first token."""
        return self.end - (self.lengths[row] - 1)

    def positions(self, row: int, where: Where) -> list[int]:
        """Positions of a row's text, all of them cached."""
        length = self.lengths[row]
        if isinstance(where, slice):
            return [place for place in range(length)[where] if place < length - 1]
        places = [place + length if place < 0 else place for place in ((where,) if isinstance(where, int) else where)]
        if not all(0 <= place < length - 1 for place in places):
            raise ModelError(
                f"positions={where!r} of a prompt of {length} tokens: 0 to {length - 2}, or -2 to {-length}, are "
                "cached when the edit is made."
            )
        return places

    def rotary(self, row: int, positions: Sequence[int]) -> Int[Tensor, "1 tokens"]:
        """What the model was told of these text positions."""
        return torch.tensor([[self.places[row] - (self.lengths[row] - 2 - place) for place in positions]])

    def entries(self, row: int, positions: Sequence[int], layer: int) -> tuple[DynamicLayer, Int[Tensor, " tokens"]]:
        """A layer with tensors of its own, and the places in them of a row's text positions."""
        entry = plain_layer(self.cache, layer)
        if not self.thinned:  # by this very edit: rows that were not compressed still have all their entries
            whole_text(entry, layer)
        if layer not in self.owned:
            entry.keys, entry.values = entry.keys.clone(), entry.values.clone()
            self.owned.add(layer)
        start = self.first(row) - (self.end - entry.keys.shape[2])
        index = torch.tensor([start + place for place in positions], dtype=torch.long)
        if (index < 0).any():
            raise ModelError(
                f"Layer {layer} ({type(entry).__name__}) is a sliding window that still holds the last "
                f"{entry.keys.shape[2]} of {self.end} tokens; positions {list(positions)} have left it. Choose later "
                "positions or other layers."
            )
        return entry, index.to(entry.keys.device)
