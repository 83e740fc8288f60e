"""The real training path on packed rows: the same logits, gradients and steps as the records alone.

Everything goes through `make_trainer`, TRL's collator and its `compute_loss`; the other side is the record alone, the
padded batch, one large batch, or the run that nobody stopped.
"""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback

from tests.tiny import FAMILIES, make_tiny, tiny_config, tiny_tokenizer
from workbench.files import sha256
from workbench.finetuning import _packing, callbacks, finetune
from workbench.finetuning import trainer as training
from workbench.finetuning.packing import IGNORED, Example, encode_all, leak
from workbench.models import LM, load_model

# These let packed records read each other although no mask is passed; the guard has to turn packing off for them.
LEAKING = ("falcon", "opt", "qwen3_next")
FAMILIES_THAT_PACK = tuple(family for family in FAMILIES if family not in LEAKING)
# transformers' own refusals: a soft cap on attention scores, or attention code that knows no such kernel
REFUSED = {("gemma2", "sdpa"), ("gpt2", "flex_attention"), ("stablelm", "flex_attention")}
# PEFT on models with experts: its patterns for fused expert weights match none of the layers that are chosen
pytestmark = [
    pytest.mark.filterwarnings("ignore:target_parameters=.* were set but no parameter was matched:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]
SUMS = [(a, b) for a in range(2, 5) for b in range(2, 4)]


def record(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


# answers of very different lengths: a mean of means is then another number than the mean over tokens
RECORDS = [record(f"{a}+{b}?", f"The answer is {a + b}{'!' * 4 * ((a + b) % 4)}") for a, b in SUMS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny(family, tmp_path_factory.mktemp(family))
            # The load-balancing loss of experts is a product of two means over a batch, so it is another number for
            # every way to cut batches, packed or not; and the tiny Qwen 3 Next has its coefficient but no experts.
            file = made[family] / "config.json"
            config = json.loads(file.read_text())
            file.write_text(json.dumps({**config, **{key: 0.0 for key in config if key == "router_aux_loss_coef"}}))
        return made[family]

    return folder


def examples_of(lm: LM, records: list[dict[str, Any]] = RECORDS) -> list[Example]:
    return encode_all(lm, records, "here", 200)[0]


def make(lm: LM, out: Path, *, packed: int | None, batch: int = 1, accumulation: int = 1, epochs: int = 1) -> Any:
    """The trainer that `finetune` makes, its adapter moved off zero so that every part of it has a gradient."""
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with training.quiet_libraries():
        trainer = training.make_trainer(
            lm.model, lm.tokenizer, examples_of(lm), lora,
            checkpoints=out / "checkpoints", packed_length=packed, batch_size=batch, accumulation=accumulation,
            epochs=epochs, learning_rate=1e-3, warmup=0, checkpointing=False, save_steps=1000, seed=0,
        )  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05, generator=generator)
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):  # GPT-2's own, 0.1: each call would draw another mask
            module.p = 0.0
    return trainer


def batches_of(trainer: Any, size: int) -> list[dict[str, torch.Tensor]]:
    rows = [trainer.train_dataset[i] for i in range(len(trainer.train_dataset))]
    return [trainer.data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]


def gradients(trainer: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step over all batches, as `train()` would ask for them: a mean over learnt tokens."""
    trainer.model.train()
    trainer.model.zero_grad()
    count = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)
    losses = [trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count) for batch in batches]
    for loss in losses:
        loss.backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return float(sum(loss.detach() for loss in losses)), found


def largest_difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Of all tensors, relative to the tensor's own norm."""
    assert found.keys() == wanted.keys() and len(wanted) > 0
    assert all(tensor.norm() > 0 for tensor in wanted.values())
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def inputs_of(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "labels"}


def each_alone(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a packed row's records, each run by itself."""
    starts = batch["cu_seq_lens_q"].tolist()
    assert len(starts) > 2, "one record in the row: nothing to compare"
    rows = [batch["input_ids"][:, a:b] for a, b in pairwise(starts)]
    return torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in rows])


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES_THAT_PACK)
def test_packed_logits_and_gradients_are_those_of_the_records_alone(
    family: str, kernel: str, folders: Any, tmp_path: Path
) -> None:
    if (family, kernel) in REFUSED:
        pytest.skip("transformers has no such kernel for it; test_refusals_are_those_listed checks that it says so")
    steps = []
    for packed in (100, None):
        lm = load_model(folders(family))
        lm.model.set_attn_implementation(kernel)
        trainer = make(lm, tmp_path, packed=packed, batch=len(RECORDS))
        batches = batches_of(trainer, 1 if packed else len(RECORDS))
        assert ("attention_mask" in batches[0]) == (packed is None)
        steps.append(gradients(trainer, batches))
        if packed:
            assert len(batches) > 1
            check_logits(trainer.model.eval(), batches[0])
            assert leak(lm.model, examples_of(lm)) == 0
    (loss, found), (alone_loss, wanted) = steps
    assert loss == pytest.approx(alone_loss, rel=1e-5)
    assert largest_difference(found, wanted) < 1e-5


@torch.no_grad()
def check_logits(model: Any, batch: dict[str, Any]) -> None:
    """Equal without a mask, plainly different with a mask of ones: the silent fault that packing can have."""
    alone = each_alone(model, batch)
    together = model(**inputs_of(batch), use_cache=False).logits[0]
    assert (together - alone).abs().max() < 1e-5 * alone.abs().max().clamp(min=1)
    masked = model(**inputs_of(batch), attention_mask=torch.ones_like(batch["input_ids"]), use_cache=False).logits[0]
    assert (masked - alone).abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("family", [f for f in FAMILIES_THAT_PACK if (f, "flex_attention") not in REFUSED])
def test_flex_attention_packs_the_same_and_has_no_backward_on_a_cpu(family: str, folders: Any, tmp_path: Path) -> None:
    lm = load_model(folders(family))
    batch = batches_of(make(lm, tmp_path, packed=100), 1)[0]
    lm.model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):  # its compilation takes a minute and changes no number
        check_logits(lm.model.eval(), batch)
        if not torch.cuda.is_available():
            with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
                lm.model(**inputs_of(batch), use_cache=False)


