"""Work in saved chunks: a killed run goes on where it was, and a changed step redoes itself and what follows, no more.

A step is a function with its settings (`functools.partial` keeps the two together). Each step owns a folder named by
the hash of both; each chunk in it names the hash of what went in. So a chunk is used again exactly when the step, its
settings and its input are the same, whoever made it and when, and another setting never overwrites earlier work.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.files import content_key, sha256, write_atomic
from workbench.runs import heartbeat

if TYPE_CHECKING:
    from workbench.models import LM

Item = dict[str, Any]


def described(step: Callable[..., Any]) -> dict[str, Any]:
    """Name and settings of a step as JSON values: models by name and revision, files and adapters by their content.

    >>> described(partial(sorted, reverse=True))
    {'name': 'sorted', 'reverse': True}
    """
    if isinstance(step, partial):
        if step.args:
            raise ValueError(f"Give {_name(step.func)} its settings by name: partial({_name(step.func)}, name=value).")
        return {"name": _name(step.func), **{name: plain(value) for name, value in sorted(step.keywords.items())}}
    return {"name": _name(step)}


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", type(function).__name__)
    if name == "<lambda>":
        raise ValueError("A lambda has no name that a card could show. Define the step with def.")
    return name


def plain(value: Any) -> Any:
    """A setting as JSON, by what it does to the result and not by where it lies."""
    from workbench.evaluation import fingerprint
    from workbench.interventions import Intervention
    from workbench.models import LM
    from workbench.served import Served
    from workbench.tasks import Task

    if isinstance(value, LM):
        return _model(value)
    if isinstance(value, Served):
        return {"name": value.name, "revision": value.revision}
    if isinstance(value, Intervention):
        return fingerprint(value)
    if isinstance(value, Path):
        return {"file": value.name, "sha256": sha256(value)}
    if isinstance(value, Task):
        return {"name": value.name, "kind": value.kind, **value.parameters}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if callable(value):
        return described(value)
    return json.loads(json.dumps(value))


def _model(lm: "LM") -> dict[str, Any]:
    """A model by all that its answers depend on: weights, their precision, and what an `lm.apply` block puts on."""
    from workbench.evaluation.conditions import around

    four_bit = getattr(lm.model, "is_loaded_in_4bit", False)
    dtype = "nf4" if four_bit else str(lm.model.dtype).removeprefix("torch.")
    applied = around(lm)
    return {"name": lm.name, "revision": lm.revision, "dtype": dtype} | ({"applied": applied} if applied else {})


def in_chunks(
    folder: Path,
    name: str,
    settings: dict[str, Any],
    items: Sequence[Item],
    work: Callable[[list[Item]], list[Item]],
    size: int,
) -> tuple[list[Item], dict[str, float]]:
    """`work` on all `items`, `size` at a time, and what it cost; chunks on disk are read, all others made and saved.

    An item that `work` returns may hold `cost` (calls, tokens_in, tokens_out): it is taken out and added up, and the
    sums of a resumed run are those of an uninterrupted one. `settings` are JSON values, all that the result depends on.
    """
    home = folder / "steps" / f"{name}-{content_key(settings=settings)[:12]}"
    made: list[Item] = []
    total: Counter[str] = Counter(dict.fromkeys(("calls", "tokens_in", "tokens_out", "seconds"), 0))
    for start in range(0, len(items), size):
        part = list(items[start : start + size])
        file, key = home / f"{start // size:05d}.json", content_key(settings=settings, input=plain_json(part))
        saved = _saved(file, key)
        if saved is None:
            begin = time.perf_counter()
            saved = {"key": key, "items": work(part), "cost": {}}
            spent = Counter(dict.fromkeys(total, 0))
            for item in saved["items"]:
                spent.update(item.pop("cost", {}))
            saved["cost"] = {**spent, "seconds": time.perf_counter() - begin}
            saved["items"] = plain_json(saved["items"])  # a run that is not resumed sees what a resumed one reads
            write_atomic(file, json.dumps(saved, ensure_ascii=False))
            heartbeat(f"synthesize: {name}", start + len(part), len(items), seconds=round(saved["cost"]["seconds"], 2))
        made += saved["items"]
        total.update(saved["cost"])
    return made, dict(total)


def plain_json(items: list[Item]) -> list[Item]:
    """As read back from a file: generated tasks put tuples and fractions into their metadata."""
    return json.loads(json.dumps(items, default=str))


def _saved(file: Path, key: str) -> dict[str, Any] | None:
    """A chunk, when it is whole and was made from this input; a damaged one is told."""
    if not file.exists():
        return None
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        same = saved["key"] == key and isinstance(saved["items"], list) and isinstance(saved["cost"], dict)
    except (ValueError, KeyError, TypeError):
        print(f"{file} is damaged; it is made again.", file=sys.stderr)
        return None
    return saved if same else None
