"""Notebooks of a few quick cells, without torch, for tests that run, kill and repeat them."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = """from typing import Annotated, Literal
from pydantic import Field
model: str = "lab-none"
n: Annotated[int, Field(ge=1, le=1000)] = 20
rate: float = 2e-4
mode: Literal["none", "fast"] = "none"
out: str = "outputs/interactive"
"""
SETUP = """from workbench import runs
folder = runs.begin({stage!r}, out)
"""
WORK = """import hashlib, time
from workbench.files import write_atomic
seed = {seed}
for step in runs.progress(range(n), {stage!r}):
    path = folder / f"part-{{step % 4}}.json"
    write_atomic(path, '{{"step": %d}}' % step)
    seed = hashlib.sha256(f"{{seed}}{{step}}{{rate}}{{mode}}".encode()).hexdigest()
    time.sleep(0.005)
"""
TRAINER = """import subprocess, sys, time
program = "import time; time.sleep(0.6); print(7)"
trained = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
seed += trained
"""
FINISH = (
    'runs.finish(folder, {"seed": seed, "n": n, "rate": rate, "table": [{"condition": "plain", "accuracy": 0.5}]})\n'
)


def write_notebook(path: Path, cells: list[str], parameters: str | None = PARAMETERS, **metadata: object) -> Path:
    """Write a notebook; the first code cell is tagged `parameters` unless there are none."""
    code = [{"cell_type": "markdown", "id": "title", "metadata": {}, "source": f"# {path.stem}"}]
    for index, source in enumerate([*([parameters] if parameters is not None else []), *cells]):
        tags = ["parameters"] if index == 0 and parameters is not None else []
        cell = {"cell_type": "code", "id": f"c{index}", "metadata": {"tags": tags}, "source": source}
        code.append({**cell, "outputs": [], "execution_count": None})
    content = {"cells": code, "metadata": {"workbench": metadata}, "nbformat": 4, "nbformat_minor": 5}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def stage(path: Path, seed: str = "'start'", *, trainer: bool = False) -> Path:
    """Write a notebook that takes part in a run and works for a moment."""
    name = path.stem
    cells = [SETUP.format(stage=name), WORK.format(stage=name, seed=seed), *([TRAINER] if trainer else []), FINISH]
    return write_notebook(path, cells)


def three(folder: Path) -> list[Path]:
    """Write three stages, each but the first reading the one before; the second has a child process."""
    before = '__import__("json").loads((runs.earlier({!r}, out) / "result.json").read_text())["seed"]'
    return [
        stage(folder / "00_first.ipynb"),
        stage(folder / "01_second.ipynb", before.format("00_first"), trainer=True),
        stage(folder / "02_third.ipynb", before.format("01_second")),
    ]


def command(*words: object) -> list[str]:
    """Return a `python -m workbench` command line."""
    return [sys.executable, "-m", "workbench", *map(str, words)]


def environment() -> dict[str, str]:
    """Return an environment in which the package is found from any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def start(cwd: Path, *words: object) -> "subprocess.Popen[str]":
    """Start the command line in a folder."""
    return subprocess.Popen(
        command(*words), cwd=cwd, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
