"""Run the forwards of one session's requests: each distinct prefix once, logits for the wanted tokens alone.

The tree is walked from its roots: a node with much below it fills a cache that its children start from, a small subtree
is one packed row. Where nothing can be shared (edits of the whole cache, gates, logits of other models) every request
is a row of its own, prompts ending in one column. Does not tokenize or sort requests into sessions (`scoring`).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from workbench.cache import GrowingLayer, new_cache
from workbench.generate import token_budget
from workbench.interventions.session import Session
from workbench.likelihood.packs import Batch, Unit, batches, below, fits_a_pack, lay_out, tree_mask
from workbench.likelihood.tree import Node
from workbench.models import LM, ModelError, takes_last_only

# Tokens of a forward on a CPU, from the beginning and behind what rows share: more fall out of the processor's own
# memory. Two cores, lab model: BLiMP 4.1 s by 16,384 and 2.5 s by 2,048; options behind five shots 2.0 s by 65,536 and
# 1.3 s by 8,192.
CPU_TOKENS, CPU_TOKENS_BEHIND = 2_048, 8_192
LOGITS = 2**25  # of one application of the head: 128 MB in float32


@dataclass(eq=False)
class Wanted:
    """Requests in the order of their rows: place in the session, row, context length, and scores to be filled in.

    Tokens wanted of request i stand at positions prompts[i] to ends[i] - 1 of its row, their predictions one before;
    they are entries offsets[i] and up of targets, scores and hits.
    """

    places: Int[np.ndarray, " requests"]
    rows: Int[np.ndarray, " requests"]
    prompts: Int[np.ndarray, " requests"]
    ends: Int[np.ndarray, " requests"]
    targets: Int[np.ndarray, " tokens"]
    kinds: list[int]  # requests of equal numbers may be in one packed row

    def __post_init__(self) -> None:
        sizes = self.ends - self.prompts
        self.offsets = np.cumsum(sizes) - sizes
        self.scores = np.zeros(len(self.targets))
        self.hits = np.zeros(len(self.targets), dtype=bool)
        count = int(self.rows.max()) + 1
        self.of_row = np.searchsorted(self.rows, np.arange(count + 1))  # first request of each row


@dataclass(eq=False)
class _Past:
    """A cache, which of its columns hold a token (None: all), and the row of every node in it."""

    cache: DynamicCache
    real: Bool[np.ndarray, "rows columns"]
    row_of: dict[int, int]


@dataclass(eq=False)
class Walk:
    """The forwards of one session over one prefix tree; `rows` are the tokens that go in, sorted."""

    lm: LM
    session: Session
    rows: Sequence[Int[np.ndarray, " tokens"]]
    wanted: Wanted
    layout: str
    batch_size: int | None
    done: Callable[[int], None]

    def __post_init__(self) -> None:
        self.budget = token_budget(self.lm, CPU_TOKENS)
        self.budget_behind = token_budget(self.lm, CPU_TOKENS_BEHIND)  # of rows that share what is before them
        attention = getattr(self.lm.model.config, "_attn_implementation", "")
        self.packs = self.layout == "rows" and attention in ("sdpa", "eager") and not self.session.virtual
        self.uniform = self.session.empty or len({*self.wanted.kinds}) == 1

    def down(self, nodes: Sequence[Node], above: Node | None = None, past: _Past | None = None) -> None:
        """Score everything in these siblings and below them."""
        self._down([self._unit(node, above) for node in nodes], past)

    def _down(self, units: Sequence[Unit], past: _Past | None) -> None:
        budget = self.budget if past is None else self.budget_behind
        for batch in batches(units, budget, self.batch_size, self.layout == "columns"):
            for part, state in self._halving(batch, past):
                deeper = [
                    self._unit(child, unit.nodes[0])
                    for unit in part
                    if unit.goes_on
                    for child in unit.nodes[0].children
                ]
                if deeper:
                    self._down(deeper, state)

    def _halving(self, batch: list[Unit], past: _Past | None) -> Iterator[tuple[list[Unit], _Past | None]]:
        waiting = [batch]
        while waiting:
            units, state, failed = waiting.pop(0), None, False
            try:
                state = self._forward(units, past)
            except (torch.OutOfMemoryError, MemoryError):
                failed = True  # outside of the except block, whose traceback keeps tensors alive
            if not failed:
                yield units, state
            elif len(units) == 1:
                raise ModelError(
                    f"Out of memory on a single row of {units[0].width} tokens. Score shorter texts, or load the model "
                    "with quantization='nf4'."
                )
            else:
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                waiting = [units[: len(units) // 2], units[len(units) // 2 :], *waiting]

    def _unit(self, node: Node, above: Node | None) -> Unit:
        """A node alone, or with all that is below it where that is small and changed in one way."""
        requests = slice(self.wanted.of_row[node.first], self.wanted.of_row[node.last])
        same = self.uniform or len(set(self.wanted.kinds[requests])) == 1
        if self.packs and same and fits_a_pack(node) and not (self.session.kv and self._holds_end(node)):
            return Unit(below(node), above)
        return Unit([node], above)

    def _holds_end(self, node: Node) -> bool:
        """Whether some last prompt token lies in this node or below it: an edit of the cache falls there."""
        requests = slice(self.wanted.of_row[node.first], self.wanted.of_row[node.last])
        return bool((self.wanted.prompts[requests] - 1 >= node.start).any())

    def _anchor(self, node: Node) -> int:
        """Columns up to the last prompt token, where an edit of the cache waits for it; else 0."""
        prompt = int(self.wanted.prompts[self.wanted.of_row[node.first]])
        return prompt - node.start if self.session.kv and node.start < prompt <= node.stop else 0

    def _forward(self, units: list[Unit], past: _Past | None) -> _Past | None:
        lm, session, device = self.lm, self.session, self.lm.device
        packed = len(units[0].nodes) > 1
        batch = lay_out(units, self.rows, [0 if packed else self._anchor(unit.nodes[0]) for unit in units])
        goes_on = any(unit.goes_on for unit in units)
        index = None
        if past is not None:
            index = np.array([past.row_of[id(unit.above)] for unit in units])
            before = past.real[index]
            cache = _branch(past.cache, index, device)
        else:
            before = np.zeros((len(units), 0), dtype=bool)
            cache = new_cache(lm) if goes_on else None
        whole = np.concatenate([before, batch.real], axis=1)
        mask: Tensor | None = None
        if packed:
            mask = tree_mask(batch, torch.from_numpy(before).to(device), lm.model.dtype)
        elif not before.all() or (session.kv and not batch.real.all()) or not batch.real[:, 0].all():
            mask = torch.from_numpy(whole.astype(np.int64)).to(device)
        session.begin([int(self.wanted.places[self.wanted.of_row[unit.nodes[0].first]]) for unit in units])
        output = lm.base(
            input_ids=torch.from_numpy(batch.ids).to(device),
            attention_mask=mask,
            position_ids=torch.from_numpy(batch.places).to(device),
            past_key_values=cache,
            use_cache=cache is not None,
        )
        self._score(batch, output)
        if not goes_on or cache is None:
            return None
        return _Past(cache, whole, {id(unit.nodes[0]): row for row, unit in enumerate(units)})

    def _score(self, batch: Batch, output: Any) -> None:
        """Scores of all wanted tokens whose predictions stand in this forward."""
        wanted, width = self.wanted, batch.ids.shape[1]
        entries, places = [], []
        done = 0
        for row, (unit, columns) in enumerate(zip(batch.units, batch.columns, strict=True)):
            for node, column in zip(unit.nodes, columns, strict=True):
                low, high = wanted.of_row[node.first], wanted.of_row[node.last]
                prompts, ends = wanted.prompts[low:high], wanted.ends[low:high]
                starts, stops = np.maximum(prompts - 1, node.start), np.minimum(ends - 1, node.stop)
                counts = np.maximum(stops - starts, 0)
                total = int(counts.sum())
                if not total:
                    continue
                done += int(((stops == ends - 1) & (counts > 0)).sum())
                steps = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
                entries.append(np.repeat(wanted.offsets[low:high] + starts - prompts + 1, counts) + steps)
                places.append(np.repeat(starts, counts) + steps - node.start + column + row * width)
        if entries:
            self._fill(np.concatenate(entries), np.concatenate(places), output)
            self.done(done)

    def _fill(self, entries: Int[np.ndarray, " n"], places: Int[np.ndarray, " n"], output: Any) -> None:
        """Each distinct state goes through the head once, in pieces."""
        hidden = output.last_hidden_state.flatten(0, 1)
        states, which = np.unique(places, return_inverse=True)
        size = max(1, LOGITS // self.lm.model.config.get_text_config().vocab_size)
        order = np.argsort(which, kind="stable")
        entries, which = entries[order], which[order]
        for start in range(0, len(states), size):
            piece = torch.from_numpy(states[start : start + size]).to(hidden.device)
            logits = _head(self.lm, type(output), hidden[piece][None]).float()
            mine = slice(*np.searchsorted(which, [start, start + size]))
            self.write(entries[mine], torch.from_numpy(which[mine] - start), logits)

    def write(
        self,
        entries: Int[np.ndarray, " n"],
        which: Int[Tensor, " n"],
        logits: Float[Tensor, "states vocabulary"],
    ) -> None:
        """Log-probabilities of the targets of `entries`, each under its row of `logits`."""
        which, targets = which.to(logits.device), torch.from_numpy(self.wanted.targets[entries]).to(logits.device)
        scores = logits[which, targets] - logits.logsumexp(-1)[which]
        self.wanted.scores[entries] = scores.double().cpu().numpy()
        self.wanted.hits[entries] = (logits.argmax(-1)[which] == targets).cpu().numpy()

    def alone(self) -> None:
        """Every request as a row of its own, from the first token on; the forwards are those of the whole model."""
        wanted, lm = self.wanted, self.lm
        order = sorted(range(len(wanted.rows)), key=lambda each: (-wanted.ends[each], -wanted.prompts[each]))
        vocabulary = lm.model.config.get_text_config().vocab_size
        while order:
            width, new = int(wanted.ends[order[0]]), int((wanted.ends - wanted.prompts)[order].max())
            size = self.batch_size or max(1, min(self.budget // (width + new), LOGITS // (vocabulary * new)))
            if self.layout == "columns":  # edits of a sliding window take no padding
                shape = wanted.prompts[order[0]], wanted.ends[order[0]]
                alike = [(wanted.prompts[each], wanted.ends[each]) == shape for each in order]
                size = min(size, [*alike, False].index(False))
            now, order = order[:size], order[size:]
            self._alone(now)
            self.done(len(now))

    def _alone(self, now: Sequence[int]) -> None:
        wanted, lm, device = self.wanted, self.lm, self.lm.device
        left = int(wanted.prompts[now].max())
        new = int((wanted.ends - wanted.prompts)[now].max())
        ids = torch.zeros(len(now), left + new - 1, dtype=torch.long)
        mask = torch.zeros_like(ids)
        entries, places = [], []
        for row, request in enumerate(now):
            prompt, end = int(wanted.prompts[request]), int(wanted.ends[request])
            place = slice(left - prompt, left - prompt + end - 1)
            ids[row, place], mask[row, place] = torch.from_numpy(self.rows[wanted.rows[request]][: end - 1].copy()), 1
            entries.append(wanted.offsets[request] + np.arange(end - prompt))
            places.append(np.arange(end - prompt) + row * new)
        self.session.begin([int(wanted.places[request]) for request in now])
        logits = lm.model(
            input_ids=ids.to(device),
            attention_mask=None if mask.all() else mask.to(device),
            position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
            use_cache=False,
            **({"logits_to_keep": new} if takes_last_only(lm) else {}),
        ).logits[:, -new:]
        self.write(np.concatenate(entries), torch.from_numpy(np.concatenate(places)), logits.float().flatten(0, 1))


def _branch(cache: DynamicCache, index: Int[np.ndarray, " rows"], device: torch.device) -> DynamicCache:
    """A cache of these rows of another one, which stays as it is."""
    new = copy.copy(cache)
    new.layers = []
    chosen = torch.from_numpy(index).to(device)
    one = int(index[0]) if (index == index[0]).all() else None
    for layer in cache.layers:
        new.layers.append(branch := copy.copy(layer))
        for name, value in vars(branch).items():
            if isinstance(value, dict):  # states of linear attention, by number
                setattr(branch, name, dict(value))
        if isinstance(branch, GrowingLayer) and one is not None:
            # views; the first update copies them into a room of its own
            branch.room = None
            branch.keys = branch.keys[one : one + 1].expand(len(index), -1, -1, -1)
            branch.values = branch.values[one : one + 1].expand(len(index), -1, -1, -1)
        else:
            branch.reorder_cache(chosen)
    return new


def _head(lm: LM, kind: type[Any], hidden: Float[Tensor, "1 states d_model"]) -> Float[Tensor, "states vocabulary"]:
    """Logits of finished states from the model's own head, with whatever it does to them (scales, soft caps)."""
    own: Any = vars(lm.base).get("forward")  # a session or accelerate keeps a wrapped forward here
    lm.base.forward = lambda *args, **kwargs: kind(last_hidden_state=hidden)
    try:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        return lm.model(input_ids=ids, use_cache=False).logits[0]
    finally:
        del lm.base.forward
        if own is not None:
            lm.base.forward = own
