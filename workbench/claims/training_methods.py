"""Do preferences and rewards add to supervised training on a small model? The same start, the same number of answers.

Every seed trains a start on few of the model's own verified answers, then samples once from it for the arms that learn
from fixed answers; the arms that sample as they go get as many answers. All go on from the start (rejection
fine-tuning, arXiv 2308.01825, trains anew on all right answers). Learning rates were tried on the tuning split with one
seed only, n = 150: DPO 1e-3 (ruins the model), 2e-4, 5e-5; length-normalised DPO and KTO 2e-4, 5e-5; SFT on the chosen
2e-4; GRPO 1e-3, 3e-4. Other arms take these.
Not covered: other models and tasks, and the spread over training seeds, of which there are few.

    python -m workbench.claims.training_methods --seeds 0 1 2 --minutes 8

makes missing cells (one arm, one seed), a JSON file each, stops after so many minutes, and prints the table.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench import evaluate, few_shot, finetune, load_model, load_task, synthesize
from workbench.files import content_key, write_atomic
from workbench.finetuning.pairs import preference_pairs
from workbench.finetuning.preference import prefer
from workbench.finetuning.reward import reinforce
from workbench.interventions.adapter import Adapter
from workbench.models import LM
from workbench.statistics import bootstrap_mean, holm, paired_difference, wilson
from workbench.synthesis.records import Data, load_data
from workbench.tasks import Task

QUESTIONS, ANSWERS = 160, 8  # a seed: 1280 sampled answers, and as many for the arms that sample as they go
START, FEWER = "start (SFT)", 220  # questions asked for the start's own answers
PAIRS: dict[str, Any] = {"epochs": 2, "batch_size": 8, "learning_rate": 5e-5}
STEPS: dict[str, Any] = {"steps": 20, "questions": 8, "answers": ANSWERS, "learning_rate": 3e-4, "max_new_tokens": 160}
ARMS: dict[str, dict[str, Any]] = {
    START: {"how": "start"},
    "RFT, all right answers": {"how": "finetune"},
    "SFT on the chosen": {"how": "prefer", "method": "sft", **PAIRS, "learning_rate": 2e-4},
    "DPO": {"how": "prefer", "method": "dpo", **PAIRS},
    "DPO, length-normalised": {"how": "prefer", "method": "dpo-norm", **PAIRS},
    "DPO + SFT": {"how": "prefer", "method": "dpo-sft", **PAIRS},
    "KTO": {"how": "prefer", "method": "kto", **PAIRS},
    "GRPO": {"how": "reinforce", "method": "grpo", **STEPS},
    "Dr. GRPO": {"how": "reinforce", "method": "dr-grpo", **STEPS},
    "GRPO, short is better": {"how": "reinforce", "method": "grpo", "reward": "short", **STEPS},
    "GRPO, top 20% entropy": {"how": "reinforce", "method": "grpo", "top_entropy": 0.2, **STEPS},
}


@dataclass(frozen=True)
class Study:
    """What all cells share: where they lie, and which questions they are judged on."""

    lm: LM
    task: Task
    out: Path
    split: str
    n: int


def start_of(study: Study, seed: int) -> Adapter:
    """The common start: a few of the model's own verified answers, elicited by examples, learnt without them."""
    folder = study.out / f"seed-{seed}"
    data = synthesize(
        study.lm, study.task, "rejection", FEWER, seed, out=folder / "own", strategy=few_shot("steps", 3), samples=1
    )
    adapter = finetune(study.lm, data, folder / "start", epochs=4, quantization="none", seed=seed)
    assert isinstance(adapter, Adapter)  # only method="full" leaves a folder
    return adapter


