"""A fair re-test of what KV-cache steering claims (arXiv 2507.08799), for any model and task.

Claims: one edit of the cached keys and values makes a model reason; it beats activation steering; it is cheaper a
token; it is stable over strengths. Here all arms (see `arms`) spend the same KL, are tuned on one split and reported on
another, and decode with the same cache. Not covered: how good a budget is, and arms that are trained.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from workbench.claims.arms import AS_CACHED, EACH, FLOORS, KEYS, LAST, PLAIN, TOLD, VALUES, Arm
from workbench.claims.latency import Timed, latency_table
from workbench.divergence import PlainAnswers
from workbench.evaluation import evaluate
from workbench.grid import grid
from workbench.interventions import Intervention
from workbench.models import LM
from workbench.prompts import Strategy
from workbench.results import Results
from workbench.statistics import Interval, holm, paired_difference
from workbench.tasks import Task

PLANNED = (  # each is b - a in share of right answers
    (LAST, VALUES, "it beats activation steering at one token"),
    (EACH, VALUES, "it beats activation steering at each step"),
    (TOLD, VALUES, "it beats asking in the prompt"),
    ("random, cache", VALUES, "it beats a random edit of the cache"),
    (VALUES, KEYS, "keys, un-rotated, help"),
    (AS_CACHED, KEYS, "keys must be un-rotated"),
)
RESAMPLES = 1000
AT_LEAST = 0.8  # of an arm's best share of right answers counts as "still works" when strengths are compared


@dataclass(frozen=True, eq=False)
class Report:
    """The arms on questions that nothing was chosen on. table: a line an arm; results: a line a question and arm."""

    table: pd.DataFrame
    results: Results


def with_prompts(arms: Sequence[Arm], told: Strategy) -> list[Arm]:
    """The arms, behind the plain model and the prompt that asks for the style in words."""
    reason = "A prompt has no strength; its KL is that of the same answers behind the other prompt."
    return [Arm(PLAIN), Arm(TOLD, strategy=told, note=reason), *arms]


def report(
    lm: LM,
    task: Task,
    arms: Sequence[Arm],
    *,
    n: int = 100,
    seed: int = 0,
    split: str = "test",
    max_new_tokens: int = 256,
    kl_tokens: int = 16,
) -> Report:
    """Run every arm on n questions of a split that it was not tuned on.

    Columns: condition, choice, strength, kl_tuning; kl (95th percentile over tokens of the plain model's answers to
    these questions, in nats, bootstrap over questions), or kl_prompt for a prompt, which no budget holds; n, accuracy,
    steps (Wilson); difference to plain (paired, Tango's interval, exact McNemar p, Holm over the arms); tokens_out;
    note. Arms that could not be brought to the budget have a note and no numbers.
    """
    running = [arm for arm in arms if arm.runs]
    results = evaluate(
        lm, task, {arm.name: arm.condition for arm in running}, n=n, seed=seed, split=split,
        max_new_tokens=max_new_tokens,
    )  # fmt: skip
    costs = reached(lm, task, running, n=n, seed=seed, split=split, kl_tokens=kl_tokens)
    measured = results.table().set_index("condition")
    against = results.comparisons(PLAIN).set_index("b") if len(running) > 1 else pd.DataFrame()
    lines = []
    for arm in arms:
        line: dict[str, Any] = {"condition": arm.name, "choice": arm.choice, "strength": arm.strength}
        line["kl_tuning"] = arm.kl
        if arm.name in measured.index:
            own, cost = measured.loc[arm.name], costs[arm.name]
            kl = "kl" if arm.strategy is None else "kl_prompt"
            line |= {kl: cost.estimate, f"{kl}_low": cost.low, f"{kl}_high": cost.high, "n": int(measured.n.iloc[0])}
            names = ("accuracy", "low", "high", "steps", "steps_low", "steps_high", "tokens_in", "tokens_out")
            line |= {name: own[name] for name in names}
        if arm.name in against.index:
            found = against.loc[arm.name]
            line |= {"difference": found.difference, "difference_low": found.low, "difference_high": found.high}
            line |= {"p_value": found.p_value, "p_holm": found.p_holm}
        lines.append(line | {"note": arm.note})
    return Report(pd.DataFrame(lines), results)


def reached(
    lm: LM, task: Task, arms: Sequence[Arm], *, n: int, seed: int, split: str, kl_tokens: int = 16
) -> dict[str, Interval]:
    """KL(plain || arm) at the 95th percentile over tokens of the plain model's answers to n questions, in nats."""
    rows = task.rows(split, n=n, seed=seed)
    plain = PlainAnswers.of(lm, [lm.render(task.messages(row)) for row in rows], kl_tokens, None)
    found = {}
    for arm in arms:
        if arm.strategy is not None:
            told = [lm.encode(task.messages(row, arm.strategy)) for row in rows]
            found[arm.name] = _percentile(_kl_between(lm, plain.prompts, told, plain.answers))
        elif arm.change is not None:
            found[arm.name] = _percentile(plain.kl([arm.change])[0])
        else:
            found[arm.name] = Interval(0.0, 0.0, 0.0, len(rows), "the plain model against itself")
    return found


def _kl_between(
    lm: LM, first: Sequence[list[int]], second: Sequence[list[int]], answers: Sequence[list[int]]
) -> list[np.ndarray]:
    """KL of every token of each answer, behind the first prompt against behind the second; one row at a time."""

    def scores(prompt: list[int], answer: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + answer[:-1]], device=lm.device)
        with torch.no_grad():
            return lm.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float().log_softmax(-1)

    found = []
    for one, other, answer in zip(first, second, answers, strict=True):
        plain, changed = scores(one, answer), scores(other, answer)
        share = plain.exp()
        kl = torch.where(share > 0, share * (plain - changed), 0.0).sum(-1).clamp(min=0)
        found.append(kl.cpu().double().numpy())
    return found


