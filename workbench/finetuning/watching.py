"""What is seen of a training run while it lasts: loss, gradient, speed, share of the machine's peak, held-out score.

What depends only on the records goes to `losses.jsonl` and is the same bytes after a kill and resume; what depends on
the machine (seconds, tokens a second, MFU) goes to `speed.jsonl`. Not covered: curves of finished runs, see `plots`.
MFU: model FLOPs utilisation, PaLM (arXiv 2204.02311, appendix B).
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from workbench.files import write_atomic
from workbench.finetuning.options import Diverged
from workbench.finetuning.packing import Example
from workbench.runs.heartbeats import FOLDER, in_notebook

if TYPE_CHECKING:
    from transformers import TrainerState

    from workbench.finetuning.trainer import QuietTrainer
    from workbench.models import LM
    from workbench.tasks import Task

Rows = list[dict[str, float]]
TASK_ROWS = 32  # tuning questions that are answered at a checkpoint
LIVE_EVERY = 1.0  # seconds between two drawings of the live figure
MATMUL = 1024  # rows and columns of the matrices that a CPU's peak is measured with: 2 GFLOP, some 10 ms


@dataclass(frozen=True)
class Peak:
    """Floating-point operations a second that a device can do, and where the number comes from."""

    flops: float
    source: str


def flops_per_token(model: PreTrainedModel, full: bool = False) -> int:
    """Training FLOPs a token: 4N with a frozen base (LoRA, QLoRA), 6N when every weight is trained.

    N counts the base's weights without its table of input embeddings, which is looked up and not multiplied; a table
    that is also the output head is multiplied there, so it counts. 2N forward and 2N for the gradient of the
    activations, 2N more for the gradient of the weights. Attention scores, adapters and recomputation
    (checkpointing) are left out, as in the numbers that others publish; all experts of a mixture count.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is table.weight
    weights = 0
    for name, module in model.named_modules():
        if "lora_" in name or "prompt_encoder" in name or (module is table and not tied) or (module is head and tied):
            continue
        if isinstance(module, nn.Linear):  # 4-bit ones too, whose weight tensor is packed
            weights += module.in_features * module.out_features
        else:
            weights += sum(weight.numel() for weight in module.parameters(recurse=False))
    return (6 if full else 4) * weights


def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak:
    """The device's peak for matrices of `dtype`: from a table for known GPUs, else measured with a matrix product."""
    # the table is TRL's (trl.trainer.utils, from TorchTitan's), the vendors' dense bf16 figures: 989e12 for an H200
    from trl.trainer.utils import get_peak_flops

    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = get_peak_flops(name, str(dtype).removeprefix("torch."))
        if known:
            return Peak(known, f"table: {name}, {known / 1e12:.0f} TFLOPS in {dtype}")
    size = MATMUL * (8 if device.type == "cuda" else 1)
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = min(seconds_of(lambda: matrix @ matrix, device) for _ in range(4))
    speed = 2 * size**3 / best
    return Peak(speed, f"measured: {speed / 1e9:.0f} GFLOPS, a product of two {size} x {size} matrices of {dtype}")


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """How long `work` takes, until the device is done with it."""
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


@dataclass
class Speed:
    """Seconds, tokens a second and MFU of every step, kept over a kill in `file`."""

    file: Path
    flops: int
    peak: Peak
    rows: Rows = field(default_factory=list)
    began: float = 0.0
    ended: float | None = None
    tokens: int = 0

    def resume(self, step: int) -> None:
        """Go on after `step`; later lines of a killed run are forgotten, because those steps are done again."""
        lines = self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []
        self.rows = [row for row in map(json.loads, lines) if row["step"] <= step]
        self.ended = None

    def start(self, tokens: int) -> None:
        """A step begins; `tokens` were seen before it."""
        self.finish()
        self.began, self.tokens = time.perf_counter(), tokens

    def stop(self, step: int, tokens: int) -> None:
        """The step is over, `tokens` seen in all."""
        self.ended = time.perf_counter()
        seconds = self.ended - self.began
        rate = (tokens - self.tokens) / seconds
        mfu = rate * self.flops / self.peak.flops
        self.rows.append({"step": step, "seconds": seconds, "aside": 0.0, "tokens_per_second": rate, "mfu": mfu})

    def finish(self) -> None:
        """What came after the last step (a checkpoint, its scores, the next records) is that step's `aside` seconds."""
        if self.ended is not None:
            self.rows[-1]["aside"] = time.perf_counter() - self.ended
        self.ended = None

    def write(self) -> None:
        """All steps so far, a JSON object a line."""
        write_atomic(self.file, "".join(json.dumps(row) + "\n" for row in self.rows))

    def summary(self) -> dict[str, Any]:
        """Over all steps: seconds, tokens a second and MFU, with the peak that it is a share of."""
        seconds = sum(row["seconds"] for row in self.rows)
        tokens = sum(row["seconds"] * row["tokens_per_second"] for row in self.rows)
        rate = tokens / seconds if seconds else 0.0
        aside = sum(row["aside"] for row in self.rows)
        found = {
            "seconds": seconds,
            "aside": aside,
            "tokens_per_second": rate,
            "mfu": rate * self.flops / self.peak.flops,
        }
        return found | {"flops_per_token": self.flops, "peak_flops": self.peak.flops, "peak_source": self.peak.source}


