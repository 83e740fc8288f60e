"""A model as judge of two answers, each pair shown in both orders, and what its verdicts are worth.

Asking both orders measures the judge's position bias instead of mixing it into the verdict (Zheng et al. 2023, arXiv
2306.05685). A judge prefers longer answers too: the share of longer ones chosen, and a win rate at equal length by
logistic regression (after arXiv 2404.04475, with the length alone), stand beside the plain win rate. Whether a judge
is right at all is a matter for `agreement`. Not covered: panels of judges, reference answers in the prompt (write them
into `prompt`), calibration of log-probabilities.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from workbench.files import content_key
from workbench.judging.asking import Job, asked
from workbench.judging.questions import Duel, duels
from workbench.judging.replies import best, by_letters, by_text, check_judge, identity, read_choice, without_special
from workbench.results import Results
from workbench.statistics import Interval, bootstrap_mean, wilson
from workbench.tasks.answers import final_text

if TYPE_CHECKING:
    from workbench.interventions import Intervention
    from workbench.models import LM
    from workbench.served import Served
    from workbench.tasks import Task

PROMPT = (
    "Two answers to one question follow. Which one is better? Judge whether it is right first, then whether it is "
    "clear; neither length nor order counts.\n\nQuestion: {question}\n\nAnswer A: {A}\n\nAnswer B: {B}\n\n"
    "Reply with one word: A, B or tie."
)
Prompt = str | Callable[[str, str, str], str | list[dict[str, str]]]
VERDICTS = ("a", "b", "tie", "inconsistent", "unparsed")


@dataclass(frozen=True)
class Judged:
    """A judge's calls, two a question: id, first, said, choice ('a', 'b', 'tie' or None), length_a, length_b, tokens.

    a, b: the conditions. Intervals draw whole questions, so that the two orders of one never count as two.
    """

    a: str
    b: str
    calls: pd.DataFrame
    about: dict[str, Any]

    @property
    def verdicts(self) -> pd.Series:
        """By question: a or b when both orders say so, tie, inconsistent (the orders differ), or unparsed."""
        return pd.Series(
            {key: _verdict(group.choice.tolist()) for key, group in self.calls.groupby("id", sort=False)},
            name="verdict", dtype=object,
        )  # fmt: skip

    def counts(self) -> dict[str, int]:
        """Questions by verdict."""
        found = self.verdicts.tolist()
        return {verdict: found.count(verdict) for verdict in VERDICTS}

    def win_rate(self) -> Interval:
        """Mean score of `b` against `a` over all calls that could be read: 1 chosen, 0 not, ties a half."""
        read = self.calls[self.calls.choice.notna()]
        return share(read.choice.map({"b": 1.0, "a": 0.0, "tie": 0.5}).tolist(), read.id.tolist())

    def position_bias(self) -> Interval:
        """Share of decided calls that chose the answer shown first; 0.5 is a judge that does not look at the place."""
        decided = self._decided()
        return share((decided.choice == decided["first"]).astype(float).tolist(), decided.id.tolist())

    def longer_chosen(self) -> Interval:
        """Share of decided calls that chose the longer answer (in characters), equal lengths left out."""
        decided = self._decided()
        decided = decided[decided.length_a != decided.length_b]
        longer = np.where(decided.length_b > decided.length_a, "b", "a")
        return share((decided.choice == longer).astype(float).tolist(), decided.id.tolist())

    def win_rate_at_equal_length(self, resamples: int = 500) -> Interval:
        """The win rate of `b` that a logistic model of win on length difference gives where both are equally long.

        Its interval draws questions. Where length and win always go together the two can't be told apart, and the note
        says so.
        """
        read = self.calls[self.calls.choice.notna()]
        wins = read.choice.map({"b": 1.0, "a": 0.0, "tie": 0.5}).to_numpy(float)
        apart = (read.length_b - read.length_a).to_numpy(float)
        return _at_equal_length(wins, apart, read.id.tolist(), resamples)

    def table(self) -> pd.DataFrame:
        """One row a measure: estimate, low, high (95 %), n calls or questions, note."""
        measures = {
            f"win rate of {self.b}": self.win_rate(),
            f"win rate of {self.b} at equal length": self.win_rate_at_equal_length(),
            "chose the first": self.position_bias(),
            "chose the longer": self.longer_chosen(),
        }
        total = self.calls.id.nunique()
        measures |= {f"questions: {name}": wilson(count, total) for name, count in self.counts().items()}
        measures["calls unparsed"] = wilson(int(self.calls.choice.isna().sum()), len(self.calls))
        lines = [
            {"measure": name, "estimate": i.estimate, "low": i.low, "high": i.high, "n": i.n, "note": i.note}
            for name, i in measures.items()
        ]
        return pd.DataFrame(lines)

    def _decided(self) -> pd.DataFrame:
        return self.calls[self.calls.choice.isin(["a", "b"])]


def judge_pairs(
    lm: "LM | Served",
    results: Results,
    a: str,
    b: str,
    *,
    prompt: Prompt = PROMPT,
    questions: "Mapping[str, str] | Task | None" = None,
    by: Literal["text", "letters"] = "text",
    letters: tuple[str, str] = ("A", "B"),
    n: int | None = None,
    seed: int = 0,
    interventions: "Intervention | None" = None,
    max_new_tokens: int = 16,
    out: str | Path | None = None,
) -> Judged:
    """Ask a model which of two conditions answered each question better, in both orders.

    Args:
        prompt: text with {question}, {A} and {B}, or a function of those three that gives a prompt or chat messages.
        questions: text of each question by id, or the task; else a `question` column, else the prompt.
        by: 'text' reads the greedy reply; 'letters' takes the likelier of `letters` (a loaded model; a tie only where
            both are exactly as likely).
        letters: words that stand for the first and the second answer, where by='letters' and a prompt has others.
        n, seed: judge n questions drawn by `seed`; None for all.
        interventions: on the judge, not on the answers.
        out: JSONL file of the calls; a call in it is not made again, and a killed run goes on.

    Raises:
        ValueError: unknown conditions, a prompt without its places, a served judge asked for what it can't do, or a
            file that was started with other settings; all before anything is asked.
    """
    check_judge(lm, by, interventions)
    pairs = duels(results, a, b, questions, n, seed)
    write = prompt_writer(prompt, ("question", "A", "B"))
    jobs: list[Job] = []
    for duel in pairs:
        question, text_a, text_b = (without_special(lm, text) for text in (duel.question, duel.text_a, duel.text_b))
        for first in ("a", "b"):
            sides = (text_a, text_b) if first == "a" else (text_b, text_a)
            jobs.append({"id": duel.id, "first": first, "prompt": as_turn(write(question, *sides))})
    about = identity(lm, interventions) | {"kind": "pairs", "a": a, "b": b, "by": by, "questions": len(pairs)}
    about |= {"max_new_tokens": max_new_tokens} if by == "text" else {"letters": list(letters)}
    about["prompts"] = content_key(prompts=[job["prompt"] for job in jobs])[:16]
    file = Path(out) if out is not None else None
    rows = asked(file, about, jobs, partial(_ask, lm, by, interventions, max_new_tokens, letters))
    return Judged(a, b, _calls(rows, pairs), about)


def prompt_writer(prompt: Prompt, places: tuple[str, ...]) -> Callable[..., str | list[dict[str, str]]]:
    """A function that puts texts into the places of a prompt, once each; a text's own braces stay as they are."""
    if not isinstance(prompt, str):
        return prompt
    missing = [place for place in places if f"{{{place}}}" not in prompt]
    if missing:
        need = ", ".join(f"{{{place}}}" for place in places)
        raise ValueError(f"The prompt lacks {{{missing[0]}}}. Write a text with {need}, or give a function of them.")
    pattern = re.compile("{(" + "|".join(places) + ")}")

    def write(*texts: str) -> str:
        values = dict(zip(places, texts, strict=True))
        return pattern.sub(lambda found: values[found[1]], prompt)

    return write


