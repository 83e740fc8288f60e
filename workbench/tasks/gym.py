"""Any data set of reasoning-gym as items of a task, judged by the data set's own scorer.

Answers are read from `<answer>` tags or from a statement of an answer, and only then scored. Several scorers evaluate
the answer as Python or SymPy source; a model's text must not reach them unless it is a plain literal or a plain
formula.

Source: reasoning-gym 0.1.25 (Apache-2.0). Does not cover: its curricula, and splits (`workbench.tasks`).
"""

import ast
import dataclasses
import importlib.util
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import lru_cache
from random import Random
from types import ModuleType
from typing import Any

import numpy

from workbench.tasks.answers import final_text, numbers, statements
from workbench.tasks.verifiers import Verdict, extract, verify

_CHUNK = 500  # items of one data set object, reasoning-gym's own default; a few data sets make all of them at once
# Data sets of 0.1.25 whose `score_answer` evaluates the answer: as a Python literal, or as a SymPy formula.
_LITERAL = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
_FORMULA = frozenset({
    "composite", "countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration",
})  # fmt: skip
_UNSCORED = frozenset({"game_of_life_halting"})  # its scorer calls every answer right: it compares bool() of two texts
_ATTEMPTS = 20
_FUNCTIONS = frozenset({
    "sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh",
    "exp", "log", "ln", "sqrt", "Abs",
})  # fmt: skip


class _NotBuilt(ModuleType):
    """Stands for pycosat, a SAT solver without wheels, where it could not be compiled: one data set needs it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError("it needs pycosat, which is not installed. With a C compiler: make reasoning-gym")


def library() -> ModuleType:
    """The module `reasoning_gym`, imported on first use: its hundred data sets take a second.

    Raises:
        ValueError: it is not installed.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ValueError(
            "This task is drawn from reasoning-gym, which is not installed. Next: make reasoning-gym, or in an "
            "environment of your own: pip install 'reasoning-gym>=0.1.25,<0.2'. 'word-problems' does without."
        )
    if sys.modules.get("pycosat") is None and importlib.util.find_spec("pycosat") is None:
        sys.modules["pycosat"] = _NotBuilt("pycosat")  # imported at the top of a file that every data set waits for
    return importlib.import_module("reasoning_gym")


def has_solver() -> bool:
    """Whether pycosat is there, which `zebra_puzzles` needs."""
    library()
    return not isinstance(sys.modules.get("pycosat"), _NotBuilt)


def names() -> list[str]:
    """Names of all data sets; none where reasoning-gym is not installed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        return []
    library()
    return sorted(importlib.import_module("reasoning_gym.factory").DATASETS)


def data_set(name: str, parameters: dict[str, Any]) -> Any:
    """A reasoning-gym data set with its own parameters.

    Raises:
        ValueError: parameters that the data set doesn't have, or values that it refuses.
    """
    create_dataset = library().create_dataset
    kind = importlib.import_module("reasoning_gym.factory").DATASETS[name][1]
    fields = {item.name: item for item in dataclasses.fields(kind) if item.name not in ("seed", "size")}
    for wrong in sorted(set(parameters) - set(fields)):
        near = get_close_matches(wrong, fields, n=1)
        said = f"Did you mean {near[0]}? " if near else ""
        own = "rows(n=..., seed=...) decides it. " if wrong in ("seed", "size") else ""
        raise ValueError(
            f"reasoning-gym:{name} has no parameter {wrong!r}. {own}{said}Parameters: {', '.join(fields)}."
        )
    try:
        return create_dataset(name, seed=0, size=_CHUNK, **parameters)
    except Exception as error:
        now = ", ".join(f"{key}={value!r}" for key, value in parameters.items()) or "its defaults"
        raise ValueError(f"reasoning-gym:{name} refused {now}: {str(error) or type(error).__name__}.") from error


def items(data: Any) -> Callable[[int, int], dict[str, Any]]:
    """A function of (seed, index) that makes one question, as unbounded streams of a data set's items.

    `metadata` of an item is what the data set's scorer needs.
    """

    @lru_cache(maxsize=2)
    def chunk(seed: int) -> Any:
        with _seeded(seed):
            return type(data)(dataclasses.replace(data.config, seed=seed))

    def make(seed: int, index: int) -> dict[str, Any]:
        place, at = divmod(index, _CHUNK)
        last: Exception | None = None
        for attempt in range(_ATTEMPTS):
            start = Random(f"{seed}/{place}/{attempt}").randrange(2**31)
            try:
                with _seeded(start + at):
                    entry = chunk(start)[at]
            except ImportError as error:
                raise ValueError(f"A data set of reasoning-gym can't be made here: {error}.") from error
            except Exception as error:  # some generators fail on some seeds: mazes without a path, for example
                last = error
            else:
                return {"question": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}
        raise ValueError(
            f"reasoning-gym failed on {_ATTEMPTS} seeds in a row with {data.config}, at last with {last!r}. "
            "Change its parameters."
        ) from last

    return make


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global random generators in a fixed state, put back afterwards: `codeio` draws from them."""
    kept, kept_numpy = random.getstate(), numpy.random.get_state()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(kept)
        numpy.random.set_state(kept_numpy)