def sampled(study: Study, start: Adapter, seed: int) -> Data:
    """Answers of the start to other questions, right and wrong; the CPU seconds that they took are kept beside them."""
    out, begin = study.out / f"seed-{seed}" / "sampled", time.process_time()
    fresh = not (out / "card.json").exists()
    with study.lm.apply(start):
        data = synthesize(
            study.lm, study.task, "rejection", QUESTIONS, 1000 + seed, out=out, samples=ANSWERS, temperature=1.0,
            chains=ANSWERS, negatives=ANSWERS, select="first",
        )  # fmt: skip
    if fresh:
        write_atomic(out / "cpu_seconds.json", json.dumps(time.process_time() - begin))
    return data


def trained(study: Study, arm: dict[str, Any], seed: int, folder: Path) -> tuple[Adapter, dict[str, float]]:
    """The arm's adapter and what it took besides the start: CPU seconds (a resumed run's last process) and tokens."""
    settings = {name: value for name, value in arm.items() if name != "how"}
    start = start_of(study, seed)
    if arm["how"] == "start":
        return start, {"cpu_seconds": 0.0, "sampled_tokens": 0}
    common: dict[str, Any] = {"quantization": "none", "seed": seed, **settings}
    if arm["how"] == "reinforce":
        begin = time.process_time()
        adapter = reinforce(study.lm, study.task, folder, start=start, **common | {"seed": 1000 + seed})
        lines = (folder / "losses.jsonl").read_text(encoding="utf-8").splitlines()
        tokens = sum(json.loads(line)["sampled_tokens"] for line in lines)
        return adapter, {"cpu_seconds": time.process_time() - begin, "sampled_tokens": tokens}
    data = sampled(study, start, seed)
    begin = time.process_time()
    if arm["how"] == "finetune":
        right = [one for one in data.records if one["kept"] or one["reason"].startswith("repeats record")]
        own = load_data(study.out / f"seed-{seed}" / "own").kept
        made = finetune(study.lm, [*own, *[one | {"kept": True} for one in right]], folder, **common)
        assert isinstance(made, Adapter)  # only method="full" leaves a folder
        adapter = made
    else:
        adapter = prefer(study.lm, preference_pairs(data, per_question=2), folder, start=start, **common)
    before = json.loads((data.folder / "cpu_seconds.json").read_text(encoding="utf-8"))
    tokens = data.card["cost"]["tokens_out"]
    return adapter, {"cpu_seconds": before + time.process_time() - begin, "sampled_tokens": tokens}


def cell(study: Study, name: str, arm: dict[str, Any], seed: int) -> dict[str, Any]:
    """One arm with one seed, read from its file or made: right or wrong and tokens of every question, and the cost."""
    key = content_key(arm=arm, seed=seed, split=study.split, n=study.n)[:12]
    file = study.out / "cells" / f"{key}.json"
    asked = {"model": study.lm.revision, "task": study.task.name}
    if file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))
        if other := {name: known[name] for name in asked if known.get(name, asked[name]) != asked[name]}:
            raise ValueError(f"{file} was made with {other}, and {asked} is asked for. Choose another --out folder.")
        return known
    folder = study.out / f"seed-{seed}" / f"{arm['how']}-{content_key(arm=arm)[:12]}"
    spent = folder / "cost.json"  # an adapter that was trained for another split cost what it cost then
    adapter, cost = trained(study, arm, seed, folder)
    if spent.exists():
        cost = json.loads(spent.read_text(encoding="utf-8"))
    write_atomic(spent, json.dumps(cost))
    rows = evaluate(study.lm, study.task, {name: [adapter]}, n=study.n, seed=seed, split=study.split).rows
    made = {"arm": name, "settings": arm, "seed": seed, "split": study.split, "n": study.n, **asked, **cost}
    made["rows"] = [
        {"id": one, "correct": bool(right), "tokens": int(tokens)}
        for one, right, tokens in zip(rows.id, rows.correct, rows.tokens_out, strict=True)
    ]
    write_atomic(file, json.dumps(made))
    return made


