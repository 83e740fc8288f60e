"""Whether a fine-tune fits into memory, and if not, the nearest settings that do; before anything is loaded.

Leans on the prediction in `memory`. Not covered: shortages that come up while training, see `microbatch`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workbench.finetuning.memory import LIMIT, Activations, Plan, count_activations, free_memory, linear_layers, plan
from workbench.finetuning.methods import checkpoints, fit_plan, packing_reason
from workbench.finetuning.options import ShortOfMemory

if TYPE_CHECKING:
    from workbench.finetuning.recipe import Recipe
    from workbench.models import LM

CPU_ROW = 512  # measured, 4M parameters: 2048 tokens take 2.0 s as one row, 0.9 s as four, 0.8 s as eight


def shape(recipe: "Recipe", lengths: Sequence[int], on_gpu: bool) -> tuple[int, int]:
    """Tokens that are run at once, and those of a row, for records of these lengths (tokens)."""
    longest = max(lengths) + (recipe.virtual_tokens if recipe.method == "prompt" else 0)
    if not packs(recipe):
        return min(recipe.batch_size, len(lengths)) * longest, longest
    # without flash attention a row costs time by the square of its length, so a CPU packs several short rows a step
    row = max(longest, recipe.batch_tokens if on_gpu else min(recipe.batch_tokens, CPU_ROW))
    return row, row


def packs(recipe: "Recipe") -> bool:
    """Whether records will be packed, as far as that is known before the base is loaded."""
    return recipe.packing and packing_reason(recipe.method) is None


def fit(lm: "LM", recipe: "Recipe", lengths: Sequence[int], free: int | None = None) -> tuple[Plan, int]:
    """The plan for training on records of these lengths, and the tokens of a row.

    free: bytes that training may use; what is free on the model's device unless given. Raises `ShortOfMemory` with the
    nearest plan that fits when this one needs more than `LIMIT` of them.
    """
    free = free_memory(lm.device) if free is None else free
    kept = count_activations(lm.model, linear_layers(lm.model, recipe.targets)[0])
    planned = _plan(lm, recipe, lengths, free, kept)
    if not _fits(planned):
        raise ShortOfMemory(_refusal(lm, recipe, lengths, free, kept, planned))
    return planned, shape(recipe, lengths, lm.device.type == "cuda")[1]


def _plan(lm: "LM", recipe: "Recipe", lengths: Sequence[int], free: int, kept: Activations) -> Plan:
    short = [length for length in lengths if length <= recipe.max_length]
    tokens, row = shape(recipe, short, lm.device.type == "cuda")
    planned = plan(
        lm.model, recipe.rank, recipe.targets, tokens, recipe.quantization, row=row,
        checkpointing=recipe.checkpointing if checkpoints(recipe.method) else False, free=free, activations=kept,
    )  # fmt: skip
    return fit_plan(planned, lm.model, recipe)


def _fits(planned: Plan) -> bool:
    return planned.bytes_needed <= LIMIT * planned.bytes_free


def _refusal(lm: "LM", recipe: "Recipe", lengths: Sequence[int], free: int, kept: Activations, planned: Plan) -> str:
    parts = ", ".join(f"{name} {size:,}" for name, size in planned.parts.items() if size)
    said = (
        f"Training needs about {planned.bytes_needed:,} bytes ({parts}), more than {LIMIT:.0%} of the {free:,} that "
        "are free. "
    )
    found = nearest(lm, recipe, lengths, free, kept)
    if found is None:
        return said + "No batch size, length, rank, 4-bit weights or checkpointing make it fit: take a smaller model."
    changes, then = found
    words = ", ".join(f"{name}={value!r}" for name, value in changes.items())
    out = sum(length > changes.get("max_length", recipe.max_length) for length in lengths)
    lost = f"; it leaves out {out} of {len(lengths)} records" if out else ""
    return f"{said}The nearest settings that fit: {words} (about {then.bytes_needed:,} bytes{lost})."


def nearest(
    lm: "LM", recipe: "Recipe", lengths: Sequence[int], free: int, kept: Activations
) -> tuple[dict[str, Any], Plan] | None:
    """The fewest changes that fit, in the order of preference of `_milder`, and the plan with them; None if none do."""

    def attempt(changes: dict[str, Any]) -> Plan | None:
        made = _plan(lm, replace(recipe, **changes), lengths, free, kept)
        return made if _fits(made) else None

    ladders = _milder(recipe, lengths, lm.device.type == "cuda")
    for name, values in ladders.items():
        for value in values:
            if made := attempt({name: value}):
                return {name: value}, made
    changes: dict[str, Any] = {}
    for name, values in ladders.items():
        for value in values:
            changes[name] = value
            if attempt(changes):
                break
        if attempt(changes):
            break
    for name in list(changes):  # what did not help is taken back
        if attempt(fewer := {other: value for other, value in changes.items() if other != name}):
            changes = fewer
    made = attempt(changes)
    return (changes, made) if made else None


def _milder(recipe: "Recipe", lengths: Sequence[int], on_gpu: bool) -> dict[str, list[Any]]:
    """Values to try for each setting, the mildest change first; settings in order of preference."""
    ordered = sorted(lengths)
    longest, now = ordered[-1], shape(recipe, lengths, on_gpu)[1]
    tokens = [int(now * share) for share in (0.75, 0.5, 0.375, 0.25, 0.125) if int(now * share) > longest] + [longest]
    rows = [size for power in range(1, 8) if (size := min(recipe.batch_size, len(lengths)) >> power)]
    cut = [
        ordered[int(share * len(ordered)) - 1] for share in (0.95, 0.9, 0.75, 0.5, 0.25) if share * len(ordered) >= 1
    ]
    first = {"batch_tokens": tokens if longest < now else []} if packs(recipe) else {"batch_size": rows}
    return first | {
        "max_length": sorted({length for length in cut if length < longest}, reverse=True),
        "rank": [recipe.rank >> power for power in range(1, 8) if recipe.rank >> power],
        "quantization": ["nf4"] if recipe.quantization == "none" else [],
        "checkpointing": [True] if recipe.checkpointing is False and checkpoints(recipe.method) else [],
    }
