"""Read and write interventions of other tools: GGUF control vectors, steering-vectors' layers, cache-steering's files.

Layer numbers, checked in the tools' sources: repeng (vgel/repeng, extract.py and control.py) names a tensor
`direction.N` after decoder block N counted from 0, reads it from `hidden_states[N + 1]` and adds it to that block's
output; llama.cpp adds `direction.N` behind its block N and refuses N = 0. steering-vectors numbers decoder blocks from
0 too. So N is layer l here, nothing is shifted; negative numbers, which their functions take as arguments, are in no
file that they write and are refused. Two cautions: repeng reads the last block *after* the final norm, so that
direction has another scale than the block's output; and llama.cpp's own generator names the difference of block l's
output `direction.(l + 1)`, which llama.cpp then adds one block later, and so does this.
Does not read strengths or prompts: the formats hold none. Nothing is ever unpickled: torch files are read as tensors.
"""

import importlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import CONFIG_MAPPING

from workbench.files import write_atomic
from workbench.interventions.concept import Intervention
from workbench.interventions.extraction import extract
from workbench.interventions.kv import KV
from workbench.interventions.residual import Residual
from workbench.models import LM, ModelError
from workbench.prompts import Pairs

ARCHITECTURE = "controlvector"
UNKNOWN = "unknown"  # repeng refuses a file without a model hint


