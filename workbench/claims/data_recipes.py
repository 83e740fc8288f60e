"""All data recipes on one model at one budget: `python -m workbench.claims.data_recipes`, half a minute a cell.

Every arm asks the same questions of the training split and hands the same number of answer tokens to the same LoRA
training; then the student answers the same test questions without any cue. Recipes that yield fewer tokens hand over
all they have, which their line shows. Nothing is chosen on the test split.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from workbench.claims.over_seeds import Work, run_cells, table
from workbench.evaluation import evaluate
from workbench.finetuning import finetune
from workbench.interventions import Adapter
from workbench.models import LM, load_model
from workbench.prompts import few_shot
from workbench.report.tables import format_table
from workbench.results import Results
from workbench.synthesis import edits, recipes, scores, synthesize
from workbench.synthesis.mixing import mix
from workbench.synthesis.records import Data, Record
from workbench.tasks import Task, load_task

BASELINE = "rejection, shortest"


@dataclass(frozen=True)
class Bench:
    """What all arms share: the student, a weaker teacher, the task and the budget."""

    lm: LM
    weak: LM
    task: Task
    questions: int = 120
    samples: int = 4
    tokens: int = 3000
    epochs: float = 4
    n: int = 200
    limit: int = 160

    def sampled(
        self, seed: int, out: Path, recipe: Any = "rejection", *, style: str = "steps", **settings: Any
    ) -> Data:
        """Records by a recipe on the shared questions; arms with the same sampling share its saved chunks."""
        asked: dict[str, Any] = {
            "samples": self.samples,
            "max_new_tokens": self.limit,
            "strategy": few_shot(style, 3),
            "lm": self.lm,
        }
        asked |= settings
        return synthesize(asked.pop("lm"), self.task, recipe, self.questions, seed, out=out / "records", **asked)

    def taught(self, seed: int, out: Path, data: Data, name: str, **how: Any) -> tuple[Results, dict[str, Any]]:
        """Cut to the budget, train, and answer the test questions."""
        held = sum(record["tokens_out"] for record in data.kept)
        budget = min(self.tokens, held)
        cut = mix({"all": data}, out / "arms" / name, tokens=budget, seed=seed, **how)
        return self.tested(seed, out, cut, name, made=data)

    def tested(self, seed: int, out: Path, cut: Data, name: str, made: Data) -> tuple[Results, dict[str, Any]]:
        """Train on exactly these records and answer the test questions without a cue."""
        adapter = finetune(self.lm, cut, out / "adapters" / name, epochs=self.epochs, quantization="none", seed=seed)
        assert isinstance(adapter, Adapter)  # only method="full" leaves a folder
        results = evaluate(self.lm, self.task, {name: [adapter]}, n=self.n, seed=0, max_new_tokens=self.limit)
        cost, counts = made.card.get("cost", {}), made.card["counts"]
        facts = {"kept": counts["kept"], "calls": cost.get("calls", 0), "sampled tokens": cost.get("tokens_out", 0)}
        learnt = sum(record["tokens_out"] for record in cut)
        return results, facts | {
            "records": len(cut),
            "learnt tokens": learnt,
            "sampling seconds": cost.get("seconds", 0),
        }


def _plain(bench: Bench, seed: int, out: Path) -> tuple[Results, dict[str, Any]]:
    return evaluate(bench.lm, bench.task, {"untrained": []}, n=bench.n, seed=0, max_new_tokens=bench.limit), {}


def _sampled(
    bench: Bench, seed: int, out: Path, *, name: str, how: dict[str, Any] | None = None, **settings: Any
) -> tuple[Results, dict[str, Any]]:
    return bench.taught(seed, out, bench.sampled(seed, out, **settings), name, **(how or {}))


def _mixed(
    bench: Bench, seed: int, out: Path, *, name: str, parts: dict[str, dict[str, Any]], shares: dict[str, float]
) -> tuple[Results, dict[str, Any]]:
    """Two samplings with shares of the token budget; their costs are added."""
    made = {part: bench.sampled(seed, out / part, **settings) for part, settings in parts.items()}
    held = min(sum(r["tokens_out"] for r in made[part].kept) / share for part, share in shares.items())
    cut = mix(made, out / "arms" / name, shares=shares, tokens=int(min(bench.tokens, held)), seed=seed)
    cards = [data.card for data in made.values()]
    cost = {k: sum(card["cost"][k] for card in cards) for k in ("calls", "tokens_out", "seconds")}
    total = {"cost": cost, "counts": {"kept": sum(card["counts"]["kept"] for card in cards)}}
    return bench.tested(seed, out, cut, name, replace(cut, card=total))


def _probed(bench: Bench, seed: int, out: Path, *, name: str) -> tuple[Results, dict[str, Any]]:
    """Right and wrong chains of half of the questions fit the probe; it orders the records of the other half."""
    data = bench.sampled(seed, out, negatives=1)
    first = {row["id"] for row in bench.task.rows("train", n=bench.questions // 2, seed=seed)}
    right, wrong = ([r for r in found if r["row_id"] in first] for found in (data.kept, data.negatives))

    def score(records: list[Record]) -> list[float]:
        return scores.probed(records, lm=bench.lm, right=right, wrong=wrong)

    return bench.taught(seed, out, data, name, score=score)


def arms(bench: Bench) -> dict[str, Work]:
    """Every recipe, selection, edit, mix and curriculum by name."""
    long = {"style": "long"}
    sampled: dict[str, dict[str, Any]] = {
        BASELINE: {"select": "shortest"},
        "rejection, random": {"select": "random"},
        "rejection, longest": {"select": "longest"},
        "rejection, diverse": {"select": "diverse"},
        "rejection, 3 distinct chains": {"chains": 3, "select": "random", "threshold": 1.0},
        "rejection, long style": long,
        "STaR": {"recipe": "star"},
        "oracle steps": {"recipe": "oracle"},
        "oracle long": {"recipe": partial(recipes.oracle), "style": "long"},
        "long, equations only": long | {"edits": [edits.equations]},
        "in words": {"edits": [edits.in_words]},
        "long, compact": long | {"edits": [partial(edits.compact, most=1)]},
        "first step removed": {"edits": [partial(edits.without_steps, removed=1)]},
        "all steps removed": {"edits": [partial(edits.without_steps, removed=99)]},
        "long, improbable steps dropped": long | {"edits": [partial(edits.drop_improbable, threshold=0.01)]},
        "weak teacher": {"lm": bench.weak},
        "middling solve rate": {"how": {"score": scores.middling}},
        "diverse by embedding": {"how": {"score": partial(scores.diverse, lm=bench.lm)}},
        "diverse by gradient": {"how": {"score": partial(scores.diverse, lm=bench.lm, by="gradient")}},
    }
    made: dict[str, Work] = {"untrained": partial(_plain, bench)}
    for name, settings in sampled.items():
        if settings.get("recipe") == "oracle" or "oracle" in name:
            settings = {"recipe": "oracle"} | {k: v for k, v in settings.items() if k != "recipe"}
        made[name] = partial(_sampled, bench, name=_file(name), **settings)
    made["long 1/4, short 3/4"] = partial(
        _mixed, bench, name="long-short", parts={"short": {}, "long": long}, shares={"short": 0.75, "long": 0.25}
    )
    made["weak 1/2, strong 1/2"] = partial(
        _mixed, bench, name="weak-strong", parts={"strong": {}, "weak": {"lm": bench.weak}},
        shares={"strong": 0.5, "weak": 0.5},
    )  # fmt: skip
    made["best by probe"] = partial(_probed, bench, name="probe")
    return made


def _file(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m workbench.claims.data_recipes", description=(__doc__ or "")[:90])
    parser.add_argument("--model", default="lab")
    parser.add_argument("--weak", default="lab-small")
    parser.add_argument("--task", default="word-problems")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="arms, by name")
    parser.add_argument("--out", type=Path, default=Path("outputs/data-recipes"))
    options = parser.parse_args()
    bench = Bench(load_model(options.model), load_model(options.weak), load_task(options.task))
    chosen: dict[str, Callable[..., Any]] = {
        name: work for name, work in arms(bench).items() if not options.only or name in (*options.only, BASELINE)
    }
    numbers = {k: getattr(bench, k) for k in ("questions", "samples", "tokens", "epochs", "n", "limit")}
    settings = numbers | {"model": bench.lm.revision, "weak": bench.weak.revision, "task": bench.task.name}
    found = table(run_cells(chosen, range(options.seeds), options.out, settings), BASELINE)
    print(format_table(found.to_dict("records")))
    found.to_json(options.out / "table.json", orient="records", indent=1)


if __name__ == "__main__":
    main()
