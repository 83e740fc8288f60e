"""Find the fastest way to train that computes the same thing: checkpointing, compilation, loss and attention kernel.

Every variant is measured by its own short training through the real trainer, all on the same rows from the same seed.
One whose losses or gradient norms leave those of the reference is wrong and never chosen, however fast. The winner is
kept in a small file by GPU, model and settings. Not covered: batch size, several GPUs, variants that change the result.
"""

import gc
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from workbench.files import content_key, write_atomic
from workbench.models import LM, find_blocks

WARM = 2  # first steps, not timed: they compile and fill the allocator
TOLERANCE = {torch.float32: 1e-4}  # relative, of every loss; gradient norms may be five times as far away
HALF_TOLERANCE = 2e-2  # 16-bit numbers keep 8 to 11 bits, and kernels add them in another order


@dataclass(frozen=True)
class Variant:
    """One way to compute the same training step."""

    checkpointing: bool = True
    compiled: bool = False
    loss: Literal["chunked", "full"] = "chunked"
    attention: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] = "sdpa"

    @property
    def name(self) -> str:
        """As the table shows it."""
        return ", ".join(
            [
                self.attention,
                f"{self.loss} loss",
                *["checkpointing"] * self.checkpointing,
                *["compiled"] * self.compiled,
            ]
        )


REFERENCE = Variant()  # needs least memory and no compiler


@dataclass(frozen=True)
class Measured:
    """A variant's short training; `verdict` is "ok", or why it can't be chosen."""

    name: str
    losses: list[float]
    norms: list[float]
    tokens_per_second: float
    peak_bytes: int
    verdict: str = "ok"


def variants(attention: Sequence[str] = ("sdpa", "flash_attention_2", "flex_attention")) -> list[Variant]:
    """The whole sweep, the reference first."""
    grid = [Variant(*one) for one in product((True, False), (False, True), ("chunked", "full"), attention)]  # type: ignore[arg-type]
    return [REFERENCE, *(variant for variant in grid if variant != REFERENCE)]


def prepare(model: PreTrainedModel, variant: Variant) -> PreTrainedModel:
    """Choose the attention kernel and have each decoder block compiled at its first call; before adapters are added."""
    model.set_attn_implementation(variant.attention)
    if variant.compiled:
        for block in find_blocks(model):
            block.compile()
    return model


def finish(trainer: Any, variant: Variant) -> Any:
    """Replace TRL's chunked loss where the variant builds all logits at once."""
    if variant.loss == "full":
        trainer.compute_loss = lambda model, inputs, return_outputs=False, num_items_in_batch=None: full_loss(
            model, inputs, num_items_in_batch
        )
    return trainer


def full_loss(model: nn.Module, inputs: dict[str, Any], count: Tensor | int | None = None) -> Tensor:
    """Cross-entropy from all logits: the sum over learnt tokens, divided by `count` (default: their number)."""
    labels = inputs["labels"][:, 1:]
    rest = {name: value for name, value in inputs.items() if name != "labels"}
    logits = model(**{**rest, "use_cache": False}).logits[:, :-1]
    total = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    return total / ((labels != -100).sum() if count is None else count)


class _Clock(TrainerCallback):
    """Seconds since the last warm step, and nothing saved on the way."""

    began = ended = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ended = time.perf_counter()
        if state.global_step == WARM:
            self.began = self.ended
        control.should_save = False


def measure(name: str, make: Callable[[], Any], steps: int) -> Measured:
    """Train `steps` steps with the trainer that `make` returns; one that fails, by memory or refusal, says why."""
    from workbench.finetuning.trainer import own_random_state, quiet_libraries

    if steps <= WARM:
        raise ValueError(f"steps={steps}: the first {WARM} are not timed. Give {WARM + 1} or more.")
    try:
        with own_random_state(torch.device("cuda" if torch.cuda.is_available() else "cpu")), quiet_libraries():
            trainer, clock = make(), _Clock()
            trainer.args.max_steps = steps
            trainer.add_callback(clock)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        counted = _tokens(trainer, log)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        losses, norms = [entry["loss"] for entry in log], [entry["grad_norm"] for entry in log]
        return Measured(name, losses, norms, counted / (clock.ended - clock.began), peak)
    except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:  # out of memory is a RuntimeError
        reason = " ".join(str(error).split())[:160]
        return Measured(name, [], [], 0.0, 0, f"failed: {type(error).__name__}: {reason}")
    finally:
        trainer = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _tokens(trainer: Any, log: list[dict[str, Any]]) -> int:
    """Tokens of the timed steps; TRL counts them unless the loss is ours, then rows tell."""
    if "num_tokens" in log[-1]:
        return log[-1]["num_tokens"] - log[WARM - 1]["num_tokens"]
    rows = trainer.train_dataset
    mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
    per_step = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    return round(mean * per_step * (len(log) - WARM))


