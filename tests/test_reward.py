"""Rewards: formulas by hand, gradients against REINFORCE written out, an interrupted run against a whole one."""

import json
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import make_tiny
from workbench.files import sha256
from workbench.finetuning import finetune
from workbench.finetuning.reward import Answer, parsed, reinforce, right, short
from workbench.interventions.adapter import Adapter
from workbench.models import LM, load_model
from workbench.tasks import Task, Verdict

QUICK: dict[str, Any] = {
    "quantization": "none", "learning_rate": 1e-2, "steps": 3, "questions": 2, "answers": 4, "max_new_tokens": 8,
}  # fmt: skip


def vowels(group: Sequence[Answer]) -> list[float]:
    """Share of vowels: something that a random model can be rewarded for."""
    assert threading.current_thread() is threading.main_thread()
    return [sum(letter in "aeiouAEIOU" for letter in each.text) / each.tokens for each in group]


@pytest.fixture(scope="module")
def lm(tmp_path_factory: pytest.TempPathFactory) -> LM:
    return load_model(make_tiny("llama", tmp_path_factory.mktemp("base") / "llama"))


@pytest.fixture(scope="module")
def start(lm: LM, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2."}]
    folder = tmp_path_factory.mktemp("start") / "sft"
    return finetune(lm, [{"messages": turns}] * 8, folder, rank=4, quantization="none", learning_rate=1e-2)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers that `reinforce` makes."""
    from workbench.finetuning import alignment

    kept: list[Any] = []
    real = alignment.make_grpo
    monkeypatch.setattr(alignment, "make_grpo", lambda *a, **k: kept.append(real(*a, **k)) or kept[-1])
    return kept


def curve(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]


def uneven(group: Sequence[Answer]) -> list[float]:
    """A number from 0 to 1 that differs between almost any two texts, whatever a random model says."""
    return [sum((place + 1) * ord(letter) for place, letter in enumerate(each.text)) % 11 / 10 for each in group]


def answer(correct: bool, tokens: int, parsed: bool = True, finished: bool = True) -> Answer:
    return Answer("x", correct, parsed, tokens, finished)


def test_rewards_by_hand() -> None:
    group = [answer(True, 10), answer(False, 10), answer(False, 20, parsed=False), answer(False, 30, finished=False)]
    assert right(group) == [1, 0, 0, 0]
    assert parsed(group) == [1, 0, -0.5, -0.5]
    assert parsed(group, penalty=2) == [1, 0, -2, -2]
    # lengths 10 to 30: the shortest is worth 0.5, the middle 0, the longest -0.5; a wrong one never gains
    assert short(group, weight=1) == [1.5, 0, 0, -0.5]
    assert short([answer(True, 30), answer(True, 10), answer(False, 20)], weight=0.2) == pytest.approx([0.9, 1.1, 0])
    assert short([answer(True, 7), answer(False, 7)]) == [1, 0]
    assert short(group, weight=0) == right(group)


def test_every_question_is_asked_as_generate_asks_it_and_judged_as_its_own(
    lm: LM, word_problems: Task, tmp_path: Path, made: list[Any]
) -> None:
    seen: list[str] = []

    def judge(row: dict[str, Any], text: str) -> Verdict:
        seen.append(row["id"])
        return Verdict(len(text) % 2 == 0, text or None)

    task = replace(word_problems, judge=judge)
    reinforce(lm, task, tmp_path / "out", seed=3, n=5, **QUICK)
    asked = [row["id"] for row in task.rows("train", n=5, seed=3)]
    assert seen == [row_id for row_id in [*asked, asked[0]] for _ in range(4)]  # six places, five questions in turn
    prompts = [lm.render(task.messages(row)) for row in task.rows("train", n=5, seed=3)]
    assert made[0]._tokenize_prompts(prompts)[0] == [lm.encode(prompt) for prompt in prompts]
    assert made[0].eos_token_ids == [lm.tokenizer.eos_token_id]
    steps = curve(tmp_path / "out")
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert step["sampled_tokens"] == pytest.approx(8 * step["length"])
        assert 0 <= step["right"] <= 1 and step["entropy"] > 0 and "kl" not in step


def test_an_answer_that_was_cut_off_is_not_right(lm: LM, word_problems: Task, tmp_path: Path) -> None:
    task = replace(word_problems, judge=lambda row, text: Verdict(True, "1"))
    reinforce(lm, task, tmp_path / "out", **QUICK)
    for step in curve(tmp_path / "out"):
        assert step["right"] == pytest.approx(1 - step["cut_off"])
        assert step["unparsed"] == 0


def direct_gradients(method: str, trainer: Any, batch: dict[str, torch.Tensor], top: float) -> dict[str, torch.Tensor]:
    """REINFORCE with the advantages of the batch, row by row and without padding (the ratio to the sampler is 1)."""
    model, rows, logs, entropies = trainer.model, len(batch["advantages"]), [], []
    for row in range(rows):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        text = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        logits = model(input_ids=torch.cat([prompt, text])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        every = logits.float().log_softmax(-1)
        logs.append(every.gather(-1, text[:, None])[:, 0])
        entropies.append(-(every.exp() * every).sum(-1).detach())
    edge = torch.quantile(torch.cat(entropies), 1 - top)
    total = sum(map(len, logs))
    loss = torch.zeros(())
    for row in range(rows):
        summed = (logs[row] * (entropies[row] >= edge)).sum() * batch["advantages"][row]
        size = {"grpo": rows * len(logs[row]), "dr-grpo": rows * 8, "dapo": total}[method]
        loss = loss - summed / size
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("method", "top"), [("grpo", 1.0), ("dr-grpo", 1.0), ("dapo", 1.0), ("grpo", 0.3)])
def test_gradients_are_those_of_reinforce(
    method: Any, top: float, lm: LM, start: Adapter, word_problems: Task, tmp_path: Path, made: list[Any]
) -> None:
    options = QUICK | {"steps": 1, "top_entropy": top, "start": start}
    reinforce(lm, word_problems, tmp_path / "out", method, reward=uneven, **options)
    trainer = made[0]
    trainer.model.train()
    trainer._buffered_inputs = None
    batch = trainer._prepare_inputs([trainer.train_dataset[number] for number in (0, 1) for _ in range(4)])
    assert batch["advantages"].abs().max() > 0.1
    direct = direct_gradients(method, trainer, batch, top)
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    largest = max(float(value.abs().max()) for value in direct.values())
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, direct[name], rtol=1e-3, atol=1e-4 * largest)
    assert largest > 1e-2


def test_advantages_are_taken_within_a_question(
    lm: LM, word_problems: Task, tmp_path: Path, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards 0, 1, 2, 3 in each group of four, whatever the order of the questions."""

    def ladder(group: Sequence[Answer]) -> list[float]:
        return [float(place) for place in range(len(group))]

    from trl.trainer import grpo_trainer

    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", lambda batch: batch)
    for method, scale in (("grpo", 1.2909944 + 1e-4), ("dr-grpo", 1.0)):
        reinforce(lm, word_problems, tmp_path / method, method, reward=ladder, **QUICK | {"steps": 1})  # type: ignore[arg-type]
        advantages = made[-1]._buffered_inputs[0]["advantages"]
        torch.testing.assert_close(advantages, (torch.tensor([-1.5, -0.5, 0.5, 1.5] * 2)) / scale)


def test_reward_rises(lm: LM, word_problems: Task, tmp_path: Path) -> None:
    options = QUICK | {"steps": 40, "questions": 4, "rank": 4, "learning_rate": 2e-2}
    reinforce(lm, word_problems, tmp_path / "out", reward=vowels, **options)
    rewards = [step["reward"] for step in curve(tmp_path / "out")]
    assert sum(rewards[-10:]) > 1.3 * sum(rewards[:10])


def test_the_reference_of_the_kl_term_is_the_start(lm: LM, start: Adapter, word_problems: Task, tmp_path: Path) -> None:
    for name, options in (("start", {"start": start}), ("base", {"rank": 4})):
        reinforce(lm, word_problems, tmp_path / name, reward=vowels, beta=0.1, **QUICK, **options)
        steps = curve(tmp_path / name)
        assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert steps[-1]["kl"] > 1e-5


class Killed(BaseException):
    pass


@pytest.mark.parametrize("more", [{}, {"batch_size": 4, "beta": 0.1, "quantization": "nf4"}])
def test_interrupted_and_resumed_equals_uninterrupted(
    more: dict[str, Any], lm: LM, start: Adapter, word_problems: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workbench.finetuning import callbacks

    options = QUICK | {"steps": 6, "save_steps": 2, "start": start} | more

    def die(stage: str, step: int, total: int, **_: float) -> None:
        assert stage == "reinforce"
        if step == 5:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(callbacks, "heartbeat", die)
        with pytest.raises(Killed):
            reinforce(lm, word_problems, tmp_path / "killed", reward=vowels, **options)
    reports = []
    for name in ("killed", "straight"):
        reinforce(lm, word_problems, tmp_path / name, reward=vowels, **options)
        reports.append(json.loads((tmp_path / name / "training.json").read_text()))
    assert [report["resumed_from_step"] for report in reports] == [4, 0]
    for file in ("adapter_model.safetensors", "losses.jsonl"):
        assert sha256(tmp_path / "killed" / file) == sha256(tmp_path / "straight" / file), file
    assert reports[0]["tokens"] == reports[1]["tokens"] and reports[0]["steps"] == 6


def test_a_finished_folder_is_returned_and_nothing_of_the_caller_changes(
    lm: LM, word_problems: Task, tmp_path: Path, made: list[Any]
) -> None:
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    state = torch.random.get_rng_state()
    first = reinforce(lm, word_problems, tmp_path / "out", reward=partial(short, weight=0.3), rank=4, **QUICK)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in lm.model.state_dict().items())
    assert reinforce(lm, word_problems, first.path, reward=partial(short, weight=0.3), rank=4, **QUICK) == first
    assert len(made) == 1
    with pytest.raises(ValueError, match="started by reinforce with other settings"):
        reinforce(lm, word_problems, first.path, reward=partial(short, weight=0.4), rank=4, **QUICK)


def test_contradictions_are_refused_before_work(lm: LM, start: Adapter, word_problems: Task, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"method": "ppo"}, "method='ppo' is not known. Choose one of grpo, dr-grpo, dapo"),
        ({"reward": "long"}, "reward='long' is not known. Choose one of right, parsed, short"),
        ({"reward": lambda group: [0.0] * len(group)}, "A lambda has no name"),
        ({"answers": 1}, "answers=1 is too small: give 2 or more"),
        ({"batch_size": 48}, "batch_size=48 does not divide the 64 answers of a step"),
        ({"top_entropy": 0.0}, "top_entropy=0.0 and warmup=0.0 are shares"),
        ({"temperature": 0.0}, "temperature=0.0 and learning_rate"),
        ({"batch_size": 0}, "batch_size=0 is too small"),
        ({"n": 0}, "n=0 is too small"),
        ({"start": start, "targets": ["q_proj"]}, r"targets=\['q_proj'\] was given together with start="),
    ]
    for options, text in wrong:
        with pytest.raises(ValueError, match=text):
            reinforce(lm, word_problems, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
