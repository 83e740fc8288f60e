"""Plans before training: what does not fit is refused before loading, and the settings suggested instead pass."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.test_finetune import QUICK, RECORDS, record
from tests.test_methods import Stopped, stopped_at
from workbench.files import sha256
from workbench.finetuning import finetune
from workbench.finetuning.fitting import fit, nearest
from workbench.finetuning.memory import ADAPTER_BYTES, LIBRARIES, LIMIT, SHARE, count_activations, linear_layers, plan
from workbench.finetuning.recipe import Recipe
from workbench.models import LM, load_model
from workbench.synthesis.records import RecordError

LENGTHS = [40] * 30 + [60] * 8 + [200] * 2
RECIPE = Recipe(16, 32, "all-linear", 1, 1e-3, 512, 8, 4096, "none", True, 0.0, 0.0, 0, 10, checkpointing=False)


@pytest.fixture(scope="module")
def lm(tiny) -> LM:
    return load_model(tiny("llama"))


@pytest.mark.parametrize("packing", [True, False])
def test_every_suggestion_passes_and_the_first_setting_is_changed_first(lm: LM, packing: bool) -> None:
    recipe = replace(RECIPE, packing=packing)
    kept = count_activations(lm.model, linear_layers(lm.model, "all-linear")[0])
    need = fit(lm, recipe, LENGTHS, free=10**12)[0].bytes_needed
    names = []
    for share in (0.95, 0.7, 0.5, 0.3):
        free = int((LIBRARIES + share * (need - LIBRARIES)) / LIMIT)
        with pytest.raises(ValueError, match=r"Training needs about [\d,]+ bytes"):
            fit(lm, recipe, LENGTHS, free)
        found = nearest(lm, recipe, LENGTHS, free, kept)
        assert found is not None
        changes, planned = found
        longest = changes.get("max_length", recipe.max_length)
        left = [length for length in LENGTHS if length <= longest]
        again, _ = fit(lm, replace(recipe, **changes), left, free)  # does not raise
        assert again.bytes_needed == planned.bytes_needed <= LIMIT * free
        names.append(list(changes))
    assert names[0] == ["batch_tokens" if packing else "batch_size"]
    assert fit(lm, recipe, LENGTHS, int(need / LIMIT) + 1)[0].bytes_needed == need
    assert nearest(lm, recipe, LENGTHS, 1000, kept) is None


def test_a_run_that_does_not_fit_is_refused_before_loading(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("workbench.finetuning.load_base", loaded)
    options: dict[str, Any] = {**QUICK, "checkpointing": False}
    with pytest.raises(ValueError, match="The nearest settings that fit: ") as refused:
        finetune(lm, RECORDS, tmp_path / "a", memory=LIBRARIES + 5_000_000, **options)
    assert not (tmp_path / "a").exists()
    words = re.search(r"fit: (.*) \(about", str(refused.value))
    assert words is not None
    changes = dict(pair.split("=") for pair in words[1].split(", "))
    assert changes.keys() <= {"batch_tokens", "max_length", "rank", "quantization", "checkpointing"}


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_methods_that_are_never_packed_are_planned_as_padded(lm: LM, method: str) -> None:
    """packing=True is their default too, and their rows are padded all the same."""
    recipe = replace(RECIPE, method=method, checkpointing=None)
    planned, row = fit(lm, recipe, LENGTHS, free=10**12)
    assert (planned, row) == fit(lm, replace(recipe, packing=False), LENGTHS, free=10**12)
    assert planned.bytes_needed == sum(planned.parts.values())
    assert planned.parts["adapter"] == ADAPTER_BYTES * planned.adapter_parameters
    tight, _ = fit(lm, recipe, LENGTHS, free=int(1.2 * planned.bytes_needed))  # others would save memory here
    assert (
        tight.checkpointing == (method == "prompt")
        and (tight.bytes_needed < planned.bytes_needed) == tight.checkpointing
    )


def test_a_begun_run_keeps_its_quantization_and_refuses_another_dtype(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is short on the day of the resume must not turn the second half of a run into another one."""
    options: dict[str, Any] = {**QUICK, "quantization": "auto", "epochs": 3, "save_steps": 2}
    straight = finetune(lm, RECORDS, tmp_path / "straight", **options)
    with monkeypatch.context() as patch:
        stopped_at(2, patch)
        with pytest.raises(Stopped):
            finetune(lm, RECORDS, tmp_path / "killed", **options)
    need = plan(lm.model, 4, "all-linear", 256, "none", free=10**12, checkpointing=True).bytes_needed
    short = int(need / SHARE) - 1000
    assert plan(lm.model, 4, "all-linear", 256, "auto", free=short).quantization == "nf4"
    with pytest.raises(ValueError, match=r"begun with dtype torch.float32, and the model now has torch.bfloat16"):
        finetune(load_model(lm.name, dtype="bfloat16"), RECORDS, tmp_path / "killed", **options)
    killed = finetune(lm, RECORDS, tmp_path / "killed", memory=short, **options)
    report = json.loads((killed.path / "training.json").read_text())
    assert report["resumed_from_step"] == 2 and report["quantization"] == "none"
    assert report["reasons"]["quantization"] == "none: what this run was begun with"
    assert sha256(killed.path / "adapter_model.safetensors") == sha256(straight.path / "adapter_model.safetensors")


def test_held_out_records_are_read_before_anything_begins(
    lm: LM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = [record("9+9?", "The answer is 18."), record("9+8?", "The answer is 17" + "." * 80)]
    with pytest.raises(RecordError, match="held_out: all 1 kept records are longer than max_length=60"):
        finetune(lm, RECORDS, tmp_path / "a", held_out=held_out[1:], max_length=60, **QUICK)
    with pytest.raises(ValueError, match="max_length=0 is too small"):
        finetune(lm, RECORDS, tmp_path / "a", max_length=0, **QUICK)
    assert not (tmp_path / "a").exists()
    finetune(lm, RECORDS, tmp_path / "a", held_out=held_out, max_length=60, epochs=1, **QUICK)
    assert "held_out: 1 records left out, longer than 60 tokens" in capsys.readouterr().out
