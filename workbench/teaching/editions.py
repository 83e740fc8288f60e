"""The student's and the teacher's version of a notebook, built from one source that holds both.

The source marks its cells by tags. `exercise`: a code cell that leaves blanks as `...`, below a markdown cell with
`**Exercise 3.1**`; `solution`: fills each blank that is still blank (`if answer_3_1 is ...:`); `check`: asks
`wb.check`; `predict`: a blank before a result, which a later `check` cell puts beside what was measured;
`teacher`: a folded markdown note with the section's minutes and common mistakes. The student's version lacks
solutions and notes, the teacher's shows them. A section (`## ...`) asks for a prediction and has two to four exercises;
those called setup, recap or keep it ask nothing (`outline.Section.asks`). Nothing is graded or collected: nbgrader does
that, and brings a server and a database, which is more than a class that keeps its answers needs.
"""

import ast
import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from workbench.files import write_atomic
from workbench.teaching.outline import MINUTES, Book, Cell, Section, sections, source_of, tags_of, timetable

__all__ = [
    "EditionError",
    "Section",
    "build_class",
    "exercises",
    "faults",
    "sections",
    "student_version",
    "teacher_version",
]

COMMAND = "make class"
KINDS = ("exercise", "solution", "check", "predict", "teacher")
NUMBER = re.compile(r"\*\*Exercise ([0-9A-Za-z.]+)\*\*")
LEFT_BY_RUNS = ("execution", "papermill", "collapsed", "ExecuteTime")


class EditionError(ValueError):
    """A source that no edition can be built from; the text names every fault, notebook by notebook."""


def build_class(notebooks: Sequence[Path], out: Path, made_from: str) -> list[Path]:
    """Write OUT/student/NAME.ipynb and OUT/teacher/NAME.ipynb for each source; the same source gives the same bytes.

    made_from: the commit that every version names as its origin. All sources are looked at before anything is written;
    raises EditionError with all their faults.
    """
    books = {path: read_book(path) for path in notebooks}
    found = [f"{path.name}: {fault}" for path, book in books.items() for fault in faults(book)]
    if found:
        raise EditionError(
            "no version was built, because exercises are not in their form:\n  "
            + "\n  ".join(found)
            + f"\nThe form is told in workbench/teaching/editions.py. Mend the cells, then: {COMMAND}"
        )
    written = []
    for kind, version in (("student", student_version), ("teacher", teacher_version)):
        for path, book in books.items():
            origin = f"made from notebooks/{path.name} at commit {made_from} by `{COMMAND}`"
            target = out / kind / path.name
            write_atomic(target, json.dumps(version(book, origin), indent=1, ensure_ascii=False) + "\n")
            written.append(target)
    return written


def read_book(path: Path) -> Book:
    """A notebook's JSON. Raises EditionError where the file is no notebook of format 4."""
    try:
        book = json.loads(path.read_text(encoding="utf-8"))
        if book["nbformat"] != 4 or not isinstance(book["cells"], list):
            raise KeyError("nbformat 4")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EditionError(
            f"{path} is no notebook that can be read ({type(error).__name__}: {error}). Open it in JupyterLab, save it."
        ) from None
    return book


def student_version(book: Book, origin: str = "") -> Book:
    """The notebook without solutions and teacher's notes; the source of checks, which tells answers, is folded."""
    made = _stripped(book)
    made["cells"] = [cell for cell in made["cells"] if not {"solution", "teacher"} & tags_of(cell)]
    for cell in made["cells"]:
        if "check" in tags_of(cell):
            cell["metadata"]["jupyter"] = {**cell["metadata"].get("jupyter", {}), "source_hidden": True}
    return _signed(made, "student", origin)


