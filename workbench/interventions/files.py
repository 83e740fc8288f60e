"""One safetensors file an intervention: tensors, and a JSON header that says what they are and on which model made.

The header lies in the metadata under "workbench" and is meant to be read without this package: `conventions` says in
words what its numbers mean. Nothing is unpickled. Not covered: files of other tools, see `interchange`.
"""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from workbench.files import write_atomic
from workbench.interventions.adapter import Adapter
from workbench.interventions.cache_edits import (
    CompressCache,
    DropTokens,
    QuantizeCache,
    ReplaceTokens,
    ScaleTokens,
    SpliceBlock,
)
from workbench.interventions.concept import Intervention, Sum
from workbench.interventions.gate import Conditional, Gate
from workbench.interventions.kv import KV
from workbench.interventions.kv_blocks import Block
from workbench.interventions.logits import Logits
from workbench.interventions.low_rank import LowRank
from workbench.interventions.residual import Residual
from workbench.interventions.weights import Weights
from workbench.models import LM, ModelError, load_model

FORMAT, VERSION = "workbench-intervention-", 1
KINDS: dict[str, type[Any]] = {
    "residual": Residual,
    "low_rank": LowRank,
    "kv": KV,
    "adapter": Adapter,
    "logits": Logits,
    "conditional": Conditional,
    "weights": Weights,
    "drop": DropTokens,
    "scale": ScaleTokens,
    "replace": ReplaceTokens,
    "splice": SpliceBlock,
    "compress": CompressCache,
    "quantize": QuantizeCache,
    "gate": Gate,  # the last two are parts of interventions
    "block": Block,
}
CONVENTIONS = {
    "layers": "layer l is the output of decoder block l, counted from 0, before the final norm",
    "positions": "where it acts, in tokens of each row's own text: from 0, or negative from the end of the prompt; "
    "last = the last prompt token",
    "read at": "details.token or details.positions: where in each text of the pairs it was read, in the same count",
    "model": "the name it was loaded by; revision: commit, or the start of a hash over its safetensors files",
    "data_sha256": "SHA-256 of what it was read from or trained on, in UTF-8, as Python's json.dumps(data, "
    "sort_keys=True, ensure_ascii=False) writes it; of pairs {'negative': [texts], 'positive': [texts]}, of records "
    "{'loss': name, 'records': [[[prompt tokens, answer tokens], ...], ...]}",
    "calibration": "kl: KL(plain || this) in nats, at `percentile` over the tokens of the plain model's answers; "
    "it holds for the strengths in this file; strength: times what was given to calibrate; prompts_sha256: of "
    "{'prompts': [tokens]}, as above",
}
UNROTATED = "un-rotated, as if at position 0, in the layers of `rotated`; rotated to the edited position when applied"
AS_CACHED = "as cached: added as they are at every position"
WORDS = ("slice", "lm", "tensor", "inner", "plain", *KINDS)  # a dict with one of these keys is no plain dict


def save(x: Intervention, file: Path) -> Path:
    """Write `x` to one file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    header = {"format": f"{FORMAT}{VERSION}", "conventions": CONVENTIONS, **_pack_whole(x, "", tensors)}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, to_bytes(tensors, metadata={"workbench": json.dumps(header, default=_number)}))
    return file


def load_intervention(file: str | Path) -> Intervention:
    """Read what `save` wrote. It is checked against a model when it is applied.

    Raises ModelError for a file that is missing, cut off, of another kind or format, or whose tensors are not those
    that its header names.
    """
    file = Path(file)
    if not file.is_file():
        raise ModelError(f"There is no file {file}. Write one with x.save(FILE).")
    try:
        with safe_open(file, framework="pt") as stream:
            header = json.loads((stream.metadata() or {}).get("workbench", "{}"))
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ModelError(
            f"{file} is not a safetensors file, or is cut off ({' '.join(str(error).split())[:120]}). Write it again "
            "with x.save(FILE)."
        ) from None
    _check_format(header, file)
    try:
        return _unpack_whole(header, "", tensors)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ModelError(
            f"The header of {file} is not one that x.save(FILE) writes ({type(error).__name__}: {error}). Write the "
            "file again."
        ) from None


def _check_format(header: Any, file: Path) -> None:
    """Refuse what is no intervention, and what a later version of this package wrote."""
    name = header.get("format") if isinstance(header, dict) else None
    number = name.removeprefix(FORMAT) if isinstance(name, str) and name.startswith(FORMAT) else ""
    if not number.isdecimal():
        raise ModelError(
            f"{file} is not an intervention (format {name!r}, expected {FORMAT + str(VERSION)!r}). Write one with "
            "x.save(FILE)."
        )
    if int(number) > VERSION:
        raise ModelError(
            f"{file} was written by a newer version of this package (format {number}; this one reads up to {VERSION}). "
            "Update it: git pull, or pip install --upgrade workbench."
        )


def _pack_whole(x: Intervention, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """An intervention of one part or of several."""
    parts = [_pack(part, f"{prefix}{number}.", tensors) for number, part in enumerate(x.parts)]
    whole: dict[str, Any] = {"sum": isinstance(x, Sum), "parts": parts}
    return whole | {"calibration": dict(x.calibration)} if isinstance(x, Sum) and x.calibration is not None else whole


def _unpack_whole(whole: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> Intervention:
    parts = tuple(_unpack(part, f"{prefix}{number}.", tensors) for number, part in enumerate(whole["parts"]))
    return _with_calibration(Sum(parts) if whole["sum"] else parts[0], whole)


def _pack(part: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """A part (or what it holds) as JSON values; its tensors go into `tensors`, by layer or by field."""
    sizes: dict[str, Any] = {}
    entry: dict[str, Any] = {"site": _site(part), "tensors": sizes}
    if hasattr(part, "rotated"):
        entry["rotary"] = UNROTATED if part.rotated else AS_CACHED
    if getattr(part, "calibration", None) is not None:
        entry["calibration"] = dict(part.calibration)
    for field in fields(part):
        value, name = getattr(part, field.name), f"{prefix}{field.name}"
        if isinstance(value, dict) and value and all(isinstance(held, Tensor) for held in value.values()):
            tensors.update({f"{name}.{layer}": _own(tensor) for layer, tensor in value.items()})
            sizes[field.name] = {str(layer): list(tensor.shape) for layer, tensor in value.items()}
        else:
            entry[field.name] = _json(value, name, tensors)
    return entry


def _json(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """One field's value; what JSON doesn't have becomes a dict with a single known key."""
    if isinstance(value, Tensor):
        tensors[name] = _own(value)
        return {"tensor": list(value.shape)}
    if isinstance(value, Intervention):
        return {"inner": _pack_whole(value, f"{name}.", tensors)}
    if isinstance(value, LM):
        packed = "nf4" if getattr(value.model, "is_loaded_in_4bit", False) else None
        return {"lm": [value.name, value.revision, str(value.model.dtype).removeprefix("torch."), packed]}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if is_dataclass(value):
        return {_site(value): _pack(value, f"{name}.", tensors)}
    if isinstance(value, dict) and len(value) == 1 and set(value) <= set(WORDS):
        return {"plain": value}
    return str(value) if isinstance(value, Path) else value


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone().contiguous()


def _number(value: Any) -> Any:
    """A number of numpy as Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise ModelError(
        f"A file cannot hold an object of type {type(value).__name__}: {value!r}. Give numbers, texts, lists and dicts."
    )


