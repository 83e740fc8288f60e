"""158 hostile programs: none gets out, forges a verdict or leaves a process behind; and the canaries do sing."""

import time
from pathlib import Path

import pytest

from tests.faults.hostile import forgeries
from tests.faults.hostile.harness import CASES, SECRET, canaries, naive_judge, run_all, run_outside, survivors
from workbench.sandbox import isolation, judge_tests

pytestmark = pytest.mark.skipif(
    not isolation(), reason="bubblewrap is missing or can't start here: python -m workbench doctor says what to do"
)
NAMED = {case.name: case for case in CASES}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_hostile_program_is_held(tmp_path: Path) -> None:
    findings, outside = run_all(tmp_path)
    assert len(findings) == len(NAMED) >= 100
    assert {found.case.name: found.fault for found in findings if found.fault} == {}
    assert outside.touched == []
    time.sleep(1)
    assert [found.case.name for found in findings if survivors(found.outcome, found.ended)] == []


def test_without_a_sandbox_the_same_programs_reach_the_canaries(tmp_path: Path) -> None:
    Path("/tmp/a").unlink(missing_ok=True)
    read = (
        "secret file",
        "symlink",
        "environment",
        "proc self",
        "project",
        "package",
        "shell",
        "write outside",
    )
    reached = ("tcp", "udp", "unix", "abstract")
    with canaries(tmp_path) as outside:
        printed = {name: run_outside(NAMED[name], outside) for name in (*read, *reached)}
        assert outside.changed() == ["victim"]
        time.sleep(0.3)
    Path("/tmp/a").unlink(missing_ok=True)
    assert {name: text for name, text in printed.items() if not text.startswith("REACHED")} == {}
    assert SECRET in printed["secret file"]
    assert set(outside.touched) == set(reached)


def test_a_solution_passes_and_a_judge_in_the_same_process_is_fooled() -> None:
    """The forgeries are real: the usual judge takes them for solutions. The sandbox tells a solution from them."""
    assert judge_tests(forgeries.SOLVED, forgeries.TESTS, "add").passed
    assert naive_judge(forgeries.SOLVED)
    assert not naive_judge("def add(a, b): return 0")
    fooling = ("exit 0", "hard exit", "exit when called", "hard exit when called", "always equal", "atexit")
    assert [name for name in fooling if not naive_judge(NAMED[name].code)] == []
