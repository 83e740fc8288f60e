"""Fine-tune on checked records: QLoRA (arXiv 2305.14314) and its kin through TRL and PEFT, on a CPU or one GPU.

The base is loaded again for training, so the model that the caller holds stays bit for bit what it was. Only the last
assistant answer of a record is learnt (see `packing`), each token as much as its weight says (see `weighting`). A
killed run goes on from its last whole checkpoint and, on a CPU, ends in the same bytes; a finished folder is returned
as it is. `methods` says what can be trained, `stages` trains on one thing after another, `merging` puts an adapter
into the weights. Not covered: several GPUs, preference data.
"""

import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.files import content_key, sha256, write_atomic
from workbench.finetuning.card import write_card
from workbench.finetuning.folders import finished, result_of, save_result
from workbench.finetuning.methods import (
    VIRTUAL,
    Method,
    check_method,
    default_rate,
    fit_plan,
    goes_on_from,
    packing_reason,
    settle_method,
    trainable,
)
from workbench.interventions.adapter import Adapter
from workbench.synthesis.records import Data, Record, RecordError, check_record, claim_folder, load_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.finetuning.memory import Plan
    from workbench.finetuning.packing import Example
    from workbench.finetuning.trainer import QuietTrainer
    from workbench.finetuning.weighting import Weigh
    from workbench.models import LM

FIELDS = ("weight", "token_weights")  # of a record, see `weighting`
CPU_ROW = 512  # measured, 4M parameters: 2048 tokens take 2.0 s as one row, 0.9 s as four, 0.8 s as eight


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
    method: str = "lora"
    virtual_tokens: int = 20
    start: str | None = None  # SHA-256 of the adapter that this one goes on from

    def settings(self) -> dict[str, Any]:
        """What the result depends on; later fields only where they were used, so that older folders stay finished."""
        later = {"method": "lora", "virtual_tokens": 20, "start": None}
        given = asdict(self).items()
        # how often the run is saved does not change where it ends
        return {name: value for name, value in given if name != "save_steps" and later.get(name, self) != value}


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
    method: Method = "lora",
    virtual_tokens: int = 20,
    weights: "Weigh | None" = None,
    start: Adapter | None = None,
) -> Adapter | Path:
    """Train on the kept records of `data` and write the result to the folder `out`: an adapter, which is returned.

    method: see `methods`. "qlora" is "lora" over 4-bit weights; "full" returns the `Path` of a model folder instead.
    `rank`, `alpha` (twice the rank unless given), `targets` and `dropout` belong to the LoRA kinds, `virtual_tokens` to
    "prompt" and "prefix". start: an adapter of the same method to go on from; its rank, alpha and targets hold.
    A step sees packed rows of about `batch_tokens` tokens in all; with `packing=False`, `batch_size` padded records.
    `learning_rate` follows model size and method (printed). Records longer than `max_length` tokens (default: the
    model's context) are left out and counted, never cut. quantization: "auto" picks 4 bits only where memory is short.
    weights: a weight in the loss for every token (see `weighting`), as are `weight` and `token_weights` of a record.
    `out` receives the weights, losses.jsonl, README.md and, last, training.json: settings, tokens, seconds, memory.

    Raises `RecordError` for records that can't be trained on and `ValueError` for contradictory settings.
    """
    method, quantization = settle_method(method, quantization)  # type: ignore[assignment]  # both are known by now
    records, where = _records(data)
    rate, rate_reason = _learning_rate(lm, learning_rate, method)
    context = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or batch_tokens
    recipe = Recipe(
        rank, 2 * rank if alpha is None else alpha, targets, epochs, rate, batch_tokens, batch_size,
        min(max_length or context, context), quantization, packing, dropout, warmup, seed, save_steps,
        method, virtual_tokens if method in VIRTUAL else 20,
    )  # fmt: skip
    recipe = recipe if start is None else goes_on_from(lm, recipe, start)
    _check(recipe)
    check_method(lm, recipe)
    return _run(lm, records, where, recipe, Path(out), rate_reason, weights, start)


def _run(
    lm: "LM",
    records: list[Record],
    where: str,
    recipe: Recipe,
    out: Path,
    rate_reason: str,
    weights: "Weigh | None",
    start: Adapter | None,
) -> Adapter | Path:
    base = {"name": lm.name, "revision": lm.revision}
    settings: dict[str, Any] = {"base": base, "records": _content(records), **recipe.settings()}
    weighted = weights is not None or any(name in record for record in records for name in FIELDS)
    if not weighted and finished(out, settings):
        return result_of(out, recipe.method)

    from workbench.finetuning.memory import plan
    from workbench.finetuning.packing import IGNORED
    from workbench.finetuning.weighting import encode_weighted, weights_key

    examples, dropped = encode_weighted(lm, records, where, recipe.max_length, weights)
    if weighted:  # known only now, because a function may have made them
        settings |= {"weights": content_key(weights=weights_key(examples))}
        if finished(out, settings):
            return result_of(out, recipe.method)
    longest = max(len(example.input_ids) for example in examples)
    # without flash attention a row costs time by the square of its length, so a CPU packs several short rows a step
    row = max(longest, recipe.batch_tokens if lm.device.type == "cuda" else min(recipe.batch_tokens, CPU_ROW))
    tokens = row if recipe.packing else recipe.batch_size * longest
    planned = fit_plan(plan(lm.model, recipe.rank, recipe.targets, tokens, recipe.quantization), lm.model, recipe)
    claim_folder(out, settings, "finetune")
    _say(f"learning rate: {rate_reason}", *(f"{name}: {text}" for name, text in planned.reasons.items()))
    learnt_tokens = sum(label != IGNORED for example in examples for label in example.labels)
    used = {"used": len(examples), "left_out": dropped, "learnt_tokens": learnt_tokens}
    report = {"settings": settings, "base": base, "parameters": asdict(recipe), "records": used}
    report |= _train(lm, examples, recipe, planned, row, out, start)
    write_card(out, report)
    report["files"] = {name: sha256(out / name) for name in (*report["files"], "losses.jsonl")}
    write_atomic(out / "training.json", json.dumps(report, indent=2))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return result_of(out, recipe.method)


