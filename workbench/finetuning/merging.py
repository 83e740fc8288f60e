"""Put an adapter into the weights that it was trained over: a model folder without PEFT or 4-bit layers.

An adapter of a QLoRA run has learnt to correct the rounded NF4 weights, not the original ones. So the same 4-bit values
are taken out again, the adapter's change is added in float32, and only the sum is stored in 16 or 32 bits. Merging into
the original weights, or back into 4 bits, gives another model. LoRA, rsLoRA and DoRA; virtual tokens are no weights.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.files import sha256, write_atomic
from workbench.finetuning.base import load_again
from workbench.finetuning.card import write_merged_card
from workbench.finetuning.folders import move_files, save_model
from workbench.models import LM, load_model
from workbench.synthesis.records import claim_folder

if TYPE_CHECKING:
    from workbench.interventions import Adapter

TYPES = ("float32", "bfloat16", "float16")


def merge(lm: LM | str | Path, adapter: "Adapter", out: str | Path, *, dtype: str | None = None) -> Path:
    """Write the model `lm` with `adapter` in its weights to the folder `out`, for `load_model`; returns the folder.

    lm: the base, loaded or by name. If the adapter's training.json says that it was trained over NF4 weights, those are
    made from it, whatever `lm` was loaded in. dtype: "float32", "bfloat16" or "float16" of what is stored; None is the
    dtype of the base. The adapter's strength counts. A finished folder is returned as it is; `lm` is not changed.

    Raises ValueError for an adapter that is no change of weights, one of another model, and a wrong dtype.
    """
    out = Path(out)
    if dtype not in (*TYPES, None):
        raise ValueError(f"dtype={dtype!r} is not known. Choose one of: {', '.join(TYPES)}, or None for the base's.")
    if adapter.virtual:
        kind = json.loads((adapter.path / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
        raise ValueError(
            f"{adapter.path} is a {kind} adapter: {adapter.virtual} virtual tokens before the text, no weights to "
            "merge into. Apply it as it is: lm.generate(prompts, adapter)."
        )
    lm = load_model(lm) if isinstance(lm, str | Path) else lm
    adapter.check(lm)
    base = _trained_over(lm, adapter)
    number = base.model.dtype if dtype is None else getattr(torch, dtype)
    four_bit = bool(getattr(base.model, "is_loaded_in_4bit", False))
    about = {
        "base": {"name": lm.name, "revision": lm.revision}, "quantization": "nf4" if four_bit else "none",
        "adapter": sha256(adapter.path / "adapter_model.safetensors"), "strength": adapter.strength,
        "dtype": str(number).removeprefix("torch."),
    }  # fmt: skip
    if _finished(out, about):
        return out
    model = _merged(base, adapter)
    part = out / ".merged"
    shutil.rmtree(part, ignore_errors=True)
    save_model(model, base, number, part)
    names = move_files(part, out)
    write_merged_card(out, about, adapter.path)
    files = {name: sha256(out / name) for name in names}
    write_atomic(out / "merging.json", json.dumps({**about, "files": files}, indent=2))
    return out


def _trained_over(lm: LM, adapter: "Adapter") -> LM:
    """The base in the weights that the adapter was trained over."""
    file = adapter.path / "training.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    trained = report.get("base", {}).get("revision")
    if trained not in (None, lm.revision):
        raise ValueError(
            f"{adapter.path} was trained on {report['base']['name']!r} (revision {trained}), but the base is "
            f"{lm.name!r} (revision {lm.revision}). Merge it into the model it was trained on."
        )
    four_bit = bool(getattr(lm.model, "is_loaded_in_4bit", False))
    if report.get("quantization") == "none" and four_bit:
        raise ValueError(
            f"{adapter.path} was trained over unquantised weights, but {lm.name!r} is loaded with quantization='nf4'. "
            f"Load it with load_model({lm.name!r})."
        )
    if report.get("quantization") == "nf4" and not four_bit:
        return load_again(lm, quantization="nf4")
    return lm


def _merged(base: LM, adapter: "Adapter") -> Any:
    """The plain model in float32: the base's own values, 4-bit ones dequantised, with the adapter's change added."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from workbench.interventions.adapter import quiet_peft

    plain = load_again(base, quantization=None, dtype="float32").model
    _take_values(plain, base.model)
    with quiet_peft():
        wrapped = PeftModel.from_pretrained(plain, str(adapter.path))
        for module in wrapped.modules():
            if isinstance(module, LoraLayer) and "default" in module.scaling:
                module.scaling["default"] *= adapter.strength
        return wrapped.unload() if adapter.strength == 0 else wrapped.merge_and_unload()


@torch.no_grad()
def _take_values(plain: Any, base: Any) -> None:
    """Every number that `base` computes with, into `plain` in float32."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers.pytorch_utils import Conv1D

    packed = {name: module for name, module in base.named_modules() if isinstance(module, Linear4bit)}
    for name, parameter in plain.named_parameters():
        module = packed.get(name.removesuffix(".weight"))
        if module is None:
            parameter.copy_(base.get_parameter(name).float())
        else:
            values = dequantize_4bit(module.weight.data, module.weight.quant_state)
            turned = isinstance(plain.get_submodule(name.removesuffix(".weight")), Conv1D)  # GPT-2 holds (in, out)
            # computed in this dtype, so rounded to it first
            values = values.to(module.compute_dtype or values.dtype).float()
            parameter.copy_(values.t() if turned else values)


def _finished(out: Path, about: dict[str, Any]) -> bool:
    """Whether this very merge lies in the folder, whole; refuses a folder of something else, else claims it."""
    if not (out / "settings.json").exists() and out.is_dir() and any(out.glob("*.safetensors")):
        raise ValueError(f"{out} holds weights that were not merged here. Choose another out= folder.")
    claim_folder(out, about, "merge")
    file = out / "merging.json"
    files = json.loads(file.read_text(encoding="utf-8"))["files"] if file.exists() else {}
    return bool(files) and all((out / name).exists() and sha256(out / name) == was for name, was in files.items())