def judge(found: Sequence[Measured], tolerance: float) -> list[Measured]:
    """The same list; whatever leaves the first one's losses or gradient norms is marked wrong.

    Raises ValueError when the first one, the reference, did not run.
    """
    reference = found[0]
    if reference.verdict != "ok":
        raise ValueError(
            f"The reference variant ({reference.name}) did not run, so none can be judged: {reference.verdict}"
        )
    judged = []
    for one in found:
        if one.verdict == "ok":
            loss, norm = _away(one.losses, reference.losses), _away(one.norms, reference.norms)
            if not (loss <= tolerance and norm <= 5 * tolerance):  # with nan this is false as well
                verdict = f"wrong: losses differ by {loss:.2g}, gradient norms by {norm:.2g}"
                one = replace(one, verdict=verdict)
        judged.append(one)
    return judged


def _away(values: list[float], wanted: list[float]) -> float:
    if len(values) != len(wanted):
        return float("inf")
    return float((torch.tensor(values) / torch.tensor(wanted) - 1).abs().max())


def fastest(
    lm: LM,
    makers: Mapping[str, Callable[[], Any]],
    settings: Mapping[str, Any],
    *,
    steps: int = 8,
    folder: Path | None = None,
) -> tuple[str, str]:
    """The name in `makers` of the fastest right variant, and the reason; the first one is the reference.

    Each maker returns a fresh trainer. `settings` holds what else decides speed (tokens a row, quantisation, rank). An
    answer found before on this device for this model is read from `folder` (default: workbench below XDG_CACHE_HOME).
    """
    file = (folder or cache_folder()) / f"fastest-{_key(lm, makers, settings)}.json"
    if file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))
        if known.get("winner") in makers:
            return known["winner"], f"{known['winner']}: measured before on {known['device']} ({file})"
    tolerance = TOLERANCE.get(lm.model.dtype, HALF_TOLERANCE)
    found = judge([measure(name, make, steps) for name, make in makers.items()], tolerance)
    winner = max((one for one in found if one.verdict == "ok"), key=lambda one: one.tokens_per_second)
    report = {"winner": winner.name, "device": device_name(), "measured": [asdict(one) for one in found]}
    write_atomic(file, json.dumps(report, indent=2))
    gain = winner.tokens_per_second / found[0].tokens_per_second
    wrong = sum(one.verdict.startswith("wrong") for one in found)
    return winner.name, f"{winner.name}: {gain:.2f} times the reference; {len(found)} measured, {wrong} of them wrong"


def candidates(lm: LM, checkpointing: bool) -> list[Variant]:
    """What `finetune(fastest=True)` compares: none on a CPU; on a GPU the model's own kernel first, then others.

    Checkpointing stays as planned by memory, and the loss TRL's, which counts tokens and knows weights.
    """
    if lm.device.type != "cuda":
        return []
    own = lm.model.config._attn_implementation
    kernels = dict.fromkeys((own, "sdpa", "flash_attention_2", "flex_attention"))
    return [Variant(checkpointing, compiled, attention=kernel) for compiled in (False, True) for kernel in kernels]


def choose(
    lm: LM, build: Callable[[Variant], Any], checkpointing: bool, settings: Mapping[str, Any], steps: int = 8
) -> tuple[Variant | None, str]:
    """The fastest of the `candidates` by the trainers that `build` makes, and why; None where there are none."""
    named = {variant.name: variant for variant in candidates(lm, checkpointing)}
    if not named:
        return None, f"as it is: fastest=True chooses kernels for GPUs, and the model is on {lm.device.type}"
    name, reason = fastest(lm, {name: partial(build, named[name]) for name in named}, settings, steps=steps)
    return named[name], reason


def cache_folder() -> Path:
    """Where answers are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "workbench"


def device_name() -> str:
    """Of the GPU, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _key(lm: LM, makers: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    import transformers

    return content_key(
        device=device_name(), model=lm.name, revision=lm.revision, dtype=str(lm.model.dtype), makers=list(makers),
        shape={name: list(value.shape) for name, value in lm.model.named_parameters()}, settings=dict(settings),
        versions=[torch.__version__, transformers.__version__],
    )[:16]  # fmt: skip
