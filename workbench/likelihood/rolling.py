"""Perplexity of whole texts: every token is scored once, behind as many tokens as a window holds.

Windows are those of lm-evaluation-harness 0.4 (a stride of the window's whole length; the last one reaches back over
scored tokens, so that it is full), and so are the three measures (nats a word, a byte; bits a byte). Does not strip or
detokenize texts.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from workbench.interventions.concept import Intervention
from workbench.likelihood.requests import encode_texts, longest_input, prefix_token
from workbench.likelihood.scoring import loglikelihoods
from workbench.models import LM, ModelError
from workbench.statistics import Interval
from workbench.turns import in_turn

RESAMPLES = 10_000
Window = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Document:
    """One text: nats is minus the sum of its tokens' log-probabilities; words are what white space divides."""

    nats: float
    tokens: int
    bytes: int
    words: int


@dataclass(frozen=True)
class Perplexity:
    """Measures over all texts together (sums of nats by sums of lengths), with bootstrap intervals over texts."""

    documents: tuple[Document, ...]
    word_perplexity: Interval
    byte_perplexity: Interval
    bits_per_byte: Interval


def windows(tokens: Sequence[int], prefix: int, size: int) -> Iterator[Window]:
    """Context and continuation of every window of `size` tokens; the first one's context is the prefix token.

    >>> list(windows([1, 2, 3, 4, 5], 0, 3))
    [([0], [1, 2, 3]), ([2, 3], [4, 5])]
    """
    line = [prefix, *tokens]
    for start in range(0, len(tokens), size):
        stop = min(start + size, len(tokens))
        yield line[max(0, stop - size) : start + 1], line[start + 1 : stop + 1]


def rolling_likelihoods(
    lm: LM,
    texts: Sequence[str],
    interventions: Intervention | None = None,
    *,
    window: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Document]:
    """Score every text whole, in order. window: tokens a forward; None is as many as the model has positions for.

    Under interventions a window's context counts as the prompt (in the first one the prefix token alone).
    """
    if isinstance(texts, str):
        raise ModelError("texts is one string. Give a list of texts: [text].")
    size = window or longest_input(lm)
    if not 1 <= size <= longest_input(lm):
        raise ModelError(f"window={window}: 1 to {longest_input(lm)} tokens, the positions of {lm.name!r}.")
    ids, prefix = encode_texts(lm, texts), prefix_token(lm)
    asked = [(number, each) for number, text in enumerate(texts) for each in windows(ids[text], prefix, size)]
    scored = loglikelihoods(lm, [each for _, each in asked], interventions, batch_size=batch_size, progress=progress)
    nats = [0.0] * len(texts)
    for (number, _), one in zip(asked, scored, strict=True):
        nats[number] -= one.logprob
    return [
        Document(total, len(ids[text]), len(text.encode()), len(re.split(r"\s+", text)))
        for total, text in zip(nats, texts, strict=True)
    ]


@in_turn
def perplexity(
    lm: LM,
    texts: Sequence[str],
    interventions: Intervention | None = None,
    *,
    window: int | None = None,
    batch_size: int | None = None,
) -> Perplexity:
    """Word perplexity, byte perplexity and bits per byte of texts; see `rolling_likelihoods` for the arguments."""
    documents = rolling_likelihoods(lm, texts, interventions, window=window, batch_size=batch_size)
    if not documents or not all(each.bytes for each in documents):
        raise ModelError("perplexity needs at least one text, and none of them empty.")
    nats = np.array([each.nats for each in documents])
    words, sizes = (np.array([getattr(each, name) for each in documents], float) for name in ("words", "bytes"))
    draws = np.random.default_rng(0).integers(0, len(nats), size=(RESAMPLES, len(nats)))

    def measure(lengths: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> Interval:
        estimate = float(change(nats.sum() / lengths.sum()))
        if len(nats) == 1:
            return Interval(estimate, math.nan, math.nan, 1, "one text: its spread cannot be known")
        drawn = change(nats[draws].sum(1) / lengths[draws].sum(1))
        low, high = np.percentile(drawn, [2.5, 97.5])
        return Interval(estimate, float(low), float(high), len(nats))

    return Perplexity(
        tuple(documents), measure(words, np.exp), measure(sizes, np.exp), measure(sizes, lambda x: x / math.log(2))
    )
