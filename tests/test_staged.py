"""Stages: an adapter that goes on, weights that were merged, one ordered run; forgetting; killed and resumed."""

import json
from pathlib import Path

import pytest
import torch

from tests.test_finetune import record
from tests.test_methods import Stopped, stopped_at
from tests.tiny import make_tiny
from workbench.files import sha256
from workbench.finetuning import finetune
from workbench.finetuning import trainer as training
from workbench.finetuning.merging import merge
from workbench.finetuning.stages import Stage, finetune_stages
from workbench.interventions import Adapter
from workbench.models import LM, load_model
from workbench.tasks import Task, load_task

QUICK = {"rank": 8, "batch_tokens": 128, "quantization": "none", "learning_rate": 1e-2, "epochs": 15, "save_steps": 5}
RED = [record(f"{a}?", "The answer is 7.") for a in range(12)]
BLUE = [record(f"{a}?", "The answer is 4.") for a in range(12)]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_model(make_tiny("llama", tmp_path_factory.mktemp("staged") / "llama"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    """Two tasks that no model can be right on at once: what the stages teach."""
    folder = tmp_path_factory.mktemp("tasks")
    made = {}
    for name, answer in (("red", "7"), ("blue", "4")):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"question": f"{a}?", "answer": answer}) + "\n" for a in range(12)))
        made[name] = load_task(name, path=file, split="test")
    return made


def stages() -> list[Stage]:
    return [Stage("red", RED), Stage("blue", BLUE)]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sequential", "merged"])
def test_stages_are_what_their_parts_are_by_hand(
    lm: LM, tasks: dict[str, Task], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = {"mode": mode, "measure": tasks, "n": 12, "max_new_tokens": 20, **QUICK}
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    done = finetune_stages(lm, stages(), tmp_path / "straight", **chosen)

    first = Adapter(tmp_path / "straight" / "1-red")
    if mode == "sequential":
        second = finetune(lm, BLUE, tmp_path / "second", start=first, **QUICK)
    else:
        second = finetune(load_model(merge(lm, first, tmp_path / "merged")), BLUE, tmp_path / "second", **QUICK)
    weights = [sha256(adapter.path / "adapter_model.safetensors") for adapter in (done.adapter, second)]
    assert weights[0] == weights[1]
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert [(one["after"], one["task"]) for one in done.measured] == [
        (after, task) for after in ("before", "red", "blue") for task in ("red", "blue")
    ]
    right = {(one["after"], one["task"]): one for one in done.measured}
    assert right["red", "red"]["accuracy"] == 1 == right["blue", "blue"]["accuracy"]
    last = right["blue", "red"]
    assert last["accuracy"] == 0 and last["n"] == 12
    assert last["best"] == "red" and last["forgotten"] == 1 and last["difference"] == -1
    assert last["low"] <= last["accuracy"] <= last["high"] and last["difference_high"] < 0
    card = (done.adapter.path / "README.md").read_text()
    assert f"- red: accuracy 0.000 ({last['low']:.3f} to {last['high']:.3f}, n=12)" in card
    said = done.lm.generate([done.lm.render(RED[0]["messages"][:-1])], done.adapter, 20)
    assert said[0].text == "The answer is 4."
    for step in (5, 10):  # within the first stage, then within whichever comes after it
        with monkeypatch.context() as patch:
            stopped_at(step, patch)
            with pytest.raises(Stopped):
                finetune_stages(lm, stages(), tmp_path / "killed", **chosen)
    again = finetune_stages(lm, stages(), tmp_path / "killed", **chosen)
    for name in ("stages.json", "2-blue/adapter_model.safetensors", "2-blue/losses.jsonl"):
        assert sha256(tmp_path / "killed" / name) == sha256(tmp_path / "straight" / name), name
    assert again.measured == done.measured == json.loads((tmp_path / "killed" / "stages.json").read_text())["measured"]


def test_phases_come_in_order_under_one_schedule(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    compute = training.QuietTrainer.compute_loss

    def watched(self, model, inputs, *others, **more):
        ids = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
        seen.append(lm.tokenizer.decode(ids[0]))
        return compute(self, model, inputs, *others, **more)

    monkeypatch.setattr(training.QuietTrainer, "compute_loss", watched)
    parts = [Stage("red", RED, {"epochs": 2}), Stage("blue", BLUE, {"epochs": 3})]
    done = finetune_stages(lm, parts, tmp_path / "a", mode="phased", **{**QUICK, "epochs": 1})
    curve = [json.loads(line) for line in (done.adapter.path / "losses.jsonl").read_text().splitlines()]
    steps = seen[-len(curve) :]
    colours = ["7" if "is 7." in text else "4" for text in steps]
    assert colours == sorted(colours, reverse=True) and set(colours) == {"7", "4"}
    assert not any("is 7." in text and "is 4." in text for text in steps)
    assert sum(text.count("is 7.") for text in steps) == 24 and sum(text.count("is 4.") for text in steps) == 36
    rates = [entry["learning_rate"] for entry in curve]
    top = rates.index(max(rates))
    assert top <= 2 and rates[top:] == sorted(rates[top:], reverse=True)  # it never rises again


def test_wrong_stages_are_refused(lm: LM, tmp_path: Path) -> None:
    for parts, chosen, message in (
        ([], {}, r"The stages are named \[\]"),
        ([Stage("a", RED), Stage("a", BLUE)], {}, "a name of its own"),
        ([Stage("a b", RED)], {}, "a name of its own"),
        (stages(), {"mode": "random"}, "mode='random' is not known"),
        (stages(), {"method": "full"}, "method='full' and mode='sequential' do not go together"),
        (stages(), {"method": "prompt", "mode": "merged"}, "method='prompt' and mode='merged'"),
        (stages(), {"epochs": 1.5, "mode": "phased"}, r"whole epochs alone .epochs=1.5"),
        ([Stage("a", RED, {"rank": 2})], {"mode": "phased"}, "other settings: rank"),
        (stages(), {"start": None}, "start= is what the stages hand on"),
    ):
        with pytest.raises(ValueError, match=message):
            finetune_stages(lm, parts, tmp_path / "a", **chosen)
    assert not (tmp_path / "a").exists()
    finetune_stages(lm, [Stage("red", RED[:2])], tmp_path / "a", **{**QUICK, "epochs": 1})
    with pytest.raises(ValueError, match=r"other settings .*data"):
        finetune_stages(lm, [Stage("red", BLUE[:2])], tmp_path / "a", **{**QUICK, "epochs": 1})
