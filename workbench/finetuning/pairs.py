"""Pairs of a right and a wrong chain to one question, from verified samples, and their tokens.

Data only: what is learnt from pairs is in `preference`. Not covered: pairs of two right answers, judged preferences.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal, get_args

from workbench.synthesis.records import Data, Record, RecordError, check_record, load_data

if TYPE_CHECKING:
    from workbench.models import LM

Choose = Literal["close", "shortest", "random"]
WITHOUT = ("only right", "only wrong", "neither")


@dataclass(frozen=True)
class Pair:
    """Two answers to one question, of which the first is right; lengths in tokens where the records say them."""

    row_id: str
    prompt: list[dict[str, str]]
    chosen: str
    rejected: str
    chosen_id: str
    rejected_id: str
    chosen_length: int
    rejected_length: int


@dataclass(frozen=True)
class Preferences:
    """Pairs, and how many questions had some: `counts` names questions by what they hold."""

    pairs: list[Pair]
    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.pairs)


def preference_pairs(
    data: Data | str | Path | list[Record], *, per_question: int = 1, choose: Choose = "close", seed: int = 0
) -> Preferences:
    """Pairs of a right and a wrong chain of the same question, from what `synthesize(..., negatives=k)` wrote.

    No chain is used twice. Right chains that were set aside only because they repeat an earlier record count too;
    what overlaps with test questions does not. Questions without a pair are counted, and told on standard error.

    Args:
        per_question: at most so many pairs a question.
        choose: "close" takes the pairs that differ least in length, so that length is not what is learnt; "shortest"
            takes the shortest right chains against the longest wrong ones; "random" draws with `seed`.

    Raises RecordError when no question has both a right and a wrong chain.

    >>> def made(row, number, right, text):
    ...     messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": text}]
    ...     return {"id": f"{row}/{number}", "row_id": row, "messages": messages, "verdict": {"correct": right}}
    >>> records = [made("a", 0, True, "2+2=4."), made("a", 1, False, "2+2=5, so 5."), made("a", 2, False, "5.")]
    >>> preference_pairs(records, choose="shortest").pairs[0].rejected
    '2+2=5, so 5.'
    """
    if choose not in get_args(Choose):
        raise ValueError(f"choose={choose!r} is not known. Choose one of {', '.join(get_args(Choose))}.")
    if per_question < 1:
        raise ValueError(f"per_question={per_question} is too small: give 1 or more.")
    pairs: list[Pair] = []
    counts = Counter(dict.fromkeys(("questions", "with a pair", *WITHOUT), 0))
    for row_id, (right, wrong) in _by_question(data).items():
        found = _paired(row_id, right, wrong, choose, per_question, seed)
        kind = "with a pair" if found else "only right" if right else "only wrong" if wrong else "neither"
        counts.update(["questions", kind])
        pairs += found
    without = ", ".join(f"{counts[name]} {name}" for name in WITHOUT if counts[name])
    missing = counts["questions"] - counts["with a pair"]
    told = f"{missing} of {counts['questions']} questions have no pair ({without})"
    if not pairs:
        raise RecordError(
            f"{told}. Sample more answers a question (samples=8), at a higher temperature, and keep wrong ones: "
            "synthesize(..., negatives=4, chains=4)."
        )
    if missing:
        print(f"preference_pairs: {told}.", file=sys.stderr)
    return Preferences(pairs, dict(counts))


def _by_question(data: Data | str | Path | list[Record]) -> dict[str, tuple[list[Record], list[Record]]]:
    """Right and wrong records of each question."""
    if not isinstance(data, list):
        data = (data if isinstance(data, Data) else load_data(data)).records
    questions: dict[str, tuple[list[Record], list[Record]]] = {}
    for number, record in enumerate(data, start=1):
        check_record(record, f"record {number}")
        right, wrong = questions.setdefault(str(record.get("row_id", record["messages"][:-1])), ([], []))
        correct = record.get("verdict", {}).get("correct")
        if correct and _not_leaked(record):
            right.append(record)
        elif correct is False and _complete(record):
            wrong.append(record)
    return questions


def _not_leaked(record: Record) -> bool:
    return record.get("kept", True) or str(record.get("reason", "")).startswith("repeats record")


def _complete(record: Record) -> bool:
    """A wrong chain that was cut off is no example: the stop token that it would be trained with was never its own."""
    return not str(record.get("reason", "")).startswith("cut off")


def _length(record: Record) -> int:
    return int(record.get("tokens_out") or len(record["messages"][-1]["content"].split()))


def _paired(row_id: str, right: list[Record], wrong: list[Record], choose: Choose, limit: int, seed: int) -> list[Pair]:
    """The best pairs in which no chain comes twice."""
    every = [(good, bad) for good in range(len(right)) for bad in range(len(wrong))]
    long_right, long_wrong = [_length(record) for record in right], [_length(record) for record in wrong]
    if choose == "random":
        Random(f"{seed}/{row_id}").shuffle(every)
    elif choose == "close":
        every.sort(key=lambda pair: abs(long_right[pair[0]] - long_wrong[pair[1]]))  # stable: the first of equals
    else:
        every.sort(key=lambda pair: long_right[pair[0]] - long_wrong[pair[1]])
    used: tuple[set[int], set[int]] = (set(), set())
    pairs: list[Pair] = []
    for good, bad in every:
        if len(pairs) < limit and good not in used[0] and bad not in used[1]:
            used[0].add(good)
            used[1].add(bad)
            chosen, rejected = right[good], wrong[bad]
            pair = Pair(
                row_id=row_id,
                prompt=chosen["messages"][:-1],
                chosen=chosen["messages"][-1]["content"],
                rejected=rejected["messages"][-1]["content"],
                chosen_id=str(chosen.get("id", "")),
                rejected_id=str(rejected.get("id", "")),
                chosen_length=long_right[good],
                rejected_length=long_wrong[bad],
            )
            pairs.append(pair)
    return pairs


def encode_pairs(lm: "LM", pairs: Sequence[Pair], max_length: int) -> tuple[list[dict[str, list[int]]], int]:
    """Token ids of prompt, right and wrong answer, each answer up to and including its stop token; and how many were
    left out because a side is longer than `max_length` with its prompt.

    The tokens are those of `packing.encode`, so preferences and supervised training learn the same ones.
    """
    from workbench.finetuning.packing import IGNORED, encode

    rows, left_out = [], 0
    for number, pair in enumerate(pairs, start=1):
        sides = {}
        for name, text, own in (("chosen", pair.chosen, pair.chosen_id), ("rejected", pair.rejected, pair.rejected_id)):
            messages = [*pair.prompt, {"role": "assistant", "content": text}]
            example = encode(lm, {"messages": messages}, f"pair {number}, {name} answer ({own or 'no id'})")
            first = next(i for i, label in enumerate(example.labels) if label != IGNORED)
            sides["prompt_ids"] = example.input_ids[:first]
            sides[f"{name}_ids"] = [label for label in example.labels if label != IGNORED]
        longest = len(sides["prompt_ids"]) + max(len(sides["chosen_ids"]), len(sides["rejected_ids"]))
        if longest > max_length:
            left_out += 1
        else:
            rows.append(sides)
    if not rows:
        raise RecordError(f"All {len(pairs)} pairs are longer than max_length={max_length} tokens. Raise max_length.")
    return rows, left_out


def single_answers(rows: Sequence[dict[str, list[int]]], batch: int, seed: int) -> list[dict[str, Any]]:
    """Both answers of every pair on their own, shuffled; each with the answer before it in its batch, for KTO's KL.

    TRL's own order would put all right answers first, and its batches are taken in order.
    """
    single = [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row[f"{name}_ids"], "label": name == "chosen"}
        for row in rows
        for name in ("chosen", "rejected")
    ]
    Random(seed).shuffle(single)
    for begin in range(0, len(single), batch):
        part = single[begin : begin + batch]
        for place, row in enumerate(part):
            row["KL_completion_ids"] = part[place - 1]["completion_ids"]
    return single
