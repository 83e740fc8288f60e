"""Does a model choose an option for its letter or place? Multiple choice with the options in other orders.

`rotated` asks each question once in every cyclic order of its options, so that each content stands under each letter
once: a model that chooses by content names every letter equally often, whatever it knows. `option_bias` and `by_option`
read the letters of such rows.

    turned = rotated(task)
    found = wb.evaluate(lm, turned, conditions, n=50)
    option_bias(found.rows, turned.rows(n=50))

Does not cover: letter against place (both move together here), and taking the bias out again (PriDe).
Sources: selection bias and RStd, Zheng et al. 2023 (arXiv 2309.03882); chi-square of clustered rows, Rao and Scott
1981, JASA 76:221-230, as F after Thomas and Rao 1987, JASA 82:630-636.
"""

import re
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from workbench.likelihood.choices import Choice, gold_place, option_texts
from workbench.measures.resampling import bootstrap_statistics
from workbench.measures.robustness import Variant, variant
from workbench.statistics import Interval, beta_binomial_interval, wilson
from workbench.statistics.samples import cluster_totals
from workbench.tasks import Task

Row = dict[str, Any]
_LINE = re.compile(r"^\([A-Z]\) .*$", flags=re.MULTILINE)
_BOUND = re.compile(r"\b(?:above|below|former|latter|preceding)\b|\([A-Z]\)|\b[A-Z] (?:and|or|&) [A-Z]\b")


def reordered(row: Row, order: Sequence[int]) -> Row | str:
    """The row with option `order[place]` at each place, its gold letter moved along; the reason why not, else.

    Options that speak of others by place or letter ("none of the above", "both A and B") can't be moved.

    >>> row = {"id": "1", "question": "Which?\\nOptions:\\n(A) red\\n(B) blue", "answer": "A"}
    >>> reordered(row, [1, 0])["question"], reordered(row, [1, 0])["answer"]
    ('Which?\\nOptions:\\n(A) blue\\n(B) red', 'B')
    """
    texts = option_texts(row)
    if sorted(order) != list(range(len(texts))):
        raise ValueError(
            f"order={list(order)} is no order of {len(texts)} options: each of 0 to {len(texts) - 1} once."
        )
    listed = list(_LINE.finditer(row["question"]))
    if [each[0][1] for each in listed] != [_letter(place) for place in range(len(texts))]:
        return "its options are not listed as lines '(A) ...'"
    if any(_BOUND.search(text) for text in texts):
        return "an option speaks of others by place or letter"
    question = row["question"]
    for place, line in reversed(list(enumerate(listed))):
        moved = f"({_letter(place)}) {listed[order[place]][0][4:]}"
        question = question[: line.start()] + moved + question[line.end() :]
    kept = {key: value for key, value in row.items() if key not in ("solutions", "rationale", "options")}
    answer = _letter(list(order).index(gold_place(row, texts)))
    answer = f"({answer})" if str(row["answer"]).startswith("(") else answer
    return kept | {"question": question, "answer": answer, "option_texts": [texts[place] for place in order]}


def rotated(task: Task) -> Variant:
    """Every question in all cyclic orders of its options, with ids `ID~0` (as it was), `ID~1`, ...

    Asked for n it draws n questions; those whose options can't be moved are left out. `cluster` is the question.
    """
    return _moved(task, "options rotated", lambda count, name: [_turned(count, by) for by in range(count)], {})


def permuted(task: Task, seed: int = 0) -> Variant:
    """Every question once, its options in an order that depends on its id and the seed alone; ids are `ID~sSEED`."""
    name = f"options permuted, seed {seed}"
    return _moved(
        task,
        name,
        lambda count, question: [Random(f"{question}/{seed}").sample(range(count), count)],
        {"options_seed": seed},
        mark=f"s{seed}",
    )


def _moved(task: Task, name: str, orders: Any, parameters: dict[str, Any], mark: str = "") -> Variant:
    def draw(split: str, n: int | None, draw_seed: int) -> list[Row]:
        found: list[Row] = []
        reasons: set[str] = set()
        for row in task.draw(split, n, draw_seed):
            for number, order in enumerate(orders(len(option_texts(row)), row["id"])):
                changed = reordered(row, order)
                if isinstance(changed, str):
                    reasons.add(changed)
                    break
                about = {"id": f"{row['id']}~{mark or number}", "order": list(order), "original": str(row["id"])}
                found.append(changed | about | {"cluster": row.get("cluster", str(row["id"]))})
        if not found:
            raise ValueError(f"No {split} question of {task.name!r} has options to move: {'; '.join(sorted(reasons))}.")
        return found

    return variant(task, name, draw=draw, parameters=task.parameters | {"options": name} | parameters)


