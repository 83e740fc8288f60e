"""`bench.extraction` compares equal work: on a tiny model every line's results agree, and says what it ran beside."""

from pathlib import Path

import pytest

from bench import extraction
from bench.outside import program
from bench.outside.program import Program
from tests.tiny import tiny_lm
from workbench.prompts import contrast
from workbench.tasks import Task


def test_the_batch_1_loop_agrees_with_one_reading(word_problems: Task) -> None:
    lm = tiny_lm("llama")
    line = extraction.beside_batch_1(lm, contrast(word_problems, shots=1, n=3, lm=lm), "three pairs", 1)
    assert float(line["same result"].split()[-1]) < 1e-5
    assert line["ratio"] > 0


def test_the_libraries_agree_with_one_reading(steering_vectors: Program, repeng: Program, word_problems: Task) -> None:
    lm = tiny_lm("llama")
    pairs = contrast(word_problems, shots=1, n=6, lm=lm)
    for beside in (extraction.beside_steering_vectors, extraction.beside_repeng):
        line = beside(lm, pairs, "six pairs", 1)
        assert float(line["same result"].split()[-1]) > 0.9999
        assert line["ratio"] > 0 and line["CPU ratio"] > 0
        assert line["compared with"].startswith(("steering-vectors 0.12.2", "repeng 0.4.0"))


def test_without_their_environments_the_lines_say_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, word_problems: Task
) -> None:
    monkeypatch.setattr(program, "ENVIRONMENTS", tmp_path)
    lm = tiny_lm("llama")
    pairs = contrast(word_problems, shots=1, n=2, lm=lm)
    for beside in (extraction.beside_steering_vectors, extraction.beside_repeng):
        assert beside(lm, pairs, "two pairs", 1)["compared with"].endswith("not installed, make outside")
    with pytest.raises(FileNotFoundError, match="make outside"):
        Program("repeng")


def test_a_program_that_fails_is_told_with_its_own_words(repeng: Program) -> None:
    with Program("repeng") as own, pytest.raises(RuntimeError, match="no such work"):
        own.ask("no such work", Path("/no/such/folder"))