def teacher_version(book: Book, origin: str = "") -> Book:
    """The notebook with solutions and notes open, and a table of its sections with minutes on top."""
    made = _stripped(book)
    table = timetable(made)
    for cell in made["cells"]:
        if "solution" in tags_of(cell):
            cell["metadata"].get("jupyter", {}).pop("source_hidden", None)
        if "teacher" in tags_of(cell):
            cell["source"] = _lines(source_of(cell).replace("<details>", "<details open>", 1))
    note = {"cell_type": "markdown", "id": "class-timetable", "metadata": {"tags": ["teacher"]}}
    made["cells"].insert(1, note | {"source": _lines(table)})
    return _signed(made, "teacher", origin)


def exercises(book: Book) -> dict[str, list[str]]:
    """Blanks of every exercise by its number, in order."""
    seen = _Seen()
    for cell in book["cells"]:
        seen.look(cell)
    return {number: names for number, names in seen.exercises if number}


def faults(book: Book) -> list[str]:
    """What breaks the form of exercises and predictions, one sentence each; none for a notebook without them."""
    seen = _Seen()
    for cell in book["cells"]:
        seen.look(cell)
    return seen.said + seen.left_open()


@dataclass
class _Seen:
    """What was met so far on the way through a notebook's cells."""

    said: list[str] = field(default_factory=list)
    number: str = ""  # of the exercise that the last markdown cell sets
    exercises: list[tuple[str, list[str]]] = field(default_factory=list)
    predicted: list[str] = field(default_factory=list)
    solved: set[str] = field(default_factory=set)
    checked: set[str] = field(default_factory=set)
    aside: set[str] = field(default_factory=set)  # names that only solutions set

    @property
    def asked(self) -> set[str]:
        return {name for _, names in self.exercises for name in names}

    def look(self, cell: Cell) -> None:
        """Take one cell in, and note what is wrong with it."""
        kinds = [kind for kind in KINDS if kind in tags_of(cell)]
        source = source_of(cell)
        if len(kinds) > 1:
            self.said.append(f"a cell is tagged {' and '.join(kinds)}; give each its own cell.")
        elif cell["cell_type"] == "markdown":
            self._read(source, kinds)
        elif cell["cell_type"] == "code":
            try:
                tree = ast.parse(source)
            except SyntaxError as error:
                self.said.append(f"the cell {_first(source)!r} is no Python ({error.msg}).")
                return
            kind = kinds[0] if kinds else "code"
            {
                "exercise": self._exercise, "predict": self._predict, "solution": self._solution,
                "check": self._check, "teacher": self._other, "code": self._other,
            }[kind](tree, source)  # fmt: skip

    def _read(self, source: str, kinds: list[str]) -> None:
        if found := NUMBER.findall(source):
            self.number = found[-1]
            if self.number in [number for number, _ in self.exercises]:
                self.said.append(f"exercise {self.number} is there twice.")
        if kinds == ["teacher"] and not ("<details>" in source and MINUTES.search(source)):
            self.said.append(f"the teacher's note {_first(source)!r} needs <details> and the section's `N minutes`.")

    def _exercise(self, tree: ast.Module, source: str) -> None:
        names = self._new(tree, source, "exercise")
        if not self.number:
            self.said.append(f"the exercise cell {_first(source)!r} has no text above it with **Exercise N.M**.")
        self.exercises.append((self.number, names))
        self.number = ""

    def _predict(self, tree: ast.Module, source: str) -> None:
        self.predicted += self._new(tree, source, "predict")

    def _new(self, tree: ast.Module, source: str, kind: str) -> list[str]:
        names = _blanks(tree)
        if not names:
            self.said.append(f"the {kind} cell {_first(source)!r} has no blank such as `answer = ...`.")
        twice = [name for name in names if name in self.asked or name in self.predicted or names.count(name) > 1]
        self.said += [f"{name} is the answer of two exercises or predictions." for name in dict.fromkeys(twice)]
        return names

    def _solution(self, tree: ast.Module, source: str) -> None:
        latest = self.exercises[-1][1] if self.exercises else []
        fills = {name for name in _filled(tree) if name in _stored(tree)}
        if foreign := sorted(set(_filled(tree)) - set(latest)):
            self.said.append(f"a solution fills {', '.join(foreign)}: no blank of the exercise before it.")
        elif not fills:
            self.said.append(f"the solution {_first(source)!r} has no `if NAME is ...:` that sets a blank.")
        if bare := sorted(_stored(ast.Module([n for n in tree.body if not isinstance(n, ast.If)], [])) & set(latest)):
            self.said.append(
                f"a solution writes over a person's own {', '.join(bare)}: put `if NAME is ...:` before it."
            )
        self.solved |= fills
        self.aside |= _stored(tree) - self.asked

    def _check(self, tree: ast.Module, source: str) -> None:
        asked = {"check": self.asked & _loaded(tree), "check_prediction": set(self.predicted) & _loaded(tree)}
        calls = _calls(tree)
        if not any(asked[call] for call in calls & set(asked)):
            self.said.append(f"the check {_first(source)!r} looks at no exercise or prediction before it.")
        self.checked |= set().union(*(asked[call] for call in calls & set(asked)))
        self._other(tree, "")

    def _other(self, tree: ast.Module, source: str) -> None:
        if lost := sorted(self.aside & _loaded(tree) - _stored(tree)):
            self.said.append(f"{', '.join(lost)} is set in a solution only, and students have none.")
        if source and _calls(tree) & {"check", "check_prediction"}:
            self.said.append(f"the cell {_first(source)!r} checks an answer and is not tagged check.")
        self.aside -= _stored(tree)

    def left_open(self) -> list[str]:
        """What is missing at the end."""
        said = []
        for number, names in self.exercises:
            for name in names:
                if name not in self.solved:
                    said.append(f"exercise {number} has no solution for {name}.")
                if name not in self.checked:
                    said.append(f"exercise {number} has no check of {name}.")
        return said + [
            f"the prediction {name} is compared with nothing." for name in self.predicted if name not in self.checked
        ]


