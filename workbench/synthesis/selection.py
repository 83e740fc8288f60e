"""From verified answers to records: choose one answer a question, then mark leaks and repeats, each with its reason.

Pure functions of what was sampled, so that other choices cost no model call. The two measures are in `overlap`.
"""

import sys
from collections.abc import Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from workbench.synthesis import overlap
from workbench.synthesis.records import NEGATIVE, Record
from workbench.synthesis.sampling import NOTHING, Attempt

if TYPE_CHECKING:
    from workbench.tasks import Task

Dedup = Literal["weighted", "minhash", "exact"]
Select = Literal["shortest", "longest", "diverse", "random", "first"]


def usable(sample: dict[str, Any]) -> bool:
    """Whether an answer is verified, complete, could be edited, and is more than what its prompt gave away."""
    return bool(sample["correct"] and sample["finished"] and "why" not in sample and not sample.get("echo"))


def ranked(attempts: Sequence[Attempt], select: Select, seed: int = 0) -> list[list[dict[str, Any]]]:
    """Each question's usable and distinct answers, best first; `seed` draws the random ones, question by question.

    Two answers are distinct when their tokens differ: case, spacing and sentence punctuation do not count.
    """
    seen: set[tuple[str, ...]] = set()
    result = []
    for attempt in attempts:
        distinct: dict[tuple[str, ...], dict[str, Any]] = {}
        for sample in filter(usable, attempt["samples"]):
            distinct.setdefault(overlap.tokens(sample["text"]), sample)
        good = list(distinct.values())
        if select in ("shortest", "longest"):
            good.sort(key=lambda found: found["tokens_out"], reverse=select == "longest")  # stable: the first of equals
        elif select == "random":
            Random(f"{seed}/{attempt['row_id']}").shuffle(good)
        elif select == "diverse":
            good = _most_new_first(good, seen)
        result.append(good)
    return result


def _most_new_first(good: list[dict[str, Any]], seen: set[tuple[str, ...]]) -> list[dict[str, Any]]:
    """Answers ordered by how many three-token runs each adds to those before it; `seen` takes the first one's runs."""
    found = [(sample, overlap.runs(overlap.tokens(sample["text"]), 3)) for sample in good]
    ordered: list[dict[str, Any]] = []
    known = set(seen)
    while found:
        best = max(found, key=lambda pair: len(pair[1] - known))
        found.remove(best)
        known |= best[1]
        if not ordered:
            seen |= best[1]
        ordered.append(best[0])
    return ordered


def make_records(
    attempts: Sequence[Attempt], sampling: dict[str, Any], task: str, select: Select, chains: int, negatives: int
) -> list[Record]:
    """Up to `chains` kept records a question, then up to `negatives` wrong ones, marked.

    Where no answer is usable, one record that is not kept says why.
    """
    records = []
    for attempt, good in zip(attempts, ranked(attempts, select, sampling["seed"]), strict=True):
        judged = [] if "dropped" in attempt else attempt["samples"]  # nobody knows whether a dropped one is wrong
        wrong = [s for s in judged if not s["correct"] and s["finished"] and s["text"] and "why" not in s]
        made = [_record(attempt, sample, sampling, task, "verified") for sample in good[:chains]]
        made += [_record(attempt, sample, sampling, task, NEGATIVE) for sample in wrong[:negatives]]
        if not good and attempt["samples"]:
            made = [_record(attempt, attempt["samples"][0], sampling, task, _why_none(attempt)), *made]
        for number, record in enumerate(made[1:], start=1):
            record["id"] += f"/{number}"
        records += made
    return records


def _why_none(attempt: Attempt) -> str:
    if "dropped" in attempt:
        return str(attempt["dropped"])
    right = [found for found in attempt["samples"] if found["correct"]]
    lost = [found["why"] for found in right if "why" in found]
    if lost:
        return str(lost[0])
    echo = any(found["finished"] for found in right)
    return "repeats the hint" if echo else "cut off at max_new_tokens" if right else "no verified answer"


def _solve_rate(attempt: Attempt) -> float:
    """Share of right answers among those that were not told the answer: how easy the asked model finds a question."""
    own = [sample["correct"] for sample in attempt["samples"] if not sample.get("hinted")]
    return sum(own) / len(own)


