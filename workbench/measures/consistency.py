"""Does a model contradict itself? Pairs of questions that can't both be 'yes', and one question in several wordings.

`exclusive(task)` asks each question and its complement; `consistency_table` counts both yes, both no and one of each.
`paraphrased(task)` asks each question in several wordings; `same_answers` counts how often two of them agree. Neither
needs gold answers to be judged by, so a model can be consistent and wrong.

| task | question | complement |
|---|---|---|
| bbh:boolean_expressions | `E is` | `not ( E ) is` |
| syllogism | does C follow? | does the contradictory of C follow? (All - Some not, Some - No) |
| `comparisons()` | is a larger than b? | is b larger than a? (a differs from b) |

Two contradictory conclusions can both fail to follow, so "both no" may be right on syllogisms, and never on the others.
Does not cover: consistency along a chain of implications.
Sources: negated pairs, Kassner and Schütze 2020 (arXiv 1911.03343); agreement over paraphrases, Elazar et al. 2021
(arXiv 2102.01017); answers to questions and their reverse, Arcuschin et al. 2025 (arXiv 2503.08679).
"""

import re
from collections import Counter
from math import comb
from random import Random
from typing import Any

import numpy as np
import pandas as pd

from workbench.measures.perturbations import paraphrase
from workbench.measures.robustness import Change, Variant, perturb, variant
from workbench.measures.syllogisms import follows, parsed
from workbench.statistics import Interval, beta_binomial_interval, bootstrap_mean, wilson
from workbench.tasks import Task, Verdict
from workbench.tasks.benchmarks import SHARES, split_of
from workbench.tasks.verifiers import verify

Row = dict[str, Any]
MARK = "~not"
YES = frozenset({"yes", "true", "valid", "sí", "verdadero"})
NO = frozenset({"no", "false", "invalid", "falso"})
_BOOLEAN = re.compile(r"^(?P<expression>(?:True|False|and|or|not|[() ])+) is$")
_OPPOSITE = {"All are": "Some are not", "Some are not": "All are", "No are": "Some are", "Some are": "No are"}
_COMPARISON = "Is {a} larger than {b}? (Answer Yes or No)"
_COMPARED = re.compile(r"^Is (\d+) larger than (\d+)\? \(Answer Yes or No\)$")


def complement(row: Row) -> Row | str:
    """A question that can't be 'yes' together with this row's, and its gold answer; the reason where there is none.

    Syllogisms only where the gold answers follow from the statements (see `change_quantifier`) and the premises don't
    contradict each other.

    >>> complement({"question": "not True or False is", "answer": "False"})["question"]
    'not ( not True or False ) is'
    """
    question, answer = row["question"], str(row["answer"])
    if found := _BOOLEAN.match(question):
        return row | {
            "question": f"not ( {found['expression']} ) is",
            "answer": "False" if answer == "True" else "True",
        }
    if found := _COMPARED.match(question):
        return row | {
            "question": _COMPARISON.format(a=found[2], b=found[1]),
            "answer": "No" if answer == "Yes" else "Yes",
        }
    if not (statements := parsed(question)):
        return "no rule makes its complement"
    first, second, conclusion = statements
    quantifier, left, verb, right = re.fullmatch(r"(All|No|Some) (.+?) (are not|are) (.+)", conclusion).groups()  # type: ignore[union-attr]
    if f"{quantifier} {verb}" not in _OPPOSITE:
        return "its conclusion has no contradictory of the four forms"
    other, verb = _OPPOSITE[f"{quantifier} {verb}"].split(" ", 1)
    opposite = f"{other} {left} {verb} {right}"
    holds, fails = follows(first, second, conclusion), follows(first, second, opposite)
    if holds and fails:
        return "its premises contradict each other"
    if ("Yes" if holds else "No") != answer:
        return "its gold answer is not what follows from the statements"
    said = f"Consider these statements: 1. {first} 2. {second} Does it logically follow that: {opposite}?"
    return row | {"question": f"{said} (Answer Yes or No)", "answer": "Yes" if fails else "No"}


def exclusive(task: Task) -> Variant:
    """Every question that has a complement, and its complement, with ids `ID` and `ID~not`; n draws n questions."""

    def draw(split: str, n: int | None, seed: int) -> list[Row]:
        made = [(row, complement(row)) for row in task.draw(split, n, seed)]
        found = []
        for row, other in made:
            if not isinstance(other, str):
                found += [row, {key: other[key] for key in ("question", "answer")} | {"id": f"{row['id']}{MARK}"}]
        if not found:
            reasons = Counter(other for _, other in made if isinstance(other, str))
            said = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
            raise ValueError(f"No {split} question of {task.name!r} has a complement: {said}. Try another task.")
        return [row | {"cluster": str(row["id"]).removesuffix(MARK)} for row in found]

    return variant(task, "exclusive pairs", draw=draw, parameters=task.parameters | {"pairs": "exclusive"})