def from_gguf(file: str | Path, lm: LM | None = None) -> Residual:
    """A GGUF control vector (repeng's `export_gguf`, llama.cpp's cvector-generator) as a `Residual` at all positions.

    With `lm`, it is checked against that model (width, layers, and the model family that the file names) and bound to
    it. repeng's directions have length 1: strengths are tens rather than ones; see `workbench.calibration`.
    Needs the package gguf. Raises ModelError for a file of another kind and for another model's vectors.
    """
    gguf, file = _gguf(), Path(file)
    if not file.is_file():
        raise ModelError(f"There is no file {file}. Write one with to_gguf(x, FILE), or with repeng's export_gguf.")
    try:
        reader = gguf.GGUFReader(file)
        names = {name: _text(reader, key) for name, key in _fields().items()}
        kind = _text(reader, "general.architecture")
        vectors = {tensor.name: torch.from_numpy(_numbers(tensor)) for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError, OverflowError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is no GGUF file that can be read ({' '.join(str(error).split())[:120]}).") from None
    if kind != ARCHITECTURE or not vectors:
        raise ModelError(
            f"{file} holds {kind or 'no architecture'!r} with {len(vectors)} tensors; a control vector has the "
            f"architecture {ARCHITECTURE!r} and tensors direction.1, direction.2, ..."
        )
    layers = {_layer(name, file): vector for name, vector in vectors.items()}
    _check_table(layers, "a vector (d_model,) for each layer", 1)
    details = {"source": "gguf", "model_hint": names["model_hint"]}
    x = Residual(layers, "all", model=names["model"], revision=names["revision"], details=details)
    return x if lm is None else _bound(x, lm, names["model_hint"])


def to_gguf(x: Intervention, file: str | Path, model_hint: str = "") -> Path:
    """Write a `Residual` as a control vector that repeng and llama.cpp read; strength is multiplied in.

    model_hint: the family as transformers names it (`lm.model.config.model_type`); empty takes the one that `x` was
    read with, if any, else "unknown". Control vectors act on every token: other positions are refused, as is layer 0,
    which llama.cpp does not take. Stored in float32. Needs the package gguf.
    """
    gguf, x = _gguf(), _adding(x)
    if x.positions != "all":
        raise ModelError(
            f"A control vector acts on every token, but this one is meant for positions={x.positions!r}. If you want "
            "that: to_gguf(x.at(positions='all'), FILE)."
        )
    if 0 in x.vectors:
        rest = sorted(set(x.vectors) - {0})
        raise ModelError(
            f"llama.cpp refuses a direction for layer 0. Leave it out: to_gguf(x.at(layers={rest}), FILE)."
        )
    hint = model_hint or x.details.get("model_hint") or UNKNOWN
    texts = {"model": x.model, "revision": x.revision, "model_hint": hint}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "vector.gguf"
        writer = gguf.GGUFWriter(path, ARCHITECTURE)
        for name, key in _fields().items():
            writer.add_string(key, texts[name])
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(x.vectors))
        for layer, vector in sorted(to_layers(x).items()):
            writer.add_tensor(f"direction.{layer}", vector.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        write_atomic(Path(file), path.read_bytes())
    return Path(file)


def from_layers(layers: Any, lm: LM | None = None) -> Residual:
    """Vectors by decoder block, counted from 0, as a `Residual` at all positions.

    layers: a dictionary {layer: vector of width d_model}, steering-vectors' `SteeringVector`, or a file that
    `torch.save` made of such a dictionary. A saved SteeringVector object is refused, because reading it would run code.
    """
    if isinstance(layers, (str, Path)):
        layers = _torch_file(Path(layers), "torch.save(vector.layer_activations, FILE)")
    site = getattr(layers, "layer_type", "decoder_block")
    if site != "decoder_block":
        raise ModelError(f"layer_type={site!r}: only vectors of layer_type='decoder_block' are residual ones.")
    table = getattr(layers, "layer_activations", layers)
    _check_table(table, "a dictionary {layer: vector}", 1)
    if not table:
        raise ModelError("There is no layer in this dictionary; needed is {layer: vector}.")
    vectors = {layer: vector.detach().cpu().clone() for layer, vector in table.items()}
    x = Residual(vectors, "all", details={"source": "layers"})
    return x if lm is None else _bound(x, lm, "")


def to_layers(x: Intervention) -> dict[int, Float[Tensor, " d_model"]]:
    """Vectors by decoder block in float32, strength multiplied in, for steering-vectors: SteeringVector(to_layers(x)).

    Positions are left behind: say them where the vectors are applied.
    """
    x = _adding(x)
    return {layer: (x.strength * vector.detach().cpu().float()).contiguous() for layer, vector in x.vectors.items()}


def from_cache_steering(source: Any, lm: LM, *, keys_rotated: bool = True) -> KV:
    """The vectors of MaxBelitsky/cache-steering (arXiv 2507.08799): {"keys", "values"}, each {layer: (heads, width)}.

    source: the dictionary that its `extract_steering_kv` returned, or the .pt file that its `save_vector` wrote. Its
    keys were averaged with their rotary position still in them and cannot be un-rotated any more. With keys_rotated
    (how that tool writes them) they are kept and added *as they are*, wherever the edited token stands, so that
    x.scaled(keys=c_k, values=c_v) is that tool's own edit. scaled(keys=0.0, values=c_v) is what its authors used in 23
    of 24 settings. Give keys_rotated=False only for keys that were un-rotated before averaging, like `extract`'s.
    Layer 0 stays out unless named (`x.at(layers)`), as in that tool's evaluations; its bare
    `generate_with_cache_steering` edits it too: x.at(range(len(lm.blocks))). A missing layer of keys or values is zero.
    That tool may append a neutral token (append_special_token), so that the edited token is the prompt's own last one:
    here, add it to the prompt.
    """
    if isinstance(source, (str, Path)):
        source = _torch_file(Path(source), "torch.save({'keys': keys, 'values': values}, FILE)")
    if not isinstance(source, Mapping) or not ("keys" in source or "values" in source):
        raise ModelError(f"{type(source).__name__} given; needed is {{'keys': {{layer: tensor}}, 'values': {{...}}}}.")
    like = extract(lm, Pairs(["1 2 3"], ["1 2 3"]), site="kv")  # zeros in this model's own shapes
    sides = {"keys": dict(like.keys), "values": dict(like.values)}
    for name, side in sides.items():
        table = source.get(name, {})
        _check_table(table, f"a dictionary {name!r}: {{layer: tensor (kv_heads, head_dim)}}", 2)
        for layer, tensor in table.items():
            if layer not in side or tensor.shape != side[layer].shape:
                fits = tuple(side[layer].shape) if layer in side else f"layers 0 to {max(side)}"
                raise ModelError(
                    f"{name} of layer {layer} have shape {tuple(tensor.shape)}, {lm.name!r} has {fits}: they were made "
                    "on another model. Extract them again on this one: extract(lm, pairs, site='kv')."
                )
            side[layer] = tensor.detach().cpu().clone()
    layers = sorted({*source.get("keys", ()), *source.get("values", ())})
    if not layers:
        raise ModelError("There is no layer in these keys and values.")
    keys, values = ({layer: side[layer] for layer in layers} for side in sides.values())
    rotated = () if keys_rotated else tuple(layer for layer in layers if layer in like.rotated)
    details = {"source": "cache-steering", "keys": "as they are" if keys_rotated else "un-rotated"}
    return replace(like, keys=keys, values=values, rotated=rotated, details=details)


def _gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise ModelError(
            "GGUF files need the package gguf, which is not installed: pip install gguf. Without it: x.save(FILE)."
        ) from None


def _fields() -> dict[str, str]:
    return {"model": "workbench.model", "revision": "workbench.revision", "model_hint": f"{ARCHITECTURE}.model_hint"}


def _text(reader: Any, key: str) -> str:
    field = reader.get_field(key)
    return "" if field is None else bytes(field.parts[-1]).decode()


def _numbers(tensor: Any) -> np.ndarray:
    """The tensor's own copy in float32; quantised ones are refused, as llama.cpp does."""
    if tensor.tensor_type.name not in ("F32", "F16", "F64"):
        raise ValueError(f"{tensor.name} is stored as {tensor.tensor_type.name}; control vectors are F32")
    return np.array(tensor.data, dtype=np.float32)


def _layer(name: str, file: Path) -> int:
    prefix, _, number = name.partition(".")
    if prefix != "direction" or not number.isdecimal():
        raise ModelError(f"{file} holds a tensor {name!r}; a control vector has direction.1, direction.2, ... only.")
    return int(number)


def _bound(x: Residual, lm: LM, hint: str) -> Residual:
    config = lm.model.config
    family, text = config.model_type, config.get_text_config().model_type
    known = {name.removesuffix("_text") for name in (family, text)}  # read with or without the part that sees images
    if hint in CONFIG_MAPPING and hint.removesuffix("_text") not in known:
        raise ModelError(
            f"The file was made for a {hint!r} model, {lm.name!r} is a {family!r} one. Take a vector of this model, "
            "or, if you know that it fits: from_gguf(FILE).rebind(lm)."
        )
    x.check(lm)
    return x.rebind(lm)


def _adding(x: Intervention) -> Residual:
    """`x`, if it is a Residual that adds its vectors: the formats know nothing else."""
    if isinstance(x, Residual) and x.operation == "add":
        return x
    name = f"a Residual with operation={x.operation!r}" if isinstance(x, Residual) else f"a {type(x).__name__}"
    raise ModelError(f"Only a Residual that adds its vectors can be exported, not {name}. Use x.save(FILE).")


def _torch_file(file: Path, advice: str) -> Any:
    if not file.is_file():
        raise ModelError(f"There is no file {file}.")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise ModelError(
            f"{file} cannot be read as plain tensors, and pickled objects, which can run code, are refused. Where it "
            f"was made, save the tensors: {advice}. The library said: {' '.join(str(error).split())[:120]}"
        ) from None


def _check_table(table: Any, wanted: str, dimensions: int) -> None:
    """Refuse what is no dictionary of layer numbers and tensors of that many dimensions."""
    if not isinstance(table, Mapping):
        raise ModelError(f"{type(table).__name__} given; needed is {wanted}. Of clusters, choose one.")
    for layer, tensor in table.items():
        if not isinstance(layer, int) or not isinstance(tensor, Tensor) or tensor.ndim != dimensions:
            what = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ModelError(f"Entry {layer!r} is {what}; needed is {wanted}.")
        if layer < 0 or not torch.isfinite(tensor).all():
            what = "layers are counted from 0" if layer < 0 else "it holds numbers that are infinite or no numbers"
            raise ModelError(f"Entry {layer}: {what}. Give {wanted} with layers from 0 and finite numbers.")
