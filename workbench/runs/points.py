"""The points of a grid, each with a name that can be a folder's; what is done at a point is the caller's matter."""

import re
from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

from workbench.files import content_key
from workbench.runs.params import ParameterError
from workbench.runs.values import Text

LONGEST = 120  # characters of a name; file systems take 255 bytes


def combinations(grid: Mapping[str, Iterable[Any]]) -> dict[str, dict[str, Any]]:
    """All points of a grid with a name for each, which can be a folder's; equal values count once.

    >>> combinations({"rank": [4, 8], "method": ["lora"]})
    {'rank=4,method=lora': {'rank': 4, 'method': 'lora'}, 'rank=8,method=lora': {'rank': 8, 'method': 'lora'}}
    """
    for name, values in grid.items():
        if isinstance(values, str) or not isinstance(values, Iterable) or not len(list(values)):
            raise ValueError(
                f"{name}={values!r} gives the grid nothing to vary: give a list of values, such as [1, 2]."
            )
    if not grid:
        raise ValueError("the grid is empty: give names and lists of values, such as {'learning_rate': [1e-3, 3e-3]}.")
    found: dict[str, dict[str, Any]] = {}
    for values in product(*([getattr(one, "item", lambda one=one: one)() for one in each] for each in grid.values())):
        point = dict(zip(grid, values, strict=True))
        full = ",".join(f"{name}={value}" for name, value in point.items())
        name = re.sub(r"[^\w.+=,-]", "-", full)[:LONGEST]
        found[name if name == full else f"{name}-{content_key(point=full)[:6]}"] = point
    return found


def split_values(given: Mapping[str, object]) -> dict[str, list[Any]]:
    """Typed values parted at their commas, those inside brackets left whole; anything else is one value.

    >>> split_values({"n": Text("5,10"), "layers": Text("[0,1],[2]"), "seed": 0})
    {'n': [Text('5'), Text('10')], 'layers': [Text('[0,1]'), Text('[2]')], 'seed': [0]}
    """
    parts = {
        name: [Text(part) for part in re.split(r",(?![^\[{]*[\]}])", value)] if isinstance(value, Text) else [value]
        for name, value in given.items()
    }
    if not any(len(values) > 1 for values in parts.values()):
        raise ParameterError("a sweep needs a parameter with several values: -p NAME=V1,V2. For one run: run.")
    return parts
