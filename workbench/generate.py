"""Batched text generation under interventions: a plain decode loop over transformers' caches.

Rows are independent: what a row gets does not depend on its neighbours in the batch, in greedy decoding, in sampling or
under its own interventions. Does not do beam search or speculative decoding; of a model's generation config only the
end tokens and the repetition penalty are followed, so greedy rows equal `model.generate(do_sample=False)` of each row
alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import psutil
import torch

from workbench.choosing import Decoding, Row
from workbench.decode import OnToken, decode
from workbench.models import LM, ModelError
from workbench.placement import bytes_a_token
from workbench.prefill import may_join
from workbench.turns import turn

if TYPE_CHECKING:
    from workbench.interventions import Intervention
    from workbench.interventions.session import Session

# Prompt and new tokens of one batch on a CPU: beyond that the cache leaves the processor's own memory. Where prompts
# come again and again (a grid), they are computed once, and what is left to do gains from more rows a step.
CPU_TOKENS, CPU_TOKENS_REPEATED = 16_384, 65_536
JOIN_BELOW = (
    0.75  # share of a batch's places that are taken at which others join: reading few prompts at a time is slow
)


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a continuation comes from: the model, the prompt's token ids and what was changed, for looking closer."""

    lm: LM = field(repr=False)
    prompt: list[int]
    change: "Intervention | None"


@dataclass(frozen=True)
class Generation:
    """One row's continuation. token_ids keep the end token and a stop string's tokens, text leaves them out.

    seconds: its share of the time of every step that it took part in; all rows' together are the whole time.
    forward_passes: those this row took part in. origin: for `show_tokens`; none of other servers' answers.
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
    far by row number (rows for which memory runs out begin anew); an exception that it raises stops the generation
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
    _check_memory(lm, texts, own)
    _check_bias(lm, decoding)
    results: dict[int, Generation] = {}

    def settle(rows: Sequence[Row]) -> None:
        for row in rows:
            origin = Origin(lm, texts[row.number], wanted[row.number])
            results[row.number] = replace(_as_generation(lm, row, decoding), origin=origin)
        if progress is not None and rows:
            progress(len(results), len(texts))

    for members in weight_groups(wanted):
        with (
            Session(lm, [wanted[row] for row in members], [len(texts[row]) for row in members]) as session,
            torch.no_grad(),
        ):
            rows = [Row(each, place, texts[each], seeds[each], own[each]) for place, each in enumerate(members)]
            _run(Waiting(rows, session, decoding, batch_size), lm, session, decoding, on_token, settle)
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
    from workbench.interventions.shared_weights import weights_key

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


def _check_memory(lm: LM, texts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
    """Refuse a row that can't fit alone; a CPU's memory ends with the process killed, a GPU's with an error."""
    if lm.device.type == "cuda" or not texts:
        return
    prompt, new = max(((len(text), limit) for text, limit in zip(texts, limits, strict=True)), key=sum)
    needed, free = (prompt + new) * bytes_a_token(lm), psutil.virtual_memory().available
    if needed > free:
        raise ModelError(
            f"A prompt of {prompt} tokens and {new} new ones need a cache of about {needed:,} bytes, more than the "
            f"{free:,} that are free. Ask for at most {max(0, free // bytes_a_token(lm) - prompt):,} new tokens."
        )


def token_budget(lm: LM, most_on_cpu: int) -> int:
    """Tokens of cache that a batch may fill: a constant on a CPU, half of the free memory on a GPU."""
    size = bytes_a_token(lm)
    if lm.device.type != "cuda":
        return min(most_on_cpu, max(1, psutil.virtual_memory().available // 4 // size))
    free = torch.cuda.mem_get_info(lm.device)[0]
    return max(1, free // 4 // size)  # a step holds two copies of a layer's cache, prefill its activations


class Waiting:
    """Rows of similar length together, equal prompts side by side.

    Where others join, the shortest come first: what those before them have written makes up for it, and a batch's rows
    stay of similar length. Else the longest do: memory runs out early or never.
    """

    def __init__(self, rows: Sequence[Row], session: "Session", decoding: Decoding, batch_size: int | None) -> None:
        lm, sign = session.lm, 1 if may_join(session) else -1
        self.rows = sorted(rows, key=lambda row: (sign * len(row.prompt), row.prompt))
        self.most, self.fixed, self.new = len(rows), batch_size, decoding.max_new_tokens
        repeated = 2 * len({tuple(row.prompt) for row in rows}) <= len(rows)
        self.budget = token_budget(lm, CPU_TOKENS_REPEATED if repeated else CPU_TOKENS)

    def take(self, running: Sequence[Row] = ()) -> list[Row]:
        """The rows that begin next to those that are running: none while too few places are free."""
        longest, free, size = max((len(row.prompt) for row in running), default=0), 0, 0
        for row in self.rows:
            longest = max(longest, len(row.prompt))
            size = min(self.most, self.fixed or max(1, self.budget // (longest + self.new)))
            if len(running) + free >= size:
                break
            free += 1
        if running and len(running) > JOIN_BELOW * size:
            return []
        taken, self.rows = self.rows[:free], self.rows[free:]
        return taken

    def again(self, rows: list[Row]) -> None:
        """Rows for which memory ran out begin anew, half as many at a time from now on."""
        self.most = max(1, len(rows) // 2)
        self.rows = rows + self.rows


def _run(
    waiting: Waiting,
    lm: LM,
    session: "Session",
    decoding: Decoding,
    on_token: OnToken | None,
    settle: Callable[[Sequence[Row]], None],
) -> None:
    """Tell of every row once it is done; when memory runs out, those that are not begin anew, half as many at once."""
    from workbench.finetuning.microbatch import is_out_of_memory

    while waiting.rows:
        begun = waiting.take()
        left = {row.number: row for row in begun}

        def more(running: list[Row], left: dict[int, Row] = left) -> list[Row]:
            taken = waiting.take(running)
            left.update({row.number: row for row in taken})
            return taken

        def done(rows: list[Row], left: dict[int, Row] = left) -> None:
            settle([left.pop(row.number) for row in rows])

        failed = False
        try:
            decode(lm, session, begun, decoding, on_token, more=more, done=done)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failed = True  # go on outside of the except block: the traceback keeps the batch's tensors alive
        if failed:
            done([row for row in left.values() if row.over])
            if len(left) == 1:
                size = len(next(iter(left.values())).prompt)
                raise ModelError(
                    f"Out of memory on a single prompt of {size} tokens. Ask for fewer new tokens, or "
                    "quantization='nf4'."
                )
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            waiting.again([*left.values()])


def _as_generation(lm: LM, row: Row, decoding: Decoding) -> Generation:
    text = lm.tokenizer.decode(row.new, skip_special_tokens=True)
    for word in decoding.stop:
        text = text.split(word, 1)[0]
    return Generation(text, row.new, len(row.prompt), len(row.new), row.seconds, row.finished, row.passes)
