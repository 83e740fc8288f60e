"""Check measured values before anything is computed from them, so that a wrong row is named and never averaged in.

Shared by the functions of `statistics`; holds no statistics itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np


class StatisticsError(ValueError):
    """Data that the asked-for number cannot be computed from; the message says which value and what would do."""


def cluster_totals(values: np.ndarray, clusters: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and size of each independent unit: a row, or a cluster of related rows."""
    if clusters is None:
        return values, np.ones(len(values))
    labels = list(clusters)
    if len(labels) != len(values):
        raise StatisticsError(f"one cluster label a row: got {len(labels)} labels for {len(values)} rows.")
    for position, label in enumerate(labels):
        if is_missing(label):
            raise StatisticsError(f"clusters[{position}] is {label!r}: name the cluster, or drop the row.")
    index = {label: position for position, label in enumerate(dict.fromkeys(labels))}
    codes = np.array([index[label] for label in labels])
    return np.bincount(codes, weights=values), np.bincount(codes).astype(float)


def is_dichotomous(values: Sequence[Any]) -> bool:
    """True when every value is right or wrong: booleans, or 1 and 0."""
    return all(isinstance(value, (bool, np.bool_)) or value in (0, 1) for value in values)


def as_booleans(values: Sequence[Any], name: str) -> np.ndarray:
    """Right/wrong rows as a boolean array; anything but True, False, 1 and 0 is refused by position."""
    items = list(values)
    if not items:
        raise StatisticsError(f"{name} is empty: nothing was measured, so there is nothing to compare.")
    for position, value in enumerate(items):
        if not is_dichotomous([value]):
            raise StatisticsError(f"{name}[{position}] is {value!r}: right/wrong rows hold True or False (or 1 and 0).")
    return np.array([bool(value) for value in items])


def as_numbers(values: Sequence[Any] | np.ndarray, name: str) -> np.ndarray:
    """Finite floats; empty input, text and missing values are refused by name."""
    try:
        numbers = np.array([float(value) for value in values])
    except (TypeError, ValueError) as error:
        raise StatisticsError(
            f"{name} holds a value that is no number: {error}. Drop or fill such rows first."
        ) from error
    if not len(numbers):
        raise StatisticsError(f"{name} is empty: nothing was measured, so there is nothing to compute.")
    if not np.isfinite(numbers).all():
        position = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise StatisticsError(f"{name}[{position}] is {numbers[position]}: drop or fill missing rows first, in pairs.")
    return numbers


def as_labels(values: Sequence[Any], name: str) -> list[Any]:
    """Labels as given; an empty list and missing labels are refused by position."""
    labels = list(values)
    if not labels:
        raise StatisticsError(f"{name} is empty: nothing was rated, so there is nothing to compare.")
    for position, label in enumerate(labels):
        if is_missing(label):
            raise StatisticsError(f"{name}[{position}] is {label!r}: drop items without a label first, in pairs.")
    return labels


def as_table(values: Any, name: str) -> np.ndarray:
    """Finite floats [question, seed]; ragged rows and missing cells are refused by position."""
    items = values.to_numpy() if hasattr(values, "to_numpy") else values  # a data frame counts its columns
    rows = [as_numbers(row, f"{name}[{place}]") if np.ndim(row) == 1 else None for place, row in enumerate(items)]
    if not rows:
        raise StatisticsError(f"{name} is empty: nothing was measured, so there is nothing to compute.")
    for place, row in enumerate(rows):
        if row is None:
            raise StatisticsError(f"{name}[{place}] is no list: give a table with a row a question, a column a seed.")
        if len(row) != len(rows[0]):  # type: ignore[arg-type]
            raise StatisticsError(
                f"{name}[{place}] has {len(row)} values where {name}[0] has {len(rows[0])}: "  # type: ignore[arg-type]
                "every question needs every seed. Drop questions or seeds that are not complete."
            )
    return np.array(rows)


def is_missing(label: Any) -> bool:
    """True for None and for values that differ from themselves, such as nan."""
    return label is None or (isinstance(label, float | np.floating) and bool(np.isnan(label)))


def check_pairs(a: np.ndarray, b: np.ndarray) -> None:
    """Refuse two conditions that were not measured on the same number of questions."""
    if len(a) != len(b):
        raise StatisticsError(
            f"paired rows need equal lengths: a has {len(a)}, b has {len(b)}. Join them on `id` first."
        )


def tail_share(level: float) -> float:
    """Probability in one tail outside a two-sided level, e.g. 0.025 for 0.95."""
    if not 0 < level < 1:
        raise StatisticsError(f"a level, power or 1 - alpha lies strictly between 0 and 1, e.g. 0.95; got {level}.")
    return (1 - level) / 2
