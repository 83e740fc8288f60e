"""Generation that memory is short for: refused in words before it starts, or done in halves with the same tokens."""

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from workbench.models import LM, ModelError, load_model


@pytest.fixture
def lm(tiny) -> LM:
    return load_model(tiny("llama"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_a_batch_that_finds_no_memory_is_halved_to_the_same_tokens(lm: LM, error: type[Exception]) -> None:
    prompts = [f"{number}+1?" for number in range(6)]
    whole = [one.token_ids for one in lm.generate(prompts, max_new_tokens=5)]

    def refuse(_: Any, inputs: Any, keywords: dict[str, Any]) -> None:
        if (keywords["input_ids"] if "input_ids" in keywords else inputs[0]).shape[0] > 2:
            raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    hook = lm.model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert [one.token_ids for one in lm.generate(prompts, max_new_tokens=5, batch_size=6)] == whole
    hook.remove()


def test_other_errors_are_not_taken_for_memory(lm: LM) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("size mismatch")

    hook = lm.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="size mismatch"):
        lm.generate(["1+1?"], max_new_tokens=2)
    hook.remove()


def test_a_row_that_can_not_fit_is_refused_before_work_starts(lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    hook = lm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ModelError, match=r"need a cache of about [\d,]+ bytes, more than the 1,000 that are free"):
        lm.generate(["1+1?"], max_new_tokens=20)
    assert not calls
    hook.remove()
