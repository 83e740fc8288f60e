"""Sets of records side by side: what each kept of what it asked, how long and how varied it is, what it cost."""

from collections.abc import Mapping
from statistics import median
from typing import TYPE_CHECKING

import pandas as pd

from workbench.statistics import wilson
from workbench.synthesis.records import Data
from workbench.synthesis.scores import gradients, vendi

if TYPE_CHECKING:
    from workbench.models import LM


def side_by_side(sets: Mapping[str, Data], lm: "LM", most: int = 200) -> pd.DataFrame:
    """One row a set: recipe, n (questions asked), kept, share [low, high], tokens, variety, cost, calls, seconds.

    share: questions with a record, Wilson's interval. tokens: the median answer's. variety: the Vendi score of the
    records' gradients (at most `most` of them) as a share of their number, in per cent; it falls as a set grows, so
    compare sets of similar size. cost: sampled tokens a kept record. A set that kept nothing has no tokens and variety.
    """
    rows = []
    for name, data in sets.items():
        kept, card = data.kept[:most], data.card
        asked = card["counts"]["questions"]
        answered = len({record["row_id"] for record in data.kept})
        share = wilson(answered, asked)
        row = {"recipe": name, "n": asked, "kept": len(data.kept), "share": share.estimate}
        row |= {"low": share.low, "high": share.high}
        row["tokens"] = median([record["tokens_out"] for record in data.kept]) if kept else 0
        row["variety"] = 100 * vendi(gradients(lm, kept)) / len(kept) if kept else 0.0
        row["cost"] = card["cost"]["tokens_out"] / max(1, len(data.kept))
        rows.append(row | {name: card["cost"][name] for name in ("calls", "seconds")})
    return pd.DataFrame(rows)
