"""What tests share: tiny random models of each architecture, the shipped lab model, the folder of benchmark data."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.tiny import make_tiny
from workbench.models import LM, load_model
from workbench.tasks import Task, load_task

LAB = Path(__file__).parents[1] / "data" / "lab"


def pytest_collection_finish() -> None:
    """Libraries and tests are there to stay: the many full collections that training asks for need not visit them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two workers on two cores: a second torch thread a process would make both slower."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny random model: `tiny("llama")`, also qwen3, gemma3, gpt2, mistral."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = make_tiny(architecture, tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return folder


@pytest.fixture(scope="session")
def lab() -> LM:
    """The shipped lab model."""
    if not (LAB / "model.safetensors").exists():
        pytest.skip(f"{LAB} holds no model yet; make it with: make lab-model")
    return load_model("lab")


@pytest.fixture(scope="session")
def word_problems() -> Task:
    """The lab's main task."""
    return load_task("word-problems")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real benchmark data."""
    folder = os.environ.get("WORKBENCH_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("WORKBENCH_DATA names no folder; set it to the folder with gsm8k, svamp and the other benchmarks")
    return Path(folder)
