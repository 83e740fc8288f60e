"""How much each token counts in the loss: weights of records, of tokens, and of the tokens that decide an answer.

The loss of a step is the sum of weight times negative log-likelihood over its learnt tokens, divided by the sum of
their weights: weights all alike change nothing, weight 0 leaves a token out, weight 2 has it twice. Weights below 0
(unlikelihood) are refused: their loss has no lower bound. `critical_weights` finds the tokens of a wrong chain that a
model of wrong chains says and one of right chains does not (critical tokens, arXiv 2411.19943, whose score is the
contrast of two fine-tuned models). Learning from wrong chains under a control text is in `conditioning`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workbench.finetuning import FIELDS
from workbench.finetuning.packing import IGNORED, Example, encode, encode_all
from workbench.synthesis.records import Record, RecordError

if TYPE_CHECKING:
    from workbench.interventions import Intervention
    from workbench.models import LM

Weigh = Callable[["LM", Record, Example], Sequence[float]]


def encode_weighted(
    lm: "LM", records: Sequence[Record], where: str, max_length: int, weights: Weigh | None
) -> tuple[list[Example], dict[str, int]]:
    """Examples with the weights of `weights` times those in the records, and how many were left out by reason.

    Raises `RecordError`, which names the record, for weights that are no numbers from 0 on, or not one a token.
    """
    if weights is None and not any(field in record for record in records for field in FIELDS):
        return encode_all(lm, records, where, max_length)

    def weigh(lm: "LM", record: Record, example: Example, place: str) -> tuple[float, ...]:
        total = [_number(record.get("weight", 1.0), f"{place}: weight")] * len(example.input_ids)
        given = [("token_weights", record["token_weights"])] if record.get("token_weights") is not None else []
        if weights is not None:
            given.append(("weights(lm, record, example)", weights(lm, record, example)))
        for name, values in given:
            total = [a * b for a, b in zip(total, _one_a_token(values, example, f"{place}: {name}"), strict=True)]
        return tuple(total)

    examples, dropped = encode_all(lm, records, where, max_length, weigh)
    if {example.weights[place] for example in examples for place in example.learnt} == {1.0}:
        examples = [replace(example, weights=()) for example in examples]
    return examples, dropped


def _one_a_token(values: Any, example: Example, where: str) -> list[float]:
    """Weights for all tokens; given for the learnt ones alone, the others get 0."""
    values = [_number(value, where) for value in values]
    if len(values) == len(example.input_ids):
        return values
    if len(values) != len(example.learnt):
        raise RecordError(
            f"{where} has {len(values)} numbers. Give one a token of the record ({len(example.input_ids)}), or one a "
            f"learnt token: the answer and its stop token ({len(example.learnt)})."
        )
    whole = [0.0] * len(example.input_ids)
    for place, value in zip(example.learnt, values, strict=True):
        whole[place] = value
    return whole


def _number(value: Any, where: str) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    if not good:
        raise RecordError(
            f"{where} is {value!r:.60}. Give numbers from 0 on: 0 leaves out, 1 is the usual loss, 2 counts twice. To "
            "learn against an answer, put a control text before it: condition(records, '[wrong]')."
        )
    return float(value)


def critical_weights(
    lm: "LM",
    records: Sequence[Record],
    right: "Intervention | None",
    wrong: "Intervention | None",
    *,
    scale: float = 1.0,
    most: float = 3.0,
    batch_size: int = 8,
) -> list[Record]:
    """The records with `token_weights` that stress what tells right chains from wrong ones.

    right, wrong: adapters (or other interventions; None is the plain model) trained on right and on wrong chains. A
    learnt token gets 1 + scale * |log p_right - log p_wrong| (nats), at most `most`: with the same model on both sides
    all weights are 1. Records keep whatever weight they had as a record. One forward a side; changes no model.
    """
    if scale < 0 or most < 1:
        raise ValueError(f"scale={scale} and most={most}: give a scale from 0 on and a most of 1 or more.")
    examples = [encode(lm, record, f"record {number}") for number, record in enumerate(records, start=1)]
    sides = [learnt_log_probs(lm, examples, side, batch_size) for side in (right, wrong)]
    weighted = []
    for record, good, bad in zip(records, *sides, strict=True):
        weights = [min(most, 1.0 + scale * abs(a - b)) for a, b in zip(good, bad, strict=True)]
        weighted.append({**record, "token_weights": weights})
    return weighted


def learnt_log_probs(
    lm: "LM", examples: Sequence[Example], change: "Intervention | None" = None, batch_size: int = 8
) -> list[list[float]]:
    """log p (nats) of every learnt token given all before it, in one list an example, under an intervention.

    What acts on "generated" positions acts behind each example's prompt.
    """
    import contextlib

    import torch

    said: list[list[float]] = []
    for start in range(0, len(examples), batch_size):
        group = examples[start : start + batch_size]
        width = max(len(example.input_ids) for example in group)
        rows = [example.input_ids + [0] * (width - len(example.input_ids)) for example in group]
        mask = [[1] * len(example.input_ids) + [0] * (width - len(example.input_ids)) for example in group]
        lengths = [example.learnt[0] for example in group]
        inside = contextlib.nullcontext() if change is None else lm.apply(change, prompt_lengths=lengths)
        with torch.no_grad(), inside:
            output = lm.model(
                input_ids=torch.tensor(rows, device=lm.device),
                attention_mask=torch.tensor(mask, device=lm.device), use_cache=False,
            )  # fmt: skip
        spoken = output.logits.float().log_softmax(-1)
        for row, example in enumerate(group):
            said.append([float(spoken[row, place - 1, example.labels[place]]) for place in example.learnt])
    return said


def weights_key(examples: Sequence[Example]) -> list[list[float]] | None:
    """The weights of all learnt tokens as JSON; None where all count alike."""
    if not any(example.weights for example in examples):
        return None
    return [[example.weights[place] for place in example.learnt] for example in examples]


def columns(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Rows for the trainer: tokens and labels, with columns of weights and phases where there are any."""
    phased = any(example.phase for example in examples)
    weighted = phased or any(example.weights for example in examples)
    rows: list[dict[str, Any]] = []
    for example in examples:
        row: dict[str, Any] = {"input_ids": example.input_ids, "labels": example.labels}
        if weighted:
            own = example.weights or (1.0,) * len(example.input_ids)
            row["weights"] = [w if label != IGNORED else 0.0 for w, label in zip(own, example.labels, strict=True)]
        rows.append({**row, "phase": example.phase} if phased else row)
    return rows
