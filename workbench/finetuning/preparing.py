"""Between loading the base and the first step: what the run will need, and who watches it."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from workbench.finetuning.memory import Plan
from workbench.finetuning.options import Watching
from workbench.finetuning.packing import Example
from workbench.finetuning.recipe import Recipe
from workbench.finetuning.timing import estimate
from workbench.finetuning.trainer import QuietTrainer
from workbench.finetuning.watching import (
    Scoring,
    Speed,
    flops_per_token,
    live_in_a_notebook,
    peak_flops,
    task_accuracy,
)
from workbench.models import LM


def set_up(
    lm: LM,
    trainer: QuietTrainer,
    planned: Plan,
    recipe: Recipe,
    row: int,
    out: Path,
    examples: Sequence[Example],
    watching: Watching,
) -> dict[str, Any]:
    """Give the trainer its scores (on `examples`), speed, live figure and pause; the estimate, for training.json."""
    lengths = [len(example.input_ids) for example in examples]
    found = _estimate(trainer, planned, sum(lengths))
    watch, task = trainer.watch, watching.task
    if examples or task:
        accuracy = (lambda model: task_accuracy(lm, model, task)) if task else None
        watch.scoring = Scoring(examples, max([row, *lengths]), accuracy)
    watch.speed = Speed(
        out / "speed.jsonl",
        flops_per_token(trainer.model, full=recipe.method == "full"),
        peak_flops(lm.device, lm.model.dtype),
    )
    watch.show = watching.show or live_in_a_notebook()
    watch.pause = math.ceil(watching.until * found["steps"]) if watching.until < 1 else None
    return found


def _estimate(trainer: QuietTrainer, planned: Plan, held_out_tokens: int) -> dict[str, Any]:
    times = estimate(trainer, held_out_tokens)
    text = (
        f"estimate: {planned.bytes_needed / 1e9:.2f} GB of {planned.bytes_free / 1e9:.2f} GB free; {times.steps} steps "
        f"in about {times.seconds:.0f} s (a pass, an optimizer step and a checkpoint, measured, times their numbers)"
    )
    found = {"bytes": planned.bytes_needed, "bytes_free": planned.bytes_free, "parts": planned.parts}
    return found | {"seconds": times.seconds, "steps": times.steps, "times": asdict(times), "text": text}
