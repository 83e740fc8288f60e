"""The decode loop of one batch: prefill with left padding, then one token a row and step, until every row is finished.

`generate` sorts prompts into batches and calls this; nothing here knows about prompts as text beyond stop strings.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from workbench.cache import GrowingLayer, new_cache
from workbench.interventions.session import Session
from workbench.models import LM, ModelError, end_tokens, takes_last_only

SHARED_PREFIX = 16  # shorter common beginnings are not worth a forward of their own
OnToken = Callable[[dict[int, list[int]]], None]  # new tokens so far, by number of the row
COMPACT_BELOW = 0.75  # share of rows still running at which finished ones leave the batch, which copies the cache


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


@dataclass
class _State:
    """Tensors of the running rows; `mask` is None while nothing is padded, which is quicker."""

    ids: Int[Tensor, "rows seq"]
    places: Int[Tensor, "rows seq"]
    mask: Int[Tensor, "rows total"] | None
    cache: DynamicCache

    def advance(self, token: Int[Tensor, " rows"]) -> None:
        self.ids, self.places = token[:, None], self.places[:, -1:] + 1
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], dim=1)

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        self.ids, self.places = self.ids[rows], self.places[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        self.cache.reorder_cache(rows)  # unlike batch_select_indices, linear-attention layers know it


def decode(
    lm: LM,
    session: Session,
    rows: Sequence[Row],
    decoding: Decoding,
    on_token: OnToken | None = None,
) -> None:
    """Fill in `new`, `finished`, `seconds` and `passes` of every row; `on_token` hears of every step."""
    start, total = time.perf_counter(), len(rows)
    for row in rows:
        row.new, row.finished, row.passes = [], False, 0
    session.begin([row.place for row in rows])
    chooser = _Chooser(lm, rows, decoding)
    state, shared = _start(lm, session, rows)
    extra = {"logits_to_keep": 1} if takes_last_only(lm) else {}
    # an edit of the cache runs the prompt in two parts
    passes = 1 + shared + bool(session.kv or session.edits) + bool(session.gates)
    running = list(rows)
    for step in range(decoding.max_new_tokens):
        output = lm.model(
            input_ids=state.ids,
            attention_mask=state.mask,
            position_ids=state.places,
            past_key_values=state.cache,
            use_cache=True,
            **extra,
        )
        token = chooser.choose(output.logits[:, -1].float(), step)
        seconds = (time.perf_counter() - start) / total
        for row, number in zip(running, token.tolist(), strict=True):
            if not row.over:
                row.new.append(number)
                row.finished = number in chooser.ends or _stopped(lm, row.new, decoding.stop)
                row.passes, row.seconds = (passes + step) * (1 + len(session.companions.models)), seconds
        if on_token is not None:
            on_token({row.number: row.new for row in running})
        kept = [place for place, row in enumerate(running) if not row.over]
        if not kept:
            return
        state.advance(token)
        if len(kept) <= COMPACT_BELOW * len(running):
            chosen = torch.tensor(kept, device=lm.device)
            running = [running[place] for place in kept]
            session.companions.keep(state.cache, chosen)
            state.keep(chosen)
            chooser.keep(chosen)
            session.select([row.place for row in running])


def _start(lm: LM, session: Session, rows: Sequence[Row]) -> tuple[_State, int]:
    """The first forward's tensors, and how many forwards went before it for what rows share.

    A common beginning is computed once for all rows, and a prompt that several rows have (a grid of strengths, samples)
    once for those rows, up to its last two tokens: a KV edit and the `last` span fall on them.
    """
    prompts = [row.prompt for row in rows]
    cache = new_cache(lm)
    shares = len(rows) > 1 and _may_share(lm, session, cache)
    prefix = _common_length(prompts, session) if shares else 0
    width = max(map(len, prompts)) - prefix
    ids = torch.full((len(rows), width), lm.tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for number, prompt in enumerate(prompts):
        rest = prompt[prefix:]
        ids[number, width - len(rest) :] = torch.tensor(rest)
        mask[number, width - len(rest) :] = 1
    places = ((mask.cumsum(1) - 1).clamp(min=0) + prefix).to(lm.device)
    full = torch.cat([torch.ones(len(rows), prefix, dtype=torch.long), mask], dim=1).to(lm.device)
    ids, padded = ids.to(lm.device), not bool(mask.all())
    first = {tuple(prompt): number for number, prompt in reversed(list(enumerate(prompts)))}
    repeated = shares and width > 2 and 2 * len(first) <= len(rows)
    session.paused = True
    try:
        if prefix:
            start = torch.tensor([prompts[0][:prefix]], device=lm.device)
            lm.base(input_ids=start, past_key_values=cache, use_cache=True)
            cache.batch_repeat_interleave(len(first) if repeated else len(rows))
        if repeated:
            one = torch.tensor(list(first.values()), device=lm.device)
            lm.base(
                input_ids=ids[one, :-2],
                attention_mask=full[one, :-2] if padded else None,
                position_ids=places[one, :-2],
                past_key_values=cache,
                use_cache=True,
            )
            order = {prompt: number for number, prompt in enumerate(first)}
            cache.batch_select_indices(torch.tensor([order[tuple(p)] for p in prompts], device=lm.device))
            ids, places = ids[:, -2:], places[:, -2:]
    finally:
        session.paused = False
    return _State(ids, places, full if padded else None, cache), bool(prefix) + repeated


def _may_share(lm: LM, session: Session, cache: DynamicCache) -> bool:
    """Whether rows may have the beginning of their prompts computed together: exact only if nothing intervenes on it.

    Sliding caches count columns, padding included, and rotary variants that depend on the length change with it:
    neither is shared. Other models read the whole prompt too, and so does a gate.
    """
    if (
        not session.edits.shares
        or session.companions.plans
        or session.gates
        or any(s not in ("last", "generated") for s in session.spans)
    ):
        return False
    rope = getattr(lm.model.config.get_text_config(), "rope_parameters", None) or {}
    plain = all(isinstance(layer, GrowingLayer) for layer in cache.layers)
    return plain and rope.get("rope_type", "default") not in ("dynamic", "longrope")


def _common_length(prompts: Sequence[Sequence[int]], session: Session) -> int:
    """Tokens that all prompts begin with; 0 where they are too few to be worth a forward.

    Padding stands behind them, so that what edits count back from the end of the prompt stays out of them; other cache
    edits take any token, and then there may be no padding.
    """
    reach = max([2, *(-plan.position for plan in session.kv)])
    first, most = prompts[0], min(map(len, prompts)) - reach
    if session.edits and len({len(prompt) for prompt in prompts}) > 1:
        return 0
    shared = 0
    while shared < most and all(prompt[shared] == first[shared] for prompt in prompts):
        shared += 1
    return shared if shared >= SHARED_PREFIX else 0


class _Chooser:
    """Next tokens of the running rows, and which of them end a row."""

    def __init__(self, lm: LM, rows: Sequence[Row], decoding: Decoding) -> None:
        self.decoding = decoding
        self.ends = end_tokens(lm)
        self.draws = torch.empty(0)
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

    def choose(self, logits: Float[Tensor, "rows vocabulary"], step: int) -> Int[Tensor, " rows"]:
        if self.penalty != 1.0:  # CTRL, arXiv 1909.05858, as transformers applies it
            logits = torch.where(
                self.seen, torch.where(logits > 0, logits / self.penalty, logits * self.penalty), logits
            )
        if len(self.biased):
            logits = logits.index_add(1, self.biased, self.waiting * self._moves(logits))
        if self.decoding.temperature == 0:
            token = logits.argmax(-1)
        else:
            token = sample(logits / self.decoding.temperature, self.draws[:, step], self.decoding.top_p)
        if len(self.biased):
            self.waiting = self.waiting * ~torch.isin(token, self.biased)[:, None]
        if self.penalty != 1.0:
            self.seen.scatter_(1, token[:, None], True)
        return token

    def _moves(self, logits: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows biased"]:
        """Nats to add to the biased tokens: the bias, and what brings their joint odds to `bias_temperature`."""
        if self.decoding.bias_temperature == 1.0:
            return self.nats.expand(len(logits), -1)
        others = logits.index_fill(1, self.biased, -math.inf).logsumexp(-1)
        odds = logits[:, self.biased].logsumexp(-1) - others
        return self.nats + (odds * (1 / self.decoding.bias_temperature - 1))[:, None]

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        if len(self.draws):
            self.draws = self.draws[rows]
        if len(self.biased):
            self.waiting = self.waiting[rows]
        if len(self.seen):
            self.seen = self.seen[rows]


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


def _stopped(lm: LM, new: list[int], stop: tuple[str, ...]) -> bool:
    if not stop:
        return False
    # a token holds a byte or more (of a Chinese character a third), and a few may be without any
    reach = max(len(word.encode()) for word in stop) + 8
    tail = lm.tokenizer.decode(new[-reach:], skip_special_tokens=True)
    if any(word in tail for word in stop):
        return True
    special = [word for word in stop if any(token in word for token in lm.tokenizer.all_special_tokens)]
    return bool(special) and any(word in lm.tokenizer.decode(new[-reach:]) for word in special)
