"""Plans before training: what does not fit is refused before loading, and the settings suggested instead pass."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.test_finetune import QUICK, RECORDS
from workbench.finetuning import finetune
from workbench.finetuning.fitting import fit, nearest
from workbench.finetuning.memory import LIBRARIES, LIMIT, count_activations, linear_layers
from workbench.finetuning.recipe import Recipe
from workbench.models import LM, load_model

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
