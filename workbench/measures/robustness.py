"""Does the answer stay when the problem stays, and follow when the problem changes?

`perturbed` makes another task from a task and a change (`perturbations`); `evaluate` takes it unchanged, and rows keep
the ids of the questions that they come from. `keep_rate` and `adapt_rate` set the two evaluations side by side.

    changed = perturbed(task, change_number)
    before, after = wb.evaluate(lm, task, conditions), wb.evaluate(lm, changed, conditions)
    adapt_rate(before.rows, after.rows)

Does not cover: attacks that search for a perturbation. A high adapt-rate needs a model that was right at first: both
rates are among the questions that it answered right before.
Sources: contrast consistency, Gardner et al. 2020 (arXiv 2004.02709); order of examples, Lu et al. 2022 (arXiv
2104.08786); wording, Sclar et al. 2024 (arXiv 2310.11324).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.measures.abstention import judged
from workbench.statistics import Interval, beta_binomial_interval, paired_difference, wilson
from workbench.tasks import Task

if TYPE_CHECKING:
    from workbench.prompts import Strategy

Row = dict[str, Any]
Change = Callable[[Row, Random], Row | str]
Message = dict[str, str]
_STALE = ("solutions", "solution", "equation", "rationale", "body", "options")  # what a file told of the old question


@dataclass(frozen=True)
class Variant(Task):
    """A task whose rows or prompts differ from those of `original`, whose worked examples it shows."""

    original: Task | None = None
    rewrite: Callable[[Row, list[Message]], list[Message]] | None = None

    @property
    def examples(self) -> list[Row]:
        """The original's: what is measured is the change of the question, not that of its examples."""
        assert self.original is not None
        return self.original.examples

    def messages(self, row: Row, strategy: "Strategy | None" = None) -> list[Message]:
        assert self.original is not None
        asked = self.original.messages(row, strategy)
        return self.rewrite(row, asked) if self.rewrite else asked


def variant(original: Task, name: str, **changes: Any) -> Variant:
    """A task like `original` but for draw, judge, kind or rewrite."""
    same = {key: getattr(original, key) for key in ("kind", "source", "draw", "judge", "parameters", "bad")}
    return Variant(**(same | {"name": f"{original.name}, {name}", "original": original} | changes))


def perturb(rows: list[Row], change: Change, seed: int = 0) -> tuple[list[Row], Counter[str]]:
    """Changed rows with the ids of their originals, and how many were left out, by reason.

    A row's own change depends on its id and the seed alone. `original_answer` holds the gold answer from before.
    """
    kept: list[Row] = []
    left_out: Counter[str] = Counter()
    for row in rows:
        changed = change(row, Random(f"{row['id']}/{seed}"))
        if isinstance(changed, str):
            left_out[changed] += 1
            continue
        fresh = {key: value for key, value in changed.items() if key not in _STALE}
        kept.append(fresh | {"id": row["id"], "original_answer": row["answer"]})
    return kept, left_out


def perturbed(task: Task, change: Change, *, seed: int = 0) -> Task:
    """`task` with every question changed; questions without such a change are left out (count them with `perturb`).

    Asked for n rows it draws n of the original's and gives those that can be changed, so that it stays with the same
    questions. What it leaves out is more often the longer and odder questions: compare with the same ids only, as the
    rates below do.

    Raises:
        ValueError: from `rows`, when no question of the sample can be changed; it names the reasons.

    >>> from workbench.measures.perturbations import change_number
    >>> from workbench.tasks import load_task
    >>> perturbed(load_task("word-problems"), change_number).name
    'word-problems, change_number'
    """
    name = getattr(change, "__name__", "changed")

    def draw(split: str, n: int | None, draw_seed: int) -> list[Row]:
        kept, left_out = perturb(task.draw(split, n, draw_seed), change, seed)
        if not kept:
            reasons = "; ".join(f"{reason} ({count})" for reason, count in left_out.most_common())
            raise ValueError(
                f"No {split} question of {task.name!r} has the change {name!r}: {reasons}. Try another one."
            )
        return kept

    parameters = task.parameters | {"change": name, "change_seed": seed}
    return variant(task, name, draw=draw, judge=judged(task.judge), parameters=parameters)


def shuffled_shots(task: Task, *, seed: int = 0) -> Task:
    """`task` with the worked examples of every prompt in another order; question and gold answer stay.

    Raises:
        ValueError: a prompt with fewer than two examples, which has no other order.
    """

    def rewrite(row: Row, asked: list[Message]) -> list[Message]:
        head = asked[:1] if asked[0]["role"] == "system" else []
        turns = asked[len(head) : -1]
        pairs = [turns[start : start + 2] for start in range(0, len(turns), 2)]
        if len(pairs) < 2:
            raise ValueError(f"{len(pairs)} examples have no other order. Use a strategy with two or more: few_shot().")
        order = Random(f"{row['id']}/{seed}").sample(range(len(pairs)), len(pairs))
        places = order if order != sorted(order) else [*order[1:], order[0]]
        return [*head, *(turn for place in places for turn in pairs[place]), asked[-1]]

    return variant(task, "shots shuffled", rewrite=rewrite, parameters=task.parameters | {"shots_seed": seed})


