"""The chooser of training variants: real trainings of tiny models, wrong ones refused however fast, answers kept."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench import training as bench
from tests.test_finetune import QUICK, RECORDS
from tests.tiny import tiny_tokenizer
from workbench.files import sha256
from workbench.finetuning import fastest as module
from workbench.finetuning import finetune
from workbench.finetuning.fastest import REFERENCE, Measured, Variant, candidates, fastest, judge, measure, variants
from workbench.finetuning.folders import ADAPTER_FILES
from workbench.models import LM, load_model

ROW = 96
EXAMPLES = bench.patterns(ROW * 6, ROW, 90)


@pytest.fixture
def makers(tiny: Callable[[str], Path], tmp_path: Path) -> dict[str, Callable[[], Any]]:
    """The reference and one other right variant, each a fresh trainer of a tiny Llama."""
    make = partial(load_model, tiny("llama"))
    chosen = [REFERENCE, Variant(checkpointing=False, loss="full", attention="eager")]
    return {one.name: partial(bench.ours, make, one, EXAMPLES, ROW, False, tmp_path) for one in chosen}


@pytest.fixture
def lm(tiny: Callable[[str], Path]) -> LM:
    return load_model(tiny("llama"))


def spoiled(make: Callable[[], Any], how: str) -> Any:
    """A trainer that computes another loss, or lets packed records read each other."""
    trainer = make()
    right = trainer.compute_loss

    def wrong(model: Any, inputs: dict[str, Any], **arguments: Any) -> Any:
        if how == "mask":
            return right(model, {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}, **arguments)
        return 1.001 * right(model, inputs, **arguments)

    trainer.compute_loss = wrong
    return trainer


def test_right_variants_agree_and_wrong_ones_are_never_chosen(
    lm: LM, makers: dict[str, Callable[[], Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = makers[REFERENCE.name]
    spoilt = {how: partial(spoiled, reference, how) for how in ("mask", "loss")}
    all_makers = {**makers, **spoilt}

    def as_if_quick(name: str, make: Callable[[], Any], steps: int) -> Measured:
        found = measure(name, make, steps)  # measured in earnest; only the speed of the wrong ones is made up
        return replace(found, tokens_per_second=1e12) if name in spoilt else found

    monkeypatch.setattr(module, "measure", as_if_quick)
    winner, reason = fastest(lm, all_makers, {"row": ROW}, steps=4, folder=tmp_path / "kept")
    assert winner in makers and "4 measured, 2 of them wrong" in reason
    report = json.loads(next((tmp_path / "kept").iterdir()).read_text())
    verdicts = {one["name"]: one["verdict"] for one in report["measured"]}
    assert {name: verdict for name, verdict in verdicts.items() if verdict == "ok"}.keys() == makers.keys()
    assert verdicts["mask"].startswith("wrong: losses differ by")
    assert verdicts["loss"].startswith("wrong: losses differ by")
    assert all(len(one["losses"]) == 4 and one["tokens_per_second"] > 0 for one in report["measured"])


def test_an_answer_is_kept_by_model_and_settings(
    lm: LM, makers: dict[str, Callable[[], Any]], tiny: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made: list[str] = []

    def counted(name: str) -> Any:
        made.append(name)
        return makers[name]()

    counting = {name: partial(counted, name) for name in makers}
    first, _ = fastest(lm, counting, {"row": ROW}, steps=3)
    assert made == list(makers)
    again, reason = fastest(lm, counting, {"row": ROW}, steps=3)
    assert again == first and "measured before on cpu" in reason and made == list(makers)
    fastest(lm, counting, {"row": 2 * ROW}, steps=3)
    assert made == [*makers, *makers], "other settings were answered from the cache"
    fastest(load_model(tiny("qwen3")), counting, {"row": ROW}, steps=3)
    assert made == [*makers, *makers, *makers], "another model was answered from the cache"
    assert len(list((tmp_path / "cache" / "workbench").glob("fastest-*.json"))) == 3


def test_a_variant_that_cannot_run_is_passed_over(
    makers: dict[str, Callable[[], Any]], tiny: Any, tmp_path: Path
) -> None:
    flex = Variant(checkpointing=False, attention="flex_attention")
    make = partial(bench.ours, partial(load_model, tiny("gpt2")), flex, EXAMPLES, ROW, False, tmp_path)
    failed = measure(flex.name, make, 3)
    assert failed.verdict.startswith("failed: ValueError: GPT2LMHeadModel does not support")
    right = Measured("reference", [2.0, 1.0], [1.0, 1.0], 10.0, 0)
    assert [one.verdict for one in judge([right, failed], 1e-4)] == ["ok", failed.verdict]
    with pytest.raises(ValueError, match="did not run, so none can be judged"):
        judge([failed, right], 1e-4)
    with pytest.raises(ValueError, match="steps=2"):
        measure("short", makers[REFERENCE.name], 2)


def test_losses_that_are_no_numbers_or_too_few_are_wrong() -> None:
    right = Measured("reference", [2.0, 1.0], [1.0, 1.0], 10.0, 0)
    others = [
        replace(right, losses=[2.0, float("nan")]),
        replace(right, losses=[2.0]),
        replace(right, norms=[1.0, 1.1]),
    ]
    assert [one.verdict[:5] for one in judge([right, *others], 1e-2)] == ["ok", "wrong", "wrong", "wrong"]


def test_the_sweep_is_whole_and_begins_with_the_reference() -> None:
    found = variants()
    assert found[0] == REFERENCE and len(found) == len(set(found)) == 2 * 2 * 2 * 3
    assert len({one.name for one in found}) == len(found)


def test_the_bench_runs_at_tiny_scale_in_four_bits_too() -> None:
    for four in (False, True):
        lines, found = bench.sweep(
            "3B", four, tiny_tokenizer(), steps=3, tiny=True, device=torch.device("cpu"), kernels=("sdpa",),
            compiling=False,
        )  # fmt: skip
        assert [line["verdict"].removesuffix(", chosen") for line in lines] == ["ok"] * 5
        assert sum(line["verdict"].endswith(", chosen") for line in lines[:-1]) == 1
        assert lines[-1]["variant"] == "TRL's defaults" and found[-1].tokens_per_second > 0


def test_finetune_on_a_cpu_says_that_the_choice_is_for_gpus_and_changes_nothing(lm: LM, tmp_path: Path) -> None:
    plain = finetune(lm, RECORDS, tmp_path / "plain", epochs=1, **QUICK)
    asked = finetune(lm, RECORDS, tmp_path / "asked", epochs=1, fastest=True, **QUICK)
    assert sha256(asked.path / ADAPTER_FILES[0]) == sha256(plain.path / ADAPTER_FILES[0])
    reports = [json.loads((each.path / "training.json").read_text()) for each in (plain, asked)]
    assert "variant" not in reports[0]["reasons"]
    assert (
        reports[1]["reasons"]["variant"] == "as it is: fastest=True chooses kernels for GPUs, and the model is on cpu"
    )


def test_finetune_trains_with_the_fastest_right_variant(
    lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with kernels that a CPU has; the speeds alone are made up."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    own, quick = Variant(checkpointing=False), Variant(checkpointing=False, attention="eager")
    monkeypatch.setattr(module, "candidates", lambda lm, checkpointing: [own, quick])
    measured, built = [], []

    def as_if_quick(name: str, make: Callable[[], Any], steps: int) -> Measured:
        measured.append(name)
        return replace(measure(name, make, steps), tokens_per_second=float(len(measured)))

    monkeypatch.setattr(module, "measure", as_if_quick)
    real = module.prepare
    monkeypatch.setattr(module, "prepare", lambda model, variant: built.append(variant) or real(model, variant))
    plain = finetune(lm, RECORDS, tmp_path / "plain", epochs=1, **QUICK)
    found = finetune(lm, RECORDS, tmp_path / "found", epochs=1, fastest=True, **QUICK)
    assert measured == [own.name, quick.name] and built == [own, quick, quick]
    kept = json.loads(next((tmp_path / "cache" / "workbench").iterdir()).read_text())
    assert kept["winner"] == quick.name and {one["verdict"] for one in kept["measured"]} == {"ok"}
    report = json.loads((found.path / "training.json").read_text())
    assert report["reasons"]["variant"].startswith(f"{quick.name}: 2.00 times the reference; 2 measured, 0 of them")
    ours, theirs = (load_file(each.path / ADAPTER_FILES[0]) for each in (found, plain))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-4) for name in theirs)
    again = finetune(lm, RECORDS, tmp_path / "again", epochs=1, fastest=True, **QUICK)
    assert len(measured) == 2 and built[3:] == [quick]  # the answer was kept
    assert sha256(again.path / ADAPTER_FILES[0]) == sha256(found.path / ADAPTER_FILES[0])


def test_candidates_for_a_gpu_begin_with_the_models_own_kernel(lm: LM) -> None:
    assert candidates(lm, False) == []
    gpu = SimpleNamespace(device=torch.device("cuda"), model=lm.model)
    found = candidates(gpu, True)  # type: ignore[arg-type]
    assert found[0] == Variant(True, attention=lm.model.config._attn_implementation)
    assert len(found) == len(set(found)) == 6 and all(one.checkpointing and one.loss == "chunked" for one in found)
