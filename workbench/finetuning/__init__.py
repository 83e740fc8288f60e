"""Fine-tune on checked records: QLoRA (arXiv 2305.14314) and its kin through TRL and PEFT, on a CPU or one GPU.

The base is loaded again for training, so the model that the caller holds stays bit for bit what it was. Only the last
assistant answer of a record is learnt (see `packing`), each token as much as its weight says (see `weighting`). A
killed run goes on from its last whole checkpoint and, on a CPU, ends in the same bytes; a finished folder is returned
as it is. `methods` says what can be trained, `stages` trains on one thing after another, `merging` puts an adapter
into the weights, `preference` and `reward` learn from what is better. Not covered: several GPUs.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from workbench.files import content_key, sha256, write_atomic
from workbench.finetuning.base import load_base, process_peak
from workbench.finetuning.card import write_card
from workbench.finetuning.folders import ADAPTER_FILES, finished, goes_on, note_begun, result_of, save_result
from workbench.finetuning.methods import Method, packing_reason, trainable
from workbench.finetuning.options import Watching, held_out_records
from workbench.finetuning.recipe import Recipe, kept_records, make_recipe, records_key
from workbench.finetuning.stopping import Attended, attended, listening
from workbench.interventions.adapter import Adapter
from workbench.synthesis.records import Data, Record, claim_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.finetuning.fastest import Variant
    from workbench.finetuning.memory import Plan
    from workbench.finetuning.packing import Example
    from workbench.finetuning.trainer import QuietTrainer
    from workbench.finetuning.weighting import Weigh
    from workbench.models import LM
    from workbench.tasks import Task

FIELDS = ("weight", "token_weights")  # of a record, see `weighting`


def finetune(
    lm: "LM",
    data: Data | str | Path | list[Record],
    out: str | Path,
    *,
    method: Method = "lora", virtual_tokens: int = 20,
    rank: int = 16, alpha: int | None = None, targets: str | list[str] = "all-linear", dropout: float = 0.0,
    start: Adapter | None = None,
    quantization: Literal["auto", "nf4", "none"] = "auto",
    epochs: float = 2, learning_rate: float | None = None, warmup: float = 0.05, seed: int = 0,
    batch_tokens: int = 2048, batch_size: int = 16, packing: bool = True, max_length: int | None = None,
    weights: "Weigh | None" = None, order: Literal["shuffled", "given"] = "shuffled",
    held_out: Data | str | Path | list[Record] | None = None, task: "Task | None" = None,
    watch: "Callable[[list[dict[str, float]]], None] | None" = None,
    memory: int | None = None, checkpointing: bool | None = None,
    save_steps: int = 25, until: float = 1.0, fastest: bool = False,
) -> Adapter | Path:  # fmt: skip
    """Train on the kept records of `data` and write the result to the folder `out`: an adapter, which is returned.

    What is trained:
        method: see `methods`. "qlora" is "lora" over 4-bit weights; "full" returns the `Path` of a model folder
            instead. `rank`, `alpha` (twice the rank unless given), `targets` and `dropout` belong to the LoRA kinds,
            `virtual_tokens` to "prompt" and "prefix".
        start: an adapter of the same method to go on from; its rank, alpha and targets hold.
        quantization: "auto" picks 4 bits only where memory is short. `learning_rate` follows model size and method.
    What it learns from:
        batch_tokens: a step sees packed rows of about so many; with `packing=False`, `batch_size` padded records.
        max_length: longer records (tokens) are left out and counted, never cut. Default: the model's context.
        weights: a weight in the loss for every token (see `weighting`), as `weight` and `token_weights` of a record.
        order: "given" keeps the records' order (curricula); it needs `packing=False`.
    How it is watched:
        held_out, task: records (none of them trained on) and tuning questions, scored at every checkpoint.
        watch: called after each step with one row a step (step, loss, grad_norm, learning_rate, tokens_per_second,
            mfu, ...); in a notebook the curve is drawn live unless one is given.
        memory: bytes that may be used (what is free unless given); a run that needs more is refused, with the nearest
            settings that fit. `checkpointing` (activations made anew, not kept) follows from it unless given. Where
            memory runs out while training, micro-batches are split and the run goes on.
        until: share of the steps after which to pause, with an adapter as it is then; the same call goes on from there.
        fastest: on a GPU, first try attention kernels and compilation for a few steps each, and train with the fastest
            of those with the same losses; kept by GPU, model and settings. Changes nothing on a CPU.

    `out` receives the weights, losses.jsonl, speed.jsonl, README.md and, last, training.json: settings, tokens,
    seconds, memory, predictions. Raises `RecordError` for records that can't be trained on and `ValueError` for
    contradictory settings.
    """
    records, where = kept_records(data)
    recipe, rate_reason = make_recipe(
        lm, start, until, rank=rank, alpha=alpha, targets=targets, epochs=epochs, learning_rate=learning_rate,
        batch_tokens=batch_tokens, batch_size=batch_size, max_length=max_length, quantization=quantization,
        packing=packing, dropout=dropout, warmup=warmup, seed=seed, save_steps=save_steps, method=method,
        virtual_tokens=virtual_tokens, order=order, checkpointing=checkpointing,
    )  # fmt: skip
    scored = None if held_out is None else held_out_records(*kept_records(held_out), records)
    watching = Watching(scored, task, watch, memory, until, fastest)
    with attended(Path(out), "finetune") as own:
        return _run(lm, records, where, recipe, Path(out), rate_reason, weights, start, watching, own)


def _run(
    lm: "LM", records: list[Record], where: str, recipe: Recipe, out: Path, rate_reason: str, weights: "Weigh | None",
    start: Adapter | None, watching: Watching, own: Attended,
) -> Adapter | Path:  # fmt: skip
    base = {"name": lm.name, "revision": lm.revision}
    settings: dict[str, Any] = {
        "base": base,
        "records": records_key(records),
        **recipe.settings(),
        **watching.settings(),
    }
    weighted = weights is not None or any(name in record for record in records for name in FIELDS)
    if not weighted and finished(out, settings):
        return result_of(out, recipe.method)

    from workbench.finetuning.fitting import fit
    from workbench.finetuning.packing import IGNORED
    from workbench.finetuning.weighting import encode_weighted, weights_key

    examples, dropped = encode_weighted(lm, records, where, recipe.max_length, weights)
    if weighted:  # known only now, because a function may have made them
        settings |= {"weights": content_key(weights=weights_key(examples))}
        if finished(out, settings):
            return result_of(out, recipe.method)
    own.check()
    scored, unscored = _held_out(lm, watching, recipe)
    wanted, begun = goes_on(out, lm, recipe.quantization)
    lengths = [len(example.input_ids) for example in examples]
    planned, row = fit(lm, replace(recipe, quantization=wanted), lengths, watching.memory)
    planned = replace(planned, reasons=planned.reasons | ({"quantization": begun} if begun else {}))
    claim_folder(out, settings, "finetune")
    note_begun(out, lm, planned.quantization)
    own.report.begin("preparing")
    _say(f"learning rate: {rate_reason}", *unscored, *(f"{name}: {text}" for name, text in planned.reasons.items()))
    learnt_tokens = sum(label != IGNORED for example in examples for label in example.labels)
    used = {"used": len(examples), "left_out": dropped, "learnt_tokens": learnt_tokens}
    report = {"settings": settings, "base": base, "parameters": asdict(recipe), "records": used}
    done = _train(lm, examples, scored, recipe, planned, row, out, start, watching, own)
    if done is None:  # paused
        own.report.end("paused; the same call without until= goes on")
        return Adapter(out)
    report |= done
    write_card(out, report)
    report["files"] = {name: sha256(out / name) for name in (*report["files"], "losses.jsonl")}
    write_atomic(out / "training.json", json.dumps(report, indent=2))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return result_of(out, recipe.method)


def _held_out(lm: "LM", watching: Watching, recipe: Recipe) -> "tuple[list[Example], list[str]]":
    """Examples to score on, and what to say of those that are left out."""
    from workbench.finetuning.packing import encode_all

    if not watching.held_out:
        return [], []
    examples, dropped = encode_all(lm, watching.held_out, "held_out", recipe.max_length)
    return examples, [f"held_out: {count} records left out, {reason}" for reason, count in dropped.items()]


def _train(
    lm: "LM",
    examples: "list[Example]",
    scored: "list[Example]",
    recipe: Recipe,
    planned: "Plan",
    row: int,
    out: Path,
    start: Adapter | None,
    watching: Watching,
    own: Attended,
) -> dict[str, Any] | None:
    """Load the base again, train, save; what happened, for training.json, or None where the run was paused."""
    from workbench.finetuning import trainer as training
    from workbench.finetuning.callbacks import write_curve
    from workbench.finetuning.memory import growth
    from workbench.finetuning.preparing import set_up

    build = partial(_built, lm, examples, recipe, planned, row, start)
    variant, chosen = _variant(lm, recipe, planned, row, build) if watching.fastest else (None, {})
    with training.own_random_state(lm.device), training.quiet_libraries(), growth(lm.device, planned.tight) as grown:
        own.check()
        trainer, packing = build(out / "checkpoints", variant)
        with listening(trainer.model, own):
            estimate = set_up(lm, trainer, planned, recipe, row, out, scored, watching)
            _say(f"packing: {packing}", estimate["text"])
            trainer.watch.attended = own
            ended, resumed = training.train(trainer, out / "checkpoints")
        measured = grown()
    if not ended:
        _pause(out, training.last_checkpoint(out / "checkpoints"), estimate["steps"])
        return None
    files = save_result(trainer, lm, recipe.method, out)
    curve = write_curve(out / "losses.jsonl", trainer.state)
    speed = trainer.watch.speed.summary() if trainer.watch.speed else {}
    losses = [entry["loss"] for entry in curve if "loss" in entry]
    return {
        "reasons": {**lm.reasons, **planned.reasons, "packing": packing, **chosen}, "estimate": estimate,
        "measured": {"bytes": measured, "seconds": speed["seconds"] + speed["aside"]},
        "steps": trainer.state.global_step, "tokens": curve[-1]["tokens"], "seconds": speed["seconds"], "speed": speed,
        "resumed_from_step": resumed, "peak_memory": process_peak(lm.device), "out_of_memory": trainer.shortages,
        "adapter_parameters": planned.adapter_parameters, "quantization": planned.quantization or "none",
        "loss": {"first": losses[0], "last": losses[-1]}, "files": files,
    }  # fmt: skip


def _built(
    lm: "LM",
    examples: "list[Example]",
    recipe: Recipe,
    planned: "Plan",
    row: int,
    start: Adapter | None,
    checkpoints: Path,
    variant: "Variant | None",
) -> "tuple[QuietTrainer, str]":
    """A trainer over the base, loaded again, and why its records are packed or not."""
    from workbench.finetuning import trainer as training
    from workbench.finetuning.fastest import prepare

    model = load_base(lm, planned)
    if variant:
        prepare(model, variant)
    packed, packing = _packing(model, examples, recipe)
    model, adapter = trainable(model, recipe, start)
    made = training.make_trainer(
        model, lm.tokenizer, examples, adapter, checkpoints=checkpoints,
        packed_length=row if packed else None, batch_size=recipe.batch_size,
        accumulation=max(1, recipe.batch_tokens // row) if packed else 1, epochs=recipe.epochs,
        learning_rate=recipe.learning_rate, warmup=recipe.warmup, checkpointing=planned.checkpointing,
        save_steps=recipe.save_steps, seed=recipe.seed, shuffle=recipe.order == "shuffled",
    )  # fmt: skip
    return made, packing


def _variant(
    lm: "LM", recipe: Recipe, planned: "Plan", row: int, build: "Callable[..., tuple[QuietTrainer, str]]"
) -> "tuple[Variant | None, dict[str, str]]":
    """The fastest way to train that computes the same, and the reason; tried in a folder of its own."""
    from workbench.finetuning.fastest import choose

    how = ("method", "rank", "alpha", "targets", "dropout", "packing", "batch_size", "batch_tokens", "virtual_tokens")
    settings = {name: getattr(recipe, name) for name in how} | {"row": row, "quantization": planned.quantization}
    with TemporaryDirectory() as folder:

        def short(variant: "Variant") -> "QuietTrainer":
            trainer = build(Path(folder) / "checkpoints", variant)[0]
            trainer.watch.stage = f"finetune, trying {variant.name}"
            return trainer

        variant, reason = choose(lm, short, planned.checkpointing, settings)
    _say(f"variant: {reason}")
    return variant, {"variant": reason}


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


def _pause(out: Path, checkpoint: Path | None, steps: int) -> None:
    """The adapter as it is at the last checkpoint; training.json is left to the end."""
    assert checkpoint is not None  # a pause saves one
    for name in ADAPTER_FILES:
        write_atomic(out / name, (checkpoint / name).read_bytes())
    _say(f"paused after step {checkpoint.name.split('-')[1]} of {steps}; the same call without until= goes on")


def _say(*lines: str) -> None:
    for line in lines:
        print(f"finetune: {line}")