def comparisons(largest: int = 999) -> Task:
    """Which of two different whole numbers up to `largest` is larger, 'Is 34 larger than 27?'; drawn without repeats.

    A question and its complement are in one split.

    >>> comparisons().rows(n=1)[0]["question"].split("? ")[1]
    '(Answer Yes or No)'
    """
    if largest < 9:
        raise ValueError(f"largest={largest} gives too few pairs. Take 9 or more.")

    def draw(split: str, n: int | None, seed: int) -> list[Row]:
        rng, tries = Random(f"comparisons/{split}/{seed}"), 0
        found: dict[str, Row] = {}
        wanted = 200 if n is None else n
        while len(found) < wanted:
            tries += 1
            if tries > 1000 + 100 * wanted:
                raise ValueError(f"{len(found)} {split} comparisons of numbers up to {largest}, {wanted} asked for.")
            a, b = rng.sample(range(1, largest + 1), 2)
            pair = f"{min(a, b)} and {max(a, b)}"
            if pair not in found and split_of(pair, SHARES["generated"]) == split:
                answer = "Yes" if a > b else "No"
                row = {"id": f"comparison-{pair.replace(' and ', '-')}", "question": _COMPARISON.format(a=a, b=b)}
                found[pair] = row | {"answer": answer, "solutions": {"direct": f"The answer is {answer}."}}
        return list(found.values())

    def judge(row: Row, text: str) -> Verdict:
        return verify("text", row["answer"], text)

    return Task("comparisons", "text", "generated", draw, judge, {"largest": largest})


def consistency_table(rows: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """One row a condition, from the rows of `evaluate(lm, exclusive(task), ...)`; limits are over pairs (Wilson).

    Returns:
        n (pairs), both_yes (a contradiction), both_no, one (of each), unread (an answer of the two is neither), which
        add up to 1; both_right; yes (share of single answers). Each of the first five with _low and _high.
    """
    lines = []
    for name, group in rows.groupby("condition", sort=False):
        said = group.assign(
            said=[_said(each) for each in group.extracted], side=group.id.astype(str).str.endswith(MARK)
        )
        said["pair"] = said.id.astype(str).str.removesuffix(MARK)
        pairs = said.pivot(index="pair", columns="side", values=["said", "correct"])
        if len(pairs) * 2 != len(group) or said.side.mean() != 0.5:
            raise ValueError(
                f"Condition {name!r} holds {len(group)} rows of {len(pairs)} pairs: two a pair are needed. "
                "Evaluate exclusive(task)."
            )
        first, second = pairs["said"][False], pairs["said"][True]
        unread = first.isna() | second.isna()
        hits = {"both_yes": (first == 1) & (second == 1), "both_no": (first == 0) & (second == 0)}
        hits |= {"one": ~unread & (first != second), "unread": unread}
        hits |= {"both_right": (pairs["correct"][False] == 1) & (pairs["correct"][True] == 1)}
        line: dict[str, Any] = {"condition": str(name), "n": len(pairs)}
        for key, hit in hits.items():
            share = wilson(int(hit.sum()), len(pairs), level)
            line |= {key: share.estimate, f"{key}_low": share.low, f"{key}_high": share.high}
        lines.append(line | {"yes": float((said.said == 1).mean())})
    return pd.DataFrame(lines)


def _said(extracted: Any) -> float:
    word = str(extracted).strip().lower()
    return 1.0 if word in YES else 0.0 if word in NO else np.nan


def paraphrased(task: Task, wordings: int = 3, *, change: Change = paraphrase, seed: int = 0) -> Variant:
    """Every question as it is and in up to `wordings` others, with ids `ID~0` (as it is), `ID~1`, ...

    A wording that came out as one before is left out; so is a question without another one.
    """
    if wordings < 1:
        raise ValueError(f"wordings={wordings}: give the number of other wordings a question, from 1.")

    def draw(split: str, n: int | None, draw_seed: int) -> list[Row]:
        rows = task.draw(split, n, draw_seed)
        made = [{row["id"]: row for row in perturb(rows, change, seed + number)[0]} for number in range(wordings)]
        found = []
        for row in rows:
            others = {each[row["id"]]["question"]: each[row["id"]] for each in made if row["id"] in each}
            others.pop(row["question"], None)
            if others:
                each = enumerate([row, *others.values()])
                found += [one | {"id": f"{row['id']}~{number}", "cluster": str(row["id"])} for number, one in each]
        if not found:
            raise ValueError(f"No {split} question of {task.name!r} has another wording by {change.__name__}.")
        return found

    parameters = task.parameters | {"wordings": wordings, "change": change.__name__, "change_seed": seed}
    return variant(task, "paraphrased", draw=draw, parameters=parameters)


def same_answers(rows: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """One row a condition, from the rows of `evaluate(lm, paraphrased(task), ...)`; limits over questions.

    Returns:
        questions, n (rows), agreement (share of pairs of wordings with the same answer, mean over questions), all_same
        (share of questions with one answer in all wordings), accuracy, each with _low and _high; unparsed. An unparsed
        answer agrees with nothing.
    """
    lines = []
    for name, group in rows.groupby("condition", sort=False):
        owners = group.id.astype(str).str.rpartition("~")[0]
        agree = [_agreement(part.extracted) for _, part in group.groupby(owners, sort=False) if len(part) > 1]
        if not agree or "" in set(owners):
            raise ValueError(f"Condition {name!r}: no question stands in two wordings. Evaluate paraphrased(task).")
        found: dict[str, Interval | Any] = {"agreement": bootstrap_mean(agree, level=level)}
        found["all_same"] = wilson(sum(each == 1 for each in agree), len(agree), level)
        found["accuracy"] = beta_binomial_interval(group.correct.tolist(), owners.tolist(), level)
        line: dict[str, Any] = {"condition": str(name), "questions": len(agree), "n": len(group)}
        for key, value in found.items():
            line |= {key: value.estimate, f"{key}_low": value.low, f"{key}_high": value.high}
        lines.append(line | {"unparsed": float(group.extracted.isna().mean())})
    return pd.DataFrame(lines)


def _agreement(answers: "pd.Series[Any]") -> float:
    same = sum(comb(count, 2) for count in answers.dropna().value_counts())
    return same / comb(len(answers), 2)