def is_number(answer: Any) -> bool:
    """Whether a gold answer is one plain number.

    >>> is_number("-4"), is_number("3 apples"), is_number(None)
    (True, False, False)
    """
    return isinstance(answer, str) and re.fullmatch(r"-?\d+(\.\d+)?", answer.strip()) is not None


def judge(data: Any, row: dict[str, Any], text: str) -> Verdict:
    """Whether the answer in a text gets the full score (1.0) of the data set's `score_answer`."""
    name = row["metadata"].get("source_dataset", "")
    if name in _UNSCORED:
        return verify("text", row["answer"], text)
    readings = _readings(row["answer"], text)
    for reading in readings:
        if harmless(name, reading) and _score(data, row, reading) >= 1.0:
            return Verdict(True, reading)
    return Verdict(False, readings[0] if readings else None)


def _score(data: Any, row: dict[str, Any], reading: str) -> float:
    try:
        return float(data.score_answer(reading, {key: row[key] for key in ("question", "answer", "metadata")}))
    except Exception:  # scorers parse free text and may fail on it in any way: what they can't read is not right
        return 0.0


def _readings(gold: Any, text: str) -> list[str]:
    """The same final answer, trimmed in different ways: data sets differ in how exactly they want it written."""
    final = final_text(text)
    if tagged := re.findall(r"<answer>\s*(.*?)\s*</answer>", final, flags=re.DOTALL):
        spans = [tagged[-1]]
    elif is_number(gold):
        spans = [extract("number", final) or ""]
        written = [found for found in re.findall(r"-?\d+\.?\d*", final) if numbers(found) == spans]
        spans += written[-1:]  # "52.20" is read as 52.2, and some scorers want it as written
    elif given := statements(final):
        clause, rest = given[0]
        spans = [clause, rest, rest.rstrip(". \n")]
    else:
        spans = [final] if "\n" not in final or "\n" in str(gold) else []
    trimmed = [span.strip().strip("*`$").strip() for span in spans]
    return list(dict.fromkeys(span for span in trimmed if span))


def harmless(name: str, answer: str) -> bool:
    """Whether an answer may reach the scorer of a data set that evaluates it.

    >>> harmless("countdown", "2*(3+4)"), harmless("countdown", "__import__('os')"), harmless("puzzle24", "9**9**9")
    (True, False, False)
    """
    if name in _LITERAL and "[" in answer:
        try:
            ast.literal_eval(answer)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return False
        return True
    if name not in _FORMULA:
        return True
    words = set(re.findall(r"[A-Za-z_]\w*", answer))
    called = set(re.findall(r"([A-Za-z_]\w*)\s*\(", answer))
    towers = re.search(r"(?:\*\*|\^)\s*[-(]*\s*(?:\d{3,}|[\w.]+\s*(?:\*\*|\^))|!", answer)
    nested = len(re.findall(r"\)\s*(?:\*\*|\^)", answer)) > 2
    plain = re.fullmatch(r"[\w\s.+\-*/^()=,]*", answer) and not re.search(r"\.\s*[A-Za-z_]|__", answer)
    short = all(len(word) <= 2 for word in words - _FUNCTIONS)
    return bool(plain and short and called <= _FUNCTIONS and not towers and not nested and len(answer) <= 400)