@pytest.mark.parametrize(("family", "kernel"), sorted(REFUSED))
def test_refusals_are_those_listed(family: str, kernel: str, folders: Any) -> None:
    with pytest.raises(ValueError, match="does not support an attention implementation"):
        load_model(folders(family)).model.set_attn_implementation(kernel)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_guard_of_a_training_reports_a_mask_of_ones(
    family: str, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_model(folders(family))
    packed, why = _packing(lm.model, examples_of(lm), SimpleNamespace(packing=True, method="lora"))
    assert packed and "differ by 0" in why
    forward = lm.model.forward

    def with_ones(inputs_embeds: torch.Tensor, **arguments: Any) -> Any:
        return forward(inputs_embeds=inputs_embeds, attention_mask=torch.ones(inputs_embeds.shape[:2]), **arguments)

    monkeypatch.setattr(lm.model, "forward", with_ones)
    assert leak(lm.model, examples_of(lm)) > 0.01
    packed, why = _packing(lm.model, examples_of(lm), SimpleNamespace(packing=True, method="lora"))
    assert not packed and "lets packed records see each other" in why


@pytest.mark.parametrize("family", LEAKING)
def test_models_that_leak_are_trained_unpacked(family: str, folders: Any, tmp_path: Path) -> None:
    lm = load_model(folders(family))
    assert leak(lm.model, examples_of(lm)) > 0.01
    finetune(lm, RECORDS, tmp_path / "a", rank=4, epochs=1, batch_size=3, quantization="none", learning_rate=1e-3)
    report = json.loads((tmp_path / "a" / "training.json").read_text())
    assert report["reasons"]["packing"].startswith("off: this model lets packed records see each other")
    assert report["steps"] == len(RECORDS) // 3


def test_the_guard_sees_a_recurrent_state() -> None:
    """Mamba 2 has no attention that a mask could block; `load_model` refuses it, the guard has to see it too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("mamba2", len(tiny_tokenizer()))).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
    examples = [Example(list(range(5, 25)), []), Example(list(range(30, 60)), [])]
    assert leak(model, examples) > 0.01


class Gradients(TrainerCallback):
    """The gradients (after clipping) of every step of a run."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        self.steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})


def trained(trainer: Any) -> tuple[list[dict[str, torch.Tensor]], list[float]]:
    seen = Gradients()
    trainer.add_callback(seen)
    trainer.train()
    return seen.steps, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_accumulated_micro_batches_are_one_large_batch(folders: Any, tmp_path: Path) -> None:
    runs = []
    for batch, accumulation in ((6, 1), (2, 3), (1, 6)):
        trainer = make(
            load_model(folders("llama")), tmp_path, packed=None, batch=batch, accumulation=accumulation, epochs=3
        )
        runs.append(trained(trainer))
    (wanted, losses), *others = runs
    assert len(wanted) == 3
    for found, found_losses in others:
        assert largest_difference(found[0], wanted[0]) < 1e-5
        assert found_losses == pytest.approx(losses, rel=1e-5)
        # later steps start from weights that rounding in Adam (its first step is the sign of the gradient) has moved
        assert max(map(largest_difference, found, wanted)) < 1e-3


def test_accumulated_packed_rows_are_one_flattened_batch(folders: Any, tmp_path: Path) -> None:
    trainer = make(load_model(folders("llama")), tmp_path, packed=100, accumulation=4)
    rows = batches_of(trainer, 1)
    assert 2 <= len(rows) <= 4
    counts = [int((row["labels"] != IGNORED).sum()) for row in rows]
    assert len(set(counts)) > 1, "rows that learn equally many tokens can't tell a mean of means from the mean"
    loss, wanted = gradients(trainer, batches_of(trainer, len(rows)))
    means = [gradients(trainer, [row])[0] for row in rows]
    assert abs(sum(means) / len(means) - loss) > 1e-4 * loss
    summed, _ = gradients(trainer, rows)
    norm = torch.cat([gradient.flatten() for gradient in wanted.values()]).norm()
    trainer.model.zero_grad()
    steps, losses = trained(trainer)
    assert losses == pytest.approx([loss], rel=1e-5) and summed == pytest.approx(loss, rel=1e-5)
    clipped = {name: gradient / norm.clamp(min=1.0) for name, gradient in wanted.items()}
    assert largest_difference(steps[0], clipped) < 1e-5


def test_resuming_in_the_middle_of_an_epoch_with_accumulation(
    folders: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = load_model(folders("llama"))
    records = [record(f"{a}+{b}?", f"The answer is {a + b}.") for a in range(2, 12) for b in range(2, 10)]
    options = {
        "rank": 4, "epochs": 2, "batch_tokens": 1024, "quantization": "none", "learning_rate": 5e-3, "dropout": 0.1,
        "save_steps": 2,
    }  # fmt: skip
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    with monkeypatch.context() as patched:

        def stop(_: str, step: int, *__: Any, **___: Any) -> None:
            if step == 3:
                raise KeyboardInterrupt

        patched.setattr(callbacks, "heartbeat", stop)
        with pytest.raises(KeyboardInterrupt):
            finetune(lm, records, killed, **options)
    for out in (killed, straight):
        finetune(lm, records, out, **options)
    report, whole = (json.loads((out / "training.json").read_text()) for out in (killed, straight))
    assert report["resumed_from_step"] == 2 and report["steps"] == whole["steps"] == 6  # three a pass over the records
    assert report["tokens"] == whole["tokens"]
    for name in ("adapter_model.safetensors", "losses.jsonl"):
        assert sha256(killed / name) == sha256(straight / name), name
