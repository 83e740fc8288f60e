"""Batched text generation under interventions: a plain decode loop over transformers' caches.

Rows are independent: what a row gets does not depend on its neighbours in the batch, in greedy decoding, in sampling or
under its own interventions. Does not do beam search or speculative decoding; of a model's generation config only the
end tokens and the repetition penalty are followed, so greedy rows equal `model.generate(do_sample=False)` of each row
alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import psutil
import torch

from workbench.decode import Decoding, OnToken, Row, decode
from workbench.models import LM, ModelError
from workbench.placement import bytes_a_token
from workbench.turns import turn

if TYPE_CHECKING:
    from workbench.interventions import Intervention
    from workbench.interventions.session import Session

# Prompt and new tokens of one batch on a CPU: beyond that the cache leaves the processor's own memory. Where prompts
# come again and again (a grid), they are computed once, and what is left to do gains from more rows a step.
CPU_TOKENS, CPU_TOKENS_REPEATED = 16_384, 65_536


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a continuation comes from: the model, the prompt's token ids and what was changed, for looking closer."""

    lm: LM = field(repr=False)
    prompt: list[int]
    change: "Intervention | None"


@dataclass(frozen=True)
class Generation:
    """One row's continuation. token_ids keep the end token and a stop string's tokens, text leaves them out.

    seconds: the batch's time up to this row's last token, divided by the batch's rows. forward_passes: those this row
    took part in. origin: for `show_tokens`; none of other servers' answers.
    """

    text: str
    token_ids: list[int]
    tokens_in: int
    tokens_out: int
    seconds: float
    finished: bool
    forward_passes: int
    origin: "Origin | None" = field(default=None, repr=False, compare=False)


