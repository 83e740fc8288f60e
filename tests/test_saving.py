"""Interventions saved and loaded: the same values and tokens afterwards, and refusal where they do not belong."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file
from transformers import DynamicCache

from tests.test_adapter import make_adapter
from tests.test_interventions import PAIRS, PROMPTS, cache_edit, tokens, vector
from tests.tiny import make_tiny, tiny_lm
from workbench.files import content_key
from workbench.interventions import (
    KV,
    Adapter,
    CompressCache,
    DropTokens,
    Intervention,
    Logits,
    ReplaceTokens,
    Residual,
    ScaleTokens,
    SpliceBlock,
    Sum,
    extract,
    isolate,
    load_intervention,
    project_out,
    read_pairs,
)
from workbench.interventions import files as files_module
from workbench.interventions.gate import Conditional, Gate
from workbench.interventions.kv_blocks import Block, splice, take
from workbench.models import LM, ModelError, load_model


def header_of(file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as stream:
        return json.loads(stream.metadata()["workbench"])


def rewritten(file: Path, change: Callable[[dict, dict], None]) -> Path:
    """The same file with its header and tensors changed by hand."""
    header = header_of(file)
    with safe_open(file, framework="pt") as stream:
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 - not a dict
    change(header, tensors)
    file.write_bytes(save(tensors, metadata={"workbench": json.dumps(header)}))
    return file


def assert_equal(one: Any, other: Any) -> None:
    """The same types, numbers and tensors bit for bit, all the way down."""
    assert type(one) is type(other)
    if isinstance(one, LM):
        assert (one.name, one.revision) == (other.name, other.revision)
    elif is_dataclass(one):
        for each in fields(one):
            assert_equal(getattr(one, each.name), getattr(other, each.name))
        assert getattr(one, "calibration", None) == getattr(other, "calibration", None)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


@pytest.mark.parametrize("positions", ["generated", (0, -1), slice(-3, None), slice(None, 4, 2)], ids=str)
def test_a_round_trip_gives_the_same_tokens(positions: object, tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    for number, x in enumerate(
        [vector(lm, 1, positions, 1.5), cache_edit(lm).at([0, 2]), vector(lm, 0, positions) - 0.5 * cache_edit(lm)]
    ):
        file = x.save(tmp_path / "deep" / f"{number}.safetensors")
        back = load_intervention(file)
        assert isinstance(back, Sum) == isinstance(x, Sum)
        assert tokens(lm, PROMPTS, back) == tokens(lm, PROMPTS, x)
        assert tokens(lm, PROMPTS, 2 * back) == tokens(lm, PROMPTS, 2 * x)


def test_weight_edits_are_saved(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    projected = project_out(lm, vector(lm, 1), [(1, 0), (1, 2)])
    pruned = isolate(lm, PROMPTS[:2], PROMPTS[2:3], share=0.2)
    for x in (projected, 0.5 * pruned, projected + vector(lm, 0) + pruned.multiplied(1.5)):
        back = load_intervention(x.save(tmp_path / "x.safetensors"))
        assert tokens(lm, PROMPTS, back) == tokens(lm, PROMPTS, x) != tokens(lm, PROMPTS)


def test_the_header_says_what_is_inside(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    file = (vector(lm, 1, "last", 2.0) + cache_edit(lm)).save(tmp_path / "x.safetensors")
    header = header_of(file)
    first, second = header["parts"]
    assert "before the final norm" in header["conventions"]["layers"]
    assert "end of the prompt" in header["conventions"]["positions"]
    assert (first["site"], first["positions"], first["strength"]) == ("residual", "last", 2.0)
    assert (first["model"], first["revision"], first["tensors"]) == (lm.name, lm.revision, {"vectors": {"1": [64]}})
    assert (second["site"], second["rotary"][:10], second["rotated"]) == ("kv", "un-rotated", [0, 1, 2])
    assert "calibration" not in header and "calibration" not in first


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_header_says_where_it_was_read_from_what_and_whether_keys_are_rotated(
    architecture: str, tmp_path: Path
) -> None:
    lm = tiny_lm(architecture)
    reading = read_pairs(lm, PAIRS)
    texts = content_key(positive=PAIRS.positive, negative=PAIRS.negative)
    rotary = "un-rotated" if architecture == "llama" else "as cached:"
    for x, place, applied in (
        (reading.vector().at(positions="generated"), "-1", ("positions", "generated")),
        (reading.vector("pca"), "-1", ("positions", "all")),
        (reading.kv(), "-2", ("position", -2)),
        (extract(lm, PAIRS, token=-2), "-2", ("positions", "all")),
        (extract(lm, PAIRS, site="kv").at(position=-4), "-2", ("position", -4)),
        (replace(reading.kv(), rotated=()), "-2", ("position", -2)),
    ):
        part = header_of(x.save(tmp_path / "x.safetensors"))["parts"][0]
        assert part["details"]["data_sha256"] == texts
        assert part["details"]["token"] == place
        assert part[applied[0]] == applied[1]
        if isinstance(x, KV):
            assert part["rotary"][:10] == (rotary if x.rotated else "as cached:")
    assert "data_sha256" in header_of(tmp_path / "x.safetensors")["conventions"]
    other = type("Pairs", (), {"positive": PAIRS.negative, "negative": PAIRS.positive})
    assert extract(lm, other).details["data_sha256"] != texts


def test_chat_messages_are_hashed_as_the_text_that_was_read() -> None:
    lm = tiny_lm("llama")
    chats = [[{"role": "user", "content": word}] for word in ("one", "two")]
    pairs = type("Pairs", (), {"positive": chats[:1], "negative": chats[1:]})
    texts = content_key(positive=[lm.render(chats[0])], negative=[lm.render(chats[1])])
    assert extract(lm, pairs).details["data_sha256"] == texts


RECORD = {"budget": 0.5, "percentile": 95, "kl": 0.49, "strength": 0.25, "evaluations": 3, "prompts_sha256": "ab"}


def test_a_calibration_is_kept_for_exactly_what_was_calibrated(tmp_path: Path) -> None:
    lm, other = tiny_lm("llama"), load_model(make_tiny("llama", tmp_path / "other", seed=1))
    for x in (vector(lm), cache_edit(lm), vector(lm) + cache_edit(lm), vector(lm).when(gate(lm))):
        found = x.with_calibration(RECORD)
        assert x.calibration is None and found.calibration == RECORD
        assert tokens(lm, PROMPTS, found) == tokens(lm, PROMPTS, x)
        file = found.save(tmp_path / "x.safetensors")
        place = header_of(file) if isinstance(x, Sum) else header_of(file)["parts"][0]
        assert place["calibration"] == RECORD
        back = load_intervention(file)
        assert back.calibration == RECORD
        for changed in (2 * back, 1.0 * back, -back, back + vector(lm, 0), back.rebind(other)):
            assert changed.calibration is None
    alone = vector(lm).with_calibration(RECORD)
    assert alone.at(positions="last").calibration is alone.ablate().calibration is None
    both = load_intervention((alone + cache_edit(lm)).save(tmp_path / "y.safetensors"))
    assert [part.calibration for part in both.parts] == [RECORD, None]


def test_another_model_is_refused_unless_rebound(tmp_path: Path) -> None:
    lm, other = tiny_lm("llama"), load_model(make_tiny("llama", tmp_path / "other", seed=1))
    for x in (vector(lm), cache_edit(lm), vector(lm) + cache_edit(lm)):
        back = load_intervention(x.save(tmp_path / "x.safetensors"))
        with pytest.raises(ModelError, match=f"revision {lm.revision}.*revision {other.revision}"):
            other.generate(["abc"], back, max_new_tokens=1)
        assert other.generate(["abc"], back.rebind(other), max_new_tokens=1)
    with pytest.raises(ModelError, match="layers 0 to 2"):
        lm.generate(["abc"], vector(tiny_lm("gemma3"), 3), max_new_tokens=1)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no file"):
        load_intervention(tmp_path / "missing.safetensors")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ModelError, match="not a safetensors file"):
        load_intervention(tmp_path / "text")
    save_file({"a": torch.ones(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ModelError, match="not an intervention"):
        load_intervention(tmp_path / "weights.safetensors")


def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    file = vector(tiny_lm("llama")).save(tmp_path / "x.safetensors")
    whole = file.read_bytes()
    for length in (0, 4, 8, 100, struct.unpack("<Q", whole[:8])[0] + 8, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(ModelError, match="cut off"):
            load_intervention(file)


def renamed(header: dict, tensors: dict) -> None:
    header["parts"][0]["site"] = "telepathy"


def newer(header: dict, tensors: dict) -> None:
    header["format"] = "workbench-intervention-2"


def foreign(header: dict, tensors: dict) -> None:
    header["format"] = "somebody-elses"


def missing(header: dict, tensors: dict) -> None:
    tensors["other"] = tensors.pop("0.vectors.1")


def narrower(header: dict, tensors: dict) -> None:
    tensors["0.vectors.1"] = tensors["0.vectors.1"][:32].clone()


def without_parts(header: dict, tensors: dict) -> None:
    del header["parts"]


def no_parts(header: dict, tensors: dict) -> None:
    header["parts"] = []


def without_vectors(header: dict, tensors: dict) -> None:
    del header["parts"][0]["tensors"]["vectors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, "kind 'telepathy', which this version does not know. It knows: residual, low_rank, kv"),
        (newer, r"written by a newer version of this package \(format 2; this one reads up to 1\).*Update"),
        (foreign, "not an intervention"),
        (missing, r"names a tensor '0\.vectors\.1' of shape \[64\]; the file has none of that name"),
        (narrower, r"of shape \[64\]; the file has one of shape \[32\]"),
        (without_parts, "KeyError: 'parts'"),
        (no_parts, "IndexError"),
        (without_vectors, "TypeError.*vectors"),
    ],
    ids=lambda change: getattr(change, "__name__", ""),
)
def test_a_file_that_contradicts_itself_is_refused(change: Callable, message: str, tmp_path: Path) -> None:
    file = rewritten(vector(tiny_lm("llama")).save(tmp_path / "x.safetensors"), change)
    with pytest.raises(ModelError, match=message):
        load_intervention(file)


def test_a_tensor_field_of_another_shape_is_refused(tmp_path: Path) -> None:
    lm = tiny_lm("llama")

    def shorter(header: dict, tensors: dict) -> None:
        tensors["0.gate.centre"] = tensors["0.gate.centre"][:3].clone()

    file = rewritten(vector(lm).when(gate(lm)).save(tmp_path / "x.safetensors"), shorter)
    with pytest.raises(ModelError, match=r"'0\.gate\.centre' of shape \[64\]; the file has one of shape \[3\]"):
        load_intervention(file)
    file.write_bytes(save({}, metadata={"workbench": "{not json"}))
    with pytest.raises(ModelError, match="not a safetensors file"):
        load_intervention(file)
    file.write_bytes(save({}, metadata={"workbench": "[]"}))
    with pytest.raises(ModelError, match="not an intervention"):
        load_intervention(file)


def test_another_models_shape_is_refused_when_applied(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    narrow = Residual({1: torch.ones(48)}, model="a-narrow-model")
    back = load_intervention(narrow.save(tmp_path / "x.safetensors"))
    with pytest.raises(ModelError, match=r"width 48.*width 64.*a-narrow-model"):
        lm.generate(["abc"], back, max_new_tokens=1)
    heads = {layer: torch.ones(4, 16) for layer in range(3)}
    back = load_intervention(KV(heads, heads).save(tmp_path / "x.safetensors"))
    with pytest.raises(ModelError, match=r"\(4, 16\).*caches \(2, 16\).*another model"):
        lm.generate(["abc"], back, max_new_tokens=1)


def test_another_models_name_is_refused_where_no_revision_is_known(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    for revision in ("", "unknown"):
        x = Residual({1: torch.ones(64)}, model="elsewhere", revision=revision)
        back = load_intervention(x.save(tmp_path / "x.safetensors"))
        with pytest.raises(ModelError, match=r"made on 'elsewhere'.*rebind"):
            lm.generate(["abc"], back, max_new_tokens=1)
        assert lm.generate(["abc"], replace(back, model=lm.name), max_new_tokens=1)
    assert lm.generate(["abc"], Residual({1: torch.ones(64)}), max_new_tokens=1)
    assert lm.generate(["abc"], replace(x, revision=lm.revision), max_new_tokens=1)  # a copy under another name


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"A Holder cannot be saved\. Kinds that can be: residual, low_rank, kv"):
        Holder().save(tmp_path / "x.safetensors")
    monkeypatch.setitem(files_module.KINDS, "holder", Holder)
    with pytest.raises(ModelError, match="cannot hold an object of type set"):
        Holder(notes={"thing": {1}}).save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


OLD = {  # headers as they were before positions, data and calibration had their words
    "residual": {
        "site": "residual", "tensors": {"vectors": {"1": [64]}}, "positions": {"slice": [-3, None, None]},
        "strength": 1.5, "model": "", "revision": "", "details": {"method": "mean_diff"}, "operation": "add",
        "level": 1.0,
    },
    "kv": {
        "site": "kv", "tensors": {"keys": {"1": [2, 16]}, "values": {"1": [2, 16]}}, "rotary": "un-rotated",
        "layers": [1], "key_strength": 0.0, "value_strength": 4.0, "rotated": [1], "model": "", "revision": "",
        "details": {},
    },
    "conditional": {
        "site": "conditional", "tensors": {},
        "inner": {"inner": [{"site": "residual", "tensors": {"vectors": {"0": [64]}}, "positions": [0, -1]}]},
        "gate": {"gate": {"site": "gate", "tensors": {}, "direction": {"tensor": [64]}, "centre": {"tensor": [64]},
                          "layer": 2, "threshold": 0.25, "measure": "cosine", "details": {"auroc": 0.9}}},
    },
}  # fmt: skip


def test_files_of_before_still_load(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    noise = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    tensors = {
        "0.vectors.1": noise[0], "1.keys.1": noise[1, :32].view(2, 16), "1.values.1": noise[2, :32].view(2, 16),
        "2.inner.0.vectors.0": noise[3], "2.gate.direction": noise[4], "2.gate.centre": noise[5],
    }  # fmt: skip
    header = {"format": "workbench-intervention-1", "layers": "...", "sum": True, "parts": list(OLD.values())}
    save_file(
        {name: t.clone() for name, t in tensors.items()}, tmp_path / "x", metadata={"workbench": json.dumps(header)}
    )
    first, second, third = load_intervention(tmp_path / "x").parts
    assert_equal(first, Residual({1: noise[0]}, slice(-3, None), 1.5, details={"method": "mean_diff"}))
    keys, values = ({1: noise[number, :32].view(2, 16)} for number in (1, 2))
    assert_equal(second, KV(keys, values, (1,), 0.0, 4.0, (1,)))
    decides = Gate(noise[4], noise[5], 2, 0.25, details={"auroc": 0.9})
    assert_equal(third, Conditional(Residual({0: noise[3]}, (0, -1)), decides))
    assert tokens(lm, PROMPTS, load_intervention(tmp_path / "x"))


def gate(lm: LM, threshold: float = 0.0) -> Gate:
    noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    return Gate(noise[0], noise[1], 1, threshold, "cosine", lm.name, lm.revision, {"auroc": 0.75})


def block_of(lm: LM, start: int, stop: int) -> Block:
    cache = DynamicCache(config=lm.model.config)
    with torch.no_grad():
        lm.model(torch.tensor([lm.encode(PROMPTS[0])]), past_key_values=cache)
    return take(cache, start, stop, lm)


def cache_edits(lm: LM) -> list[Intervention]:
    return [
        DropTokens((1, -3)),
        0.5 * ScaleTokens(slice(-4, -1), keys=0.5, values=-2.0, layers=(0, 2), heads=(1,)),
        0.75 * ReplaceTokens(block_of(lm, 2, 4), at=-3),
        SpliceBlock(block_of(lm, 2, 6), at=1),
        SpliceBlock(block_of(lm, 0, 3), at="start"),
        CompressCache(0.6, "snapkv", window=3),
    ]


@pytest.mark.parametrize("number", range(6))
def test_cache_edits_are_saved_alone_in_sums_and_behind_gates(number: int, tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    edit = cache_edits(lm)[number]
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 5]
    for x in (edit, edit + vector(lm), (edit + cache_edit(lm)).when(gate(lm))):
        back = load_intervention(x.save(tmp_path / "x.safetensors"))
        assert_equal(back, x)
        assert tokens(lm, prompts, back) == tokens(lm, prompts, x)
    assert load_intervention(edit.with_calibration(RECORD).save(tmp_path / "x")).calibration == RECORD


def test_a_block_of_another_model_is_refused_after_loading(tmp_path: Path) -> None:
    lm, other = tiny_lm("llama"), load_model(make_tiny("llama", tmp_path / "other", seed=1))
    back = load_intervention(SpliceBlock(block_of(lm, 2, 6)).save(tmp_path / "x"))
    with pytest.raises(ModelError, match=f"revision {lm.revision}.*revision {other.revision}"):
        other.generate(PROMPTS[:1], back, max_new_tokens=1)
    assert other.generate(PROMPTS[:1], back.rebind(other), max_new_tokens=1)


@dataclass(frozen=True, eq=False)
class Holder(Intervention):
    """What a kind may have besides numbers: a block or none."""

    block: Block | None = None
    at: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_block_inside_of_an_intervention(architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(files_module.KINDS, "holder", Holder)
    lm = tiny_lm(architecture)
    block, beginning = block_of(lm, 2, 6), block_of(lm, 0, 2)
    x = Holder(block, 3) + vector(lm) + Holder()
    back = load_intervention(x.save(tmp_path / "x.safetensors"))
    assert_equal(back, x)
    assert back.parts[2].block is None
    part = header_of(tmp_path / "x.safetensors")["parts"][0]
    assert part["block"]["block"]["tensors"]["keys"]["0"] == list(block.keys[0].shape)
    assert part["block"]["block"]["rotary"][:5] == ("un-ro" if architecture == "llama" else "as ca")
    caches = [DynamicCache(config=lm.model.config) for _ in range(2)]
    for other, held in zip(caches, (block, back.parts[0].block), strict=True):
        splice(other, beginning, lm)
        splice(other, held, lm)
    for one, other in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


@pytest.mark.parametrize(
    "notes", [{"slice": "x"}, {"tensor": 1}, {"block": {"a": "b"}}, {"plain": {"plain": 2}}, {"gate": None}, {}]
)
def test_plain_dicts_come_back_whatever_their_words(
    notes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(files_module.KINDS, "holder", Holder)
    x = Holder(notes=notes)
    assert_equal(load_intervention(x.save(tmp_path / "x.safetensors")), x)


def test_numpy_numbers_are_saved_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(files_module.KINDS, "holder", Holder)
    x = Holder(at=np.int64(3), notes={"strength": np.float32(1.5), "layers": list(np.arange(2))})  # type: ignore
    assert_equal(
        load_intervention(x.save(tmp_path / "x.safetensors")), Holder(None, 3, {"strength": 1.5, "layers": (0, 1)})
    )


def test_sums_in_sums_are_one_sum(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    x = Sum((vector(lm), Sum((cache_edit(lm), Sum((vector(lm, 0),))))))
    assert [type(part) for part in x.parts] == [Residual, KV, Residual]
    assert_equal(load_intervention(x.save(tmp_path / "x.safetensors")), x)


def test_sums_behind_gates_keep_what_they_are(tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    alone = Sum((vector(lm),)).when(gate(lm))
    several = (vector(lm).with_calibration(RECORD) + cache_edit(lm)).with_calibration(RECORD | {"kl": 0.3})
    for x in (alone, several.when(gate(lm)), Sum(()).when(gate(lm)), Sum(())):
        assert_equal(load_intervention(x.save(tmp_path / "x.safetensors")), x)


def test_another_model_comes_back_in_its_own_precision(tmp_path: Path) -> None:
    folder = make_tiny("llama", tmp_path / "b", seed=1)
    lm = tiny_lm("llama")
    for options, dtype, packed in (
        ({"dtype": "bfloat16"}, torch.bfloat16, False),
        ({"quantization": "nf4"}, torch.float32, True),
        ({}, torch.float32, False),
    ):
        x = Logits(amateur=load_model(folder, **options))
        back = load_intervention(x.save(tmp_path / "x.safetensors"))
        assert back.amateur.model.dtype == dtype
        assert getattr(back.amateur.model, "is_loaded_in_4bit", False) == packed
        assert tokens(lm, PROMPTS, back) == tokens(lm, PROMPTS, x)

    def older(header: dict, tensors: dict) -> None:
        header["parts"][0]["amateur"]["lm"] = header["parts"][0]["amateur"]["lm"][:2]

    assert_equal(load_intervention(rewritten(tmp_path / "x.safetensors", older)), x)


def test_adapters_and_other_models_are_named_in_a_sum(tmp_path: Path) -> None:
    lm, small = load_model(make_tiny("llama", tmp_path / "a")), load_model(make_tiny("llama", tmp_path / "b", seed=1))
    x = make_adapter(lm, tmp_path / "adapter") + 0.5 * Logits(expert=small, plausible=0.1) + vector(lm)
    file = x.save(tmp_path / "x.safetensors")
    back = load_intervention(file)
    assert_equal(back, x)
    assert [type(part) for part in back.parts] == [Adapter, Logits, Residual]
    assert tokens(lm, PROMPTS, back) == tokens(lm, PROMPTS, x)
    make_tiny("llama", tmp_path / "b", seed=2)
    with pytest.raises(ModelError, match=f"at revision {small.revision}; what loads now is"):
        load_intervention(file)


NUMBERS = st.floats(-4, 4)
SMALL = st.integers(-6, 6)
SPANS = st.one_of(
    st.sampled_from(["last", "prompt", "generated", "all"]),
    SMALL,
    st.lists(SMALL, max_size=3).map(tuple),
    st.builds(slice, st.none() | SMALL, st.none() | SMALL, st.none() | st.integers(1, 3)),
)
LAYERS = st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True).map(tuple)
SEEDS = st.integers(0, 99)
DETAILS = st.dictionaries(st.sampled_from(["method", "slice", "inner", "tensor", "é"]), st.text(max_size=4), max_size=2)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
OPERATIONS = st.sampled_from(["add", "ablate", "clamp"])
RECORDS = st.none() | st.fixed_dictionaries({"budget": NUMBERS, "evaluations": st.integers(1, 6)})
RESIDUALS = st.tuples(st.just("residual"), LAYERS, SEEDS, DTYPES, SPANS, NUMBERS, OPERATIONS, NUMBERS, DETAILS, RECORDS)
KV_HEADS = st.none() | st.sampled_from([(0,), (1, 0)])
EDITS = st.tuples(
    st.just("kv"), LAYERS, SEEDS, DTYPES, st.none() | LAYERS, NUMBERS, NUMBERS, KV_HEADS, st.integers(-4, -2), DETAILS,
    RECORDS,
)  # fmt: skip
HEADS = st.tuples(
    st.just("weights"), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=3, unique=True),
    SEEDS, NUMBERS, st.booleans(),
)  # fmt: skip
GATED = st.tuples(
    st.just("conditional"), st.lists(RESIDUALS | EDITS, min_size=1, max_size=2), SEEDS, st.integers(0, 2),
    st.floats(-1, 1), st.sampled_from(["cosine", "probe"]),
)  # fmt: skip


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(draw: tuple) -> Intervention:
    """The intervention that a draw stands for."""
    kind, *drawn = draw
    lm = tiny_lm("llama")
    origin = {"model": lm.name, "revision": lm.revision}
    if kind == "residual":
        layers, seed, dtype, positions, strength, operation, level, details, record = drawn
        vectors = {layer: noise(seed + layer, 64).to(dtype) for layer in layers}
        x = Residual(vectors, positions, strength, **origin, details=details, operation=operation, level=level)
        return x if record is None else x.with_calibration(record)
    if kind == "kv":
        layers, seed, dtype, own, keys, values, heads, position, details, record = drawn
        own = None if own is None else tuple(layer for layer in own if layer in layers) or None
        sides = [{layer: noise(seed + layer + 9 * side, 2, 16).to(dtype) for layer in layers} for side in (0, 1)]
        x = KV(*sides, own, keys, values, layers, **origin, details=details, heads=heads, position=position)
        return x if record is None else x.with_calibration(record)
    if kind == "weights":
        heads, seed, strength, pruned = drawn
        direction = Residual({layer: noise(seed, 64) for layer, _ in heads}, **origin)
        x = strength * project_out(lm, direction, heads)
        return x + isolate(lm, PROMPTS[:1], PROMPTS[2:3], share=0.1) if pruned else x
    inner, seed, layer, threshold, measure = drawn
    parts = tuple(map(made, inner))
    decides = Gate(noise(seed, 64), noise(seed + 1, 64), layer, threshold, measure, **origin, details={"auroc": 0.5})
    return (parts[0] if len(parts) == 1 else Sum(parts)).when(decides)


def outcome(x: Intervention) -> torch.Tensor:
    """Logits of two prompts, the second one padded on the left, under an intervention."""
    lm = tiny_lm("llama")
    texts = [lm.encode(prompt) for prompt in ("abcdefg hij", "klm no")]
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    with lm.apply(x, prompt_lengths=[len(text) - 2 for text in texts]), torch.no_grad():
        return lm.model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits


@settings(max_examples=60, deadline=None)
@given(st.lists(RESIDUALS | EDITS | HEADS | GATED, min_size=1, max_size=3), RECORDS)
def test_whatever_is_saved_comes_back_and_does_the_same(draws: list[tuple], record: dict | None) -> None:
    parts = tuple(map(made, draws))
    x = parts[0] if len(parts) == 1 else Sum(parts)
    x = x if record is None else x.with_calibration(record)
    with TemporaryDirectory() as folder:
        file = x.save(Path(folder) / "x.safetensors")
        back = load_intervention(file)
        again = back.save(Path(folder) / "y.safetensors")
        assert file.read_bytes() == again.read_bytes()
    assert_equal(back, x)
    assert torch.equal(outcome(back), outcome(x))
