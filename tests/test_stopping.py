"""A cancelled training: it stops at once, leaves nothing behind, and goes on to the bytes of an uninterrupted one."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb
from tests.test_finetune import QUICK, RECORDS, record
from workbench.finetuning import finetune, stopping
from workbench.finetuning.pairs import Pair
from workbench.finetuning.preference import prefer
from workbench.finetuning.reporting import read_report
from workbench.finetuning.reward import reinforce
from workbench.finetuning.stopping import Cancelled, ask_to_cancel
from workbench.models import LM, load_model
from workbench.runs import heartbeats
from workbench.sweeps import sweep

HELD_OUT = [record(f"{a}+9?", f"The answer is {a + 9}.") for a in range(2, 8)]
SMALL: dict[str, Any] = {**QUICK, "epochs": 6, "batch_tokens": 1024, "save_steps": 4}  # 6 steps
FILES = ("adapter_model.safetensors", "losses.jsonl")


@pytest.fixture(scope="module")
def lm(tiny) -> LM:
    return load_model(tiny("llama"))


@pytest.fixture(autouse=True)
def looks_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of a tiny model are shorter than the pause between two looks."""
    monkeypatch.setattr(stopping, "LOOK_EVERY", 0.0)


def state_of(lm: LM) -> tuple[dict[str, torch.Tensor], list[Any], list[str]]:
    """Weights, hooks and modules of a model."""
    modules = dict(lm.model.named_modules())
    hooks = [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in modules.items()]
    return {name: value.clone() for name, value in lm.model.state_dict().items()}, hooks, list(modules)


def assert_clean(lm: LM, before: tuple[dict[str, torch.Tensor], list[Any], list[str]]) -> None:
    weights, hooks, modules = state_of(lm)
    assert weights.keys() == before[0].keys() and all(torch.equal(weights[name], before[0][name]) for name in weights)
    assert (hooks, modules) == before[1:]
    assert not any(parameter.grad is not None for parameter in lm.model.parameters())


def asking(folder: Path, step: int, by: str = "Ada") -> Callable[[list[dict[str, float]]], None]:
    """A `watch=` that asks for the end when it is shown a step."""
    return lambda rows: ask_to_cancel(folder, by) if rows[-1]["step"] == step else None


@pytest.mark.parametrize("scored", [False, True])
def test_cancelled_and_resumed_ends_in_the_bytes_of_the_uninterrupted(lm: LM, tmp_path: Path, scored: bool) -> None:
    """Asked for at step 2, so the run ends at step 3, before its first checkpoint; with scores at 4 too."""
    before = state_of(lm)
    options = {**SMALL, "held_out": HELD_OUT} if scored else SMALL
    straight = finetune(lm, RECORDS, tmp_path / "straight", **options)
    out = tmp_path / "out"
    with pytest.raises(Cancelled, match=r"^Cancelled at step 3 of 6 by Ada; run the same call to go on\.$"):
        finetune(lm, RECORDS, out, watch=asking(out, 2), **options)
    assert_clean(lm, before)
    assert not (out / "cancel").exists() and not (out / "training.json").exists()
    assert [path.name for path in (out / "checkpoints").glob("checkpoint-*")] == ["checkpoint-3"]  # nothing is lost
    assert read_report(out)[-1]["ended"].startswith("Cancelled at step 3")
    seen: list[float] = []
    finetune(lm, RECORDS, out, watch=lambda rows: seen.append(rows[-1]["step"]), **options)
    assert seen == [4, 5, 6] and not (out / "checkpoints").exists()
    for name in FILES:
        assert (out / name).read_bytes() == (straight.path / name).read_bytes(), name


