"""Blocks of cache entries: taken from one text and put into another, with keys moved to their new positions.

Only the keys' rotary position moves. The entries still carry what their own text came before, so a splice equals a
recomputation only where nothing came before. Models whose states hold positions (GPT-2) take a block back at its old
place alone. A folder of PEFT's prefix tuning is read as a block too (prefix tuning: arXiv 2101.00190).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from workbench.interventions.kv import plain_layer
from workbench.interventions.kv_layers import placement
from workbench.interventions.kv_ops import columns_of, first_column, first_tokens, token_layers, whole_text
from workbench.interventions.rotary import Rotary, rotary_of
from workbench.models import LM, ModelError


@dataclass(frozen=True, eq=False)
class Block:
    """Keys and values of some tokens in a row, one row or several; keys are as if the tokens stood at position 0.

    positions: where they stood. rotated: layers whose keys are rotated. fixed: why it cannot move, empty if it can.
    """

    keys: dict[int, Float[Tensor, "rows kv_heads tokens head_dim"]]
    values: dict[int, Float[Tensor, "rows kv_heads tokens value_dim"]]
    positions: Int[Tensor, "rows tokens"]
    rotated: tuple[int, ...] = ()
    fixed: str = ""
    model: str = ""
    revision: str = ""

    def __len__(self) -> int:
        return self.positions.shape[1]

    def row(self, number: int) -> "Block":
        """One row's block, which serves every row of another cache."""
        keys = {layer: tensor[number, None] for layer, tensor in self.keys.items()}
        values = {layer: tensor[number, None] for layer, tensor in self.values.items()}
        return replace(self, keys=keys, values=values, positions=self.positions[number, None])

    def rebind(self, lm: LM) -> "Block":
        """The same block, declared to belong to `lm`: for a copy or a tuned relative of the model behind it."""
        return replace(self, model=lm.name, revision=lm.revision)


def take(cache: Any, start: int, stop: int, lm: LM, *, padding: Sequence[int] | None = None) -> Block:
    """The entries of the tokens start..stop (not included) of a filled cache, which stays as it is.

    padding: columns in front of each row of a left-padded batch. Runs one token through the model to see how its keys
    are rotated. Raises ModelError where a layer has no plain entries for all of them.
    """
    layers = token_layers(cache)
    entries = {layer: plain_layer(cache, layer) for layer in layers}
    where = placement(lm)
    rotary = rotary_of(lm) if where.rotated and not where.fixed else None
    keys, values = {}, {}
    for layer, entry in entries.items():
        whole_text(entry, layer)
        rows, length = entry.keys.shape[0], entry.get_seq_length()
        columns = columns_of(slice(start, stop), length, rows, padding)
        index = (columns - first_column(entry)).to(entry.keys.device)
        if (index < 0).any():
            raise ModelError(
                f"Layer {layer} ({type(entry).__name__}) is a sliding window that still holds the last "
                f"{entry.keys.shape[2]} of {length} tokens, not all of {start} to {stop}. Take later tokens, or take "
                "them before the text grows."
            )
        positions = columns - first_tokens(padding, rows)[:, None]
        wide = index[:, None, :, None].expand(-1, entry.keys.shape[1], -1, 1)
        keys[layer] = entry.keys.gather(2, wide.expand(-1, -1, -1, entry.keys.shape[3])).float()
        values[layer] = entry.values.gather(2, wide.expand(-1, -1, -1, entry.values.shape[3])).clone()
        if rotary is not None and layer in where.rotated:
            keys[layer] = turned(rotary, keys[layer], positions, layer, back=True)
    return Block(keys, values, positions, where.rotated, where.fixed, lm.name, lm.revision)


