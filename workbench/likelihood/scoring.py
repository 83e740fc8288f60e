"""Log-likelihoods of continuations under interventions, one a row if wanted; every distinct prefix is run once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from workbench.generate import one_a_row, weight_groups
from workbench.interventions.concept import Intervention
from workbench.interventions.session import Session, inherit
from workbench.likelihood.engine import Walk, Wanted
from workbench.likelihood.requests import Encoded, Request, encode_requests, longest_input
from workbench.likelihood.sharing import Keys, can_share, layout
from workbench.likelihood.tree import grow
from workbench.models import LM, ModelError
from workbench.turns import in_turn

PLACES = 4  # decimals of a log-probability that count in a comparison; float32 sums differ by less between batches


@dataclass(frozen=True)
class Scored:
    """One request: log p(continuation | context), in nats.

    token_logprobs: of each token, in order. greedy: whether each is the most likely one. characters, bytes: length of
    the continuation's text as it was given, in characters and in UTF-8. context_tokens: tokens it stood behind.
    """

    logprob: float
    token_logprobs: tuple[float, ...]
    greedy: bool
    tokens: int
    bytes: int
    characters: int
    context_tokens: int = 0


@in_turn
def loglikelihoods(
    lm: LM,
    requests: Sequence[Request],
    interventions: Intervention | Sequence[Intervention | None] | None = None,
    *,
    special: bool | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Scored]:
    """Score every request, in input order; see `Scored`.

    requests: pairs of context and continuation, as two strings (tokenized as lm-evaluation-harness does; an empty
    context is the token that begins texts) or two lists of token ids. What is too long for the model loses tokens on
    the left. special: whether tokenizing adds the tokenizer's special tokens; None leaves it to the tokenizer, False is
    for prompts that `lm.render` has finished. interventions: one for all requests, or one (or None) a request, on top
    of those of an enclosing `lm.apply`; the context is the prompt, the continuation counts as generated. batch_size:
    rows a forward at most; None fills forwards by a token budget. progress: called with requests done and requests in
    all.

    Scores do not depend on the batch size or on other requests, in float32 to about 1e-5.

    >>> from workbench import load_model
    >>> one, = loglikelihoods(load_model("lab"), [("Answer:", " 12")])
    >>> one.tokens == len(one.token_logprobs) and one.logprob < 0
    True
    """
    if isinstance(requests, str):  # type: ignore[unreachable]  # which the annotation forbids, but people do
        raise ModelError("requests is one string. Give a list of pairs: [(context, continuation)].")
    encoded = [_cut(lm, each) for each in encode_requests(lm, requests, special)]
    wanted = inherit(lm, one_a_row(interventions, len(encoded))) if encoded else []
    if len(wanted) != len(encoded):
        raise ModelError(
            f"The enclosing block holds interventions for {len(wanted)} rows; got {len(encoded)} requests."
        )
    if batch_size is not None and batch_size < 1:
        raise ModelError(f"batch_size={batch_size}: rows of one forward, at least 1; or None.")
    found: list[Scored | None] = [None] * len(encoded)
    finished = 0

    def done(count: int) -> None:
        nonlocal finished
        finished += count
        if progress is not None:
            progress(finished, len(encoded))

    how = layout(lm)
    for members in weight_groups(wanted):
        for shared in (True, False):
            chosen = [number for number in members if (can_share(wanted[number]) and how != "none") == shared]
            if chosen:
                _run(lm, encoded, wanted, chosen, how, shared, batch_size, done, found)
    return [each for each in found if each is not None]


def _cut(lm: LM, each: Encoded) -> Encoded:
    """The last tokens that the model has positions for; the very last one is never read."""
    limit = longest_input(lm)
    if len(each.continuation) > limit:
        raise ModelError(
            f"A continuation of {len(each.continuation)} tokens is more than the {limit} positions of {lm.name!r}. "
            "Measure long texts with workbench.likelihood.perplexity, which rolls over them."
        )
    over = len(each.context) + len(each.continuation) - (limit + 1)
    return Encoded(each.context[over:], each.continuation, each.text) if over > 0 else each


def _run(
    lm: LM,
    encoded: Sequence[Encoded],
    interventions: Sequence[Intervention | None],
    members: Sequence[int],
    how: str,
    shared: bool,
    batch_size: int | None,
    done: Callable[[int], None],
    found: list[Any],
) -> None:
    """Requests whose weights are changed in one way."""
    keys = Keys()
    inputs = [encoded[number].context + encoded[number].continuation[:-1] for number in members]
    marked = [
        keys.of(tokens, len(encoded[number].context), interventions[number])
        for tokens, number in zip(inputs, members, strict=True)
    ]
    names = [each.astype(">i8").tobytes() for each in marked]  # big-endian bytes sort as the numbers do
    order = sorted(range(len(members)), key=names.__getitem__)
    distinct = [place for at, place in enumerate(order) if not at or names[place] != names[order[at - 1]]]
    row_of = {names[place]: row for row, place in enumerate(distinct)}
    ordered = [members[place] for place in order]
    wanted = Wanted(
        places=np.array(order),
        rows=np.array([row_of[names[place]] for place in order]),
        prompts=np.array([len(encoded[number].context) for number in ordered]),
        ends=np.array([len(encoded[number].context) + len(encoded[number].continuation) for number in ordered]),
        targets=np.concatenate([np.array(encoded[number].continuation) for number in ordered]),
        kinds=_kinds([(interventions[number], len(encoded[number].context)) for number in ordered]),
    )
    rows = [np.array(inputs[place]) for place in distinct]
    session = Session(lm, [interventions[number] for number in members], [len(encoded[n].context) for n in members])
    with session, torch.no_grad():
        walk = Walk(lm, session, rows, wanted, how, batch_size, done)
        if not shared or session.companions.plans or session.edits or session.gates:
            walk.alone()
        else:
            walk.down(grow([marked[place] for place in distinct]))
    for place, number in enumerate(ordered):
        own = slice(wanted.offsets[place], wanted.offsets[place] + len(encoded[number].continuation))
        scores = wanted.scores[own]
        text = encoded[number].text
        found[number] = Scored(
            float(scores.sum()), tuple(scores.tolist()), bool(wanted.hits[own].all()), len(scores),
            len(text.encode()), len(text), len(encoded[number].context),
        )  # fmt: skip


def _kinds(rows: Sequence[tuple[Intervention | None, int]]) -> list[int]:
    """Equal numbers for equal interventions on contexts of equal length: spans fall on the same positions."""
    numbers: dict[tuple[int, ...], int] = {}
    return [
        numbers.setdefault((prompt, *map(id, row.parts)) if row is not None else (), len(numbers))
        for row, prompt in rows
    ]
