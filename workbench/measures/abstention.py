"""Does it answer what can't be answered, and refuse what can? Unanswerable twins, and reading an abstention.

Each question stands beside a twin from which a needed number was deleted (`perturbations.delete_number`). Phrases of
abstention are read in English and Spanish; a list of phrases misses what it doesn't hold, so `unread` texts (no answer
and no abstention) are counted apart.

Does not cover: refusals for other reasons (safety), and whether the reason given is the right one.
Sources: SQuAD 2.0, Rajpurkar et al. 2018 (arXiv 1806.03822); AbstentionBench, Kirichenko et al. 2025 (arXiv
2506.09038); selective accuracy, El-Yaniv and Wiener 2010.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from workbench.measures.perturbations import CANNOT, delete_number
from workbench.measures.resampling import bootstrap_statistics
from workbench.prompts import Strategy
from workbench.statistics import wilson
from workbench.tasks import Task, Verdict
from workbench.tasks.answers import final_text

Row = dict[str, Any]
TOLD = "If the question can't be answered from what it says, answer: cannot be answered."
_NOT = r"(?:can(?:no|'|’)?t|can not|could(?:n['’]t| not)|unable to|not able to|impossible to|not possible to|no way to)"
_PHRASES = re.compile(
    rf"{_NOT}\s+(?:be\s+)?(?:\w+\s+)?"
    r"(?:answer|determin|know|tell|say|calculat|comput|solv|find|work\w* out|figur|give)\w*"
    r"|(?:not|n['’]t)\s+(?:have|given|contain|provide|say|tell|specify|state)\w*\s+(?:us\s+)?"
    r"(?:(?:enough|sufficient)\s+(?:information|data|details|to\s+\w+)|how many|how much)"
    r"|(?:not enough|insufficient|missing|incomplete|too little|lack of)\s+(?:\w+\s+)?(?:information|data|details)"
    r"|\b(?:i do(?:n['’]t| not) know|unanswerable|undetermined|indeterminate|not (?:specified|enough given))\b"
    r"|\bno (?:se )?(?:puede|puedo|podemos|es posible|se sabe|sé|hay forma de)\b(?:\s+\w+){0,2}?\s*"
    r"(?:responder|contestar|determinar|saber|calcular|resolver|decir|cu[aá]nt\w+|la respuesta|\.|,|$)"
    r"|\b(?:imposible (?:de )?(?:saber|responder|determinar|calcular|contestar)|no s[eé]\b(?! preocup)|no lo s[eé]|"
    r"(?:faltan?|no hay suficientes?|no hay suficiente)\s+(?:\w+\s+)?(?:datos?|informaci[oó]n)|"
    r"(?:datos|informaci[oó]n) insuficientes?)\b",
    flags=re.IGNORECASE,
)


def abstains(text: str) -> bool:
    """Whether a text ends in an abstention: the last of its sentences that abstains is followed by no stated answer.

    >>> abstains("The start is not given, so it cannot be determined."), abstains("No se puede responder.")
    (True, True)
    >>> abstains("I can't tell at once, so I count. The answer is 7."), abstains("The answer is 7.")
    (False, False)
    """
    said = list(_PHRASES.finditer(final_text(text)))
    if not said:
        return False
    rest = final_text(text)[said[-1].end() :]
    return not re.search(
        r"(?:answer|respuesta)\W{0,3}(?:is|es|:|=)\W*-?\$?\d|####\s*-?\d|\\boxed\{", rest, re.IGNORECASE
    )


def judged(judge: Callable[[Row, str], Verdict]) -> Callable[[Row, str], Verdict]:
    """A task's judge that knows abstentions on rows without an answer: there, and only there, one is right."""

    def of(row: Row, text: str) -> Verdict:
        if not row.get("unanswerable"):
            return judge(row, text)
        if abstains(text):
            return Verdict(True, CANNOT)
        return Verdict(False, judge(row | {"answer": row["original_answer"]}, text).extracted)

    return of


