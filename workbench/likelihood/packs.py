"""The forwards of a prefix tree: which nodes go together, with what ids, positions and masks.

A unit is one row of a forward: a single node, or a small subtree packed into one sequence in which every token attends
to its ancestors alone (tree attention, SpecInfer, arXiv 2305.09781). Knows nothing of caches or interventions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.likelihood.tree import Node

PACKED = 384  # tokens of a subtree that are always packed; more where the text before it is longer
WASTE = 1.25  # padded tokens a real one, beyond which rows of other lengths wait for a forward of their own
ENOUGH = 512  # tokens of a forward below which waste does not matter
SIBLINGS = 8  # rows behind one node that are a forward of their own: its cache need not be copied for them
CELLS = 2**24  # of one packed mask


@dataclass(eq=False)
class Unit:
    """One row of a forward: nodes in depth-first order, all behind `above` (None: behind nothing)."""

    nodes: list[Node]
    above: "Node | None"

    def __post_init__(self) -> None:
        self.width = sum(node.stop - node.start for node in self.nodes)
        self.start = self.nodes[0].start
        self.goes_on = len(self.nodes) == 1 and bool(self.nodes[0].children)


def below(node: Node) -> list[Node]:
    """A node and everything below it, depth first."""
    found, waiting = [], [node]
    while waiting:
        found.append(here := waiting.pop())
        waiting += reversed(here.children)
    return found


def fits_a_pack(node: Node) -> bool:
    """Whether a subtree is small enough that tokens which do not see each other cost little."""
    return bool(node.children) and node.total <= PACKED + node.start


def batches(units: Sequence[Unit], budget: int, rows: int | None, level: bool) -> Iterator[list[Unit]]:
    """Units of similar width together, within a budget of rows times columns; wider ones first.

    level: only units of the same width together, except those with nothing behind them.
    """

    def kind(unit: Unit) -> tuple[int, ...]:
        return (len(unit.nodes) > 1, unit.goes_on, unit.width if level and unit.goes_on else 0)

    order = sorted(units, key=lambda unit: (kind(unit), -unit.width))
    while order:
        width, real, taken = order[0].width, 0, 0
        for unit in order:
            real += unit.width
            padded = (taken + 1) * width
            full = taken and (taken == rows or (taken + 1) * (width + unit.start) > budget)
            wide = unit.nodes[1:] and padded * (width + unit.start) > CELLS
            apart = taken >= SIBLINGS and unit.above is not order[0].above
            if kind(unit) != kind(order[0]) or full or (taken and wide) or apart or padded > max(WASTE * real, ENOUGH):
                break
            taken += 1
        taken = max(taken, 1)
        yield order[:taken]
        order = order[taken:]


@dataclass(eq=False)
class Batch:
    """Tensors of one forward; `columns[i][j]` is where node j of unit i begins, `real` says what is no padding."""

    units: list[Unit]
    ids: Int[np.ndarray, "rows seq"]
    places: Int[np.ndarray, "rows seq"]
    real: Bool[np.ndarray, "rows seq"]
    columns: list[list[int]]


def lay_out(units: Sequence[Unit], tokens: Sequence[Int[np.ndarray, " all"]], anchors: Sequence[int]) -> Batch:
    """Units as rows, their `anchors` (columns of each from its own start) all in one column."""
    left = [max(anchors) - anchor for anchor in anchors]
    width = max(unit.width + space for unit, space in zip(units, left, strict=True))
    ids = np.zeros((len(units), width), dtype=np.int64)
    real = np.zeros((len(units), width), dtype=bool)
    places = np.zeros((len(units), width), dtype=np.int64)
    columns = []
    for row, (unit, column) in enumerate(zip(units, left, strict=True)):
        begins = []
        places[row] = np.maximum(np.arange(width) - column, 0) + unit.start
        for node in unit.nodes:
            end = column + node.stop - node.start
            ids[row, column:end] = tokens[node.first][node.start : node.stop]
            places[row, column:end] = np.arange(node.start, node.stop)
            real[row, column:end] = True
            begins.append(column)
            column = end
        places[row, column:] = places[row, column - 1]
        columns.append(begins)
    return Batch(list(units), ids, places, real, columns)


def tree_mask(batch: Batch, past: Bool[Tensor, "rows past"], dtype: torch.dtype) -> Float[Tensor, "rows 1 seq all"]:
    """What is added to attention scores: 0 for a token's ancestors and itself, the dtype's lowest number elsewhere."""
    count, width = batch.ids.shape
    sees = np.tri(width, dtype=bool)[None].repeat(count, 0)
    for row, (unit, begins) in enumerate(zip(batch.units, batch.columns, strict=True)):
        above: list[tuple[int, slice]] = []  # where the ancestors of the node at hand end, and their columns
        for node, column in zip(unit.nodes, begins, strict=True):
            while above and above[-1][0] > node.start:
                above.pop()
            own = slice(column, column + node.stop - node.start)
            above.append((node.stop, own))
            inside = np.zeros(width, dtype=bool)
            for _, place in above:
                inside[place] = True
            sees[row, own] &= inside
    whole = torch.cat([past[:, None].expand(-1, width, -1), torch.from_numpy(sees).to(past.device)], dim=2)
    return torch.zeros(whole.shape, dtype=dtype, device=past.device).masked_fill(~whole, torch.finfo(dtype).min)[
        :, None
    ]
