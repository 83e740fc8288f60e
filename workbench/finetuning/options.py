"""What does not change a fine-tune's adapter: how it is scored and shown, what it may use, where it pauses."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.files import content_key
from workbench.synthesis.records import Record, RecordError

if TYPE_CHECKING:
    from workbench.tasks import Task

Show = Callable[[list[dict[str, float]]], None]


class Diverged(ValueError):
    """The loss is no number any more: the same settings would end there again."""


class ShortOfMemory(RecordError):
    """These records can't be trained on in the memory that is free."""


@dataclass(frozen=True)
class Watching:
    """`memory` in bytes; `until` the share of the steps after which to pause; `fastest`: see `fastest.choose`."""

    held_out: list[Record] | None = None
    task: "Task | None" = None
    show: Show | None = None
    memory: int | None = None
    until: float = 1.0
    fastest: bool = False

    def settings(self) -> dict[str, str]:
        """What losses.jsonl depends on besides the recipe."""
        scored = {"held_out": content_key(messages=[r["messages"] for r in self.held_out])} if self.held_out else {}
        return scored | ({"task": self.task.name} if self.task else {})


def held_out_records(records: list[Record], where: str, trained: list[Record]) -> list[Record]:
    """Records to score on; refuses those that are trained on too, and those that say that they are of a test split."""
    known = {json.dumps(record["messages"]) for record in trained}
    if same := sum(json.dumps(record["messages"]) in known for record in records):
        raise ValueError(
            f"held_out: {same} of {len(records)} records ({where}) are also trained on, so their loss would say "
            "nothing about new ones. Take records of other questions, for example of the tuning split."
        )
    if any(record.get("split") == "test" for record in records):
        raise ValueError(
            f"held_out: {where} holds records of the test split. What a run is chosen by can't be what it is reported "
            "on: take records of the tuning split."
        )
    return records
