"""A run in training: its numbers against their definitions, paused against uninterrupted, memory running out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tests.test_finetune import QUICK, RECORDS, record
from workbench.finetuning import finetune
from workbench.finetuning.microbatch import record_lengths, split
from workbench.finetuning.packing import IGNORED, encode_all
from workbench.finetuning.watching import Live, flops_per_token, peak_flops
from workbench.models import LM, load_model
from workbench.synthesis.records import RecordError
from workbench.tasks import load_task

HELD_OUT = [record(f"{a}+9?", f"The answer is {a + 9}.") for a in range(2, 8)]
SMALL: dict[str, Any] = {**QUICK, "epochs": 4, "batch_tokens": 1024, "save_steps": 2}


@pytest.fixture(scope="module")
def lm(tiny) -> LM:
    return load_model(tiny("llama"))


def lines(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def short_of_memory(
    monkeypatch: pytest.MonkeyPatch, most: int, error: type[Exception] = torch.OutOfMemoryError
) -> list:
    """Any forward pass in training of more than `most` tokens fails to get its memory."""
    from workbench.finetuning import trainer as training

    made: list = []
    real = training.make_trainer

    def make(model: Any, *arguments: Any, **options: Any) -> Any:
        def refuse(module: Any, inputs: Any, keywords: dict[str, Any]) -> None:
            if module.training and keywords["input_ids"].numel() > most:
                raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

        trainer = real(model, *arguments, **options)
        trainer.model.get_base_model().model.register_forward_pre_hook(refuse, with_kwargs=True)
        made.append(trainer)
        return trainer

    monkeypatch.setattr(training, "make_trainer", make)
    return made


def batch_of(examples: list, packed: bool) -> dict[str, Any]:
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [{"input_ids": example.input_ids, "labels": example.labels} for example in examples]
    return DataCollatorForLanguageModeling(0, padding_free=packed)(rows)


@pytest.mark.parametrize("packed", [True, False])
def test_parts_hold_the_records_of_the_whole(lm: LM, packed: bool) -> None:
    examples = encode_all(lm, [*RECORDS[:7], record("1?", "2.")], "here", 100)[0]
    whole = batch_of(examples, packed)
    assert record_lengths(whole) == [len(example.input_ids) for example in examples]
    for number in (1, 2, 3, 8, 50):
        parts = split(whole, number)
        assert len(parts) == min(number, 8)
        bounds = [len(record_lengths(part)) for part in parts]
        groups = [examples[sum(bounds[:i]) : sum(bounds[: i + 1])] for i in range(len(bounds))]
        for part, group in zip(parts, groups, strict=True):
            fresh = batch_of(group, packed)
            assert part.keys() == fresh.keys()
            for name, value in fresh.items():
                assert torch.equal(torch.as_tensor(part[name]), torch.as_tensor(value)), (number, name)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_ends_where_smaller_micro_batches_end(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: type[Exception]
) -> None:
    straight = finetune(lm, RECORDS, tmp_path / "straight", **SMALL)
    short_of_memory(monkeypatch, 300, error)
    short = finetune(lm, RECORDS, tmp_path / "short", **SMALL)
    report = json.loads((short.path / "training.json").read_text())
    assert [event["parts"] for event in report["out_of_memory"]] == [2]
    assert "out of memory in step 1" in capsys.readouterr().out
    for name, value in weights(straight.path).items():
        torch.testing.assert_close(weights(short.path)[name], value, atol=1e-5, rtol=1e-4)
    curves = [lines(folder / "losses.jsonl") for folder in (straight.path, short.path)]
    for one, other in zip(*curves, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


@pytest.mark.parametrize("packing", [True, False])
def test_memory_that_runs_out_in_the_middle_of_a_step_loses_nothing(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool
) -> None:
    """The second micro-batch of step 3 fails in its backward pass, after gradients of both have been added."""
    from workbench.finetuning import trainer as training

    options = {**SMALL, "packing": packing, "batch_size": 8}
    straight = finetune(lm, RECORDS, tmp_path / "straight", **options)
    calls = 0
    real = training.make_trainer

    def make(*arguments: Any, **named: Any) -> Any:
        trainer = real(*arguments, **named)

        def fail(gradient: torch.Tensor) -> None:
            nonlocal calls
            calls += trainer.state.global_step == 2
            if calls == (2 if packing else 1):
                calls += 1
                raise torch.OutOfMemoryError("CUDA out of memory.")

        first = next(weight for weight in trainer.model.parameters() if weight.requires_grad)
        first.register_hook(fail)
        return trainer

    monkeypatch.setattr(training, "make_trainer", make)
    broken = finetune(lm, RECORDS, tmp_path / "broken", **options)
    report = json.loads((broken.path / "training.json").read_text())
    assert [event["step"] for event in report["out_of_memory"]] == [3]
    for name, value in weights(straight.path).items():
        torch.testing.assert_close(weights(broken.path)[name], value, atol=1e-5, rtol=1e-4)
    assert report["tokens"] == json.loads((straight.path / "training.json").read_text())["tokens"]


def test_a_record_that_does_not_fit_alone_is_named(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_memory(monkeypatch, 20)
    with pytest.raises(RecordError, match=r"in step 1 on a single record of 2\d tokens; .* max_length=2\d or less"):
        finetune(lm, RECORDS, tmp_path / "a", **SMALL)


def test_other_errors_are_not_taken_for_memory(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Exception):
        pass

    short_of_memory(monkeypatch, 20, Broken)
    with pytest.raises(Broken):
        finetune(lm, RECORDS, tmp_path / "a", **SMALL)


def test_a_paused_run_goes_on_to_the_same_bytes_and_counts(lm: LM, tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []
    options = {**SMALL, "held_out": HELD_OUT, "epochs": 6}
    finetune(lm, RECORDS, tmp_path / "straight", **options)
    paused = finetune(lm, RECORDS, tmp_path / "paused", until=0.3, **options)
    assert [row["step"] for row in lines(paused.path / "losses.jsonl")] == [1, 2]
    assert not (paused.path / "training.json").exists()
    assert finetune(lm, RECORDS, tmp_path / "paused", until=0.3, **options) == paused  # there already
    finetune(lm, RECORDS, tmp_path / "paused", watch=lambda rows: seen.extend(rows[-1:]), **options)
    for name in ("adapter_model.safetensors", "losses.jsonl"):
        assert (paused.path / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    assert [row["step"] for row in seen] == [3, 4, 5, 6]
    speeds = lines(paused.path / "speed.jsonl")
    assert [row["step"] for row in speeds] == [1, 2, 3, 4, 5, 6]
    report = json.loads((paused.path / "training.json").read_text())
    assert report["resumed_from_step"] == 2
    assert report["seconds"] == pytest.approx(sum(row["seconds"] for row in speeds))


def test_numbers_of_a_step_are_what_they_are_called(lm: LM, tmp_path: Path) -> None:
    rows: list[dict[str, float]] = []
    adapter = finetune(lm, RECORDS, tmp_path / "a", watch=lambda all_rows: rows.append(dict(all_rows[-1])), **SMALL)
    report = json.loads((adapter.path / "training.json").read_text())
    before = 0.0
    for row in rows:
        rate = (row["tokens"] - before) / row["seconds"]
        assert row["tokens_per_second"] == pytest.approx(rate)
        assert row["mfu"] == pytest.approx(rate * report["speed"]["flops_per_token"] / report["speed"]["peak_flops"])
        assert {"loss", "grad_norm", "learning_rate"} <= row.keys()
        before = row["tokens"]
    kept = [
        {name: row[name] for name in line} for row, line in zip(rows, lines(adapter.path / "losses.jsonl"), strict=True)
    ]
    assert kept == lines(adapter.path / "losses.jsonl")
    assert "seconds" not in kept[0]  # times would make the bytes differ from run to run


def test_held_out_loss_is_that_of_each_record_alone(lm: LM, tmp_path: Path) -> None:
    adapter = finetune(lm, RECORDS, tmp_path / "a", held_out=HELD_OUT, **SMALL)
    curve = lines(adapter.path / "losses.jsonl")
    assert [row["step"] for row in curve if "eval_loss" in row] == [2, 4]
    total, count = 0.0, 0
    with lm.apply(adapter), torch.no_grad():
        for example in encode_all(lm, HELD_OUT, "here", 100)[0]:
            logits = lm.model(torch.tensor([example.input_ids])).logits[0]
            labels = torch.tensor(example.labels)
            count += int((labels != IGNORED).sum())
            total += float(
                torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORED, reduction="sum")
            )
    assert curve[-1]["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_scoring_does_not_change_the_adapter(lm: LM, tmp_path: Path, word_problems: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("workbench.finetuning.watching.TASK_ROWS", 2)
    options = {**SMALL, "epochs": 2, "dropout": 0.1}
    plain = finetune(lm, RECORDS, tmp_path / "plain", **options)
    scored = finetune(lm, RECORDS, tmp_path / "scored", held_out=HELD_OUT, task=word_problems, **options)
    assert weights(plain.path).keys() == weights(scored.path).keys()
    assert all(torch.equal(value, weights(scored.path)[name]) for name, value in weights(plain.path).items())
    assert 0 <= lines(scored.path / "losses.jsonl")[-1]["eval_accuracy"] <= 1


def test_held_out_records_must_be_others(lm: LM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"held_out: 1 of 2 records .* are also trained on"):
        finetune(lm, RECORDS, tmp_path / "a", held_out=[HELD_OUT[0], RECORDS[3]])
    with pytest.raises(ValueError, match="of the test split"):
        finetune(lm, RECORDS, tmp_path / "a", held_out=[{**HELD_OUT[0], "split": "test"}])
    with pytest.raises(ValueError, match=r"until=0"):
        finetune(lm, RECORDS, tmp_path / "a", until=0)


def test_flops_count_matrices_once(lab: LM) -> None:
    config = lab.model.config
    width, heads, kv = config.hidden_size, config.num_attention_heads * config.head_dim, config.num_key_value_heads
    layer = 2 * width * heads + 2 * width * kv * config.head_dim + 3 * width * config.intermediate_size
    norms = (2 * config.num_hidden_layers + 1) * width
    expected = config.num_hidden_layers * layer + norms + width * config.vocab_size  # the tied table is the head
    assert flops_per_token(lab.model) == 4 * expected
    assert flops_per_token(lab.model, full=True) == 6 * expected
    assert peak_flops(torch.device("cpu"), torch.float32).source.startswith("measured: ")


def test_live_figure_is_refreshed_in_place_and_headless_shows_nothing(
    lm: LM, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Output:
        def __init__(self, figure: Any) -> None:
            self.figures = [figure]

        def update(self, figure: Any) -> None:
            self.figures.append(figure)

    shown: list[Output] = []
    monkeypatch.setattr("workbench.finetuning.watching.LIVE_EVERY", 0.0)
    live = Live(lambda figure: shown.append(Output(figure)) or shown[-1])
    adapter = finetune(lm, RECORDS, tmp_path / "a", held_out=HELD_OUT, watch=live, **SMALL)
    assert len(shown) == 1
    curve = lines(adapter.path / "losses.jsonl")
    last = {trace.name: trace for trace in shown[0].figures[-1].data}
    assert [len(figure.data[0].x) for figure in shown[0].figures] == [1, 2, 3, 4, 4]
    assert last["training loss"].y == pytest.approx([row["loss"] for row in curve], rel=1e-4)
    assert last["gradient norm"].y == pytest.approx([row["grad_norm"] for row in curve], rel=1e-4)
    assert last["held-out loss"].x == (2, 4)
    said = capsys.readouterr()
    assert all(line.startswith("finetune: ") for line in said.out.splitlines())


def test_parts_add_up_where_the_tokens_of_a_step_are_not_counted(lm: LM, tmp_path: Path) -> None:
    """transformers counts none for a model whose forward takes no further arguments."""
    from workbench.finetuning import trainer as training

    examples, found = encode_all(lm, RECORDS, "here", 100)[0], []
    for parts in (1, 2):
        with training.own_random_state(lm.device), training.quiet_libraries():
            trainer = training.make_trainer(
                load_model(lm.name).model, lm.tokenizer, examples, LoraConfig(r=4, target_modules="all-linear"),
                checkpoints=tmp_path / f"{parts}", packed_length=256, batch_size=1, accumulation=3, epochs=1,
                learning_rate=1e-9, warmup=0, checkpointing=False, save_steps=100, seed=0,
            )  # fmt: skip
            trainer.model_accepts_loss_kwargs, trainer.parts = False, parts
            trainer.train()
        found.append([(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "grad_norm" in line])
    assert found[1] == [pytest.approx(step, rel=1e-4) for step in found[0]]


@pytest.mark.parametrize("method", ["lora", "prompt", "prefix"])
def test_accuracy_while_training_is_that_of_the_adapter(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr("workbench.finetuning.watching.TASK_ROWS", 4)
    file = tmp_path / "task.jsonl"
    file.write_text("".join(json.dumps({"question": f"{a}?", "answer": "7"}) + "\n" for a in range(12)))
    task = load_task("sevens", path=file, split="tuning")
    rate = 1e-2 if method == "lora" else 0.3
    options = {**QUICK, "epochs": 40, "learning_rate": rate, "save_steps": 100}
    adapter = finetune(
        lm, [record(f"{a}?", "7") for a in range(12)], tmp_path / "a", method=method, task=task, **options
    )
    rows = task.rows("tuning", n=4, seed=0)
    said = lm.generate([lm.render(task.messages(row)) for row in rows], adapter)
    right = [task.verify(row, one.text).correct for row, one in zip(rows, said, strict=True)]
    assert lines(adapter.path / "losses.jsonl")[-1]["eval_accuracy"] == sum(right) / 4 == 1.0
    report = json.loads((adapter.path / "training.json").read_text())
    assert report["speed"]["flops_per_token"] == flops_per_token(lm.model)
