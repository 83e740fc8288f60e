"""The base that a fine-tune trains over: the caller's weights loaded again, so that its model is not touched."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from workbench.finetuning.memory import Plan
    from workbench.models import LM


def load_base(lm: "LM", planned: "Plan") -> "PreTrainedModel":
    """The weights that the caller's model came from, loaded again, in 4 bits where planned."""
    import torch

    from workbench.models import load_model

    from_hub = not Path(str(lm.model.config._name_or_path)).is_dir()
    base = load_model(
        lm.name, dtype=lm.model.dtype, quantization=planned.quantization, device=lm.device,
        revision=lm.revision if from_hub else None,
    )  # fmt: skip
    if base.revision != lm.revision:
        raise ValueError(
            f"{lm.name} on disk is now revision {base.revision}, but the loaded model is {lm.revision}. "
            f"Load it again with load_model({lm.name!r}) and start in a new folder."
        )
    if planned.quantization and lm.device.type == "cpu":
        for weight in base.model.parameters():
            if weight.is_floating_point():  # a view of the file, all of which would stay in memory with it
                weight.data = weight.data.clone()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return base.model


def process_peak() -> dict[str, int | str]:
    """Peak memory in bytes, and of what: torch's on a GPU, else the whole process's since it started."""
    import resource

    import torch

    if torch.cuda.is_available():
        return {"bytes": torch.cuda.max_memory_allocated(), "of": "GPU memory allocated by torch during training"}
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, kibibytes on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"bytes": peak, "of": "memory of the whole process since it started"}
