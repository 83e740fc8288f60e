"""From log-likelihoods of unequal continuations to scores that can be compared.

sum: log p. token, character, byte: log p divided by the continuation's length in that unit (lm-evaluation-harness calls
the last two acc_norm and acc_bytes, and counts the option's text without the space before it). unconditional: log p
minus log p of the same continuation behind a context without the question (GPT-3, arXiv 2005.14165, section 2.4, after
"Answer:"; acc_mutual_info in the harness, behind nothing). Which one suits a task is not decided here.
"""

from collections.abc import Sequence

from workbench.likelihood.scoring import PLACES, Scored
from workbench.models import ModelError

NORMALISATIONS = ("sum", "token", "character", "byte", "unconditional")


def normalised(one: Scored, how: str, text: str | None = None, alone: Scored | None = None) -> float:
    """A continuation's score, in nats (or nats a unit).

    text: what is counted as its length; None counts the continuation as it was given. alone: the same continuation
    behind a context without the question, for "unconditional".

    >>> normalised(Scored(-6.0, (-2.0, -4.0), False, 2, 4, 4), "token")
    -3.0
    """
    check_normalisation(how)
    if how == "sum":
        return one.logprob
    if how == "unconditional":
        if alone is None:
            raise ModelError("'unconditional' needs alone=, the continuation's score without the question.")
        return one.logprob - alone.logprob
    sizes = {"token": one.tokens, "character": one.characters, "byte": one.bytes}
    if text is not None:
        sizes |= {"character": len(text), "byte": len(text.encode())}
    return one.logprob / max(sizes[how], 1)


def check_normalisation(how: str) -> None:
    """Raise ModelError for an unknown name."""
    if how not in NORMALISATIONS:
        raise ModelError(f"normalisation={how!r} is unknown. Allowed: {', '.join(NORMALISATIONS)}.")


def best(scores: Sequence[float]) -> int:
    """The highest score's place; scores equal to 4 decimals are a tie, which the first wins: rounding decides nothing.

    >>> best([-2.0, -1.00001, -1.0])
    1
    """
    rounded = [round(score, PLACES) for score in scores]
    return rounded.index(max(rounded))
