"""TRL's supervised trainer on ready tokens: quiet, offline, resumable to the same bytes.

Covers TRL 1.16's `SFTTrainer` with its padding-free packing and fused loss; with weights or phases it is the one of
`weighted_trainer` or `phased_trainer`, for preferences and rewards see `alignment`. Import it late: TRL takes seconds
to load.
Checkpoints get a marker with the size and hash of every file, written last; a checkpoint without a true marker was torn
by a kill and is not resumed from.
"""

import contextlib
import gc
import json
import random
import shutil
import sys
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
)
from trl import SFTConfig, SFTTrainer

from workbench.files import write_atomic
from workbench.finetuning.callbacks import MARKER, Watch, contents
from workbench.finetuning.microbatch import is_out_of_memory, record_lengths, split
from workbench.finetuning.options import ShortOfMemory
from workbench.finetuning.packing import IGNORED, Example
from workbench.finetuning.watching import Live
from workbench.finetuning.weighting import columns
from workbench.interventions.adapter import quiet_peft


class QuietTrainer(SFTTrainer):
    """TRL's trainer without its usage ping and model cards; goes on in smaller micro-batches where memory runs out."""

    watch: Watch
    _total_train_tokens: int

    def _send_telemetry(self) -> None:
        """Nothing leaves this machine."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`training.json` says what was done; TRL's card would add links and badges."""

    def prepare(self, memory_file: Path) -> None:
        """Remember in `memory_file` how small micro-batches had to become, so that a resumed run starts with that."""
        self.memory_file = memory_file
        known = json.loads(memory_file.read_text(encoding="utf-8")) if memory_file.exists() else []
        self.shortages: list[dict[str, int]] = known
        self.parts = known[-1]["parts"] if known else 1
        self.step_inputs: list[dict[str, Any]] = []
        self.step_start: tuple[int, int, dict[str, list[float]], list[torch.Tensor]] | None = None

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; where memory runs out, the whole optimisation step again in micro-batches of half the size.

        The gradients of a step begun are dropped first: a backward pass that broke off has added some of its own.
        """
        if self.step_start is None or self.step_start[0] != self.state.global_step:
            metrics = {name: list(values) for name, values in self._metrics["train"].items()}
            self.step_start = (self.state.global_step, self._total_train_tokens, metrics, _random_states())
            self.step_inputs = []
        self.step_inputs.append(inputs)
        todo = [inputs]
        while True:
            short = None
            try:
                losses = [self._in_parts(model, one, num_items_in_batch) for one in todo]
                return losses[-1]  # the trainer has counted those of earlier micro-batches
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                short = f"{type(error).__name__}: {error}"
            self._halve(short)  # out here, where the error holds no more frames with their tensors
            todo = self.step_inputs
            model.zero_grad(set_to_none=True)
            _, self._total_train_tokens, metrics, random_states = self.step_start
            self._metrics["train"].clear()
            self._metrics["train"].update({name: list(values) for name, values in metrics.items()})
            torch.set_rng_state(random_states[0])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state_all(random_states[1:])

    def _in_parts(self, model: Any, inputs: dict[str, Any], items: Any) -> torch.Tensor:
        pieces = split(inputs, self.parts)
        if len(pieces) > 1 and items is None:  # no count of the step: then each micro-batch is a mean of its own
            items = inputs["labels"][..., 1:].ne(IGNORED).sum()
        losses = []
        for piece in pieces:
            self.lengths = record_lengths(piece)
            losses.append(super().training_step(model, dict(piece), items))
        return torch.stack(losses).sum()

    def _halve(self, short: str) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        step, lengths = self.state.global_step + 1, self.lengths
        if len(lengths) == 1:
            raise ShortOfMemory(
                f"Memory ran out in step {step} on a single record of {lengths[0]} tokens; it can't be split. Leave "
                f"out records this long with max_length={lengths[0] - 1} or less, keep fewer activations with "
                f"checkpointing=True, or load the base in 4 bits with quantization='nf4'. The library: {short[:200]}"
            )
        self.parts *= 2
        self.shortages.append({"step": step, "tokens": sum(lengths), "records": len(lengths), "parts": self.parts})
        write_atomic(self.memory_file, json.dumps(self.shortages))
        print(
            f"finetune: out of memory in step {step} on {sum(lengths)} tokens at once; micro-batches are split into "
            f"{self.parts} from here on, each step sees the same records"
        )


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; torn ones are named and removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)
    for checkpoint in found:
        marker = checkpoint / MARKER
        if marker.exists() and json.loads(marker.read_text(encoding="utf-8")) == contents(checkpoint):
            return checkpoint
        print(f"{checkpoint} is not complete (a kill tore it); going back to the one before.", file=sys.stderr)
        shutil.rmtree(checkpoint)
    return None


def _random_states() -> list[torch.Tensor]:
    """Of the processor and of each GPU: what dropout draws from."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]


def train(trainer: QuietTrainer, checkpoints: Path) -> tuple[bool, int]:
    """Train from the newest whole checkpoint to the end or to the pause; whether the end is reached, and from where."""
    resumed = last_checkpoint(checkpoints)
    step = int(resumed.name.split("-")[1]) if resumed else 0
    pause = trainer.watch.pause
    if pause is not None and step >= pause:
        return False, step
    trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    if trainer.watch.speed:
        trainer.watch.speed.finish()
        trainer.watch.speed.write()
    if isinstance(trainer.watch.show, Live):
        trainer.watch.show(trainer.watch.rows, over=True)
    if trainer.watch.cancelled and trainer.watch.attended:
        raise trainer.watch.attended.cancelled()
    return trainer.state.global_step >= trainer.state.max_steps, step


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
    packed_length: int | None, batch_size: int, accumulation: int,
    epochs: float, learning_rate: float, warmup: float,
    checkpointing: bool,
    save_steps: int,
    seed: int, shuffle: bool = True,
) -> QuietTrainer:  # fmt: skip
    """A trainer on ready tokens: rows packed to `packed_length` tokens, or padded batches of `batch_size`.

    adapter: PEFT's configuration of a new adapter; None where `model` has its trainable parameters already. shuffle:
    False takes the examples in their order, epoch after epoch.
    """
    device = model.device
    arguments = SFTConfig(
        output_dir=str(checkpoints), report_to="none", disable_tqdm=True, use_cpu=device.type == "cpu",
        bf16=device.type == "cuda" and model.dtype == torch.bfloat16, seed=seed, num_train_epochs=epochs,
        learning_rate=learning_rate, lr_scheduler_type="cosine", warmup_steps=warmup, max_grad_norm=1.0,
        per_device_train_batch_size=1 if packed_length else batch_size, gradient_checkpointing=checkpointing,
        gradient_accumulation_steps=accumulation,
        packing=packed_length is not None, packing_strategy="bfd", max_length=packed_length, shuffle_dataset=shuffle,
        train_sampling_strategy="random" if shuffle else "sequential",
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
    trainer.prepare(checkpoints / "memory.json")
    trainer.watch = Watch(trainer, checkpoints.parent / "losses.jsonl")
    trainer.add_callback(trainer.watch)
    return trainer
