"""Programs of other libraries, and models that they and we read the same way."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.outside.program import Program, interpreter, save_for_transformers_4
from tests.tiny import tiny_lm
from workbench.models import LM

Saved = Callable[..., tuple[LM, Path]]


def started(name: str) -> Iterator[Program]:
    if interpreter(name) is None:
        pytest.skip(f"{name} is not installed; install it and run these tests with: make outside")
    with Program(name) as program:
        yield program


@pytest.fixture(scope="session")
def steering_vectors() -> Iterator[Program]:
    yield from started("steering-vectors")


@pytest.fixture(scope="session")
def repeng() -> Iterator[Program]:
    yield from started("repeng")


@pytest.fixture(scope="session")
def saved(lab: LM, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved("gpt2")`: the model and a folder that transformers 4 reads; `padding_side` is what its tokenizer says."""

    def save(name: str, padding_side: str | None = None) -> tuple[LM, Path]:
        lm = lab if name == "lab" else tiny_lm(name)
        folder = save_for_transformers_4(lm, tmp_path_factory.mktemp(name))
        place = folder / "tokenizer_config.json"
        config = json.loads(place.read_text(encoding="utf-8"))
        config |= {"padding_side": padding_side} if padding_side else {}
        place.write_text(json.dumps(config), encoding="utf-8")
        return lm, folder

    return save
