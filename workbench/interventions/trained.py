"""Train one vector a layer, or a map of low rank, through a frozen model: from answers (SFT) or preferred ones (BiPO).

An alternative to reading directions out of contrastive pairs: what is fitted is the likelihood of whole answers. Only
they get gradients. Not covered: adapters and weights, which `finetuning` trains.
Source of the preference loss: Cao et al. 2024, bi-directional preference optimisation, arXiv 2406.00045. Its authors
add the vector at all positions, prompt included (positions="all"), and train with AdamW's decay and a cosine schedule.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.files import content_key
from workbench.interventions.concept import check_layers
from workbench.interventions.low_rank import LowRank
from workbench.interventions.residual import Positions, Residual, normal_positions, span_mask
from workbench.interventions.session import ACTIVE
from workbench.models import LM, ModelError, end_tokens, takes_last_only
from workbench.turns import in_turn

LOSSES = ("sft", "preference")
SHARPNESS = 0.1  # beta of the preference loss, the value of DPO (arXiv 2305.18290) and BiPO


@dataclass(frozen=True)
class Answered:
    """Token ids of a prompt and of one answer to it, end token included."""

    prompt: list[int]
    answer: list[int]


@in_turn
def train_vector(
    lm: LM,
    records: Sequence[dict[str, Any]],
    layers: Iterable[int] | int,
    *,
    rank: int | None = None,
    positions: Positions = "generated",
    loss: str = "sft",
    steps: int = 100,
    learning_rate: float = 0.02,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Residual | LowRank:
    """Vectors that make the records' answers likelier when added at `positions` after each of `layers`, strength 1.

    rank: None for one vector a layer; else a map of that rank a layer (`LowRank`), which also reads the state.
    records: loss "sft": `messages` that end in an assistant answer. "preference": `messages` that end in a question,
    and texts `chosen` and `rejected`; each step adds the vector or takes it away, drawn by lot, and wants the one to
    raise chosen over rejected as much as the other lowers it.
    learning_rate: of Adam, in units of the residual stream; steps: batches of `batch_size` records.
    progress: called with the step's number, from 1, and its loss: nats a token (sft) or a pair (preference).
    The same seed gives the same vectors on one device; the weights are not touched.
    """
    chosen = [layers] if isinstance(layers, int) else sorted(set(layers))
    check_layers(chosen, lm)
    _check(
        loss,
        rank=1 if rank is None else rank,
        steps=steps,
        batch_size=batch_size,
        records=len(records),
        layers=len(chosen),
    )
    _refuse_blocks(lm)
    data = [_answers(lm, record, loss) for record in records]
    changes = {layer: _Trained(lm, layer, rank, seed) for layer in chosen}
    fitted = [parameter for change in changes.values() for parameter in change.parameters()]
    before = _unsteered(lm, data, batch_size) if loss == "preference" else None
    optimizer, draw = torch.optim.Adam(fitted, lr=learning_rate), Random(seed)
    for step, numbers in enumerate(_drawn(len(data), batch_size, steps, draw), 1):
        sign = 1.0 if before is None else draw.choice((-1.0, 1.0))
        rows = [row for side in zip(*(data[number] for number in numbers), strict=True) for row in side]
        with torch.enable_grad(), _added(lm, changes, normal_positions(positions), rows, sign):
            value = _loss(log_likelihood(lm, rows), rows, sign, None if before is None else before[numbers])
            gradients = torch.autograd.grad(value, fitted)
        _step(optimizer, fitted, gradients)
        if progress is not None:
            progress(step, value.item())
    details = {"method": f"trained, {loss}", "records": str(len(data)), "steps": str(steps), "seed": str(seed)}
    details |= {"data_sha256": _fingerprint(loss, data)} | ({} if rank is None else {"rank": str(rank)})
    return _made(changes, rank, {"positions": positions, "model": lm.name, "revision": lm.revision, "details": details})


def _check(loss: str, **counts: int) -> None:
    if loss not in LOSSES or min(counts.values()) < 1:
        given = ", ".join(f"{name}={number}" for name, number in counts.items())
        raise ModelError(
            f"loss={loss!r}, {given}: loss is one of {', '.join(LOSSES)}; of everything else at least 1 is needed."
        )


def _fingerprint(loss: str, data: "Sequence[Sequence[Answered]]") -> str:
    """A hash of what is trained on, as a saved file's header describes it."""
    return content_key(loss=loss, records=[[[row.prompt, row.answer] for row in sides] for sides in data])


def _made(changes: "dict[int, _Trained]", rank: int | None, origin: dict[str, Any]) -> Residual | LowRank:
    """What was fitted, as an intervention."""

    def parts(name: str) -> dict[int, Tensor]:
        return {layer: getattr(change, name).detach().cpu() for layer, change in changes.items()}

    if rank is None:
        return Residual({layer: part[0] for layer, part in parts("up").items()}, **origin)
    return LowRank(parts("down"), parts("bias"), parts("up"), **origin)


def _refuse_blocks(lm: LM) -> None:
    """Refuse to train inside of a block whose interventions depend on where a prompt ends."""
    for session in ACTIVE.get(lm.model, ())[-1:]:
        if session.kv or session.edits or session.gates or any(span != "all" for span in session.spans):
            raise ModelError(
                "Prompts and answers are trained on in one piece, so an enclosing block could not tell where a prompt "
                "ends. Leave it, or let it act at 'all' positions."
            )


