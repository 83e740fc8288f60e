"""Write records with a card that says how they came about, for a program (JSON) and for a reader (Markdown).

The card is written last, so a folder with a card is complete. Times are in the card only: records repeat byte for byte.
"""

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from workbench.files import sha256, write_atomic
from workbench.synthesis.records import NEGATIVE, Record


def write_records(out: Path, records: Sequence[Record], file_format: Literal["jsonl", "parquet"]) -> Path:
    """All records into `out`/records.jsonl or records.parquet; a file of the other format is removed."""
    if file_format == "parquet":
        import pyarrow
        import pyarrow.parquet

        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), buffer)
        content = buffer.getvalue()
    else:
        content = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    (out / f"records.{'jsonl' if file_format == 'parquet' else 'parquet'}").unlink(missing_ok=True)
    file = out / f"records.{file_format}"
    write_atomic(file, content)
    return file


def make_card(
    out: Path,
    file: Path,
    records: Sequence[Record],
    questions: int,
    *,
    key: str,
    parameters: dict[str, Any],
    costs: dict[str, dict[str, float]],
    overlap: dict[str, Any],
) -> None:
    """Write card.md, then card.json."""
    kept = [record for record in records if record["kept"]]
    # "repeats record 17" and "repeats record 18" are one reason; what follows the first word group is the instance
    groups = ("overlap with evaluation", "repeats record")
    reasons = Counter(
        next((group for group in groups if record["reason"].startswith(group)), record["reason"])
        for record in records
        if not record["kept"] and record["reason"] != NEGATIVE
    )
    negative = sum(record["reason"] == NEGATIVE for record in records)
    cost = {
        name: sum(step[name] for step in costs.values()) for name in ("calls", "tokens_in", "tokens_out", "seconds")
    }
    card = {
        "key": key,
        "records": {"file": file.name, "sha256": sha256(file)},
        "counts": {"questions": questions, "kept": len(kept), "rejected": dict(sorted(reasons.items()))}
        | ({"negative": negative} if negative else {}),
        "lengths": {
            "prompt tokens": percentiles([record["tokens_in"] for record in kept]),
            "answer tokens": percentiles([record["tokens_out"] for record in kept]),
        },
        "cost": cost | {"steps": costs},
        "overlap": overlap,
        "parameters": parameters,
    }
    write_atomic(out / "card.md", _markdown(card))
    write_atomic(out / "card.json", json.dumps(card, indent=2, ensure_ascii=False))


def percentiles(values: Sequence[int]) -> dict[str, float]:
    """Minimum, 5 %, median, 95 % and maximum, by name."""
    if not values:
        return {}
    named = zip(("min", "p5", "median", "p95", "max"), np.percentile(values, [0, 5, 50, 95, 100]), strict=True)
    return {name: float(value) for name, value in named}


def _markdown(card: dict[str, Any]) -> str:
    parameters, counts, cost, lengths = card["parameters"], card["counts"], card["cost"], card["lengths"].items()
    negative = [f"| {NEGATIVE} | {counts['negative']} |"] if "negative" in counts else []
    lines = [
        f"# Records for {parameters['task']}",
        "",
        f"{counts['questions']} questions gave {counts['kept']} records to train on. Recipe `{parameters['recipe']}`, "
        f"model {parameters['model']['name']} (revision {parameters['model']['revision']}).",
        "",
        "| outcome | records |",
        "|---|---|",
        f"| kept | {counts['kept']} |",
        *(f"| {reason} | {count} |" for reason, count in counts["rejected"].items()),
        *negative,
        "",
        "| length | min | 5 % | median | 95 % | max |",
        "|---|---|---|---|---|---|",
        *("| " + " | ".join([name, *(f"{v:g}" for v in found.values())]) + " |" for name, found in lengths),
        "",
        f"Cost: {cost.get('calls', 0):,} calls, {cost.get('tokens_in', 0):,} tokens in, "
        f"{cost.get('tokens_out', 0):,} tokens out, {cost.get('seconds', 0):.1f} s.",
        "",
        f"Overlap: {card['overlap']['dropped']} verified records shared 13 tokens in a row with one of "
        f"{card['overlap']['evaluation_questions']} evaluation questions and were dropped.",
        "",
        "| parameter | value |",
        "|---|---|",
        *(f"| {name} | {json.dumps(value, ensure_ascii=False)} |" for name, value in parameters.items()),
        "",
    ]
    return "\n".join(lines)