def splice(cache: Any, block: Block, lm: LM, at: int | None = None, *, padding: Sequence[int] | None = None) -> None:
    """Put a block into a cache, in place: before the token at position `at`, or behind the last one (None).

    A block of one row goes into every row, otherwise both have as many; into an empty cache go the block's own rows.
    The text grows by the block's tokens: what stood behind them moves up, and a mask or position ids of the caller have
    to count them. padding: columns in front of each row of a left-padded batch; `at` must then be None, or the same
    column in all rows. Raises ModelError where the block belongs to another model, layers differ, or it cannot move.
    """
    if block.revision and block.revision != lm.revision:
        raise ModelError(
            f"This block was taken from {block.model!r} (revision {block.revision}), the model is {lm.name!r} "
            f"(revision {lm.revision}). Take it again on this model, or, for a copy or a tuned relative, use "
            "block.rebind(lm)."
        )
    rotary = rotary_of(lm) if block.rotated and not block.fixed else None
    if not cache.layers or cache.get_seq_length() == 0:
        places = torch.arange(len(block)).expand(len(block.positions), -1)
        check_place(block, places, behind=0)
        for layer in sorted(block.keys):
            cache.update(_placed(block, rotary, layer, places), block.values[layer], layer)
        return
    entries = _matching(cache, block)
    entry = next(iter(entries.values()))
    rows, length = entry.keys.shape[0], entry.get_seq_length()
    column = length if at is None else _column(at, length, rows, padding)
    first = first_tokens(padding, rows)
    places = column - first[:, None] + torch.arange(len(block))
    check_place(block, places, behind=length - column)
    new = {}
    for layer, entry in entries.items():
        if column != length:
            whole_text(entry, layer)
        keys = _placed(block, rotary, layer, places).to(entry.keys).expand(rows, -1, -1, -1)
        values = block.values[layer].to(entry.values).expand(rows, -1, -1, -1)
        new[layer] = (keys, values)
    for layer, (keys, values) in new.items():
        if column == length:
            entries[layer].update(keys, values)
        else:
            _insert(entries[layer], layer, (keys, values), column, first, rotary if layer in block.rotated else None)


def prefix_of(folder: str | Path, lm: LM) -> Block:
    """The prefix of a PEFT prefix-tuning folder, as a block of one row at positions 0 and up.

    PEFT puts these keys into the cache as they are, so `splice` into an empty cache (then
    `cache.batch_repeat_interleave(rows)`) does what PEFT's own forward does. Read from `adapter_config.json` and
    `adapter_model.safetensors`; gradients and projections were folded by PEFT when it saved.
    """
    folder = Path(folder).expanduser()
    files = (folder / "adapter_config.json", folder / "adapter_model.safetensors")
    if not all(file.is_file() for file in files):
        raise ModelError(
            f"{folder} holds no {files[0].name} and {files[1].name}. Write them with model.save_pretrained(FOLDER)."
        )
    config = json.loads(files[0].read_text(encoding="utf-8"))
    if config.get("peft_type") != "PREFIX_TUNING":
        raise ModelError(
            f"{folder} is an adapter of type {config.get('peft_type')!r}, not PREFIX_TUNING. LoRA adapters are loaded "
            "with wb.Adapter(FOLDER)."
        )
    table = load_file(files[1])["prompt_embeddings"]
    depth, heads, tokens = config["num_layers"], config["num_attention_heads"], config["num_virtual_tokens"]
    if depth != len(lm.blocks):
        raise ModelError(f"{folder} was made for {depth} layers; {lm.name!r} has {len(lm.blocks)}.")
    where, positions = placement(lm), torch.arange(tokens)[None]
    rotary = rotary_of(lm) if where.rotated else None
    pairs = table.view(tokens, depth, 2, heads, -1).permute(1, 2, 3, 0, 4).to(lm.device)  # layer, k or v, head, token
    keys = {layer: pairs[layer, 0][None].float() for layer in range(depth)}
    if rotary is not None:
        keys |= {layer: turned(rotary, keys[layer], positions, layer, back=True) for layer in where.rotated}
    values = {layer: pairs[layer, 1][None].to(lm.model.dtype) for layer in range(depth)}
    return Block(keys, values, positions, where.rotated, "", lm.name, lm.revision)


