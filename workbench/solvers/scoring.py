"""One forward pass over a finished text: log-probabilities of an answer's tokens, or hidden states on them.

The cost is booked on the question like that of a generation. Every text is computed alone, so a score depends on no
batch. Does not generate, and doesn't rank (`best_of`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from workbench.evaluation.asking import Ask
from workbench.interventions import Intervention
from workbench.models import LM, takes_last_only


def log_probabilities(
    ask: Ask, place: int, lm: LM, change: Intervention | None, prompt: list[int], answer: list[int]
) -> Float[Tensor, "answer vocabulary"]:
    """Log-probabilities (natural) of every next token at each token of `answer` behind `prompt`; float32."""
    keep = {"logits_to_keep": len(answer) + 1} if takes_last_only(lm) else {}
    ids = torch.tensor([prompt + answer], device=lm.device)
    with _under(lm, change, len(prompt)), _counted(ask, place, lm, ids.shape[1], len(answer)):
        logits = lm.model(input_ids=ids, use_cache=False, **keep).logits[0, -len(answer) - 1 : -1]
    return logits.float().log_softmax(-1)


def mean_state(
    ask: Ask | None, place: int, lm: LM, change: Intervention | None, prompt: list[int], answer: list[int], layer: int
) -> Float[Tensor, " d_model"]:
    """Mean over the answer's tokens of the output of decoder block `layer`, float32 on the CPU.

    ask: None books no cost.
    """
    kept: list[Tensor] = []

    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        kept.append(states[0, -len(answer) :].float().mean(0).cpu())

    ids = torch.tensor([prompt + answer], device=lm.device)
    counted = nullcontext() if ask is None else _counted(ask, place, lm, ids.shape[1], 0)
    with _under(lm, change, len(prompt)), counted:
        handle = lm.blocks[layer].register_forward_hook(hook)  # behind the session's own: sees what it changed
        try:
            lm.base(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
    return kept[0]


@contextmanager
def _under(lm: LM, change: Intervention | None, length: int) -> Iterator[None]:
    with torch.no_grad(), lm.apply(change, prompt_lengths=[length]) if change is not None else nullcontext():
        yield


@contextmanager
def _counted(ask: Ask, place: int, lm: LM, tokens: int, logits: int) -> Iterator[None]:
    began = time.perf_counter()
    yield
    ask.spent[place].add(lm, tokens, 0, 1, time.perf_counter() - began, logits)
