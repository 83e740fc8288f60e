"""The decode loop: prompts are read, then one token a row and step, until every row is finished.

Rows that are finished leave, and where it is exact others take their places while the rest go on (continuous batching,
Orca, OSDI 2022). `generate` sorts prompts and hands them over; nothing here knows about prompts as text beyond stop
strings.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from workbench.choosing import Chooser, Decoding, Row, stopped
from workbench.interventions.session import Session
from workbench.models import LM, takes_last_only
from workbench.prefill import Prefix, State, common_prefix, may_join, start

__all__ = ["Decoding", "OnToken", "Row", "decode"]

OnToken = Callable[[dict[int, list[int]]], None]  # new tokens so far, by number of the row
CPU_READ = 2_048  # tokens of a forward that reads prompts
COMPACT_BELOW = 0.75  # share of rows still running at which finished ones leave the batch, which copies the cache


def decode(
    lm: LM,
    session: Session,
    rows: Sequence[Row],
    decoding: Decoding,
    on_token: OnToken | None = None,
    *,
    more: Callable[[list[Row]], list[Row]] = lambda running: [],
    done: Callable[[list[Row]], None] = lambda rows: None,
) -> None:
    """Fill in `new`, `finished`, `seconds` and `passes` of every row.

    on_token: hears of every step. more: given the rows that go on, says which others join them now, none if it isn't
    worth it yet. done: hears of rows that have left.
    """
    joins = may_join(session)
    session.begin([row.place for row in rows])
    prefix = common_prefix(lm, session, rows)

    def read(rows: Sequence[Row]) -> list[Batch]:
        parts = _parts(lm, rows, prefix) if joins else [rows]
        return [Batch(lm, session, part, decoding, on_token, prefix) for part in parts]

    batch, *others = read(rows)
    if others:
        batch.go_on([*range(len(batch.rows))], others)
    while True:
        kept = [place for place, row in enumerate(batch.rows) if not row.over]
        if len(kept) < len(batch.rows):
            fresh = more([batch.rows[place] for place in kept]) if joins else []
            if fresh or len(kept) <= COMPACT_BELOW * len(batch.rows):
                done([row for row in batch.rows if row.over])
                batch.go_on(kept, read(fresh) if fresh else [])
            if not batch.rows:
                return
        batch.step()


def _parts(lm: LM, rows: Sequence[Row], prefix: Prefix) -> list[Sequence[Row]]:
    """Rows whose prompts are read in one forward: on a CPU few enough to stay in the processor's own memory."""
    if lm.device.type != "cpu":
        return [rows]
    parts: list[list[Row]] = [[]]
    for row in rows:
        part = [*parts[-1], row]
        new = max(len(each.prompt) for each in part) - (len(prefix.ids) if prefix.begins([row.prompt]) else 0)
        if parts[-1] and len({tuple(each.prompt) for each in part}) * new > CPU_READ:
            parts.append([row])
        else:
            parts[-1].append(row)
    return list(parts)


class Batch:
    """Rows that take their steps together, with everything that the next step needs; making one reads the prompts."""

    def __init__(
        self,
        lm: LM,
        session: Session,
        rows: Sequence[Row],
        decoding: Decoding,
        on_token: OnToken | None,
        prefix: Prefix,
    ) -> None:
        self.lm, self.session, self.rows, self.on_token = lm, session, list(rows), on_token
        self.clock = time.perf_counter()
        self.extra: dict[str, Any] = {"logits_to_keep": 1} if takes_last_only(lm) else {}
        for row in rows:
            row.new, row.finished, row.passes, row.seconds = [], False, 0, 0.0
        session.begin([row.place for row in rows])
        self.chooser = Chooser(lm, rows, decoding)
        self.state: State = start(lm, session, rows, prefix)
        # an edit of the cache runs the prompt in two parts
        self.step(1 + self.state.shared + bool(session.kv or session.edits) + bool(session.gates))

    def step(self, passes: int = 1) -> None:
        """One forward, or as many as `passes` says, and the next token of every row that isn't over."""
        state = self.state
        output = self.lm.model(
            input_ids=state.ids,
            attention_mask=state.mask,
            position_ids=state.places,
            past_key_values=state.cache,
            use_cache=True,
            **self.extra,
        )
        token = self.chooser.choose(output.logits[:, -1].float())
        active = [(row, number) for row, number in zip(self.rows, token.tolist(), strict=True) if not row.over]
        now = time.perf_counter()
        seconds, self.clock = (now - self.clock) / len(active), now
        for row, number in active:
            row.new.append(number)
            row.finished = number in self.chooser.ends or stopped(self.lm, row.new, self.chooser.decoding.stop)
            row.passes += passes * (1 + len(self.session.companions.models))
            row.seconds += seconds
        if self.on_token is not None:
            self.on_token({row.number: row.new for row in self.rows})
        state.advance(token)

    def go_on(self, kept: list[int], others: "Sequence[Batch]") -> None:
        """Leave out all but these of the own rows, and take in those of other batches."""
        chosen: Tensor = torch.tensor(kept, dtype=torch.long, device=self.lm.device)
        self.rows = [self.rows[place] for place in kept]
        if not kept and not others:
            return
        self.chooser.keep(chosen)
        if others:
            self.state.join(chosen, [other.state for other in others])
            self.chooser.join([other.chooser for other in others])
            self.rows += [row for other in others for row in other.rows]
            self.clock = time.perf_counter()
        else:
            self.session.companions.keep(self.state.cache, chosen)
            self.state.keep(chosen)
        self.session.select([row.place for row in self.rows])
