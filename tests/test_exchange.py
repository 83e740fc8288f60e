"""Files of other tools: what comes back equals what went out, foreign files pair with own ones, faults are named."""

import csv
import io
import json
import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tests.judging_results import results_of
from workbench.__main__ import app
from workbench.exchange import (
    joined,
    read_inspect,
    read_lm_eval,
    read_parquet,
    read_results,
    read_table,
    to_csv,
    to_inspect,
    to_parquet,
)
from workbench.exchange.spreadsheets import guarded, unguarded
from workbench.report.tables import format_table
from workbench.results import Results, load_results, pareto

HARD = ['=HYPERLINK("http://x")', "-5", "-5+cmd|' /C calc'!A0", '"quoted", and\nlines\r\n', "@SUM(1)", "\tx", "'=y",
        "é 漢 😀", "", "plain"]  # fmt: skip
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.fixture
def results() -> Results:
    return results_of(
        {"x": [(text, False) for text in HARD], "y": [("It is = 1", i % 3 > 0) for i in range(len(HARD))]}
    )


def samples(path: Path, right: list[bool], **more: object) -> Path:
    """A samples file as lm-eval 0.4.13 writes it."""
    lines = [
        {
            "doc_id": n, "doc": {"question": f"What is {n} plus 1?", "id": f"q{n}"}, "target": str(n + 1),
            "arguments": {"gen_args_0": {"arg_0": f"Q: {n}", "arg_1": {"until": ["\n"]}}}, "resps": [[f"so {n + ok}"]],
            "filtered_resps": [str(n + ok) if n else "[invalid]"], "filter": "none", "metrics": ["exact_match"],
            "doc_hash": str(n), "prompt_hash": "p", "target_hash": "t", "exact_match": float(ok), **more,
        }
        for n, ok in enumerate(right)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_parquet_keeps_everything(results: Results, tmp_path: Path) -> None:
    odd = results.rows.assign(lists=[[1, "a"]] * len(results.rows), mixed=[None, 1.5] * (len(results.rows) // 2),
                              small=np.arange(len(results.rows), dtype="int16"))  # fmt: skip
    odd["mixed"] = odd["mixed"].astype(object)
    odd["maybe"] = pd.array([1, None] * (len(odd) // 2), dtype="Int64")
    sent = Results(odd, {**results.costs, "x": {"seconds": 1.5}}, {**results.about, "nested": {"a": [1, None]}})
    back = read_parquet(to_parquet(sent, tmp_path / "rows.parquet"))
    pd.testing.assert_frame_equal(back.rows, sent.rows)
    assert back.rows.extracted[HARD.index("")] is None
    assert (back.costs, back.about) == (sent.costs, sent.about)
    assert read_results(tmp_path / "rows.parquet").compare("x", "y") == results.compare("x", "y")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "rows.parquet")[["id", "output"]], odd[["id", "output"]])
    odd.drop(columns="lists").to_parquet(tmp_path / "foreign.parquet")
    with pytest.raises(ValueError, match="not written by to_parquet"):
        read_parquet(tmp_path / "foreign.parquet")
    assert len(read_results(tmp_path / "foreign.parquet").rows) == len(odd)


def test_csv_holds_no_formula_and_comes_back(results: Results, tmp_path: Path) -> None:
    text = to_csv(results, tmp_path / "rows.csv").read_bytes().decode()
    cells = [cell for row in csv.reader(io.StringIO(text, newline="")) for cell in row]
    running = [cell for cell in cells if cell[:1] in ("=", "@", "+", "\t", "\r") or (cell[:1] == "-" and cell != "-5")]
    assert running == []
    back = read_table(tmp_path / "rows.csv")
    assert back.rows.output.tolist() == results.rows.output.tolist()
    for name in ("id", "condition", "correct", "tokens_in", "tokens_out", "seconds", "steps", "unparsed", "prompt"):
        assert back.rows[name].tolist() == results.rows[name].tolist(), name
    assert back.rows.extracted[HARD.index("")] is None
    assert back.compare("x", "y") == results.compare("x", "y")


@given(st.text())
def test_guarding_is_undone_and_leaves_nothing_to_run(text: str) -> None:
    assert unguarded(guarded(text)) == text
    assert guarded(text)[:1] not in ("=", "+", "-", "@", "\t", "\r") or float(text) is not None


def test_inspect_logs_come_back_without_inspect_ai(results: Results, tmp_path: Path) -> None:
    paths = to_inspect(results, tmp_path, created=NOON)
    assert len(paths) == 2
    back = joined(*(read_inspect(path) for path in paths))
    for name in ("id", "condition", "prompt", "output", "answer", "extracted", "correct", "unparsed", "steps",
                 "tokens_in", "tokens_out", "seconds", "forward_passes", "task"):  # fmt: skip
        assert back.rows[name].tolist() == results.rows[name].tolist(), name
    assert back.costs == results.costs
    assert back.compare("x", "y") == results.compare("x", "y")
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in to_inspect(results, tmp_path, created=NOON)] == before


def test_inspect_metrics_are_the_samples(results: Results, tmp_path: Path) -> None:
    log = json.loads(to_inspect(results, tmp_path, created=NOON)[1].read_text())
    values = results.correct("y").to_numpy(float)
    metrics = log["results"]["scores"][0]["metrics"]
    assert metrics["accuracy"]["value"] == pytest.approx(values.mean())
    assert metrics["stderr"]["value"] == pytest.approx(values.std(ddof=1) / math.sqrt(len(values)))
    (usage,) = log["stats"]["model_usage"].values()
    assert usage["output_tokens"] == results.rows[results.rows.condition == "y"].tokens_out.sum()
    spent = datetime.fromisoformat(log["stats"]["completed_at"]) - datetime.fromisoformat(log["stats"]["started_at"])
    assert spent.total_seconds() == 2.5


def test_repeated_questions_become_epochs_and_come_back_as_asked(results: Results, tmp_path: Path) -> None:
    one = results.rows[results.rows.condition == "y"]
    again = pd.concat([one, one.assign(correct=True, output="again"), one.assign(correct=True, output="third")])
    twice = Results(again, {"y": results.costs["y"]}, results.about)
    (path,) = to_inspect(twice, tmp_path, created=NOON)
    metrics = json.loads(path.read_text())["results"]["scores"][0]["metrics"]
    each = one.correct.to_numpy(float) / 3 + 2 / 3
    assert metrics["stderr"]["value"] == pytest.approx(each.std(ddof=1) / math.sqrt(len(each)))
    with pytest.raises(ValueError, match=r"answered more than once.*repeats="):
        read_inspect(path)
    assert read_inspect(path, repeats="first").correct("y").tolist() == one.correct.tolist()
    assert read_inspect(path, repeats="majority").rows.correct.all()
    kept = read_inspect(path, repeats="keep").rows
    assert len(kept) == 3 * len(one) and sorted(kept.epoch.unique()) == [1, 2, 3]


def test_attachments_of_a_log_are_put_back(results: Results, tmp_path: Path) -> None:
    path = to_inspect(results, tmp_path, created=NOON)[1]
    log = json.loads(path.read_text())
    sample = log["samples"][0]
    sample["attachments"] = {"abc": sample["input"]}
    sample["input"] = "attachment://abc"
    path.write_text(json.dumps(log))
    assert read_inspect(path).rows.prompt[0] == results.rows.prompt[0]


def test_lm_eval_samples_pair_with_an_own_run(results: Results, tmp_path: Path) -> None:
    right = [n % 2 == 0 for n in range(len(HARD))]
    file = samples(tmp_path / "samples_sums_2026-01-02T00-00-00.jsonl", right)
    told = {"model_name": "org/model", "total_evaluation_time_seconds": "12.5", "lm_eval_version": "0.4.13"}
    (tmp_path / "results_2026-01-02T00-00-00.json").write_text(json.dumps(told))
    foreign = read_results(tmp_path)
    assert foreign.conditions == ["org/model"] and foreign.costs["org/model"]["seconds"] == 12.5
    assert foreign.rows.output[1] == "so 1" and foreign.rows.extracted.tolist()[:2] == [None, "1"]
    assert foreign.about["foreign"]["org/model"]["missing"] == ["tokens_in", "tokens_out", "seconds", "forward_passes"]
    both = joined(results, foreign, on="question")
    by_id = joined(results, read_lm_eval(file, id="doc.id", condition="org/model"))
    own = results.correct("y")
    expected = np.mean([float(r) - float(own[f"q{n}"]) for n, r in enumerate(right)])
    assert both.compare("y", "org/model").difference == pytest.approx(expected)
    assert by_id.compare("y", "org/model") == both.compare("y", "org/model")
    assert both.table().accuracy.tolist() == [0.0, own.mean(), 0.5]
    assert both.rows.extracted.map(lambda value: value is None or isinstance(value, str)).all()


def test_costs_that_a_file_lacks_stay_unknown(results: Results, tmp_path: Path) -> None:
    """Not 0, which would make a foreign run the cheapest: nan in rows and table, – for a reader, kept by exports."""
    right = [n % 2 == 0 for n in range(len(HARD))]
    foreign = read_lm_eval(samples(tmp_path / "samples_sums_1.jsonl", right), id="doc.id", condition="them")
    costs = ["tokens_in", "tokens_out", "seconds", "forward_passes"]
    assert foreign.rows[costs].isna().all(axis=None)
    both = joined(results, foreign)
    table = both.table().set_index("condition")
    own = results.table().set_index("condition")
    for name in ("x", "y"):
        assert table.loc[name, own.columns].tolist() == own.loc[name].tolist()
    assert table.loc["them", ["tokens_in", "tokens_out", "tokens_out_low", "seconds"]].isna().all()
    assert not pareto(table, "tokens_out")["them"] and pareto(table, "tokens_out")["y"]
    assert format_table([table.loc["them", ["n", "accuracy", "tokens_out"]].to_dict()]).split()[-1] == "–"
    assert both.comparisons("y").set_index("b").loc["them"].n == len(HARD)
    both.save(tmp_path / "saved")
    logs = [read_inspect(path) for path in to_inspect(both, tmp_path / "logs", created=NOON)]
    for back in (load_results(tmp_path / "saved"), read_parquet(to_parquet(both, tmp_path / "b.parquet")),
                 read_table(to_csv(both, tmp_path / "b.csv")), joined(*logs)):  # fmt: skip
        pd.testing.assert_frame_equal(back.rows[costs], both.rows[costs], check_dtype=False)
        assert back.rows.extracted.tolist() == both.rows.extracted.tolist()
        assert back.compare("y", "them") == both.compare("y", "them")


def test_one_unknown_cost_makes_the_mean_unknown(results: Results) -> None:
    rows = results.rows.astype({"tokens_out": float, "tokens_in": float})
    rows.loc[0, ["tokens_out", "tokens_in"]] = math.nan
    table = Results(rows, results.costs, {}).table()
    assert table.tokens_out.isna().tolist() == table.tokens_in.isna().tolist() == [True, False]
    assert table.accuracy.tolist() == results.table().accuracy.tolist()


def test_settings_beside_a_named_results_file_are_found(tmp_path: Path) -> None:
    file = samples(tmp_path / "samples_sums_2026-01-02T00-00-00.5.jsonl", [True])
    (tmp_path / "mine_2026-01-02T00-00-00.5.json").write_text(json.dumps({"model_name": "org/model"}))
    assert read_lm_eval(file).conditions == ["org/model"]


def test_lm_eval_faults_are_told(tmp_path: Path) -> None:
    several = samples(tmp_path / "samples_a_1.jsonl", [True, False])
    lines = several.read_text()
    several.write_text(lines + lines.replace('"filter": "none"', '"filter": "strict"'))
    with pytest.raises(ValueError, match="filter=none or strict"):
        read_lm_eval(several)
    assert len(read_lm_eval(several, filter="strict").rows) == 2
    with pytest.raises(ValueError, match="has no filter 'x'"):
        read_lm_eval(several, filter="x")
    partial = samples(tmp_path / "samples_b_1.jsonl", [True], exact_match=0.5)
    with pytest.raises(ValueError, match="neither right nor wrong"):
        read_lm_eval(partial)
    assert read_lm_eval(partial, threshold=0.5).rows.correct.all()
    with pytest.raises(ValueError, match="It has: exact_match"):
        read_lm_eval(partial, score="acc")
    with pytest.raises(ValueError, match="should hold one"):
        read_results(tmp_path)
    with pytest.raises(ValueError, match=r"doc\.question"):
        read_lm_eval(partial, id="doc.key")


def test_tables_find_their_columns_or_take_given_ones(tmp_path: Path) -> None:
    file = tmp_path / "other.csv"
    file.write_text("question_id,Response,is_correct\n1,four,True\n2,five,no\n")
    found = read_results(file)
    assert found.rows.correct.tolist() == [True, False] and found.rows.output.tolist() == ["four", "five"]
    assert found.conditions == ["other"] and found.rows.id.tolist() == ["1", "2"]
    (tmp_path / "own.jsonl").write_text('{"key": 1, "marks": 0.7}\n{"key": 2, "marks": 0.2}\n')
    with pytest.raises(ValueError, match="It has: key, marks"):
        read_table(tmp_path / "own.jsonl")
    graded = read_table(tmp_path / "own.jsonl", id="key", correct="marks", threshold=0.5, condition="them")
    assert graded.correct("them").tolist() == [True, False]
    assert joined(found, graded).compare("other", "them").n == 2


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("id,correct\n1,maybe\n", r"row 1: 'maybe' is neither"),
        ("id,correct\n,1\n", "row 1: the id column"),
        ("id,correct\n1,1\n1,0\n", r"answered more than once, for example '1' \(2 times"),
        ("id,correct\n", "no rows"),
        ("a,b\n1,2\n", "It has: a, b"),
    ],
)
def test_tables_with_faults_are_refused(tmp_path: Path, text: str, match: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=match):
        read_table(tmp_path / "t.csv")


