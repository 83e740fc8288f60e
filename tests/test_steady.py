"""Decoding behind a finished prompt: the kept change is the one worked out anew, and a cropped cache has none."""

import pytest
import torch
from transformers import DynamicCache

from tests.test_interventions import PROMPTS, cache_edit, vector
from tests.tiny import tiny_lm
from workbench.interventions import Residual
from workbench.interventions.session import ACTIVE, Session
from workbench.models import LM

SPANS = [
    ("all", True), ("generated", True), ("last", True), ("prompt", True), (slice(-2, None), True),
    (slice(1, -1), True), ((-1, -2), True), (slice(2, None), False), (20, False),
]  # fmt: skip


def forward(lm: LM, ids: list[list[int]], cache: DynamicCache) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.tensor(ids), past_key_values=cache).logits


def decode(lm: LM, x: list[Residual], steady: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[list[torch.Tensor], bool]:
    """Logits of a prompt and of six tokens behind it, and whether the last ones were steady."""
    with monkeypatch.context() as patch, lm.apply(x):
        if not steady:
            patch.setattr(Session, "_settle", lambda *arguments: None)
        cache = DynamicCache(config=lm.model.config)
        found = [forward(lm, [lm.encode(PROMPTS[0])] * len(x), cache)]
        found += [forward(lm, [[token]] * len(x), cache) for token in range(20, 26)]
        return found, ACTIVE[lm.model][-1].steady is not None


@pytest.mark.parametrize(("span", "known"), SPANS, ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon"])
def test_the_kept_change_is_the_one_worked_out_anew(
    name: str, span: object, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm(name)
    x = vector(lm, 1, span) + 0.5 * vector(lm, 0, "generated")
    for rows in ([x], [x, 0.3 * x, -1.0 * x + cache_edit(lm)]):
        kept, steady = decode(lm, rows, True, monkeypatch)
        anew, never = decode(lm, rows, False, monkeypatch)
        assert (steady, never) == (known, False)
        for one, other in zip(kept, anew, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_what_removes_a_direction_is_worked_out_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    assert not decode(lm, [vector(lm).ablate()], True, monkeypatch)[1]


def test_a_cropped_cache_reads_the_prompt_again() -> None:
    lm = tiny_lm("llama")
    ids, x = lm.encode(PROMPTS[0]), vector(lm, 1, "last")
    with lm.apply(x):
        cache = DynamicCache(config=lm.model.config)
        first = forward(lm, [ids], cache)[0, -1]
        later = [forward(lm, [[token]], cache)[0, -1] for token in (20, 21)]
        cache.crop(-3)
        torch.testing.assert_close(forward(lm, [ids[-1:]], cache)[0, -1], first)
        again = [forward(lm, [[token]], cache)[0, -1] for token in (20, 21)]
        other = DynamicCache(config=lm.model.config)
        torch.testing.assert_close(forward(lm, [ids], other)[0, -1], first)  # another cache begins anew
    for one, two in zip(later, again, strict=True):
        torch.testing.assert_close(one, two)


def test_forwards_that_return_tuples_are_steered_too() -> None:
    lm = tiny_lm("llama")
    ids = torch.tensor([lm.encode(PROMPTS[0])])
    with lm.apply(vector(lm, 1, "last")), torch.no_grad():
        torch.testing.assert_close(lm.model(ids, return_dict=False)[0], lm.model(ids).logits)
