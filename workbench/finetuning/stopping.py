"""Ending a training from outside: a file `cancel` in its folder, asked for by a panel, another process or a person.

The training looks for it before every forward pass and after every step, ten times a second at most. At the end of a
step it saves a checkpoint and stops, so nothing is lost; where a step takes longer than `PATIENCE`, it stops in its
midst and goes on from the checkpoint before. A training that is one of several (a sweep's, a stage's) listens to the
folder of all of them too. Not covered: a single forward or backward pass, which is always finished.
"""

import contextlib
import gc
import json
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.files import write_atomic
from workbench.finetuning.reporting import Report
from workbench.runs import heartbeats

if TYPE_CHECKING:
    from torch import nn

NAME = "cancel"
LOOK_EVERY = 0.1  # seconds
PATIENCE = 0.4  # seconds that a step may still take after it was asked to stop


class Cancelled(RuntimeError):
    """Somebody asked the training to stop; the same call goes on."""


def ask_to_cancel(folder: str | Path, by: str = "") -> None:
    """Ask the training, or the sweep, in `folder` to stop. Raises ValueError where there is no such folder."""
    if not Path(folder).is_dir():
        raise ValueError(
            f"There is no folder {folder}, so no training to cancel. Give the out= folder of the training."
        )
    when = datetime.now(UTC).isoformat(timespec="seconds")
    write_atomic(Path(folder) / NAME, json.dumps({"by": by, "when": when}))


@dataclass
class Attended:
    """What a training looks and writes at while it runs: whether it shall stop, and how far it is."""

    out: Path
    report: Report
    step: int = 0
    total: int = 0
    by: str = ""
    asked_at: float | None = None
    looked_at: float = field(default=-LOOK_EVERY)

    @property
    def files(self) -> list[Path]:
        """Where a request may lie: here, and in a folder of several trainings."""
        several = (self.out.parent / "settings.json").exists()
        return [self.out / NAME, *([self.out.parent / NAME] if several else [])]

    def asked(self) -> bool:
        """Whether somebody wants this training to stop."""
        now = time.monotonic()
        if self.asked_at is None and now - self.looked_at >= LOOK_EVERY:
            self.looked_at = now
            for file in self.files:
                if file.exists():
                    self.asked_at, self.by = now, _name(file)
                    break
        return self.asked_at is not None

    def check(self, patience: float = 0.0) -> None:
        """Raise `Cancelled` where somebody has wanted this training to stop for longer than `patience` seconds."""
        if self.asked() and self.asked_at is not None and time.monotonic() - self.asked_at >= patience:
            raise self.cancelled()

    def cancelled(self) -> Cancelled:
        """The error that says where the training stopped and how to go on; the request is dealt with."""
        for file in self.files:
            file.unlink(missing_ok=True)
        where = f"at step {self.step} of {self.total}" if self.total else "before the first step"
        return Cancelled(f"Cancelled {where}{f' by {self.by}' if self.by else ''}; run the same call to go on.")


@contextlib.contextmanager
def attended(out: Path, stage: str) -> Iterator[Attended]:
    """Around a training in the folder `out`: an old request is forgotten; an end by error is written down.

    After `Cancelled`, or the kernel's stop button, no traceback keeps the trained model in memory, and no progress bar
    waits for it.
    """
    (out / NAME).unlink(missing_ok=True)
    own = Attended(out, Report(out, stage))
    try:
        yield own
    except BaseException as error:
        own.report.end(str(error) or type(error).__name__)
        if isinstance(error, Cancelled | KeyboardInterrupt):
            traceback.clear_frames(error.__traceback__)
            heartbeats.forget(stage)
            gc.collect()
        raise


@contextlib.contextmanager
def listening(model: "nn.Module", own: Attended) -> Iterator[None]:
    """Look for a request before every forward pass of `model`, sampling and scoring included."""
    wrapped: Any = model
    bare = wrapped.get_base_model() if hasattr(model, "get_base_model") else wrapped
    inner: nn.Module = getattr(bare, "base_model", bare)  # PEFT calls the wrapped model's `forward`, past its hooks
    hook = inner.register_forward_pre_hook(lambda *_: own.check(PATIENCE))
    try:
        yield
    finally:
        hook.remove()


def _name(file: Path) -> str:
    """Who asked, as far as the file says."""
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["by"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
