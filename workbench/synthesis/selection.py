"""From verified answers to records: choose one answer a question, then mark leaks and repeats, each with its reason.

Pure functions of what was sampled, so that other choices cost no model call. The two measures are in `overlap`.
"""

import sys
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from workbench.synthesis import overlap
from workbench.synthesis.records import Record

if TYPE_CHECKING:
    from workbench.tasks import Task

Attempt = dict[str, Any]  # row_id, question, answer, plain, prompt, samples: [{text, correct, extracted, ...}]
Select = Literal["shortest", "longest", "diverse", "random", "first"]


def usable(sample: dict[str, Any]) -> bool:
    """Whether an answer is verified, complete, and more than the answer that its prompt gave away."""
    return bool(sample["correct"] and sample["finished"] and not sample.get("echo"))


def selected(attempts: Sequence[Attempt], select: Select, seed: int = 0) -> list[tuple[Attempt, dict[str, Any] | None]]:
    """With each attempt its chosen sample, or None when none is usable; `seed` draws the random ones, row by row."""
    seen: set[tuple[str, ...]] = set()
    chosen: list[tuple[Attempt, dict[str, Any] | None]] = []
    for attempt in attempts:
        good = [sample for sample in attempt["samples"] if usable(sample)]
        sample = None
        if good and select in ("shortest", "longest"):
            pick = min if select == "shortest" else max
            sample = pick(good, key=lambda found: found["tokens_out"])  # the first of equals
        elif good and select == "diverse":  # most shingles that no answer chosen before has
            sample = max(good, key=lambda found: len(overlap.runs(overlap.tokens(found["text"]), 3) - seen))
            seen |= overlap.runs(overlap.tokens(sample["text"]), 3)
        elif good and select == "random":
            sample = Random(f"{seed}/{attempt['row_id']}").choice(good)
        elif good:
            sample = good[0]
        chosen.append((attempt, sample))
    return chosen


def make_record(choice: tuple[Attempt, dict[str, Any] | None], sampling: dict[str, Any], task: str) -> Record:
    """One record; without a chosen answer it shows the first one, is not kept, and says why."""
    attempt, sample = choice
    shown = sample or attempt["samples"][0]
    reason = "verified"
    if sample is None:
        right = [found for found in attempt["samples"] if found["correct"]]
        echo = any(found["finished"] for found in right)
        reason = "repeats the hint" if echo else "cut off at max_new_tokens" if right else "no verified answer"
    names = ("temperature", "top_p", "max_new_tokens", "samples", "seed", "strategy", "style")
    return {
        "id": f"{task}/{attempt['row_id']}", "task": task, "row_id": attempt["row_id"],
        "messages": [*attempt["plain"], {"role": "assistant", "content": shown["text"]}],
        "answer": attempt["answer"], "verdict": {"correct": shown["correct"], "extracted": shown["extracted"]},
        "recipe": sampling["recipe"], "model": sampling["model"],
        "decoding": {name: sampling[name] for name in names}
        | {"sample": attempt["samples"].index(shown)} | ({"hinted": True} if shown.get("hinted") else {}),
        "prompt": attempt["prompt"], "tokens_in": shown["tokens_in"], "tokens_out": shown["tokens_out"],
        "kept": sample is not None, "reason": reason,
    }  # fmt: skip


def drop_leaks(records: list[Record], attempts: list[Attempt], evaluation: "Task", limit: float) -> dict[str, Any]:
    """Mark kept records that overlap with test questions; refuse the set when more than `limit` of them do."""
    try:
        questions = {str(row["id"]): row["question"] for row in evaluation.rows(split="test")}
    except ValueError as error:  # a file that was put into another split as a whole
        print(f"synthesize: overlap not checked, because there are no test questions. {error}", file=sys.stderr)
        questions = {}
    reasons = overlap.contamination([attempt["question"] for attempt in attempts], questions)
    kept = [i for i, record in enumerate(records) if record["kept"]]
    leaking = [i for i in kept if reasons[i]]
    share = len(leaking) / max(1, len(kept))
    if share > limit:
        first = leaking[0]
        raise ValueError(
            f"{len(leaking)} of {len(kept)} verified records ({share:.1%}) overlap with the test questions of task "
            f"{evaluation.name}; at most {limit:.1%} may (max_overlap). A score on those questions would measure "
            f"memory. For example record {records[first]['id']}: {reasons[first]}. Check that the split you synthesize "
            "from holds no test questions; to drop the overlapping records and keep the others, pass max_overlap=1.0."
        )
    for i in leaking:
        records[i] |= {"kept": False, "reason": f"overlap with evaluation: {reasons[i]}"}
    return {"evaluation_questions": len(questions), "dropped": len(leaking), "share": share, "limit": limit}


def drop_repeats(records: list[Record], attempts: list[Attempt], threshold: float) -> None:
    """Mark kept records whose question and answer repeat an earlier kept record's."""
    kept = [i for i, record in enumerate(records) if record["kept"]]
    texts = [f"{attempts[i]['question']}\n{records[i]['messages'][-1]['content']}" for i in kept]
    for i, earlier in zip(kept, overlap.near_duplicates(texts, threshold), strict=True):
        if earlier is not None:
            records[i] |= {"kept": False, "reason": f"repeats record {records[kept[earlier]]['id']}"}
