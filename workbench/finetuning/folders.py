"""What a fine-tune leaves in its folder: an adapter or a whole model, each file renamed into place whole."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.files import sha256, write_atomic
from workbench.interventions.adapter import Adapter

if TYPE_CHECKING:
    import torch

    from workbench.finetuning.trainer import QuietTrainer
    from workbench.models import LM

BEGUN = "begun.json"  # beside the checkpoints: how the base was loaded for them
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def finished(out: Path, settings: dict[str, Any]) -> bool:
    """True when training.json, written last, describes these settings and these files."""
    file = out / "training.json"
    if not file.exists():
        return False
    report = json.loads(file.read_text(encoding="utf-8"))
    whole = all((out / name).exists() and sha256(out / name) == digest for name, digest in report["files"].items())
    return whole and report["settings"] == json.loads(json.dumps(settings))


def goes_on(out: Path, lm: "LM", asked: str) -> tuple[str, str]:
    """The quantisation to train with, and why where "auto" has been settled: a begun run keeps what it began with.

    Raises ValueError where checkpoints in the folder were made in another dtype or on another kind of device.
    """
    file = out / "checkpoints" / BEGUN
    if not file.exists():
        return asked, ""
    begun = json.loads(file.read_text(encoding="utf-8"))
    for name, now in (("dtype", str(lm.model.dtype)), ("device", lm.device.type)):
        if begun[name] != now:
            raise ValueError(
                f"The run in {out} was begun with {name} {begun[name]}, and the model now has {now}. Load it with "
                f"load_model({lm.name!r}, {name}={begun[name].removeprefix('torch.')!r}) to go on, or choose another "
                "out= folder."
            )
    if asked != "auto":
        return asked, ""
    return begun["quantization"], f"{begun['quantization']}: what this run was begun with"


def note_begun(out: Path, lm: "LM", quantization: str | None) -> None:
    """Keep beside the checkpoints what was settled by the memory that was free, for `goes_on`."""
    begun = {"quantization": quantization or "none", "dtype": str(lm.model.dtype), "device": lm.device.type}
    write_atomic(out / "checkpoints" / BEGUN, json.dumps(begun))


def result_of(out: Path, method: str) -> Adapter | Path:
    """What `finetune` returns: the adapter, or the folder of a model whose weights were all trained."""
    return out if method == "full" else Adapter(out)


def save_result(trainer: "QuietTrainer", lm: "LM", method: str, out: Path) -> list[str]:
    """Write the adapter's two files, or a model folder that `load_model` reads; the names of the files."""
    part = out / ".adapter"
    shutil.rmtree(part, ignore_errors=True)  # what an earlier attempt left
    if method == "full":
        save_model(trainer.model, lm, lm.model.dtype, part)
        return move_files(part, out)
    trainer.model.save_pretrained(part, save_embedding_layers=False)
    return move_files(part, out, ADAPTER_FILES)


def save_model(model: Any, lm: "LM", dtype: "torch.dtype", folder: Path) -> None:
    """A model folder with config, safetensors in `dtype`, generation config and tokenizer; casts `model` in place."""
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} is no floating-point number. Choose 'float32', 'bfloat16' or 'float16'.")
    vars(model).pop("forward", None)  # TRL's fused head
    model = model.to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder, safe_serialization=True)
    lm.tokenizer.save_pretrained(folder)


def move_files(part: Path, out: Path, names: tuple[str, ...] | None = None) -> list[str]:
    """Rename files of `part` into `out`, weights last: a folder with weights has all else. Removes `part`."""
    found = list(names) if names is not None else [file.name for file in part.iterdir() if file.is_file()]
    found.sort(key=lambda name: (name.endswith(".safetensors"), name))
    for name in found:
        os.replace(part / name, out / name)
    shutil.rmtree(part)
    return found