def _site(part: Any) -> str:
    site = next((name for name, cls in KINDS.items() if type(part) is cls), None)
    if site is None:
        raise ModelError(f"A {type(part).__name__} cannot be saved. Kinds that can be: {', '.join(KINDS)}.")
    return site


def _unpack(entry: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> Any:
    if entry["site"] not in KINDS:
        raise ModelError(
            f"The file holds an intervention of kind {entry['site']!r}, which this version does not know. It knows: "
            f"{', '.join(KINDS)}. Update it, or make the intervention again."
        )
    kind, arguments = KINDS[entry["site"]], {}
    for field in fields(kind):
        name = f"{prefix}{field.name}"
        if field.name in entry["tensors"]:
            shapes = entry["tensors"][field.name]
            arguments[field.name] = {
                int(layer) if layer.isdecimal() else layer: _tensor(f"{name}.{layer}", shape, tensors)
                for layer, shape in shapes.items()
            }
        elif field.name in entry:  # else written before this field existed: its default is what was meant
            arguments[field.name] = _value(entry[field.name], name, tensors)
    return _with_calibration(kind(**arguments), entry)


def _with_calibration(x: Any, entry: dict[str, Any]) -> Any:
    return x.with_calibration(entry["calibration"]) if entry.get("calibration") else x


def _tensor(name: str, shape: list[int], tensors: dict[str, Tensor]) -> Tensor:
    """A tensor of the file, if it is there and as large as the header says."""
    found = list(tensors[name].shape) if name in tensors else None
    if found != shape:
        raise ModelError(
            f"The header names a tensor {name!r} of shape {shape}; the file has "
            f"{'none of that name' if found is None else f'one of shape {found}'}. It was changed or is damaged: write "
            "it again with x.save(FILE)."
        )
    return tensors[name]


def _value(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """One field's value; a dict with a single known key stands for what JSON doesn't have."""
    kind = next(iter(value)) if isinstance(value, dict) and len(value) == 1 else None
    if kind not in WORDS:
        return _with_tuples(value)
    held = value[kind]
    if kind == "slice":
        return slice(*held)
    if kind == "lm":
        return _same_model(*held)
    if kind == "tensor":
        return _tensor(name, held, tensors)
    if kind == "inner":
        older = isinstance(held, list)  # the parts alone
        return _unpack_whole({"sum": len(held) > 1, "parts": held} if older else held, f"{name}.", tensors)
    if isinstance(held, dict) and held.get("site") == kind:
        return _unpack(held, f"{name}.", tensors)
    return _with_tuples(held if kind == "plain" else value)


def _with_tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {name: _with_tuples(held) for name, held in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


def _same_model(name: str, revision: str, dtype: str | None = None, quantization: str | None = None) -> LM:
    """A model that an intervention names, loaded again as it was; refused where it is another revision by now."""
    lm = load_model(name, dtype=dtype, quantization=quantization)
    if lm.revision != revision:
        raise ModelError(
            f"The file names {name!r} at revision {revision}; what loads now is {lm.revision}. Make the intervention "
            f"again with load_model({name!r}), or with revision={revision!r} where the hub still has it."
        )
    return lm