def generate(
    lm: LM,
    prompts: Sequence[str | list[dict[str, str]] | list[int]],
    interventions: "Intervention | Sequence[Intervention | None] | None" = None,
    decoding: Decoding | None = None,
    *,
    seed: int | Sequence[int] = 0,
    batch_size: int | None = None,
    limits: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Continue every prompt, in input order.

    prompts: finished strings (no tokens are added), chat messages or token ids. limits: new tokens of each row, where
    they differ; none above `decoding.max_new_tokens`. interventions: one for all rows, or a list with
    one (or None) a row; they come on top of those of an enclosing `lm.apply`. seed: one number (row i samples from a
    stream of its own, seed and i) or one a row. batch_size: rows a batch; None packs rows of similar length by a token
    budget. progress: called with rows done and rows in all. on_token: called after every step with the new token ids so
    far by row number (a batch for which memory runs out begins anew); an exception that it raises stops the generation
    and leaves the model as it was. Threads that share a model take turns.
    """
    with turn(lm):
        return _generate(
            lm, prompts, interventions, decoding or Decoding(), seed, batch_size, limits, progress, on_token
        )


def _generate(
    lm: LM,
    prompts: Sequence[str | list[dict[str, str]] | list[int]],
    interventions: "Intervention | Sequence[Intervention | None] | None",
    decoding: Decoding,
    seed: int | Sequence[int],
    batch_size: int | None,
    limits: Sequence[int] | None,
    progress: Callable[[int, int], None] | None,
    on_token: OnToken | None,
) -> list[Generation]:
    from workbench.interventions.session import Session, inherit

    if isinstance(prompts, str):
        raise ModelError("prompts is one string. Give a list of prompts: [prompt].")
    texts = [lm.encode(prompt) for prompt in prompts]
    wanted = inherit(lm, one_a_row(interventions, len(texts))) if texts else []
    if len(wanted) != len(texts):
        raise ModelError(f"The enclosing block holds interventions for {len(wanted)} rows; got {len(texts)} prompts.")
    seeds = _one_seed_a_row(seed, len(texts))
    own = _one_limit_a_row(limits, decoding, len(texts))
    _check_context(lm, texts, own)
    _check_bias(lm, decoding)
    results: dict[int, Generation] = {}
    for members in weight_groups(wanted):
        with (
            Session(lm, [wanted[row] for row in members], [len(texts[row]) for row in members]) as session,
            torch.no_grad(),
        ):
            rows = [Row(each, place, texts[each], seeds[each], own[each]) for place, each in enumerate(members)]
            for batch in _batches(rows, lm, decoding, batch_size):
                for done in _with_halving(lm, session, batch, decoding, on_token):
                    for row, one in done.items():
                        results[row] = replace(one, origin=Origin(lm, texts[row], wanted[row]))
                    if progress is not None:
                        progress(len(results), len(texts))
    return [results[row] for row in range(len(texts))]


def _one_seed_a_row(seed: int | Sequence[int], count: int) -> list[int]:
    if isinstance(seed, int):
        return [seed * 1_000_003 + row for row in range(count)]  # streams of neighbouring seeds do not meet
    if len(seed) != count:
        raise ModelError(f"{len(seed)} seeds for {count} prompts. Give one number, or one a prompt.")
    return list(seed)


def _one_limit_a_row(limits: Sequence[int] | None, decoding: Decoding, count: int) -> list[int]:
    if limits is None:
        return [decoding.max_new_tokens] * count
    if len(limits) != count or any(not 1 <= limit <= decoding.max_new_tokens for limit in limits):
        raise ModelError(
            f"{len(limits)} limits for {count} prompts, from {min(limits, default=0)} to {max(limits, default=0)} new "
            f"tokens. Give one a prompt, each at least 1 and at most {decoding.max_new_tokens}."
        )
    return list(limits)


def one_a_row(interventions: Any, count: int) -> "list[Intervention | None]":
    """Interventions as given by a caller, one (or None) for each of `count` rows."""
    from workbench.interventions import Intervention

    if interventions is None or isinstance(interventions, Intervention):
        return [interventions] * count
    rows = list(interventions)
    if not rows:
        return [None] * count
    wrong = next((row for row in rows if row is not None and not isinstance(row, Intervention)), None)
    if wrong is not None:
        raise ModelError(f"interventions holds a {type(wrong).__name__}; every entry is an intervention or None.")
    if len(rows) != count:
        raise ModelError(
            f"{len(rows)} interventions for {count} prompts. Give one for all (x, not [x]), or one (or None) a prompt."
        )
    return rows


def weight_groups(rows: "Sequence[Intervention | None]") -> list[list[int]]:
    """Row numbers that share their adapters and weight edits, which change the weights under a whole batch."""
    from workbench.interventions.session import weights_key

    groups: dict[tuple[Any, ...], list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(weights_key(row.parts if row is not None else ()), []).append(number)
    return list(groups.values())


def _check_context(lm: LM, texts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
    limit = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    pairs = [(len(text), new) for text, new in zip(texts, limits, strict=True)]
    longest, new = max(pairs, key=sum, default=(0, 0))
    if limit is not None and longest + new > limit:
        raise ModelError(
            f"The longest prompt has {longest} tokens; with max_new_tokens={new} that is more "
            f"than the {limit} positions of {lm.name!r}. Shorten the prompt (fewer shots) or ask for at most "
            f"{max(limit - longest, 0)} new tokens."
        )


def _check_bias(lm: LM, decoding: Decoding) -> None:
    size = lm.model.config.get_text_config().vocab_size
    wrong = [token for token in decoding.bias if not 0 <= token < size]
    if wrong:
        raise ModelError(f"bias names token {wrong[0]}, and {lm.name!r} has the tokens 0 to {size - 1}.")


def _batches(rows: Sequence[Row], lm: LM, decoding: Decoding, batch_size: int | None) -> Iterator[list[Row]]:
    """Rows of similar length together, equal prompts side by side; longest first: memory runs out early or never."""
    order = sorted(rows, key=lambda row: (-len(row.prompt), row.prompt))
    repeated = 2 * len({tuple(row.prompt) for row in rows}) <= len(rows)
    budget = token_budget(lm, CPU_TOKENS_REPEATED if repeated else CPU_TOKENS)
    while order:
        size = batch_size or max(1, budget // (len(order[0].prompt) + decoding.max_new_tokens))
        yield order[:size]
        order = order[size:]


def token_budget(lm: LM, most_on_cpu: int) -> int:
    """Tokens of cache that a batch may fill: a constant on a CPU, half of the free memory on a GPU."""
    size = bytes_a_token(lm)
    if lm.device.type != "cuda":
        return min(most_on_cpu, max(1, psutil.virtual_memory().available // 4 // size))
    free = torch.cuda.mem_get_info(lm.device)[0]
    return max(1, free // 4 // size)  # a step holds two copies of a layer's cache, prefill its activations


def _with_halving(
    lm: LM, session: "Session", batch: list[Row], decoding: Decoding, on_token: OnToken | None
) -> Iterator[dict[int, Generation]]:
    """Run a batch; when memory runs out, run its halves instead."""
    waiting = [batch]
    while waiting:
        rows = waiting.pop(0)
        failed = False
        try:
            decode(lm, session, rows, decoding, on_token)
        except (torch.OutOfMemoryError, MemoryError):
            if len(rows) == 1:
                raise ModelError(
                    f"Out of memory on a single prompt of {len(rows[0].prompt)} tokens. Ask for fewer new tokens, or "
                    "quantization='nf4'."
                ) from None
            failed = True  # halve outside of the except block: the traceback keeps the batch's tensors alive
        if failed:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            half = len(rows) // 2
            waiting = [rows[:half], rows[half:], *waiting]
            continue
        yield {row.number: _finish(lm, row, decoding) for row in rows}


def _finish(lm: LM, row: Row, decoding: Decoding) -> Generation:
    text = lm.tokenizer.decode(row.new, skip_special_tokens=True)
    for word in decoding.stop:
        text = text.split(word, 1)[0]
    return Generation(text, row.new, len(row.prompt), len(row.new), row.seconds, row.finished, row.passes)
