"""Store a filled cache in 8 or 4 bits: keys by channel, values by token, as KIVI does (arXiv 2402.02750).

Rounding is asymmetric, code = round((x - least) / step) with step = (largest - least) / (2^bits - 1) of the entry's
group, so an entry is off by at most half a step. A key's group is one channel over 32 tokens in a row, counted from the
end of the cache; a value's group is one token of a head. Tokens that come later are stored as they are; KIVI and
transformers' `QuantizedCache` round them too once they are many. All is unpacked again for every forward: this saves
memory, not time. Not covered: 2 bits, sliding windows (short already), and edits of a quantised layer, which every
other operation refuses by its name: edit, drop or compress first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from workbench.interventions.kv import plain_layer
from workbench.interventions.kv_ops import first_tokens, token_layers
from workbench.models import ModelError

BITS = (8, 4)
GROUP = 32  # tokens that share the scale of a key's channel; KIVI's number
SLACK = 2.0**-10, 1e-7  # more than half precision rounds a number by: relative, and for the smallest


def quantize(cache: Any, bits: int = 8, *, padding: Sequence[int] | None = None) -> None:
    """Round the keys and values of a filled cache to 8 or 4 bits, in place; what is generated then reads these.

    padding: stored columns in front of each row of a left-padded batch; they don't count in any group, so a row is
    rounded as if it were alone. Sliding windows stay as they are. Raises ModelError for layers that don't hold one
    plain key and value a token, by number and type, with nothing changed.
    """
    if bits not in BITS:
        raise ModelError(f"bits={bits}: allowed are {', '.join(map(str, BITS))}.")
    entries = {layer: plain_layer(cache, layer) for layer in token_layers(cache)}
    full = {layer: entry for layer, entry in entries.items() if not isinstance(entry, DynamicSlidingWindowLayer)}
    if not full:
        raise ModelError("All layers of this model are sliding windows, short already. There is nothing to quantise.")
    new = {}
    for layer, entry in full.items():
        first = first_tokens(padding, len(entry.keys)).to(entry.keys.device)
        packed = (pack(_filled(entry.keys, first), bits, GROUP), pack(_filled(entry.values, first), bits))
        if not all(part.least.isfinite().all() and part.step.isfinite().all() for part in packed):
            raise ModelError(
                f"Layer {layer} holds keys or values beyond the reach of half precision. Leave it as it is."
            )
        new[layer] = FewBitsLayer(entry, *packed)
    for layer, few in new.items():
        cache.layers[layer] = few


def stored_bytes(cache: Any) -> int:
    """Bytes that the keys and values of a cache take, quantised or not; spare room for new tokens is not counted."""
    layers = [cache.layers[layer] for layer in token_layers(cache)]
    tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values) if tensor is not None]
    packed = [part for layer in layers if isinstance(layer, FewBitsLayer) for part in layer.packed]
    return sum(tensor.nbytes for part in packed for tensor in part.tensors) + sum(tensor.nbytes for tensor in tensors)


@dataclass(frozen=True, eq=False)
class Packed:
    """Entries in few bits: codes (two a byte in 4 bits), and the least value and the step of each group.

    tokens, size: how many tokens there are, and entries of each; group: tokens that share a scale.
    """

    codes: UInt8[Tensor, "rows heads tokens stored"]
    least: Float[Tensor, "rows heads groups width"]
    step: Float[Tensor, "rows heads groups width"]
    bits: int
    group: int
    size: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.codes, self.least, self.step

    def pick(self, rows: Int[Tensor, " kept"]) -> "Packed":
        """These rows, in this order."""
        codes, least, step = (tensor.index_select(0, rows.to(tensor.device)) for tensor in self.tensors)
        return replace(self, codes=codes, least=least, step=step)

    def unpack(self) -> Float[Tensor, "rows heads tokens size"]:
        """The entries, rounded, in float32."""
        codes = self.codes if self.bits == 8 else torch.stack([self.codes & 15, self.codes >> 4], dim=-1).flatten(-2)
        least, step = (_spread(side, self.group, codes.shape[2]) for side in (self.least, self.step))
        return codes[..., : self.size].float() * step + least


def pack(entries: Float[Tensor, "rows heads tokens size"], bits: int, group: int | None = None) -> Packed:
    """Entries in 8 or 4 bits; group: tokens that share a scale channel by channel, None for one scale a token."""
    exact, (tokens, size), levels = entries.float(), entries.shape[2:], 2**bits - 1
    if group is None:
        sides = exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)
    else:
        early = -tokens % group  # the first group is filled up with the first token
        groups = torch.cat([exact[:, :, :1].expand(-1, -1, early, -1), exact], dim=2).unflatten(2, (-1, group))
        sides = groups.amin(3), groups.amax(3)
    least = (sides[0] - SLACK[0] * sides[0].abs() - SLACK[1]).half()  # rounded down, and the step up: all codes fit
    step = ((sides[1] - least.float()) / levels * (1 + SLACK[0]) + SLACK[1]).half()
    share = group or 1
    codes = (exact - _spread(least, share, tokens)) / _spread(step, share, tokens)
    codes = codes.round().clamp(0, levels).to(torch.uint8)
    if bits == 4:
        low, high = nn.functional.pad(codes, (0, size % 2)).unflatten(-1, (-1, 2)).unbind(-1)
        codes = low | (high << 4)
    return Packed(codes, least, step, bits, share, size)


def _spread(side: Float[Tensor, "rows heads groups width"], group: int, tokens: int) -> Tensor:
    """A scale of each group for each of its tokens; groups are counted from the end."""
    return side.float().repeat_interleave(group, dim=2)[:, :, -tokens:]


class FewBitsLayer(DynamicLayer):
    """A cache layer whose first tokens are packed; `keys` and `values` hold those that came after, as they are."""

    is_croppable = False

    def __init__(self, old: DynamicLayer, keys: Packed, values: Packed) -> None:
        super().__init__()
        self.lazy_initialization(old.keys, old.values)
        self.keys, self.values = old.keys[:, :, :0].clone(), old.values[:, :, :0].clone()
        self.packed: tuple[Packed, ...] = (keys, values)
        self.gone = int(getattr(old, "gone", 0))

    @property
    def stored(self) -> int:
        """How many entries there are."""
        packed = self.packed[0].codes.shape[2] if self.packed else 0
        return packed + (self.keys.shape[2] if self.is_initialized and self.keys.ndim == 4 else 0)

    def get_seq_length(self) -> int:
        """Tokens of the text so far, those without an entry included."""
        return self.gone + self.stored

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the mask covers, and the first of them: stored entries count as the text's last ones."""
        return self.stored + query_length, self.gone

    def update(
        self,
        key_states: Float[Tensor, "rows heads new head_dim"],
        value_states: Float[Tensor, "rows heads new value_dim"],
        *args: object,
        **kwargs: object,
    ) -> tuple[Float[Tensor, "rows heads all head_dim"], Float[Tensor, "rows heads all value_dim"]]:
        """Append the new tokens and return all: the packed ones rounded."""
        super().update(key_states, value_states)
        return self.entries

    @property
    def entries(self) -> tuple[Float[Tensor, "rows heads all head_dim"], Float[Tensor, "rows heads all value_dim"]]:
        """All keys and values: the packed ones rounded, and those that came later."""
        late = self.keys, self.values
        if not self.packed:
            return late
        early = (part.unpack().to(tensor.dtype) for part, tensor in zip(self.packed, late, strict=True))
        keys, values = (torch.cat(pair, dim=2) for pair in zip(early, late, strict=True))
        return keys, values

    def reorder_cache(self, beam_idx: Int[Tensor, " kept"]) -> None:
        """Only these rows, in this order."""
        super().reorder_cache(beam_idx)
        self.packed = tuple(part.pick(beam_idx) for part in self.packed)

    def batch_select_indices(self, indices: Int[Tensor, " kept"]) -> None:
        """Only these rows, in this order."""
        super().batch_select_indices(indices)
        self.packed = tuple(part.pick(indices) for part in self.packed)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        rows = torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats)
        self.batch_select_indices(rows)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.packed, self.gone = (), 0


def _filled(
    entries: Float[Tensor, "rows heads tokens size"], first: Int[Tensor, " rows"]
) -> Float[Tensor, "rows heads tokens size"]:
    """Each row's first token in the place of the padding before it, so that padding widens no group."""
    columns = torch.arange(entries.shape[2], device=entries.device).maximum(first[:, None])
    return entries.gather(2, columns[:, None, :, None].expand_as(entries))
