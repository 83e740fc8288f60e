"""Which fine-tunes a grid stands for: its settings checked, filled in and noted, before any of them is trained.

Running and ranking them is `workbench.sweeps`.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from workbench.finetuning import finetune
from workbench.finetuning.memory import linear_layers
from workbench.finetuning.recipe import Recipe, make_recipe

if TYPE_CHECKING:
    from workbench.models import LM

OWN = ("lm", "data", "out", "held_out", "until")  # arguments of finetune that a sweep sets itself
FIXED = ("start", "max_length", "save_steps")  # of a recipe; max_length would leave out other held-out records a point
RECIPE = tuple(field.name for field in fields(Recipe))
Facts = dict[str, Any]


def check_names(grid: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raise ValueError for names that `finetune` has not, that a sweep can't vary, or that are given twice."""
    known = [name for name in inspect.signature(finetune).parameters if name not in OWN]
    varied = [name for name in known if name in RECIPE and name not in FIXED]
    if unknown := [name for name in settings if name not in known]:
        raise ValueError(f"{', '.join(unknown)}: finetune has no such setting. Choose from: {', '.join(known)}.")
    if unknown := [name for name in grid if name not in varied]:
        raise ValueError(f"{', '.join(unknown)} can't be varied by a sweep. Choose from: {', '.join(varied)}.")
    if both := [name for name in grid if name in settings]:
        raise ValueError(f"{', '.join(both)} is in the grid and beside it. Give it once.")


def recipe_of(lm: "LM", name: str, asked: Facts, until: float) -> Facts:
    """All settings of the point `name`, with `finetune`'s defaults; raises ValueError, naming it, for bad ones."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(finetune).parameters.items()}
    wanted = {field: asked.get(field, defaults[field]) for field in RECIPE}
    start = wanted.pop("start")
    for field, kind in ((field.name, field.type) for field in fields(Recipe)):
        value = wanted.get(field)
        wrong = isinstance(value, bool) or not isinstance(value, int if kind is int else int | float)
        if kind in (int, float) and value is not None and wrong:
            raise ValueError(f"{name}: {field}={value!r} is no {'whole number' if kind is int else 'number'}.")
    try:
        recipe = make_recipe(lm, start, until, **wanted)[0]
        linear_layers(lm.model, recipe.targets)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if recipe.method == "full":
        raise ValueError(f"{name}: method='full' makes no adapter, and a sweep compares adapters. Call finetune.")
    return asdict(recipe)


def with_points(index: Facts, names: Sequence[str], points: Mapping[str, Facts]) -> Facts:
    """The index of a sweep with more points in it; one that is there under another name is not added again.

    Raises ValueError for a name that is there with other settings.
    """
    kept = dict(index["points"])
    known = {name: Recipe(**point["recipe"]).settings() for name, point in kept.items()}
    for name, point in points.items():
        settings = Recipe(**point["recipe"]).settings()
        if known.get(name, settings) != settings:
            changes = "; ".join(
                f"{field}: {known[name].get(field)!r} there, {value!r} now"
                for field, value in settings.items()
                if known[name].get(field) != value
            )
            raise ValueError(f"the sweep holds {name} with other settings ({changes}). Choose another out= folder.")
        if settings not in known.values():
            kept[name], known[name] = point, settings
    return {**index, "names": list(dict.fromkeys([*index["names"], *names])), "points": kept}
