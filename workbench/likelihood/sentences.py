"""Minimal pairs: whether a model holds the good sentence of two for the likelier one (BLiMP, arXiv 1912.00582).

A sentence's score is the sum of its tokens' log-probabilities behind the token that begins texts; where a tokenizer has
none, behind the one that ends them. What the two sentences begin with is run once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.interventions.concept import Intervention
from workbench.likelihood.choices import one_each
from workbench.likelihood.normalising import NORMALISATIONS, normalised
from workbench.likelihood.scoring import PLACES, Scored, loglikelihoods
from workbench.models import LM, ModelError
from workbench.statistics import Interval, wilson
from workbench.turns import in_turn


@dataclass(frozen=True)
class Pair:
    """One pair's scores, in nats (a unit). correct: good has the higher one; equal to 4 decimals is not.

    scored: the good sentence and the bad one.
    """

    id: str
    paradigm: str
    field: str
    good: float
    bad: float
    correct: bool
    scored: tuple[Scored, Scored]


@in_turn
def minimal_pairs(
    lm: LM,
    rows: Sequence[Mapping[str, Any]],
    interventions: Intervention | Sequence[Intervention | None] | None = None,
    *,
    normalisation: str = "sum",
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Pair]:
    """Score both sentences of every row, in order. rows: with `good` and `bad`, as those of load_task("blimp").

    interventions: one for all rows, or one (or None) a row. normalisation: "sum", as in the paper, or by length.
    """
    if normalisation not in NORMALISATIONS or normalisation == "unconditional":
        allowed = ", ".join(name for name in NORMALISATIONS if name != "unconditional")
        raise ModelError(
            f"normalisation={normalisation!r} is none for sentences without a context. Allowed: {allowed}."
        )
    for row in rows:
        if not row.get("good") or not row.get("bad"):
            raise ModelError(f"Row {row.get('id')!r} is no pair: it needs a good and a bad sentence.")
    changes = one_each(interventions, [2] * len(rows))
    requests = [("", str(row[side])) for row in rows for side in ("good", "bad")]
    scored = loglikelihoods(lm, requests, changes, batch_size=batch_size, progress=progress)
    found = []
    for row, both in zip(rows, zip(scored[::2], scored[1::2], strict=True), strict=True):
        good, bad = (normalised(one, normalisation) for one in both)
        right = round(good, PLACES) > round(bad, PLACES)
        name, paradigm, field = (str(row.get(key, "")) for key in ("id", "paradigm", "field"))
        found.append(Pair(name, paradigm, field, good, bad, right, both))
    return found


def pair_accuracy(pairs: Sequence[Pair], by: str = "paradigm") -> dict[str, Interval]:
    """Share of pairs got right, with its 95 % interval, by "paradigm" or "field"; "all" stands last."""
    if by not in ("paradigm", "field") or not pairs:
        raise ModelError(f"by={by!r}, {len(pairs)} pairs: by is 'paradigm' or 'field', and one pair is needed.")
    groups: dict[str, list[bool]] = {}
    for pair in pairs:
        groups.setdefault(getattr(pair, by), []).append(pair.correct)
    groups["all"] = [pair.correct for pair in pairs]
    return {name: wilson(sum(right), len(right)) for name, right in groups.items()}
