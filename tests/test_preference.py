"""Preferences: pairs by hand, losses and gradients against the formula, an interrupted run against a whole one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch.nn.functional import logsigmoid

from tests.tiny import make_tiny
from workbench.files import sha256
from workbench.finetuning import finetune
from workbench.finetuning.packing import IGNORED, encode
from workbench.finetuning.pairs import Pair, encode_pairs, preference_pairs, single_answers
from workbench.finetuning.preference import BETA, prefer
from workbench.interventions.adapter import Adapter
from workbench.models import LM, load_model
from workbench.synthesis.records import NEGATIVE, RecordError

QUICK: dict[str, Any] = {"quantization": "none", "learning_rate": 2e-2, "batch_size": 4}
FACTS = [(a, b) for a in range(2, 6) for b in range(2, 5)]


def record(row: str, number: int, right: bool, answer: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{row}?"}, {"role": "assistant", "content": answer}]
    reason = "verified" if right else NEGATIVE
    made = {"id": f"{row}/{number}", "row_id": row, "messages": messages, "verdict": {"correct": right}}
    return made | {"kept": right, "reason": reason} | more


RECORDS = [
    record(f"{a}+{b}", number, number % 2 == 0, f"{a}+{b}={a + b + number % 2}." + number // 2 * " So there.")
    for a, b in FACTS
    for number in range(4)
]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_model(make_tiny("llama", tmp_path_factory.mktemp("base") / "llama"))


@pytest.fixture(scope="module")
def start(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return finetune(
        lm, RECORDS, tmp_path_factory.mktemp("start") / "sft", rank=4, quantization="none", learning_rate=1e-2
    )


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers that `prefer` makes."""
    from workbench.finetuning import alignment

    kept: list[Any] = []
    for name in ("make_dpo", "make_kto"):
        real = getattr(alignment, name)
        monkeypatch.setattr(alignment, name, lambda *a, real=real, **k: kept.append(real(*a, **k)) or kept[-1])
    return kept


def curve(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]


def test_pairs_are_of_one_question_and_use_no_chain_twice() -> None:
    found = preference_pairs(RECORDS, per_question=3)
    assert found.counts == {
        "questions": 12, "with a pair": 12, "only right": 0, "only wrong": 0, "neither": 0,
    }  # fmt: skip
    assert len(found) == 24  # two right and two wrong chains each
    for pair in found.pairs:
        assert pair.chosen_id.split("/")[0] == pair.rejected_id.split("/")[0] == pair.row_id
        assert pair.prompt == [{"role": "user", "content": f"{pair.row_id}?"}]
    for ids in ([pair.chosen_id for pair in found.pairs], [pair.rejected_id for pair in found.pairs]):
        assert len(set(ids)) == len(ids)


def test_choice_by_length() -> None:
    lengths = [(0, True, 10), (1, True, 20), (2, False, 19), (3, False, 40)]
    records = [record("1+1", number, right, "x", tokens_out=size) for number, right, size in lengths]

    def ids(choose: Any, seed: int = 0) -> tuple[str, str]:
        pair = preference_pairs(records, choose=choose, seed=seed).pairs[0]
        return pair.chosen_id[-1], pair.rejected_id[-1]

    assert ids("close") == ("1", "2")
    assert ids("shortest") == ("0", "3")
    assert len({ids("random", seed) for seed in range(20)}) == 4


def test_questions_without_a_pair_are_counted_and_told(capsys: pytest.CaptureFixture[str]) -> None:
    leaked = [
        record("8+8", 0, True, "16", kept=False, reason="overlap with evaluation: 3 words"),
        record("8+8", 1, False, "17"),
    ]
    repeat = [
        record("9+9", 0, True, "18", kept=False, reason="repeats record 8+8/0"),
        record("9+9", 1, False, "19"),
        record("9+9", 2, False, "20", reason="cut off at max_new_tokens"),
    ]
    found = preference_pairs([*leaked, *repeat, record("1+1", 0, True, "2")], per_question=2)
    assert [(pair.chosen, pair.rejected) for pair in found.pairs] == [("18", "19")]
    assert found.counts == {"questions": 3, "with a pair": 1, "only right": 1, "only wrong": 1, "neither": 0}
    assert "2 of 3 questions have no pair (1 only right, 1 only wrong)" in capsys.readouterr().err
    with pytest.raises(RecordError, match=r"1 of 1 questions have no pair .*negatives=4"):
        preference_pairs([record("1+1", 0, True, "2")])


def test_tokens_are_those_of_supervised_training_and_end_in_one_stop_token(lm: LM) -> None:
    pairs = preference_pairs(RECORDS).pairs
    rows, left_out = encode_pairs(lm, pairs, 4096)
    assert left_out == 0
    for pair, row in zip(pairs, rows, strict=True):
        for name in ("chosen", "rejected"):
            messages = [*pair.prompt, {"role": "assistant", "content": getattr(pair, name)}]
            example = encode(lm, {"messages": messages}, "here")
            assert row["prompt_ids"] + row[f"{name}_ids"] == example.input_ids
            assert [IGNORED] * len(row["prompt_ids"]) + row[f"{name}_ids"] == example.labels
            assert row[f"{name}_ids"].count(lm.tokenizer.eos_token_id) == 1
            assert row[f"{name}_ids"][-1] == lm.tokenizer.eos_token_id
    shortest = min(len(row["prompt_ids"] + row["chosen_ids"]) for row in rows)
    kept, left_out = encode_pairs(lm, pairs, shortest)
    assert len(kept) + left_out == len(rows) and kept
    with pytest.raises(RecordError, match="longer than max_length=3"):
        encode_pairs(lm, pairs, 3)


