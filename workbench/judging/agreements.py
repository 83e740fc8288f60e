"""How far judges agree: with the verifier, with people, with each other.

Cohen's kappa (1960, Educational and Psychological Measurement 20:37-46) for two raters, Krippendorff's alpha for any
number with missing votes; both are 1 for perfect agreement and 0 for what chance gives, and can be low at a high share
of equal votes when one verdict is common. Limits of kappa are `statistics.cohen_kappa`'s; those of alpha draw
questions. Not covered: weights for near misses.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import pandas as pd

from workbench.judging.pairs import Judged
from workbench.results import Results
from workbench.statistics import Interval, cohen_kappa, wilson
from workbench.synthesis.agreement import krippendorff_interval

GOLD = "gold"
LABELS = ("a", "b", "tie")
Votes = Judged | pd.DataFrame | Mapping[str, str | None]


@dataclass(frozen=True)
class Agreement:
    """Agreement of raters on which of two answers is better.

    pairs: a row each two raters: n (questions both judged), share equal, kappa, alpha, each with low and high (95 %).
    everyone: alpha over all raters. right: by rater, how often it chose the right one where exactly one was right
    (ties and inconsistent verdicts are no choice, so they count as wrong); empty without gold. confusion: by two
    raters' names, a table of their verdicts. votes: the verdicts, a row a question and a column a rater.
    """

    pairs: pd.DataFrame
    everyone: Interval
    right: dict[str, Interval]
    confusion: dict[tuple[str, str], pd.DataFrame]
    votes: pd.DataFrame


def agreement(
    votes: Mapping[str, Votes],
    gold: Results | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
    labels: Sequence[str] = LABELS,
) -> Agreement:
    """Compare raters with each other and, with `gold`, with the verifier (`correct`) as one more rater.

    votes: by rater's name, what `judge_pairs` returned, what `read_votes` returned (of one rater, or of several who
    then get a row each as NAME/rater), or a mapping from question to 'a', 'b', 'tie' or None. A judge's inconsistent
    verdict counts as 'tie': it has no preference that survives the order. Unparsed and skipped ones are missing.
    gold: the results that were judged; its verdict is the only right answer, else 'tie'. It needs one `Judged` or
    table of votes, which say what a and b are.
    labels: what a mapping may hold besides None, where it is about something else than two answers.

    Raises ValueError for fewer than two raters, two comparisons of different conditions, or unknown verdicts.

    >>> found = agreement({"x": {"1": "a", "2": "b", "3": "a"}, "y": {"1": "a", "2": "b", "3": "b"}})
    >>> found.pairs[["n", "share", "kappa"]].round(2).values.tolist()
    [[3.0, 0.67, 0.4]]
    """
    raters, compared = _raters(votes, labels)
    right: dict[str, Interval] = {}
    if gold is not None:
        if compared is None:
            raise ValueError("gold needs to know which conditions a and b are: give a Judged or a table of read_votes.")
        if GOLD in raters:
            raise ValueError(f"A rater is called {GOLD!r}, which is the verifier's name here. Rename the rater.")
        truth = _truth(gold, *compared)
        asked = {key for verdicts in raters.values() for key in verdicts}
        unknown = sorted(asked - truth.keys())
        if unknown:
            raise ValueError(f"gold has no question {unknown[0]!r} ({len(unknown)} such). Give the judged results.")
        right = {name: _right(verdicts, truth) for name, verdicts in raters.items()}
        right = {name: interval for name, interval in right.items() if interval.n}
        raters[GOLD] = {key: verdict for key, verdict in truth.items() if key in asked}
    if len(raters) < 2:
        raise ValueError(f"Agreement needs two raters or more; got {', '.join(raters) or 'none'}. Add one, or gold=.")
    ids = list(dict.fromkeys(key for verdicts in raters.values() for key in verdicts))
    table = pd.DataFrame({name: [verdicts.get(key) for key in ids] for name, verdicts in raters.items()}, index=ids)
    table = table.astype(object).where(table.notna(), None)
    lines, confusion = [], {}
    for one, other in combinations(raters, 2):
        both = table[[one, other]].dropna()
        lines.append({"one": one, "other": other, **_two(both[one].tolist(), both[other].tolist(), resamples, seed)})
        counted = pd.crosstab(both[one], both[other]) if len(both) else pd.DataFrame()
        confusion[one, other] = counted.reindex(index=list(labels), columns=list(labels), fill_value=0)
    ratings = [table[name].tolist() for name in raters]
    everyone = krippendorff_interval(ratings, resamples=resamples, seed=seed)
    return Agreement(pd.DataFrame(lines), everyone, right, confusion, table)


def _two(first: list[str], second: list[str], resamples: int, seed: int) -> dict[str, float]:
    """Share of equal verdicts, kappa and alpha of two raters on the questions that both judged."""
    n, nan = len(first), math.nan
    if not n:
        names = ("share", "low", "high", "kappa", "kappa_low", "kappa_high", "alpha", "alpha_low", "alpha_high")
        return {"n": 0, **dict.fromkeys(names, nan)}
    equal = wilson(sum(one == other for one, other in zip(first, second, strict=True)), n)
    kappa = cohen_kappa(first, second)
    alpha = krippendorff_interval([first, second], resamples=resamples, seed=seed)
    return {
        "n": n, "share": equal.estimate, "low": equal.low, "high": equal.high,
        "kappa": kappa.estimate, "kappa_low": kappa.low, "kappa_high": kappa.high,
        "alpha": alpha.estimate, "alpha_low": alpha.low, "alpha_high": alpha.high,
    }  # fmt: skip


def _raters(
    votes: Mapping[str, Votes], labels: Sequence[str]
) -> tuple[dict[str, dict[str, str | None]], tuple[str, str] | None]:
    """Verdicts by rater, and the two conditions that they are about, where that is known."""
    raters: dict[str, dict[str, str | None]] = {}
    compared: set[tuple[str, str]] = set()
    for name, given in votes.items():
        if isinstance(given, Judged):
            compared.add((given.a, given.b))
            same = {"inconsistent": "tie", "unparsed": None}
            raters[name] = {str(key): same.get(verdict, verdict) for key, verdict in given.verdicts.items()}
        elif isinstance(given, pd.DataFrame):
            compared |= set(zip(given.a, given.b, strict=True))
            people = list(dict.fromkeys(given.rater))
            for person in people:
                own = given[given.rater == person]
                raters[name if len(people) == 1 else f"{name}/{person}"] = dict(zip(own.id, own.verdict, strict=True))
        else:
            raters[name] = dict(given)
    if len(compared) > 1:
        raise ValueError(f"The votes are about different conditions: {sorted(compared)}. Compare those about one pair.")
    for name, verdicts in raters.items():
        wrong = [verdict for verdict in verdicts.values() if verdict is not None and verdict not in labels]
        if wrong:
            raise ValueError(f"{name!r} holds the verdict {wrong[0]!r}. Use one of: {', '.join(labels)}, or None.")
    return raters, next(iter(compared), None)


def _truth(gold: Results, a: str, b: str) -> dict[str, str]:
    first, second = gold.correct(a), gold.correct(b)
    verdicts = {(True, False): "a", (False, True): "b"}
    return {str(key): verdicts.get((bool(first[key]), bool(second[key])), "tie") for key in first.index}


def _right(verdicts: Mapping[str, str | None], truth: Mapping[str, str]) -> Interval:
    """Share of right choices among the questions with one right answer that this rater judged."""
    judged = [(verdict, truth[key]) for key, verdict in verdicts.items() if verdict is not None and truth[key] != "tie"]
    if not judged:
        return Interval(math.nan, math.nan, math.nan, 0, "no question with exactly one right answer")
    return wilson(sum(verdict == answer for verdict, answer in judged), len(judged))
