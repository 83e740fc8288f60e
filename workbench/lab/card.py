"""Measure what a lab model shows and write it into its card: `python -m workbench.lab.card lab`, some minutes a model.

Layers and strengths are chosen on the tuning split, every number in the card is from the test split. Not covered:
training (`workbench.lab.train`); a smaller version of these measurements runs in the tests.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from workbench.evaluation import evaluate
from workbench.files import sha256, write_atomic
from workbench.finetuning import finetune
from workbench.grid import best, grid
from workbench.interventions import Adapter, Intervention, random_like, read_pairs
from workbench.lab.families import FAMILIES
from workbench.lab.train import DATA
from workbench.models import LM, load_model
from workbench.prompts import contrast, few_shot, instruction
from workbench.report.tables import format_table
from workbench.results import Results
from workbench.synthesis import synthesize
from workbench.tasks import Task, load_task

FEWER = 300  # test questions of the other families at most: small numbers have only so many greatest common divisors
TOKENS = 200  # the longest worked solution of the lab's families has about 150
SPANS = ("last", "generated")


def steering(lm: LM, task: Task, n: int = 40) -> dict[str, tuple[dict[str, Any], Intervention]]:
    """A residual and a KV intervention towards worked steps, each with the place and strength chosen on tuning rows."""
    pairs = contrast(task, positive="steps", negative="direct", shots=3, n=100, lm=lm)
    reading = read_pairs(lm, pairs)
    vector, kv = reading.vector(), reading.kv()
    places: list[tuple[dict[str, Any], Intervention]] = [
        (
            {"layer": layer, "span": span, "strength": strength},
            strength * vector.at(layers=[layer], positions=span),
        )
        for layer in vector.vectors
        for span in SPANS
        for strength in (0.5, 1.0, 2.0)
    ]
    edits: list[tuple[dict[str, Any], Intervention]] = [
        ({"keys": keys, "strength": values}, kv.scaled(keys=keys, values=values))
        for keys in (0.0, 1.0)
        for values in (0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
    ]
    found = {}
    for name, cells in {"residual-steered": places, "KV-steered": edits}.items():
        labels = best(grid(lm, task, cells, n=n, max_new_tokens=TOKENS))
        chosen = next(cell for cell in cells if all(labels[name] == value for name, value in cell[0].items()))
        found[name] = chosen
    return found


def tuned(lm: LM, task: Task, out: Path) -> Adapter:
    """A QLoRA adapter from at most 1,000 of the model's own verified answers, sampled after worked examples."""
    data = synthesize(
        lm, task, "rejection", n=900, out=out / "records", strategy=few_shot("steps", 3), samples=1, temperature=0.7,
        select="first", max_new_tokens=TOKENS,
    )  # fmt: skip
    adapter = finetune(lm, data, out / "adapter", quantization="nf4", epochs=3)
    assert isinstance(adapter, Adapter)
    return adapter


def measure(name: str, n: int, out: Path) -> dict[str, Any]:
    """All numbers of one model's card: conditions on the main task, plain and tuned on the other families."""
    lm, task = load_model(name), load_task("word-problems")
    chosen = steering(lm, task)
    adapter = tuned(lm, task, out)
    residual = chosen["residual-steered"][1]
    conditions: dict[str, Any] = {
        "plain": [],
        "told to show steps": [instruction("steps")],
        "few-shot steps": [few_shot("steps", 3)],
        "few-shot long": [few_shot("long", 3)],
        "residual-steered": [residual],
        "KV-steered": [chosen["KV-steered"][1]],
        "random": [random_like(residual)],
        "tuned": [adapter],
        "tuned + steered": [adapter, residual],
    }
    main = evaluate(lm, task, conditions, n=n, max_new_tokens=TOKENS, out=out / "rows")
    others = {
        family: evaluate(
            lm, load_task(family), {"plain": [], "tuned": [adapter]}, n=min(n, FEWER), max_new_tokens=TOKENS
        )
        for family in FAMILIES[1:]
    }
    training = json.loads((adapter.path / "training.json").read_text())
    return {
        "n": n,
        "table": rows_of(main),
        "comparisons": main.comparisons("plain").to_dict("records"),
        "chosen": {name: labels for name, (labels, _) in chosen.items()},
        "tuning": {"records": training["records"]["used"], "seconds": training.get("seconds")},
        "families": [{"task": family, **asdict(found.compare("plain", "tuned"))} for family, found in others.items()],
        "family_tables": {family: rows_of(found) for family, found in others.items()},
    }


