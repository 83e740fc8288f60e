"""What training an adapter by preferences and by rewards share: where it starts, its curve, its folder.

A new LoRA adapter, or a copy of a finished one, is trained on a base that is loaded again; what differs between the
methods is the trainer (`alignment`). The promises are those of `finetune`: a finished folder is returned as it is, a
killed run goes on from its last whole checkpoint and ends in the same bytes on a CPU, the caller's model stays as it
was. Not covered: several GPUs, full-weight training.
"""

import copy
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.files import sha256, write_atomic
from workbench.finetuning.base import load_base, process_peak
from workbench.finetuning.folders import ADAPTER_FILES, finished
from workbench.finetuning.recipe import rate_for
from workbench.interventions.adapter import Adapter
from workbench.synthesis.records import claim_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

    from workbench.finetuning.memory import Plan
    from workbench.models import LM

    Make = Callable[[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, Any, Path, bool], Trainer]


@dataclass(frozen=True)
class Shape:
    """The adapter's own settings; `start` is the hash of the adapter that it begins as a copy of, if any."""

    rank: int
    alpha: float
    targets: str | list[str]
    start: str | None


@dataclass(frozen=True)
class Job:
    """One training run: `recipe` is all that its result depends on besides base, data and shape."""

    name: str
    shape: Shape
    start: Adapter | None
    data: str
    recipe: Any
    quantization: str
    tokens: int
    names: dict[str, str]


def shape_of(
    start: Adapter | None, rank: int | None, alpha: float | None, targets: str | list[str] | None, lm: "LM"
) -> Shape:
    """Rank, alpha and targets: as asked for, or those of the adapter to start from.

    Raises ValueError when both are given, and for a start that is scaled or no plain LoRA adapter.
    """
    if start is None:
        if rank is not None and rank < 1:
            raise ValueError(f"rank={rank} is too small: give 1 or more.")
        size = rank or 16
        return Shape(size, 2 * size if alpha is None else alpha, targets or "all-linear", None)
    given = {"rank": rank, "alpha": alpha, "targets": targets}
    wrong = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    if wrong:
        raise ValueError(
            f"{wrong} was given together with start={str(start.path)!r}, which brings its own. Leave it out, or start "
            "from the base (start=None)."
        )
    if start.strength != 1.0:
        raise ValueError(
            f"start has strength {start.strength}; training goes on from the adapter as it was saved. Pass "
            f"Adapter({str(start.path)!r})."
        )
    start.check(lm)
    config = json.loads((start.path / "adapter_config.json").read_text(encoding="utf-8"))
    modules = config["target_modules"]
    targets = modules if isinstance(modules, str) else sorted(modules)
    return Shape(config["r"], config["lora_alpha"], targets, sha256(start.path / ADAPTER_FILES[0]))


def gentle_rate(lm: "LM", given: float | None) -> tuple[float, str]:
    """The learning rate and why: a tenth of that of supervised training, because these losses have no floor."""
    if given is not None:
        return given, f"{given:g}: asked for"
    rate, reason = rate_for(lm, None)
    return rate / 10, f"{rate / 10:g}: a tenth of supervised training's ({reason})"


def train_adapter(lm: "LM", job: Job, out: Path, make: "Make", told: dict[str, str], about: dict[str, Any]) -> Adapter:
    """Train what `make` returns and write adapter, losses.jsonl and, last, training.json; or return the finished one.

    told: lines to print and to keep as reasons. about: counts of the data, for training.json.
    """
    settings = {"base": {"name": lm.name, "revision": lm.revision}, "made_by": job.name, "data": job.data}
    settings |= asdict(job.shape) | asdict(job.recipe)
    settings.pop("save_steps")  # how often the run is saved does not change where it ends
    settings = json.loads(json.dumps(settings | {"quantization": job.quantization}))
    if finished(out, settings):
        return Adapter(out)

    from workbench.finetuning.memory import plan

    planned = plan(lm.model, job.shape.rank, job.shape.targets, job.tokens, job.quantization)
    claim_folder(out, settings, job.name)
    reasons = told | planned.reasons
    for name, text in reasons.items():
        print(f"{job.name}: {name}: {text}")
    report = {"settings": settings, "base": settings["base"], "parameters": asdict(job.recipe), "data": about}
    report |= _train(lm, job, planned, out, make)
    report["reasons"] = lm.reasons | reasons
    report["files"] = {name: sha256(out / name) for name in (*ADAPTER_FILES, "losses.jsonl")}
    write_atomic(out / "training.json", json.dumps(report, indent=2))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return Adapter(out)


def _train(lm: "LM", job: Job, planned: "Plan", out: Path, make: "Make") -> dict[str, Any]:
    from transformers import PrinterCallback

    from workbench.finetuning import alignment
    from workbench.finetuning import trainer as training

    with training.own_random_state(lm.device), training.quiet_libraries():
        model, lora = _policy(lm, job, planned)
        exact = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        # a copy of the tokenizer, because TRL sets its padding token
        trainer = make(model, copy.deepcopy(lm.tokenizer), lora, out / "checkpoints", planned.checkpointing)
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:  # TRL rounds adapters of 4-bit models to bfloat16, the start's values too
                parameter.data = exact[name] if name in exact else parameter.data.float()
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(alignment.Curve(trainer, out / "losses.jsonl", job.names))
        begin = time.perf_counter()
        resumed = training.last_checkpoint(out / "checkpoints")
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    seconds = time.perf_counter() - begin
    _save(trainer, out)
    curve = alignment.write_points(out / "losses.jsonl", trainer.state, job.names)
    return {
        "steps": trainer.state.global_step, "tokens": curve[-1]["tokens"], "seconds": seconds,
        "resumed_from_step": int(resumed.name.split("-")[1]) if resumed else 0, "peak_memory": process_peak(),
        "adapter_parameters": planned.adapter_parameters, "quantization": planned.quantization or "none",
        "first": curve[0], "last": curve[-1],
    }  # fmt: skip


def _policy(lm: "LM", job: Job, planned: "Plan") -> tuple[Any, Any]:
    """The base, with the adapter to start from or with the settings of a new one."""
    from peft import LoraConfig, PeftModel

    model: Any = load_base(lm, planned)
    if job.start is not None:
        return PeftModel.from_pretrained(model, str(job.start.path), is_trainable=True), None
    shape = job.shape
    return model, LoraConfig(
        r=shape.rank, lora_alpha=shape.alpha, bias="none", task_type="CAUSAL_LM", target_modules=shape.targets
    )


def _save(trainer: "Trainer", out: Path) -> None:
    """The trained adapter's two files, each renamed into place whole; the frozen reference is left behind."""
    part = out / ".adapter"
    trainer.model.save_pretrained(part, save_embedding_layers=False, selected_adapters=["default"])
    for name in ADAPTER_FILES:
        os.replace(part / name, out / name)
    shutil.rmtree(part)
