"""The base that a fine-tune trains over: the caller's weights loaded again, so that its model is not touched."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from workbench.finetuning.memory import Plan
    from workbench.models import LM


def load_base(lm: "LM", planned: "Plan") -> "PreTrainedModel":
    """The weights that the caller's model came from, loaded again, in 4 bits where planned."""
    import torch

    base = load_again(lm, quantization=planned.quantization)
    if planned.quantization and lm.device.type == "cpu":
        for weight in base.model.parameters():
            if weight.is_floating_point():  # a view of the file, all of which would stay in memory with it
                weight.data = weight.data.clone()
    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(lm.device)
    return base.model


def load_again(lm: "LM", *, quantization: str | None, dtype: "str | torch.dtype | None" = None) -> "LM":
    """The model from where it came from, of the same revision, in its own dtype unless given.

    Raises ValueError where another revision lies there by now.
    """
    from workbench.models import load_model

    from_hub = not Path(str(lm.model.config._name_or_path)).is_dir()
    again = load_model(
        lm.name, dtype=dtype or lm.model.dtype, quantization=quantization, device=lm.device,
        revision=lm.revision if from_hub else None,
    )  # fmt: skip
    if again.revision != lm.revision:
        raise ValueError(
            f"{lm.name} on disk is now revision {again.revision}, but the loaded model is {lm.revision}. "
            f"Load it again with load_model({lm.name!r}) and start in a new folder."
        )
    return again


def process_peak(device: "torch.device") -> dict[str, int | str]:
    """Peak memory in bytes, and of what: torch's on a GPU, else the whole process's since it started."""
    import resource

    import torch

    if device.type == "cuda":
        return {"bytes": torch.cuda.max_memory_allocated(device), "of": "GPU memory allocated by torch during training"}
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, kibibytes on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"bytes": peak, "of": "memory of the whole process since it started"}
