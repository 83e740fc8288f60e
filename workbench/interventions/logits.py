"""Arithmetic on next-token logits between models that share a vocabulary: base + strength * (expert - amateur).

Proxy-tuning (arXiv 2401.08565): a large base, expert = a small tuned model, amateur = the same small model untuned.
Contrastive decoding (arXiv 2210.15097) in the form (1 + strength) base - strength amateur (arXiv 2309.09117): expert =
the base itself, amateur = a smaller model, with the plausibility cut. Several of these each add to the plain logits.
The other models read the same tokens, with caches of their own, so each costs its own forward pass every step. Not
covered: beam search, which reorders the base's cache only, and models with another tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from workbench.cache import new_cache
from workbench.interventions.concept import Intervention
from workbench.models import LM, ModelError, takes_last_only

PASSED_ON = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")


@dataclass(frozen=True, eq=False)
class Logits(Intervention):
    """Move logits by `strength` times expert minus amateur, in nats; None stands for the model that is changed.

    plausible: tokens that the expert gives less than this share of its likeliest token's probability are ruled out
    (alpha of contrastive decoding; 0 rules out none).
    """

    expert: LM | None = None
    amateur: LM | None = None
    strength: float = 1.0
    plausible: float = 0.0

    def __post_init__(self) -> None:
        if self.expert is None and self.amateur is None:
            raise ModelError("Logits needs another model: give expert=, amateur=, or both (proxy-tuning).")
        if not 0 <= self.plausible < 1:
            raise ModelError(f"plausible={self.plausible} is no share: give 0 (off) to below 1, such as 0.1.")

    @property
    def others(self) -> list[LM]:
        """The models besides the base."""
        return [other for other in (self.expert, self.amateur) if other is not None]

    def scale(self, factor: float) -> "Logits":
        return replace(self, strength=self.strength * factor)

    def rebind(self, lm: LM) -> "Logits":
        return replace(self)

    def check(self, lm: LM) -> None:
        own = lm.tokenizer.get_vocab()
        for other in self.others:
            if other.model is lm.model:
                raise ModelError(f"{other.name!r} is the changed model itself: leave it out, None stands for it.")
            if (vocabulary := other.tokenizer.get_vocab()) != own:
                differing = len(own.items() ^ vocabulary.items())
                raise ModelError(
                    f"{other.name!r} and {lm.name!r} do not share a vocabulary ({differing} entries differ), so their "
                    "logits cannot be added token by token. Choose a model of the same family."
                )


@dataclass
class LogitsPlan:
    """One pair of models and every row's strength of it."""

    part: Logits
    strengths: Float[Tensor, " rows"]


class Companions:
    """The other models of a session: their forwards beside the base's, and their caches beside its cache."""

    def __init__(self, rows: Sequence[Sequence[Logits]], lm: LM) -> None:
        plans: dict[tuple[int, int, float], LogitsPlan] = {}
        for number, row in enumerate(rows):
            for part in row:
                if part.strength != 0.0:
                    identity = (id(part.expert), id(part.amateur), part.plausible)
                    plan = plans.setdefault(identity, LogitsPlan(part, torch.zeros(len(rows), device=lm.device)))
                    plan.strengths[number] += part.strength
        self.plans = list(plans.values())
        self.models = list({id(o.model): o for plan in self.plans for o in plan.part.others}.values())
        self.caches: WeakKeyDictionary[Any, dict[int, DynamicCache]] = WeakKeyDictionary()

    def keep(self, cache: DynamicCache, rows: Int[Tensor, " kept"]) -> None:
        """The base's cache now holds these rows only."""
        for other in self.caches.get(cache, {}).values():
            other.reorder_cache(rows)

    def change(self, call: dict[str, Any], output: Any, seen: int, rows: Int[Tensor, " rows"]) -> Any:
        """The base's output with changed logits; `seen` tokens were cached before this forward."""
        if call.get("input_ids") is None:
            raise ModelError("Logits of other models need token ids; this forward brings embeddings.")
        spoken = {id(other.model): self._forward(other, call, output, seen) for other in self.models}
        plain, logits = output.logits, output.logits
        for plan in self.plans:
            strengths = plan.strengths[rows]
            chosen = strengths.nonzero()[:, 0]
            if not len(chosen):
                continue
            said = [
                (plain if lm is None else spoken[id(lm.model)])[chosen].float()  # None: as the base said it by itself
                for lm in (plan.part.expert, plan.part.amateur)
            ]
            moved = logits[chosen].float()
            width = min(side.shape[-1] for side in (moved, *said))  # some pad their last matrix
            expert, amateur = (side[..., :width] for side in said)
            moved[..., :width] += strengths[chosen, None, None] * (expert - amateur)
            if plan.part.plausible:
                least = expert.amax(-1, keepdim=True) + torch.tensor(plan.part.plausible).log().item()
                moved[..., :width].masked_fill_(expert < least, -torch.inf)
            logits = logits.index_copy(0, chosen, moved.to(logits.dtype))
        output.logits = logits
        return output

    def _forward(self, other: LM, call: dict[str, Any], output: Any, seen: int) -> Float[Tensor, "rows seq vocabulary"]:
        """The other model's logits for the same tokens, in float32 on the base's device."""
        own = {name: call[name] for name in PASSED_ON if call.get(name) is not None}
        if not takes_last_only(other):
            own.pop("logits_to_keep", None)
        own = {name: value.to(other.device) if isinstance(value, Tensor) else value for name, value in own.items()}
        base_cache = getattr(output, "past_key_values", None)
        if base_cache is not None:
            held = self.caches.setdefault(base_cache, {})
            if seen == 0:
                held[id(other.model)] = new_cache(other)
            cache = held.get(id(other.model))
            if cache is None or cache.get_seq_length() != seen:
                raise ModelError(
                    f"{other.name!r} has not read the {seen} tokens that are cached already. Fill the cache inside of "
                    "the block, from its first token on."
                )
            own["past_key_values"] = cache
        with torch.no_grad():
            logits = other.model(**own, use_cache=base_cache is not None).logits
        return logits[:, -output.logits.shape[1] :].float().to(output.logits.device)
