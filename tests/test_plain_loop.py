"""The trainer (TRL, accelerate, fused loss) against a plain loop: same rows, same losses, same adapter."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from workbench.finetuning import trainer as training
from workbench.finetuning.packing import Example, encode_all
from workbench.finetuning.plain_loop import Trained, pack, train
from workbench.models import LM, load_model
from workbench.tasks import Task


def record(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


RECORDS = [record(f"{a}+{b}?", f"The answer is {a + b}{'!' * ((a * b) % 5)}") for a in range(2, 9) for b in range(2, 6)]


def by_trl(
    lm: LM, examples: list[Example], out: Path, *, row: int, accumulation: int, epochs: int, rank: int, rate: float
) -> Any:
    """A trainer as `finetune` makes it, after its training."""
    lora = LoraConfig(
        r=rank, lora_alpha=2 * rank, bias="none", target_modules="all-linear", task_type="CAUSAL_LM"
    )  # fmt: skip
    with training.own_random_state(lm.device), training.quiet_libraries():
        trainer = training.make_trainer(
            lm.model, lm.tokenizer, examples, lora, checkpoints=out / "checkpoints", packed_length=row, batch_size=1,
            accumulation=accumulation, epochs=epochs, learning_rate=rate, warmup=0.1, checkpointing=False,
            save_steps=1000, seed=3,
        )  # fmt: skip
        trainer.train()
    return trainer


def both(
    name: str | Path, records: list[dict[str, Any]], out: Path, *, row: int, accumulation: int, epochs: int,
    rank: int = 4, rate: float = 5e-3,
) -> tuple[Any, Trained]:  # fmt: skip
    lm, other = load_model(name), load_model(name)
    examples, _ = encode_all(lm, records, "here", row)
    trainer = by_trl(lm, examples, out, row=row, accumulation=accumulation, epochs=epochs, rank=rank, rate=rate)
    with torch.random.fork_rng():
        plain = train(
            other.model, examples, row=row, accumulation=accumulation, epochs=epochs, learning_rate=rate, warmup=0.1,
            rank=rank, alpha=2 * rank, seed=3,
        )  # fmt: skip
    return trainer, plain


def compare(trainer: Any, plain: Trained, label: str) -> None:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == len(plain.losses) >= 10
    assert [entry["learning_rate"] for entry in logs] == pytest.approx(plain.rates, rel=1e-6, abs=1e-12)
    away = [abs(a["loss"] - b) / b for a, b in zip(logs, plain.losses, strict=True)]
    norms = [abs(a["grad_norm"] - b) / b for a, b in zip(logs, plain.norms, strict=True)]
    theirs = {name: value for name, value in trainer.model.state_dict().items() if "lora_" in name}
    ours = {name: value for name, value in plain.model.state_dict().items() if "lora_" in name}
    assert theirs.keys() == ours.keys()
    flat = [torch.cat([adapter[name].flatten() for name in sorted(ours)]) for adapter in (theirs, ours)]
    last = float((flat[0] - flat[1]).norm() / flat[1].norm())
    print(
        f"{label}: {len(logs)} steps; largest relative difference of losses, first ten {max(away[:10]):.1e}, all "
        f"{max(away):.1e}; of gradient norms {max(norms):.1e}; of the final adapter {last:.1e}"
    )
    assert max(away) < 1e-4
    assert last < 1e-3
    assert plain.losses[-1] < 0.95 * plain.losses[0], "it learnt nothing: equal losses would say little"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_plain_loop_ends_where_the_trainer_does(family: str, tiny: Callable[[str], Path], tmp_path: Path) -> None:
    trainer, plain = both(tiny(family), RECORDS, tmp_path, row=100, accumulation=3, epochs=6)
    compare(trainer, plain, f"tiny {family}")


@pytest.mark.slow
def test_on_the_lab_model(lab: LM, word_problems: Task, tmp_path: Path) -> None:
    rows = word_problems.rows("train", n=60, seed=0)
    records = [
        {"messages": [*word_problems.messages(row), {"role": "assistant", "content": row["solutions"]["steps"]}]}
        for row in rows
    ]
    trainer, plain = both(lab.name, records, tmp_path, row=512, accumulation=2, epochs=2, rank=16, rate=2e-3)
    compare(trainer, plain, "lab")


def test_rows_and_their_order_are_trls(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    lm = load_model(tiny("llama"))
    sizes = torch.randint(3, 60, (1500,), generator=torch.Generator().manual_seed(0)).tolist()
    examples = [Example([5 + n % 90, *[7] * (size - 1)], [-100, *[7] * (size - 1)]) for n, size in enumerate(sizes)]
    with training.quiet_libraries():
        trainer = training.make_trainer(
            lm.model, lm.tokenizer, examples, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
            checkpoints=tmp_path / "checkpoints", packed_length=100, batch_size=1, accumulation=1, epochs=1,
            learning_rate=1e-3, warmup=0, checkpointing=False, save_steps=1000, seed=3,
        )  # fmt: skip
    ours = [[token for example in row for token in example.input_ids] for row in pack(examples, 100, 3)]
    assert ours == [trainer.train_dataset[place]["input_ids"] for place in range(len(trainer.train_dataset))]


def test_a_record_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"A record has 9 tokens, more than row=8\. Give row=9"):
        pack([Example([1] * 9, [1] * 9)], 8, 0)
