"""The notebooks: clean in git, short cells, run whole by papermill on models that are not the lab's, with NF4 too."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from workbench.runs import run
from workbench.runs.params import read_parameters

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
SMALL = {
    "n": 5, "n_test": 5, "shots": 1, "pairs": 2, "max_new_tokens": 8, "samples": 1, "epochs": 1.0, "rank": 4,
    "recipe": "oracle", "beside": ["rejection", "magpie"], "n_beside": 3, "remember": ["chain-sum"], "n_remember": 4,
    "strengths": [1.0], "value_strengths": [1.0], "key_strengths": [0.0],
    "forgetting": ["chain-sum"], "forgetting_n": 5, "foreign_n": 5, "votes": 2, "robust_n": 3,
}  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path: Path) -> None:
    book = json.loads(path.read_text())
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1
    assert max(len("".join(cell["source"]).splitlines()) for cell in code) <= 15
    assert not any("pip install" in "".join(cell["source"]) for cell in code)
    first = "".join(book["cells"][0]["source"])
    assert first.startswith("# ")
    assert "What you will learn" in first
    names = list(read_parameters(path).parameters)
    assert names[0] in ("model", "runs")
    assert names[-1] == "out"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "quantization", "numbers"),
    [("gemma3", "none", ("03", "04")), ("gpt2", "nf4", ("01", "02"))],
)
def test_notebooks_run_on_other_architectures(
    tiny: Callable[[str], Path], tmp_path: Path, architecture: str, quantization: str, numbers: tuple[str, ...]
) -> None:
    """The two that look into the layers, and the two that train, on models whose layers are built otherwise."""
    chosen = [path for path in NOTEBOOKS if path.stem[:2] in numbers]
    known = {name for path in chosen for name in read_parameters(path).parameters}
    values = {name: value for name, value in SMALL.items() if name in known}
    values |= {"model": str(tiny(architecture)), "quantization": quantization}
    done = run(chosen, parameters=values, out=tmp_path / "run", say=lambda text: None)
    assert list(done.seconds) == [path.stem for path in chosen]


@pytest.mark.slow
def test_all_notebooks_run_on_another_model(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """No code change for another model, only parameters; a random model answers nonsense, and the files say so."""
    values = {**SMALL, "model": str(tiny("qwen3")), "quantization": "nf4"}
    done = run(parameters=values, out=tmp_path / "run", say=lambda text: None)
    assert list(done.seconds) == [path.stem for path in NOTEBOOKS]
    result = json.loads((tmp_path / "run" / "05_evaluate" / "result.json").read_text())
    names = [row["condition"] for row in result["table"]]
    assert names[0] == "plain"
    assert {"few-shot steps", "tuned", "residual-steered", "KV-steered", "tuned + steered", "random"} <= set(names)
    assert all(row["n"] == 5 and 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 for row in result["table"])
    assert {row["b"] for row in result["comparisons"]} == set(names[1:])
    training = json.loads((tmp_path / "run" / "02_finetune_qlora" / "adapter" / "training.json").read_text())
    assert training["base"]["name"] == str(tiny("qwen3"))
    assert done.report is not None
    page = done.report.read_text()
    assert len(page) < 3_000_000
    assert "residual-steered" in page
