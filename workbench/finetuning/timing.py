"""Seconds that a fine-tune will take, from parts measured on this machine with the real model and records.

Measured: a forward and backward pass over the first batch, an optimizer step on tensors of the adapter's shapes, and
writing a checkpoint's bytes. Not covered: answering a task's questions at checkpoints, whose length is not known.
"""

import hashlib
import math
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from workbench.finetuning.memory import trim
from workbench.finetuning.trainer import QuietTrainer
from workbench.finetuning.watching import seconds_of

FORWARD = 0.4  # of a forward and backward pass with a frozen base: 2N of 4N FLOPs, less what is kept for the backward


@dataclass(frozen=True)
class Times:
    """Seconds of the parts, their numbers, and the sum."""

    pass_seconds: float
    pass_tokens: int
    tokens: int
    optimizer_seconds: float
    steps: int
    save_seconds: float
    saves: int
    scoring_seconds: float
    seconds: float


def estimate(trainer: QuietTrainer, held_out_tokens: int = 0) -> Times:
    """Time the parts on `trainer`'s model and first batch; `held_out_tokens` are scored at every save.

    A pass costs time by its tokens, padding included, so batches that are shorter than the first one count for less.
    """
    arguments = trainer.args
    pass_seconds, pass_tokens = first_pass(trainer)
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    tokens = round(_padded_tokens(lengths, arguments.per_device_train_batch_size) * arguments.num_train_epochs)
    passes = -(-len(lengths) // arguments.per_device_train_batch_size)
    steps = math.ceil(-(-passes // arguments.gradient_accumulation_steps) * arguments.num_train_epochs)
    weights = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    optimizer, save = optimizer_step(weights), checkpoint(sum(weight.nbytes for weight in weights))
    saves = -(-steps // int(arguments.save_steps))
    each = pass_seconds / pass_tokens
    scoring = saves * FORWARD * each * held_out_tokens
    total = each * tokens + steps * optimizer + saves * save + scoring
    return Times(pass_seconds, pass_tokens, tokens, optimizer, steps, save, saves, scoring, total)


def first_pass(trainer: QuietTrainer) -> tuple[float, int]:
    """Seconds of a forward and backward pass over the first batch, the faster of two, and its tokens with padding.

    Changes no weight, no counter and no random state.
    """
    size = min(trainer.args.per_device_train_batch_size, len(trainer.train_dataset))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(size)])
    items = batch["labels"][..., 1:].ne(-100).sum().to(trainer.args.device)
    device = trainer.args.device
    if trainer.args.activation_checkpointing:  # the trainer does this only when it starts
        options = dict(trainer.args.activation_checkpointing_kwargs or {}) or None
        trainer.model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        times = [seconds_of(lambda: trainer.training_step(trainer.model, dict(batch), items), device) for _ in range(2)]
    trainer.model.zero_grad(set_to_none=True)
    trainer._metrics["train"].clear()
    trainer._total_train_tokens, trainer.step_start = 0, None
    trim()
    return min(times), batch["input_ids"].numel()


def optimizer_step(weights: Sequence[torch.Tensor]) -> float:
    """Seconds of clipping and AdamW on tensors of these shapes, the second step of two: the first makes its moments."""
    copies = [torch.nn.Parameter(torch.zeros_like(weight)) for weight in weights]
    optimizer = torch.optim.AdamW(copies, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(copies, 1.0)
        optimizer.step()

    for copy in copies:
        copy.grad = torch.full_like(copy, 1e-3)
    step()
    return seconds_of(step, copies[0].device)


def checkpoint(adapter_bytes: int) -> float:
    """Seconds to write and hash as many bytes as a checkpoint has: the adapter and two moments of each number."""
    data = os.urandom(min(adapter_bytes, 2**26))
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        for number in range(3):
            file = Path(folder) / str(number)
            file.write_bytes(data)
            hashlib.sha256(file.read_bytes()).digest()
        return (time.perf_counter() - begin) * adapter_bytes / max(1, len(data))


def _padded_tokens(lengths: list[int], size: int) -> int:
    """Tokens of an epoch in batches of `size` rows, each padded to its longest, in one shuffled order."""
    order = random.Random(0).sample(lengths, len(lengths))
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return sum(max(batch) * len(batch) for batch in batches)
