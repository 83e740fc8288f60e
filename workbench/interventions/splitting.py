"""Run a prompt's forward in parts: up to each row's last prompt token, edit the cache behind it, go on.

With left padding all rows have that token in the same column; with right padding there are several cuts. Later forwards
on an edited cache go through `dressed`, because the caller's mask and position ids know the text only.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache

from workbench.interventions.cache_layout import Layout, Moment
from workbench.interventions.cache_plan import CachePlan
from workbench.interventions.forward import columns, joined, refuse_unsplittable, rotary_positions
from workbench.interventions.kv import KVPlan
from workbench.models import ModelError

if TYPE_CHECKING:
    from workbench.interventions.session import Session


def split(session: "Session", call: dict[str, Any], text: Int[Tensor, "rows seq"], seen: int, cached: bool) -> Any:
    """The forward's output, as if it had been run in one piece."""
    count, width = text.shape
    rows = session.chosen(count)
    plans: list[KVPlan | CachePlan] = [*session.kv, session.edits]
    touched = torch.stack([plan.touches().to(rows.device)[rows] for plan in plans]).any(0)
    ends = text == session.lengths[:, None] - 1
    last = ends & touched[:, None]
    cuts = sorted(set(last.nonzero()[:, 1].tolist()))
    session.pending = bool((touched & (session.lengths - 1 > text.amax(1))).any())
    if (last & (session.lengths[:, None] < 2)).any():
        raise ModelError(
            "A KV edit changes the last prompt token but one, and this prompt has a single token. Give a longer prompt."
        )
    if not cuts and not (session.edits and seen == 0):
        return session.run(call, text)
    refuse_unsplittable(call)
    if not cached:
        call = {**call, "past_key_values": DynamicCache(config=session.lm.model.config), "use_cache": True}
    elif call.get("past_key_values") is None:
        call = {**call, "past_key_values": DynamicCache(config=session.lm.model.config)}
    cache = call["past_key_values"]
    if session.edits and session.layout is None:
        session.layout, session.laid = Layout(rows.tolist(), text.device), cache
        if seen == 0:
            session.edits.begin(cache, session.layout, bool((text < 0).any()))
    outputs, start = [], 0
    with session.edits.watching() as queries:
        for stop in [*cuts, width]:
            if stop > start:
                part = columns(call, start, stop, seen, text.shape)
                outputs.append(session.run(dressed(session, part, count, seen + start), text[:, start:stop]))
            if stop < width:
                places = rotary_positions(call, stop - 1, seen, count).to(rows.device)
                _edit(session, cache, last[:, stop], bool(ends[:, stop].all()), places, seen + stop, queries)
            start = stop
    result = joined(outputs)
    if not cached:
        result.past_key_values = None
        session.layout = session.laid = None
    return result


def dressed(session: "Session", call: dict[str, Any], rows: int, seen: int) -> dict[str, Any]:
    """The arguments of a forward whose cache was edited; `seen` counts the columns of the text before it."""
    layout = session.layout
    if layout is None or not layout.changed or call.get("past_key_values") is not session.laid:
        return call
    refuse_unsplittable(call)
    tokens = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
    selected = None if session.selected is None else session.selected.tolist()
    return layout.dress(call, layout.rows(selected, rows), seen, tokens.shape[1])


def _edit(
    session: "Session",
    cache: Any,
    now: Tensor,
    level: bool,
    places: Int[Tensor, " rows"],
    text_columns: int,
    queries: dict[int, Any],
) -> None:
    """All edits of the rows marked `now`, in the order that `cache_edits` names."""
    rows = session.chosen(len(now))
    moment = None
    if session.edits and session.layout is not None:
        end = session.layout.grow(text_columns)
        chosen = now.nonzero()[:, 0].tolist()
        moment = Moment(cache, session.layout, chosen, session.lengths.tolist(), places.tolist(), end, level)
        session.edits.before(moment)
    for plan in session.kv:
        plan.edit(cache, now, rows, places, session.rotary)
    if moment is not None:
        session.edits.after(moment, queries)
