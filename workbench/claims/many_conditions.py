"""Many conditions on many tasks, with intervals, costs and corrected p-values, on one table a task.

Adapter, steering vector and cache edit are those of a run folder (notebooks 02 to 04), so nothing is chosen on the test
questions that are reported here. A condition that a task or a model can't have (no worked steps for its examples, more
tokens than the model has positions) is told and left out. Rows are kept while they are made; a second start goes on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.evaluation import Condition, evaluate
from workbench.evaluation.conditions import Plan
from workbench.interventions import Adapter, load_intervention
from workbench.models import LM, load_model
from workbench.prompts import few_shot, instruction, short_answer, zero_shot
from workbench.report.tables import format_table
from workbench.results import Results
from workbench.runs.stages import COST
from workbench.solvers import (
    BestOf,
    Budget,
    Correct,
    DraftVerify,
    HandOver,
    SelfConsistency,
    StepBeam,
    TreeSearch,
    choose_threshold,
    fit_probe,
)
from workbench.tasks import Task, load_task

LAB = ("word-problems", "chain-sum", "leg-counting", "number-sorting", "syllogism", "gcd")
SHOWN = ["condition", "n", "accuracy", "low", "high", "unparsed", "tokens_in", "tokens_out", "calls", "gflops"]


def changes(run: Path) -> dict[str, Any]:
    """The adapter, vector, random vector and cache edit that the notebooks of a run left."""
    found: dict[str, Any] = {
        "tuned": Adapter(run / "02_finetune_qlora" / "adapter"),
        "residual-steered": load_intervention(run / "03_steering_vectors" / "steering.safetensors"),
        "random": load_intervention(run / "03_steering_vectors" / "random.safetensors"),
    }
    kv = load_intervention(run / "04_kv_cache" / "kv.safetensors")
    return found | ({"KV-steered": kv} if getattr(kv, "values", None) else {})


def conditions(task: Task, made: dict[str, Any]) -> dict[str, Condition]:
    """Prompts, ways to answer and changes of the model, for tasks that are answered in words."""
    shots = few_shot("steps", 3)
    return {
        "plain": [],
        "short answer": [short_answer(task.kind)],
        "zero-shot steps": [zero_shot()],
        "told to show steps": [instruction("steps")],
        "3 shots, direct": [few_shot("direct", 3)],
        "few-shot steps": [shots],
        "5 votes": [shots, SelfConsistency(5)],
        "best of 5 by likelihood": [shots, BestOf(5)],
        "best of 5, oracle": [shots, BestOf(5, by="exact")],
        "at most 40 tokens of steps": [shots, Budget(most=40)],
        "told to correct itself": [instruction("steps"), Correct()],
        **{name: [change] for name, change in made.items()},
        "tuned + steered": [made["tuned"], made["residual-steered"]],
        "tuned, 5 votes": [made["tuned"], SelfConsistency(5)],
    }


def searches() -> dict[str, Condition]:
    """Searches over steps, which take longer than all others together."""
    shots = few_shot("steps", 3)
    return {"tree search, 8 rollouts": [shots, TreeSearch(8)], "beams of steps, 2 of 6": [shots, StepBeam(2, 3)]}


def cascades(lm: LM, task: Task, small: LM, n: int, limit: int) -> dict[str, Condition]:
    """A smaller model that hands over what it doubts, and one whose drafts are verified.

    The threshold is the one that hands over least and loses nothing against the best one on n tuning questions.
    """
    told = instruction("steps")
    tried: dict[str, Condition] = {"large": [told], "hand": [told, HandOver(small, 0.0)]}
    tried["draft"] = [told, DraftVerify(small, 0.0)]
    found = evaluate(lm, task, tried, n=n, seed=1, split="tuning", max_new_tokens=limit)
    hand, draft = (choose_threshold(found, name, "large") for name in ("hand", "draft"))
    for name, chosen in (("hand-over", hand), ("draft and verify", draft)):
        print(
            f"{task.name}: {name} above {chosen.threshold:.3g}: {chosen.share:.0%} of {n} tuning questions", flush=True
        )
    return {
        "hand-over from the smaller model": [told, HandOver(small, hand.threshold)],
        "smaller model's drafts verified": [told, DraftVerify(small, draft.threshold)],
    }


def probed(lm: LM, task: Task, out: Path, n: int, limit: int) -> dict[str, Condition]:
    """The best of five by a verifier that was trained on the train split: a probe on the model's own states."""
    shots = few_shot("steps", 3)
    try:
        probe = fit_probe(lm, task, out / "probe.safetensors", strategy=shots, n=n, max_new_tokens=limit)
    except ValueError as error:
        print(f"{task.name}: left out the trained probe: {error}", flush=True)
        return {}
    print(f"{task.name}: the probe's AUROC on training questions held out is {probe.auroc:.2f}", flush=True)
    return {"best of 5, trained probe": [shots, BestOf(5, by=probe)]}


