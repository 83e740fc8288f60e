"""Tasks: questions with gold answers and a verifier, because every stage needs the same question asked the same way.

`load_task` makes one from the lab's families, any data set of reasoning-gym, a known benchmark, or a plain file. Its
splits (train, tuning, test) never share a question text: a hash of the text decides. Generated tasks have as many
rows as asked for; a benchmark has as many as its files hold.

Does not cover: reading files (`benchmarks`, `rows`), reading and judging answers (`answers`, `verifiers`), prompt
strategies (`workbench.prompts`). Leans on reasoning-gym 0.1.25 for generated data sets and their scoring.
"""

import hashlib
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property, lru_cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from workbench.aside import Aside, BadRow
from workbench.tasks import benchmarks, blimp, unit_tests, verifiers
from workbench.tasks.benchmarks import BBH, BENCHMARKS, SHARES, SPLITS, split_of
from workbench.tasks.rows import checked, kind_of, read_records, rows_of, same_text
from workbench.tasks.verifiers import Verdict

if TYPE_CHECKING:
    from workbench.prompts import Strategy

__all__ = ["SPLITS", "Task", "Verdict", "load_task", "task_names"]

DEFAULT_ROWS = 200  # of a generated task, when n isn't given
_ABOUT_FILES = "path, split, question, answer, kind"
_GIVE_UP = 1000  # draws in a row without a new question, after which a generated split counts as exhausted
_Draw = Callable[[str, int | None, int], list[dict[str, Any]]]  # split, n, seed


