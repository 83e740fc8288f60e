"""Start another library's program in its own environment, and save a model so that transformers 4 reads it.

`make outside` makes the environments, under `.outside`. Nothing here needs them: `interpreter` says None without.
"""

import json
import os
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import numpy as np
import torch

from workbench.models import LM

HERE = Path(__file__).resolve().parent
ENVIRONMENTS = HERE.parents[1] / ".outside"
NAMES = ("steering-vectors", "repeng")


def interpreter(name: str) -> Path | None:
    """The Python of a library's environment, or None: not installed, or not to its end."""
    folder = ENVIRONMENTS / name
    return folder / "bin" / "python" if (folder / ".complete").exists() else None


def save_for_transformers_4(lm: LM, folder: Path) -> Path:
    """The model in float32 and its tokenizer, with the names that transformers 4 knows.

    Its configuration has `rope_theta` where transformers 5 writes `rope_parameters`; read unchanged, the old default
    of 10000 would silently stand in for any other base.
    """
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    rope = config.pop("rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r}: give a model with plain rotary embedding, or none.")
    config |= {name: value for name, value in rope.items() if name != "rope_type"}
    config |= {"torch_dtype": config.pop("dtype", "float32")}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    place = folder / "tokenizer_config.json"
    tokenizer = json.loads(place.read_text(encoding="utf-8"))
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer["model_input_names"] = ["input_ids", "attention_mask"]  # GPT-2 would embed token types, were they given
    tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens", [])
    place.write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


class Program:
    """A library's program, running inside a `with` block."""

    def __init__(self, name: str) -> None:
        python = interpreter(name)
        if python is None:
            raise FileNotFoundError(f"{name} is not installed under {ENVIRONMENTS}. Install it with: make outside")
        script = HERE / f"run_{name.replace('-', '_')}.py"
        self.name, self.command = name, [str(python), str(script), str(torch.get_num_threads())]

    def __enter__(self) -> "Program":
        self.scratch = TemporaryDirectory()
        self.errors = Path(self.scratch.name) / "stderr"
        lone = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env=lone | {"HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.communicate()  # the end of its input ends it
        self.scratch.cleanup()

    def ask(self, work: str, folder: Path, **arguments: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """The arrays that one piece of work gives on the model in `folder`; its seconds (wall, cpu) and versions."""
        out = Path(self.scratch.name) / "answer.npz"
        request = {"work": work, "folder": str(folder), "out": str(out), "arguments": arguments}
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and what it wrote says why
        line = self.process.stdout.readline()
        if not line:
            said = self.errors.read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"The program of {self.name} ended in the middle of {work!r}:\n{said[-2000:]}")
        with np.load(out) as arrays:
            return dict(arrays), json.loads(line)

    def train(self, folder: Path, **arguments: Any) -> tuple[dict[int, torch.Tensor], dict[str, Any]]:
        """The vectors that its training gives, by layer, and what `ask` says beside."""
        arrays, facts = self.ask("train", folder, **arguments)
        return {int(layer): torch.from_numpy(array).float() for layer, array in sorted(arrays.items())}, facts
