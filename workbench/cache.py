"""A key-value cache whose layers grow by blocks: transformers' own copies everything for every new token."""

from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from workbench.models import LM

SPARE = 64  # tokens of room that a full buffer gets


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that writes new tokens into spare room; keys and values are views of the filled part."""

    keys: Tensor
    values: Tensor
    room: tuple[Tensor, Tensor] | None = None

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
        old = self.get_seq_length()
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

    def _at_home(self, room: tuple[Tensor, Tensor]) -> bool:
        """Whether keys and values are still views of the room: rows picked out or edited are not."""
        return all(
            view.data_ptr() == place.data_ptr() and len(view) == len(place)
            for view, place in zip((self.keys, self.values), room, strict=True)
        )


def new_cache(lm: LM) -> DynamicCache:
    """An empty cache of the model's own layer kinds, the plain ones growing by blocks."""
    cache = DynamicCache(config=lm.model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
