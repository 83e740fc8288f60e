"""What a measurement is reported as: an estimate with its limits, and a paired comparison.

Holds the values alone; how limits are found is the matter of the files beside this one.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence limits, in the unit of the data; `note` says when the limits need a caution."""

    estimate: float
    low: float
    high: float
    n: int
    note: str = ""

    def __str__(self) -> str:
        return f"{self.estimate:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Comparison:
    """A paired difference b - a in the unit of the data; `discordant` counts the pairs that differ."""

    difference: float
    low: float
    high: float
    p_value: float
    n: int
    discordant: int
    method: str = ""
    note: str = ""