def _turned(count: int, by: int) -> list[int]:
    return [(place + by) % count for place in range(count)]


def choice_rows(choices: Sequence[Choice], condition: str = "likelihood") -> pd.DataFrame:
    """Choices by likelihood (`multiple_choice`) as rows for `option_bias`."""
    said = [(each.id, condition, _letter(each.chosen), each.correct) for each in choices]
    return pd.DataFrame(said, columns=["id", "condition", "extracted", "correct"])


def option_bias(rows: pd.DataFrame, questions: Sequence[Mapping[str, Any]], *, level: float = 0.95) -> pd.DataFrame:
    """Which letters were chosen, against each equally often; and whether the content stays when its letter changes.

    Args:
        rows: of an evaluation: id, condition, extracted (a letter, None: unparsed), correct.
        questions: the task's own rows, from `task.rows` with the same n, seed and split.

    Returns:
        One row a condition, limits over questions:
        n, questions, unparsed; tvd (total variation distance between chosen letters and uniform; 0 none, pivotal
        bootstrap, as it is never below 0 by chance); chi2, df, p_value (F test); rstd (standard deviation over letters
        of the accuracy where that letter is right, dividing by their number); consistency (share of questions asked
        in several orders whose chosen content is the same in all; an unparsed answer is another one).

        Only rows of `rotated` hold every content under every letter. On others the letters of the right answers are
        part of what is measured. n of the consistency is `repeated`.

    Raises:
        ValueError: a row whose question is not among `questions`, or a condition without any letter.
    """
    asked = _asked(rows, questions)
    lines = []
    for name, group in asked.groupby("condition", sort=False):
        read = group[group.chosen >= 0]
        if not len(read):
            raise ValueError(f"Condition {name!r}: no answer of {len(group)} names an option. Look at results.rows.")
        line: dict[str, Any] = {"condition": str(name), "n": len(group), "questions": group.original.nunique()}
        line |= {"unparsed": 1 - len(read) / len(group)}
        tvd, rstd = _distances(group, level)
        repeated = [part for _, part in group.groupby("original") if len(part) > 1]
        same = sum(bool((part.chosen >= 0).all()) and part.content.nunique() == 1 for part in repeated)
        stays = wilson(same, len(repeated), level) if repeated else Interval(np.nan, np.nan, np.nan, 0)
        for key, found in (("tvd", tvd), ("rstd", rstd)):
            low, high = np.maximum(0.0, [found.low, found.high])  # nan, of one question, stays
            line |= {key: found.estimate, f"{key}_low": float(low), f"{key}_high": float(high)}
        line |= dict(zip(("chi2", "df", "p_value"), _chi_square(read), strict=True))
        line |= {"consistency": stays.estimate, "consistency_low": stays.low, "consistency_high": stays.high}
        lines.append(line | {"repeated": len(repeated)})
    return pd.DataFrame(lines)


def by_option(rows: pd.DataFrame, questions: Sequence[Mapping[str, Any]], *, level: float = 0.95) -> pd.DataFrame:
    """One row a condition and letter: how often it was chosen, and the accuracy where it is right.

    Returns:
        condition, option, chosen (share of the parsed answers) with limits over questions, uniform (the share that each
        equally often would give), accuracy with limits, n (rows where the letter is right).
    """
    asked = _asked(rows, questions)
    lines = []
    for name, group in asked.groupby("condition", sort=False):
        read = group[group.chosen >= 0]
        for place in range(int(group["options"].max())):
            line: dict[str, Any] = {"condition": str(name), "option": _letter(place)}
            if len(read):
                line |= _with_limits("chosen", (read.chosen == place).tolist(), read.cluster.tolist(), level)
                line |= {"uniform": float(_uniform(read["options"].to_numpy())[:, place].mean())}
            own = group[group.gold == place]
            if len(own):
                line |= _with_limits("accuracy", own.correct.tolist(), own.cluster.tolist(), level)
            lines.append(line | {"n": len(own)})
    return pd.DataFrame(lines)


