"""Served models: the same records as in this process, faults and limits survived, nothing paid for twice."""

from pathlib import Path

import pytest

from tests.openai_server import Fault, serving
from workbench.models import LM
from workbench.prompts import few_shot
from workbench.served import ServerError, connect
from workbench.synthesis import synthesize
from workbench.tasks import Task

ASKED = {"n": 8, "samples": 2, "max_new_tokens": 60, "temperature": 0.8, "chunk_size": 3, "threshold": 1.0}
SAME = ("row_id", "messages", "answer", "verdict", "tokens_in", "tokens_out", "kept", "reason", "solve_rate")


def faults(number: int, body: dict) -> Fault | None:
    """Every kind of trouble, each once or twice, in the first twenty requests."""
    return {
        1: (429, {"Retry-After": "0"}, b"{}"), 2: (500, {}, b"oops"), 4: "drop", 5: (200, {}, b"not json"),
        7: (200, {}, b'{"choices": []}'), 9: (503, {"Retry-After": "0.05"}, b""), 11: (200, {}, b'{"error": "late"}'),
    }.get(number)  # fmt: skip


@pytest.mark.parametrize("trouble", [lambda number, body: None, faults])
def test_records_are_those_of_the_model_in_this_process(lab: LM, word_problems: Task, tmp_path: Path, trouble) -> None:
    strategy = few_shot("steps", 2)
    here = synthesize(lab, word_problems, out=tmp_path / "here", strategy=strategy, **ASKED)
    with serving(lab, trouble) as (url, state):
        served = connect(url, "lab", workers=4)
        there = synthesize(served, word_problems, out=tmp_path / "there", strategy=strategy, **ASKED)
        assert served.spent.requests == 16
        assert len(state.bodies) == 16 + served.spent.retries
        assert served.spent.retries == (7 if trouble is faults else 0)
        assert 1 < state.most_under_way <= 4
        assert served.spent.tokens_out == there.card["cost"]["tokens_out"] == here.card["cost"]["tokens_out"]
    assert [{name: r[name] for name in SAME} for r in there] == [{name: r[name] for name in SAME} for r in here]
    assert there.records[0]["model"] == {"name": "lab", "revision": "served/lab"}


def test_a_dead_server_loses_nothing_that_was_answered(lab: LM, word_problems: Task, tmp_path: Path) -> None:
    def dying(number: int, body: dict) -> Fault | None:
        return None if number < 9 else (500, {}, b"gone")

    with serving(lab, dying) as (url, _):
        served = connect(url, "lab", workers=1, tries=2, cache=tmp_path / "cache")
        with pytest.raises(ServerError, match="failed 2 times in a row, the last time with status 500: gone"):
            synthesize(served, word_problems, out=tmp_path / "out", **ASKED)
    with serving(lab) as (url, state):
        served = connect(url, "lab", workers=1)
        data = synthesize(served, word_problems, out=tmp_path / "out", **ASKED)
        assert len(state.bodies) == 16 - 6, "the first chunk's six answers were asked for again"
    straight = synthesize(lab, word_problems, out=tmp_path / "straight", **ASKED)
    assert [r["messages"] for r in data] == [r["messages"] for r in straight]


def test_a_cached_answer_is_not_asked_for_again(lab: LM, tmp_path: Path) -> None:
    prompts = [[{"role": "user", "content": f"What is {n}+1?"}] for n in range(6)]
    with serving(lab) as (url, state):
        served = connect(url, "lab", cache=tmp_path)
        first = served.generate(prompts[:4], max_new_tokens=8)
        second = served.generate(prompts, max_new_tokens=8)
        assert len(state.bodies) == 6
        assert [g.text for g in second[:4]] == [g.text for g in first]
        served.generate(prompts[:1], max_new_tokens=9)
        assert len(state.bodies) == 7, "another setting is another request"


