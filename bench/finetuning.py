"""How near the predictions before a fine-tune come: peak memory and seconds, of six runs that differ in what dominates.

Each run has a process of its own, so that none finds the memory of another. Random Llamas have the lab's tokenizer and
a larger vocabulary that it doesn't use; records are the lab task's own solutions. Each is run twice: once for an epoch
with glibc giving freed memory back at once, as `finetune` does where memory is short, and once as it is left alone,
for the seconds and for the memory that it then holds in all ("kept").
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import workbench as wb
from workbench.finetuning.memory import KEPT
from workbench.tasks import Task

# about 25 and 80 million parameters
SHAPES = {
    "25M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "vocab_size": 8192},
    "80M": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 8, "vocab_size": 32768},
}
# name: model, dtype, records, settings
RUNS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "lab 4M, fp32, packed": ("lab", "float32", 240, {}),
    "lab 4M, NF4, 16 padded records": ("lab", "float32", 240, {"quantization": "nf4", "packing": False}),
    "25M, fp32, checkpointing, 32 padded records": (
        "25M", "float32", 96, {"checkpointing": True, "packing": False, "batch_size": 32},
    ),
    "25M, bf16, packed, rank 64": ("25M", "bfloat16", 24, {"rank": 64}),
    "80M, fp32, packed": ("80M", "float32", 24, {}),
    "80M, NF4, packed, checkpointing": ("80M", "float32", 24, {"quantization": "nf4", "checkpointing": True}),
}  # fmt: skip

# what `growth` asks of glibc where memory is tight, in the words of glibc's own environment
RETURNED = {"MALLOC_MMAP_THRESHOLD_": str(KEPT), "MALLOC_TRIM_THRESHOLD_": str(2 * KEPT)}


def lines(task: Task, names: tuple[str, ...] = tuple(RUNS)) -> list[dict[str, Any]]:
    """Table rows: predicted and measured, and the error of the prediction as a share of what was measured."""
    found = []
    with TemporaryDirectory() as folder:
        home = Path(folder)
        for shape in SHAPES:
            if any(RUNS[name][0] == shape for name in names):
                _make(shape, home / shape)
        for name in names:
            tight, report = _run(task, name, home, RETURNED), _run(task, name, home, {})
            guess, truth = report["estimate"], {**report["measured"], "bytes": tight["measured"]["bytes"]}
            row: dict[str, Any] = {"run": name, "steps": report["steps"]}
            for what, unit, scale in (("bytes", "MB", 1e6), ("seconds", "s", 1)):
                row |= {f"predicted, {unit}": guess[what] / scale, f"measured, {unit}": truth[what] / scale}
                row[f"error, {unit}"] = f"{guess[what] / truth[what] - 1:+.0%}"
            row["kept, MB"] = report["measured"]["bytes"] / 1e6
            found.append(row | {"MFU": report["speed"]["mfu"]})
    return found


def _make(shape: str, folder: Path) -> None:
    """A random Llama with the lab's tokenizer."""
    lab = wb.load_model("lab")
    ends = {
        "bos_token_id": None,
        "eos_token_id": lab.tokenizer.eos_token_id,
        "pad_token_id": lab.tokenizer.pad_token_id,
    }
    config = LlamaConfig(
        **SHAPES[shape], **ends, num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048,
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    lab.tokenizer.save_pretrained(folder)


def _run(task: Task, name: str, home: Path, more: dict[str, str]) -> dict[str, Any]:
    """What training.json says of one run, made by a fresh process with `more` in its environment."""
    out = home / ("returned" if more else "kept") / name.replace(" ", "-")
    command = [sys.executable, "-m", "bench.finetuning", name, task.name, str(home), str(out), "1" if more else "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **more}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    found: dict[str, Any] = json.loads((out / "training.json").read_text(encoding="utf-8"))
    return found


def _child(name: str, task_name: str, home: str, out: str, epochs: str) -> None:
    model, dtype, n, settings = RUNS[name]
    folder = Path(home) / model
    lm = wb.load_model(folder if folder.is_dir() else model, dtype=dtype)
    task = wb.load_task(task_name)
    rows = task.rows("train", n=n, seed=0)
    records = [
        {"messages": [*task.messages(row), {"role": "assistant", "content": row["solutions"]["steps"]}]} for row in rows
    ]
    always = {"quantization": "none", "checkpointing": False, "save_steps": 10, "epochs": int(epochs)}
    wb.finetune(lm, records, out, **{**always, **settings})


if __name__ == "__main__":
    _child(*sys.argv[1:])
