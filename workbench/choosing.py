"""How the next token is chosen, row by row: bias, temperature, nucleus, repetition penalty, and what ends a row.

Every row has a random stream of its own, so that what it gets does not depend on its neighbours or on when it began.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.models import LM, ModelError, end_tokens


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: temperature 0 is greedy, else a sample from the most likely `top_p` of the mass.

    bias: nats added to the logits of these tokens, before the temperature, until the row has chosen one of them: it
    moves the decision to begin something, such as the answer. bias_temperature: of that decision alone: the odds of all
    these tokens together against all others become their 1/bias_temperature-th power, before the bias. 0 nats at
    temperature 1 leave all as it is.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    bias: dict[int, float] = field(default_factory=dict)
    bias_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ModelError(f"max_new_tokens={self.max_new_tokens}: at least 1 is needed.")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ModelError(
                f"temperature={self.temperature}, top_p={self.top_p}: temperature is 0 or more, top_p above 0 and at "
                "most 1."
            )
        if not 0 < self.bias_temperature < math.inf:
            raise ModelError(f"bias_temperature={self.bias_temperature}: a finite number above 0 is needed.")
        if "" in self.stop:
            raise ModelError("stop holds an empty string, which every text contains. Leave it out.")


@dataclass
class Row:
    """A prompt on its way: `place` is its number in the session, `limit` its most new tokens, `new` those so far."""

    number: int
    place: int
    prompt: list[int]
    seed: int
    limit: int
    new: list[int] = field(default_factory=list)
    finished: bool = False
    seconds: float = 0.0
    passes: int = 0

    @property
    def over(self) -> bool:
        """Whether it gets no more tokens."""
        return self.finished or len(self.new) >= self.limit


class Chooser:
    """Next tokens of the running rows, and which of them end a row."""

    def __init__(self, lm: LM, rows: Sequence[Row], decoding: Decoding) -> None:
        self.decoding = decoding
        self.ends = end_tokens(lm)
        self.draws = torch.empty(0)
        self.step = torch.zeros(len(rows), 1, dtype=torch.long, device=lm.device)  # tokens chosen so far
        if decoding.temperature > 0:
            # a stream of its own for every row, on the CPU: the same on every device and in every batch
            streams = [torch.Generator().manual_seed(row.seed % 2**63) for row in rows]
            draws = [torch.rand(decoding.max_new_tokens, generator=stream) for stream in streams]
            self.draws = torch.stack(draws).to(lm.device)
        tempered = decoding.bias_temperature != 1.0
        moved = {token: nats for token, nats in decoding.bias.items() if nats or tempered}
        self.biased = torch.tensor(list(moved), dtype=torch.long, device=lm.device)
        self.nats = torch.tensor(list(moved.values()), device=lm.device)
        self.waiting = torch.ones(len(rows), 1, device=lm.device)  # 0 once a row has chosen one of them
        self.penalty = lm.model.generation_config.repetition_penalty or 1.0
        self.seen = torch.zeros(0)
        if self.penalty != 1.0:
            self.seen = torch.zeros(
                len(rows), lm.model.get_output_embeddings().weight.shape[0], dtype=torch.bool, device=lm.device
            )
            for number, row in enumerate(rows):
                self.seen[number, torch.tensor(row.prompt, device=lm.device)] = True

    def choose(self, logits: Float[Tensor, "rows vocabulary"]) -> Int[Tensor, " rows"]:
        """The next token of every row, from its logits."""
        if self.penalty != 1.0:  # CTRL, arXiv 1909.05858, as transformers applies it
            logits = torch.where(
                self.seen, torch.where(logits > 0, logits / self.penalty, logits * self.penalty), logits
            )
        if len(self.biased):
            logits = logits.index_add(1, self.biased, self.waiting * self._moves(logits))
        if self.decoding.temperature == 0:
            token = logits.argmax(-1)
        else:
            token = sample(logits / self.decoding.temperature, self._draws(), self.decoding.top_p)
        if len(self.biased):
            self.waiting = self.waiting * ~torch.isin(token, self.biased)[:, None]
        if self.penalty != 1.0:
            self.seen.scatter_(1, token[:, None], True)
        self.step += 1
        return token

    def _draws(self) -> Float[Tensor, " rows"]:
        """Each row's next number; one that is over but still in the batch has no more, and takes its last."""
        return self.draws.gather(1, self.step.clamp(max=self.draws.shape[1] - 1))[:, 0]

    def _moves(self, logits: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows biased"]:
        """Nats to add to the biased tokens: the bias, and what brings their joint odds to `bias_temperature`."""
        if self.decoding.bias_temperature == 1.0:
            return self.nats.expand(len(logits), -1)
        others = logits.index_fill(1, self.biased, -math.inf).logsumexp(-1)
        odds = logits[:, self.biased].logsumexp(-1) - others
        return self.nats + (odds * (1 / self.decoding.bias_temperature - 1))[:, None]

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows."""
        self.step, self.waiting = self.step[rows], self.waiting[rows]
        self.draws = self.draws[rows] if len(self.draws) else self.draws
        self.seen = self.seen[rows] if len(self.seen) else self.seen

    def join(self, others: "Sequence[Chooser]") -> None:
        """Go on with the rows of others behind the own."""
        for name in ("step", "waiting", "draws", "seen"):
            setattr(self, name, torch.cat([getattr(self, name), *(getattr(other, name) for other in others)]))


def sample(
    logits: Float[Tensor, "rows vocabulary"], draws: Float[Tensor, " rows"], top_p: float = 1.0
) -> Int[Tensor, " rows"]:
    """One token a row from the smallest set of tokens with probability `top_p` (nucleus sampling, arXiv 1904.09751).

    draws: uniform in [0, 1), one a row; the same draw and logits give the same token.
    >>> sample(torch.tensor([[0.0, 10.0], [10.0, 0.0]]), torch.tensor([0.5, 0.5])).tolist()
    [1, 0]
    """
    probability, order = logits.softmax(-1).sort(dim=-1, descending=True, stable=True)
    inside = probability.cumsum(-1) - probability < top_p
    cumulative = (probability * inside).cumsum(-1)
    target = draws[:, None] * cumulative[:, -1:]
    place = (cumulative <= target).sum(-1).clamp(max=inside.sum(-1) - 1)
    return order.gather(1, place[:, None]).squeeze(1)


def stopped(lm: LM, new: list[int], stop: tuple[str, ...]) -> bool:
    """Whether a stop string stands at the end of these tokens."""
    if not stop:
        return False
    # a token holds a byte or more (of a Chinese character a third), and a few may be without any
    reach = max(len(word.encode()) for word in stop) + 8
    tail = lm.tokenizer.decode(new[-reach:], skip_special_tokens=True)
    if any(word in tail for word in stop):
        return True
    special = [word for word in stop if any(token in word for token in lm.tokenizer.all_special_tokens)]
    return bool(special) and any(word in lm.tokenizer.decode(new[-reach:]) for word in special)
