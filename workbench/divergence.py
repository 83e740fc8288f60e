"""Measure what an intervention damages: KL from the plain model on the plain model's own answers, bits, repetition.

KL(plain || changed) is in nats a token: both models score the same tokens, the plain model's greedy answers. Does not
measure behaviour (see `grid` and `evaluation`) and chooses nothing (see `calibration`). The plain log-probabilities
are kept in memory: prompts x new tokens x vocabulary x 4 bytes.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.interventions import Intervention
from workbench.models import LM, ModelError, takes_last_only
from workbench.statistics import Interval, bootstrap_mean

CANDIDATES = 4  # changes that one forward has room for
LOGITS = 2**26  # of one forward: 256 MB in float32
TOKENS = 16_384  # of one forward
WORST = 1e4  # nats; stands for an infinite or undefined KL, so that percentiles stay numbers
RESAMPLES = 1000


def damage(
    lm: LM,
    x: Intervention,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    max_new_tokens: int = 64,
    texts: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> dict[str, Interval]:
    """What `x` costs, each number with its 95 % bootstrap interval over prompts (or texts).

    kl, kl_p95: mean and 95th percentile over tokens of KL(plain || x), in nats a token, on the plain model's greedy
    answers. repetition, repetition_plain: share of 4-grams of token ids that occurred before in the same answer, in
    x's own and in the plain model's greedy answers. With `texts` (ordinary ones, four tokens or more), bits and
    bits_plain: bits a token on the second half of each text; the first half stands for the prompt, so that every span
    and a KV edit have their place. Perplexity is 2 to their power. bits_added: their difference, paired by token.
    """
    plain = PlainAnswers.of(lm, prompts, max_new_tokens, batch_size)
    return damage_beside(plain, x, prompts, max_new_tokens=max_new_tokens, texts=texts, batch_size=batch_size)


def damage_beside(
    plain: "PlainAnswers",
    x: Intervention,
    prompts: Sequence[str | list[dict[str, str]]],
    *,
    max_new_tokens: int = 64,
    texts: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> dict[str, Interval]:
    """`damage`, with the plain answers to `prompts` at hand: for several interventions one after the other."""
    lm, costs = plain.lm, plain.kl([x])[0]
    own = lm.generate(prompts, x, max_new_tokens, batch_size=batch_size)
    found = {"kl": _over_prompts(costs), "kl_p95": _percentile_over_prompts(costs, 95)}
    found["repetition"] = bootstrap_mean([repeated(answer.token_ids) for answer in own])
    found["repetition_plain"] = bootstrap_mean([repeated(answer) for answer in plain.answers])
    if texts is not None:
        halves = [_halved(lm, text) for text in texts]
        reading = PlainAnswers(lm, [first for first, _ in halves], [second for _, second in halves], batch_size)
        changed, untouched = reading.bits(x), reading.bits(None)
        found |= {"bits": _over_prompts(changed), "bits_plain": _over_prompts(untouched)}
        found["bits_added"] = _over_prompts([new - old for new, old in zip(changed, untouched, strict=True)])
    return found


@dataclass
class _Batch:
    """Prompts, ending in one column, and answers behind them: left and right padding. The last token is left out,
    because nothing is read from its state.
    """

    numbers: list[int]
    lengths: list[int]
    ids: Int[Tensor, "rows seq"]
    mask: Int[Tensor, "rows seq"]
    wanted: Bool[Tensor, "rows new"]
    targets: Int[Tensor, " tokens"]
    plain: Float[Tensor, "tokens vocab"] | None = None


class PlainAnswers:
    """Texts to be scored: prompts and what follows each, with the plain model's log-probabilities once computed."""

    def __init__(
        self, lm: LM, prompts: Sequence[list[int]], answers: Sequence[list[int]], batch_size: int | None
    ) -> None:
        self.lm, self.prompts, self.answers = lm, prompts, answers
        self.batches: list[_Batch] = []
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        vocabulary = lm.model.config.get_text_config().vocab_size
        while order:
            width, new = len(prompts[order[0]]), max(map(len, answers))
            fitting = min(LOGITS // (CANDIDATES * new * vocabulary), TOKENS // (CANDIDATES * (width + new)))
            size = batch_size or max(1, fitting)
            self.batches.append(self._batch(order[:size]))
            order = order[size:]

    @classmethod
    def of(
        cls, lm: LM, prompts: Sequence[str | list[dict[str, str]]], max_new_tokens: int, batch_size: int | None
    ) -> "PlainAnswers":
        """The prompts and the plain model's own greedy answers."""
        if not prompts or isinstance(prompts, str):
            raise ModelError("prompts is a list of at least one prompt, from a tuning split: [prompt].")
        answers = lm.generate(prompts, None, max_new_tokens, batch_size=batch_size)
        return cls(lm, [lm.encode(prompt) for prompt in prompts], [answer.token_ids for answer in answers], batch_size)

    def _batch(self, numbers: list[int]) -> _Batch:
        prompts, answers = ([side[number] for number in numbers] for side in (self.prompts, self.answers))
        left, right = max(map(len, prompts)), max(map(len, answers))
        ids = torch.full((len(numbers), left + right), self.lm.tokenizer.pad_token_id or 0)
        mask = torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            place = slice(left - len(prompt), left + len(answer))
            ids[row, place], mask[row, place] = torch.tensor(prompt + answer), 1
        wanted = mask[:, left:] > 0
        device = self.lm.device
        tensors = (ids[:, :-1], mask[:, :-1], wanted, ids[:, left:][wanted])
        return _Batch(numbers, list(map(len, prompts)), *(tensor.to(device) for tensor in tensors))

    def kl(self, changes: Sequence[Intervention]) -> list[list[np.ndarray]]:
        """KL(plain || changed) of every token, by change and prompt, in nats. All changes share each forward."""
        found: list[list[np.ndarray]] = [[np.empty(0)] * len(self.prompts) for _ in changes]
        for batch in self.batches:
            if batch.plain is None:
                batch.plain = self._score(batch, [None])[0]
            for costs, changed in zip(found, self._score(batch, changes), strict=True):
                self._share_out(batch, divergence(batch.plain, changed), costs)
        return found

    def bits(self, x: Intervention | None) -> list[np.ndarray]:
        """Bits of every token that follows its prompt, by text."""
        found = [np.empty(0)] * len(self.prompts)
        for batch in self.batches:
            scores = self._score(batch, [x])[0].gather(1, batch.targets[:, None])[:, 0]
            self._share_out(batch, -scores / math.log(2), found)
        return found

    def _score(self, batch: _Batch, changes: Sequence[Intervention | None]) -> Float[Tensor, "changes tokens vocab"]:
        """Log-probabilities at every answer token, under each change, in one forward."""
        copies, new = len(changes), batch.wanted.shape[1]
        mask = batch.mask.repeat(copies, 1)
        rows = [change for change in changes for _ in batch.lengths]
        keep = {"logits_to_keep": new} if takes_last_only(self.lm) else {}
        with self.lm.apply(rows, prompt_lengths=batch.lengths * copies), torch.no_grad():
            logits = self.lm.model(
                input_ids=batch.ids.repeat(copies, 1),
                attention_mask=None if mask.all() else mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
                **keep,
            ).logits[:, -new:]
        chosen = logits.unflatten(0, (copies, -1))[:, batch.wanted]
        return chosen.float().log_softmax(-1)

    def log_probabilities(self, changes: Sequence[Intervention | None]) -> list[Float[Tensor, "changes tokens vocab"]]:
        """Of every token that could have stood at each place of an answer, under each change; by prompt, in nats."""
        found: dict[int, Tensor] = {}
        for batch in self.batches:
            parts = self._score(batch, changes).split(batch.wanted.sum(1).tolist(), dim=1)
            found.update(zip(batch.numbers, parts, strict=True))
        return [found[number] for number in range(len(self.prompts))]

    def token_scores(self, x: Intervention | None) -> list["TokenScores"]:
        """How sure the changed model (None: the plain one) is at every answer token, by prompt."""
        found: list[list[np.ndarray]] = [[np.empty(0)] * len(self.prompts) for _ in range(4)]
        for batch in self.batches:
            said = self._score(batch, [x])[0]
            chosen = said.gather(1, batch.targets[:, None])[:, 0]
            best = said.topk(2).values.exp()
            entropy = torch.special.entr(said.exp()).sum(-1)  # 0 where a token has no probability
            certainty = -said.mean(-1) - math.log(said.shape[-1])
            for values, kept in zip((chosen, entropy, best[:, 0] - best[:, 1], certainty), found, strict=True):
                self._share_out(batch, values, kept)
        return [TokenScores(*each) for each in zip(*found, strict=True)]

    @staticmethod
    def _share_out(batch: _Batch, values: Float[Tensor, " tokens"], found: list[np.ndarray]) -> None:
        parts = values.cpu().double().split(batch.wanted.sum(1).tolist())
        for number, part in zip(batch.numbers, parts, strict=True):
            found[number] = part.numpy()


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Of every token of a text: its log-probability, the entropy of what could have stood there, how much probability
    lay between the two likeliest tokens, and KL(uniform || next token); all but the margin in nats.
    """

    logprobs: Float[np.ndarray, " tokens"]
    entropy: Float[np.ndarray, " tokens"]
    margin: Float[np.ndarray, " tokens"]
    certainty: Float[np.ndarray, " tokens"]


def divergence(
    plain: Float[Tensor, "tokens vocab"], changed: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    """KL(plain || changed) in nats, from log-probabilities; what the plain model rules out costs nothing."""
    share = plain.exp()
    kl = torch.where(share > 0, share * (plain - changed), 0.0).sum(-1)
    return kl.nan_to_num(nan=WORST, posinf=WORST).clamp(0, WORST)


def repeated(items: Sequence[Hashable], size: int = 4) -> float:
    """Share of runs of `size` tokens (or words) that occurred before in the same text; 0 where there are none.

    >>> repeated([1, 2, 3, 4, 1, 2, 3, 4])
    0.19999999999999996
    """
    grams = [tuple(items[start : start + size]) for start in range(len(items) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _halved(lm: LM, text: str) -> tuple[list[int], list[int]]:
    ids = lm.encode(text)
    if len(ids) < 4:
        raise ModelError(f"The text {text!r} has {len(ids)} tokens; four or more are needed to read its second half.")
    return ids[: len(ids) // 2], ids[len(ids) // 2 :]


def _over_prompts(values: Sequence[np.ndarray]) -> Interval:
    owners = np.repeat(np.arange(len(values)), list(map(len, values)))
    return bootstrap_mean(np.concatenate(values), clusters=owners.tolist())


def _percentile_over_prompts(values: Sequence[np.ndarray], percentile: float) -> Interval:
    """Percentile over all tokens; whole prompts are drawn, because the tokens of one answer go together."""
    everything = np.concatenate(values)
    estimate, n = float(np.percentile(everything, percentile)), len(everything)
    if len(values) == 1:
        return Interval(estimate, math.nan, math.nan, n, "one prompt: its spread cannot be known")
    rng = np.random.default_rng(0)
    drawn = [
        np.percentile(np.concatenate([values[pick] for pick in rng.integers(0, len(values), len(values))]), percentile)
        for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(estimate, float(low), float(high), n)
