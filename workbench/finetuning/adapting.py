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
from workbench.finetuning.folders import ADAPTER_FILES, finished, goes_on, note_begun
from workbench.finetuning.methods import start_settings
from workbench.finetuning.recipe import check_least, rate_for
from workbench.finetuning.stopping import Attended, attended, listening
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
class Begin:
    """Where training begins and ends, and how fast it goes, with the reason."""

    lm: "LM"
    out: Path
    start: Adapter | None
    shape: Shape
    quantization: str
    learning_rate: float
    rate_reason: str

    @property
    def reference(self) -> str:
        """What the trained adapter is held against, in words."""
        return "the base" if self.start is None else f"the adapter {self.start.path}, frozen"


@dataclass(frozen=True)
class Job:
    """What is learnt: `data` is its key, `recipe` all else that the result depends on besides base and shape.

    tokens: run at once. names: TRL's metric -> the column of losses.jsonl. told: lines to print and to keep as reasons.
    about: counts of the data, for training.json.
    """

    name: str
    data: str
    recipe: Any
    tokens: int
    names: dict[str, str]
    told: dict[str, str]
    about: dict[str, Any]


def settle(
    lm: "LM", out: str | Path, start: Adapter | None, *, rank: int | None, alpha: float | None,
    targets: str | list[str] | None, quantization: str, learning_rate: float | None,
) -> Begin:  # fmt: skip
    """What is asked for with the defaults filled in: shape as `shape_of`, rate as `gentle_rate` say."""
    shape = shape_of(start, rank, alpha, targets, lm)
    return Begin(lm, Path(out), start, shape, quantization, *gentle_rate(lm, learning_rate))


def shape_of(
    start: Adapter | None, rank: int | None, alpha: float | None, targets: str | list[str] | None, lm: "LM"
) -> Shape:
    """Rank, alpha and targets: as asked for, or those of the adapter to start from.

    Raises ValueError when both are given, and for a start that is scaled or of virtual tokens.
    """
    if start is None:
        size = 16 if rank is None else rank
        shape = Shape(size, 2 * size if alpha is None else alpha, targets or "all-linear", None)
        check_least(shape, rank=1)
        check_above(shape, "alpha")
        return shape
    given = {"rank": rank, "alpha": alpha, "targets": targets}
    wrong = ", ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
    if wrong:
        raise ValueError(
            f"{wrong} was given together with start={str(start.path)!r}, which brings its own. Leave it out, or start "
            "from the base (start=None)."
        )
    if start.virtual:
        raise ValueError(
            f"start={str(start.path)!r} puts {start.virtual} virtual tokens before the text; preferences and rewards "
            "train LoRA adapters. Start from one of those (finetune with method='lora'), or from the base."
        )
    config = start_settings(lm, start)
    return Shape(config["r"], config["lora_alpha"], config["target_modules"], sha256(start.path / ADAPTER_FILES[0]))


def gentle_rate(lm: "LM", given: float | None) -> tuple[float, str]:
    """The learning rate and why: a tenth of that of supervised training, because these losses have no floor."""
    if given is not None:
        return given, f"{given:g}: asked for"
    rate, reason = rate_for(lm, None)
    return rate / 10, f"{rate / 10:g}: a tenth of supervised training's ({reason})"


def check_above(values: Any, *names: str) -> None:
    """Raise ValueError for a number of `values` that is not above 0."""
    for name in names:
        if not getattr(values, name) > 0:
            raise ValueError(f"{name}={getattr(values, name)} must be above 0.")


def train_adapter(begin: Begin, job: Job, make: "Make") -> Adapter:
    """Train what `make` returns; write adapter, losses.jsonl and, last, training.json. Or return the finished one."""
    with attended(begin.out, job.name) as own:
        return _trained(begin, job, make, own)


def _trained(begin: Begin, job: Job, make: "Make", own: Attended) -> Adapter:
    lm, out, shape = begin.lm, begin.out, begin.shape
    settings = {"base": {"name": lm.name, "revision": lm.revision}, "made_by": job.name, "data": job.data}
    settings |= asdict(shape) | asdict(job.recipe)
    settings.pop("save_steps")  # how often the run is saved does not change where it ends
    settings = json.loads(json.dumps(settings | {"quantization": begin.quantization}))
    if finished(out, settings):
        return Adapter(out)

    from workbench.finetuning.memory import plan

    wanted, begun = goes_on(out, lm, begin.quantization)
    planned = plan(lm.model, shape.rank, shape.targets, job.tokens, wanted)
    claim_folder(out, settings, job.name)
    note_begun(out, lm, planned.quantization)
    own.report.begin("preparing")
    reasons = {"learning rate": begin.rate_reason, **job.told, **planned.reasons}
    reasons |= {"quantization": begun} if begun else {}
    for name, text in reasons.items():
        print(f"{job.name}: {name}: {text}")
    report = {"settings": settings, "base": settings["base"], "parameters": asdict(job.recipe), "data": job.about}
    report |= _train(begin, job, planned, make, own)
    report["reasons"] = lm.reasons | reasons
    report["files"] = {name: sha256(out / name) for name in (*ADAPTER_FILES, "losses.jsonl")}
    write_atomic(out / "training.json", json.dumps(report, indent=2))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return Adapter(out)


def _train(begin: Begin, job: Job, planned: "Plan", make: "Make", own: Attended) -> dict[str, Any]:
    from transformers import PrinterCallback

    from workbench.finetuning import alignment
    from workbench.finetuning import trainer as training

    lm, out = begin.lm, begin.out
    with training.own_random_state(lm.device), training.quiet_libraries():
        model, lora = _policy(begin, planned)
        exact = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        # a copy of the tokenizer, because TRL sets its padding token
        trainer = make(model, copy.deepcopy(lm.tokenizer), lora, out / "checkpoints", planned.checkpointing)
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad:  # TRL rounds adapters of 4-bit models to bfloat16, the start's values too
                parameter.data = exact[name] if name in exact else parameter.data.float()
        trainer.remove_callback(PrinterCallback)
        watch = alignment.Curve(trainer, out / "losses.jsonl", job.name, job.names)
        watch.attended = own
        trainer.add_callback(watch)
        clock = time.perf_counter()
        resumed = training.last_checkpoint(out / "checkpoints")
        with listening(trainer.model, own):
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
        if watch.cancelled:
            raise own.cancelled()
    seconds = time.perf_counter() - clock
    _save(trainer, out)
    curve = alignment.write_points(out / "losses.jsonl", trainer.state, job.names)
    return {
        "steps": trainer.state.global_step, "tokens": curve[-1]["tokens"], "seconds": seconds,
        "resumed_from_step": int(resumed.name.split("-")[1]) if resumed else 0, "peak_memory": process_peak(lm.device),
        "adapter_parameters": planned.adapter_parameters, "quantization": planned.quantization or "none",
        "first": curve[0], "last": curve[-1],
    }  # fmt: skip


def _policy(begin: Begin, planned: "Plan") -> tuple[Any, Any]:
    """The base, with the adapter to start from or with the settings of a new one."""
    from peft import LoraConfig, PeftModel

    model: Any = load_base(begin.lm, planned)
    if begin.start is not None:
        return PeftModel.from_pretrained(model, str(begin.start.path), is_trainable=True), None
    shape = begin.shape
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
