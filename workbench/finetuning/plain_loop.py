"""What the trainer does, as a loop to read in one sitting: LoRA on packed rows in plain PyTorch, without TRL.

A reference to read and to compare with, not the way to train: no 4-bit weights, no checkpoints, no mixed precision, no
heartbeat. With the same examples, seed and settings it goes through the same rows in the same order as
`trainer.make_trainer` and ends in the same adapter, up to rounding. LoRA (arXiv 2106.09685) comes from PEFT; packing is
best-fit decreasing (arXiv 2404.10830); AdamW (arXiv 1711.05101) without decay; cosine schedule (arXiv 1608.03983).
"""

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from workbench.finetuning.packing import IGNORED, Example

Row = list[Example]
AT_ONCE = 1000  # records that TRL packs together; rows never mix two such groups


@dataclass(frozen=True)
class Trained:
    """The model with its adapter, and of every step the loss (a mean over learnt tokens), rate and gradient norm."""

    model: nn.Module
    losses: list[float]
    rates: list[float]
    norms: list[float]


def train(
    model: PreTrainedModel, examples: Sequence[Example], *, row: int, accumulation: int = 1, epochs: int = 2,
    learning_rate: float = 2e-3, warmup: float = 0.05, rank: int = 16, alpha: int = 32,
    targets: str | list[str] = "all-linear", seed: int = 0,
) -> Trained:  # fmt: skip
    """Train a LoRA adapter on `examples`, packed into rows of at most `row` tokens, `accumulation` rows a step.

    `warmup` is the share of all steps in which the learning rate rises from 0; it then falls as half a cosine. Changes
    `model` in place (PEFT wraps its layers) and seeds torch. Raises ValueError when a record is longer than `row`.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)  # LoRA's A is random, B is zero
    lora = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, bias="none", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, lora).train()
    weights = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    rows = pack(examples, row, seed)
    steps = epochs * math.ceil(len(rows) / accumulation)
    losses: list[float] = []
    rates: list[float] = []
    norms: list[float] = []
    for epoch in range(epochs):
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed + epoch)).tolist()
        for begin in range(0, len(rows), accumulation):
            batch = [rows[place] for place in order[begin : begin + accumulation]]
            learnt = sum(label != IGNORED for one in batch for example in one for label in example.labels[1:])
            loss = 0.0
            for one in batch:
                part = summed_loss(tuned, one) / learnt  # over all rows of the step: a row with few tokens counts less
                part.backward()
                loss += float(part.detach())
            norms.append(float(nn.utils.clip_grad_norm_(weights, 1.0)))
            rates.append(learning_rate * schedule(len(losses), steps, math.ceil(warmup * steps)))
            optimizer.param_groups[0]["lr"] = rates[-1]
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss)
    return Trained(tuned, losses, rates, norms)


def pack(examples: Sequence[Example], length: int, seed: int) -> list[Row]:
    """Rows of at most `length` tokens, in random order: each record, longest first, goes where it leaves least room.

    >>> rows = pack([Example([1] * n, [1] * n) for n in (3, 5, 2, 4)], length=7, seed=0)
    >>> sorted(sorted(len(example.input_ids) for example in row) for row in rows)
    [[2, 5], [3, 4]]
    """
    longest = max(len(example.input_ids) for example in examples)
    if longest > length:
        raise ValueError(f"A record has {longest} tokens, more than row={length}. Give row={longest} or leave it out.")
    shuffled = [examples[place] for place in permutation(len(examples), seed)]
    rows: list[Row] = []
    for begin in range(0, len(shuffled), AT_ONCE):
        rows += _best_fit(shuffled[begin : begin + AT_ONCE], length)
    return [rows[place] for place in permutation(len(rows), seed)]


def _best_fit(examples: Sequence[Example], length: int) -> list[Row]:
    rows: list[Row] = []
    free: list[tuple[int, int, int]] = []  # room left, when the row got it (first come first filled), number of the row
    for turn, example in enumerate(sorted(examples, key=lambda each: -len(each.input_ids))):
        size = len(example.input_ids)
        place = bisect_left(free, (size, -1, -1))
        room, _, number = free.pop(place) if place < len(free) else (length, turn, len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append(example)
        insort(free, (room - size, turn, number))
    return rows


def permutation(count: int, seed: int) -> list[int]:
    """The order that `datasets.Dataset.shuffle(seed)` gives."""
    return np.random.default_rng(seed).permutation(count).tolist()


def summed_loss(model: nn.Module, row: Row) -> Tensor:
    """Cross-entropy summed over the learnt tokens of a packed row.

    Positions restart with every record and no attention mask is given: transformers then keeps the records apart. Each
    token is learnt from the one before it, so the first of a record has none.
    """
    device = next(model.parameters()).device
    ids = torch.tensor([[token for example in row for token in example.input_ids]], device=device)
    positions = torch.tensor([[place for example in row for place in range(len(example.input_ids))]], device=device)
    labels = torch.tensor([label for example in row for label in [IGNORED, *example.labels[1:]]], device=device)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    return nn.functional.cross_entropy(logits[:-1].float(), labels[1:], ignore_index=IGNORED, reduction="sum")


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the full learning rate at `step`: a straight line up over `warmup` steps, then half a cosine down.

    >>> [round(schedule(step, 6, 2), 3) for step in range(6)]
    [0.0, 0.5, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))
