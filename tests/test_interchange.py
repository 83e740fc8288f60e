"""Files of other tools: round trips bit for bit, files made by hand, and refusals of what belongs elsewhere."""

import builtins
import importlib
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from tests.test_interventions import PROMPTS, TOKENS, cache_edit, tokens
from tests.tiny import greedy, tiny_lm
from workbench.interventions import KV, Residual, extract
from workbench.interventions.interchange import from_cache_steering, from_gguf, from_layers, to_gguf, to_layers
from workbench.models import LM, ModelError

PAIRS = SimpleNamespace(positive=["one two three:", "abc def:", "k:"], negative=["one:", "a longer text:", "nine:"])


@pytest.fixture
def gguf() -> object:
    return pytest.importorskip("gguf", reason="the optional package gguf is not installed: pip install gguf")


def upper(lm: LM) -> Residual:
    """Vectors of all layers but the first, which llama.cpp does not take."""
    return extract(lm, PAIRS).at(layers=range(1, len(lm.blocks)))


def by_hand(gguf: object, file: Path, vectors: dict[str, np.ndarray], hint: str = "llama", kind: str = "") -> Path:
    """A control vector as repeng writes it, with the library alone."""
    writer = gguf.GGUFWriter(file, kind or "controlvector")
    writer.add_string("controlvector.model_hint", hint)
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for name, vector in vectors.items():
        writer.add_tensor(name, vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_gguf_round_trip_is_bit_equal(gguf: object, tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    x = upper(lm)
    for again in (from_gguf(to_gguf(x, tmp_path / "x.gguf"), lm), from_gguf(tmp_path / "x.gguf")):
        assert sorted(again.vectors) == [1, 2]
        assert all(torch.equal(again.vectors[layer], x.vectors[layer]) for layer in x.vectors)
        assert (again.model, again.revision, again.positions) == (lm.name, lm.revision, "all")
        assert (again.strength, again.operation) == (1.0, "add")
    assert tokens(lm, PROMPTS, again) == tokens(lm, PROMPTS, x)
    scaled = from_gguf(to_gguf(-2.5 * x, tmp_path / "y.gguf"))
    assert all(torch.equal(scaled.vectors[layer], -2.5 * x.vectors[layer]) for layer in x.vectors)
    (tmp_path / "x.gguf").unlink()  # nothing keeps it open
    assert torch.equal(again.vectors[1], x.vectors[1])


def test_what_is_written_reads_with_the_library_alone(gguf: object, tmp_path: Path) -> None:
    x = upper(tiny_lm("llama"))
    reader = gguf.GGUFReader(to_gguf(x, tmp_path / "x.gguf", model_hint="llama"))
    assert bytes(reader.get_field("general.architecture").parts[-1]) == b"controlvector"
    assert bytes(reader.get_field("controlvector.model_hint").parts[-1]) == b"llama"
    assert int(reader.get_field("controlvector.layer_count").parts[-1][0]) == 2
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2"]
    for tensor in reader.tensors:
        assert tensor.tensor_type.name == "F32"
        np.testing.assert_array_equal(tensor.data, x.vectors[int(tensor.name[-1])].numpy())


def as_repeng_reads(gguf: object, file: Path) -> tuple[str, dict[int, np.ndarray]]:
    """By the rules of repeng's import_gguf: an architecture, a model hint that must be there, layers from the names."""
    reader = gguf.GGUFReader(file)
    assert bytes(reader.get_field("general.architecture").parts[-1]) == b"controlvector"
    hint = reader.get_field("controlvector.model_hint")
    if not hint or not len(hint.parts):
        raise ValueError("missing controlvector.model_hint field")
    found = {}
    for tensor in reader.tensors:
        if tensor.name.startswith("direction."):
            found[int(tensor.name.split(".")[1])] = tensor.data
    return bytes(hint.parts[-1]).decode(), found


def as_llama_cpp_reads(gguf: object, file: Path) -> list[np.ndarray]:
    """By the rules of llama.cpp's loader: layers from 1, float32, one dimension, one width; others are zero."""
    found: dict[int, np.ndarray] = {}
    for tensor in gguf.GGUFReader(file).tensors:
        prefix, number = tensor.name.split(".")
        assert prefix == "direction" and int(number) > 0
        assert tensor.tensor_type.name == "F32" and len(tensor.shape) == 1
        found[int(number)] = np.array(tensor.data)
    (width,) = {len(vector) for vector in found.values()}
    return [found.get(layer, np.zeros(width, np.float32)) for layer in range(1, max(found) + 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_other_tools_read_what_is_written(gguf: object, tmp_path: Path, dtype: torch.dtype) -> None:
    lm = tiny_lm("llama")
    generator = torch.Generator().manual_seed(0)
    vectors = {layer: torch.randn(lm.d_model, generator=generator).to(dtype) for layer in (9, 2, 10)}
    x = Residual(vectors, strength=-0.3, model="other", revision="abc")
    for hint, expected in (("", "unknown"), ("llama", "llama")):
        file = to_gguf(x, tmp_path / "x.gguf", model_hint=hint)
        found, directions = as_repeng_reads(gguf, file)
        assert found == expected
        assert sorted(directions) == [2, 9, 10]
        rows = as_llama_cpp_reads(gguf, file)
        assert len(rows) == 10
        for layer, vector in vectors.items():
            exact = (-0.3 * vector.float()).numpy()  # in float32, as it acts here: no rounding to the vector's dtype
            np.testing.assert_array_equal(directions[layer], exact)
            np.testing.assert_array_equal(rows[layer - 1], exact)
            np.testing.assert_array_equal(to_layers(x)[layer].numpy(), exact)
        assert not rows[4].any()
    assert from_gguf(file).details["model_hint"] == "llama"


@pytest.mark.parametrize(
    ("hint", "family", "fits"),
    [
        ("gemma3", "gemma3", True), ("gemma3_text", "gemma3", True), ("gemma2", "gemma3", False),
        ("llama", "llama", True), ("mistral", "llama", False), ("unknown", "llama", True), ("", "llama", True),
        ("phi2", "llama", True),  # llama.cpp's own names are no families of transformers
    ],
)  # fmt: skip
def test_the_model_hint_is_the_family_with_or_without_images(
    gguf: object, hint: str, family: str, fits: bool, tmp_path: Path
) -> None:
    lm = tiny_lm(family)
    file = by_hand(gguf, tmp_path / "x.gguf", {"direction.1": np.ones(lm.d_model, dtype=np.float32)}, hint=hint)
    if fits:
        assert from_gguf(file, lm).revision == lm.revision
        return
    with pytest.raises(ModelError, match=f"made for a '{hint}' model.*rebind"):
        from_gguf(file, lm)
    assert tokens(lm, PROMPTS, from_gguf(file).rebind(lm))


def test_half_and_double_precision_are_read_and_packed_numbers_are_not(gguf: object, tmp_path: Path) -> None:
    vector = np.linspace(-1, 1, 64)
    for dtype in (np.float16, np.float64):
        x = from_gguf(by_hand(gguf, tmp_path / "x.gguf", {"direction.1": vector.astype(dtype)}))
        np.testing.assert_array_equal(x.vectors[1].numpy(), vector.astype(dtype).astype(np.float32))
    with pytest.raises(ModelError, match=r"stored as I32; control vectors are F32"):
        from_gguf(by_hand(gguf, tmp_path / "x.gguf", {"direction.1": np.arange(64, dtype=np.int32)}))


def test_layer_zero_of_repeng_is_read_at_block_zero(gguf: object, tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    vector = np.ones(lm.d_model, dtype=np.float32)
    assert sorted(from_gguf(by_hand(gguf, tmp_path / "x.gguf", {"direction.0": vector}), lm).vectors) == [0]


def test_a_file_made_by_hand_adds_behind_the_block_of_its_number(gguf: object, tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    vector = np.random.default_rng(0).normal(size=lm.d_model).astype(np.float32) * 3
    x = from_gguf(by_hand(gguf, tmp_path / "v.gguf", {"direction.2": vector, "direction.1": -vector}), lm)
    assert sorted(x.vectors) == [1, 2]
    assert x.details["model_hint"] == "llama"
    assert (x.model, x.revision) == (lm.name, lm.revision)
    handles = [
        lm.blocks[layer].register_forward_hook(
            lambda module, inputs, output, sign=sign: output + sign * torch.from_numpy(vector)
        )
        for layer, sign in ((1, -1), (2, 1))
    ]
    expected = [greedy(lm, prompt, TOKENS, use_cache=True) for prompt in PROMPTS]
    for handle in handles:
        handle.remove()
    assert tokens(lm, PROMPTS, x) == expected
    assert tokens(lm, PROMPTS) != expected


def test_gguf_of_other_models_and_other_files_are_refused(gguf: object, tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    fits, wide = np.ones(lm.d_model, dtype=np.float32), np.ones(lm.d_model + 1, dtype=np.float32)
    for vectors, message in (
        ({"direction.1": wide}, "width 65"),
        ({"direction.3": fits}, "layers 0 to 2"),
        ({"blk.1.weight": fits}, "'blk.1.weight'"),
        ({"direction.one": fits}, "'direction.one'"),
        ({"direction.-1": fits}, "'direction.-1'"),
        ({"direction.1": fits * np.nan}, "infinite or no numbers"),
        ({"direction.1": np.ones((2, lm.d_model), dtype=np.float32)}, "shape"),
        ({}, "0 tensors"),
    ):
        with pytest.raises(ModelError, match=message):
            from_gguf(by_hand(gguf, tmp_path / "bad.gguf", vectors), lm)
    with pytest.raises(ModelError, match="made for a 'gemma3' model"):
        from_gguf(by_hand(gguf, tmp_path / "g.gguf", {"direction.1": fits}, hint="gemma3"), lm)
    with pytest.raises(ModelError, match="holds 'llama' with 1 tensors"):
        from_gguf(by_hand(gguf, tmp_path / "m.gguf", {"direction.1": fits}, kind="llama"), lm)
    other = Residual({1: torch.ones(lm.d_model)}, model="elsewhere", revision="0123")
    with pytest.raises(ModelError, match="elsewhere"):
        from_gguf(to_gguf(other, tmp_path / "o.gguf"), lm)
    for content in (b"", b"GGUF", b"no gguf at all", (tmp_path / "o.gguf").read_bytes()[:200]):
        (tmp_path / "broken.gguf").write_bytes(content)
        with pytest.raises(ModelError, match=r"no GGUF file that can be read"):
            from_gguf(tmp_path / "broken.gguf")
    with pytest.raises(ModelError, match="There is no file"):
        from_gguf(tmp_path / "absent.gguf")


def test_what_control_vectors_cannot_say_is_refused(gguf: object, tmp_path: Path) -> None:
    v = extract(tiny_lm("llama"), PAIRS)
    with pytest.raises(ModelError, match=r"layer 0.*layers=\[1, 2\]"):
        to_gguf(v, tmp_path / "x.gguf")
    with pytest.raises(ModelError, match="positions='last'"):
        to_gguf(v.at(layers=[1], positions="last"), tmp_path / "x.gguf")
    with pytest.raises(ModelError, match="operation='ablate'"):
        to_gguf(v.at(layers=[1]).ablate(), tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModelError, match="pip install gguf"):
        from_gguf(tmp_path / "x.gguf")
    with pytest.raises(ModelError, match="pip install gguf"):
        to_gguf(Residual({1: torch.ones(4)}), tmp_path / "x.gguf")


def test_layers_round_trip_is_bit_equal(tmp_path: Path) -> None:
    lm = tiny_lm("gpt2")
    x = extract(lm, PAIRS)
    layers = to_layers(x)
    torch.save(layers, tmp_path / "layers.pt")
    vector = SimpleNamespace(layer_activations=layers, layer_type="decoder_block")
    for source in (layers, vector, tmp_path / "layers.pt"):
        again = from_layers(source, lm)
        assert sorted(again.vectors) == [0, 1, 2]
        assert all(torch.equal(again.vectors[layer], x.vectors[layer]) for layer in x.vectors)
        assert (again.positions, again.revision) == ("all", lm.revision)
    assert torch.equal(to_layers(0.5 * x)[1], 0.5 * x.vectors[1])
    again.vectors[1].zero_()
    assert x.vectors[1].abs().sum() > 0  # nobody shares memory
    with pytest.raises(ModelError, match="not a KV"):
        to_layers(extract(lm, PAIRS, site="kv"))


def test_layers_of_other_models_and_other_sites_are_refused() -> None:
    lm = tiny_lm("llama")
    for layers, message in (
        ({1: torch.ones(8)}, "width 8"),
        ({7: torch.ones(lm.d_model)}, "layers 0 to 2"),
        ({"model.layers.1": torch.ones(lm.d_model)}, "'model.layers.1'"),
        ({1: torch.ones(1, lm.d_model)}, "shape"),
        ({1: [0.0] * lm.d_model}, "is list"),
        ([torch.ones(lm.d_model)], "list given"),
        ({-1: torch.ones(lm.d_model)}, "Entry -1: layers are counted from 0"),
        ({1: torch.full((lm.d_model,), torch.inf)}, "Entry 1: it holds numbers that are infinite"),
        ({}, "no layer"),
        (SimpleNamespace(layer_activations={}, layer_type="self_attn"), "layer_type='self_attn'"),
    ):
        with pytest.raises(ModelError, match=message):
            from_layers(layers, lm)


class Attack:
    """An object whose unpickling writes a file: what a torch file of an unknown origin may hold."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return builtins.open, (str(self.file), "w")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    lm, file, trace = tiny_lm("llama"), tmp_path / "x.pt", tmp_path / "trace"
    torch.save({1: torch.ones(lm.d_model), "extra": Attack(trace)}, file)
    with pytest.raises(ModelError, match="pickled objects, which can run code, are refused"):
        from_layers(file, lm)
    with pytest.raises(ModelError, match="pickled objects, which can run code, are refused"):
        from_cache_steering(file, lm)
    assert not trace.exists()
    file.write_bytes(b"nothing")
    with pytest.raises(ModelError, match="cannot be read"):
        from_layers(file, lm)
    with pytest.raises(ModelError, match="There is no file"):
        from_layers(tmp_path / "absent.pt", lm)


def stored(lm: LM, scale: float = 8.0) -> dict:
    """A dictionary as cache-steering's extraction returns it, activations beside keys and values."""
    kv = cache_edit(lm)
    return {
        "values": {layer: scale * tensor for layer, tensor in kv.values.items()},
        "keys": {layer: scale * tensor for layer, tensor in kv.keys.items()},
        "activations": {layer: torch.zeros(3, lm.d_model) for layer in kv.keys},
    }


def as_that_tool_does(lm: LM, prompt: str, vectors: dict, c_keys: float, c_values: float) -> list[int]:
    """From the definition: cache prompt[:-1], add keys and values as they are to its last token in layers >= 1."""
    ids = torch.tensor([lm.encode(prompt)])
    cache, new = DynamicCache(config=lm.model.config), []
    with torch.no_grad():
        lm.model(ids[:, :-1], past_key_values=cache)
        for layer in range(1, len(lm.blocks)):
            cache.layers[layer].keys[:, :, -1] += c_keys * vectors["keys"][layer]
            cache.layers[layer].values[:, :, -1] += c_values * vectors["values"][layer]
        token = ids[:, -1:]
        while len(new) < TOKENS and 1 not in new:
            token = lm.model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            new.append(int(token))
    return new


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_cache_steering_files_do_what_that_tool_does(architecture: str, tmp_path: Path) -> None:
    lm = tiny_lm(architecture)
    vectors = stored(lm)
    torch.save(vectors, tmp_path / "kv.pt")
    x = from_cache_steering(tmp_path / "kv.pt", lm)
    assert isinstance(x, KV)
    assert (x.rotated, x.revision, x.chosen) == ((), lm.revision, (1, 2))
    for layer in range(3):
        assert torch.equal(x.values[layer], vectors["values"][layer])
        assert torch.equal(x.keys[layer], vectors["keys"][layer])
    for c_keys, c_values in ((1.0, 1.0), (0.0, 4.0)):
        expected = [as_that_tool_does(lm, prompt, vectors, c_keys, c_values) for prompt in PROMPTS]
        assert tokens(lm, PROMPTS, x.scaled(keys=c_keys, values=c_values)) == expected
    assert expected != tokens(lm, PROMPTS)


def test_layer_zero_is_edited_where_it_is_named() -> None:
    """As that tool's bare function does, which its evaluations leave out."""
    lm = tiny_lm("llama")
    vectors = stored(lm)
    x = from_cache_steering(vectors, lm).at(range(3)).scaled(keys=0.0, values=4.0)
    ids = torch.tensor([lm.encode(PROMPTS[0])])
    cache = DynamicCache(config=lm.model.config)
    with torch.no_grad():
        lm.model(ids[:, :-1], past_key_values=cache)
        for layer in range(3):
            cache.layers[layer].values[:, :, -1] += 4.0 * vectors["values"][layer]
        expected = lm.model(ids[:, -1:], past_key_values=cache).logits[0, -1]
        with lm.apply(x):
            found = lm.model(ids).logits[0, -1]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_dictionaries_that_make_their_entries_and_other_dtypes_are_read() -> None:
    lm = tiny_lm("llama")
    values = defaultdict(lambda: torch.zeros(2, 16))  # as the notebook of that tool returns them
    values[1] = torch.ones(2, 16, dtype=torch.bfloat16)
    x = from_cache_steering({"values": values, "keys": {}, "labels": None}, lm)
    assert (x.chosen, len(values)) == ((1,), 1)
    twin = from_cache_steering({"values": {1: torch.ones(2, 16)}}, lm)
    assert tokens(lm, PROMPTS, x.scaled(values=8.0)) == tokens(lm, PROMPTS, twin.scaled(values=8.0))


def test_keys_that_were_unrotated_are_rotated_again() -> None:
    lm = tiny_lm("llama")
    kv = cache_edit(lm)
    again = from_cache_steering({"keys": kv.keys, "values": kv.values}, lm, keys_rotated=False)
    assert again.rotated == kv.rotated == (0, 1, 2)
    x = again.scaled(keys=8.0, values=8.0)
    assert tokens(lm, PROMPTS, x) == tokens(lm, PROMPTS, kv)
    as_they_are = from_cache_steering({"keys": kv.keys, "values": kv.values}, lm).scaled(keys=8.0, values=8.0)
    with lm.apply(x), torch.no_grad():
        logits = lm.model(torch.tensor([lm.encode(PROMPTS[0])])).logits
    with lm.apply(as_they_are), torch.no_grad():
        assert not torch.allclose(lm.model(torch.tensor([lm.encode(PROMPTS[0])])).logits, logits)


def test_missing_layers_are_zero() -> None:
    lm = tiny_lm("llama")
    values = {2: torch.ones(2, 16)}
    x = from_cache_steering({"values": values}, lm)
    assert x.chosen == (2,)
    assert not x.keys[2].any()
    x = from_cache_steering({"values": values, "keys": {1: torch.ones(2, 16)}}, lm)
    assert x.chosen == (1, 2)
    assert not x.values[1].any() and not x.keys[2].any()


def test_cache_steering_of_other_models_and_clusters_is_refused() -> None:
    lm = tiny_lm("llama")
    good = torch.ones(2, 16)
    for source, message in (
        ({"values": {1: torch.ones(4, 16)}}, r"values of layer 1 have shape \(4, 16\).*has \(2, 16\)"),
        ({"keys": {1: torch.ones(2, 8)}, "values": {1: good}}, "keys of layer 1"),
        ({"values": {9: good}}, "layers 0 to 2"),
        ({"values": {1: torch.ones(1, 2, 16)}}, "shape"),
        ({"values": [{1: good}, {1: good}], "keys": []}, "Of clusters, choose one"),
        ({"vectors": {1: good}}, "needed is"),
        ([good], "needed is"),
        ({"values": {}, "keys": {}}, "no layer"),
    ):
        with pytest.raises(ModelError, match=message):
            from_cache_steering(source, lm)
