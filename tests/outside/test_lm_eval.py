"""lm-evaluation-harness's own tasks on its `hf` model and on ours: equal scores, plain, at strength 0 and steered."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import likelihood
from tests.test_kinds import edit, residual
from tests.tiny import tiny_lm
from workbench.likelihood import loglikelihoods, rolling_likelihoods
from workbench.models import LM
from workbench.tasks import load_task

lm_eval = pytest.importorskip("lm_eval", reason="lm_eval is not installed; install it with: make outside")
pytestmark = pytest.mark.filterwarnings("ignore")  # the harness's own

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from workbench.harness import HarnessModel  # noqa: E402

NEW = 12


def task(name: str, file: Path, rows: list[dict[str, Any]], **config: Any) -> ConfigurableTask:
    """A task of the harness over a local file."""
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    usual = {
        "task": name, "dataset_path": "json", "test_split": "test", "num_fewshot": 0,
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(file.parent / "cache")},
    }  # fmt: skip
    return ConfigurableTask(config={**usual, **config})


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> dict[str, ConfigurableTask]:
    """A paradigm of BLiMP, AQuA, GSM8K and whole texts, a few rows each."""
    folder = tmp_path_factory.mktemp("tasks")
    pairs = load_task("blimp:passive_1").rows(n=6)
    choices = [
        {"question": row["question"], "options": row["option_texts"], "gold": ord(row["answer"]) - 65}
        for row in load_task("aqua").rows(n=4)
    ]
    problems = [{"question": row["question"], "answer": row["answer"]} for row in load_task("gsm8k").rows(n=3)]
    texts = [{"text": " ".join(row["solution"] for row in load_task("gsm8k").rows(n=5, seed=n))} for n in range(2)]
    mean = {"aggregation": "mean", "higher_is_better": True}
    return {
        "blimp": task(
            "blimp", folder / "blimp.jsonl", pairs, output_type="multiple_choice", doc_to_text="", doc_to_target=0,
            doc_to_choice="{{[good, bad]}}", metric_list=[{"metric": "acc", **mean}],
        ),
        "aqua": task(
            "aqua", folder / "aqua.jsonl", choices, output_type="multiple_choice",
            doc_to_text="Question: {{question}}\nAnswer:", doc_to_target="{{gold}}", doc_to_choice="{{options}}",
            metric_list=[{"metric": m, **mean} for m in ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")],
        ),
        "choices": task(
            "choices", folder / "aqua.jsonl", choices, output_type="multiple_choice",
            doc_to_text="Question: {{question}}\nAnswer:", doc_to_target="{{gold}}", doc_to_choice="{{options}}",
            metric_list=[{"metric": "acc", **mean}],
        ),
        "gsm8k": task(
            "gsm8k", folder / "gsm8k.jsonl", problems, output_type="generate_until",
            doc_to_text="Question: {{question}}\nAnswer:", doc_to_target="{{answer}}",
            generation_kwargs={"until": ["Question:", "e"], "max_gen_toks": NEW},
            metric_list=[{"metric": "exact_match", **mean}],
        ),
        "texts": task(
            "texts", folder / "texts.jsonl", texts, output_type="loglikelihood_rolling", doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
        ),
    }  # fmt: skip


def run(model: Any, tasks: dict[str, ConfigurableTask], **options: Any) -> dict[str, Any]:
    """What `simple_evaluate` comes to, without its report on the machine, which takes seconds."""
    return lm_eval.evaluate(lm=model, task_dict={"tasks": tasks}, bootstrap_iters=0, log_samples=True, **options)


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, scores in theirs["results"].items():
        for metric, value in scores.items():
            if isinstance(value, float):
                near = pytest.approx(value, rel=1e-4) if name == "texts" else value
                assert ours["results"][name][metric] == near, (name, metric)
    for name, samples in theirs["samples"].items():
        for one, other in zip(ours["samples"][name], samples, strict=True):
            assert len(one["resps"]) == len(other["resps"])
            for (mine,), (his,) in zip(one["resps"], other["resps"], strict=True):
                if isinstance(his, str):
                    assert mine == his
                elif isinstance(his, float):
                    assert mine == pytest.approx(his, rel=1e-5)
                else:
                    assert mine[0] == pytest.approx(his[0], abs=1e-4 * max(1, abs(his[0]) / 100))
                    assert bool(mine[1]) == bool(his[1])


@pytest.mark.parametrize("name", ["lab", "llama", "gpt2", "gemma3"])
def test_all_scores_are_those_of_the_hf_model(name: str, lab: LM, tasks: dict[str, ConfigurableTask]) -> None:
    tasks = {each: one for each, one in tasks.items() if each != "choices"}  # AQuA without its unconditional scores
    lm = lab if name == "lab" else tiny_lm(name)
    theirs = run(HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=8), tasks)
    assert_equal(run(HarnessModel(lm), tasks), theirs)
    assert_equal(run(HarnessModel(lm, 0.0 * residual(lm), batch_size=5), tasks), theirs)


def test_a_chat_template_is_applied_in_the_same_way(lab: LM, tasks: dict[str, ConfigurableTask]) -> None:
    chosen = {name: tasks[name] for name in ("aqua", "gsm8k")}
    theirs = run(HFLM(pretrained=lab.model, tokenizer=lab.tokenizer, batch_size=8), chosen, apply_chat_template=True)
    assert_equal(run(HarnessModel(lab), chosen, apply_chat_template=True), theirs)


def test_steered_scores_are_those_of_our_own_functions(lab: LM, tasks: dict[str, ConfigurableTask]) -> None:
    x = residual(lab, "generated") + edit(lab)
    model = HarnessModel(lab, x)
    found = lm_eval.simple_evaluate(model=model, tasks=[tasks["choices"], tasks["gsm8k"]], bootstrap_iters=0)
    for sample in found["samples"]["choices"]:
        pairs = [tuple(each) for each in sample["arguments"]]
        scores, plain = loglikelihoods(lab, pairs, x), loglikelihoods(lab, pairs)
        assert [answer[0][0] for answer in sample["resps"]] == pytest.approx([one.logprob for one in scores], abs=1e-4)
        assert any(abs(a.logprob - b.logprob) > 1e-2 for a, b in zip(scores, plain, strict=True))
    for sample in found["samples"]["gsm8k"]:
        context, options = sample["arguments"][0]
        (answer,) = lab.generate([context], x, NEW, stop=options["until"])
        assert sample["resps"] == [[answer.text]]


def test_rolling_windows_of_a_short_context(lab: LM) -> None:
    texts = ["One text that is longer than its window. " * 3, "short", "A second text, of another length, as it were."]
    requests = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    theirs = HFLM(pretrained=lab.model, tokenizer=lab.tokenizer, batch_size=2, max_length=16)
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert HarnessModel(lab, max_length=16).loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-5)
    ours = rolling_likelihoods(lab, texts, window=16)
    assert [-one.nats for one in ours] == pytest.approx(expected, rel=1e-5)


def test_the_bench_compares_equal_scores(data_folder: Path) -> None:
    lines = likelihood.lines(tiny_lm("llama"), 1, choices=2, pairs=1, texts=2)
    same = ["10 of 10", "134 of 134", "2 of 2", "2 of 2", "160 of 160", "160 of 160"]
    assert [line["same scores"] for line in lines] == same