def test_exact_copies_are_dropped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id,correct,output\n1,1,a\n1,1,a\n2,0,b\n")
    found = read_table(tmp_path / "t.csv")
    assert len(found.rows) == 2 and found.about["foreign"]["t"]["copies_dropped"] == 1


def test_joining_tells_how_the_questions_differ(results: Results) -> None:
    rows = results.rows.replace({"condition": {"y": "z"}, "id": {"q0": "other"}})
    part = Results(rows[rows.condition == "z"], {"z": {}}, {})
    with pytest.raises(ValueError, match=r"9 are shared.*'z' alone has 1, as other.*shared_only"):
        joined(results, part)
    kept = joined(results, part, shared_only=True)
    assert kept.about["left_out"] == {"x": 1, "y": 1, "z": 1} and kept.compare("y", "z").difference == 0.0
    strangers = Results(part.rows.assign(id=part.rows.id + "!"), {"z": {}}, {})
    with pytest.raises(ValueError, match=r"0 are shared.*on='question'"):
        joined(results, strangers, shared_only=True)
    assert joined(results, strangers, on="question").compare("y", "z").difference == 0.0
    with pytest.raises(ValueError, match="Both have a condition 'x'"):
        joined(results, results)


def test_the_command_line_exports_and_says_what_is_wrong(results: Results, tmp_path: Path) -> None:
    def call(*words: object) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, ["export", *map(str, words)])
        return done.exit_code, done.stdout, done.stderr

    results.save(tmp_path / "run" / "05_evaluate" / "results")
    for to, name in (("csv", "r.csv"), ("parquet", "r.parquet"), ("inspect", "logs")):
        code, printed, _ = call(tmp_path / "run", "--to", to, "--out", tmp_path / name)
        assert code == 0
        read = [read_results(line) for line in printed.split("\n") if line]
        back = joined(*read) if to == "inspect" else read[0]
        assert back.compare("x", "y") == results.compare("x", "y")
    assert call(tmp_path / "run", "--to", "xml", "--out", "x")[0] == 2
    assert "inspect, csv, parquet" in call(tmp_path / "run", "--to", "xml", "--out", "x")[2]
    assert "no results" in call(tmp_path / "logs", "--to", "csv", "--out", tmp_path / "x")[2]
    assert "is a folder" in call(tmp_path / "run", "--to", "csv", "--out", tmp_path)[2]
    results.save(tmp_path / "run" / "b")
    assert "several results" in call(tmp_path / "run", "--to", "csv", "--out", tmp_path / "x.csv")[2]
    assert not (tmp_path / "x.csv").exists()