def _record(attempt: Attempt, sample: dict[str, Any], sampling: dict[str, Any], task: str, reason: str) -> Record:
    names = ("temperature", "top_p", "max_new_tokens", "samples", "seed", "strategy", "style")
    return {
        "id": f"{task}/{attempt['row_id']}", "task": task, "row_id": attempt["row_id"],
        "messages": [*attempt["plain"], {"role": "assistant", "content": sample["text"] or NOTHING}],
        "answer": attempt["answer"],
        "verdict": {"correct": sample["correct"], "extracted": sample["extracted"]}
        | ({"by": sample["by"]} if "by" in sample else {}),
        "recipe": sampling["recipe"], "model": sampling["model"],
        "decoding": {name: sampling[name] for name in names}
        | {"sample": attempt["samples"].index(sample)} | ({"hinted": True} if sample.get("hinted") else {}),
        "prompt": attempt["prompt"], "tokens_in": sample["tokens_in"], "tokens_out": sample["tokens_out"],
        "kept": reason == "verified", "reason": reason,
        "solve_rate": _solve_rate(attempt),
        **{name: sampling[name] for name in ("own", "edits") if sampling.get(name)},
        **{name: attempt[name] for name in ("source",) if name in attempt},
    }  # fmt: skip


def question_of(record: Record) -> str:
    """The text that a record asks: its last message but one."""
    return record["messages"][-2]["content"]


def exam_questions(exams: "Sequence[Task]") -> dict[str, dict[str, str]]:
    """Each task's test questions, by its name and their id; none for a file without a test split, which is told."""
    found: dict[str, dict[str, str]] = {}
    for exam in exams:
        own = found.setdefault(exam.name, {})
        try:
            own |= {str(row["id"]): row["question"] for row in exam.rows(split="test")}
        except ValueError as error:  # a file that was put into another split as a whole
            print(f"synthesize: overlap not checked, because there are no test questions. {error}", file=sys.stderr)
    return found


def drop_leaks(records: list[Record], exams: Mapping[str, Mapping[str, str]], limit: float) -> dict[str, Any]:
    """Mark kept records that overlap with test questions; refuse the set when more than `limit` of them do."""
    kept = [record for record in records if record["kept"]]
    told: dict[int, str] = {}
    for name, questions in exams.items():
        for number, reason in enumerate(overlap.contamination([question_of(record) for record in kept], questions)):
            if reason:
                told.setdefault(number, f"{reason} of task {name}")
    counts = {name: len(questions) for name, questions in exams.items()}
    share = len(told) / max(1, len(kept))
    if share > limit:
        first = min(told)
        raise ValueError(
            f"{len(told)} of {len(kept)} verified records ({share:.1%}) overlap with the test questions of "
            f"{', '.join(counts)}; at most {limit:.1%} may (max_overlap). A score on those questions would measure "
            f"memory. For example record {kept[first]['id']}: {told[first]}. Check that the split you synthesize "
            "from holds no test questions; to drop the overlapping records and keep the others, pass max_overlap=1.0."
        )
    for number, reason in told.items():
        kept[number] |= {"kept": False, "reason": f"overlap with evaluation: {reason}"}
    return {"evaluation_questions": sum(counts.values()), "by_task": counts, "dropped": len(told), "share": share,
            "limit": limit}  # fmt: skip


def drop_repeats(records: list[Record], threshold: float, dedup: Dedup = "weighted") -> None:
    """Mark kept records whose question and answer repeat an earlier kept record's."""
    kept = [record for record in records if record["kept"]]
    texts = [f"{question_of(record)}\n{record['messages'][-1]['content']}" for record in kept]
    if dedup == "minhash":
        repeats = overlap.minhash_duplicates(texts, threshold)
    else:  # at a similarity of 1 only equal token sequences are repeats
        repeats = overlap.near_duplicates(texts, 1.0 if dedup == "exact" else threshold)
    for record, earlier in zip(kept, repeats, strict=True):
        if earlier is not None:
            record |= {"kept": False, "reason": f"repeats record {kept[earlier]['id']}"}
