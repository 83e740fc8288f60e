"""The sandbox: programs against the plain interpreter, HumanEval's own solutions, refusal where it is due."""

import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.folders import reachable
from workbench.evaluation import evaluate
from workbench.sandbox import Limits, SandboxError, inside, isolation, jail, judge_tests, run_many, run_python
from workbench.tasks import load_task
from workbench.tasks.unit_tests import code_in, whole_program

ROOT = Path(__file__).resolve().parents[1]
needs_sandbox = pytest.mark.skipif(
    not isolation(), reason="bubblewrap is missing or can't start here: python -m workbench doctor says what to do"
)


@needs_sandbox
@pytest.mark.parametrize(
    "code",
    [
        "print(sum(n * n for n in range(1000)))\nimport sys; print('é', file=sys.stderr)",
        "import math, json, hashlib\nprint(math.pi, json.dumps([1]), hashlib.sha256(b'x').hexdigest())",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nprint(A(3), __name__)",
        "if __name__ == '__main__':\n    print(input()[::-1])",
        "raise SystemExit(7)",
        "import sys; sys.exit('gone wrong')",
        "exit()",
        "1/0",
        "import os; os.kill(os.getpid(), 6)",
        "def broken(:",
    ],
)
def test_a_harmless_program_does_what_it_does_anywhere(code: str) -> None:
    found = run_python(code, stdin="drawer\n")
    plain = subprocess.run([sys.executable, "-c", code], input="drawer\n", capture_output=True, text=True, check=False)
    code_of_plain = plain.returncode if plain.returncode >= 0 else 128 - plain.returncode
    assert (found.stdout, found.exit_code, found.limit) == (plain.stdout, code_of_plain, "")
    assert found.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]
    assert found.passed is None


@needs_sandbox
def test_hashes_repeat_and_many_runs_keep_their_order() -> None:
    codes = [
        f"import time; time.sleep({(7 - n) / 50}); print({n}, hash('a'), sorted({{'a', 'b', 'c'}}))" for n in range(8)
    ]
    many = run_many(codes, workers=4)
    assert [found.stdout.split()[0] for found in many] == [str(n) for n in range(8)]
    assert len({found.stdout.split()[1] for found in many}) == 1
    assert [found.stdout for found in many[:2]] == [run_python(code).stdout for code in codes[:2]]
    with pytest.raises(ValueError, match="workers=0"):
        run_many(codes, workers=0)


@needs_sandbox
def test_what_was_printed_before_a_limit_is_kept() -> None:
    found = run_python("print('so far', flush=True)\nwhile True: pass", limits=Limits(seconds=0.5))
    assert (found.stdout, found.limit, found.exit_code) == ("so far\n", "seconds", None)
    assert "0.5 seconds" in found.reason
    found = run_python("while True: print('x' * 99)", limits=Limits(output=1000))
    assert (len(found.stdout), found.limit) == (1000, "output")
    assert run_python("print('x' * 999)", limits=Limits(output=1000)).limit == ""
    assert run_python("while True: pass", limits=Limits(seconds=9, cpu=1)).reason == "ended by SIGKILL"


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"processes": -1}, {"memory": 1 << 20}, {"output": 1.5}])
def test_limits_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)


