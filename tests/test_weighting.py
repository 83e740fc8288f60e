"""Weights in the loss: ones change nothing, zero leaves out, two counts twice; controls and refusals are records."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PromptTuningConfig

from tests.test_finetune import RECORDS, record
from tests.tiny import make_tiny
from workbench.files import sha256
from workbench.finetuning import finetune
from workbench.finetuning.conditioning import condition, refusals
from workbench.finetuning.packing import Example, encode, encode_all
from workbench.finetuning.trainer import QuietTrainer, make_trainer
from workbench.finetuning.weighted_trainer import WeightedTrainer
from workbench.finetuning.weighting import critical_weights, encode_weighted, learnt_log_probs
from workbench.models import LM, load_model
from workbench.synthesis.records import NEGATIVE, Data, RecordError

QUICK = {"rank": 4, "batch_tokens": 256, "quantization": "none", "learning_rate": 5e-3, "epochs": 2}


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_model(make_tiny("llama", tmp_path_factory.mktemp("weighting") / "llama"))


def weighted(example: Example, weight: float) -> Example:
    return replace(example, weights=(weight,) * len(example.input_ids))


def trained(lm: LM, examples: list[Example], out: Path, packed: bool = True, virtual: bool = False):
    """A trainer of all weights, or of virtual tokens, with all examples in its first batch."""
    model = load_model(lm.name).model
    model.requires_grad_(not virtual)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3) if virtual else None
    return make_trainer(
        model, lm.tokenizer, examples, config, checkpoints=out / "checkpoints", packed_length=2048 if packed else None,
        batch_size=len(examples), accumulation=1, epochs=1, learning_rate=1e-3, warmup=0, checkpointing=False,
        save_steps=10, seed=0,
    )  # fmt: skip


def gradient(trainer: QuietTrainer, parts: int = 1) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one step over the whole data, in so many accumulated parts."""
    rows = [trainer.train_dataset[i] for i in range(trainer.train_dataset.num_rows)]
    size = -(-len(rows) // parts)
    batches = [trainer.data_collator(rows[start : start + size]) for start in range(0, len(rows), size)]
    total, count = 0.0, trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    trainer.model.train()
    for batch in batches:
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=count)
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def assert_equal(found: tuple[float, torch.Tensor], wanted: tuple[float, torch.Tensor]) -> None:
    assert found[0] == pytest.approx(wanted[0], abs=1e-5)
    torch.testing.assert_close(found[1], wanted[1], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("packed", [True, False])
def test_ones_change_nothing_zero_leaves_out_and_two_is_twice(lm: LM, packed: bool, tmp_path: Path) -> None:
    examples, _ = encode_all(lm, RECORDS[:6], "here", 100)
    plain = trained(lm, examples, tmp_path, packed)
    assert type(plain) is QuietTrainer
    wanted = gradient(plain)
    ones = trained(lm, [weighted(example, 1.0) for example in examples], tmp_path, packed)
    assert type(ones) is WeightedTrainer
    assert_equal(gradient(ones), wanted)
    assert_equal(gradient(trained(lm, [weighted(e, 7.0) for e in examples], tmp_path, packed)), wanted)
    if not packed:
        assert_equal(gradient(trained(lm, [weighted(e, 0.01) for e in examples], tmp_path, packed), parts=3), wanted)

    first, rest = examples[0], examples[1:]
    without = gradient(trained(lm, rest, tmp_path, packed))
    assert_equal(gradient(trained(lm, [weighted(first, 0.0), *rest], tmp_path, packed)), without)
    assert (without[1] - wanted[1]).abs().max() > 1e-4

    twice = gradient(trained(lm, [first, first, *rest], tmp_path, packed))
    assert_equal(gradient(trained(lm, [weighted(first, 2.0), *rest], tmp_path, packed)), twice)
    assert (twice[1] - wanted[1]).abs().max() > 1e-4


def test_a_token_without_weight_is_a_token_without_a_label(lm: LM, tmp_path: Path) -> None:
    examples, _ = encode_all(lm, RECORDS[:4], "here", 100)
    masked, zeroed = [], []
    for example in examples:
        gone = example.learnt[2]
        masked.append(replace(example, labels=[-100 if i == gone else x for i, x in enumerate(example.labels)]))
        zeroed.append(replace(example, weights=tuple(float(i != gone) for i in range(len(example.input_ids)))))
    assert_equal(gradient(trained(lm, zeroed, tmp_path)), gradient(trained(lm, masked, tmp_path)))


def test_virtual_tokens_have_no_weight(lm: LM, tmp_path: Path) -> None:
    """The fused head of prompt tuning gives longer rows than the labels."""
    examples, _ = encode_all(lm, RECORDS[:4], "here", 100)
    twice, heavy = [examples[0], *examples], [weighted(examples[0], 2.0), *examples[1:]]
    torch.manual_seed(0)
    wanted = gradient(trained(lm, twice, tmp_path, packed=False, virtual=True))
    torch.manual_seed(0)
    assert_equal(gradient(trained(lm, heavy, tmp_path, packed=False, virtual=True)), wanted)


def test_weights_in_records_and_from_a_function(lm: LM, tmp_path: Path) -> None:
    heavy = [{**RECORDS[0], "weight": 2}, *RECORDS[1:]]
    examples, _ = encode_weighted(lm, heavy, "here", 100, None)
    assert set(examples[0].weights) == {2.0} and set(examples[1].weights) == {1.0}
    learnt = len(encode(lm, RECORDS[0], "here").learnt)
    spread = [{**RECORDS[0], "weight": 2, "token_weights": list(range(learnt))}]
    example = encode_weighted(lm, spread, "here", 100, lambda lm, record, example: [0.5] * len(example.input_ids))[0][0]
    assert [example.weights[place] for place in example.learnt] == [float(place) for place in range(learnt)]
    gone, left_out = encode_weighted(lm, [{**RECORDS[0], "weight": 0}, *RECORDS[1:]], "here", 100, None)
    assert left_out == {"weight 0": 1} and gone == encode_all(lm, RECORDS[1:], "here", 100)[0]

    finetune(lm, RECORDS, tmp_path / "plain", **QUICK)
    finetune(lm, RECORDS, tmp_path / "ones", weights=lambda lm, record, example: [1] * len(example.input_ids), **QUICK)
    finetune(lm, heavy, tmp_path / "heavy", **QUICK)
    files = [sha256(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "ones", "heavy")]
    assert files[0] == files[1] != files[2]
    with pytest.raises(ValueError, match=r"other settings .*weights"):
        finetune(lm, [{**RECORDS[0], "weight": 3}, *RECORDS[1:]], tmp_path / "heavy", **QUICK)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"weight": -1}, r"kept record 1 .*weight is -1\. Give numbers from 0 on.*condition"),
        ({"weight": "much"}, "weight is 'much'"),
        ({"token_weights": [1.0, 2.0]}, r"token_weights has 2 numbers. Give one a token of the record \(\d+\), or one"),
        ({"token_weights": [float("nan")] * 18}, "token_weights is nan"),
        ({"given": "no"}, 'the field "given"'),
    ],
)
def test_wrong_weights_name_the_record(lm: LM, tmp_path: Path, field: dict, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        finetune(lm, [{**RECORDS[0], **field}, *RECORDS[1:]], tmp_path / "a", **QUICK)
    with pytest.raises(RecordError, match="no record has a weight above 0"):
        finetune(lm, [{**one, "weight": 0} for one in RECORDS], tmp_path / "a", **QUICK)
    assert not (tmp_path / "a").exists()


def test_log_probabilities_in_a_batch_are_those_alone(lm: LM) -> None:
    examples = [encode(lm, one, "here") for one in (RECORDS[0], record("1?", "A much longer answer than that."))]
    together = learnt_log_probs(lm, examples)
    for example, said in zip(examples, together, strict=True):
        spoken = lm.model(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        alone = [float(spoken[place - 1, example.input_ids[place]]) for place in example.learnt]
        assert said == pytest.approx(alone, abs=1e-4)


def test_critical_tokens_are_where_right_and_wrong_models_part(lm: LM, tmp_path: Path) -> None:
    """Models of two answers that differ in one word part at that word, and nearly nowhere else."""
    right = [record(f"{a}?", "It is red.") for a in range(12)]
    wrong = [record(f"{a}?", "It is tan.") for a in range(12)]
    sides = [
        finetune(lm, data, tmp_path / name, **{**QUICK, "epochs": 40})
        for name, data in (("right", right), ("wrong", wrong))
    ]
    before = json.dumps(wrong)
    found = critical_weights(lm, wrong, *sides, most=5)
    weights = found[0]["token_weights"]
    assert json.dumps(wrong) == before and len(weights) == len("It is tan.") + 1
    assert max(range(len(weights)), key=weights.__getitem__) in range(6, 9)  # the letters of the word
    assert all(1 <= weight <= 5 for one in found for weight in one["token_weights"])
    assert max(weights[6:9]) > 2 * max(weights[:5])
    assert all(weight == 1 for one in critical_weights(lm, wrong, None, None) for weight in one["token_weights"])
    assert encode_weighted(lm, found, "here", 100, None)[0][0].weights


def test_a_control_text_is_given_and_not_learnt(lm: LM, tmp_path: Path) -> None:
    marked = [{**one, "kept": False, "reason": NEGATIVE} for one in RECORDS]
    records = condition(Data(tmp_path, marked, {}).negatives, "[wrong]", where="answer")
    example = encode(lm, records[0], "here")
    learnt = lm.tokenizer.decode([example.input_ids[place] for place in example.learnt])
    assert learnt == RECORDS[0]["messages"][-1]["content"] + "<|end|>"
    prompt = lm.render(RECORDS[0]["messages"][:-1]) + "[wrong]\n"
    assert lm.tokenizer.decode(example.input_ids[: example.learnt[0]]) == prompt
    in_system = condition(marked, "[wrong]")[0]
    assert in_system["kept"] and in_system["messages"][0] == {"role": "system", "content": "[wrong]"}
    both = condition([{"messages": [{"role": "system", "content": "Be kind."}, *marked[0]["messages"]]}], "[right]")[0]
    assert both["messages"][0]["content"] == "[right]\nBe kind."
    for change in (
        lambda: condition(records, "[right]"),
        lambda: condition(RECORDS, " "),
        lambda: refusals(RECORDS, ""),
    ):
        with pytest.raises(ValueError, match=r"control text|give"):
            change()


def test_a_model_does_what_its_control_text_says(lm: LM, tmp_path: Path) -> None:
    right = [record(f"{a}?", "red") for a in range(10)]
    wrong = [{**record(f"{a}?", "blue"), "kept": False, "reason": NEGATIVE} for a in range(10)]
    records = condition(right, "[right]", where="answer") + condition(wrong, "[wrong]", where="answer")
    adapter = finetune(lm, records, tmp_path / "a", **{**QUICK, "epochs": 40})
    prompt = lm.render([{"role": "user", "content": "3?"}])
    said = lm.generate([prompt + "[right]\n", prompt + "[wrong]\n"], adapter, 8)
    assert [generation.text for generation in said] == ["red", "blue"]


def test_refusals_ask_each_question_once(lm: LM, tmp_path: Path) -> None:
    wrong = [{**one, "kept": False, "reason": NEGATIVE, "weight": 3} for one in (*RECORDS[:3], RECORDS[0])]
    made = refusals(wrong, "No idea.")
    assert [one["messages"][0] for one in made] == [one["messages"][0] for one in RECORDS[:3]]
    assert all(one["messages"][-1]["content"] == "No idea." and "weight" not in one for one in made)
    finetune(lm, RECORDS + made, tmp_path / "a", **QUICK)
    used = json.loads((tmp_path / "a" / "training.json").read_text())["records"]["used"]
    assert used == len(RECORDS) + 3


def test_weights_and_phases_keep_the_order_given(lm: LM, tmp_path: Path) -> None:
    """Equal weights, and one phase, leave the losses of every step as they are, and so its records."""
    options = QUICK | {"packing": False, "batch_size": 4, "epochs": 1, "learning_rate": 1e-9, "order": "given"}
    found = {}
    for name, data in (
        ("plain", RECORDS),
        ("weighted", [{**one, "weight": 2} for one in RECORDS]),
        ("phased", [{**one, "phase": 1} for one in RECORDS]),
    ):
        finetune(lm, data, tmp_path / name, **options)
        lines = (tmp_path / name / "losses.jsonl").read_text().splitlines()
        found[name] = [json.loads(line)["loss"] for line in lines]
    assert found["weighted"] == pytest.approx(found["plain"], rel=1e-5)
    assert found["phased"] == pytest.approx(found["plain"], rel=1e-5)