class _Trained(nn.Module):
    """What is fitted in one layer; it begins as no change. Without a rank, `up` alone: one vector."""

    def __init__(self, lm: LM, layer: int, rank: int | None, seed: int) -> None:
        super().__init__()
        place, size = next(lm.blocks[layer].parameters()).device, (rank or 1, lm.d_model)
        self.up = nn.Parameter(torch.zeros(size, device=place))
        self.vector = rank is None
        if rank is not None:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + layer)
            self.down = nn.Parameter((torch.randn(size, generator=generator) / lm.d_model).to(place))
            self.bias = nn.Parameter(torch.zeros(rank, device=place))

    def forward(self, hidden: Float[Tensor, "rows seq d_model"]) -> Float[Tensor, "... d_model"]:
        """What is added to these states."""
        return self.up[0] if self.vector else (hidden.float() @ self.down.T + self.bias) @ self.up


def _step(optimizer: torch.optim.Optimizer, fitted: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
    for parameter, gradient in zip(fitted, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


def _drawn(records: int, batch_size: int, steps: int, draw: Random) -> Iterator[list[int]]:
    """Record numbers of each step; every record comes once before any comes again."""
    size, order = min(batch_size, records), list[int]()
    for _ in range(steps):
        if len(order) < size:
            order += draw.sample(range(records), records)
        yield order[:size]
        order = order[size:]


def _loss(
    likelihood: Float[Tensor, " rows"],
    rows: Sequence[Answered],
    sign: float,
    before: Float[Tensor, "records two"] | None,
) -> Float[Tensor, ""]:
    """Nats a token, or BiPO's loss a pair: the rows are all chosen answers, then all rejected ones."""
    if before is None:
        return -likelihood.sum() / sum(len(row.answer) for row in rows)
    chosen, rejected = (likelihood - before.T.flatten().to(likelihood)).chunk(2)
    return -nn.functional.logsigmoid(sign * SHARPNESS * (chosen - rejected)).mean()


def log_likelihood(lm: LM, rows: Sequence[Answered]) -> Float[Tensor, " rows"]:
    """Natural log of the probability of each row's answer after its prompt, summed over the answer's tokens."""
    texts = [[*row.prompt, *row.answer] for row in rows]
    width, first = max(map(len, texts)), min(len(row.prompt) for row in rows) - 1
    ids = torch.full((len(rows), width), lm.tokenizer.pad_token_id or 0)
    answers = torch.zeros(len(rows), width, dtype=torch.bool)
    for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
        ids[number, : len(text)] = torch.tensor(text)  # padded on the right: causal attention needs no mask
        answers[number, len(row.prompt) : len(text)] = True
    ids, answers = ids.to(lm.device), answers.to(lm.device)
    extra = {"logits_to_keep": width - first} if takes_last_only(lm) else {}
    logits = lm.model(input_ids=ids, use_cache=False, **extra).logits[:, -(width - first) :]
    scores = logits[:, :-1].float().log_softmax(-1)
    each = scores.gather(-1, ids[:, first + 1 :, None]).squeeze(-1)
    return (each * answers[:, first + 1 :]).sum(1)


def _answers(lm: LM, record: dict[str, Any], loss: str) -> list[Answered]:
    """The answer of a record, or the preferred and the rejected one."""
    turns: list[dict[str, str]] = record.get("messages") or [{}]
    role = turns[-1].get("role")
    texts = [record.get("chosen"), record.get("rejected")] if loss == "preference" else [turns[-1].get("content")]
    if role != ("user" if loss == "preference" else "assistant") or not all(isinstance(text, str) for text in texts):
        need = (
            "end in a user turn, and texts chosen and rejected" if loss == "preference" else "end in an assistant turn"
        )
        raise ModelError(f"loss={loss!r} needs records whose messages {need}; got one with keys {sorted(record)}.")
    prompt = lm.encode(turns if loss == "preference" else turns[:-1])
    end = [number for number in (lm.tokenizer.eos_token_id,) if number in end_tokens(lm)]
    return [Answered(prompt, lm.tokenizer(text, add_special_tokens=False)["input_ids"] + end) for text in texts]


def _unsteered(lm: LM, data: Sequence[list[Answered]], batch_size: int) -> Float[Tensor, "records two"]:
    """Log-likelihoods of chosen and rejected answers without any vector."""
    with torch.no_grad():
        batches = [data[start : start + batch_size] for start in range(0, len(data), batch_size)]
        return torch.cat(
            [log_likelihood(lm, [row for pair in batch for row in pair]).unflatten(0, (-1, 2)) for batch in batches]
        )


@contextmanager
def _added(
    lm: LM, changes: dict[int, _Trained], span: Positions, rows: Sequence[Answered], sign: float
) -> Iterator[None]:
    """Make the changes at the rows' own positions, in a way that gradients go through."""
    lengths = torch.tensor([len(row.prompt) + len(row.answer) for row in rows])
    text = torch.arange(int(lengths.max())).expand(len(rows), -1)
    text = text.masked_fill(text >= lengths[:, None], -1)
    amount = sign * span_mask(span, text, torch.tensor([len(row.prompt) for row in rows]))[..., None].float()

    def hook(change: _Trained) -> Callable[..., Any]:
        def add(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            changed = hidden + (amount.to(hidden.device) * change(hidden)).to(hidden.dtype)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return add

    handles = [lm.blocks[layer].register_forward_hook(hook(change)) for layer, change in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