def test_the_cost_limit_stops_before_it_is_passed(lab: LM, tmp_path: Path) -> None:
    prompts = [[{"role": "user", "content": f"What is {n}+1?"}] for n in range(60)]
    with serving(lab) as (url, state):
        limits = {"max_dollars": 0.01, "dollars_a_million": (10.0, 50.0)}
        served = connect(url, "lab", workers=2, **limits)
        with pytest.raises(ServerError, match=r"The limit of 0.01 dollars is reached: .* Raise max_dollars"):
            served.generate(prompts, max_new_tokens=20)
        assert 0 < len(state.bodies) < 60
        paid = (served.spent.tokens_in * 10 + served.spent.tokens_out * 50) / 1e6
        assert served.spent.dollars == pytest.approx(paid)
        assert 0.005 < served.spent.dollars <= 0.01


def test_the_rate_limit_spaces_requests(lab: LM) -> None:
    prompts = [[{"role": "user", "content": f"What is {n}+1?"}] for n in range(6)]
    with serving(lab) as (url, state):
        connect(url, "lab", workers=6, requests_per_minute=600).generate(prompts, max_new_tokens=4)
    gaps = [b - a for a, b in zip(sorted(state.times), sorted(state.times)[1:], strict=False)]
    assert len(gaps) == 5
    assert sum(gaps) > 5 * 0.1 * 0.9, "six requests at ten a second start over half a second or more"


def test_refusals_say_what_to_do(lab: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ServerError, match=r"No OpenAI-protocol server answers at http://127.0.0.1:9/v1/models.*vllm serve"
    ):
        connect("http://127.0.0.1:9/v1", "lab")
    with pytest.raises(ServerError, match="WORKBENCH_TEST_KEY is not set"):
        connect("http://127.0.0.1:9/v1", "lab", key_variable="WORKBENCH_TEST_KEY")
    with pytest.raises(ServerError, match="limits nothing"):
        connect("http://127.0.0.1:9/v1", "lab", max_dollars=1.0)
    monkeypatch.setenv("WORKBENCH_TEST_KEY", "secret-word")
    with serving(lab, lambda number, body: (401, {}, b"bad key")) as (url, state):
        with pytest.raises(ServerError, match=r"does not serve 'big'\. It serves: lab"):
            connect(url, "big")
        served = connect(url, "lab", key_variable="WORKBENCH_TEST_KEY")
        with pytest.raises(ServerError, match="refused a request with status 401: bad key"):
            served.generate(["Hi"])
        assert len(state.bodies) == 1, "a refusal is not tried again"
        assert state.keys == ["Bearer secret-word"]
        assert "secret-word" not in repr(served)
        with pytest.raises(ServerError, match="does not give its tokens"):
            served.encode("Hi")


@pytest.mark.parametrize("workers", [1, 3])
def test_the_cost_limit_holds_where_every_character_is_a_token(lab: LM, workers: int) -> None:
    prompts = [[{"role": "user", "content": str(n % 10) * 200}] for n in range(6)]
    with serving(lab) as (url, _):
        served = connect(url, "lab", workers=workers, max_dollars=0.5, dollars_a_million=(1000.0, 0.0))
        with pytest.raises(ServerError, match="Raise max_dollars"):
            served.generate(prompts, max_new_tokens=4)
        assert 0.3 < served.spent.dollars <= 0.5


def test_what_needs_the_model_itself_says_so(lab: LM, word_problems: Task, tmp_path: Path) -> None:
    with serving(lab) as (url, state):
        served = connect(url, "lab")
        for recipe in ("oracle", "magpie", "self_instruct"):
            with pytest.raises(ServerError, match=r"does not give its (tokens|tokenizer).*needs load_model"):
                synthesize(served, word_problems, recipe, n=2, samples=1, max_new_tokens=8, out=tmp_path / recipe)
        with pytest.raises(ServerError, match="prompts is one string"):
            served.generate("Hi")
        assert not state.bodies
