"""Key-value cache layers of our own: one that grows by blocks, and both kinds with entries taken out.

transformers' own layers copy everything for every new token, and take the number of stored entries for the length of
the text. Here a layer may store fewer entries than the text has tokens (`interventions.kv_ops`): its length stays that
of the text, so positions and masks of what follows stay right without help.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from workbench.models import LM, ModelError

SPARE = 64  # tokens of room that a full buffer gets


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that writes new tokens into spare room; keys and values are views of the filled part.

    `gone` entries of the text are no longer stored. The length counts them, and the mask starts behind as many columns.
    """

    keys: Tensor
    values: Tensor
    room: tuple[Tensor, Tensor] | None = None
    gone: int = 0

    @property
    def stored(self) -> int:
        """How many entries there are."""
        return self.keys.shape[2] if self.is_initialized and self.keys.ndim == 4 else 0

    def get_seq_length(self) -> int:
        """Tokens of the text so far, those without an entry included."""
        return self.gone + self.stored

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the mask covers, and the first of them: stored entries count as the text's last ones."""
        return self.stored + query_length, self.gone

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.room, self.gone = None, 0

    def update(
        self,
        key_states: Float[Tensor, "rows heads new head_dim"],
        value_states: Float[Tensor, "rows heads new value_dim"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Float[Tensor, "rows heads all head_dim"], Float[Tensor, "rows heads all value_dim"]]:
        """Append the new tokens and return all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.stored
        total = old + key_states.shape[2]
        room = self.room
        if room is None or total > room[0].shape[2] or not self._at_home(room):
            shape = (*key_states.shape[:2], total + SPARE)
            room = (
                key_states.new_empty(*shape, key_states.shape[3]),
                value_states.new_empty(*shape, value_states.shape[3]),
            )
            if old:
                room[0][:, :, :old], room[1][:, :, :old] = self.keys, self.values
        room[0][:, :, old:total], room[1][:, :, old:total] = key_states, value_states
        self.room, self.keys, self.values = room, room[0][:, :, :total], room[1][:, :, :total]
        return self.keys, self.values

    def join(self, kept: Int[Tensor, " kept"], first: int, others: "Sequence[GrowingLayer]", width: int) -> None:
        """Go on with these rows from column `first` on, and behind them all of other layers', in `width` columns.

        All stand at the right end, with zeros before them.
        """
        rooms = []
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)[:, :, first:]
            parts = [(old, kept), *((getattr(other, name), slice(None)) for other in others)]
            total = len(kept) + sum(len(part) for part, _ in parts[1:])
            room = old.new_empty(total, old.shape[1], width + SPARE, old.shape[3])
            row = 0
            for part, chosen in parts:
                place = room[row : row + (len(kept) if part is old else len(part))]
                place[:, :, : width - part.shape[2]] = 0
                place[:, :, width - part.shape[2] : width] = part[chosen]
                row += len(place)
            rooms.append(room)
        self.room = (rooms[0], rooms[1])
        self.keys, self.values = rooms[0][:, :, :width], rooms[1][:, :, :width]

    def _at_home(self, room: tuple[Tensor, Tensor]) -> bool:
        """Whether keys and values are still views of the room: rows picked out or edited are not."""
        return all(
            view.data_ptr() == place.data_ptr() and len(view) == len(place)
            for view, place in zip((self.keys, self.values), room, strict=True)
        )


class ThinnedSlidingLayer(DynamicSlidingWindowLayer):
    """A sliding window with holes: entries leave it by the column they came from, not by how many there are.

    columns: those of the stored entries, the same in all rows. Masks count entries, so several new tokens at once are
    refused where the window's edge would pass an entry on the way.
    """

    is_croppable = False

    def __init__(self, old: DynamicSlidingWindowLayer, columns: list[int]) -> None:
        super().__init__(sliding_window=old.sliding_window)
        self.lazy_initialization(old.keys, old.values)
        self.keys, self.values = old.keys, old.values
        self.cumulative_length, self.columns = old.cumulative_length, list(columns)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As many columns as there are entries and new tokens; they count as the text's last ones."""
        first, stored = self.cumulative_length - self.sliding_window + query_length, len(self.columns)
        holes = stored and self.columns[0] != self.cumulative_length - stored
        if holes and self.columns[0] < first:
            raise ModelError(
                f"{query_length} tokens at once would pass the edge of a sliding window of {self.sliding_window} with "
                "dropped tokens in it. Go on with one token a forward."
            )
        return stored + query_length, self.cumulative_length - stored

    def update(
        self,
        key_states: Float[Tensor, "rows heads new head_dim"],
        value_states: Float[Tensor, "rows heads new value_dim"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Float[Tensor, "rows heads all head_dim"], Float[Tensor, "rows heads all value_dim"]]:
        """Append the new tokens and return all; keep those that the next token can see."""
        old, self.cumulative_length = self.cumulative_length, self.cumulative_length + key_states.shape[2]
        keys, values = torch.cat([self.keys, key_states], dim=2), torch.cat([self.values, value_states], dim=2)
        columns = [*self.columns, *range(old, self.cumulative_length)]
        self.columns = [column for column in columns if column > self.cumulative_length - self.sliding_window]
        left = len(columns) - len(self.columns)
        self.keys, self.values = keys[:, :, left:], values[:, :, left:]
        return keys, values

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.columns = []


def new_cache(lm: LM) -> DynamicCache:
    """An empty cache of the model's own layer kinds, the plain ones growing by blocks."""
    cache = DynamicCache(config=lm.model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
