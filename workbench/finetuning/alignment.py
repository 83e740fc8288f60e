"""TRL's trainers for preferences and rewards, on ready tokens, quiet and offline.

Beside `trainer`, all that talks to TRL. Covers TRL 1.16's `DPOTrainer`, `KTOTrainer` and `GRPOTrainer` on one device.
Tokens come from `packing.encode`, so that every method learns the same ones, and prompts are asked as `LM.generate`
asks them. Import it late: TRL takes seconds to load.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer

from workbench.files import write_atomic
from workbench.finetuning.callbacks import MARKER, Watch, contents

Tokens = dict[str, Any]  # prompt_ids, chosen_ids, rejected_ids; or prompt_ids, completion_ids, KL_completion_ids, label


class Quiet:
    """No usage ping, no model card, and data that is tokens already."""

    def _send_telemetry(self) -> None:
        """Nothing leaves this machine."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`training.json` says what was done; TRL's card would add links and badges."""

    def _prepare_dataset(self, dataset: datasets.Dataset, *args: Any, **kwargs: Any) -> datasets.Dataset:
        return dataset


class QuietDPO(Quiet, DPOTrainer):
    """Pairs as tokens."""


class QuietKTO(Quiet, KTOTrainer):
    """Single answers as tokens, each with the mismatched answer that the KL term is estimated from."""


class QuietGRPO(Quiet, GRPOTrainer):
    """Finished prompts, tokenized without adding anything."""

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return self.processing_class(prompts, add_special_tokens=False)["input_ids"], None, {}


class Curve(Watch):
    """`Watch` with a curve of its own names: `names` maps TRL's metric to the column of losses.jsonl."""

    def __init__(self, trainer: Any, curve: Path, stage: str, names: dict[str, str]) -> None:
        super().__init__(trainer, curve, stage)
        self.names = names

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A checkpoint counts once this marker is there."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        write_atomic(folder / MARKER, json.dumps(contents(folder)))
        write_points(self.curve, state, self.names)


def write_points(file: Path, state: TrainerState, names: dict[str, str]) -> list[dict[str, Any]]:
    """The curve so far, a JSON object a step: step, loss, learning_rate, grad_norm, and what `names` lists."""
    names = {name: name for name in ("step", "loss", "learning_rate", "grad_norm")} | names
    curve = [
        {column: entry[name] for name, column in names.items() if entry.get(name) is not None}
        for entry in state.log_history
        if "loss" in entry
    ]
    write_atomic(file, "".join(json.dumps(entry) + "\n" for entry in curve))
    return curve


def arguments(model: Any, checkpoints: Path, checkpointing: bool, recipe: Any) -> dict[str, Any]:
    """What all configurations have in common."""
    on_cpu = model.device.type == "cpu"
    return {
        "output_dir": str(checkpoints), "report_to": "none", "disable_tqdm": True, "use_cpu": on_cpu,
        "bf16": not on_cpu and model.dtype == torch.bfloat16, "seed": recipe.seed,
        "learning_rate": recipe.learning_rate, "warmup_steps": recipe.warmup, "max_grad_norm": 1.0, "logging_steps": 1,
        "gradient_checkpointing": checkpointing, "logging_nan_inf_filter": False, "save_strategy": "steps",
        "save_steps": recipe.save_steps, "save_total_limit": 2, "dataloader_pin_memory": not on_cpu,
        "disable_dropout": True, "beta": recipe.beta,
    }  # fmt: skip


def passes(recipe: Any) -> dict[str, Any]:
    """Passes over fixed data: how many, and how many rows each."""
    return {
        "per_device_train_batch_size": recipe.batch_size, "gradient_accumulation_steps": recipe.accumulation,
        "num_train_epochs": recipe.epochs, "lr_scheduler_type": "cosine", "max_length": None,
    }  # fmt: skip


def make_dpo(
    model: Any, tokenizer: Any, lora: Any, rows: Sequence[Tokens], common: dict[str, Any], losses: dict[str, float]
) -> QuietDPO:
    """Training on pairs; `losses` are TRL's loss types with their weights.

    The reference is a frozen copy of the adapter that `model` brings, or the base where `lora` makes a new one.
    """
    config = DPOConfig(**common, loss_type=list(losses), loss_weights=list(losses.values()))
    data = datasets.Dataset.from_list(list(rows))
    return QuietDPO(model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora)


def make_kto(model: Any, tokenizer: Any, lora: Any, rows: Sequence[Tokens], common: dict[str, Any]) -> QuietKTO:
    """Training on single answers, two for each pair of a batch, in the order given."""
    size = 2 * common["per_device_train_batch_size"]
    config = KTOConfig(**common | {"per_device_train_batch_size": size}, train_sampling_strategy="sequential")
    data = datasets.Dataset.from_list(list(rows))
    return QuietKTO(model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora)


def make_grpo(
    model: Any,
    tokenizer: Any,
    lora: Any,
    prompts: Sequence[str],
    common: dict[str, Any],
    recipe: Any,
    loss: tuple[str, str],
    score: Callable[..., list[float]],
) -> QuietGRPO:
    """Training on the model's own answers; `prompts` are asked in order, `loss` is TRL's loss type and its scaling."""
    config = GRPOConfig(
        **common, per_device_train_batch_size=recipe.batch_size, num_train_epochs=1, top_p=1.0, top_k=0,
        gradient_accumulation_steps=recipe.questions * recipe.answers // recipe.batch_size,
        num_generations=recipe.answers, max_completion_length=recipe.max_new_tokens, temperature=recipe.temperature,
        lr_scheduler_type="constant_with_warmup", loss_type=loss[0], scale_rewards=loss[1],
        top_entropy_quantile=recipe.top_entropy, shuffle_dataset=False,
    )  # fmt: skip
    data = datasets.Dataset.from_list([{"prompt": text, "number": number} for number, text in enumerate(prompts)])
    return QuietGRPO(
        model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora, reward_funcs=score
    )
