"""What a model thought at every token of an answer: how likely, how undecided, what else it might have said.

Readings are of the model as it was changed while it wrote the answer, beside the plain model on the same tokens: KL is
KL(plain || changed), as in `divergence`. One forward of two rows. Not covered: states and attention (`readouts`).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float

from workbench.divergence import PlainAnswers, divergence
from workbench.generate import Generation
from workbench.interventions import KV, Intervention
from workbench.interventions.residual import span_mask
from workbench.interventions.session import ACTIVE
from workbench.interventions.shared_weights import for_all_rows
from workbench.models import LM, ModelError

MEASURES = {
    "kl": "KL from the plain model, nats",
    "entropy": "entropy of the next token, nats",
    "logprob": "log-probability of the token, nats",
    "acted": "where the intervention acted",
}


@dataclass(frozen=True, eq=False)
class TokenReadings:
    """An answer's tokens and, of each, what stood behind it.

    tokens: texts; those that are no whole character are shown as the replacement character. kl, entropy, logprob: nats.
    acted: whether the change acted on the states that the token was chosen from. alternatives: the likeliest tokens
    with their probabilities, best first; plain_alternatives: the same of the plain model.
    """

    prompt: str
    tokens: list[str]
    kl: Float[np.ndarray, " tokens"]
    entropy: Float[np.ndarray, " tokens"]
    logprob: Float[np.ndarray, " tokens"]
    acted: Bool[np.ndarray, " tokens"]
    alternatives: list[list[tuple[str, float]]]
    plain_alternatives: list[list[tuple[str, float]]]

    def values(self, by: str) -> Float[np.ndarray, " tokens"]:
        """The numbers of one of `MEASURES`; ValueError for another name."""
        if by not in MEASURES:
            raise ValueError(f"by={by!r}: tokens can be coloured by {', '.join(MEASURES)}.")
        return np.asarray(getattr(self, by), dtype=float)


def read_tokens(generation: Generation, *, top: int = 5) -> TokenReadings:
    """Read an answer of `lm.generate` again, token by token.

    top: alternatives kept a token.

    Raises:
        ModelError: an answer of another server, whose model isn't here, or one without tokens; inside of `lm.apply`.
    """
    origin = generation.origin
    if origin is None or not generation.token_ids:
        raise ModelError(
            "There is nothing to read: this answer has no tokens, or it came from a server. Next: lm.generate([prompt])"
            " with a model in this process."
        )
    lm, ids = origin.lm, generation.token_ids
    if ACTIVE.get(lm.model):
        raise ModelError("Tokens can't be read inside of lm.apply, whose change would act twice. Read them behind it.")
    answers = PlainAnswers(lm, [origin.prompt], [ids], 1)
    changes = [None, origin.change]
    if origin.change is not None and for_all_rows(origin.change.parts):  # rows of one forward share their weights
        plain, changed = (answers.log_probabilities([change])[0][0] for change in changes)
    else:
        plain, changed = answers.log_probabilities(changes)[0]
    target = torch.tensor(ids, device=changed.device)
    return TokenReadings(
        prompt=lm.tokenizer.decode(origin.prompt),
        tokens=[lm.tokenizer.decode([token]) for token in ids],
        kl=divergence(plain, changed).cpu().double().numpy(),
        entropy=torch.special.entr(changed.exp()).sum(-1).cpu().double().numpy(),
        logprob=changed.gather(1, target[:, None])[:, 0].cpu().double().numpy(),
        acted=acted_on(origin.change, len(origin.prompt), len(ids)),
        alternatives=_best(lm, changed, top),
        plain_alternatives=_best(lm, plain, top),
    )


def acted_on(change: Intervention | None, prompt: int, new: int) -> Bool[np.ndarray, " new"]:
    """Of `new` tokens behind a prompt: whether the change acted on the position that chose each, the one before it.

    Changes without positions (adapters, weights, logits, whole caches) act everywhere; an edit of one cached token acts
    there and is only read later, so that it marks the first token alone.

    >>> from workbench.interventions import Residual
    >>> acted_on(Residual({0: torch.ones(4)}, "last"), prompt=3, new=3).tolist()
    [True, False, False]
    """
    places = torch.arange(prompt - 1, prompt - 1 + new)[None]
    found = torch.zeros(new, dtype=torch.bool)
    for part in change.parts if change is not None else ():
        if isinstance(part, KV):
            found[:1] = True
            continue
        span = getattr(part, "positions", "all")
        found |= span_mask(span, places, torch.tensor([prompt]))[0]
    return found.numpy()


def _best(lm: LM, scores: Float[torch.Tensor, "tokens vocab"], top: int) -> list[list[tuple[str, float]]]:
    best = scores.topk(min(top, scores.shape[-1]))
    return [
        [(lm.tokenizer.decode([token]), score) for token, score in zip(tokens, chances, strict=True)]
        for tokens, chances in zip(best.indices.tolist(), best.values.exp().tolist(), strict=True)
    ]
