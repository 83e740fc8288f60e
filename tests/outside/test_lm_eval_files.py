"""Files of lm-evaluation-harness itself, read as `Results`: its accuracies, its texts, and pairs with an own run."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

import workbench as wb
from workbench.exchange import joined, read_lm_eval, read_results
from workbench.models import LM
from workbench.prompts import few_shot
from workbench.results import Results
from workbench.tasks import load_task

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed; install it with: make outside")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own
N, NEW = 8, 96
STEPS = few_shot("steps", 3)
MEAN = {"aggregation": "mean", "higher_is_better": True}


def harness_task(name: str, file: Path, rows: list[dict[str, Any]], **config: Any) -> Any:
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    usual = {
        "task": name, "dataset_path": "json", "test_split": "test", "num_fewshot": 0,
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(file.parent / "cache")},
    }  # fmt: skip
    return importlib.import_module("lm_eval.api.task").ConfigurableTask(config={**usual, **config})


def its_run(lm: LM, folder: Path) -> tuple[Path, dict[str, Any]]:
    """What `lm_eval run --log_samples --output_path` does: the folder with its files, and the scores it tells."""
    rows = load_task("word-problems").rows(n=N, seed=0)
    asked = [
        {"id": row["id"], "bare": row["question"], "answer": str(row["answer"]), "near": str(int(row["answer"]) + 1),
         "question": lm.render(load_task("word-problems").messages(row, STEPS))}
        for row in rows
    ]  # fmt: skip
    number = {"name": "number", "filter": [{"function": "regex", "regex_pattern": r"(-?\d+)\.?\s*$"}, _first()]}
    text = {"name": "text", "filter": [_first()]}
    tasks = [
        harness_task(
            "written", folder / "written.jsonl", asked, output_type="generate_until", doc_to_text="{{question}}",
            doc_to_target="{{answer}}",
            generation_kwargs={"until": ["<|end|>"], "max_gen_toks": NEW, "do_sample": False},
            filter_list=[number, text], metric_list=[{"metric": "exact_match", **MEAN}],
        ),
        harness_task(
            "chosen", folder / "chosen.jsonl", asked, output_type="multiple_choice", doc_to_text="{{bare}}",
            doc_to_target=0, doc_to_choice="{{[answer, near]}}",
            metric_list=[{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
        ),
    ]  # fmt: skip
    tracker = importlib.import_module("lm_eval.loggers").EvaluationTracker(output_path=str(folder / "out"))
    model = importlib.import_module("lm_eval.models.huggingface").HFLM(
        pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=N
    )
    found = lm_eval.simple_evaluate(
        model=model, tasks=tasks, bootstrap_iters=0, log_samples=True, evaluation_tracker=tracker
    )
    samples = found.pop("samples")
    tracker.save_results_aggregated(results=found, samples=samples)
    for name, lines in samples.items():
        tracker.save_results_samples(task_name=name, samples=lines)
    return folder / "out", found["results"]


def _first() -> dict[str, str]:
    return {"function": "take_first"}


@pytest.fixture(scope="module")
def written(lab: LM, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    return its_run(lab, tmp_path_factory.mktemp("harness"))


@pytest.fixture(scope="module")
def own(lab: LM) -> Results:
    return wb.evaluate(lab, load_task("word-problems"), {"own": [STEPS]}, n=N, seed=0, max_new_tokens=NEW)


def file_of(folder: Path, name: str) -> Path:
    (file,) = folder.rglob(f"samples_{name}_*.jsonl")
    return file


def test_accuracies_are_the_ones_it_tells(written: tuple[Path, dict[str, Any]]) -> None:
    folder, told = written
    for name, options, key in (
        ("written", {"filter": "number"}, "exact_match,number"),
        ("written", {"filter": "text"}, "exact_match,text"),
        ("chosen", {}, "acc,none"),
        ("chosen", {"score": "acc_norm"}, "acc_norm,none"),
    ):
        found = read_lm_eval(file_of(folder, name), condition="theirs", **options)
        assert found.table().accuracy.tolist() == pytest.approx([told[name][key]]), (name, options)
        assert found.costs["theirs"]["seconds"] > 0 and found.table().tokens_out.isna().all()
        assert found.about["lm_eval"]["lm_eval_version"] == importlib.import_module("importlib.metadata").version(
            "lm_eval"
        )
    assert 0 < told["written"]["exact_match,number"] < 1


def test_its_texts_are_ours_and_the_comparison_is_paired(written: tuple[Path, dict[str, Any]], own: Results) -> None:
    """Greedy on the same prompts: equal answers, so no difference to an own run of the same questions."""
    file = file_of(written[0], "written")
    foreign = read_results(file, filter="number", id="doc.id", condition="theirs")
    both = joined(own, foreign)
    answers = both.rows.pivot(index="id", columns="condition", values="output")
    assert answers.own.str.strip().tolist() == answers.theirs.str.strip().tolist()
    prompts = both.rows.pivot(index="id", columns="condition", values="prompt")
    assert prompts.own.tolist() == prompts.theirs.tolist()
    assert (
        both.rows.pivot(index="id", columns="condition", values="answer")
        .apply(lambda row: row.nunique(), axis=1)
        .eq(1)
        .all()
    )
    found = both.compare("own", "theirs")
    assert (found.difference, found.n) == (0.0, N)


def test_a_folder_of_several_and_a_task_of_two_filters_ask_which(written: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = written
    with pytest.raises(ValueError, match=r"should hold one.*samples_chosen.*samples_written"):
        read_results(folder)
    with pytest.raises(ValueError, match="filter=number or text"):
        read_results(file_of(folder, "written"))