def table(cells: Sequence[dict[str, Any]], against: Sequence[str] = (START, "SFT on the chosen")) -> str:
    """Markdown: share right (Wilson), paired differences pooled over seeds (questions are the unit), tokens, cost.

    The pooled intervals are about questions: that other training seeds could give other numbers, they do not know. So
    the differences of each seed stand beside them. p_holm: exact McNemar or sign flips, Holm over the column.
    """
    arms: dict[str, dict[int, dict[str, Any]]] = {}
    for one in cells:
        arms.setdefault(one["arm"], {})[one["seed"]] = one
    columns = [f"minus {other}: pooled; each seed; p_holm" for other in against if other in arms]
    names = ["arm", "right", "tokens an answer", *columns, "CPU s", "sampled tokens"]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    compared = {other: _differences(arms, other) for other in against if other in arms}
    for name, seeds in arms.items():
        rows = [row for one in seeds.values() for row in one["rows"]]
        share = wilson(sum(row["correct"] for row in rows), len(rows))
        length = bootstrap_mean([float(row["tokens"]) for row in rows])
        cost = [sum(one[what] for one in seeds.values()) / len(seeds) for what in ("cpu_seconds", "sampled_tokens")]
        parts = [name, f"{share} of {len(rows)}", f"{length.estimate:.0f} [{length.low:.0f}, {length.high:.0f}]"]
        parts += [compared[other].get(name, "") for other in compared]
        lines.append(f"| {' | '.join([*parts, f'{cost[0]:.0f}', f'{cost[1]:,.0f}'])} |")
    return "\n".join(lines)


def _differences(arms: dict[str, dict[int, dict[str, Any]]], other: str) -> dict[str, str]:
    """Each arm minus `other` on the same questions of the same seeds."""
    found = {}
    for name, seeds in arms.items():
        both = [seed for seed in seeds if seed in arms[other] and name != other]
        if not both:
            continue
        pairs = {
            seed: [
                (a["correct"], b["correct"], a["id"])
                for a, b in zip(arms[other][seed]["rows"], seeds[seed]["rows"], strict=True)
                if a["id"] == b["id"]
            ]
            for seed in both
        }
        every = [pair for seed in both for pair in pairs[seed]]
        alone = len({pair[2] for pair in every}) == len(every)
        pooled = paired_difference(
            [a for a, _, _ in every], [b for _, b, _ in every], clusters=None if alone else [c for _, _, c in every]
        )
        each = [sum(b - a for a, b, _ in pairs[seed]) / len(pairs[seed]) for seed in both]
        found[name] = (pooled, each)
    corrected = holm([pooled.p_value for pooled, _ in found.values()]) if found else []
    return {
        name: f"{pooled.difference:+.3f} [{pooled.low:+.3f}, {pooled.high:+.3f}]; "
        f"{' '.join(f'{value:+.3f}' for value in each)}; {p:.2g}"
        for (name, (pooled, each)), p in zip(found.items(), corrected, strict=True)
    }


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the cells that are missing, then print the table of those that are there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/training-methods"))
    parser.add_argument("--model", default="lab")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", default="test")
    parser.add_argument("--n", type=int, default=200, help="questions a seed")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no new cell after so many")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="NAME=VALUE", help="other settings of the arms, to tune"
    )
    chosen = parser.parse_args(arguments)
    begin, changes = time.monotonic(), {name: _value(text) for name, text in (one.split("=") for one in chosen.set)}
    study = Study(load_model(chosen.model), load_task("word-problems"), chosen.out, chosen.split, chosen.n)
    cells, left = [], 0
    for seed in chosen.seeds:
        for name in chosen.arms:
            arm = ARMS[name] | (changes if name != START else {})
            if time.monotonic() - begin < 60 * chosen.minutes:
                cells.append(cell(study, name, arm, seed))
            else:
                left += 1
    print(table(cells))
    if left:
        print(f"\n{left} cells were left for another start of the same command.")


if __name__ == "__main__":
    main()
