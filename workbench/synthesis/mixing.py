"""Put finished sets of records together under one budget, so that arms of a comparison learn from equally much.

`mix` draws from named parts by shares (long and short chains, strong and weak teachers: arXiv 2502.12143), counts
records or learnt tokens against a budget that all arms can be given, balances by a field, and orders what it took
(curricula). Choosing by difficulty, diversity or quality happens before, by a `score` (`scores`). A mixed set is a
folder like any other: `load_data` reads it, `finetune` learns from it in its order when told `order="given"`.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

from workbench.files import content_key, sha256, write_atomic
from workbench.synthesis.card import percentiles, write_records
from workbench.synthesis.records import Data, Record, load_data
from workbench.synthesis.stages import described

Order = Literal["mixed", "easy first", "hard first", "short first", "long first", "sequential"]
Score = Callable[[Sequence[Record]], Sequence[float]]


def mix(
    parts: Mapping[str, Data | str | Path],
    out: str | Path,
    *,
    shares: Mapping[str, float] | None = None,
    records: int | None = None,
    tokens: int | None = None,
    order: Order = "mixed",
    balance: str | None = None,
    score: Score | None = None,
    seed: int = 0,
) -> Data:
    """Kept records of several sets as one, at most `records` of them or `tokens` answer tokens; written to `out`.

    Args:
        parts: sets by name; each record of the result says in `part` which one it came from.
        shares: share of the budget by part (they sum to 1); without them, all parts are one pool.
        records, tokens: the budget; a set that can't fill its share is refused, with what it holds.
        order: in which order the result stands: shuffled, by `solve_rate`, by answer length, or part after part.
        balance: a field (such as "task"): take equally many records of each value, in turn.
        score: records -> numbers; the highest are taken first, instead of a random draw.
        seed: draws and shuffles.

    With shares, a question is taken from one part only, unless there is no other. Raises `ValueError` for shares,
    budgets and orders that can't be, before anything is written.
    """
    sets = {name: part if isinstance(part, Data) else load_data(part) for name, part in parts.items()}
    shares = dict(shares) if shares is not None else None
    _check(sets, shares, records, tokens, order)
    pools = {
        name: [record | {"part": name} for record in _shuffled(d.kept, f"{seed}/{name}")] for name, d in sets.items()
    }
    if shares is None:
        pool = _ranked(_shuffled(list(chain(*pools.values())), str(seed)), balance, score)
        taken = _take(pool, records, tokens, set())
        _check_filled(" and ".join(sets), taken, len(pool), records, tokens)
    else:
        taken, asked = [], set[str]()
        for name, share in shares.items():
            most, long = (None if limit is None else round(limit * share) for limit in (records, tokens))
            pool = _ranked(pools[name], balance, score)
            found = _take(pool, most, long, asked)
            _check_filled(name, found, len(pool), most, long)
            asked |= {_question(record) for record in found}
            taken += found
    chosen = _ordered(taken, order, seed)
    settings = {
        "parts": {name: content_key(records=data.kept) for name, data in sets.items()}, "shares": shares,
        "records": records, "tokens": tokens, "order": order, "balance": balance, "seed": seed,
        "score": described(score) if score else None,
    }  # fmt: skip
    return _write(Path(out), _with_unique_ids(chosen), settings)


def _check(
    sets: Mapping[str, Data], shares: Mapping[str, float] | None, records: int | None, tokens: int | None, order: str
) -> None:
    if not sets:
        raise ValueError("mix() got no parts. Give at least one: mix({'name': data}, out=FOLDER).")
    empty = [name for name, data in sets.items() if not data.kept]
    if empty:
        raise ValueError(f"The parts {', '.join(empty)} hold no kept record. Leave them out, or make them anew.")
    for name, data in sets.items():
        bare = next((place for place, r in enumerate(data.kept, start=1) if not {"id", "tokens_out"} <= r.keys()), None)
        if bare is not None:
            raise ValueError(
                f"Kept record {bare} of the part {name!r} has no id or no tokens_out (tokens of its answer): "
                "mix() counts by them. Use what synthesize() made, or add the two fields to each record."
            )
    if order not in get_args(Order):
        raise ValueError(f"order={order!r} is not known. Choose one of {', '.join(get_args(Order))}.")
    if records is not None and tokens is not None:
        raise ValueError(f"records={records} and tokens={tokens}: a budget is one of the two. Leave one out.")
    for name, limit in {"records": records, "tokens": tokens}.items():
        if limit is not None and limit < 1:
            raise ValueError(f"{name}={limit} is too small: give 1 or more, or None for all.")
    if shares is not None:
        if set(shares) != set(sets):
            raise ValueError(f"shares name {sorted(shares)}, parts {sorted(sets)}: they must be the same.")
        if any(share <= 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
            raise ValueError(f"shares={dict(shares)} must each be above 0 and sum to 1.")
        if records is None and tokens is None:
            raise ValueError("shares need a budget to be shares of: give records= or tokens=.")
        none = [name for name, share in shares.items() if round((records or tokens or 0) * share) < 1]
        if none:
            raise ValueError(f"The budget is too small: the shares of {', '.join(none)} come to nothing. Raise it.")
    if order in ("easy first", "hard first"):
        unknown = next(
            (r for data in sets.values() for r in data.kept if not isinstance(r.get("solve_rate"), float)), None
        )
        if unknown is not None:
            raise ValueError(
                f"order={order!r} needs a solve_rate in every record; {unknown.get('id', 'one')} has none. Use what "
                "synthesize() made, or set it with scores.with_solve_rate(lm, task, records)."
            )


def _shuffled(records: Sequence[Record], seed: str) -> list[Record]:
    shuffled = list(records)
    Random(seed).shuffle(shuffled)
    return shuffled


def _ranked(records: Sequence[Record], balance: str | None, score: Score | None) -> list[Record]:
    """Shuffled records in the order in which they are taken: the best first, and the values of `balance` in turn."""
    ranked = list(records)
    if score is not None:
        values = score(ranked)
        ranked = [ranked[i] for i in sorted(range(len(ranked)), key=lambda i: -values[i])]
    if balance is None:
        return ranked
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in ranked:
        if balance not in record:
            raise ValueError(
                f"balance={balance!r}: record {record.get('id')} has no such field, only {sorted(record)}."
            )
        groups[str(record[balance])].append(record)
    return [record for turn in zip(*groups.values(), strict=False) for record in turn]  # the smallest limits the others


def _take(pool: Sequence[Record], records: int | None, tokens: int | None, asked: set[str]) -> list[Record]:
    """From the front while the budget lasts; questions asked already come last."""
    fresh = [record for record in pool if _question(record) not in asked]
    taken: list[Record] = []
    used = 0
    for record in chain(fresh, (record for record in pool if _question(record) in asked)):
        used += record["tokens_out"] if tokens is not None else 0
        if len(taken) == records or (tokens is not None and used > tokens):
            break
        taken.append(record)
    return taken


def _question(record: Record) -> str:
    return "\n".join(message["content"] for message in record["messages"][:-1])


def _check_filled(name: str, found: Sequence[Record], held: int, records: int | None, tokens: int | None) -> None:
    if records is not None and len(found) < records:
        raise ValueError(
            f"The part {name!r} should give {records} records and holds {held}. Make more of it (n=), lower the "
            "budget, or give it a smaller share."
        )
    spent = sum(record["tokens_out"] for record in found)
    longest = max((record["tokens_out"] for record in found), default=0)
    if tokens is not None and len(found) == held and tokens - spent > longest:
        raise ValueError(
            f"The part {name!r} should give {tokens} answer tokens and holds {spent} in all. Make more of it (n=), "
            "lower the budget, or give it a smaller share."
        )


def _ordered(records: list[Record], order: Order, seed: int) -> list[Record]:
    if order == "sequential":
        return records
    mixed = _shuffled(records, f"order/{seed}")
    if order == "mixed":
        return mixed
    field, down = {
        "easy first": ("solve_rate", True), "hard first": ("solve_rate", False), "short first": ("tokens_out", False),
        "long first": ("tokens_out", True),
    }[order]  # fmt: skip
    return sorted(mixed, key=lambda record: record[field], reverse=down)  # stable: ties stay shuffled


def _with_unique_ids(records: Sequence[Record]) -> list[Record]:
    many = {name for name, count in Counter(record["id"] for record in records).items() if count > 1}
    return [r | {"id": f"{r['part']}/{r['id']}"} if r["id"] in many else r for r in records]


def _write(out: Path, records: list[Record], settings: dict[str, Any]) -> Data:
    file = write_records(out, records, "jsonl")
    by_part = dict(Counter(record["part"] for record in records))
    card = {
        "key": content_key(settings=settings), "records": {"file": file.name, "sha256": sha256(file)},
        "counts": {"kept": len(records), "by_part": by_part, "tokens": sum(r["tokens_out"] for r in records)},
        "lengths": {"answer tokens": percentiles([record["tokens_out"] for record in records])},
        "parameters": settings,
    }  # fmt: skip
    write_atomic(out / "card.json", json.dumps(card, indent=2, ensure_ascii=False))
    return load_data(out)
