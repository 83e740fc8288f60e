"""`make bench`: how many times faster the workbench is than other code that does the same work, with equal results.

Parts, on the lab model (or `--model`): generation, a grid of strengths and layers, evaluation of several conditions,
extraction beside other libraries (installed by `make outside`), what steering costs a token, GSM8K through all data
steps, how near predictions before a fine-tune come, scores by likelihood beside
lm-evaluation-harness (where it is installed); what a person at the playground waits for, in a browser; and, on a GPU,
steered decoding with a static cache and training steps on models of real shapes.
"""

import argparse
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

import workbench as wb
from bench import extraction, finetuning, generation, likelihood, playground, static, steering, synthesis, training
from workbench.report.tables import format_table

Lines = list[dict[str, Any]]
PARTS = (
    "generation", "grid", "evaluation", "extraction", "steering", "synthesis", "finetuning", "likelihood", "static",
    "training", "playground",
)  # fmt: skip


def machine() -> str:
    """Processor and cores, and the GPU where there is one."""
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    processor = names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{len(names) or '?'} x {processor}{gpu}"


def main(arguments: Iterable[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="lab")
    parser.add_argument("--task", default="word-problems")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--n", type=int, default=64, help="prompts")
    parser.add_argument("--pairs", type=int, default=500, help="pairs to extract from")
    parser.add_argument("--limit", type=int, default=120, help="new tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(None if arguments is None else list(arguments))
    torch.set_num_threads(options.threads)
    lm, task = wb.load_model(options.model), wb.load_task(options.task)
    print(f"{machine()}; {options.threads} torch threads, model on {lm.device}")
    print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, {lm.name} {lm.revision}, {lm.model.dtype}"
    )
    lm.generate([task.messages(task.rows("tuning", n=1)[0])], max_new_tokens=2)  # first calls are slower
    n, limit, repeats = options.n, options.limit, options.repeats
    parts: dict[str, Callable[[], Lines]] = {
        "generation": lambda: generation.generation(lm, task, n, limit, repeats),
        "grid": lambda: generation.cells(lm, task, n, limit, repeats),
        "evaluation": lambda: generation.evaluation(lm, task, n, limit, repeats),
        "extraction": lambda: extraction.lines(lm, task, options.pairs, max(1, repeats // 3)),  # minutes each
        "steering": lambda: steering.lines(lm, task, n, repeats),
        "synthesis": lambda: synthesis.lines(lm),
        "finetuning": lambda: finetuning.lines(task),
        "likelihood": lambda: likelihood.lines(lm, repeats),
        "static": lambda: static.lines(lm.tokenizer),
        "playground": playground.lines,
        "training": lambda: training.lines(lm.tokenizer),  # more models and settings: python -m bench.training
    }
    for name in PARTS:
        if name in ("static", "training") and not torch.cuda.is_available():
            print(f"\n{name}: left out, it needs a GPU")
        elif name == "likelihood" and name in options.only and (why := likelihood.missing()):
            print(f"\n{name}: left out, {why}")
        elif name in options.only:
            print(f"\n{name}\n{format_table(parts[name]())}", flush=True)


if __name__ == "__main__":
    main()