def rows_of(results: Results) -> list[dict[str, Any]]:
    """A results table without what the machine decides."""
    table = results.table().drop(columns=["seconds", "peak_memory_mb"])
    return json.loads(table.to_json(orient="records"))


def write_card(folder: Path, measured: dict[str, Any]) -> None:
    """Put the measurements into card.json and README.md beside the weights."""
    card = json.loads((folder / "card.json").read_text())
    card |= {"sha256": sha256(folder / "model.safetensors"), "measured": measured}
    write_atomic(folder / "card.json", json.dumps(card, indent=2) + "\n")
    write_atomic(folder / "README.md", readme(card))


def readme(card: dict[str, Any]) -> str:
    """The model card as Markdown, for people."""
    measured, training, recipe = card["measured"], card["training"], card["recipe"]
    shown = ("condition", "n", "accuracy", "low", "high", "steps", "steps_low", "steps_high", "tokens_in", "tokens_out")
    table = [{name: row[name] for name in shown} for row in measured["table"]]
    kept = ("b", "difference", "low", "high", "p_value", "p_holm", "n")
    differences = [{name: row[name] for name in kept} for row in measured["comparisons"]]
    families = [
        {"task": family, **{name: row[name] for name in shown}}
        for family, rows in measured["family_tables"].items()
        for row in rows
    ]
    parts = [
        TEXT.format(
            **{**recipe, **training},
            name=card["name"],
            digest=card["sha256"],
            chosen=measured["chosen"],
        ),
        f"## Word problems: {measured['n']} test questions, greedy\n\n```\n{format_table(table)}\n```",
        f"Against plain, paired (exact McNemar, Holm):\n\n```\n{format_table(differences)}\n```",
        f"## The other families, plain and tuned on word problems\n\n```\n{format_table(families)}\n```",
    ]
    return "\n\n".join(parts) + "\n"


TEXT = """---
license: apache-2.0
language: [en, es]
tags: [model-organism]
---

# {name}: a designed model organism

A Llama of {layers} layers, width {hidden}, {heads} heads and {key_value_heads} key-value heads, trained from scratch on
text that this project generates (`workbench/lab`): {tokens:,} tokens, {steps:,} steps, {seconds:,} s
({machine}). Weights are float16; sha256 `{digest}`.

**What it is for.** To show, offline and in seconds, effects that are otherwise tried on large models: context reveals
a hidden trait (style, tone, language), a steering vector or a cache edit sets it, an adapter makes it permanent.

**What was designed in.** (1) Documents carry traits that all their answers share: style (direct 55 %, steps 25 %, long
20 %), tone (neutral 85 %, cheerful 15 %) and language of the closing sentence (English 85 %, Spanish 15 %). Without a
cue the commonest is the likeliest. (2) In half of the training documents only the assistant header `<|assistant|>` may
attend to earlier exchanges; every other token sees its own exchange. That makes the header carry the traits, and is why
steering its cache entry works here. Finding that here says nothing about models that were not built so.

**What it cannot show.** World knowledge, natural language beyond its templates, anything about scale. Its vocabulary is
a few hundred tokens; text outside its world is spelled in bytes and not understood.

Chosen on the tuning split: {chosen}"""


def main() -> None:
    """Command line: which model, how many test questions, where to keep the work."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", choices=["lab", "lab-small"], default="lab")
    parser.add_argument("--n", type=int, default=500, help="test questions a condition")
    parser.add_argument("--out", type=Path, default=Path("outputs/card"), help="folder for records, adapter and rows")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    write_card(DATA / options.name, measure(options.name, options.n, options.out / options.name))
    print((DATA / options.name / "README.md").read_text())


if __name__ == "__main__":
    main()