@needs_sandbox
def test_threads_may_start_sandboxes_and_descriptors_are_given_back() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    threads = [threading.Thread(target=run_python, args=("print(1)",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    judge_tests("def f(): return 1", "assert f() == 1", "f")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@needs_sandbox
def test_a_killed_parent_takes_its_sandbox_with_it(tmp_path: Path) -> None:
    program = "from workbench.sandbox import run_python\nrun_python('import time; time.sleep(600) # MARK', stdin='x')"
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    found: set[int] = set()
    while not found and parent.poll() is None:
        time.sleep(0.05)
        inside = {pid: words(pid) for pid in descendants(parent.pid)}
        found = {pid for pid, said in inside.items() if "/sandbox/inside.py run" in said and "bwrap" not in said}
    assert len(found) >= 1
    everyone = descendants(parent.pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any("/sandbox/inside.py" in words(pid) for pid in everyone):
        time.sleep(0.05)
    assert [pid for pid in everyone if "/sandbox/inside.py" in words(pid)] == []


def words(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def descendants(pid: int) -> set[int]:
    found = set()
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, thread.read_text().split()):
            found |= {child} | descendants(child)
    return found


@needs_sandbox
def test_plain_data_comes_through_unchanged() -> None:
    values = [
        None, True, 0, -(2**200), 2.5, float("inf"), 1 + 2j, "é", b"\0", [1, [2]], (1, (2,)), {"a": {1: (2,)}}, {1, 2},
        frozenset({3}), "", (), [], {},
    ]  # fmt: skip
    tests = f"inf = float('inf')\nfor value in {values!r}:\n    answer = same(value)\n"
    tests += "    assert answer == value and type(answer) is type(value), value\n"
    outcome = judge_tests("def same(x): return x", tests, "same")
    assert (outcome.passed, outcome.reason) == (True, "all tests passed")
    assert [inside.decode(json.loads(json.dumps(inside.encode(value)))) for value in values] == values


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        ("def f(x): return x", "def check(f): assert f(1) == 2, 'two'", "AssertionError: two"),
        ("def f(x): return x", "def check(f): pass", "the tests never called the program"),
        ("def g(x): return x", "def check(f): assert f(1) == 1", "KeyError: 'f'"),
        ("import nothing_of_that_name", "def check(f): assert f(1) == 1", "No module named"),
        ("def f(x): raise StopIteration", "def check(f): assert all(map(f, [1, 2]))", "RuntimeError: StopIteration"),
        (
            "def f(x): raise AssertionError",
            "try:\n    f(1)\nexcept AssertionError: pass",
            "RuntimeError: AssertionError",
        ),
        ("def f(x): return x", "def check(f): assert f(print) == 1", "the tests can't call the program"),
        ("def f(x): return x", "def check(f): import sys; f(1); sys.exit(0)", "SystemExit: 0"),
        ("def f(x): return helper(x)", "def check(f): assert f(1) == 1", "NameError"),
    ],
)
def test_a_failed_test_says_why(program: str, tests: str, reason: str) -> None:
    outcome = judge_tests(program, tests, "f", given="def helper(x): return x")
    assert not outcome.passed
    assert reason in outcome.reason


@needs_sandbox
def test_errors_may_be_expected_and_helpers_are_the_questions_own() -> None:
    tests = (
        "def check(f):\n    try:\n        f(-1)\n    except ValueError as error:\n        assert str(error) == 'no'\n"
    )
    tests += "    else:\n        assert False\n    assert near(f(4), 2)"
    given = "def near(a, b): return abs(a - b) < 1e-9"
    root = "def f(x):\n    if x < 0: raise ValueError('no')\n    return x ** 0.5"
    assert judge_tests(root, tests, "f", given=given).passed
    cheat = "def near(a, b): return True\ndef f(x):\n    if x < 0: raise ValueError('no')\n    return 3"
    assert not judge_tests(cheat, tests, "f", given=given).passed


@needs_sandbox
@pytest.mark.slow
def test_humaneval_solutions_pass_and_stubs_fail(data_folder: Path) -> None:
    file = data_folder / "humaneval" / "HumanEval.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
    passed = {}
    for answer in ("canonical_solution", None):
        for row in rows if answer else rows[::8]:
            program = row["prompt"] + (row[answer] if answer else "    return None\n")
            outcome = judge_tests(program, row["test"], row["entry_point"], given=row["prompt"])
            passed.setdefault(answer, []).append(outcome.passed)
    assert (sum(passed["canonical_solution"]), sum(passed[None])) == (164, 0)


@needs_sandbox
def test_a_code_task_verifies_bodies_and_whole_functions(data_folder: Path) -> None:
    task = load_task("humaneval", path=data_folder)
    row, other = task.rows("test", n=2)
    whole = f"{row['prompt']}\n{row['answer']}"
    fenced = f"Like this:\n```python\n{whole}\n```\nTry it:\n```python\nprint({row['entry_point']})\n```"
    runs_on = f"{row['answer']}\n\nprint('more')\ndef another(): pass\nraise SystemExit"
    assert [task.verify(row, text).correct for text in (row["answer"], whole, fenced, runs_on)] == [True] * 4
    assert [task.verify(row, text).correct for text in (other["answer"], "    return 1", "I don't know.")] == [
        False
    ] * 3
    assert task.verify(row, fenced).extracted == whole
    assert task.verify(row, " ").unparsed
    bare = {"prompt": "def f(x):", "entry_point": "f", "test": "def check(f): assert f(1) == 2"}
    assert [task.verify(bare, text).correct for text in ("    return x + 1", "    return x")] == [True, False]
    with pytest.raises(ValueError, match="lacks test"):
        task.verify({"id": 1, "entry_point": "f"}, "x")


def test_code_is_taken_out_of_a_text() -> None:
    assert code_in("<think>```\nno\n```</think>```py\nx = 1\n```") == "x = 1"
    assert code_in("```python\nprint(1)") == "print(1)"
    assert code_in("    return 1\n<|im_end|>print(2)") == "    return 1"
    assert code_in(" \n") is None
    row = {"prompt": "import math\ndef f(x):\n    '''Doc.'''", "entry_point": "f"}
    assert whole_program(row, "    return x\nprint(1)") == "import math\ndef f(x):\n    '''Doc.'''\n    return x\n"


@pytest.mark.parametrize(
    ("program", "words"),
    [("no-such-bwrap", ("no 'no-such-bwrap' on the PATH", "apt install bubblewrap")),
     ("exit 1", ("could not start", "uid map: Permission denied", "kernel.unprivileged_userns", "Nothing was run"))],
)  # fmt: skip
def test_nothing_runs_where_nothing_isolates(program: str, words: tuple[str, ...], tmp_path: Path, monkeypatch) -> None:
    if program == "exit 1":
        (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'setting up uid map: Permission denied' >&2\nexit 1\n")
        (tmp_path / "bwrap").chmod(0o755)
        reachable(tmp_path)
        program = str(tmp_path / "bwrap")
    if sys.platform != "linux":
        words = ("Linux on",)
    with pytest.raises(SandboxError) as caught:
        jail.required(program)
    assert all(word in str(caught.value) for word in words)
    assert isolation(program) is None
    monkeypatch.setattr(jail, "probe", lambda program="bwrap": ("", str(caught.value)))
    calls = (
        lambda: run_python("print(1)"),
        lambda: run_many(["print(1)"]),
        lambda: judge_tests("", "", "f"),
        lambda: load_task("sums", path=sums(tmp_path), kind="code").verify(
            {"entry_point": "f", "test": "def check(f): f()"}, "def f(): return 1"
        ),
        lambda: evaluate(None, load_task("sums", path=sums(tmp_path), kind="code"), {"plain": []}),
    )
    for call in calls:
        with pytest.raises(SandboxError, match="Next: "):
            call()


def sums(folder: Path) -> Path:
    file = folder / "sums.jsonl"
    file.write_text(json.dumps({"question": "def f():", "answer": "return 1"}) + "\n")
    return file


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_every_jump_of_the_filter_lands_on_an_instruction(machine: str) -> None:
    """Follow the filter for each call by a small interpreter of its own."""
    import struct

    program = list(struct.iter_unpack("=HBBI", jail.syscall_filter(machine)))

    def follow(number: int, argument: int = 0, arch: int = jail._ARCHITECTURE[machine]) -> int:
        at, held = 0, 0
        while True:
            operation, true, false, operand = program[at]
            at += 1
            if operation == 0x06:
                return operand
            if operation == 0x20:
                held = {0: number, 4: arch, 16: argument}[operand]
            else:
                holds = {0x15: held == operand, 0x35: held >= operand, 0x45: bool(held & operand)}[operation]
                at += true if holds else false

    calls = jail._CALLS[machine]
    refused, allowed, missing = 0x50001, 0x7FFF0000, 0x50026
    for name, number in calls.items():
        expected = {"clone": allowed, "clone3": missing}.get(name, refused)
        assert follow(number) == expected, name
    assert follow(calls["socket"], 1) == follow(calls["clone"], 17) == allowed
    assert follow(calls["clone"], 0x10000011) == follow(calls["socket"], 2) == refused
    assert {follow(number) for number in range(500) if number not in calls.values()} == {allowed}
    assert follow(0x40000001) == missing
    assert follow(1, arch=0x40000003) == 0x80000000
