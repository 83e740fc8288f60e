"""The prompts of a batch read into a cache: what they share once, the rest with left padding; and rows that join later.

Columns of the cache are where a token lies, not what position it has: a row that joins a running batch is put to the
right end, behind zeros that its mask leaves out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from workbench.cache import GrowingLayer, new_cache
from workbench.choosing import Row
from workbench.interventions.session import Session
from workbench.models import LM

SHARED_PREFIX = 16  # shorter common beginnings are not worth a forward of their own


@dataclass
class Prefix:
    """A beginning that many prompts have, and its keys and values by layer, of one row; empty where there is none."""

    ids: list[int] = field(default_factory=list)
    layers: list[tuple[Float[Tensor, "1 heads seq dim"], Float[Tensor, "1 heads seq value_dim"]]] = field(
        default_factory=list
    )

    def begins(self, prompts: Sequence[list[int]]) -> bool:
        """Whether all these prompts begin so, and go on for two tokens at least."""
        size = len(self.ids)
        return size > 0 and all(len(prompt) >= size + 2 and prompt[:size] == self.ids for prompt in prompts)


@dataclass
class State:
    """Tensors of the running rows; `mask` is None while nothing is padded, which is quicker. shared: forwards before
    the first of these rows' own.
    """

    ids: Int[Tensor, "rows seq"]
    places: Int[Tensor, "rows seq"]
    mask: Int[Tensor, "rows total"] | None
    cache: DynamicCache
    last_place: int
    shared: int = 0

    def advance(self, token: Int[Tensor, " rows"]) -> None:
        """These tokens come next; rows that are over and still here go on at the model's last position."""
        self.ids, self.places = token[:, None], (self.places[:, -1:] + 1).clamp(max=self.last_place)
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], dim=1)

    def keep(self, rows: Int[Tensor, " kept"]) -> None:
        """Go on with these rows."""
        self.ids, self.places = self.ids[rows], self.places[rows]
        self.mask = None if self.mask is None else self.mask[rows]
        self.cache.reorder_cache(rows)  # unlike batch_select_indices, linear-attention layers know it

    def join(self, kept: Int[Tensor, " kept"], others: "Sequence[State]") -> None:
        """Go on with these rows, and behind them those of other states, which end here.

        Columns that nobody needs any more are left out.
        """
        masks = [self._mask()[kept], *(other._mask() for other in others)]
        first = int(masks[0].any(0).int().argmax()) if len(kept) else masks[0].shape[1] - 1
        masks[0] = masks[0][:, first:]
        width = max(mask.shape[1] for mask in masks)
        for own, *new in zip(self.cache.layers, *(other.cache.layers for other in others), strict=True):
            own.join(kept, first, new, width - 1)
        self.mask = torch.cat([torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in masks])
        self.ids = torch.cat([self.ids[kept], *(other.ids for other in others)])
        self.places = torch.cat([self.places[kept], *(other.places for other in others)])

    def _mask(self) -> Int[Tensor, "rows total"]:
        if self.mask is not None:
            return self.mask
        return torch.ones(len(self.ids), self.cache.get_seq_length() + 1, dtype=torch.long, device=self.ids.device)


def common_prefix(lm: LM, session: Session, rows: Sequence[Row]) -> Prefix:
    """What all these prompts begin with, read once; empty where that isn't exact or too little."""
    cache = new_cache(lm)
    prompts = [row.prompt for row in rows]
    size = _common_length(prompts, session) if len(rows) > 1 and _may_share(lm, session, cache) else 0
    if not size:
        return Prefix()
    _read(lm, session, cache, input_ids=torch.tensor([prompts[0][:size]], device=lm.device))
    return Prefix(prompts[0][:size], [(layer.keys, layer.values) for layer in cache.layers])


def start(lm: LM, session: Session, rows: Sequence[Row], known: Prefix) -> State:
    """The first forward's tensors, behind what these rows share.

    A prompt that several rows have (a grid of strengths, samples) is read once for those rows, up to its last two
    tokens: a KV edit and the `last` span fall on them. known: of these rows' beginnings, as far as it is theirs.
    """
    prompts = [row.prompt for row in rows]
    cache = new_cache(lm)
    prefix = len(known.ids) if known.begins(prompts) else 0
    ids, mask = _padded([prompt[prefix:] for prompt in prompts], lm.tokenizer.pad_token_id or 0)
    places = ((mask.cumsum(1) - 1).clamp(min=0) + prefix).to(lm.device)
    full = torch.cat([torch.ones(len(rows), prefix, dtype=torch.long), mask], dim=1).to(lm.device)
    ids, padded = ids.to(lm.device), not bool(mask.all())
    first = {tuple(prompt): number for number, prompt in reversed(list(enumerate(prompts)))}
    repeated = ids.shape[1] > 2 and 2 * len(first) <= len(rows) and _may_share(lm, session, cache)
    if prefix:
        for layer, (keys, values) in zip(cache.layers, known.layers, strict=True):
            layer.update(keys, values)
        cache.batch_repeat_interleave(len(first) if repeated else len(rows))
    if repeated:
        one = torch.tensor(list(first.values()), device=lm.device)
        _read(
            lm,
            session,
            cache,
            input_ids=ids[one, :-2],
            attention_mask=full[one, :-2] if padded else None,
            position_ids=places[one, :-2],
        )
        order = {prompt: number for number, prompt in enumerate(first)}
        cache.batch_select_indices(torch.tensor([order[tuple(p)] for p in prompts], device=lm.device))
        ids, places = ids[:, -2:], places[:, -2:]
    limit = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    return State(ids, places, full if padded else None, cache, limit - 1, bool(prefix) + repeated)


def _read(lm: LM, session: Session, cache: DynamicCache, **call: Tensor | None) -> None:
    """A forward of the base model into a cache, on tokens that nothing intervenes on."""
    session.paused = True
    try:
        lm.base(past_key_values=cache, use_cache=True, **call)
    finally:
        session.paused = False


def _padded(texts: Sequence[Sequence[int]], pad: int) -> tuple[Int[Tensor, "rows seq"], Int[Tensor, "rows seq"]]:
    """Texts as one tensor, padded on the left, and where they are."""
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), pad)
    mask = torch.zeros_like(ids)
    for number, text in enumerate(texts):
        ids[number, width - len(text) :] = torch.tensor(text)
        mask[number, width - len(text) :] = 1
    return ids, mask


def may_join(session: Session) -> bool:
    """Whether rows may join a batch that is under way: in a plain cache, which nothing but attention reads.

    Edits of the cache count its columns, gates and other models read whole prompts.
    """
    special = session.kv or session.edits or session.companions.plans or session.gates or session.virtual
    return not special and _plain(session.lm, new_cache(session.lm))


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
    return _plain(lm, cache)


def _plain(lm: LM, cache: DynamicCache) -> bool:
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
