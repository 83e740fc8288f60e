"""What happens beside the steps of a training: heartbeat, curve, speed, scores, markers of whole checkpoints, its stop.

A callback of transformers' trainer, shared by all of TRL's. What is measured is in `watching`, who may stop it in
`stopping`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from workbench.files import sha256, write_atomic
from workbench.finetuning.stopping import Attended
from workbench.finetuning.watching import Rows, Scoring, Speed, check_loss, curve_rows, held_out_loss
from workbench.runs import heartbeat

if TYPE_CHECKING:
    from workbench.finetuning.trainer import QuietTrainer

MARKER = "complete.json"
SHOWN = ("loss", "eval_loss", "eval_accuracy", "grad_norm", "learning_rate", "tokens_per_second", "mfu")


class Watch(TrainerCallback):
    """Heartbeat, loss curve, speed, scores, markers of whole checkpoints; stops at a loss that is no number."""

    def __init__(self, trainer: "QuietTrainer", curve: Path, stage: str = "finetune") -> None:
        self.trainer, self.curve, self.stage = trainer, curve, stage
        self.speed: Speed | None = None
        self.scoring: Scoring | None = None
        self.show: Callable[[Rows], None] | None = None
        self.pause: int | None = None
        self.attended: Attended | None = None
        self.cancelled = False
        self.rows: Rows = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """TRL restarts its token counter on resume; the log of the checkpoint knows better."""
        counts = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self.trainer._total_train_tokens = counts[-1] if counts else 0
        self.rows = curve_rows(state)
        if self.speed:
            self.speed.resume(state.global_step)
            fast = {row["step"]: row for row in self.speed.rows}
            self.rows = [{**row, **fast.get(row["step"], {})} for row in self.rows]
        if self.attended:
            self.attended.step, self.attended.total = state.global_step, state.max_steps
            self.attended.report.begin("training", self.rows, state.max_steps)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The clock of a step runs while it computes, not while checkpoints are written and scored."""
        if self.speed:
            self.speed.start(self.trainer._total_train_tokens)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Scores belong to the checkpoint that is about to be written, so that a resumed run has them too."""
        if self.speed:
            self.speed.stop(state.global_step, self.trainer._total_train_tokens)
        if self.pause is not None and state.global_step >= self.pause:
            control.should_save = control.should_training_stop = True
        if self._stops(state, control):
            return
        if control.should_save and self.scoring:
            score: dict[str, float] = {"step": state.global_step}
            if self.scoring.examples:
                score["eval_loss"] = held_out_loss(self.trainer, self.scoring.examples, self.scoring.tokens)
            if self.scoring.accuracy:
                score["eval_accuracy"] = self.scoring.accuracy(self.trainer.model)
                self.trainer.model.train()
            state.log_history.append(score)

    def _stops(self, state: TrainerState, control: TrainerControl) -> bool:
        """Whether the training is cancelled here, with a checkpoint; one that is due anyway would need its scores."""
        if not self.attended or state.global_step >= state.max_steps:
            return False
        self.attended.step = state.global_step
        if control.should_save and self.scoring:
            self.attended.check()
        elif self.attended.asked():
            self.cancelled = control.should_save = control.should_training_stop = True
        return self.cancelled

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """One line a step."""
        entry = state.log_history[-1]
        if "loss" not in entry:
            return
        check_loss("loss", entry["loss"], state.global_step, args.learning_rate)
        row = curve_rows(TrainerState(log_history=state.log_history[-2:]))[-1]
        fast = self.speed.rows[-1] if self.speed else {}
        self.rows.append({**row, **fast})
        shown = {name: value for name, value in self.rows[-1].items() if name in SHOWN}
        heartbeat(self.stage, state.global_step, state.max_steps, **shown)
        if self.attended:
            self.attended.report.add(self.rows[-1])
        if self.show:
            self.show(self.rows)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A checkpoint counts once this marker is there."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        write_atomic(folder / MARKER, json.dumps(contents(folder)))
        write_curve(self.curve, state)
        if self.speed:
            self.speed.write()


def contents(folder: Path) -> dict[str, str]:
    """Every file of a checkpoint but the marker, with its hash."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MARKER)
    return {file.relative_to(folder).as_posix(): sha256(file) for file in files}


def write_curve(file: Path, state: TrainerState) -> Rows:
    """The loss curve so far, a JSON object a step; see `watching.curve_rows`."""
    curve = curve_rows(state)
    write_atomic(file, "".join(json.dumps(entry) + "\n" for entry in curve))
    return curve
