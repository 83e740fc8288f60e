"""Recipe `programs`: the model writes Python instead of steps, a sandbox runs it, the task judges what it prints.

Program-aided distillation (PAD, arXiv 2305.13888), after PAL (arXiv 2211.10435) and PoT (arXiv 2211.12588): arithmetic
is the interpreter's, and a program that doesn't run is no training record. `program_task` measures a student that was
trained on such records. Shots are the task's worked steps rendered as programs (`as_program`).

Does not cover: isolation (`workbench.sandbox`), libraries beyond the standard one, reasoning that isn't arithmetic.
"""

import ast
import operator
import re
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from workbench.prompts import INSTRUCTIONS, Strategy
from workbench.sandbox import Limits, Outcome, run_many
from workbench.sandbox.jail import required
from workbench.synthesis.sampling import Attempt, Row, Settings, attempt_of, judged, sampled, spent
from workbench.tasks import Task, Verdict
from workbench.tasks.unit_tests import code_in

if TYPE_CHECKING:
    from workbench.models import LM

__all__ = ["programs"]

SHOTS = Strategy("3 shots, program", INSTRUCTIONS["program"], 3, "program")
_ANSWERED = ", programs"  # how a task's name ends when programs answer it
_NUMBER = r"\d+(?:\.\d+)?"
_EQUATION = re.compile(rf"(?<![\w.])(-?(?:{_NUMBER}\s*[-+*/]\s*)+{_NUMBER})\s*=\s*(-?{_NUMBER})(?!\d|\s*[-+*/=]\s*\d)")
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def programs(
    lm: "LM",
    task: Task,
    rows: list[Row],
    settings: Settings,
    *,
    limits: Limits | None = None,
    workers: int | None = None,
) -> list[Attempt]:
    """Ask for a program `settings.samples` times a question; right is one whose last printed line the task accepts.

    Args:
        settings: a strategy of None means 3 shots with programs, which the task must have worked steps for.
        limits: of each program; None for `Limits()`.
        workers: programs run at one time; None for one a processor core.

    Raises:
        SandboxError: this machine can't isolate the programs; nothing was asked.
        ValueError: `task` is a `program_task`, which would run what the programs print.
    """
    asking = program_task(task)
    prompts = [lm.render(asking.messages(row, settings.strategy or SHOTS)) for row in rows]
    found = sampled(lm, rows, prompts, settings)
    outcomes = iter(run_many([code_in(g.text) or "" for each in found for g in each], workers=workers, limits=limits))
    attempts = []
    for row, prompt, each in zip(rows, prompts, found, strict=True):
        samples = []
        for g in each:
            outcome = next(outcomes)
            sample = judged(task, row, printed(outcome) or "", g.tokens_in, g.tokens_out, g.finished)
            samples.append(sample | {"text": g.text.strip(), "ran": outcome.reason})
        attempts.append(attempt_of(row, task, prompt, samples) | {"cost": spent(each)})
    return attempts


def printed(outcome: Outcome) -> str | None:
    """The last line that a program printed, if it ran to its end."""
    lines = [line.strip() for line in outcome.stdout.splitlines() if line.strip()]
    return lines[-1] if lines and outcome.exit_code == 0 else None


def program_task(task: Task, limits: Limits | None = None) -> Task:
    """`task` answered by programs: worked solutions in style "program", and a verifier that runs the answer.

    Each row has `solutions["program"]` where its steps are equations; `verify` judges the last printed line, and a
    program that fails, prints nothing or meets a limit counts as unparsed.
    Raises `SandboxError` at once where programs can't be isolated, and ValueError for a task that is one already.
    """
    required()
    if task.name.endswith(_ANSWERED):
        raise ValueError(f"Task {task.name!r} is answered by programs already. Give the task that it was made of.")

    def draw(split: str, n: int | None, seed: int) -> list[Row]:
        return [_with_program(row) for row in task.draw(split, n, seed)]

    def judge(row: Row, text: str) -> Verdict:
        (outcome,) = run_many([code_in(text) or ""], workers=1, limits=limits)
        answer = printed(outcome)
        return Verdict(False, None) if answer is None else task.judge(row, answer)

    return replace(task, name=f"{task.name}{_ANSWERED}", draw=draw, judge=judge)


def _with_program(row: Row) -> Row:
    program = as_program(row)
    return row if program is None else row | {"solutions": {**row["solutions"], "program": program}}


def as_program(row: Row) -> str | None:
    r"""A row's worked steps as a Python program that prints the answer; None where the equations don't lead there.

    A number that an earlier equation gave becomes that equation's name: always at the start of an equation that goes on
    from the one before, elsewhere unless the question says it too.

    >>> print(as_program({"question": "", "answer": "61", "solutions": {"steps": "30+4=34. 34/2=17. 17+44=61."}}))
    a = 30+4
    b = a//2
    c = b+44
    print(c)
    """
    lines: list[str] = []
    names: dict[Fraction, str] = {}
    told = {Fraction(number) for number in re.findall(_NUMBER, _bare(row["question"]))}
    last: Fraction | None = None
    for left, right in _EQUATION.findall(_bare((row.get("solutions") or {}).get("steps") or "")):
        value = _value(left)
        if value is None or value != Fraction(right) or len(lines) == 26:
            return None
        whole = re.fullmatch(r"\d+\s*/\s*\d+", left) and value.denominator == 1
        name = chr(ord("a") + len(lines))
        lines.append(f"{name} = {_named(left.replace('/', '//') if whole else left, names, told, last)}")
        names[value], last = name, value
    if last is None or not _same(last, row["answer"]):
        return None
    return "\n".join([*lines, f"print({names[last]})"])


def _named(expression: str, names: dict[Fraction, str], told: set[Fraction], last: Fraction | None) -> str:
    """An expression with numbers replaced by the names of the equations that gave them."""

    def name(match: "re.Match[str]") -> str:
        number = Fraction(match[0])
        goes_on = match.start() == 0 and number == last
        return names[number] if number in names and (goes_on or number not in told) else match[0]

    return re.sub(rf"^-?{_NUMBER}|{_NUMBER}", name, expression)


def _bare(text: str) -> str:
    """A text without currency signs and without commas inside of numbers."""
    return re.sub(r"\$|(?<=\d),(?=\d{3}\b)", "", text)


def _value(expression: str) -> Fraction | None:
    """What a sum of plain numbers comes to, exactly."""

    def of(node: Any) -> Fraction:
        if isinstance(node, ast.UnaryOp):
            return -of(node.operand)
        if isinstance(node, ast.BinOp):
            return _OPERATIONS[type(node.op)](of(node.left), of(node.right))
        return Fraction(str(node.value))

    try:
        return of(ast.parse(expression, mode="eval").body)
    except (SyntaxError, ZeroDivisionError, ValueError, AttributeError, KeyError):
        return None


def _same(value: Fraction, answer: Any) -> bool:
    try:
        return value == Fraction(str(answer).replace(",", ""))
    except ValueError:
        return False