def curve_rows(state: "TrainerState") -> Rows:
    """A row a step of a trainer's log: step, epoch, loss, learning_rate, grad_norm, tokens; scores where there are."""
    names = {"num_tokens": "tokens", "mean_token_accuracy": "token_accuracy"}
    wanted = ("step", "epoch", "loss", "learning_rate", "grad_norm", *names)
    scored = ("eval_loss", "eval_accuracy")
    scores = {entry["step"]: entry for entry in state.log_history if any(name in entry for name in scored)}
    return [
        {names.get(name, name): entry[name] for name in wanted if name in entry}
        | {name: value for name, value in scores.get(entry["step"], {}).items() if name in scored}
        for entry in state.log_history
        if "loss" in entry
    ]


def check_loss(name: str, loss: float, step: int, learning_rate: float) -> None:
    """Raise `Diverged` for a loss that is no number."""
    if not math.isfinite(loss):
        raise Diverged(
            f"The {name} became {loss} at step {step}. Start again in a new folder with a smaller learning_rate (it "
            f"was {learning_rate:g})."
        )


@dataclass(frozen=True)
class Scoring:
    """What a run is measured by at every checkpoint: the loss on `examples`, and what `accuracy` says of the model."""

    examples: Sequence[Example]
    tokens: int
    accuracy: Callable[[PreTrainedModel], float] | None = None


def held_out_loss(trainer: "QuietTrainer", examples: Sequence[Example], tokens: int) -> float:
    """Mean loss (nats) of the learnt tokens of `examples`, about `tokens` tokens at once; changes nothing."""
    trainer.model.eval()
    total, count, rows = 0.0, 0, sorted((asdict(one) for one in examples), key=lambda row: len(row["input_ids"]))
    size = max(1, tokens // len(rows[-1]["input_ids"]))
    with torch.no_grad():
        for start in range(0, len(rows), size):
            batch = trainer._prepare_inputs(trainer.data_collator(rows[start : start + size]))
            with trainer.compute_loss_context_manager():
                output = trainer.model(**batch, use_cache=False, fused_lm_head=True)
            total -= output.log_probs.double().sum().item()
            count += int(output.label_mask.sum())
    trainer.model.train()
    return total / count


def task_accuracy(lm: "LM", model: PreTrainedModel, task: "Task") -> float:
    """Share of right answers of the model in training on tuning questions; `lm` names it and holds the tokenizer."""
    from workbench.interventions import Adapter
    from workbench.models import find_blocks

    rows = task.rows("tuning", n=TASK_ROWS, seed=0)
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model  # out of peft's wrapper
    now = replace(lm, model=bare, blocks=find_blocks(bare))
    prompts = [now.render(task.messages(row)) for row in rows]
    if hasattr(model, "prompt_encoder"):  # virtual tokens are in the wrapper
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder, save_embedding_layers=False)
            found = now.generate(prompts, Adapter(Path(folder)))
    else:
        found = now.generate(prompts)
    verdicts = task.verify_many(rows, [generation.text for generation in found])
    return sum(verdict.correct for verdict in verdicts) / len(rows)


class Live:
    """Draws the loss curve in a notebook's output and refreshes it in place, at most once a second.

    `show(figure)` displays a figure the first time and returns what has `update(figure)`; IPython's display by default.
    """

    def __init__(self, show: Callable[[Any], Any] | None = None) -> None:
        self.show, self.drawn = show or _Shown, 0.0
        self.handle: Any = None

    def __call__(self, rows: Sequence[dict[str, float]], over: bool = False) -> None:
        """Draw the rows so far, unless the last drawing is too young; the last one (`over`) is always drawn."""
        if not over and time.monotonic() - self.drawn < LIVE_EVERY:
            return
        from workbench.plots import training_curve

        figure = training_curve(rows)
        if self.handle is None:
            self.handle = self.show(figure)
        else:
            self.handle.update(figure)
        self.drawn = time.monotonic()


class _Shown:
    """A figure that is replaced in place: its data is shown, for plotly's figures show themselves, each time anew."""

    def __init__(self, figure: Any) -> None:
        from IPython.display import display

        self.handle = display(figure._repr_mimebundle_(), raw=True, display_id=True)

    def update(self, figure: Any) -> None:
        self.handle.update(figure._repr_mimebundle_(), raw=True)


def live_in_a_notebook() -> Live | None:
    """A live figure where someone is looking: in a notebook that is not run by papermill."""
    return Live() if in_notebook() and not os.environ.get(FOLDER) else None
