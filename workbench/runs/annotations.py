"""Types written in a parameters cell, read from the syntax tree and never evaluated.

Understands str, int, float, bool, None, unions, Optional, Literal, list, dict with str keys, and
`Annotated[T, Field(ge=..., le=...)]` with pydantic's own bounds. Anything else is refused by name.
"""

import ast
from collections.abc import Iterator
from types import GenericAlias
from typing import Annotated, Any, Literal, Optional, Union, get_args, get_origin

from pydantic import Field, TypeAdapter

from workbench.runs.values import ParameterError, members

SIMPLE: dict[str, Any] = {"str": str, "int": int, "float": float, "bool": bool, "None": None}
BOUNDS = {"ge", "gt", "le", "lt", "multiple_of", "min_length", "max_length", "pattern", "description", "title"}
ALLOWED = (
    "str, int, float, bool, None, X | Y, Literal[...], list[X], dict[str, X], "
    "Annotated[X, Field(ge=..., gt=..., le=..., lt=..., multiple_of=..., min_length=..., max_length=..., pattern=...)]"
)
EXAMPLE = "write it like `n: int = 200`"


def read_annotation(source: str, where: str) -> Iterator[tuple[str, tuple[str, Any, ast.expr]]]:
    """Yield (name, (annotation as written, type, tree of the default)) for each line of a parameters cell."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError) as error:
        raise ParameterError(f"the parameters cell of {where} is not Python: {error}.") from None
    for line in body:
        text = (ast.get_source_segment(source, line) or "").splitlines()[0][:80]
        if isinstance(line, ast.Import | ast.ImportFrom):
            continue
        if isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str):
            continue
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name) or line.value is None:
            raise ParameterError(f"the parameters cell of {where} may hold only typed values; {EXAMPLE}, not `{text}`.")
        kind = annotation_type(line.annotation, where)
        yield line.target.id, (ast.unparse(line.annotation), kind, line.value)


def annotation_type(tree: ast.expr, where: str) -> Any:
    """Return the Python type that an annotation's syntax tree stands for, for pydantic to check with."""
    match tree:
        case ast.Constant(value=None):
            return None
        case ast.Constant(value=str() as quoted):
            return annotation_type(ast.parse(quoted, mode="eval").body, where)
        case ast.Name(id=name) if name in SIMPLE:
            return SIMPLE[name]
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Union[annotation_type(left, where), annotation_type(right, where)]  # noqa: UP007 - built at run time
        case ast.Subscript(value=head, slice=inner):
            return subscript_type(ast.unparse(head).rpartition(".")[2], parts(inner), tree, where)
    raise ParameterError(
        f"the type `{ast.unparse(tree)}` in the parameters cell of {where} is not known. Allowed: {ALLOWED}."
    )


def subscript_type(head: str, inner: list[ast.expr], tree: ast.expr, where: str) -> Any:
    """Return the type of `head[inner]`."""
    if head in ("list", "List") and len(inner) == 1:
        return GenericAlias(list, (annotation_type(inner[0], where),))
    if head in ("dict", "Dict") and len(inner) == 2 and ast.unparse(inner[0]) == "str":
        return GenericAlias(dict, (str, annotation_type(inner[1], where)))
    if head == "Optional" and len(inner) == 1:
        return Optional[annotation_type(inner[0], where)]  # noqa: UP045 - built at run time
    if head == "Union":
        return Union[tuple(annotation_type(item, where) for item in inner)]  # noqa: UP007 - built at run time
    if head == "Literal":
        return Literal[tuple(default_value(item, "Literal", where) for item in inner)]
    if head == "Annotated" and len(inner) == 2:
        kind: Any = Annotated[annotation_type(inner[0], where), bounds(inner[1], where)]
        try:
            TypeAdapter(kind)
        except (TypeError, ValueError) as error:
            raise ParameterError(f"`{ast.unparse(tree)}` in {where} cannot be checked: {error}.") from None
        return kind
    raise ParameterError(
        f"the type `{ast.unparse(tree)}` in the parameters cell of {where} is not known. Allowed: {ALLOWED}."
    )


def bounds(tree: ast.expr, where: str) -> Any:
    """Return pydantic's Field for a `Field(ge=..., ...)` written in an annotation."""
    if not isinstance(tree, ast.Call) or ast.unparse(tree.func).rpartition(".")[2] != "Field" or tree.args:
        raise ParameterError(f"`{ast.unparse(tree)}` in {where}: bounds are written as Field(ge=1, le=100).")
    limits = {item.arg or "**": item.value for item in tree.keywords}
    if unknown := set(limits) - BOUNDS:
        raise ParameterError(
            f"Field({sorted(unknown)[0]}=...) in {where} is not known. Allowed: {', '.join(sorted(BOUNDS))}."
        )
    return Field(**{name: default_value(value, name, where) for name, value in limits.items()})


def parts(tree: ast.expr) -> list[ast.expr]:
    """Return the comma-separated items between the brackets of a subscript."""
    return list(tree.elts) if isinstance(tree, ast.Tuple) else [tree]


def default_value(tree: ast.expr, name: str, where: str) -> Any:
    """Return the literal value of a syntax tree, or raise ParameterError."""
    try:
        return ast.literal_eval(tree)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        raise ParameterError(
            f"in the parameters cell of {where}, {name} = `{ast.unparse(tree)[:80]}` must be a plain value "
            "(text, number, true or false, None, list, dict): derive others in the next cell."
        ) from None


def admits_text(kind: Any) -> bool:
    """Tell if a value of this type may hold free text."""
    inside = [part for member in members(kind) for part in get_args(member) if get_origin(member) in (list, dict)]
    return str in members(kind) or any(admits_text(part) for part in inside[-1:])