def as_turn(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    """A plain text as the user's turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def share(values: list[float], clusters: Sequence[str]) -> Interval:
    """Mean of values in 0..1 with an interval over clusters, which keeps its width where all clusters are equal."""
    if not values:
        return Interval(float("nan"), float("nan"), float("nan"), 0, "no call to count")
    found = bootstrap_mean(values, clusters=clusters)
    if found.low != found.high and found.low == found.low:
        return found
    k = len(set(clusters))
    bound = wilson(round(found.estimate * k), k)
    return Interval(found.estimate, bound.low, bound.high, found.n, f"all {k} questions alike: score interval over {k}")


def _ask(lm: Any, by: str, change: Any, limit: int, letters: tuple[str, str], jobs: list[Job]) -> list[dict[str, Any]]:
    prompts = [job["prompt"] for job in jobs]
    if by == "text":
        return [
            {**reply, "said": read_choice(final_text(reply["text"]))} for reply in by_text(lm, prompts, change, limit)
        ]
    meant = dict(zip(letters, ("A", "B"), strict=True))
    replies = by_letters(lm, prompts, change, letters)
    return [{**reply, "said": meant.get(best(reply["scores"]) or "", "tie")} for reply in replies]


def _calls(rows: list[dict[str, Any]], pairs: Sequence[Duel]) -> pd.DataFrame:
    by_id = {duel.id: duel for duel in pairs}
    lines = []
    for row in rows:
        shown = {"A": row["first"], "B": "b" if row["first"] == "a" else "a", "tie": "tie"}
        duel = by_id[row["id"]]
        lengths = {"length_a": len(duel.text_a), "length_b": len(duel.text_b)}
        lines.append({**row, "choice": shown.get(row["said"]), **lengths})
    table = pd.DataFrame(lines)
    for name in ("said", "choice"):  # pandas turns None among texts into NaN
        table[name] = pd.Series([line[name] for line in lines], dtype=object)
    return table


def _verdict(choices: list[str | None]) -> str:
    if None in choices:
        return "unparsed"
    return str(choices[0]) if len(set(choices)) == 1 else "inconsistent"


def _at_equal_length(wins: np.ndarray, apart: np.ndarray, ids: Sequence[str], resamples: int) -> Interval:
    nan = float("nan")
    if not len(wins):
        return Interval(nan, nan, nan, 0, "no call to count")
    if np.ptp(apart) == 0:
        plain = share(wins.tolist(), ids)
        return Interval(plain.estimate, plain.low, plain.high, plain.n, "all length differences are equal")
    scaled = np.tanh(apart / apart.std())  # as in AlpacaEval 2: a few very long answers should not decide the slope
    estimate = _intercept_share(wins, scaled)
    places: dict[str, list[int]] = {}
    for number, key in enumerate(ids):
        places.setdefault(key, []).append(number)
    groups, rng = [np.array(group) for group in places.values()], np.random.default_rng(0)
    drawn = []
    for _ in range(resamples):
        rows = np.concatenate([groups[k] for k in rng.integers(0, len(groups), len(groups))])
        drawn.append(_intercept_share(wins[rows], scaled[rows]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    apart_by_win = wins[scaled > 0].tolist(), wins[scaled < 0].tolist()
    separated = all(len(set(side)) == 1 for side in apart_by_win) and apart_by_win[0][:1] != apart_by_win[1][:1]
    return Interval(
        estimate, float(low), float(high), len(wins), "length alone explains every win" if separated else ""
    )


def _intercept_share(wins: np.ndarray, length: np.ndarray) -> float:
    """sigmoid of the intercept of a logistic regression of win on length; a slight ridge keeps it finite."""
    inputs, weights = np.column_stack([np.ones_like(length), length]), np.zeros(2)
    for _ in range(50):
        chance = 1 / (1 + np.exp(-inputs @ weights))
        gradient = inputs.T @ (wins - chance) - 0.01 * weights
        step = np.linalg.solve((inputs * (chance * (1 - chance))[:, None]).T @ inputs + 0.01 * np.eye(2), gradient)
        weights = weights + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-8:
            break
    return float(1 / (1 + np.exp(-weights[0])))