def _train(
    lm: "LM", examples: "list[Example]", recipe: Recipe, planned: "Plan", row: int, out: Path, start: Adapter | None
) -> dict[str, Any]:
    """Load the base again, train, save; what happened, for training.json."""
    from workbench.finetuning import trainer as training

    model = _base(lm, planned)
    packed, packing_reason = _packing(model, examples, recipe)
    model, adapter = trainable(model, recipe, start)
    with training.own_random_state(lm.device), training.quiet_libraries():
        trainer = training.make_trainer(
            model, lm.tokenizer, examples, adapter, checkpoints=out / "checkpoints",
            packed_length=row if packed else None, batch_size=recipe.batch_size,
            accumulation=max(1, recipe.batch_tokens // row) if packed else 1, epochs=recipe.epochs,
            learning_rate=recipe.learning_rate, warmup=recipe.warmup, checkpointing=planned.checkpointing,
            save_steps=recipe.save_steps, seed=recipe.seed,
        )  # fmt: skip
        estimate = _estimate(trainer, planned, recipe)
        _say(f"packing: {packing_reason}", estimate["text"])
        begin = time.perf_counter()
        resumed = training.last_checkpoint(out / "checkpoints")
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    seconds = time.perf_counter() - begin
    files = save_result(trainer, lm, recipe.method, out)
    curve = training.write_curve(out / "losses.jsonl", trainer.state)
    return {
        "reasons": {**lm.reasons, **planned.reasons, "packing": packing_reason}, "estimate": estimate,
        "steps": trainer.state.global_step, "tokens": curve[-1]["tokens"], "seconds": seconds,
        "resumed_from_step": int(resumed.name.split("-")[1]) if resumed else 0, "peak_memory": _peak_memory(),
        "adapter_parameters": planned.adapter_parameters, "quantization": planned.quantization or "none",
        "loss": {"first": curve[0]["loss"], "last": curve[-1]["loss"]}, "files": files,
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


def _packing(model: "PreTrainedModel", examples: "list[Example]", recipe: Recipe) -> tuple[bool, str]:
    """Whether to pack, and why: only where one packed record provably can't see another."""
    from workbench.finetuning.packing import leak

    if not recipe.packing:
        return False, "off: asked for"
    if reason := packing_reason(recipe.method):
        return False, reason
    seen = leak(model, examples)
    if seen:
        return False, f"off: this model lets packed records see each other (logits differ by {seen:.2g})"
    return True, "on: packed records can't see each other (logits differ by 0)"


def _estimate(trainer: "QuietTrainer", planned: "Plan", recipe: Recipe) -> dict[str, Any]:
    rows = trainer.train_dataset.num_rows
    passes = -(-rows // trainer.args.per_device_train_batch_size)
    steps = -(-passes // trainer.args.gradient_accumulation_steps) * recipe.epochs
    seconds = trainer.step_seconds() * passes * recipe.epochs
    text = (
        f"estimate: {planned.bytes_needed / 1e9:.2f} GB of {planned.bytes_free / 1e9:.2f} GB free; {steps:.0f} steps "
        f"in about {seconds:.0f} s (the first batch, measured, times their number)"
    )
    return {"bytes": planned.bytes_needed, "bytes_free": planned.bytes_free, "seconds": seconds, "text": text}


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


def _content(records: list[Record]) -> str:
    """A key of what is learnt: the messages and, where there are any, what is given of the answers and the phases."""
    more = {name: [record.get(name) for record in records] for name in ("given", "phase")}
    used = {name: values for name, values in more.items() if any(values)}
    return content_key(messages=[record["messages"] for record in records], **used)


def _learning_rate(lm: "LM", given: float | None, method: str) -> tuple[float, str]:
    """LoRA bears about ten times the rate of full fine-tuning, and small models more than large ones."""
    if given is not None:
        return given, f"{given:g}: asked for"
    size = lm.model.num_parameters()
    for limit, rate in ((50e6, 2e-3), (1e9, 5e-4)):
        if size < limit:
            return default_rate(method, rate, f"{rate:g}: {size / 1e6:.3g}M parameters, fewer than {limit / 1e6:g}M")
    return default_rate(method, 2e-4, f"0.0002: {size / 1e9:.2g}B parameters, QLoRA's rate for models of this size")


def _check(recipe: Recipe) -> None:
    least = {"rank": 1, "alpha": 1, "batch_tokens": 1, "batch_size": 1, "max_length": 2, "save_steps": 1}
    for name, limit in least.items():
        if getattr(recipe, name) < limit:
            raise ValueError(f"{name}={getattr(recipe, name)} is too small: give {limit} or more.")
    if recipe.epochs <= 0 or recipe.learning_rate <= 0:
        raise ValueError(f"epochs={recipe.epochs} and learning_rate={recipe.learning_rate} must both be above 0.")
    if not 0 <= recipe.dropout < 1 or not 0 <= recipe.warmup < 1:
        raise ValueError(f"dropout={recipe.dropout} and warmup={recipe.warmup} are shares: give numbers from 0 to 1.")


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
