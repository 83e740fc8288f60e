"""Merged weights against the 4-bit model with its adapter applied, and against the wrong way to merge."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests.test_finetune import RECORDS, fingerprint
from tests.tiny import make_tiny
from workbench.finetuning import finetune
from workbench.finetuning.merging import merge
from workbench.interventions.adapter import quiet_peft
from workbench.models import LM, ModelError, load_model

QUICK = {"batch_tokens": 256, "epochs": 4, "batch_size": 8, "learning_rate": 5e-3, "rank": 4}
PROMPTS = ["<|user|>3+4?<|end|><|assistant|>\n", "abc"]


def logits(lm: LM) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([lm.model(torch.tensor([lm.encode(prompt)])).logits[0] for prompt in PROMPTS])


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def lm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_model(make_tiny(request.param, tmp_path_factory.mktemp("merging") / request.param))


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_merged_equals_four_bits_with_the_adapter(lm: LM, method: str, tmp_path: Path) -> None:
    if lm.model.config.model_type == "gpt2" and method == "rslora":
        pytest.skip("one architecture is enough for a scaling that PEFT applies itself")
    adapter = finetune(lm, RECORDS, tmp_path / "a", method=method, quantization="nf4", **QUICK)
    four, before = load_model(lm.name, quantization="nf4"), fingerprint(lm)
    with four.apply(adapter):
        wanted = logits(four)
    folder = merge(lm, adapter, tmp_path / "merged", dtype="float32")
    assert difference(logits(load_model(folder)), wanted) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    given = merge(four, adapter, tmp_path / "given", dtype="float32")
    assert (given / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    # what many do: the same adapter in the weights from before quantisation
    with quiet_peft():
        wrong = PeftModel.from_pretrained(load_model(lm.name).model, str(adapter.path)).merge_and_unload()
    with torch.no_grad():
        other = torch.cat([wrong(torch.tensor([lm.encode(prompt)])).logits[0] for prompt in PROMPTS])
    assert difference(other, wanted) > 1e-2
    half = load_model(merge(lm, adapter, tmp_path / "half", dtype="bfloat16"), dtype="float32")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert 1e-5 < difference(logits(half), wanted) < 0.1


def test_merging_unquantised_weights_and_strength(lm: LM, tmp_path: Path) -> None:
    adapter = finetune(lm, RECORDS, tmp_path / "a", quantization="none", **QUICK)
    for strength in (1.0, 0.5, 0.0):
        folder = merge(lm.name, strength * adapter, tmp_path / f"merged{strength}")
        with lm.apply(strength * adapter):
            wanted = logits(lm)
        assert difference(logits(load_model(folder)), wanted) < 1e-5
    with pytest.raises(ValueError, match=r"trained over unquantised weights.*quantization='nf4'"):
        merge(load_model(lm.name, quantization="nf4"), adapter, tmp_path / "b")


def test_a_finished_merge_is_returned_and_another_refused(lm: LM, tmp_path: Path) -> None:
    adapter = finetune(lm, RECORDS[:8], tmp_path / "a", quantization="none", **QUICK)
    folder = merge(lm, adapter, tmp_path / "merged")
    written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert merge(lm, adapter, folder) == folder
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == written
    with pytest.raises(ValueError, match=r"started by merge with other settings .strength: 1.0 there, 0.5 now"):
        merge(lm, 0.5 * adapter, folder)
    with pytest.raises(ValueError, match="weights that were not merged here"):
        merge(lm, adapter, lm.name)
    (folder / "model.safetensors").write_bytes(b"damaged")
    merge(lm, adapter, folder)
    assert logits(load_model(folder)).shape[0] > 1
    card = (folder / "README.md").read_text()
    assert lm.revision in card and "8 records" in card and "float32" in card


def test_what_can_not_be_merged_is_refused(lm: LM, tmp_path: Path) -> None:
    for method, kind in (("prompt", "PROMPT_TUNING"), ("prefix", "PREFIX_TUNING")):
        chosen = {key: value for key, value in QUICK.items() if key != "rank"}
        adapter = finetune(lm, RECORDS[:4], tmp_path / method, method=method, quantization="none", **chosen)
        with pytest.raises(ValueError, match=f"is a {kind} adapter.*no weights to merge"):
            merge(lm, adapter, tmp_path / "merged")
    adapter = finetune(lm, RECORDS[:4], tmp_path / "a", quantization="none", **QUICK)
    with pytest.raises(ValueError, match="dtype='int8' is not known"):
        merge(lm, adapter, tmp_path / "merged", dtype="int8")
    other = load_model(make_tiny("llama", tmp_path / "other", seed=5))
    with pytest.raises(ValueError, match="Merge it into the model it was trained on"):
        merge(other, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and issubclass(ModelError, ValueError)


def test_a_base_that_was_replaced_on_disk_is_not_merged_into(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "base")
    lm = load_model(folder)
    adapter = finetune(lm, RECORDS[:8], tmp_path / "a", quantization="nf4", **{**QUICK, "epochs": 1})
    make_tiny("llama", folder, seed=5)
    with pytest.raises(ValueError, match=r"on disk is now revision .*, but the loaded model is"):
        merge(lm, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
