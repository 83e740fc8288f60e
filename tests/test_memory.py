"""Memory of a fine-tune: what is predicted against what a real model keeps and a real process grows by."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.test_finetune import RECORDS
from workbench.finetuning.memory import count_activations, linear_layers, plan
from workbench.finetuning.packing import encode_all
from workbench.models import LM, load_model

CHILD = """
import sys
import workbench as wb
lm, task = wb.load_model("lab"), wb.load_task("word-problems")
records = [
    {"messages": [*task.messages(row), {"role": "assistant", "content": row["solutions"]["steps"]}]}
    for row in task.rows("train", n=48, seed=0)
]
wb.finetune(
    lm, records, sys.argv[1], packing=False, batch_size=16, epochs=1, quantization="none", checkpointing=False,
    memory=500_000_000,
)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told to give freed memory back at once")
def test_a_run_grows_by_what_was_predicted(tmp_path: Path) -> None:
    out = tmp_path / "out"  # the run needs more than a third of what it may use, so freed memory goes back at once
    subprocess.run([sys.executable, "-c", CHILD, str(out)], check=True, capture_output=True)
    report = json.loads((out / "training.json").read_text())
    assert report["measured"]["bytes"] == pytest.approx(report["estimate"]["bytes"], rel=0.3)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_what_a_padded_batch_keeps_is_counted(tiny: Any, architecture: str) -> None:
    lm = load_model(tiny(architecture))
    chosen, _ = linear_layers(lm.model, "all-linear")
    rank, rows, length = 4, 3, 90
    counted = count_activations(lm.model, chosen).bytes(rows * length, length, False)
    lora = LoraConfig(
        r=rank, target_modules="all-linear", task_type="CAUSAL_LM", fan_in_fan_out=architecture == "gpt2"
    )  # fmt: skip
    model = get_peft_model(lm.model, lora).train()  # GPT-2 has dropout, whose masks are kept too
    own = {weight.untyped_storage().data_ptr() for weight in (*model.parameters(), *model.buffers())}
    seen: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    mask = torch.ones(rows, length, dtype=torch.long)
    mask[1, 60:] = 0
    ids = torch.arange(rows * length).reshape(rows, length) % 50
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.base_model.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert output.last_hidden_state.requires_grad
    real = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
    assert counted + 4 * rank * len(chosen) * rows * length == pytest.approx(real, rel=0.1)


@pytest.mark.parametrize("packed", [256, None])
def test_checkpointing_runs_every_block_a_second_time(tiny: Any, tmp_path: Path, packed: int | None) -> None:
    from workbench.finetuning import trainer as training

    lm: LM = load_model(tiny("llama"))
    examples, _ = encode_all(lm, RECORDS, "here", 100)
    runs = {}
    for checkpointing in (False, True):
        calls = []
        with training.own_random_state(lm.device), training.quiet_libraries():
            trainer = training.make_trainer(
                load_model(lm.name).model, lm.tokenizer, examples, LoraConfig(r=4, target_modules="all-linear"),
                checkpoints=tmp_path / str(checkpointing) / "checkpoints", packed_length=packed, batch_size=8,
                accumulation=1, epochs=1, learning_rate=1e-3, warmup=0, checkpointing=checkpointing, save_steps=100,
                seed=0,
            )  # fmt: skip
            for module in trainer.model.modules():
                if type(module).__name__ == "LlamaMLP":  # hooks of a block itself are outside of what runs again
                    module.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        runs[checkpointing] = len(calls), losses
    steps = len(runs[False][1])
    blocks = lm.model.config.num_hidden_layers
    assert steps > 1 and runs[False][0] == blocks * steps and runs[True][0] == 2 * blocks * steps
    assert runs[True][1] == runs[False][1]


def test_a_plan_is_tight_where_it_takes_a_large_share(tiny: Any) -> None:
    lm = load_model(tiny("llama"))
    need = plan(lm.model, 4, "all-linear", 256, "none", free=10**12).bytes_needed
    assert plan(lm.model, 4, "all-linear", 256, "none", free=2 * need).tight
    assert not plan(lm.model, 4, "all-linear", 256, "none", free=4 * need).tight