def _percentile(costs: Sequence[np.ndarray]) -> Interval:
    """The 95th percentile over all tokens; whole questions are drawn, because an answer's tokens go together."""
    tokens, rng = np.concatenate(costs), np.random.default_rng(0)
    draws = [[costs[pick] for pick in rng.integers(0, len(costs), len(costs))] for _ in range(RESAMPLES)]
    low, high = np.percentile([np.percentile(np.concatenate(draw), 95) for draw in draws], [2.5, 97.5])
    return Interval(float(np.percentile(tokens, 95)), float(low), float(high), len(tokens))


def between(results: Results, pairs: Sequence[tuple[str, str]] = tuple(row[:2] for row in PLANNED)) -> pd.DataFrame:
    """Planned differences b - a between two arms, in right answers and in answers with steps, paired; Holm over all.

    Pairs with an arm that did not run are left out.
    """
    by_arm = {str(name): group.set_index("id") for name, group in results.rows.groupby("condition", sort=False)}
    lines = []
    for first, second in pairs:
        if first not in by_arm or second not in by_arm:
            continue
        a, b = by_arm[first], by_arm[second].loc[by_arm[first].index]
        for what, column in (("right", "correct"), ("with steps", "steps")):
            found = paired_difference(a[column].astype(bool).tolist(), b[column].astype(bool).tolist())
            line: dict[str, Any] = {
                "a": first,
                "b": second,
                "what": what,
                "difference": found.difference,
                "low": found.low,
            }
            lines.append(line | {"high": found.high, "p_value": found.p_value, "n": found.n})
    adjusted = holm([line["p_value"] for line in lines]) if lines else []
    return pd.DataFrame(lines).assign(p_holm=adjusted)


def around(
    lm: LM,
    task: Task,
    arms: Sequence[Arm],
    multiples: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0),
    *,
    n: int = 32,
    seed: int = 0,
    split: str = "tuning",
    max_new_tokens: int = 256,
    kl_tokens: int = 16,
) -> pd.DataFrame:
    """Each arm at multiples of its calibrated strength: how wide is the range in which it works, and at what KL.

    Columns: condition, multiple, those of `workbench.grid.grid`, and kl_p95 (95th percentile, nats) with its limits.
    """
    cells: list[tuple[dict[str, Any], Intervention]] = [
        ({"condition": arm.name, "multiple": multiple}, multiple * arm.change)
        for arm in arms
        if arm.change is not None
        for multiple in multiples
    ]
    if not cells:
        return pd.DataFrame(columns=["condition", "multiple", "accuracy", "kl_p95"])
    prompts = [lm.render(task.messages(row)) for row in task.rows(split, n=n, seed=seed)]
    plain = PlainAnswers.of(lm, prompts, kl_tokens, None)
    costs = [_percentile(plain.kl([change])[0]) for _, change in cells]
    table = grid(lm, task, cells, n=n, seed=seed, split=split, max_new_tokens=max_new_tokens)
    limits = {"kl_p95": [each.estimate for each in costs], "kl_p95_low": [each.low for each in costs]}
    return table.assign(**limits, kl_p95_high=[each.high for each in costs])