def turned(
    rotary: Rotary,
    keys: Float[Tensor, "rows kv_heads tokens head_dim"],
    places: Int[Tensor, "rows tokens"],
    layer: int,
    *,
    back: bool = False,
) -> Float[Tensor, "rows kv_heads tokens head_dim"]:
    """Keys of several tokens rotated to their places, or back from there."""
    rows, heads, tokens, dim = keys.shape
    flat = keys.transpose(1, 2).reshape(rows * tokens, heads, dim)
    moved = rotary.turn(flat, places.reshape(-1).to(keys.device), layer, back=back)
    return moved.view(rows, tokens, heads, dim).transpose(1, 2)


def _placed(
    block: Block, rotary: Rotary | None, layer: int, places: Int[Tensor, "rows tokens"]
) -> Float[Tensor, "rows kv_heads tokens head_dim"]:
    """A block's keys at their new places, in the dtype of its values."""
    keys = block.keys[layer].expand(len(places), -1, -1, -1)
    if rotary is not None and layer in block.rotated:
        keys = turned(rotary, keys, places, layer)
    return keys.to(block.values[layer])


def check_place(block: Block, places: Int[Tensor, "rows tokens"], behind: int) -> None:
    """Refuse to move what cannot move."""
    if block.fixed and (behind or (places != block.positions).any()):
        raise ModelError(
            f"This block cannot move from positions {block.positions[0, 0]} and up to {int(places[0, 0])} and up, nor "
            f"push other tokens up: {block.fixed}. Put it back behind the same number of tokens."
        )


def _matching(cache: Any, block: Block) -> dict[int, DynamicLayer]:
    """The cache's layers, if the block has entries for each, of the same shape and rows."""
    entries = {layer: plain_layer(cache, layer) for layer in token_layers(cache)}
    for layer, entry in entries.items():
        mine = tuple(block.keys[layer].shape) if layer in block.keys else None
        theirs = (entry.keys.shape[0], entry.keys.shape[1], len(block), entry.keys.shape[3])
        if mine not in (theirs, (1, *theirs[1:])):
            raise ModelError(
                f"Layer {layer} ({type(entry).__name__}) takes keys of shape {theirs} (rows, kv_heads, tokens, "
                f"head_dim), or one row for all; the block has {mine}."
            )
    return entries


def _column(at: int, length: int, rows: int, padding: Sequence[int] | None) -> int:
    columns = columns_of(at, length, rows, padding)
    if (columns != columns[0]).any():
        raise ModelError(f"at={at} is another column in each row of this padded batch. Use at=None or a negative one.")
    return int(columns[0, 0])


def _insert(
    entry: DynamicLayer,
    layer: int,
    new: tuple[Tensor, Tensor],
    column: int,
    first: Int[Tensor, " rows"],
    rotary: Rotary | None,
) -> None:
    """Put entries before a column; the keys behind it turn to their new positions."""
    start, tokens = first_column(entry), new[0].shape[2]
    index = max(column - start, 0)
    tail = entry.keys[:, :, index:]
    if rotary is not None:
        old = start + index + torch.arange(tail.shape[2]) - first[:, None]
        plain = turned(rotary, tail.float(), old.clamp(min=0), layer, back=True)
        tail = turned(rotary, plain, (old + tokens).clamp(min=0), layer).to(entry.keys)
    entry.keys = torch.cat([entry.keys[:, :, :index], new[0], tail], dim=2)
    entry.values = torch.cat([entry.values[:, :, :index], new[1], entry.values[:, :, index:]], dim=2)
    if isinstance(entry, DynamicSlidingWindowLayer):
        entry.cumulative_length += tokens
        entry.keys = entry.keys[:, :, -entry.sliding_window + 1 :]
        entry.values = entry.values[:, :, -entry.sliding_window + 1 :]