def reworded(task: Task, wording: str) -> Task:
    """`task` with `wording` around every last question, such as "Solve this: {}"; examples stay as they are.

    >>> from workbench.tasks import load_task
    >>> task = reworded(load_task("word-problems"), "Solve this: {}")
    >>> task.messages(task.rows(n=1)[0])[-1]["content"][:15]
    'Solve this: Ana'
    """
    if wording.count("{}") != 1:
        raise ValueError(f"wording={wording!r} needs one place for the question: 'Solve this: {{}}'.")

    def rewrite(row: Row, asked: list[Message]) -> list[Message]:
        return [*asked[:-1], asked[-1] | {"content": wording.replace("{}", asked[-1]["content"])}]

    return variant(task, "reworded", rewrite=rewrite, parameters=task.parameters | {"wording": wording})


def keep_rate(before: pd.DataFrame, after: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Among questions answered right before: the share still right after a change that leaves the gold answer.

    Args:
        before, after: rows of two evaluations with the same conditions; `after` may hold several changes a question.

    Returns:
        One row a condition: rate with limits (over questions), n (changed questions that were right before),
        questions, missing (questions of `before` without a change), accuracy before and after on the same questions,
        their paired difference with limits and p-value, unparsed (share of `after`).

    Raises:
        ValueError: a question of `after` that `before` has not, or no question that was right.
    """
    lines = []
    for name, pairs, missing in _paired(before, after):
        same = pairs.answer_before.astype(str) == pairs.answer_after.astype(str)
        if not same.all():
            raise ValueError(
                f"{int((~same).sum())} of {len(pairs)} gold answers differ between the evaluations. The keep-rate is "
                "for changes that leave the answer (paraphrase, rename); for others use adapt_rate."
            )
        lines.append(_line(name, pairs, missing, level))
    return pd.DataFrame(lines)


def adapt_rate(before: pd.DataFrame, after: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """Among questions answered right before: the share right again after a change that changes the gold answer.

    As `keep_rate`, and `stuck` with limits: the share that gives the old answer to the new question.
    """
    lines = []
    for name, pairs, missing in _paired(before, after):
        pairs = pairs[pairs.answer_before.astype(str) != pairs.answer_after.astype(str)]
        if not len(pairs):
            raise ValueError(f"No gold answer differs under {name!r}. For changes that leave it use keep_rate.")
        right = pairs[pairs.correct_before.astype(bool)]
        stuck = _rate((right.extracted_after == right.extracted_before).tolist(), right.id.tolist(), level)
        line = _line(name, pairs, missing, level)
        lines.append(line | {"stuck": stuck.estimate, "stuck_low": stuck.low, "stuck_high": stuck.high})
    return pd.DataFrame(lines)


def _paired(before: pd.DataFrame, after: pd.DataFrame) -> list[tuple[str, pd.DataFrame, int]]:
    found = []
    columns = ["id", "correct", "extracted", "answer", "unparsed"]
    for name, rows in after.groupby("condition", sort=False):
        own = before[before.condition == name]
        if own.id.duplicated().any() or not set(rows.id) <= set(own.id):
            raise ValueError(
                f"Condition {name!r}: each of the {rows.id.nunique()} changed questions needs one row before, "
                f"found {len(own)} rows of {own.id.nunique()} questions. Evaluate both tasks with the same n and seed."
            )
        pairs = own[columns].merge(rows[columns], on="id", suffixes=("_before", "_after"))
        found.append((str(name), pairs, own.id.nunique() - rows.id.nunique()))
    return found


def _line(name: str, pairs: pd.DataFrame, missing: int, level: float) -> dict[str, Any]:
    right = pairs[pairs.correct_before.astype(bool)]
    if not len(right):
        raise ValueError(
            f"Condition {name!r} had none of {len(pairs)} questions right before: nothing to keep or follow."
        )
    rate = _rate(right.correct_after.tolist(), right.id.tolist(), level)
    repeated = pairs.id.duplicated().any()
    change = paired_difference(
        pairs.correct_before.tolist(),
        pairs.correct_after.tolist(),
        level,
        clusters=pairs.id.tolist() if repeated else None,
    )
    line = {
        "condition": name,
        "rate": rate.estimate,
        "low": rate.low,
        "high": rate.high,
        "n": rate.n,
        "note": rate.note,
    }
    line |= {"questions": pairs.id.nunique(), "missing": missing}
    line |= {"accuracy_before": pairs.correct_before.mean(), "accuracy_after": pairs.correct_after.mean()}
    line |= {"difference": change.difference, "difference_low": change.low, "difference_high": change.high}
    return line | {"p_value": change.p_value, "unparsed": float(pairs.unparsed_after.mean())}


def _rate(hits: list[bool], questions: list[str], level: float) -> Interval:
    """A share with Wilson's limits, or limits over whole questions where one has several rows."""
    if len(set(questions)) == len(questions):
        return wilson(sum(map(bool, hits)), len(hits), level)
    found = beta_binomial_interval(hits, questions, level)
    return Interval(found.estimate, found.low, found.high, found.n, found.note)