def twins(task: Task, *, seed: int = 0) -> Task:
    """Every question that has an unanswerable twin, and its twin, with ids `ID` and `ID~twin`.

    Asked for n it draws n questions and gives at most 2 n rows. An abstention reads as the answer "cannot be
    answered" on both sides: right for a twin, wrong for its original.
    """
    from workbench.measures.robustness import perturb, variant

    def draw(split: str, n: int | None, draw_seed: int) -> list[Row]:
        rows = task.draw(split, n, draw_seed)
        without, left_out = perturb(rows, delete_number, seed)
        if not without:
            raise ValueError(f"No {split} question of {task.name!r} has an unanswerable twin: {dict(left_out)}.")
        originals = {row["id"]: row for row in rows}
        return [each for twin in without for each in (originals[twin["id"]], twin | {"id": f"{twin['id']}~twin"})]

    def judge(row: Row, text: str) -> Verdict:
        if not row.get("unanswerable") and abstains(text):
            return Verdict(False, CANNOT)
        return judged(task.judge)(row, text)

    return variant(task, "twins", draw=draw, judge=judge, parameters=task.parameters | {"twin_seed": seed})


def may_abstain(strategy: Strategy | None = None) -> Strategy:
    """`strategy` (None: no other cue), told that it may answer "cannot be answered"."""
    strategy = strategy or Strategy()
    name = "may abstain" if strategy.name == "plain" else f"{strategy.name}, may abstain"
    return replace(strategy, name=name, system=f"{strategy.system} {TOLD}" if strategy.system else TOLD)


def abstention_table(rows: pd.DataFrame, *, level: float = 0.95) -> pd.DataFrame:
    """One row a condition, from the rows of `evaluate(lm, twins(task), ...)`; limits are over pairs of twins.

    Returns:
        n (rows), precision (of abstentions, the share on twins), recall (of twins, the share abstained on), f1,
        answered_unanswerable and abstained_answerable (shares of their sides; Wilson), selective_accuracy (right
        among answers given, where any answer to a twin is wrong), coverage (share of all rows with an answer),
        unread (share with neither an answer nor an abstention). Each with _low and _high; nan where nothing was.
    """
    lines = []
    for name, group in rows.groupby("condition", sort=False):
        none = (group.answer.astype(str) == CANNOT).to_numpy()
        if none.all() or not none.any():
            raise ValueError(
                f"Condition {name!r} holds {int(none.sum())} unanswerable rows of {len(group)}: both kinds are needed. "
                "Evaluate twins(task)."
            )
        kept = (group.extracted == CANNOT).to_numpy()
        unread = group.extracted.isna().to_numpy()
        line: dict[str, Any] = {"condition": str(name), "n": len(group)}
        for key, value in _ratios(none, kept, unread, group, level).items():
            line |= {key: value.estimate, f"{key}_low": value.low, f"{key}_high": value.high}
        lines.append(line)
    return pd.DataFrame(lines)


def _ratios(
    none: np.ndarray, kept: np.ndarray, unread: np.ndarray, group: pd.DataFrame, level: float
) -> dict[str, Any]:
    right, given = group.correct.to_numpy(bool), ~kept & ~unread

    def of(rows: np.ndarray) -> list[float]:
        hit, said, due = (none & kept)[rows].sum(), kept[rows].sum(), none[rows].sum()
        answers = given[rows].sum()
        return [
            _share(hit, said),
            _share(hit, due),
            _share(2 * hit, said + due),
            _share((right & given)[rows].sum(), answers),
            _share(answers, len(rows)),
            _share(unread[rows].sum(), len(rows)),
        ]

    owners = [str(each).removesuffix("~twin") for each in group.id]
    names = ("precision", "recall", "f1", "selective_accuracy", "coverage", "unread")
    found: dict[str, Any] = dict(zip(names, bootstrap_statistics(of, len(group), owners, level=level), strict=True))
    every = np.ones(len(group), dtype=bool)
    for name, rows in zip(names, (kept, none, kept | none, given, every, every), strict=True):
        pairs = len({owner for owner, inside in zip(owners, rows, strict=True) if inside})
        if found[name].estimate in (0.0, 1.0) and pairs:  # resamples are all alike: Wilson's limits keep a width
            found[name] = wilson(int(found[name].estimate) * pairs, pairs, level)
    found["answered_unanswerable"] = wilson(int((none & given).sum()), int(none.sum()), level)
    found["abstained_answerable"] = wilson(int((~none & kept).sum()), int((~none).sum()), level)
    return found


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else np.nan
