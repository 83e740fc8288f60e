"""Numbers by which records are chosen: how hard, how different from each other, how good; all read off a model.

A score is a function of records, with its own settings set by `functools.partial`: `mix(..., score=partial(diverse,
lm=lm))` takes the records with the highest numbers. Nothing here needs more than forward and backward passes, so it
works over 4-bit weights too. Not covered: scores by a stronger model's written judgement (see `roles`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from workbench.synthesis.records import Record

if TYPE_CHECKING:
    from workbench.models import LM
    from workbench.tasks import Task

SIDE = 16  # of the random projections of a layer's inputs and output gradients: 256 numbers a layer


def easy(records: Sequence[Record]) -> list[float]:
    """The share of right answers among those sampled for a record's question: 1 is easy, 0 was never solved."""
    return [float(record["solve_rate"]) for record in records]


def middling(records: Sequence[Record]) -> list[float]:
    """Highest where the model solves half of its tries, lowest where it solves all or none."""
    return [-abs(float(record["solve_rate"]) - 0.5) for record in records]


def with_solve_rate(
    lm: "LM", task: "Task", records: Sequence[Record], samples: int = 4, **settings: Any
) -> list[Record]:
    """Copies of the records with the `solve_rate` of another model: the student's, where a teacher wrote them.

    `settings` are fields of `sampling.Settings` (`max_new_tokens`, `temperature`, `strategy`, `seed`).
    """
    from workbench.synthesis.recipes import rejection
    from workbench.synthesis.sampling import Settings

    rows = [{"id": r["row_id"], "question": r["messages"][-2]["content"], "answer": r["answer"]} for r in records]
    attempts = rejection(lm, task, rows, Settings(samples=samples, **settings))
    rates = [sum(sample["correct"] for sample in attempt["samples"]) / samples for attempt in attempts]
    return [{**record, "solve_rate": rate} for record, rate in zip(records, rates, strict=True)]


def diverse(records: Sequence[Record], *, lm: "LM", by: Literal["embedding", "gradient"] = "embedding") -> list[float]:
    """Highest for the records that farthest-first traversal picks first: each as far as can be from all before it.

    Distance is 1 - cosine, between embeddings or between gradients of the loss. Farthest-first is the greedy k-centre
    of core-set selection (arXiv 1708.00489); gradients as what diversity is measured in: arXiv 2505.20161.
    """
    vectors = embeddings(lm, records) if by == "embedding" else gradients(lm, records)
    if by == "embedding":
        vectors = vectors - vectors.mean(0)  # what all states share would make every cosine nearly 1
    order = farthest_first(vectors)
    place = {number: rank for rank, number in enumerate(order)}
    return [-float(place[number]) for number in range(len(records))]


def probed(records: Sequence[Record], *, lm: "LM", right: Sequence[Record], wrong: Sequence[Record]) -> list[float]:
    """How much a linear probe, fitted on `right` against `wrong` records, takes a record for a right one.

    A ridge regression on embeddings; above 0 is nearer to the right ones. Fit it on records that are scored by nobody.
    """
    if len(right) < 2 or len(wrong) < 2:
        raise ValueError(f"The probe got {len(right)} right and {len(wrong)} wrong records: give at least 2 of each.")
    states = embeddings(lm, [*right, *wrong]).double()
    labels = torch.tensor([1.0] * len(right) + [-1.0] * len(wrong), dtype=torch.double)
    centre = (states[: len(right)].mean(0) + states[len(right) :].mean(0)) / 2
    inputs = states - centre
    penalty = inputs.square().sum(1).mean() / len(inputs) * torch.eye(inputs.shape[1], dtype=torch.double)
    weights = torch.linalg.solve(inputs.T @ inputs / len(inputs) + penalty, inputs.T @ labels / len(inputs))
    return ((embeddings(lm, records).double() - centre) @ weights).tolist()


def vendi(vectors: Float[Tensor, "records d"]) -> float:
    """How many different records a set amounts to: exp of the entropy of its similarities' eigenvalues, 1 to n.

    The Vendi score (arXiv 2210.02410) with cosine similarity; on `gradients` it is the G-Vendi of arXiv 2505.20161.

    >>> round(vendi(torch.eye(4)), 3), round(vendi(torch.ones(4, 3)), 3)
    (4.0, 1.0)
    """
    unit = nn.functional.normalize(vectors.double(), dim=1)
    values = torch.linalg.svdvals(unit).square() / len(unit)
    values = values[values > 1e-12]
    return float((-values * values.log()).sum().exp())


