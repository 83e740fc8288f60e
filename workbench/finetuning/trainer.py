"""The one place that talks to TRL: a supervised trainer on ready tokens, quiet, offline, resumable to the same bytes.

Covers TRL 1.16's `SFTTrainer` with its padding-free packing and fused loss. Import it late: TRL takes seconds to load.
Checkpoints get a marker with the size and hash of every file, written last; a checkpoint without a true marker was torn
by a kill and is not resumed from.
"""

import contextlib
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from peft import PeftConfig
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from workbench.files import sha256, write_atomic
from workbench.finetuning.packing import Example
from workbench.finetuning.weighting import columns
from workbench.interventions.adapter import quiet_peft
from workbench.runs import heartbeat

MARKER = "complete.json"


class QuietTrainer(SFTTrainer):
    """TRL's trainer without its usage ping and model cards."""

    def _send_telemetry(self) -> None:
        """Nothing leaves this machine."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`training.json` says what was done; TRL's card would add links and badges."""

    def step_seconds(self) -> float:
        """Seconds of a forward and backward pass over the first batch, the faster of two; changes no weight."""
        self.model.train()
        size = min(self.args.per_device_train_batch_size, len(self.train_dataset))
        rows = [self.train_dataset[i] for i in range(size)]
        times = []
        with torch.random.fork_rng():
            for _ in range(2):
                begin = time.perf_counter()
                self.compute_loss(self.model, self._prepare_inputs(self.data_collator(rows))).backward()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
        self.model.zero_grad(set_to_none=True)
        self._metrics["train"].clear()
        self._total_train_tokens = 0
        return min(times)


class Watch(TrainerCallback):
    """Heartbeat, loss curve, completed-checkpoint markers; stops a run whose loss is no number."""

    def __init__(self, trainer: QuietTrainer, curve: Path) -> None:
        self.trainer, self.curve = trainer, curve

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """TRL restarts its token counter on resume; the log of the checkpoint knows better."""
        counts = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self.trainer._total_train_tokens = counts[-1] if counts else 0

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One line a step."""
        entry = state.log_history[-1]
        if "loss" not in entry:
            return
        if not math.isfinite(entry["loss"]):
            raise ValueError(
                f"The loss became {entry['loss']} at step {state.global_step}. Start again in a new folder with a "
                f"smaller learning_rate (it was {args.learning_rate:g})."
            )
        heartbeat("finetune", state.global_step, state.max_steps, loss=round(entry["loss"], 4))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A checkpoint counts once this marker is there."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        write_atomic(folder / MARKER, json.dumps(_contents(folder)))
        write_curve(self.curve, state)


def _contents(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MARKER)
    return {file.relative_to(folder).as_posix(): sha256(file) for file in files}


def write_curve(file: Path, state: TrainerState) -> list[dict[str, float]]:
    """The loss curve so far, a JSON object a step: step, epoch, loss, learning_rate, grad_norm, tokens seen."""
    names = {"num_tokens": "tokens", "mean_token_accuracy": "token_accuracy"}
    wanted = ("step", "epoch", "loss", "learning_rate", "grad_norm", *names)
    curve = [
        {names.get(name, name): entry[name] for name in wanted if name in entry}
        for entry in state.log_history
        if "loss" in entry
    ]
    write_atomic(file, "".join(json.dumps(entry) + "\n" for entry in curve))
    return curve


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; torn ones are named and removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for checkpoint in found:
        marker = checkpoint / MARKER
        if marker.exists() and json.loads(marker.read_text(encoding="utf-8")) == _contents(checkpoint):
            return checkpoint
        print(f"{checkpoint} is not complete (a kill tore it); going back to the one before.", file=sys.stderr)
        shutil.rmtree(checkpoint)
    return None


@contextlib.contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Seeding inside the block leaves the caller's torch, NumPy and Python generators as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars for work of milliseconds, and no warning about names that TRL and PEFT have yet to change."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with quiet_peft():
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _kind(names: Sequence[str]) -> type[QuietTrainer]:
    """TRL's own trainer wherever it can do the work."""
    if "phase" in names:
        from workbench.finetuning.phased_trainer import PhasedTrainer

        return PhasedTrainer
    if "weights" in names:
        from workbench.finetuning.weighted_trainer import WeightedTrainer

        return WeightedTrainer
    return QuietTrainer


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    adapter: PeftConfig | None,
    *,
    checkpoints: Path,
    packed_length: int | None,
    batch_size: int,
    accumulation: int,
    epochs: float,
    learning_rate: float,
    warmup: float,
    checkpointing: bool,
    save_steps: int,
    seed: int,
) -> QuietTrainer:
    """A trainer on ready tokens: rows packed to `packed_length` tokens, or padded batches of `batch_size`.

    adapter: PEFT's configuration of a new adapter; None where `model` has its trainable parameters already.
    """
    device = model.device
    arguments = SFTConfig(
        output_dir=str(checkpoints), report_to="none", disable_tqdm=True, use_cpu=device.type == "cpu",
        bf16=device.type == "cuda" and model.dtype == torch.bfloat16, seed=seed, num_train_epochs=epochs,
        learning_rate=learning_rate, lr_scheduler_type="cosine", warmup_steps=warmup, max_grad_norm=1.0,
        per_device_train_batch_size=1 if packed_length else batch_size, gradient_checkpointing=checkpointing,
        gradient_accumulation_steps=accumulation,
        packing=packed_length is not None, packing_strategy="bfd", max_length=packed_length, shuffle_dataset=True,
        logging_steps=1, logging_nan_inf_filter=False, save_strategy="steps", save_steps=save_steps,
        save_total_limit=2, dataloader_pin_memory=device.type == "cuda",
    )  # fmt: skip
    dataset = datasets.Dataset.from_list(columns(examples))
    trainer = _kind(dataset.column_names)(
        model, arguments, train_dataset=dataset, processing_class=tokenizer, peft_config=adapter
    )
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL makes adapters of 4-bit models bfloat16, too coarse for small steps of Adam
            parameter.data = parameter.data.float()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch(trainer, checkpoints.parent / "losses.jsonl"))
    return trainer