def pair_conditions(made: dict[str, Any]) -> dict[str, Condition]:
    """For minimal pairs, which are scored and not answered: changes, strengths, and ways to count a length.

    A sentence has no prompt before it, so that an edit of a cached prompt token has no place.
    """
    from workbench.solvers import Likelihood

    x, random = made["residual-steered"], made["random"]
    every: dict[str, Condition] = {"plain": [Likelihood()]}
    every |= {f"plain, by {unit}": [Likelihood(unit)] for unit in ("token", "byte", "character")}
    every |= {name: [change, Likelihood()] for name, change in made.items() if name != "KV-steered"}
    every |= {f"residual-steered, x {s:g}": [s * x, Likelihood()] for s in (0.5, 2.0, 4.0)}
    every |= {"random, x 4": [4.0 * random, Likelihood()]}
    return every | {"tuned + steered": [made["tuned"], x, Likelihood()]}


def possible(
    lm: LM, task: Task, rows: Sequence[dict[str, Any]], wanted: dict[str, Condition], limit: int
) -> dict[str, Condition]:
    """The conditions that can be asked of every row; what is left out is told with its reason."""
    room = lm.model.config.get_text_config().max_position_embeddings - limit
    kept = {}
    for name, condition in wanted.items():
        plan = Plan.of(name, condition)
        try:
            longest = max(len(lm.encode(task.messages(row, plan.strategy))) for row in rows)
        except ValueError as error:
            print(f"{task.name}: left out {name}: {error}")
            continue
        if longest > room:
            print(f"{task.name}: left out {name}: a prompt has {longest} tokens, there is room for {room}")
            continue
        kept[name] = condition
    return kept


def table(found: Results) -> pd.DataFrame:
    """Accuracy, cost and the paired difference to the first condition, one line a condition."""
    lines = found.table()
    beside = found.comparisons().set_index("b")[["difference", "low", "high", "p_holm"]]
    beside.columns = ["difference", "difference_low", "difference_high", "p_holm"]
    return lines[SHOWN].join(beside, on="condition").assign(seconds=lines.seconds)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m workbench.claims.many_conditions", description=(__doc__ or "")[:90]
    )
    parser.add_argument("--model", default="lab")
    parser.add_argument("--small", help="the smaller model that hands over to it")
    parser.add_argument("--run", type=Path, default=Path("outputs/main"), help="run folder with adapter, vector, edit")
    parser.add_argument("--tasks", nargs="+", default=[*LAB, "svamp", "gsm8k", "blimp"])
    parser.add_argument(
        "--search", nargs="*", default=["word-problems"], help="tasks that are also searched over steps"
    )
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--limit", type=int, default=96, help="new tokens an answer")
    parser.add_argument("--out", type=Path, default=Path("outputs/many-conditions"))
    options = parser.parse_args()
    if not (options.run / "04_kv_cache" / COST).exists():
        parser.error(f"{options.run} holds no run with adapter, vector and cache edit. Next: make run")
    lm, made = load_model(options.model), changes(options.run)
    small = load_model(options.small) if options.small else None
    for name in options.tasks:
        pairs, out = name.startswith("blimp"), options.out / lm.name / name.replace(":", "-")
        task = load_task(name, per_paradigm=20) if name == "blimp" else load_task(name)
        n = None if pairs else options.n
        wanted = pair_conditions(made) if pairs else conditions(task, made)
        if not pairs:
            wanted |= cascades(lm, task, small, options.n // 2, options.limit) if small else {}
            wanted |= searches() if name in options.search else {}
            wanted = possible(lm, task, task.rows("test", n=n, seed=0), wanted, options.limit)
            wanted |= probed(lm, task, out, options.n // 2, options.limit) if "few-shot steps" in wanted else {}
        found = evaluate(lm, task, wanted, n=n, seed=0, max_new_tokens=options.limit, out=out)
        print(f"\n{lm.name} on {name}\n{format_table(table(found).to_dict('records'))}", flush=True)


if __name__ == "__main__":
    main()
