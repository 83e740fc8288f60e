"""The study of training methods: its table against numbers by hand, its cells read again instead of made again."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from workbench.claims import training_methods
from workbench.claims.training_methods import ARMS, START, Study, cell, main, table
from workbench.statistics import holm, paired_difference


def made(arm: str, seed: int, right: list[int], tokens: int = 10) -> dict[str, Any]:
    rows = [{"id": f"{seed}/{i}", "correct": bool(value), "tokens": tokens} for i, value in enumerate(right)]
    cost = {"cpu_seconds": 2.0 + seed, "sampled_tokens": 1000}
    return {"arm": arm, "settings": {}, "seed": seed, "split": "test", "n": len(right), "rows": rows, **cost}


def test_the_table_is_made_of_paired_rows() -> None:
    base, better = {0: [1, 0, 0, 0, 1, 0], 1: [0, 0, 1, 0, 0, 1]}, {0: [1, 1, 1, 0, 1, 1], 1: [0, 1, 1, 0, 1, 1]}
    cells = [made(START, seed, right) for seed, right in base.items()]
    cells += [made("GRPO", seed, right, tokens=8) for seed, right in better.items()]
    cells += [made("DPO", 0, base[0])]
    lines = {line.split(" | ")[0].strip("| "): line for line in table(cells).splitlines()}
    pooled = paired_difference([*base[0], *base[1]], [*better[0], *better[1]])
    same = paired_difference(base[0], base[0])
    adjusted = holm([pooled.p_value, same.p_value])
    told = f"+0.417 [{pooled.low:+.3f}, {pooled.high:+.3f}]; +0.500 +0.333; {adjusted[0]:.2g}"
    assert told in lines["GRPO"]
    assert "0.75 [0.47, 0.91] of 12 | 8 [8, 8]" in lines["GRPO"] and "| 2 | 1,000 |" in lines["GRPO"]  # mean of 2 and 3
    assert "+0.000 [" in lines["DPO"] and "of 6" in lines["DPO"]
    assert "; p_holm" not in lines[START]


def test_a_finished_cell_is_read_and_time_that_is_up_leaves_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def trained(study: Study, arm: dict[str, Any], seed: int, folder: Path) -> Any:
        calls.append((arm["how"], seed))
        raise RuntimeError("no training in this test")

    monkeypatch.setattr(training_methods, "trained", trained)
    lm, task = SimpleNamespace(revision="one"), SimpleNamespace(name="word-problems")
    monkeypatch.setattr(training_methods, "load_model", lambda name: lm)
    study = Study(lm, task, tmp_path, "test", 2)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError):
        cell(study, START, ARMS[START], 0)
    key = training_methods.content_key(arm=ARMS[START], seed=0, split="test", n=2)[:12]
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / f"{key}.json").write_text(json.dumps(made(START, 0, [1, 0])))
    assert cell(study, START, ARMS[START], 0) == made(START, 0, [1, 0])
    assert calls == [("start", 0)]
    (tmp_path / "cells" / f"{key}.json").write_text(json.dumps({**made(START, 0, [1, 0]), "model": "two"}))
    with pytest.raises(ValueError, match=r"was made with {'model': 'two'}, and .*'one'"):
        cell(study, START, ARMS[START], 0)
    main(["--out", str(tmp_path), "--seeds", "0", "--n", "2", "--arms", START, "DPO", "--minutes", "0"])
    assert "2 cells were left for another start" in capsys.readouterr().out
    assert calls == [("start", 0)]
