"""Milliseconds a token while decoding, measured interleaved, so that what else the machine does falls on all alike.

Every condition decodes the same forced tokens for the same rows behind its own prompt, with the same kind of cache.
Prefill is measured by itself. Not covered: sampling, padding and batches that shrink, which `generate` adds to each.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from workbench.cache import new_cache
from workbench.interventions import Intervention
from workbench.models import LM
from workbench.statistics import Interval

RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Timed:
    """A condition to time: its prompt, what is in force, and whether the cache is used."""

    prompt: str
    change: Intervention | None = None
    use_cache: bool = True


def time_rounds(
    lm: LM, conditions: Mapping[str, Timed], *, rows: int = 8, tokens: int = 16, rounds: int = 9
) -> pd.DataFrame:
    """One line a round and condition: ms_per_token (a step's time over its rows) and prefill_ms (a row).

    Each round times every condition once and starts with another one; a first round warms up and is left out.
    Columns: round, condition, ms_per_token, prefill_ms, rows, tokens, use_cache.
    """
    names = list(conditions)
    if not names or min(rows, tokens, rounds) < 1:
        raise ValueError(f"{len(names)} conditions, rows={rows}, tokens={tokens}, rounds={rounds}: each is at least 1.")
    lines = []
    for turn in range(rounds + 1):
        took = {}
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            took[name] = _once(lm, conditions[name], rows, tokens)
        for name in names:
            start, steps = took[name]
            line = {"round": turn, "condition": name, "ms_per_token": 1000 * steps / tokens / rows}
            line |= {"prefill_ms": 1000 * start / rows, "rows": rows, "tokens": tokens}
            lines.append(line | {"use_cache": conditions[name].use_cache})
    table = pd.DataFrame(lines)
    return table[table["round"] > 0].reset_index(drop=True)


def latency_table(rounds: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """One line a condition: medians over rounds of its ms a token, its prefill and its ratio to `baseline`.

    low and high are 95 % bootstrap limits over rounds. The ratio is taken within each round: the fairer number where
    the machine is busy.
    """
    wide = rounds.pivot(index="round", columns="condition", values="ms_per_token")
    if baseline not in wide:
        raise ValueError(f"baseline={baseline!r} was not timed. Timed: {', '.join(map(str, wide))}.")
    lines = []
    for name, own in rounds.groupby("condition", sort=False):
        line: dict[str, object] = {"condition": name}
        ratio = (wide[name] / wide[baseline]).to_numpy()
        for column, values in (("ms_per_token", own.ms_per_token), ("ratio", ratio), ("prefill_ms", own.prefill_ms)):
            found = _median(np.asarray(values, dtype=float))
            line |= {column: found.estimate, f"{column}_low": found.low, f"{column}_high": found.high}
        lines.append(line | {"rounds": len(own), "use_cache": bool(own.use_cache.iloc[0])})
    return pd.DataFrame(lines)


def _once(lm: LM, timed: Timed, rows: int, tokens: int) -> tuple[float, float]:
    """Seconds of the prefill and of `tokens` steps behind it."""
    ids = torch.tensor([lm.encode(timed.prompt)] * rows, device=lm.device)
    forced = ids[:, torch.arange(tokens) % ids.shape[1]]  # any tokens do, as long as they are the same for all
    cache = new_cache(lm) if timed.use_cache else None
    with lm.apply([timed.change] * rows, prompt_lengths=[ids.shape[1]] * rows), torch.no_grad():
        began = _now(lm)
        _step(lm, ids, cache)
        middle = _now(lm)
        for place in range(tokens):
            new = forced[:, place : place + 1]
            ids = torch.cat([ids, new], dim=1)
            _step(lm, new if timed.use_cache else ids, cache)
        return middle - began, _now(lm) - middle


def _step(lm: LM, ids: Int[Tensor, "rows seq"], cache: object) -> None:
    lm.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None)


def _now(lm: LM) -> float:
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
    return time.perf_counter()


def _median(data: np.ndarray) -> Interval:
    """The median with percentile-bootstrap limits."""
    drawn = np.random.default_rng(0).choice(data, (RESAMPLES, len(data)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return Interval(float(np.median(data)), float(low), float(high), len(data))
