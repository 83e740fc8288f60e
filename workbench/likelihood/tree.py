"""The prefix tree over token rows: what several rows begin with becomes one node, where that saves enough.

Built from the sorted rows and the lengths of what neighbours share (the interval tree of a suffix array, Abouelhoda
and others 2004, doi 10.1016/S1570-8667(03)00065-0). Knows nothing of models.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int

WORTH = 0.1  # share of a subtree's tokens that a node has to save
Row = Int[np.ndarray, " tokens"]


@dataclass(eq=False)
class Node:
    """Tokens start..stop of rows first..last, the same in all of them; `total` counts those below it, too."""

    first: int
    last: int
    start: int
    stop: int
    children: "list[Node]" = field(default_factory=list)
    total: int = 0

    def stretch(self, start: int) -> "Node":
        """The same node, with the tokens from `start` on."""
        self.total += self.start - start
        self.start = start
        return self


@dataclass
class _Open:
    """A node whose rows are still being read; `ending` are rows that end with it."""

    stop: int
    first: int
    children: list[Node] = field(default_factory=list)
    ending: list[int] = field(default_factory=list)


def grow(rows: Sequence[Row]) -> list[Node]:
    """The roots of the tree over sorted rows, none of which is there twice.

    >>> roots = grow([np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]), np.array([7])])
    >>> [(node.first, node.last, node.start, node.stop, len(node.children)) for node in roots]
    [(0, 2, 0, 3, 2), (2, 3, 0, 1, 0)]
    """
    stack = [_Open(0, 0)]
    before = 0
    for number, row in enumerate(rows):
        _close(stack, before, number)
        after = shared(row, rows[number + 1]) if number + 1 < len(rows) else 0
        if after > stack[-1].stop:
            stack.append(_Open(after, number))
        top = stack[-1]
        if len(row) > top.stop:
            top.children.append(Node(number, number + 1, top.stop, len(row), [], len(row) - top.stop))
        else:
            top.ending.append(number)
        before = after
    _close(stack, 0, len(rows))
    return stack[0].children


def shared(a: Row, b: Row) -> int:
    """How many tokens two rows begin with together."""
    most = min(len(a), len(b))
    differ = a[:most] != b[:most]
    place = int(differ.argmax()) if most else 0
    return place if most and differ[place] else most


def _close(stack: list[_Open], depth: int, number: int) -> None:
    """Finish the open nodes that reach deeper than `depth`; then one that ends there is on top."""
    while stack[-1].stop > depth:
        done = stack.pop()
        if stack[-1].stop < depth:
            stack.append(_Open(depth, done.first))
        above = stack[-1]
        above.children += _finished(done, above.stop, number)


def _finished(done: _Open, start: int, number: int) -> list[Node]:
    """The node from `start` on, or its children where it saves too little."""
    own, total = done.stop - start, sum(child.total for child in done.children)
    saved = own * (len(done.children) + len(done.ending) - 1)
    if saved < WORTH * (own + total + saved):
        alone = [Node(row, row + 1, start, done.stop, [], own) for row in done.ending]
        return [*alone, *(child.stretch(start) for child in done.children)]
    return [Node(done.first, number, start, done.stop, done.children, own + total)]