def _lines(source: str) -> list[str]:
    return source.splitlines(keepends=True)


def _first(source: str) -> str:
    return (source.strip().splitlines() or [""])[0][:60]


def _blanks(tree: ast.Module) -> list[str]:
    """Names that a cell leaves as `...`."""
    return [
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.value.value is ...
        for target in node.targets
        if isinstance(target, ast.Name)
    ]


def _filled(tree: ast.Module) -> list[str]:
    """Names of `if NAME is ...:` at the outer level."""
    tests = [node.test for node in tree.body if isinstance(node, ast.If)]
    return [
        test.left.id
        for test in tests
        if isinstance(test, ast.Compare)
        and isinstance(test.left, ast.Name)
        and isinstance(test.ops[0], ast.Is)
        and isinstance(test.comparators[0], ast.Constant)
        and test.comparators[0].value is ...
    ]


def _stored(tree: ast.AST) -> set[str]:
    """Names that a cell sets; those of a comprehension are its own."""
    inner = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
    own = {id(name) for node in ast.walk(tree) if isinstance(node, inner) for name in ast.walk(node)}
    return {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and id(node) not in own
    }


def _loaded(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def _calls(tree: ast.AST) -> set[str]:
    """Last names of what is called: `check` for both wb.check(...) and check(...)."""
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {f.attr if isinstance(f, ast.Attribute) else f.id for f in called if isinstance(f, ast.Attribute | ast.Name)}


def _stripped(book: Book) -> Book:
    """A copy without outputs and what executions leave in metadata."""
    made = copy.deepcopy(book)
    made["metadata"] = {key: value for key, value in made["metadata"].items() if key not in LEFT_BY_RUNS}
    for cell in made["cells"]:
        cell["metadata"] = {key: value for key, value in cell.get("metadata", {}).items() if key not in LEFT_BY_RUNS}
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    return made


def _signed(book: Book, kind: str, origin: str) -> Book:
    """The line below the title that says which version this is and where it came from."""
    line = f"*The {kind}'s version{', ' + origin if origin else ''}. Change the source, not this file.*"
    first = book["cells"][0]
    title, _, rest = source_of(first).partition("\n")
    first["source"] = _lines(f"{title}\n\n{line}\n{rest}")
    return book