@dataclass(frozen=True)
class Task:
    """Questions, gold answers and the rule that judges an answer; made by `load_task`."""

    name: str
    kind: str
    source: str
    draw: _Draw = field(repr=False)
    judge: Callable[[dict[str, Any], str], Verdict] = field(repr=False)
    parameters: dict[str, Any] = field(default_factory=dict)
    bad: tuple[BadRow, ...] = field(default=(), repr=False)  # rows of the file that were put aside

    def rows(self, split: str = "test", n: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
        """A seeded sample without repeats; the first rows of a larger n are those of a smaller one.

        Args:
            split: "train", "tuning" or "test"; no question is in two of them.
            n: how many; None means all of a benchmark's (in file order), 200 of a generated task's.
            seed: which sample.

        Raises:
            ValueError: no such split, or fewer questions than n.

        >>> task = load_task("word-problems")
        >>> task.rows(n=2, seed=1) == task.rows(n=5, seed=1)[:2]
        True
        """
        if split not in SPLITS:
            raise ValueError(f"Task {self.name!r} has no split {split!r}. Splits: {', '.join(SPLITS)}.")
        if n is not None and (not isinstance(n, int) or n < 1):
            raise ValueError(
                f"n is the number of questions, a whole number from 1 (or None for the default), not {n!r}."
            )
        return self.draw(split, n, seed)

    @cached_property
    def examples(self) -> list[dict[str, Any]]:
        """The tuning rows that worked examples in prompts are drawn from; read them, don't change them."""
        return self.rows("tuning", seed=1)

    def verify(self, row: dict[str, Any], text: str) -> Verdict:
        """Judge a model's text as the answer to a row; `extracted` is None when no answer could be read."""
        if not isinstance(text, str):
            raise ValueError(
                f"verify judges the text of an answer, a str; got {type(text).__name__}. Pass generation.text."
            )
        return self.judge(row, text)

    def verify_many(self, rows: Iterable[dict[str, Any]], texts: Iterable[str]) -> list[Verdict]:
        """`verify` for many answers, in order; one text a row."""
        return [self.verify(row, text) for row, text in zip(rows, texts, strict=True)]

    def messages(self, row: dict[str, Any], strategy: "Strategy | None" = None) -> list[dict[str, str]]:
        """Chat messages that ask the row's question, alone or by a prompt strategy (`workbench.prompts`)."""
        if strategy is None:
            return [{"role": "user", "content": row["question"]}]
        from workbench import prompts  # prompts needs tasks for its shots

        return prompts.messages(self, row, strategy)


def task_names() -> list[str]:
    """Every name that `load_task` knows; what is drawn from reasoning-gym only when that is installed."""
    return [
        *(_families() if _gym_names() else _families()[:1]),
        *BENCHMARKS,
        *(f"bbh:{part}" for part in BBH),
        "blimp",
        *(f"blimp:{paradigm}" for paradigm in blimp.PARADIGMS),
        *(f"reasoning-gym:{name}" for name in _gym_names()),
    ]


def load_task(
    name: str,
    *,
    path: str | Path | None = None,
    split: str | None = None,
    question: str | None = None,
    answer: str | None = None,
    kind: str | None = None,
    max_bad: float = 0.01,
    **parameters: Any,
) -> Task:
    """A task by name, or from a file.

    Args:
        name: a lab family ("word-problems", ...), "reasoning-gym:NAME", a benchmark ("gsm8k", "svamp", "aqua",
            "math500", "humaneval", "bbh:SUBTASK", "blimp", "blimp:PARADIGM"), or any name together with `path`.
        path: a JSON, JSONL, CSV or Parquet file, or a benchmark's folder. A file with a benchmark's own file name
            stands for its folder: path="gsm8k/test.jsonl" also finds train.jsonl beside it.
        split: put every row of the file into this split, instead of dealing them out by hash.
        question, answer: columns of the file, when they have unusual names.
        kind: how answers are judged: number, latex, option, text, list, code, found from the gold answers if not
            given; or, with partial credit, ordering (items in order) and span (one or several accepted texts).
        max_bad: share of a file's rows that may be unusable (broken, empty, endless, of another kind) and are put
            aside, in `task.bad` and in what is made from the task; past it the file is refused.
        parameters: knobs of a generated task, such as `steps=(5, 7)` or reasoning-gym's own; BLiMP's
            `per_paradigm=20`.

    Raises:
        ValueError: an unknown name (with the nearest ones), file, column or parameter.

    >>> load_task("word-problems", steps=(5, 7)).kind
    'number'
    """
    where = None if path is None else Path(path)
    if name.startswith("reasoning-gym:") or name in _families():
        if any(value is not None for value in (where, split, question, answer, kind)):
            raise ValueError(f"Task {name!r} is generated: it takes none of {_ABOUT_FILES}, which are for files.")
        return _gym_task(name, parameters) if ":" in name else _lab_task(name, parameters)
    if name.partition(":")[0] == "blimp":
        if any(value is not None for value in (split, question, answer, kind)) or set(parameters) - {"per_paradigm"}:
            raise ValueError(f"Task {name!r} holds pairs of sentences: it takes path and per_paradigm alone.")
        return _pair_task(name, where, parameters)
    if where is None and name not in BENCHMARKS and name.partition(":")[0] != "bbh":
        raise ValueError(_unknown(name))
    if parameters:
        raise ValueError(f"Task {name!r} has no parameters called {', '.join(parameters)}. It takes {_ABOUT_FILES}.")
    if split is not None and split not in SPLITS:
        raise ValueError(f"There is no split {split!r} to put the rows into. Splits: {', '.join(SPLITS)}.")
    return _file_task(name, where, split, question, answer, kind, Aside(max_bad))


def _families() -> tuple[str, ...]:
    from workbench.lab.families import FAMILIES

    return FAMILIES


def _unknown(name: str) -> str:
    names = task_names()
    short = {other.rpartition(":")[2].replace("_", "-"): other for other in reversed(names)}  # lab names win
    close = get_close_matches(name.rpartition(":")[2].replace("_", "-").lower(), short, n=3, cutoff=0.5)
    near = [short[other] for other in close]
    said = f"Did you mean {' or '.join(near)}? " if near else ""
    return (
        f"No task is called {name!r}. {said}Names: {', '.join([*_families(), *BENCHMARKS])}, bbh:SUBTASK, "
        "blimp, blimp:PARADIGM, reasoning-gym:NAME; or any name with path=FILE."
    )


def _file_task(
    name: str,
    path: Path | None,
    split: str | None,
    question: str | None,
    answer: str | None,
    kind: str | None,
    aside: Aside,
) -> Task:
    """A task with a fixed number of rows, each owned by one split."""
    if name in BENCHMARKS or name.startswith("bbh"):
        parts, usual = benchmarks.load_rows(name, path, question, answer, aside), benchmarks.benchmark(name).kind
    else:
        assert path is not None
        parts, usual = [("all", rows_of(read_records(path, aside), str(path), question, answer, aside))], None
    aside.check(sum(len(rows) for _, rows in parts))
    kind = kind or usual or kind_of([row for _, rows in parts for row in rows])
    seen_bad = len(aside.rows)
    dealt: dict[str, list[dict[str, Any]]] = {each: [] for each in SPLITS}
    seen: set[str] = set()
    for role, rows in sorted(parts, key=lambda part: part[0] != "test"):  # test first: it keeps what is shared
        for row in checked(rows, kind, aside):
            if (key := same_text(row["question"])) not in seen:
                seen.add(key)
                dealt[split or split_of(row["question"], SHARES[role])].append(row)

    if len(aside.rows) > seen_bad:
        aside.check(sum(map(len, dealt.values())))

    def draw(split: str, n: int | None, seed: int) -> list[dict[str, Any]]:
        rows = dealt[split]
        if not rows or (n or 0) > len(rows):
            held = ", ".join(f"{len(own)} {each}" for each, own in dealt.items())
            raise ValueError(
                f"Task {name!r} can't give {n or 'any'} {split} questions: it holds {held}. Ask for fewer, add the "
                f"file that is missing, or put a whole file into one: load_task({name!r}, path=FILE, split={split!r})."
            )
        picked = rows if n is None else Random(f"{name}/{split}/{seed}").sample(rows, len(rows))[:n]
        return deepcopy(picked)

    return Task(name, kind, str(path) if path else "files or hub", draw, _judge(kind), bad=tuple(aside.rows))


def _pair_task(name: str, path: Path | None, parameters: dict[str, Any]) -> Task:
    """Pairs of sentences; the text of an answer is the sentence that was chosen."""
    source, draw = blimp.load_pairs(name, path, parameters.get("per_paradigm"))

    def judge(row: dict[str, Any], text: str) -> Verdict:
        said = text.strip()
        return Verdict(said == row["good"], said if said in (row["good"], row["bad"]) else None)

    return Task(name, "pair", source, draw, judge, dict(parameters))


def _judge(kind: str) -> Callable[[dict[str, Any], str], Verdict]:
    if kind == "code":
        return unit_tests.judge_code
    return lambda row, text: verifiers.verify(kind, row["answer"], text)


def _generated(name: str, make: Callable[[int, int], dict[str, Any]], owner: Callable[[str], str]) -> _Draw:
    """Draws for a generated task: a stream of items per split and seed, kept where the split owns the question."""

    @lru_cache(maxsize=32)  # shots are drawn for every question, always the same
    def sample(split: str, n: int | None, seed: int) -> list[dict[str, Any]]:
        stream = int.from_bytes(hashlib.sha256(f"{name}/{split}/{seed}".encode()).digest()[:3], "big")
        kept: dict[str, dict[str, Any]] = {}
        index = last = 0
        while len(kept) < (n or DEFAULT_ROWS):
            item = make(stream, index)
            index += 1
            question = item["question"]
            if question not in kept and owner(question) == split:
                kept[question] = {"id": f"{name}-{hashlib.sha256(question.encode()).hexdigest()[:12]}", **item}
                last = index
            elif index - last > _GIVE_UP:
                raise ValueError(
                    f"Task {name!r} has too few different {split} questions: {len(kept)} of {n or DEFAULT_ROWS} found, "
                    f"and none new in {_GIVE_UP} draws. Ask for fewer, or widen its parameters."
                )
        return list(kept.values())

    return lambda split, n, seed: deepcopy(sample(split, n, seed))


def _lab_task(name: str, knobs: dict[str, Any]) -> Task:
    from workbench.lab import families

    kind = families.generate(name, 0, 0, **knobs)["kind"]
    draw = _generated(name, lambda seed, index: families.generate(name, seed, index, **knobs), families.split_of)
    return Task(name, kind, "lab", draw, _judge(kind), dict(knobs))


def _gym_names() -> list[str]:
    from workbench.tasks import gym

    return gym.names()


def _gym_task(name: str, parameters: dict[str, Any]) -> Task:
    from workbench.tasks import gym

    gym.library()  # its own error where it is not installed
    short = name.partition(":")[2]
    if short not in gym.names():
        raise ValueError(_unknown(name))
    data = gym.data_set(short, parameters)
    make = gym.items(data)
    kind = "number" if all(gym.is_number(make(0, index)["answer"]) for index in range(5)) else "text"
    draw = _generated(name, make, lambda question: split_of(question, SHARES["generated"]))
    return Task(name, kind, "reasoning-gym", draw, lambda row, text: gym.judge(data, row, text), dict(parameters))
