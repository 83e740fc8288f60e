"""LoRA and its kin, virtual tokens and all weights on the same records: `python -m workbench.claims.tuning_methods`.

Every arm learns the same verified records (the model's own, elicited by examples) for as many epochs, then answers the
same test questions without a cue. `--split tuning --rates 0.3 1 3` tries multiples of each method's default learning
rate on tuning questions with one seed; what was tried stands in docs/log.md. Not covered: other models and budgets.
"""

import argparse
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from workbench.claims.over_seeds import Work, run_cells, table
from workbench.evaluation import evaluate
from workbench.finetuning import finetune
from workbench.finetuning.recipe import rate_for
from workbench.interventions import Adapter
from workbench.models import LM, load_model
from workbench.prompts import few_shot
from workbench.report.tables import format_table
from workbench.results import Results
from workbench.synthesis import synthesize
from workbench.tasks import Task, load_task

BASELINE = "lora"
ARMS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "qlora": {"method": "qlora", "quantization": "nf4"},
    "rslora": {"method": "rslora"},
    "dora": {"method": "dora"},
    "prompt, 20 tokens": {"method": "prompt"},
    "prefix, 20 tokens": {"method": "prefix"},
    "full": {"method": "full"},
    "lora, rank 2": {"rank": 2},
}


@dataclass(frozen=True)
class Bench:
    """What all arms share."""

    lm: LM
    task: Task
    split: str
    questions: int = 150
    epochs: float = 4
    n: int = 200
    limit: int = 160

    def trained(
        self, seed: int, out: Path, *, name: str, rate: float, settings: dict[str, Any]
    ) -> tuple[Results, dict[str, Any]]:
        """Train one arm at `rate` times its method's default, and answer the questions."""
        asked = {"samples": 2, "max_new_tokens": self.limit, "strategy": few_shot("steps", 3)}
        data = synthesize(self.lm, self.task, n=self.questions, seed=seed, out=out / "records", **asked)  # type: ignore[arg-type]
        default, _ = rate_for(self.lm, None, settings.get("method", "lora").replace("qlora", "lora"))
        how: dict[str, Any] = {"quantization": "none", "epochs": self.epochs, "seed": seed, **settings}
        made = finetune(self.lm, data, out / f"{name}-{rate:g}", learning_rate=rate * default, **how)
        lm, condition = (self.lm, [made]) if isinstance(made, Adapter) else (load_model(made), [])
        results = evaluate(
            lm, self.task, {name: condition}, n=self.n, seed=0, split=self.split, max_new_tokens=self.limit
        )
        folder = made.path if isinstance(made, Adapter) else made
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return results, {"records": len(data.kept), "learning rate": rate * default, "MB": size / 1e6}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m workbench.claims.tuning_methods", description=(__doc__ or "")[:70])
    parser.add_argument("--model", default="lab")
    parser.add_argument("--task", default="word-problems")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", default="test", choices=("test", "tuning"))
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0], help="multiples of the default learning rate")
    parser.add_argument("--only", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=Path("outputs/tuning-methods"))
    options = parser.parse_args()
    bench = Bench(load_model(options.model), load_task(options.task), options.split)
    arms: dict[str, Work] = {
        name if rate == 1 else f"{name}, rate x {rate:g}": partial(
            bench.trained, name=name.replace(", ", "-").replace(" ", "-"), rate=rate, settings=ARMS[name]
        )
        for name in options.only
        for rate in options.rates
    }
    settings = {"model": bench.lm.revision, "task": bench.task.name, "split": bench.split, "n": bench.n}
    settings |= {"questions": bench.questions, "epochs": bench.epochs}
    found = table(run_cells(arms, range(options.seeds), options.out / options.split, settings), BASELINE)
    print(format_table(found.to_dict("records")))


if __name__ == "__main__":
    main()
