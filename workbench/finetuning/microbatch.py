"""Split a micro-batch into smaller ones that add up to the same gradient, for when memory runs out.

A packed row is split where its records begin, padded rows between rows; no record is ever cut. The loss of each part is
divided by the learnt tokens of the whole optimisation step, so that the parts' gradients add up to the whole's. Not
covered: a single record that does not fit, which is refused with its length.
"""

from typing import Any

import torch

Batch = dict[str, Any]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of a GPU, of torch's CPU allocator, or of Python.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."))
    True
    >>> is_out_of_memory(RuntimeError("size mismatch"))
    False
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(error)
    known = ("DefaultCPUAllocator", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(words in said for words in known)


def record_lengths(batch: Batch) -> list[int]:
    """Tokens of each record in a micro-batch, packed or padded (padding not counted)."""
    if "cu_seq_lens_q" in batch:
        return batch["cu_seq_lens_q"].diff().tolist()
    mask = batch.get("attention_mask")
    rows, width = batch["input_ids"].shape
    return [width] * rows if mask is None else mask.sum(1).tolist()


def split(batch: Batch, parts: int) -> list[Batch]:
    """At most `parts` smaller micro-batches of whole records, in order, with about equally many tokens each."""
    groups = _groups(record_lengths(batch), parts)
    if len(groups) == 1:
        return [batch]
    take = _packed_part if "cu_seq_lens_q" in batch else _padded_part
    return [take(batch, first, last) for first, last in groups]


def _groups(lengths: list[int], parts: int) -> list[tuple[int, int]]:
    """Borders of consecutive groups: a record belongs to the part in which its middle token lies."""
    total, before = sum(lengths), 0.0
    owners: list[int] = []
    for length in lengths:
        owners.append(int((before + length / 2) / total * parts) if len(lengths) > parts else len(owners))
        before += length
    firsts = [place for place, owner in enumerate(owners) if place == 0 or owner != owners[place - 1]]
    return list(zip(firsts, [*firsts[1:], len(lengths)], strict=True))


def _packed_part(batch: Batch, first: int, last: int) -> Batch:
    """Records `first` to `last` of a packed row: every field with a value a token is cut, borders are counted anew."""
    borders = batch["cu_seq_lens_q"]
    start, end, width = int(borders[first]), int(borders[last]), batch["input_ids"].shape[1]
    part = {
        name: value[:, start:end] if torch.is_tensor(value) and value.ndim > 1 and value.shape[1] == width else value
        for name, value in batch.items()
    }
    part["cu_seq_lens_q"] = part["cu_seq_lens_k"] = own = borders[first : last + 1] - start
    part["max_length_q"] = part["max_length_k"] = int(own.diff().max())
    if "seq_idx" in part:
        part["seq_idx"] = part["seq_idx"] - first
    return part


def _padded_part(batch: Batch, first: int, last: int) -> Batch:
    """Rows `first` to `last`, without the columns that hold padding only (padding is on the right)."""
    rows, width = batch["input_ids"].shape
    longest = max(record_lengths(batch)[first:last])

    def cut(value: Any) -> Any:
        if not torch.is_tensor(value) or value.ndim == 0 or value.shape[0] != rows:
            return value
        return value[first:last, :longest] if value.ndim > 1 and value.shape[1] == width else value[first:last]

    return {name: cut(value) for name, value in batch.items()}