def _asked(rows: pd.DataFrame, questions: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows with their options, right place, chosen place (-1: none) and chosen content (its original place)."""
    known = {str(question["id"]): question for question in questions}
    strange = [name for name in rows.id.astype(str) if name not in known]
    if strange:
        raise ValueError(
            f"Row {strange[0]!r} is none of the {len(known)} questions. Give task.rows(...) of the task that was "
            "evaluated, with the same n, seed and split."
        )
    lines = []
    for name, condition, said, correct in zip(rows.id, rows.condition, rows.extracted, rows.correct, strict=True):
        question = known[str(name)]
        texts = option_texts(question)
        letter = re.fullmatch(r"\(?([A-Z])\)?", str(said).strip()) if isinstance(said, str) else None
        chosen = ord(letter[1]) - 65 if letter and ord(letter[1]) - 65 < len(texts) else -1
        order = question.get("order", range(len(texts)))
        line = {"condition": condition, "original": str(question.get("original", name)), "correct": bool(correct)}
        line |= {"cluster": str(question.get("cluster", question.get("original", name))), "options": len(texts)}
        line |= {"gold": gold_place(question, texts), "chosen": chosen}
        lines.append(line | {"content": order[chosen] if chosen >= 0 else -1})
    return pd.DataFrame(lines)


def _uniform(options: np.ndarray) -> np.ndarray:
    """Each row's expected share of every letter, [row, letter]; rows may have different numbers of options."""
    return (np.arange(options.max()) < options[:, None]) / options[:, None]


def _distances(group: pd.DataFrame, level: float) -> list[Interval]:
    """Total variation distance of the chosen letters from uniform, and RStd, over clusters of rows."""
    chosen, gold, right = (group[name].to_numpy() for name in ("chosen", "gold", "correct"))
    even = _uniform(group["options"].to_numpy())
    letters = even.shape[1]

    def of(rows: np.ndarray) -> list[float]:
        read = rows[chosen[rows] >= 0]
        held = np.bincount(gold[rows], minlength=letters)
        recall = np.bincount(gold[rows], right[rows], minlength=letters)[held > 0] / held[held > 0]
        if not len(read):
            return [np.nan, float(recall.std())]
        share = np.bincount(chosen[read], minlength=letters) / len(read)
        return [float(np.abs(share - even[read].mean(0)).sum() / 2), float(recall.std())]

    return bootstrap_statistics(of, len(group), group.cluster.tolist(), pivotal=True, level=level)


def _chi_square(read: pd.DataFrame) -> tuple[float, float, float]:
    """Pearson's chi-square of letters against uniform, divided by the mean design effect (second-order Rao-Scott).

    With one row a question it is Pearson's own up to the sampling error of the design effect. Degrees of freedom are
    those of the corrected statistic; the p-value is of F with them and (clusters - 1) times as many.
    """
    even = _uniform(read["options"].to_numpy())
    picked = np.eye(even.shape[1])[read.chosen.to_numpy()] - even
    n, letters = picked.shape
    expected = even.mean(0)
    pearson = float(n * (picked.mean(0) ** 2 / expected).sum())
    clusters = read.cluster.nunique()
    columns = [cluster_totals(column - column.mean(), read.cluster.tolist())[0] for column in picked.T]
    if clusters < 2:
        return pearson, float(letters - 1), np.nan
    covariance = clusters / (clusters - 1) * np.array(columns) @ np.array(columns).T / n
    design = covariance / expected[:, None]
    trace, squares = float(np.trace(design)), float(np.trace(design @ design))
    if trace < 1e-12:  # all clusters alike: every content under every letter, or one letter always; one row each, then
        alone = pearson * clusters / n
        return alone, float(letters - 1), float(stats.chi2.sf(alone, letters - 1))
    df = trace**2 / squares
    corrected = pearson * trace / squares
    return corrected, df, float(stats.f.sf(corrected / df, df, df * (clusters - 1)))


def _with_limits(name: str, hits: Sequence[bool], clusters: Sequence[str], level: float) -> dict[str, float]:
    """A share with Wilson's limits, or over clusters where one has several rows."""
    if len(set(clusters)) == len(clusters):
        found: Any = wilson(sum(hits), len(hits), level)
    else:
        found = beta_binomial_interval(hits, clusters, level)
    return {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}


def _letter(place: int) -> str:
    return chr(65 + place)
