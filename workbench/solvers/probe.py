"""A linear probe as a verifier: reads off hidden states whether a sampled chain is right, without another answer.

Logistic regression on the mean state of the answer's tokens after one decoder block, fitted on right and wrong chains
of the train split. That hidden states tell right from wrong chains: arXiv 2504.05419. Not covered: a choice of layer
(fit several and compare `auroc`), probes on other tokens.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load, save
from torch import Tensor, nn

from workbench.evaluation.asking import Ask
from workbench.evaluation.judging import judge
from workbench.files import sha256, write_atomic
from workbench.interventions import Intervention
from workbench.models import LM
from workbench.prompts import Strategy
from workbench.solvers.sampling import Drawn, draw
from workbench.tasks import Task

FOLDS = 5  # of questions, for the area under the curve that `fit_probe` reports


@dataclass(frozen=True)
class Probe:
    """Weights in a file, and the layer that they read; the score is the probe's probability of a right chain.

    path: of a safetensors file with `weights` and `bias`. digest: its SHA-256, checked when it is read. auroc: held-out
    area under the curve at fitting, 0.5 is chance.
    """

    path: str
    digest: str
    layer: int
    auroc: float = field(default=0.5, compare=False)

    def scores(self, ask: Ask, places: Sequence[int], samples: Sequence[Drawn]) -> list[float]:
        """See `Scorer`; 0 to 1."""
        weights, bias = _read(self.path, self.digest)
        if len(weights) != ask.lm.d_model or not 0 <= self.layer < len(ask.lm.blocks):
            raise ValueError(
                f"The probe {self.path} reads {len(weights)} numbers of layer {self.layer}; {ask.lm.name!r} has "
                f"{ask.lm.d_model} in each of {len(ask.lm.blocks)} layers. Fit one for this model: fit_probe(lm, ...)."
            )
        found = []
        for place, sample in zip(places, samples, strict=True):
            ids, began = ask.lm.encode(sample.prompt), time.perf_counter()
            state = mean_state(ask.lm, ask.change, ids, sample.made.token_ids, self.layer)
            tokens = len(ids) + len(sample.made.token_ids)
            ask.spent[place].add(ask.lm, tokens, 0, 1, time.perf_counter() - began, 0)
            found.append(float((state @ weights + bias).sigmoid()))
        return found


def mean_state(
    lm: LM, change: Intervention | None, prompt: list[int], answer: list[int], layer: int
) -> Float[Tensor, " d_model"]:
    """Mean over the answer's tokens of the output of decoder block `layer`, float32 on the CPU; one forward."""
    kept: list[Tensor] = []

    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        kept.append(states[0])

    ids = torch.tensor([prompt + answer], device=lm.device)
    changed = lm.apply(change, prompt_lengths=[len(prompt)]) if change is not None else nullcontext()
    with torch.no_grad(), changed:
        handle = lm.blocks[layer].register_forward_hook(hook)  # behind the session's own: sees what it changed
        try:
            lm.base(input_ids=ids, use_cache=False)
        finally:
            handle.remove()
    return torch.cat(kept)[-len(answer) :].float().mean(0).cpu()  # an edit of the cache reads the prompt in two parts


def fit_probe(
    lm: LM,
    task: Task,
    out: str | Path,
    *,
    strategy: Strategy | None = None,
    change: Intervention | None = None,
    layer: int | None = None,
    n: int = 100,
    samples: int = 4,
    temperature: float = 0.7,
    seed: int = 0,
    max_new_tokens: int = 256,
    batch_size: int | None = None,
) -> Probe:
    """Sample chains for n questions of the train split, judge them, and fit a probe that is saved at `out`.

    Args:
        out: a file, .safetensors.
        strategy, change: as in the conditions that the probe will be used in.
        layer: decoder block; None takes the one at two thirds of the depth.

    Raises:
        ValueError: no such layer, or fewer than `FOLDS` right or wrong chains.
    """
    layer = 2 * len(lm.blocks) // 3 if layer is None else layer
    if not 0 <= layer < len(lm.blocks):
        raise ValueError(f"layer={layer}: {lm.name!r} has layers 0 to {len(lm.blocks) - 1}.")
    rows = task.rows("train", n=n, seed=seed)
    ask = Ask(lm, task, rows, strategy, change, max_new_tokens, batch_size, seed)
    states, right, owners = [], [], []
    for place, each in enumerate(draw(ask, samples, temperature, 1.0)):
        for one in {one.text: one for one in each}.values():
            states.append(mean_state(lm, change, lm.encode(one.prompt), one.made.token_ids, layer))
            right.append(judge(task, rows[place], one.text)[0].correct)
            owners.append(place)
    if min(sum(right), len(right) - sum(right)) < FOLDS:
        raise ValueError(
            f"{sum(right)} of {len(right)} different chains are right: a probe needs {FOLDS} of each kind. Ask for "
            "more questions (n=), or by a strategy that is sometimes right and sometimes wrong."
        )
    inputs, labels = torch.stack(states), torch.tensor(right)
    weights, bias = _logistic(inputs, labels)
    path = Path(out)
    write_atomic(path, save({"weights": weights, "bias": bias}))
    return Probe(str(path), sha256(path), layer, _held_out(inputs, labels, owners))


def _logistic(
    states: Float[Tensor, "chains d_model"], right: Bool[Tensor, " chains"], penalty: float = 0.01
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, ""]]:
    """L2-penalised logistic regression on standardised inputs; the weights returned are for the states as they are."""
    centre, spread = states.double().mean(0), states.double().std(0).clamp(min=1e-6)
    inputs, labels = (states.double() - centre) / spread, right.double()
    with torch.enable_grad():
        w = torch.zeros(inputs.shape[1] + 1, dtype=torch.double, requires_grad=True)
        optimizer = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            fit = nn.functional.binary_cross_entropy_with_logits(inputs @ w[:-1] + w[-1], labels)
            value = fit + penalty * w[:-1].square().sum()
            value.backward()
            return value

        optimizer.step(loss)
    weights = w[:-1].detach() / spread
    return weights.float(), (w[-1].detach() - centre @ weights).float()


def _held_out(states: Float[Tensor, "chains d_model"], right: Bool[Tensor, " chains"], owners: Sequence[int]) -> float:
    """Area under the curve of probes that saw none of the question's chains; a mean over folds, pairs compared inside.

    Folds that hold right or wrong chains only have nothing to compare and are left out.
    """
    fold = torch.tensor(owners) % FOLDS
    areas = []
    for number in range(FOLDS):
        inside = fold == number
        if right[inside].all() or not right[inside].any() or right[~inside].all() or not right[~inside].any():
            continue
        weights, bias = _logistic(states[~inside], right[~inside])
        scores = states[inside] @ weights + bias
        gap = scores[right[inside]][:, None] - scores[~right[inside]][None, :]
        areas.append(float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean()))
    return sum(areas) / len(areas) if areas else 0.5


def _read(path: str, digest: str) -> tuple[Tensor, Tensor]:
    if not Path(path).is_file() or sha256(path) != digest:
        found = "is not the file that this probe was fitted with" if Path(path).is_file() else "is missing"
        raise ValueError(f"{path} {found}. Fit it again: fit_probe(lm, task, {path!r}).")
    held = load(Path(path).read_bytes())
    return held["weights"], held["bias"]
