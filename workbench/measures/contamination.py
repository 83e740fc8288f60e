"""Did the model see the test questions in training? Overlap of 13 tokens, and accuracy on the clean and the rest.

The rule is that of `workbench.synthesis.overlap.contamination`, read the other way round: for each test question, what
of the training texts it repeats. How rare a word must be to count is therefore measured among the training texts; a run
that more than a hundredth of the test questions share (or two) is their template and doesn't count, while one that
stands in many training texts does: what leaked often is remembered best.

Does not cover: templated questions of which a training text repeats a part (the rule asks for rare words, and a whole
equal question is found always), paraphrases and translations, memory without overlap (completion tests, membership
inference).
Sources: clean and dirty subsets, Brown et al. 2020 (arXiv 2005.14165, appendix C); limits of a difference of two
independent shares, Newcombe 1998, Statistics in Medicine 17:873-890, method 10.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from workbench.measures.resampling import bootstrap_statistics
from workbench.statistics import Comparison, wilson
from workbench.synthesis.overlap import contamination, runs, tokens

RUN = 13


def record_texts(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a model reads of training records: the content of each message, one text a message.

    >>> record_texts([{"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}])
    ['2 + 2?', '4']
    """
    return [str(turn["content"]) for record in records for turn in record["messages"]]


def overlaps(questions: Sequence[Mapping[str, Any]], training: Sequence[str], n: int = RUN) -> pd.DataFrame:
    """For each test question (rows of a task) whether it repeats a training text: id, dirty, why (None where clean).

    Args:
        training: texts, such as `record_texts(load_data(FOLDER).kept)`; equal ones count once.
        n: tokens in a row.
    """
    if not questions or isinstance(training, str) or not len(training):
        raise ValueError(
            f"Got {len(questions)} questions and {len(training)} training texts: give task.rows(...) and a list of "
            "texts, with at least one of each."
        )
    texts = {f"text {number}": text for number, text in enumerate(dict.fromkeys(training))}
    asked = [str(row["question"]) for row in questions]
    counts = Counter(run for one in dict.fromkeys(map(tokens, asked)) if len(one) >= n for run in runs(one, n))
    templates = {run for run, count in counts.items() if count > max(1, len(asked) // 100)}
    found = contamination(asked, texts, n, templates)
    why = [each and each.replace("evaluation question text", "training text") for each in found]
    frame = {"id": [str(row["id"]) for row in questions], "dirty": [each is not None for each in found]}
    return pd.DataFrame(frame).assign(why=pd.Series(why, dtype=object))


def contamination_table(
    rows: pd.DataFrame, overlap: pd.DataFrame, *, baseline: str | None = None, level: float = 0.95
) -> pd.DataFrame:
    """One row a condition: share of dirty questions, accuracy on clean and dirty ones, their difference with limits.

    Dirty questions may be easier or harder by themselves. With a `baseline` (a condition that was not trained on these
    texts) `excess` is what remains: the gain over it on dirty questions minus the gain on clean ones.

    Args:
        rows: id, condition, correct; one row a question and condition.
        overlap: from `overlaps`, for the same questions.

    Returns:
        n, share, clean, dirty (Wilson), difference (dirty - clean; Newcombe) with p_value (Fisher's exact test), excess
        (bootstrap over questions); each with _low and _high, nan where one side is empty.
    """
    known = overlap.set_index("id").dirty
    strange = [name for name in rows.id.astype(str) if name not in known.index]
    if strange or rows.duplicated(["id", "condition"]).any():
        said = f"{strange[0]!r} is not in the overlap" if strange else "a question has several rows a condition"
        raise ValueError(f"{said}. Give one row a question, and overlaps(...) of the same task.rows(...).")
    if baseline is not None and baseline not in set(rows.condition):
        raise ValueError(
            f"baseline={baseline!r} is no condition. Conditions: {', '.join(dict.fromkeys(rows.condition))}."
        )
    right = rows.assign(id=rows.id.astype(str)).pivot(index="id", columns="condition", values="correct").astype(float)
    lines = []
    for name in dict.fromkeys(rows.condition):
        own = right[name].dropna()
        dirty = known[own.index].to_numpy(bool)
        line: dict[str, Any] = {"condition": str(name), "n": len(own)}
        hits = {"share": dirty, "clean": own[~dirty].to_numpy(), "dirty": own[dirty].to_numpy()}
        for key, values in hits.items():
            found = wilson(int(values.sum()), len(values), level) if len(values) else None
            line |= (
                {key: found.estimate, f"{key}_low": found.low, f"{key}_high": found.high} if found else {key: math.nan}
            )
        if len(hits["clean"]) and len(hits["dirty"]):
            change = two_shares(hits["clean"].tolist(), hits["dirty"].tolist(), level)
            line |= {"difference": change.difference, "difference_low": change.low, "difference_high": change.high}
            line |= {"p_value": change.p_value}
        if baseline is not None and name != baseline:
            line |= _excess((own - right.loc[own.index, baseline]).to_numpy(), dirty, level)
        lines.append(line)
    return pd.DataFrame(lines)


def _excess(gain: np.ndarray, dirty: np.ndarray, level: float) -> dict[str, float]:
    def of(picked: np.ndarray) -> list[float]:
        side = dirty[picked]
        if side.all() or not side.any():
            return [math.nan]
        return [float(gain[picked][side].mean() - gain[picked][~side].mean())]

    found = bootstrap_statistics(of, len(gain), level=level)[0]
    return {"excess": found.estimate, "excess_low": found.low, "excess_high": found.high}


def two_shares(a: Sequence[Any], b: Sequence[Any], level: float = 0.95) -> Comparison:
    """The difference b - a of right answers to *different* questions: Newcombe's limits, Fisher's exact test.

    For the same questions use `paired_difference`, which is far more sensitive. n is all rows; discordant is 0.

    >>> found = two_shares([1] * 48 + [0] * 32, [1] * 56 + [0] * 14)
    >>> round(found.difference, 2), round(found.low, 4), round(found.high, 4)
    (0.2, 0.0524, 0.3339)
    """
    first, second = wilson(int(sum(a)), len(a), level), wilson(int(sum(b)), len(b), level)
    change = second.estimate - first.estimate
    low = change - math.hypot(second.estimate - second.low, first.high - first.estimate)
    high = change + math.hypot(second.high - second.estimate, first.estimate - first.low)
    counts = [[int(sum(side)), len(side) - int(sum(side))] for side in (a, b)]
    p_value = float(stats.fisher_exact(counts).pvalue)
    return Comparison(change, low, high, p_value, len(a) + len(b), 0, "Newcombe's interval, Fisher's exact test")
