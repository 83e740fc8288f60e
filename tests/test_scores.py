"""Scores: gradients against autograd one record at a time, diversity against random choice, a probe on new texts."""

from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_lm
from workbench.finetuning.packing import encode
from workbench.models import LM, load_model
from workbench.synthesis import scores, synthesize
from workbench.tasks import Task


@pytest.fixture(scope="module")
def records(lab: LM, word_problems: Task, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return synthesize(lab, word_problems, "oracle", n=40, out=tmp_path_factory.mktemp("r"), style="steps").kept


def alone(lm: LM, record: dict, seed: int = 0) -> torch.Tensor:
    """The gradient of one record's mean loss by autograd, projected as `gradients` says."""
    from transformers.pytorch_utils import Conv1D

    example = encode(lm, record, "here")
    layers = [m for m in lm.blocks[-1].modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    for layer in layers:
        layer.weight.requires_grad_(True)
    ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
    loss = lm.model(input_ids=ids, labels=labels, use_cache=False).loss
    found = torch.autograd.grad(loss, [layer.weight for layer in layers])
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for layer, gradient in zip(layers, found, strict=True):
        layer.weight.requires_grad_(False)
        gradient = gradient.T if isinstance(layer, torch.nn.Linear) else gradient  # [inputs, outputs]
        left = torch.randn(gradient.shape[0], scores.SIDE, generator=generator)
        right = torch.randn(gradient.shape[1], scores.SIDE, generator=generator)
        rows.append((left.T @ gradient @ right).flatten())
    return torch.cat(rows)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_gradients_are_those_of_each_record_alone(family: str) -> None:
    lm = tiny_lm(family)
    texts = ["The answer is 7.", "3+4=7. The answer is 7.", "No."]
    made = [{"messages": [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": t}]} for t in texts]
    together = scores.gradients(lm, made)
    for row, record in zip(together, made, strict=True):
        torch.testing.assert_close(row, alone(lm, record), rtol=1e-3, atol=1e-4)


def test_gradients_of_four_bit_weights(records: list[dict]) -> None:
    full = scores.gradients(load_model("lab"), records[:6])
    small = scores.gradients(load_model("lab", quantization="nf4"), records[:6])
    assert (torch.nn.functional.cosine_similarity(full, small, dim=1) > 0.5).all()


def test_embeddings_do_not_depend_on_the_batch(lab: LM, records: list[dict]) -> None:
    together = scores.embeddings(lab, records[:20])
    for number in (0, 7, 19):
        torch.testing.assert_close(together[number], scores.embeddings(lab, [records[number]])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by", ["embedding", "gradient"])
def test_diverse_choice_is_more_diverse_than_random_choices(lab: LM, records: list[dict], by: str) -> None:
    vectors = scores.embeddings(lab, records) if by == "embedding" else scores.gradients(lab, records)
    vectors = vectors - vectors.mean(0) if by == "embedding" else vectors
    ranks = scores.diverse(records, lm=lab, by=by)
    best = sorted(range(len(records)), key=lambda i: -ranks[i])[:12]
    chosen = scores.vendi(vectors[best])
    draws = [scores.vendi(vectors[torch.randperm(len(records), generator=torch.Generator().manual_seed(s))[:12]])
             for s in range(20)]  # fmt: skip
    assert chosen > max(draws)


def test_vendi_counts_what_is_different() -> None:
    base = torch.eye(6)
    assert scores.vendi(base) == pytest.approx(6)
    assert scores.vendi(base[[0, 0, 0, 1, 1, 1]]) == pytest.approx(2)
    assert scores.vendi(base[:1].repeat(5, 1)) == pytest.approx(1)


def test_probe_tells_right_from_wrong_better_than_chance(lab: LM, records: list[dict]) -> None:
    def spoilt(record: dict) -> dict:
        *before, answer = record["messages"]
        words = answer["content"].replace("The answer is", "I think it may be")
        return {**record, "messages": [*before, {**answer, "content": words}]}

    wrong = [spoilt(record) for record in records]
    found = scores.probed(records[20:] + wrong[20:], lm=lab, right=records[:20], wrong=wrong[:20])
    assert sum(value > 0 for value in found[:20]) >= 18
    assert sum(value < 0 for value in found[20:]) >= 18
    with pytest.raises(ValueError, match="0 right and 40 wrong"):
        scores.probed(records, lm=lab, right=[], wrong=wrong)


def test_solve_rate_of_another_model(lab: LM, word_problems: Task, records: list[dict], tmp_path: Path) -> None:
    from workbench.prompts import few_shot

    rated = scores.with_solve_rate(lab, word_problems, records[:8], samples=3, strategy=few_shot("steps", 3))
    assert all(record["solve_rate"] in (0, 1 / 3, 2 / 3, 1) for record in rated)
    assert len({record["solve_rate"] for record in rated}) > 1
    assert [record["messages"] for record in rated] == [record["messages"] for record in records[:8]]
    assert scores.middling(rated) == [-abs(record["solve_rate"] - 0.5) for record in rated]
