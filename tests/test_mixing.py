"""Mixes: shares and budgets counted again by hand, curricula by their field, refusals before anything is written."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from workbench.models import LM
from workbench.synthesis import mixing, scores, synthesize
from workbench.synthesis.mixing import mix
from workbench.synthesis.records import Data, load_data
from workbench.tasks import Task, load_task


@pytest.fixture(scope="module")
def sets(lab: LM, word_problems: Task, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Data]:
    """Short and long solutions of the same questions, and a smaller set of another task."""
    out = tmp_path_factory.mktemp("sets")
    made = {s: synthesize(lab, word_problems, "oracle", n=60, out=out / s, style=s) for s in ("steps", "long")}
    return made | {"gcd": synthesize(lab, load_task("gcd"), "oracle", n=20, out=out / "gcd", max_overlap=1.0)}


def parts(data: Data) -> dict[str, int]:
    return dict(Counter(record["part"] for record in data))


def question(record: dict) -> str:
    return record["messages"][0]["content"]


def test_shares_of_a_record_budget_and_no_question_twice(sets: dict[str, Data], tmp_path: Path) -> None:
    two = {name: sets[name] for name in ("steps", "long")}
    data = mix(two, tmp_path, shares={"steps": 0.75, "long": 0.25}, records=40)
    assert parts(data) == {"steps": 30, "long": 10}
    assert len({question(record) for record in data}) == 40
    assert load_data(tmp_path).records == data.records
    again = mix(two, tmp_path / "again", shares={"steps": 0.75, "long": 0.25}, records=40)
    assert (tmp_path / "again" / "records.jsonl").read_bytes() == (tmp_path / "records.jsonl").read_bytes()
    assert again.records != mix(two, tmp_path / "s", shares={"steps": 0.75, "long": 0.25}, records=40, seed=1).records


@pytest.mark.parametrize("shares", [None, {"steps": 0.5, "long": 0.5}])
def test_a_token_budget_is_used_and_not_passed(sets: dict[str, Data], tmp_path: Path, shares) -> None:
    two = {name: sets[name] for name in ("steps", "long")}
    data = mix(two, tmp_path, shares=shares, tokens=2000)
    used = sum(record["tokens_out"] for record in data)
    longest = max(record["tokens_out"] for part in two.values() for record in part)
    assert 2000 - 2 * longest < used <= 2000
    assert data.card["counts"]["tokens"] == used


def test_orders_are_sorted_and_hold_the_same_records(sets: dict[str, Data], tmp_path: Path) -> None:
    rated = [{**record, "solve_rate": number / 60} for number, record in enumerate(sets["steps"].kept)]
    data = Data(tmp_path, rated, {})
    made = {order: mix({"a": data}, tmp_path / order, order=order) for order in ("mixed", "easy first", "hard first",
            "short first", "long first", "sequential")}  # fmt: skip
    ids = {name: [record["id"] for record in found] for name, found in made.items()}
    assert len({frozenset(found) for found in ids.values()}) == 1
    assert len({tuple(found) for found in ids.values()}) == 6
    easy = [record["solve_rate"] for record in made["easy first"]]
    assert easy == sorted(easy, reverse=True) == [record["solve_rate"] for record in made["hard first"]][::-1]
    lengths = [record["tokens_out"] for record in made["short first"]]
    assert lengths == sorted(lengths) == [record["tokens_out"] for record in made["long first"]][::-1]
    both = mix({"a": sets["steps"], "b": sets["gcd"]}, tmp_path / "two", order="sequential",
               shares={"a": 0.8, "b": 0.2}, records=50)  # fmt: skip
    assert [record["part"] for record in both] == ["a"] * 40 + ["b"] * 10


def test_balance_takes_equally_many_of_each_value(sets: dict[str, Data], tmp_path: Path) -> None:
    data = mix({"a": sets["steps"], "b": sets["gcd"]}, tmp_path, balance="task")
    held = len(sets["gcd"].kept)
    assert Counter(record["task"] for record in data) == {"word-problems": held, "gcd": held}


def test_a_score_takes_the_highest_first(sets: dict[str, Data], tmp_path: Path) -> None:
    def length(records: list[dict]) -> list[float]:
        return [record["tokens_out"] for record in records]

    data = mix({"a": sets["steps"]}, tmp_path, records=10, score=length)
    longest = sorted((record["tokens_out"] for record in sets["steps"].kept), reverse=True)[:10]
    assert sorted((record["tokens_out"] for record in data), reverse=True) == longest
    assert data.card["parameters"]["score"] == {"name": "length"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"shares": {"steps": 1.0}}, "shares name"),
        ({"shares": {"steps": 0.5, "gcd": 0.6}, "records": 10}, "sum to 1"),
        ({"shares": {"steps": 0.5, "gcd": 0.5}}, "need a budget"),
        ({"shares": {"steps": 0.5, "gcd": 0.5}, "records": 60}, "part 'gcd' should give 30 records and holds"),
        ({"records": 10, "tokens": 100}, "a budget is one of the two"),
        ({"records": 1000}, "should give 1000 records and holds"),
        ({"tokens": 10**6}, "should give 1000000 answer tokens and holds"),
        ({"order": "backwards"}, "order='backwards' is not known"),
        ({"balance": "colour"}, "has no such field"),
    ],
)
def test_wrong_mixes_are_refused(sets: dict[str, Data], tmp_path: Path, wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mix({"steps": sets["steps"], "gcd": sets["gcd"]}, tmp_path, **wrong)
    assert not list(tmp_path.iterdir())


def test_chains_are_distinct_and_negatives_are_wrong(lab: LM, word_problems: Task, tmp_path: Path) -> None:
    from workbench.prompts import few_shot

    settings = {"strategy": few_shot("steps", 2), "samples": 6, "temperature": 1.2, "max_new_tokens": 90}
    data = synthesize(lab, word_problems, n=12, out=tmp_path, chains=3, negatives=2, threshold=1.0, **settings)
    assert len({record["id"] for record in data}) == len(data)
    by_row = Counter(record["row_id"] for record in data.kept)
    assert max(by_row.values()) > 1
    assert max(by_row.values()) <= 3
    texts = [(record["row_id"], record["messages"][-1]["content"]) for record in data.kept]
    assert len(set(texts)) == len(texts)
    rows = {str(row["id"]): row for row in word_problems.rows("train", n=12)}
    assert data.negatives
    assert max(Counter(record["row_id"] for record in data.negatives).values()) <= 2
    for record in data:
        right = word_problems.verify(rows[record["row_id"]], record["messages"][-1]["content"]).correct
        assert right == record["kept"]
    assert data.card["counts"]["negative"] == len(data.negatives)
    for record in data:
        own = [r["solve_rate"] for r in data if r["row_id"] == record["row_id"]]
        assert len(set(own)) == 1
    assert mixing.mix({"a": data}, tmp_path / "mixed").kept == mix({"a": data}, tmp_path / "mixed").kept
    assert partial(scores.easy)(data.kept) == [record["solve_rate"] for record in data.kept]


def test_without_shares_all_parts_are_one_pool(sets: dict[str, Data], tmp_path: Path) -> None:
    """Balance counts over the pool and not in each part, and what it leaves over is not called enough."""

    def some(count: int, task: str, name: str) -> list[dict]:
        return [
            {**record, "task": task, "id": f"{name}/{task}/{number}", "tokens_out": 5}
            for number, record in enumerate(sets["steps"].kept[:count])
        ]

    a, b = Data(tmp_path, some(30, "one", "a"), {}), Data(tmp_path, some(10, "one", "b") + some(30, "two", "b"), {})
    data = mix({"a": a, "b": b}, tmp_path / "m", balance="task")
    assert Counter(record["task"] for record in data) == {"one": 30, "two": 30}
    with pytest.raises(ValueError, match="should give 330 answer tokens and holds 300 in all"):
        mix({"a": a, "b": b}, tmp_path / "n", balance="task", tokens=330)
    seen = []

    def score(records: list[dict]) -> list[float]:
        seen.append(len(records))
        return [0.0] * len(records)

    mix({"a": a, "b": b}, tmp_path / "s", score=score)
    assert seen == [70], "each record is scored once"


def test_records_without_a_size_are_told(sets: dict[str, Data], tmp_path: Path) -> None:
    file = tmp_path / "plain.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "4"}]}\n')
    with pytest.raises(ValueError, match="Kept record 1 of the part 'a' has no id or no tokens_out"):
        mix({"a": file}, tmp_path / "out")
    with pytest.raises(ValueError, match="the shares of gcd come to nothing"):
        mix({n: sets[n] for n in ("steps", "gcd")}, tmp_path / "out", shares={"steps": 0.99, "gcd": 0.01}, records=10)
