"""Logs beside inspect_ai itself: its reader takes ours, its data frames show our numbers, and we read what it runs."""

import importlib
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pytest

from tests.judging_results import results_of
from workbench.exchange import inspect_logs, joined, read_inspect, to_inspect
from workbench.results import Results

log = pytest.importorskip("inspect_ai.log", reason="inspect_ai is not installed; install it with: make outside")
pytestmark = pytest.mark.filterwarnings("default")  # its own warnings are not ours to mend
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)
N = 20
ANSWERS = {
    "plain": [("It is = " + str(i), i % 3 == 0) for i in range(N)],
    "steered": [("é\n1+1=2 " * 30 if i else "", i % 3 != 1) for i in range(N)],
}


@pytest.fixture
def results() -> Results:
    return results_of(ANSWERS)


def test_their_reader_takes_our_logs_and_loses_nothing(results: Results, tmp_path: Path) -> None:
    for condition, path in zip(results.conditions, to_inspect(results, tmp_path, created=NOON), strict=True):
        found = log.read_eval_log(str(path))
        own = results.rows[results.rows.condition == condition].reset_index(drop=True)
        assert (found.version, found.status, found.eval.task) == (2, "success", "sums")
        assert found.eval.metadata["condition"] == condition and found.eval.dataset.samples == N
        for row, sample in zip(own.itertuples(), sorted(found.samples, key=lambda s: int(s.id[1:])), strict=True):
            assert (sample.id, sample.input, sample.output.completion) == (row.id, row.prompt, row.output)
            assert sample.scores["verifier"].value == ("C" if row.correct else "I")
            assert sample.scores["verifier"].answer == row.extracted
            (usage,) = sample.model_usage.values()
            assert (usage.input_tokens, usage.output_tokens) == (row.tokens_in, row.tokens_out)
            assert (sample.output.time, sample.total_time) == (row.seconds, row.seconds)
            assert sample.target == row.answer and sample.metadata["steps"] == row.steps
        assert log.read_eval_log(str(path), header_only=True).results.total_samples == N


def test_their_metrics_over_our_samples_are_the_ones_we_wrote(results: Results, tmp_path: Path) -> None:
    """inspect_ai scores the log anew with its own accuracy() and stderr()."""
    scorers = importlib.import_module("inspect_ai.scorer")
    for path in to_inspect(results, tmp_path, created=NOON):
        found = log.read_eval_log(str(path))
        told = found.results.scores[0].metrics
        anew = log.recompute_metrics if hasattr(log, "recompute_metrics") else None
        scores = [scorers.SampleScore(score=sample.scores["verifier"]) for sample in found.samples]
        for score in scores:
            score.score = score.score.model_copy(update={"value": scorers.value_to_float()(score.score.value)})
        assert told["accuracy"].value == pytest.approx(scorers.accuracy()(scores))
        assert told["stderr"].value == pytest.approx(scorers.stderr()(scores))
        if anew is not None:
            anew(found)
            metrics = found.results.scores[0].metrics
            assert {name: metrics[name].value for name in metrics} == pytest.approx(
                {name: told[name].value for name in told}
            )


def test_their_data_frames_hold_our_rows(results: Results, tmp_path: Path) -> None:
    analysis = importlib.import_module("inspect_ai.analysis")
    to_inspect(results, tmp_path, created=NOON)
    evals = analysis.evals_df(str(tmp_path), quiet=True)
    assert len(evals) == 2 and evals.score_verifier_accuracy.tolist() == pytest.approx(
        [results.correct(condition).mean() for condition in results.conditions]
    )
    assert evals.score_verifier_stderr.notna().all()
    samples = analysis.samples_df(str(tmp_path), quiet=True)
    assert len(samples) == 2 * N
    assert (samples.score_verifier == "C").sum() == results.rows.correct.sum()
    assert samples.total_tokens.sum() == results.rows.tokens_in.sum() + results.rows.tokens_out.sum()
    assert samples.total_time.sum() == pytest.approx(results.rows.seconds.sum())
    messages = analysis.messages_df(str(tmp_path), quiet=True)
    assert len(messages) == 4 * N
    assert sorted(messages[messages.role == "user"].content) == sorted(results.rows.prompt)
    assert sorted(messages[messages.role == "assistant"].content) == sorted(results.rows.output)


@pytest.mark.parametrize("kind", ["json", "eval"])
def test_what_they_write_of_our_log_comes_back(results: Results, tmp_path: Path, kind: str) -> None:
    back = []
    for number, path in enumerate(to_inspect(results, tmp_path / "logs", created=NOON)):
        file = tmp_path / f"{number}.{kind}"
        log.write_eval_log(log.read_eval_log(str(path)), str(file))
        back.append(read_inspect(file))
    found = joined(*back)
    pairs = [frame.sort_values(["condition", "id"]).reset_index(drop=True) for frame in (found.rows, results.rows)]
    for name in ("id", "condition", "prompt", "output", "answer", "extracted", "correct", "unparsed", "steps",
                 "tokens_in", "tokens_out", "seconds", "forward_passes"):  # fmt: skip
        assert pairs[0][name].tolist() == pairs[1][name].tolist(), name
    assert found.compare("plain", "steered") == results.compare("plain", "steered")
    assert found.costs == results.costs


@pytest.mark.parametrize("kind", ["json", "eval"])
def test_an_evaluation_that_they_ran_pairs_with_an_own_run(
    results: Results, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mock model through inspect_ai's whole pipeline, read with and (json) without inspect_ai: the same rows."""
    inspect, data, models, scorers = (
        importlib.import_module(f"inspect_ai{name}") for name in ("", ".dataset", ".model", ".scorer")
    )
    monkeypatch.setenv("INSPECT_DISPLAY", "none")
    samples = [data.Sample(id=f"q{i}", input=f"What is {i} plus 1? " * 20, target=str(i + 1)) for i in range(N)]
    usage = models.ModelUsage(input_tokens=11, output_tokens=4, total_tokens=15)  # unless told, counted by a download
    answers = [models.ModelOutput.from_content("mockllm/model", f"ANSWER: {i + 1 + i % 2}") for i in range(N)]
    answers = [answer.model_copy(update={"usage": usage}) for answer in answers]
    task = inspect.Task(dataset=samples, scorer=scorers.match(numeric=True), name="sums")
    model = models.get_model("mockllm/model", custom_outputs=answers)
    (done,) = inspect.eval(
        task, model=model, log_dir=str(tmp_path), log_format=kind, max_connections=1, max_samples=1, display="none"
    )
    assert done.status == "success", done.error
    path = Path(done.location.removeprefix("file://"))
    foreign = read_inspect(path, condition="theirs")
    assert foreign.rows.correct.mean() == done.results.scores[0].metrics["accuracy"].value
    assert foreign.rows.output.tolist() == [sample.output.completion for sample in done.samples]
    assert set(foreign.rows.output) == {answer.completion for answer in answers}
    assert foreign.rows.tokens_in.tolist() == [11] * N and foreign.rows.tokens_out.tolist() == [4] * N
    both = joined(results, foreign)
    right = {sample.id: scorers.value_to_float()(sample.scores["match"].value) for sample in done.samples}
    own = results.correct("plain")
    assert both.compare("plain", "theirs").difference == pytest.approx(
        sum(right[key] - float(own[key]) for key in own.index) / N
    )
    if kind == "json":
        monkeypatch.setattr(inspect_logs.importlib.util, "find_spec", lambda name: None)
        bare = read_inspect(path, condition="theirs")
        pd.testing.assert_frame_equal(bare.rows, foreign.rows)
