"""Fine-tune a small adapter on checked records: QLoRA (arXiv 2305.14314) through TRL and PEFT, on a CPU or one GPU.

The base is loaded again for training, so the model that the caller holds stays bit for bit what it was. Only the last
assistant answer of a record is learnt (see `packing`). A killed run goes on from its last whole checkpoint and, on a
CPU, ends in the same adapter bytes; a finished folder is returned as it is. Not covered: several GPUs, full-weight
training, preference data.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.files import content_key, sha256, write_atomic
from workbench.finetuning.options import Watching, held_out_records
from workbench.interventions.adapter import Adapter
from workbench.synthesis.records import Data, Record, RecordError, check_record, claim_folder, load_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.finetuning.memory import Plan
    from workbench.finetuning.packing import Example
    from workbench.finetuning.trainer import QuietTrainer
    from workbench.models import LM
    from workbench.tasks import Task

FILES = ("adapter_model.safetensors", "adapter_config.json")


@dataclass(frozen=True)
class Recipe:
    """Everything, besides base and records, that the adapter depends on."""

    rank: int
    alpha: int
    targets: str | list[str]
    epochs: float
    learning_rate: float
    batch_tokens: int
    batch_size: int
    max_length: int
    quantization: str
    packing: bool
    dropout: float
    warmup: float
    seed: int
    save_steps: int
    checkpointing: bool | None = None


def finetune(
    lm: "LM",
    data: Data | str | Path | list[Record],
    out: str | Path,
    *,
    rank: int = 16,
    alpha: int | None = None,
    targets: str | list[str] = "all-linear",
    epochs: float = 2,
    learning_rate: float | None = None,
    batch_tokens: int = 2048,
    batch_size: int = 16,
    max_length: int | None = None,
    quantization: Literal["auto", "nf4", "none"] = "auto",
    packing: bool = True,
    dropout: float = 0.0,
    warmup: float = 0.05,
    seed: int = 0,
    save_steps: int = 25,
    checkpointing: bool | None = None,
    held_out: Data | str | Path | list[Record] | None = None,
    task: "Task | None" = None,
    watch: "Callable[[list[dict[str, float]]], None] | None" = None,
    memory: int | None = None,
    until: float = 1.0,
) -> Adapter:
    """Train a LoRA adapter on the kept records of `data` and write it to the folder `out`; returns the adapter.

    A step sees packed rows of about `batch_tokens` tokens in all; with `packing=False`, `batch_size` padded records.
    `alpha` is twice the rank unless given; `learning_rate` follows the model's size (printed). Records longer than
    `max_length` tokens (default: the model's context) are left out and counted, never cut. `quantization="auto"` picks
    4 bits only where the memory estimate says so. `out` receives adapter_model.safetensors, adapter_config.json,
    losses.jsonl and, last, training.json with parameters, tokens, seconds, peak memory and the estimates.

    `checkpointing` (recompute activations instead of keeping them) is chosen by the memory estimate unless given.
    `held_out` records, none of which may be trained on, are scored at every checkpoint, and so are `task`'s tuning
    questions; both go to losses.jsonl. `watch` is called after each step with one row a step (step, loss, grad_norm,
    learning_rate, tokens_per_second, mfu, ...); in a notebook the loss curve is drawn live unless one is given.
    `memory`: bytes that may be used (what is free unless given); a run that needs more is refused, with the nearest
    settings that fit. Where memory runs out while training, micro-batches are split and the run goes on. `until`: a
    share of the steps after which to pause, with an adapter as it is then; the same call without it goes on from there.

    Raises `RecordError` for records that can't be trained on and `ValueError` for contradictory settings.
    """
    records, where = _records(data)
    rate, rate_reason = _learning_rate(lm, learning_rate)
    context = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or batch_tokens
    recipe = Recipe(
        rank, 2 * rank if alpha is None else alpha, targets, epochs, rate, batch_tokens, batch_size,
        min(max_length or context, context), quantization, packing, dropout, warmup, seed, save_steps, checkpointing,
    )  # fmt: skip
    _check(recipe, until)
    scored = None if held_out is None else held_out_records(*_records(held_out), records)
    watching = Watching(scored, task, watch, memory, until)
    return _run(lm, records, where, recipe, Path(out), rate_reason, watching)


def _run(
    lm: "LM", records: list[Record], where: str, recipe: Recipe, out: Path, rate_reason: str, watching: Watching
) -> Adapter:
    base = {"name": lm.name, "revision": lm.revision}
    learnt = content_key(messages=[record["messages"] for record in records])
    settings: dict[str, Any] = {"base": base, "records": learnt, **asdict(recipe)}
    settings.pop("save_steps")  # how often the run is saved does not change where it ends
    settings.pop("checkpointing")
    if watching.held_out:
        settings["held_out"] = content_key(messages=[record["messages"] for record in watching.held_out])
    if watching.task:
        settings["task"] = watching.task.name
    if _finished(out, settings):
        return Adapter(out)

    from workbench.finetuning.fitting import fit
    from workbench.finetuning.packing import IGNORED, encode_all

    examples, dropped = encode_all(lm, records, where, recipe.max_length)
    lengths = [len(example.input_ids) for example in examples]
    planned, row = fit(lm, recipe, lengths, watching.memory)
    claim_folder(out, settings, "finetune")
    _say(f"learning rate: {rate_reason}", *(f"{name}: {text}" for name, text in planned.reasons.items()))
    learnt_tokens = sum(label != IGNORED for example in examples for label in example.labels)
    used = {"used": len(examples), "left_out": dropped, "learnt_tokens": learnt_tokens}
    report = {"settings": settings, "base": base, "parameters": asdict(recipe), "records": used}
    done = _train(lm, examples, recipe, planned, row, out, watching)
    if done is None:
        return Adapter(out)  # paused
    report |= done
    report["files"] = {name: sha256(out / name) for name in (*FILES, "losses.jsonl")}
    write_atomic(out / "training.json", json.dumps(report, indent=2))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return Adapter(out)


def _train(
    lm: "LM", examples: "list[Example]", recipe: Recipe, planned: "Plan", row: int, out: Path, watching: Watching
) -> dict[str, Any] | None:
    """Load the base again, train, save; what happened, for training.json, or None where the run was paused."""
    from peft import LoraConfig

    from workbench.finetuning import trainer as training
    from workbench.finetuning.memory import growth
    from workbench.finetuning.preparing import set_up

    lora = LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, bias="none", task_type="CAUSAL_LM",
        target_modules=recipe.targets,
    )  # fmt: skip
    with training.own_random_state(lm.device), training.quiet_libraries(), growth(lm.device) as grown:
        model = _base(lm, planned)
        packed, packing_reason = _packing(model, examples, recipe.packing)
        trainer = training.make_trainer(
            model, lm.tokenizer, examples, lora, checkpoints=out / "checkpoints",
            packed_length=row if packed else None, batch_size=recipe.batch_size,
            accumulation=max(1, recipe.batch_tokens // row) if packed else 1, epochs=recipe.epochs,
            learning_rate=recipe.learning_rate, warmup=recipe.warmup, checkpointing=planned.checkpointing,
            save_steps=recipe.save_steps, seed=recipe.seed,
        )  # fmt: skip
        estimate = set_up(lm, trainer, planned, recipe.max_length, row, out, watching)
        _say(f"packing: {packing_reason}", estimate["text"])
        finished, resumed = training.train(trainer, out / "checkpoints")
        measured = grown()
    if not finished:
        _pause(out, training.last_checkpoint(out / "checkpoints"), estimate["steps"])
        return None
    _save(trainer, out)
    curve = training.write_curve(out / "losses.jsonl", trainer.state)
    speed = trainer.watch.speed.summary() if trainer.watch.speed else {}
    return {
        "reasons": {**lm.reasons, **planned.reasons, "packing": packing_reason}, "estimate": estimate,
        "measured": {"bytes": measured, "seconds": speed["seconds"] + speed["aside"]},
        "steps": trainer.state.global_step, "tokens": curve[-1]["tokens"], "seconds": speed["seconds"], "speed": speed,
        "resumed_from_step": resumed, "peak_memory": _peak_memory(), "out_of_memory": trainer.shortages,
        "adapter_parameters": planned.adapter_parameters, "quantization": planned.quantization or "none",
        "loss": {"first": curve[0]["loss"], "last": curve[-1]["loss"]},
    }  # fmt: skip


def _base(lm: "LM", planned: "Plan") -> "PreTrainedModel":
    """The weights that the caller's model came from, loaded again, in 4 bits where planned."""
    import torch

    from workbench.models import load_model

    from_hub = not Path(str(lm.model.config._name_or_path)).is_dir()
    base = load_model(
        lm.name, dtype=lm.model.dtype, quantization=planned.quantization, device=lm.device,
        revision=lm.revision if from_hub else None,
    )  # fmt: skip
    if base.revision != lm.revision:
        raise ValueError(
            f"{lm.name} on disk is now revision {base.revision}, but the loaded model is {lm.revision}. "
            f"Load it again with load_model({lm.name!r}) and start in a new folder."
        )
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return base.model


def _packing(model: "PreTrainedModel", examples: "list[Example]", wanted: bool) -> tuple[bool, str]:
    """Whether to pack, and why: only where one packed record provably can't see another."""
    from workbench.finetuning.packing import leak

    if not wanted:
        return False, "off: asked for"
    seen = leak(model, examples)
    if seen:
        return False, f"off: this model lets packed records see each other (logits differ by {seen:.2g})"
    return True, "on: packed records can't see each other (logits differ by 0)"


def _pause(out: Path, checkpoint: Path | None, steps: int) -> None:
    """The adapter as it is at the last checkpoint; training.json is left to the end."""
    assert checkpoint is not None  # a pause saves one
    for name in FILES:
        write_atomic(out / name, (checkpoint / name).read_bytes())
    _say(f"paused after step {checkpoint.name.split('-')[1]} of {steps}; the same call without until= goes on")


def _save(trainer: "QuietTrainer", out: Path) -> None:
    """The adapter's two files, each renamed into place whole."""
    part = out / ".adapter"
    trainer.model.save_pretrained(part, save_embedding_layers=False)
    for name in FILES:
        os.replace(part / name, out / name)
    shutil.rmtree(part)


def _records(data: Data | str | Path | list[Record]) -> tuple[list[Record], str]:
    if isinstance(data, list):
        kept = [check_record(record, f"record {number}") for number, record in enumerate(data, start=1)]
        kept, where = [record for record in kept if record.get("kept", True)], "the given list"
        total = len(data)
    else:
        data = data if isinstance(data, Data) else load_data(data)
        kept, where, total = data.kept, str(data.folder), len(data)
    if not kept:
        raise RecordError(
            f"{where} holds no record to train on ({total} records, 0 kept). Look at the reasons in card.md; ask more "
            "questions (n=), allow more samples, or choose a strategy that the model gets right."
        )
    return kept, where


def _learning_rate(lm: "LM", given: float | None) -> tuple[float, str]:
    """LoRA bears about ten times the rate of full fine-tuning, and small models more than large ones."""
    if given is not None:
        return given, f"{given:g}: asked for"
    size = lm.model.num_parameters()
    for limit, rate in ((50e6, 2e-3), (1e9, 5e-4)):
        if size < limit:
            return rate, f"{rate:g}: {size / 1e6:.3g}M parameters, fewer than {limit / 1e6:g}M"
    return 2e-4, f"0.0002: {size / 1e9:.2g}B parameters, QLoRA's rate for models of this size"


def _check(recipe: Recipe, until: float) -> None:
    least = {"rank": 1, "alpha": 1, "batch_tokens": 1, "batch_size": 1, "max_length": 2, "save_steps": 1}
    for name, limit in least.items():
        if getattr(recipe, name) < limit:
            raise ValueError(f"{name}={getattr(recipe, name)} is too small: give {limit} or more.")
    if recipe.epochs <= 0 or recipe.learning_rate <= 0:
        raise ValueError(f"epochs={recipe.epochs} and learning_rate={recipe.learning_rate} must both be above 0.")
    if not 0 < until <= 1:
        raise ValueError(f"until={until} is a share of the steps: give a number above 0, up to 1.")
    if not 0 <= recipe.dropout < 1 or not 0 <= recipe.warmup < 1:
        raise ValueError(f"dropout={recipe.dropout} and warmup={recipe.warmup} are shares: give numbers from 0 to 1.")


def _finished(out: Path, settings: dict[str, Any]) -> bool:
    """True when training.json, written last, describes these settings and these files."""
    file = out / "training.json"
    if not file.exists():
        return False
    report = json.loads(file.read_text(encoding="utf-8"))
    whole = all((out / name).exists() and sha256(out / name) == digest for name, digest in report["files"].items())
    return whole and report["settings"] == json.loads(json.dumps(settings))


def _peak_memory() -> dict[str, int | str]:
    import resource

    import torch

    if torch.cuda.is_available():
        return {"bytes": torch.cuda.max_memory_allocated(), "of": "GPU memory allocated by torch during training"}
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, kibibytes on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"bytes": peak, "of": "memory of the whole process since it started"}


def _say(*lines: str) -> None:
    for line in lines:
        print(f"finetune: {line}")