def to_time(lm: LM, arms: Sequence[Arm], row: dict[str, Any], task: Task) -> dict[str, Timed]:
    """Every running arm with one question as its prompt; and the paper's way with a vector at every token: no cache."""
    timed = {
        arm.name: Timed(lm.render(task.messages(row, arm.strategy)), arm.change)
        for arm in arms
        if arm.runs and arm.name not in FLOORS
    }
    if EACH in timed:
        timed[f"{EACH}, cache off"] = Timed(timed[EACH].prompt, timed[EACH].change, use_cache=False)
    return timed


def claims(table: pd.DataFrame, planned: pd.DataFrame, curve: pd.DataFrame, rounds: pd.DataFrame) -> pd.DataFrame:
    """The published claims, each beside what was measured here and what that says: columns claim, measured, verdict.

    table: `Report.table`; planned: `between`; curve: `around`; rounds: `latency.time_rounds`. A verdict
    follows the 95 % interval alone (and Holm's p where there is one): "not seen" is not "absent".
    """
    lines = []
    arms = {str(row["condition"]): row for row in table.to_dict("records")}
    own = arms.get(VALUES, {})
    if not np.isnan(own.get("difference", np.nan)):
        style = f"steps in {own['steps']:.2f} [{own['steps_low']:.2f}, {own['steps_high']:.2f}] of answers, "
        style += f"plain {arms[PLAIN]['steps']:.2f}; right "
        own = {**own, "low": own["difference_low"], "high": own["difference_high"]}
        lines.append(_line("one edit of cached values makes the model reason", style, own))
    for first, second, claim in PLANNED:
        found = [
            row for row in planned.to_dict("records") if (row["a"], row["b"], row["what"]) == (first, second, "right")
        ]
        lines += [_line(claim, "right ", row) for row in found]
    lines += _cheaper(rounds) + _stable(curve)
    return pd.DataFrame(lines, columns=["claim", "measured", "verdict"])


def _line(claim: str, what: str, found: Mapping[Hashable, Any]) -> dict[str, str]:
    low, high, p = float(found["low"]), float(found["high"]), float(found["p_holm"])
    verdict = "not seen" if p >= 0.05 else "seen" if low > 0 else "the opposite" if high < 0 else "not seen"
    measured = f"{what}{found['difference']:+.2f} [{low:+.2f}, {high:+.2f}], p {p:.2g}"
    return {"claim": claim, "measured": measured, "verdict": verdict}


def _cheaper(rounds: pd.DataFrame) -> list[dict[str, str]]:
    """Time a token of the cache edit, against a vector at one token and at each step."""
    lines = []
    timed = set(rounds.condition) if len(rounds) else set()
    for other in (LAST, EACH, f"{EACH}, cache off"):
        if {VALUES, other} <= timed:
            found = latency_table(rounds, other).set_index("condition").loc[VALUES]
            measured = f"{found.ratio:.2f} [{found.ratio_low:.2f}, {found.ratio_high:.2f}] times the time a token"
            verdict = "seen" if found.ratio_high < 1 else "the opposite" if found.ratio_low > 1 else "not seen"
            lines.append({"claim": f"it is cheaper a token than: {other}", "measured": measured, "verdict": verdict})
    return lines


def _stable(curve: pd.DataFrame) -> list[dict[str, str]]:
    """In how wide a range of strengths each arm keeps most of its best share of right answers."""
    ranges = {}
    for name in (VALUES, LAST, EACH):
        own = curve[curve.condition == name]
        works = own[own.accuracy >= AT_LEAST * own.accuracy.max()].multiple
        if len(works):
            ranges[name] = (works.min(), works.max())
    if VALUES not in ranges or len(ranges) < 2:
        return []
    wide = {name: high / low for name, (low, high) in ranges.items()}
    text = "; ".join(f"{name} {low:g} to {high:g}" for name, (low, high) in ranges.items())
    best = max(width for name, width in wide.items() if name != VALUES)
    verdict = "seen" if wide[VALUES] > best else "the opposite" if wide[VALUES] < best else "not seen"
    measured = f"{AT_LEAST:.0%} of its best kept, in calibrated strengths (no interval): {text}"
    return [{"claim": "it works over a wider range of strengths", "measured": measured, "verdict": verdict}]
