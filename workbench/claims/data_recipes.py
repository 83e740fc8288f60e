"""All data recipes on one model at one budget: `python -m workbench.claims.data_recipes`, half a minute a cell.

Every arm asks the same questions of the training split and hands the same number of answer tokens to the same LoRA
training; then the student answers the same test questions without any cue. Recipes that yield fewer tokens hand over
all they have; wrong chains beside right ones, and stages, hand over more: the line says how many. Equal answer tokens
are not equal steps: short answers come with more prompts. Nothing is chosen on the test split.
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
from workbench.finetuning.conditioning import condition
from workbench.finetuning.stages import Stage, finetune_stages
from workbench.interventions import Adapter
from workbench.models import LM, load_model
from workbench.prompts import Strategy, few_shot
from workbench.report.tables import format_table
from workbench.results import Results
from workbench.synthesis import edits, recipes, scores, synthesize
from workbench.synthesis.mixing import mix
from workbench.synthesis.programs import program_task
from workbench.synthesis.records import Data, Record
from workbench.tasks import Task, load_task

BASELINE = "rejection, shortest"


@dataclass(frozen=True)
class Bench:
    """What all arms share: the student, a weaker teacher, the task and the budget."""

    lm: LM
    teacher: LM
    weak: LM
    task: Task
    questions: int = 100
    samples: int = 3
    tokens: int = 2000
    epochs: float = 6
    batch_tokens: int = 512  # some 45 steps: with 2,048 there were 8, and what moves the style most looked best
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

    def cut(self, seed: int, out: Path, data: Data, name: str, **how: Any) -> Data:
        """The budget's worth of the records, or all that there are."""
        held = sum(record["tokens_out"] for record in data.kept)
        return mix({"all": data}, out / "arms" / name, tokens=min(self.tokens, held), seed=seed, **how)

    def taught(self, seed: int, out: Path, data: Data, name: str, **how: Any) -> tuple[Results, dict[str, Any]]:
        """Cut to the budget, train, and answer the test questions."""
        mixing = {"order": how.pop("curriculum")} if "curriculum" in how else {}
        mixing |= {key: how.pop(key) for key in ("score", "balance") if key in how}
        return self.tested(seed, out, self.cut(seed, out, data, name, **mixing), name, data, **how)

    def tested(
        self,
        seed: int,
        out: Path,
        cut: Data,
        name: str,
        made: Data,
        *,
        task: Task | None = None,
        cue: Strategy | None = None,
        **training: Any,
    ) -> tuple[Results, dict[str, Any]]:
        """Train on exactly these records and answer the test questions without a cue, or with the one taught."""
        settings: dict[str, Any] = {"epochs": self.epochs, "batch_tokens": self.batch_tokens} | training
        settings |= {"quantization": "none", "seed": seed}
        adapter = finetune(self.lm, cut, out / "adapters" / name, **settings)
        assert isinstance(adapter, Adapter)  # only method="full" leaves a folder
        condition: list[Any] = [adapter] if cue is None else [adapter, cue]
        asked: dict[str, Any] = {"n": self.n, "seed": 0, "max_new_tokens": self.limit}
        results = evaluate(self.lm, task or self.task, {name: condition}, **asked)
        return results, self.facts(cut, made)

    def facts(self, cut: Data, made: Data) -> dict[str, Any]:
        """What was made, learnt and spent."""
        cost, counts = made.card.get("cost", {}), made.card["counts"]
        facts = {"kept": counts["kept"], "calls": cost.get("calls", 0), "sampled tokens": cost.get("tokens_out", 0)}
        learnt = sum(record["tokens_out"] for record in cut)
        return facts | {
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
    return bench.tested(seed, out, cut, name, _together(*made.values()))


def _together(first: Data, *others: Data) -> Data:
    """The first set with a card on which the costs and counts of all are added."""
    cards = [data.card for data in (first, *others)]
    cost = {k: sum(card["cost"][k] for card in cards) for k in ("calls", "tokens_out", "seconds")}
    return replace(first, card={"cost": cost, "counts": {"kept": sum(card["counts"]["kept"] for card in cards)}})


def _probed(bench: Bench, seed: int, out: Path, *, name: str) -> tuple[Results, dict[str, Any]]:
    """Right and wrong chains of each half of the questions fit a probe; it scores the records of the other half."""
    data = bench.sampled(seed, out, negatives=1)
    first = {str(row["id"]) for row in bench.task.rows("train", n=bench.questions // 2, seed=seed)}

    def score(records: list[Record]) -> list[float]:
        found: dict[str, float] = {}
        for half in (True, False):
            right, wrong = ([r for r in part if (r["row_id"] in first) == half] for part in (data.kept, data.negatives))
            others = [record for record in records if (record["row_id"] in first) != half]
            values = scores.probed(others, lm=bench.lm, right=right, wrong=wrong) if others else []
            found |= {record["id"]: value for record, value in zip(others, values, strict=True)}
        return [found[record["id"]] for record in records]

    return bench.taught(seed, out, data, name, score=score)


def _programs(bench: Bench, seed: int, out: Path, *, name: str, again: bool) -> tuple[Results, dict[str, Any]]:
    """Sampled steps rendered as programs; with `again`, the student so taught writes the programs that are learnt."""
    asking = program_task(bench.task)
    first = bench.sampled(seed, out, edits=[edits.as_programs])
    if not again:
        return bench.taught(seed, out, first, name, task=asking)
    cut = bench.cut(seed, out, first, f"{name}-first")
    writer = finetune(
        bench.lm, cut, out / "adapters" / f"{name}-first", epochs=bench.epochs, batch_tokens=bench.batch_tokens,
        quantization="none", seed=seed,
    )  # fmt: skip
    assert isinstance(writer, Adapter)
    with bench.lm.apply(writer):
        settings: dict[str, Any] = {"strategy": Strategy("bare"), "samples": bench.samples, "out": out / "own-programs"}
        data = synthesize(bench.lm, bench.task, "programs", bench.questions, seed + 100, **settings)
    return bench.tested(seed, out, bench.cut(seed, out, data, name), name, _together(data, first), task=asking)


def _conditioned(bench: Bench, seed: int, out: Path, *, name: str) -> tuple[Results, dict[str, Any]]:
    """Right chains under one control text, wrong ones under another; asked with the first (`conditioning`)."""
    data = bench.sampled(seed, out, negatives=1)
    right = bench.cut(seed, out, data, f"{name}-right").kept
    marked = condition(right, "[right]") + condition(data.negatives[: len(right) // 3], "[wrong]")
    cue = Strategy("[right]", system="[right]")
    return bench.tested(seed, out, Data(data.folder, marked, {}), name, data, cue=cue)


def _internalised(bench: Bench, seed: int, out: Path, *, name: str) -> tuple[Results, dict[str, Any]]:
    """Stages with 0, 1, 2, 4 and all first steps removed, two epochs each (internalised chain of thought).

    Each stage hands over the whole budget, so that what is learnt in all is more than in another arm; its line says it.
    """
    stages, learnt = [], list[Record]()
    for removed in (0, 1, 2, 4, 99):
        edit = partial(edits.without_steps, removed=removed)
        made = bench.sampled(seed, out, edits=[edit], threshold=1.0)
        cut = bench.cut(seed, out, made, f"{name}-{removed}")
        stages.append(Stage(f"without-{removed}", cut))
        learnt += cut.records
    staged = finetune_stages(
        bench.lm, stages, out / "adapters" / name, epochs=2, batch_tokens=bench.batch_tokens,
        quantization="none", seed=seed,
    )  # fmt: skip
    asked: dict[str, Any] = {"n": bench.n, "seed": 0, "max_new_tokens": bench.limit}
    return evaluate(bench.lm, bench.task, {name: [staged.adapter]}, **asked), bench.facts(Data(out, learnt, {}), made)


def _settings(bench: Bench) -> dict[str, dict[str, Any]]:
    """Arms that are one sampling: what is given to `Bench.sampled`, and as `how` to `Bench.taught`."""
    long = {"style": "long"}
    unpacked = {"packing": False, "batch_size": 5}
    in_order: dict[str, Any] = unpacked | {"order": "given"}  # batches of 5 records are about 512 tokens
    sampled: dict[str, dict[str, Any]] = {
        BASELINE: {"select": "shortest"},
        "rejection, random": {"select": "random"},
        "rejection, longest": {"select": "longest"},
        "rejection, diverse": {"select": "diverse"},
        "rejection, 3 distinct chains": {"chains": 3, "select": "random", "threshold": 1.0},
        "rejection, long style": long,
        "STaR": {"recipe": "star"},
        "oracle steps": {"recipe": "oracle"},
        "long, equations only": long | {"edits": [edits.equations]},
        "in words": {"edits": [edits.in_words]},
        "long, compact": long | {"edits": [partial(edits.compact, most=1)]},
        "first step removed": {"edits": [partial(edits.without_steps, removed=1)]},
        "improbable steps dropped": long | {"edits": [partial(edits.drop_improbable, student=bench.lm)]},
        "paced by the student": {"recipe": partial(recipes.student_paced, teacher=bench.teacher), "lm": bench.lm},
        "weak teacher": {"lm": bench.weak},
        "three reviewers": {"recipe": "reviewed"},
        "critique, rewrite": {"recipe": "critique"},
        "magpie": {"recipe": "magpie"},
        "self-instruct": {"recipe": "self_instruct"},
        "evolve": {"recipe": "evolve"},
        "middling solve rate": {"how": {"score": scores.middling}},
        "diverse by embedding": {"how": {"score": partial(scores.diverse, lm=bench.lm)}},
        "diverse by gradient": {"how": {"score": partial(scores.diverse, lm=bench.lm, by="gradient")}},
        "unpacked, shuffled": {"how": unpacked},
        "easy first": {"how": in_order | {"curriculum": "easy first"}},
        "hard first": {"how": in_order | {"curriculum": "hard first"}},
        "short first": {"how": in_order | {"curriculum": "short first"}},
    }
    if bench.teacher.model is bench.lm.model:
        del sampled["paced by the student"]  # a model finds all that it writes plausible
    return sampled


def arms(bench: Bench) -> dict[str, Work]:
    """Every recipe, selection, edit, mix and curriculum by name."""
    made: dict[str, Work] = {"untrained": partial(_plain, bench)}
    made |= {
        name: partial(_sampled, bench, name=_file(name), **settings) for name, settings in _settings(bench).items()
    }
    made["long 1/4, short 3/4"] = partial(
        _mixed, bench, name="long-short", parts={"short": {}, "long": {"style": "long"}},
        shares={"short": 0.75, "long": 0.25},
    )  # fmt: skip
    made["weak 1/2, strong 1/2"] = partial(
        _mixed, bench, name="weak-strong", parts={"strong": {}, "weak": {"lm": bench.weak}},
        shares={"strong": 0.5, "weak": 0.5},
    )  # fmt: skip
    made["best by probe"] = partial(_probed, bench, name="probe")
    made["wrong chains under a control text"] = partial(_conditioned, bench, name="control")
    made["steps internalised in stages"] = partial(_internalised, bench, name="internalised")
    made["programs, rendered"] = partial(_programs, bench, name="programs", again=False)
    made["programs, the student's own"] = partial(_programs, bench, name="own-programs", again=True)
    return made


def _file(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m workbench.claims.data_recipes", description=(__doc__ or "")[:90])
    parser.add_argument("--model", default="lab")
    parser.add_argument("--teacher", help="who writes the answers; default: the model itself")
    parser.add_argument("--weak", default="lab-small", help="a weaker teacher")
    parser.add_argument("--task", default="word-problems")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", help="arms, by name")
    parser.add_argument("--out", type=Path, default=Path("outputs/data-recipes"))
    options = parser.parse_args()
    lm = load_model(options.model)
    teacher = load_model(options.teacher) if options.teacher else lm
    bench = Bench(lm, teacher, load_model(options.weak), load_task(options.task))
    chosen: dict[str, Callable[..., Any]] = {
        name: work for name, work in arms(bench).items() if not options.only or name in (*options.only, BASELINE)
    }
    numbers = {k: getattr(bench, k) for k in ("questions", "samples", "tokens", "epochs", "batch_tokens", "n", "limit")}
    settings = numbers | {
        "model": bench.lm.revision,
        "teacher": bench.teacher.revision,
        "weak": bench.weak.revision,
        "task": bench.task.name,
    }
    found = table(run_cells(chosen, range(options.seeds), options.out, settings), BASELINE)
    print(format_table(found.to_dict("records")))
    found.to_json(options.out / "table.json", orient="records", indent=1)


if __name__ == "__main__":
    main()
