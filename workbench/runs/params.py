"""What a notebook's parameters cell may say, and what may be given to it: names, types, bounds; the rest is refused.

The cell tagged `parameters` is read as a syntax tree and never executed. Values come as text (command line, YAML) or as
plain Python values; in both cases the declared type decides, so that `1e-4` is a number where a `float` is declared and
`12e4` stays text where a `str` is. Checking is pydantic's, in strict mode. Reading YAML and text lives in `values`;
this module does not start kernels (see `runs`).
"""

import ast
import difflib
import json
import keyword
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from workbench.runs.annotations import admits_text, default_value, read_annotation
from workbench.runs.values import ParameterError, Text, from_text, plain, read_yaml

__all__ = [
    "Declaration",
    "Parameter",
    "ParameterError",
    "assign",
    "check",
    "gather",
    "parse_assignments",
    "read_parameters",
]

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
SECRET = re.compile(
    r"(?:^|_)(?:\w*token|\w*secrets?|(?:api|private|access)?_?key|pass(?:word|wd|phrase)s?|credentials?|auth)(?:_|$)"
)
SECRET_VALUE = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|AKIA[A-Z0-9]{16})\b"
)
RESERVED = "out"


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell: its name, the annotation as written, the type it stands for, its default."""

    name: str
    annotation: str
    type: Any
    default: object

    def check(self, value: object) -> object:
        """Return `value` as the declared type, or raise ParameterError with the value received and those allowed."""
        try:
            found: Any = TypeAdapter(self.type).validate_python(from_text(value, self.type), strict=True)
        except (ValidationError, OverflowError, TypeError, ValueError) as error:
            raise ParameterError(
                f"{self.name} = {shown(value)} is refused: {reason(error)}. "
                f"Declared: {self.name}: {self.annotation} = {self.default!r}."
            ) from None
        if isinstance(problem := plain(found), str):
            raise ParameterError(f"{self.name} = {shown(value)} is refused: {problem}.")
        if SECRET_VALUE.search(json.dumps(found)):
            raise ParameterError(
                f"the value of {self.name} looks like an access token. Parameters are saved in the run's "
                "files: put it into the environment (HF_TOKEN) or run `hf auth login` instead."
            )
        return found


@dataclass(frozen=True)
class Declaration:
    """All parameters that one notebook declares, in order, and the pairs that contradict each other."""

    notebook: str
    parameters: dict[str, Parameter]
    conflicts: tuple[tuple[str, str], ...] = ()

    @property
    def defaults(self) -> dict[str, object]:
        """Return the value of every parameter as the notebook sets it."""
        return {name: parameter.default for name, parameter in self.parameters.items()}


def read_parameters(notebook: Path | str) -> Declaration:
    """Read a notebook's parameters cell without running it.

    The cell may hold typed assignments of literals, comments and imports of names for annotations. Contradictions come
    from the notebook's metadata: `{"workbench": {"conflicts": [["a", "b"], ["quantization=nf4", "merge=true"]]}}`.
    A notebook without such a cell declares nothing. Raises ParameterError for anything else found in the cell.
    """
    path = Path(notebook)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ParameterError(f"{path} is not a readable notebook ({type(error).__name__}: {error}).") from None
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) > 1:
        raise ParameterError(f"{path.name} has {len(tagged)} cells tagged `parameters`; it may have one.")
    source = "".join(tagged[0]["source"]) if tagged else ""
    found = {}
    for name, annotation in read_annotation(source, path.name):
        if name in found:
            raise ParameterError(f"{path.name} declares {name} twice in its parameters cell.")
        found[name] = declared(name, annotation, path.name)
    pairs = content.get("metadata", {}).get("workbench", {}).get("conflicts", [])
    return Declaration(path.name, found, read_conflicts(pairs, found, path.name))


def declared(name: str, line: tuple[str, Any, ast.expr], where: str) -> Parameter:
    """Turn one line of the cell into a Parameter whose default obeys its own declaration."""
    annotation, kind, tree = line
    if not usable(name):
        raise ParameterError(f"{where} declares a parameter called {name!r}: names are plain words like learning_rate.")
    if is_secret(name) and admits_text(kind):
        raise ParameterError(
            f"{where} declares {name}, which looks like a secret. Parameters are saved in the run's files: "
            "read it from the environment instead."
        )
    parameter = Parameter(name, annotation, kind, default_value(tree, name, where))
    try:
        return Parameter(name, annotation, kind, parameter.check(parameter.default))
    except ParameterError as error:
        raise ParameterError(f"in {where} the default of a parameter breaks its own declaration: {error}") from None


def read_conflicts(pairs: object, known: Mapping[str, Parameter], where: str) -> tuple[tuple[str, str], ...]:
    """Check the contradictions that a notebook's metadata lists; each side is NAME or NAME=VALUE."""
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ParameterError(f"metadata.workbench.conflicts of {where} must be a list of pairs, got {shown(pairs)}.")
    for side in (str(side) for pair in pairs for side in pair):
        if (name := side.partition("=")[0]) not in known:
            raise ParameterError(
                f"{where} lists a conflict of {name!r}, which it does not declare{nearest(name, known)}."
            )
    return tuple((str(first), str(second)) for first, second in pairs)


