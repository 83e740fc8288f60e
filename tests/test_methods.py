"""Methods of fine-tuning: each learns, resumes to the same bytes, leaves the caller's model and is a condition."""

import json
import shutil
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.test_finetune import RECORDS, fingerprint
from tests.tiny import make_tiny
from workbench.files import sha256
from workbench.finetuning import finetune
from workbench.finetuning import trainer as training
from workbench.interventions import Adapter
from workbench.models import LM, ModelError, load_model

METHODS = ("lora", "rslora", "dora", "prompt", "prefix", "full")
QUICK = {"batch_tokens": 256, "quantization": "none", "epochs": 4, "batch_size": 8}
RATES = {"full": 3e-3, "prompt": 0.1, "prefix": 0.1}
PROMPT = "<|user|>3+4?<|end|><|assistant|>\n"


def options(method: str, **others: object) -> dict:
    return {**QUICK, "method": method, "learning_rate": RATES.get(method, 5e-3), **others}


def report_of(out: Path) -> dict:
    return json.loads((out / "training.json").read_text())


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_model(make_tiny("llama", tmp_path_factory.mktemp("methods") / "llama"))


class Stopped(BaseException):
    """Stands for a kill: nothing of the package catches it."""


def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next training ends right after its checkpoint of this step."""
    on_save = training.Watch.on_save

    def save_and_stop(self, args, state, control, **others) -> None:
        on_save(self, args, state, control, **others)
        if state.global_step == step:
            raise Stopped

    monkeypatch.setattr(training.Watch, "on_save", save_and_stop)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_resumes_and_leaves_the_callers_model(
    lm: LM, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(lm)
    chosen = options(method, save_steps=4)
    straight = finetune(lm, RECORDS, tmp_path / "straight", **chosen)
    report = report_of(tmp_path / "straight")
    assert report["loss"]["last"] < 0.9 * report["loss"]["first"]
    with monkeypatch.context() as patch:
        stopped_at(4, patch)
        with pytest.raises(Stopped):
            finetune(lm, RECORDS, tmp_path / "killed", **chosen)
    assert not (tmp_path / "killed" / "training.json").exists()
    resumed = finetune(lm, RECORDS, tmp_path / "killed", **chosen)
    assert report_of(tmp_path / "killed")["resumed_from_step"] == 4
    weights = [name for name in report["files"] if name.endswith((".safetensors", ".jsonl"))]
    assert len(weights) == 2
    for name in weights:
        assert sha256(tmp_path / "killed" / name) == sha256(tmp_path / "straight" / name), name
    assert type(resumed) is type(straight) and (isinstance(straight, Path) == (method == "full"))
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    written = (tmp_path / "straight" / "training.json").stat().st_mtime_ns
    assert finetune(lm, RECORDS, tmp_path / "straight", **chosen) == straight
    assert (tmp_path / "straight" / "training.json").stat().st_mtime_ns == written


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_counts_what_is_trained(lm: LM, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = training.make_trainer
    monkeypatch.setattr(training, "make_trainer", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    out = finetune(lm, RECORDS, tmp_path / "a", **options(method, epochs=1, rank=4, virtual_tokens=3))
    trained = sum(p.numel() for p in made[0].model.parameters() if p.requires_grad)
    assert report_of(tmp_path / "a")["adapter_parameters"] == trained
    if method == "full":
        assert trained == lm.model.num_parameters()
        return
    saved = load_file(out.path / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) == trained
    names = {"dora": "magnitude", "prompt": "prompt_embeddings", "prefix": "prompt_embeddings"}
    assert any(names.get(method, "lora_A") in name for name in saved)


@pytest.mark.parametrize("method", ["dora", "rslora", "prompt", "prefix"])
def test_what_was_trained_equals_peft_as_a_condition(lm: LM, method: str, tmp_path: Path) -> None:
    adapter = finetune(lm, RECORDS, tmp_path / "a", **options(method, epochs=2))
    ids = torch.tensor([lm.encode(PROMPT)])
    wrapped = PeftModel.from_pretrained(load_model(lm.name).model, str(adapter.path)).eval()
    with torch.no_grad(), lm.apply(adapter):
        found = lm.model(ids).logits
        theirs = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -ids.shape[1] :]
    torch.testing.assert_close(found, theirs, atol=1e-4, rtol=1e-4)
    assert (found - lm.model(ids).logits).abs().max() > 1e-3
    reason = report_of(tmp_path / "a")["reasons"]["packing"]
    assert ("only the first would stand right behind them" in reason) == (method in ("prompt", "prefix"))


def test_all_weights_make_a_model_folder(lm: LM, tmp_path: Path) -> None:
    chosen = options("full", epochs=20, learning_rate=3e-3)
    folder = finetune(lm, RECORDS, tmp_path / "whole", **chosen)
    tuned = load_model(folder)
    assert folder == tmp_path / "whole" and {"config.json", "tokenizer.json"} <= {f.name for f in folder.iterdir()}
    assert tuned.generate([PROMPT], max_new_tokens=20)[0].text.startswith("The answer is")
    assert not lm.generate([PROMPT], max_new_tokens=20)[0].text.startswith("The answer is")
    assert tuned.render([{"role": "user", "content": "1"}]) == lm.render([{"role": "user", "content": "1"}])
    moved = [name for name, value in tuned.model.state_dict().items() if not torch.equal(value, fingerprint(lm)[name])]
    assert set(moved) == set(tuned.model.state_dict())  # embeddings and norms too
    assert tuned.revision != lm.revision


def test_default_rates_follow_the_method(lm: LM, tmp_path: Path) -> None:
    rates = {}
    for method in ("lora", "full"):
        finetune(lm, RECORDS[:4], tmp_path / method, **{**options(method, epochs=1), "learning_rate": None})
        rates[method] = report_of(tmp_path / method)["parameters"]["learning_rate"]
    assert rates["full"] == pytest.approx(rates["lora"] / 10)


@pytest.mark.parametrize("method", ["qlora", "dora", "prompt", "prefix"])
def test_methods_over_four_bit_weights(lm: LM, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = training.make_trainer
    monkeypatch.setattr(training, "make_trainer", lambda *a, **k: made.append(real(*a, **k)) or made[-1])
    quantization = "auto" if method == "qlora" else "nf4"
    adapter = finetune(lm, RECORDS, tmp_path / "a", **options(method, quantization=quantization))
    layers = [m for m in made[0].model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 7 * len(lm.blocks)
    # double quantisation: the scales of the blocks are in 8 bits, with scales of their own
    assert all(layer.weight.quant_state.nested and layer.weight.quant_type == "nf4" for layer in layers)
    assert all(layer.weight.quant_state.absmax.dtype == torch.uint8 for layer in layers)
    report = report_of(tmp_path / "a")
    assert report["quantization"] == "nf4" and report["loss"]["last"] < report["loss"]["first"]
    four = load_model(lm.name, quantization="nf4")
    ids = torch.tensor([four.encode(PROMPT)])
    before = four.model(ids).logits
    with torch.no_grad(), four.apply(adapter):
        assert (four.model(ids).logits - before).abs().max() > 1e-3
    assert torch.equal(four.model(ids).logits, before)


def test_qlora_is_lora_over_four_bit_weights(lm: LM, tmp_path: Path) -> None:
    chosen = options("lora", epochs=1)
    for name, change in (("a", {"method": "qlora", "quantization": "auto"}), ("b", {"quantization": "nf4"})):
        finetune(lm, RECORDS, tmp_path / name, **{**chosen, **change})
    assert sha256(tmp_path / "a" / "adapter_model.safetensors") == sha256(tmp_path / "b" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "magic"}, "method='magic' is not known. Choose one of: lora"),
        ({"method": "qlora", "quantization": "none"}, "method='qlora'.*quantization='none'"),
        ({"method": "full", "quantization": "nf4"}, "method='full'.*quantization='nf4'"),
        ({"method": "prompt", "targets": ["q_proj"]}, r"targets=\['q_proj'\] belongs to LoRA.*method='prompt'"),
        ({"method": "full", "dropout": 0.1}, "dropout=0.1 belongs to LoRA.*method='full'"),
        ({"method": "prefix", "virtual_tokens": 0}, "virtual_tokens=0 is too small"),
    ],
)
def test_contradictions_are_refused_by_name(lm: LM, tmp_path: Path, wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finetune(lm, RECORDS, tmp_path / "a", **{"quantization": "auto", **wrong})
    assert not (tmp_path / "a").exists()


def test_models_that_a_method_cannot_train_are_refused(lm: LM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"method='full'.*loaded with quantization='nf4'"):
        finetune(load_model(lm.name, quantization="nf4"), RECORDS, tmp_path / "a", method="full")
    sliding = load_model(make_tiny("gemma3", tmp_path / "gemma3"))
    with pytest.raises(ModelError, match="layers of another kind"):
        finetune(sliding, RECORDS, tmp_path / "a", method="prefix")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("method", ["lora", "dora", "prompt", "prefix"])
def test_training_goes_on_from_an_adapter(lm: LM, method: str, tmp_path: Path) -> None:
    """At a rate of almost nothing it stays what it was, and it learns on from there, not from the beginning."""
    first = finetune(lm, RECORDS, tmp_path / "first", **options(method, rank=4, virtual_tokens=3))
    still = finetune(lm, RECORDS, tmp_path / "still", **options(method, learning_rate=1e-12, start=first))
    old, new = (load_file(adapter.path / "adapter_model.safetensors") for adapter in (first, still))
    assert old.keys() == new.keys()
    assert all(torch.allclose(old[name], new[name], atol=1e-6) for name in old)
    finetune(lm, RECORDS, tmp_path / "on", **options(method, start=first))
    begun, went_on = report_of(tmp_path / "first"), report_of(tmp_path / "on")
    assert went_on["loss"]["first"] < begun["loss"]["first"]
    assert went_on["settings"]["start"] == sha256(first.path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"other settings .*start"):
        finetune(lm, RECORDS, tmp_path / "on", **options(method, start=Adapter(tmp_path / "on")))
    with pytest.raises(ValueError, match=f"was trained with method='{method}', but method='rslora'"):
        finetune(lm, RECORDS, tmp_path / "other", **options("rslora", start=first))


def test_the_card_says_what_was_done(lm: LM, tmp_path: Path) -> None:
    adapter = finetune(lm, RECORDS, tmp_path / "a", **options("lora"))
    card, report = (adapter.path / "README.md").read_text(), report_of(adapter.path)
    for part in (lm.name, lm.revision, f"{len(RECORDS)} records", report["settings"]["records"][:16], "rank 16"):
        assert part in card
    assert f"{report['loss']['last']:.4f} at the last" in card
    assert isinstance(adapter, Adapter)


def test_pausing_all_weights_and_packing_a_given_order_are_refused(lm: LM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pauses with an adapter, and method='full' makes none"):
        finetune(lm, RECORDS, tmp_path / "a", method="full", until=0.5)
    with pytest.raises(ValueError, match="order='given' keeps the records' order"):
        finetune(lm, RECORDS, tmp_path / "b", order="given")
    assert not list(tmp_path.iterdir())


def test_records_are_learnt_in_the_order_given(lm: LM, tmp_path: Path) -> None:
    """The first batch's loss is that of the first records alone; shuffled, it is another."""
    ordered = QUICK | {"packing": False, "batch_size": 4, "epochs": 1, "learning_rate": 1e-9}
    seen = {}
    for order in ("given", "shuffled"):
        finetune(lm, RECORDS, tmp_path / order, order=order, **ordered)
        lines = (tmp_path / order / "losses.jsonl").read_text().splitlines()
        seen[order] = [json.loads(line)["loss"] for line in lines]
    for place in (0, 1):
        part = RECORDS[4 * place : 4 * place + 4]
        finetune(lm, part, tmp_path / f"alone-{place}", **ordered)
        alone = json.loads((tmp_path / f"alone-{place}" / "losses.jsonl").read_text().splitlines()[0])["loss"]
        assert seen["given"][place] == pytest.approx(alone, rel=1e-4)
    assert seen["shuffled"] != pytest.approx(seen["given"], rel=1e-3)


def test_the_dropout_asked_for_holds_not_that_of_the_start(lm: LM, tmp_path: Path) -> None:
    """Going on from an adapter, as it was or with another dropout in its own settings, is the same."""
    few = RECORDS[:8]
    first = finetune(lm, few, tmp_path / "first", **options("lora", epochs=1))
    other = tmp_path / "other"
    shutil.copytree(first.path, other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "lora_dropout": 0.5}))
    weights = {}
    for name, start, dropout in (("plain", first, 0.0), ("none", Adapter(other), 0.0), ("some", first, 0.5)):
        made = finetune(lm, few, tmp_path / name, **options("lora", epochs=2, start=start, dropout=dropout))
        weights[name] = sha256(made.path / "adapter_model.safetensors")
    assert weights["none"] == weights["plain"] != weights["some"]