def test_a_request_at_a_scored_checkpoint_goes_back_to_the_one_before(lm: LM, tmp_path: Path) -> None:
    options = {**SMALL, "held_out": HELD_OUT, "save_steps": 2}
    straight = finetune(lm, RECORDS, tmp_path / "straight", **options)
    out = tmp_path / "out"
    with pytest.raises(Cancelled, match="at step 4 of 6"):
        finetune(lm, RECORDS, out, watch=asking(out, 3), **options)
    assert [path.name for path in (out / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    finetune(lm, RECORDS, out, **options)
    for name in FILES:
        assert (out / name).read_bytes() == (straight.path / name).read_bytes(), name


def test_a_long_step_is_left_in_its_midst(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no patience the next forward pass ends it: several micro-batches a step, and none of them is finished."""
    monkeypatch.setattr(stopping, "PATIENCE", 0.0)
    before, out = state_of(lm), tmp_path / "out"
    straight = finetune(lm, RECORDS, tmp_path / "straight", **SMALL)
    with pytest.raises(Cancelled, match="at step 5 of 6 by Ada"):
        finetune(lm, RECORDS, out, watch=asking(out, 5), **SMALL)
    assert [path.name for path in (out / "checkpoints").glob("checkpoint-*")] == ["checkpoint-4"]
    assert_clean(lm, before)
    finetune(lm, RECORDS, out, **SMALL)
    for name in FILES:
        assert (out / name).read_bytes() == (straight.path / name).read_bytes(), name


def test_the_stop_button_leaves_the_model_clean_and_the_folder_to_go_on(lm: LM, tmp_path: Path) -> None:
    before, out = state_of(lm), tmp_path / "out"
    straight = finetune(lm, RECORDS, tmp_path / "straight", **SMALL)

    def press(rows: list[dict[str, float]]) -> None:
        if rows[-1]["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(lm, RECORDS, out, watch=press, **SMALL)
    assert_clean(lm, before)
    assert "finetune" not in heartbeats.CLOCKS and read_report(out)[-1]["ended"] == "KeyboardInterrupt"
    finetune(lm, RECORDS, out, **SMALL)
    for name in FILES:
        assert (out / name).read_bytes() == (straight.path / name).read_bytes(), name


def test_an_old_request_is_not_about_a_new_run_and_the_last_step_ends_it(lm: LM, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    ask_to_cancel(out)
    adapter = finetune(lm, RECORDS, out, watch=asking(out, 5), **SMALL)  # heard at step 6, when all is done
    assert (adapter.path / "training.json").exists()
    with pytest.raises(ValueError, match="There is no folder"):
        ask_to_cancel(tmp_path / "nowhere")


def test_a_request_before_the_first_step(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for while the base is loaded: the first pass that is timed is not made."""
    import workbench.finetuning as home

    monkeypatch.setattr(stopping, "PATIENCE", 0.0)
    out, real = tmp_path / "out", home._packing

    def slow(*arguments: Any) -> Any:
        ask_to_cancel(out)
        return real(*arguments)

    monkeypatch.setattr(home, "_packing", slow)
    with pytest.raises(Cancelled, match=r"^Cancelled before the first step; run the same call to go on"):
        finetune(lm, RECORDS, out, **SMALL)
    assert [line.get("doing") for line in read_report(out)] == ["preparing", None]
    monkeypatch.undo()
    assert (finetune(lm, RECORDS, out, **SMALL).path / "training.json").exists()


def test_another_thread_may_ask(lm: LM, tmp_path: Path) -> None:
    """As a panel's button does whose message comes in a thread of its own while this one trains."""
    out = tmp_path / "out"
    going = threading.Event()

    def press() -> None:
        going.wait(60)
        ask_to_cancel(out, "a panel")

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(Cancelled, match="by a panel"):
        finetune(lm, RECORDS, out, watch=lambda _: going.set(), **{**SMALL, "epochs": 2000})
    thread.join()


@pytest.mark.parametrize("kind", ["prefer", "reinforce"])
def test_preferences_and_rewards_listen_too(lm: LM, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = wb.load_task("chain-sum")
    sums = [(a, b) for a in range(2, 6) for b in range(2, 4)]
    pairs = [
        Pair(f"{a}+{b}", [{"role": "user", "content": f"{a}+{b}?"}], f"{a + b}.", f"{a - b}.", "1", "2", 3, 3)
        for a, b in sums
    ]

    def train(out: Path) -> Any:
        if kind == "prefer":
            return prefer(lm, pairs, out, epochs=2, batch_size=2, save_steps=3, rank=4, quantization="none")
        return reinforce(lm, task, out, steps=4, questions=1, answers=2, max_new_tokens=4, save_steps=3, rank=4,
                         quantization="none")  # fmt: skip

    straight, before = train(tmp_path / "straight"), state_of(lm)
    from workbench.finetuning.callbacks import Watch

    real, out = Watch.on_log, tmp_path / "out"

    def ask(self: Watch, args: Any, state: Any, control: Any, **more: Any) -> None:
        real(self, args, state, control, **more)
        if state.global_step == 1:
            ask_to_cancel(out, "Eve")

    monkeypatch.setattr(Watch, "on_log", ask)
    with pytest.raises(Cancelled, match=r"at step 2 of \d by Eve"):
        train(out)
    monkeypatch.undo()
    assert_clean(lm, before)
    train(out)
    assert json.loads((out / "training.json").read_text())["resumed_from_step"] == 2
    for name in FILES:
        assert (out / name).read_bytes() == (straight.path / name).read_bytes(), name


def test_a_sweep_listens_at_its_own_folder_and_goes_on(lm: LM, tmp_path: Path) -> None:
    options = {**SMALL, "rank": 4}
    options.pop("learning_rate")
    grid = {"learning_rate": [1e-3, 5e-3]}
    straight = sweep(lm, RECORDS, tmp_path / "straight", grid, held_out=None, rung=0.5, keep=0.5, **options)
    out = tmp_path / "out"
    with pytest.raises(Cancelled, match="at step 2 of 6 by Ada"):
        sweep(lm, RECORDS, out, grid, held_out=None, rung=0.5, keep=0.5, watch=asking(out, 1), **options)
    assert not (out / "cancel").exists()
    again = sweep(lm, RECORDS, out, grid, held_out=None, rung=0.5, keep=0.5, **options)
    columns = ["learning_rate", "steps", "loss", "stopped"]
    assert again.table()[columns].equals(straight.table()[columns])
    name = Path(again.table().adapter[0]).name
    assert (out / name / FILES[0]).read_bytes() == (straight.folder / name / FILES[0]).read_bytes()
