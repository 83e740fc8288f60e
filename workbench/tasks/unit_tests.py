"""Answers that are code: taken out of a model's text and judged by the question's unit tests, in two sandboxes.

A row of kind "code" has `entry_point` (a function's name), `test` (source that defines `check(candidate)`) and, as
HumanEval has it, `prompt` (the head of the function, with helpers that program and tests may use).

Does not cover: isolation and the judging itself (`workbench.sandbox`), code that isn't Python, pass@k.
"""

import ast
import re
from typing import Any

from workbench.sandbox import judge_tests
from workbench.tasks.answers import final_text
from workbench.tasks.verifiers import Verdict

_FENCE = re.compile(r"```[ \t]*\w*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", flags=re.DOTALL)


def code_in(text: str, defines: str = "") -> str | None:
    r"""The code of a text: its last fenced block that defines the function `defines`, else its last block, else all.

    >>> code_in("First:\n```python\nprint(1)\n```\nNo:\n```\nprint(2)\n```\nSo it is 2.")
    'print(2)'
    >>> code_in("x = 1\nprint(x)\n")
    'x = 1\nprint(x)'
    """
    text = final_text(f"\0{text}").removeprefix("\0").lstrip("\n")  # the mark keeps the first line's indent
    if not text.strip():
        return None
    blocks = [block for block in _FENCE.findall(text) if block.strip()]
    if not blocks:
        return text
    return next((block for block in reversed(blocks) if defines and _defines(block, defines)), blocks[-1])


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^(?:async )?def {re.escape(name)}\b|^{re.escape(name)}\s*=", code, re.MULTILINE) is not None


def whole_program(row: dict[str, Any], code: str) -> str:
    """The question's own head with the code: a whole function follows it, the mere body of one completes it."""
    head = row.get("prompt") or ""
    if _defines(code, row["entry_point"]):
        return f"{head}\n{code}\n"
    body = []
    for line in code.splitlines():
        if line.strip() and not line.startswith((" ", "\t")):
            break  # what follows the function is no part of the answer
        body.append(line)
    return f"{head.rstrip()}\n" + "\n".join(body) + "\n"


def _given(head: str) -> str:
    """A head as source on its own: one that ends without a docstring gets an empty body."""
    try:
        ast.parse(head)
    except SyntaxError:
        return f"{head.rstrip()}\n    pass\n"
    return head


def judge_code(row: dict[str, Any], text: str) -> Verdict:
    """Run the row's unit tests on the code of a text; `extracted` is that code.

    Raises:
        ValueError: the row has no tests.
        SandboxError: this machine can't isolate model-written code; nothing was run.
    """
    lacks = [name for name in ("entry_point", "test") if not isinstance(row.get(name), str) or not row[name].strip()]
    if lacks:
        raise ValueError(
            f"Row {row.get('id')} is of kind 'code' and lacks {' and '.join(lacks)}: code is judged by unit tests. "
            "Give the file the columns entry_point (the function's name) and test (source with check(candidate))."
        )
    code = code_in(text, row["entry_point"])
    if code is None:
        return Verdict(False, None)
    program = whole_program(row, code)
    outcome = judge_tests(program, row["test"], row["entry_point"], given=_given(row.get("prompt") or ""))
    return Verdict(bool(outcome.passed), code)