def farthest_first(vectors: Float[Tensor, "records d"]) -> list[int]:
    """All rows, the next one always the farthest from those before it; the first is the farthest from the mean.

    >>> farthest_first(torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0]]))
    [2, 0, 1]
    """
    unit = nn.functional.normalize(vectors.double(), dim=1)
    order = [int((unit @ unit.mean(0)).argmin())]
    nearest = unit @ unit[order[0]]
    nearest[order[0]] = torch.inf
    while len(order) < len(unit):
        following = int(nearest.argmin())
        order.append(following)
        nearest = torch.maximum(nearest, unit @ unit[following])
        nearest[following] = torch.inf
    return order


def embeddings(lm: "LM", records: Sequence[Record], layer: int | None = None) -> Float[Tensor, "records d_model"]:
    """Mean state of each record's answer tokens after decoder block `layer` (default: the middle one), on the CPU."""
    block = lm.blocks[len(lm.blocks) // 2 if layer is None else layer]
    found: list[Tensor] = []

    def read(mask: Tensor) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            states = (output[0] if isinstance(output, tuple) else output).float()
            found.extend(((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)).cpu())

        return hook

    for ids, attention, learnt in _batches(lm, records):
        handle = block.register_forward_hook(read(learnt.float()))
        try:
            with torch.no_grad():
                lm.model(input_ids=ids, attention_mask=attention, use_cache=False)
        finally:
            handle.remove()
    return torch.stack(found)


def gradients(lm: "LM", records: Sequence[Record], seed: int = 0) -> Float[Tensor, "records d"]:
    """Each record's gradient of the mean loss on its answer, by the weights of the last block, randomly projected.

    The gradient of a linear layer is a sum over tokens of (output gradient) x (input); both sides are projected to
    `SIDE` random directions first (as in LoGra, arXiv 2405.13954), so no gradient is ever stored whole. CPU, float32.
    """
    from workbench.finetuning.memory import widths

    layers = [module for module in lm.blocks[-1].modules() if isinstance(module, nn.Linear | Conv1D)]
    generator = torch.Generator().manual_seed(seed)
    sides = [
        tuple(torch.randn(width, SIDE, generator=generator).to(lm.device) for width in widths(layer))
        for layer in layers
    ]
    rows: list[Tensor] = []
    with _projected_gradients(layers, sides) as parts:
        for ids, attention, learnt in _batches(lm, records):
            embedded = lm.model.get_input_embeddings()(ids).detach().requires_grad_()
            logits = lm.model(inputs_embeds=embedded, attention_mask=attention, use_cache=False).logits
            flat = logits[:, :-1].float().flatten(0, 1)
            loss = nn.functional.cross_entropy(flat, ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
            weights = learnt[:, 1:].float() / learnt.sum(1, keepdim=True)
            torch.autograd.grad((loss * weights).sum(), embedded)
            rows += torch.cat([parts[number] for number in sorted(parts)], dim=1).cpu()
    return torch.stack(rows)


@contextmanager
def _projected_gradients(
    layers: Sequence[nn.Module], sides: Sequence[tuple[Tensor, ...]]
) -> Iterator[dict[int, Tensor]]:
    """While the block runs, each backward pass leaves [rows, SIDE * SIDE] for each layer, by its number."""
    inputs: dict[int, Tensor] = {}
    parts: dict[int, Tensor] = {}
    handles = []
    for number, (layer, (narrow_in, narrow_out)) in enumerate(zip(layers, sides, strict=True)):

        def keep(module: nn.Module, arguments: Any, output: Any, n: int = number, p: Tensor = narrow_in) -> None:
            inputs[n] = arguments[0].detach().float() @ p  # [rows, tokens, SIDE]

        def join(module: nn.Module, into: Any, out: Any, n: int = number, p: Tensor = narrow_out) -> None:
            if inputs[n].ndim == 3:  # experts see tokens without their rows
                parts[n] = torch.einsum("bti,bto->bio", inputs[n], out[0].float() @ p).flatten(1)

        handles += [layer.register_forward_hook(keep), layer.register_full_backward_hook(join)]
    try:
        yield parts
    finally:
        for handle in handles:
            handle.remove()


def _batches(lm: "LM", records: Sequence[Record], size: int = 16) -> "list[tuple[Tensor, Tensor, Tensor]]":
    """Token ids, attention mask and which tokens are learnt, padded on the right, in the order of the records."""
    from workbench.finetuning.packing import IGNORED, encode

    examples = [encode(lm, record, f"record {number}") for number, record in enumerate(records, start=1)]
    batches = []
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        width = max(len(example.input_ids) for example in part)
        ids = torch.full((len(part), width), lm.tokenizer.pad_token_id or 0)
        attention, learnt = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, example in enumerate(part):
            length = len(example.input_ids)
            ids[row, :length], attention[row, :length] = torch.tensor(example.input_ids), 1
            learnt[row, :length] = torch.tensor(example.labels).ne(IGNORED).long()
        batches.append((ids.to(lm.device), attention.to(lm.device), learnt.to(lm.device)))
    return batches