def check(declaration: Declaration, given: Mapping[str, object]) -> dict[str, object]:
    """Return every parameter of a notebook with its value: the given ones checked, the others as declared.

    Raises ParameterError for unknown names (with the nearest right one), wrong types or bounds, and contradictions
    (with both names).
    """
    for name in given:
        refuse_name(name, declaration.parameters, declaration.notebook)
    values = declaration.defaults
    for name, value in given.items():
        values[name] = declaration.parameters[name].check(value)
    for pair in declaration.conflicts:
        if all(holds(side, values, declaration) for side in pair):
            raise ParameterError(
                f"{pair[0]} and {pair[1]} contradict each other in {declaration.notebook}: give one of "
                f"them, not both (received {', '.join(describe(side, values) for side in pair)})."
            )
    return values


def assign(declarations: Mapping[str, Declaration], given: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """Give each parameter to those notebooks that declare it; refuse one that none declares.

    Takes and returns dictionaries by stage name. `out` belongs to the runner and is refused.
    """
    union = {name: parameter for item in declarations.values() for name, parameter in item.parameters.items()}
    for name in given:
        if name == RESERVED:
            raise ParameterError("the parameter out is the run's folder and is set by --out FOLDER, not by -p.")
        refuse_name(name, {key: value for key, value in union.items() if key != RESERVED}, ", ".join(declarations))
    return {
        stage: check(item, {name: value for name, value in given.items() if name in item.parameters})
        for stage, item in declarations.items()
    }


def gather(assignments: Iterable[str] = (), file: Path | None = None) -> dict[str, object]:
    """Collect NAME=VALUE texts and a YAML file of parameters; a name on the command line wins over the file."""
    return {**(read_yaml(file) if file else {}), **parse_assignments(assignments)}


def parse_assignments(assignments: Iterable[str]) -> dict[str, object]:
    """Split NAME=VALUE texts. The values stay text until a declared type reads them.

    >>> parse_assignments(["n=5"])
    {'n': Text('5')}
    """
    found: dict[str, object] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals:
            raise ParameterError(f"-p takes NAME=VALUE, got {shown(text)}; for example -p n=50.")
        if name in found:
            raise ParameterError(f"{shown(name)} is given twice on the command line.")
        found[name] = Text(value)
    return found


def refuse_name(name: object, known: Mapping[str, Parameter], where: str) -> None:
    """Raise ParameterError unless `name` is one of the declared names."""
    if isinstance(name, str) and name in known:
        return
    if not isinstance(name, str) or not usable(name):
        raise ParameterError(f"{shown(name)} is not a parameter name: names are plain words like learning_rate.")
    if is_secret(name) and not difflib.get_close_matches(name, known, cutoff=0.85):
        raise ParameterError(
            f"{name} looks like a secret and is no parameter of {where}. Parameters are saved in the run's "
            "files: put it into the environment (HF_TOKEN) or run `hf auth login` instead."
        )
    raise ParameterError(
        f"{where} has no parameter {name}{nearest(name, known)}. Declared: {', '.join(known) or 'none'}."
    )


def holds(side: str, values: Mapping[str, object], declaration: Declaration) -> bool:
    """Tell if one side of a contradiction is there: NAME differs from its default, or NAME=VALUE is its value."""
    name, equals, text = side.partition("=")
    parameter = declaration.parameters[name]
    return values[name] == parameter.check(Text(text)) if equals else values[name] != parameter.default


def describe(side: str, values: Mapping[str, object]) -> str:
    """Show the received value of one side of a contradiction."""
    name = side.partition("=")[0]
    return f"{name} = {shown(values[name])}"


def usable(name: str) -> bool:
    """Tell if a name may be a parameter: an ASCII identifier, no keyword, no underscore in front."""
    return bool(NAME.fullmatch(name)) and not keyword.iskeyword(name)


def is_secret(name: str) -> bool:
    """Tell if a name reads like a credential; plurals as in max_new_tokens are counts, not secrets.

    >>> [is_secret(name) for name in ("hf_token", "api_key", "max_new_tokens", "keys")]
    [True, True, False, False]
    """
    return bool(SECRET.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean X?)` for the closest known name, or nothing."""
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def shown(value: object) -> str:
    """Show a received value shortly and on one line, whatever it is."""
    text = repr(str(value)) if isinstance(value, Text) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def reason(error: Exception) -> str:
    """Say in one line why pydantic refused a value."""
    if not isinstance(error, ValidationError):
        return str(error)
    found = {item["msg"][0].lower() + item["msg"][1:] for item in error.errors(include_url=False)}
    return "; or ".join(sorted(found))