def test_tokens_are_those_of_trl(lm: LM, tmp_path: Path) -> None:
    import datasets
    from trl import DPOConfig, DPOTrainer

    pairs = preference_pairs(RECORDS).pairs

    def turn(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    rows = [{"prompt": p.prompt, "chosen": turn(p.chosen), "rejected": turn(p.rejected)} for p in pairs]
    trainer = DPOTrainer(
        load_model(lm.name).model, args=DPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=lm.tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    theirs = [{name: row[name] for name in names} for row in trainer.train_dataset]
    assert theirs == encode_pairs(lm, pairs, 4096)[0]


def log_probability(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Sum over the answer's tokens, one row alone and without padding."""
    ids = torch.tensor([prompt + answer])
    logs = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    return logs.gather(-1, torch.tensor(answer)[:, None]).sum()


def gain(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """log p - log p_ref."""
    model.set_adapter("ref")
    with torch.no_grad():
        reference = log_probability(model, prompt, answer)
    model.set_adapter("default")
    return log_probability(model, prompt, answer) - reference


def direct_loss(method: str, model: Any, rows: list[dict[str, Any]], beta: float) -> torch.Tensor:
    """The formulas of `preference`, written out."""
    if method == "kto":
        with torch.no_grad():
            z = torch.stack([gain(model, row["prompt_ids"], row["KL_completion_ids"]) for row in rows]).mean().clamp(0)
        gains = [gain(model, row["prompt_ids"], row["completion_ids"]) for row in rows]
        signs = [1 if row["label"] else -1 for row in rows]
        return sum(1 - torch.sigmoid(beta * sign * (r - z)) for sign, r in zip(signs, gains, strict=True)) / len(rows)
    total = torch.zeros(())
    for row in rows if method != "sft" else []:
        good, bad = (gain(model, row["prompt_ids"], row[f"{name}_ids"]) for name in ("chosen", "rejected"))
        if method == "dpo-norm":
            good, bad = good / len(row["chosen_ids"]), bad / len(row["rejected_ids"])
        total = total - logsigmoid(beta * (good - bad)) / len(rows)
    if method in ("dpo-sft", "sft"):
        logs = sum(log_probability(model, row["prompt_ids"], row["chosen_ids"]) for row in rows)
        total = total - logs / sum(len(row["chosen_ids"]) for row in rows)
    return total


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found and all(".default." in name for name in found)  # the reference has no gradient
    return found


@pytest.mark.parametrize("method", sorted(BETA))
def test_loss_and_gradients_equal_the_formula(
    method: Any, lm: LM, start: Adapter, tmp_path: Path, made: list[Any]
) -> None:
    pairs = preference_pairs(RECORDS)
    prefer(lm, pairs, tmp_path / "out", method, start=start, **QUICK)
    trainer, rows = made[0], encode_pairs(lm, pairs.pairs, 4096)[0][:4]
    if method == "kto":
        rows = single_answers(rows, 8, seed=0)
    batch = trainer._prepare_inputs(trainer.data_collator([dict(row) for row in rows]))
    trainer.model.train()
    ours = direct_loss(method, trainer.model, rows, BETA[method])
    direct = gradients(trainer.model, ours)
    theirs = trainer.compute_loss(trainer.model, batch)
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-5)
    found = gradients(trainer.model, theirs)
    assert found.keys() == direct.keys()
    for name, value in direct.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)
    assert max(value.abs().max() for value in direct.values()) > 1e-3


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_first_step_starts_from_the_given_adapter(
    method: Any, quantization: Any, lm: LM, start: Adapter, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = QUICK | {"quantization": quantization, "learning_rate": 5e-3, "epochs": 6}
    prefer(lm, preference_pairs(RECORDS), out, method, start=start, **options)
    first, last = curve(out)[0], curve(out)[-1]
    assert first["reward_chosen"] == first["reward_rejected"] == first["margin"] == 0.0
    assert first["loss"] == (0.5 if method == "kto" else float(torch.tensor(2.0).log()))
    assert last["margin"] > 0 and last["loss"] < first["loss"]
    assert json.loads((out / "training.json").read_text())["quantization"] == quantization


def test_no_step_leaves_the_start_as_it_is(lm: LM, start: Adapter, tmp_path: Path) -> None:
    """With a rate of almost nothing the saved adapter is the start: its own numbers go on, 4 bits or not."""
    from safetensors.torch import load_file

    for quantization in ("none", "nf4"):
        options = QUICK | {"learning_rate": 1e-30, "quantization": quantization}
        found = prefer(lm, preference_pairs(RECORDS), tmp_path / quantization, start=start, **options)
        ours, theirs = (load_file(each.path / "adapter_model.safetensors") for each in (found, start))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Killed(BaseException):
    pass


@pytest.mark.parametrize(("method", "begin"), [("dpo", True), ("dpo-norm", False), ("kto", True)])
def test_interrupted_and_resumed_equals_uninterrupted(
    method: Any, begin: bool, lm: LM, start: Adapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench.finetuning import callbacks

    pairs = preference_pairs(RECORDS, per_question=2)
    options = QUICK | {"start": start if begin else None, "rank": None if begin else 4, "epochs": 2, "save_steps": 4}

    def die(stage: str, step: int, total: int, **_: float) -> None:
        assert stage == "prefer"
        if step == 7:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(callbacks, "heartbeat", die)
        with pytest.raises(Killed):
            prefer(lm, pairs, tmp_path / "killed", method, **options)
    assert not (tmp_path / "killed" / "training.json").exists()
    reports = []
    for name in ("killed", "straight"):
        prefer(lm, pairs, tmp_path / name, method, **options)
        reports.append(json.loads((tmp_path / name / "training.json").read_text()))
    assert [report["resumed_from_step"] for report in reports] == [4, 0]
    for file in ("adapter_model.safetensors", "losses.jsonl"):
        assert sha256(tmp_path / "killed" / file) == sha256(tmp_path / "straight" / file), file
    assert reports[0]["tokens"] == reports[1]["tokens"] and reports[0]["steps"] == 12


def test_a_finished_folder_is_returned_and_nothing_of_the_caller_changes(
    lm: LM, start: Adapter, tmp_path: Path, made: list[Any]
) -> None:
    pairs = preference_pairs(RECORDS)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    files = {file.name: sha256(file) for file in start.path.iterdir() if file.is_file()}
    state = torch.random.get_rng_state()
    out = prefer(lm, pairs, tmp_path / "out", start=start, **QUICK)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in lm.model.state_dict().items())
    assert files == {file.name: sha256(file) for file in start.path.iterdir() if file.is_file()}
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "losses.jsonl", "settings.json", "training.json",
    ]  # fmt: skip
    assert prefer(lm, pairs, tmp_path / "out", start=start, **QUICK) == out
    assert len(made) == 1
    with pytest.raises(ValueError, match=r"started by prefer with other settings \(beta: 0.1 there, 0.3 now\)"):
        prefer(lm, pairs, tmp_path / "out", start=start, beta=0.3, **QUICK)
    plain, tuned = (lm.generate(["<|user|>2+2?<|end|><|assistant|>\n"], x, max_new_tokens=8) for x in (None, out))
    assert plain[0].token_ids != tuned[0].token_ids


def test_contradictions_are_refused_before_work(lm: LM, start: Adapter, tmp_path: Path) -> None:
    pairs = preference_pairs(RECORDS)
    virtual = finetune(lm, RECORDS[:4], tmp_path / "virtual", method="prompt", virtual_tokens=4, epochs=1)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"method": "simpo"}, "method='simpo' is not known. Choose one of dpo, dpo-norm"),
        ({"start": start, "rank": 8}, "rank=8 was given together with start="),
        ({"start": start.scale(0.5)}, "start has strength 0.5"),
        ({"beta": 0.0}, "beta=0.0 must be above 0"),
        ({"batch_size": 0}, "batch_size=0 is too small"),
        ({"warmup": 2.0}, "warmup=2.0 is a share"),
        ({"alpha": 0.0}, "alpha=0.0 must be above 0"),
        ({"max_length": 0}, "max_length=0 is too small"),
        ({"start": virtual}, "puts 4 virtual tokens before the text; preferences and rewards train LoRA adapters"),
    ]
    for options, text in wrong:
        with pytest.raises(ValueError, match=text):
            prefer(lm, pairs, tmp_path / "out", **options)
    with pytest.raises(RecordError, match="no pairs to learn from"):
        prefer(lm, [], tmp_path / "out")
    with pytest.raises(ValueError, match="choose='long' is not known"):
        preference_pairs(RECORDS, choose="long")  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_mismatched_answers_of_kto_are_the_batch_s_own() -> None:
    rows = [{"prompt_ids": [n], "chosen_ids": [n, 1], "rejected_ids": [n, 2]} for n in range(10, 15)]
    single = single_answers(rows, 4, seed=1)
    assert sum(row["label"] for row in single) == 5 and len(single) == 10
    for begin in range(0, 10, 4):
        part = single[begin : begin + 4]
        assert sorted(row["completion_ids"] for row in part) == sorted(row["KL_completion_ids"] for row in part)
    assert not all(row["label"] for row in single[:5])
    assert single == single_answers(rows, 4, seed=1) != single_answers(rows, 4, seed=2)


def test_a_pair_has_all_that_a_reader_needs() -> None:
    pair = preference_pairs(RECORDS, choose="shortest").pairs[0]
    assert pair == Pair(
        "2+2", [{"role": "user", "content": "2+2?"}], "2+2=4.", "2+2=5. So there.", "2+2/0", "2+2/3", 1, 3
    )
