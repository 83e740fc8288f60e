"""Parameter values as they arrive: text from a command line or YAML, read by the declared type and never guessed.

YAML is parsed for its structure only; its plain scalars stay text, because YAML's own rules turn `1e-4` into a string,
`0012` into ten and `no` into false. Quoted scalars and Python strings stay strings where the type admits a string.
"""

import json
import math
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml


class ParameterError(ValueError):
    """A parameter was refused before any work began."""


class Text(str):
    """A value that was typed without quotes: what it means depends on the declared type."""

    __slots__ = ()

    def __repr__(self) -> str:
        """Show that this is not a string that somebody chose."""
        return f"Text({str(self)!r})"


NONE_WORDS = ("none", "null", "~", "")
DEEPEST = 20
OPENING = (
    yaml.FlowSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.BlockMappingStartToken,
)
CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def from_text(value: object, kind: Any) -> object:
    """Return `value` with its texts turned into what the declared type expects; pydantic judges the result.

    >>> from_text(Text("1e-4"), float), from_text(Text("12e4"), str), from_text(Text("0,2"), list[int])
    (0.0001, '12e4', [0, 2])
    """
    options = members(kind)
    if isinstance(value, list):
        inner = next((get_args(option)[0] for option in options if get_origin(option) is list), None)
        return [from_text(item, inner) if inner else item for item in value]
    if isinstance(value, dict):
        inner = next((get_args(option)[1] for option in options if get_origin(option) is dict), None)
        return {name: from_text(item, inner) if inner else item for name, item in value.items()}
    if not isinstance(value, str):
        return value
    if any(str(value) in get_args(option) for option in options if get_origin(option) is Literal):
        return str(value)
    if not isinstance(value, Text) and str in options:
        return value
    return as_number(value, options)


def members(kind: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, or the type alone; Annotated is looked through."""
    if get_origin(kind) is Annotated:
        return members(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return tuple(member for part in get_args(kind) for member in members(part))
    return (NoneType if kind is None else kind,)


def as_number(value: str, options: tuple[Any, ...]) -> object:
    """Read text as the first alternative that fits: None, bool, int, float, a list or dict, a literal, then text."""
    text = value.strip()
    if type(None) in options and text.lower() in NONE_WORDS:
        return None
    choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
    wanted = {option for option in options if option in (bool, int, float)} | {type(choice) for choice in choices}
    if bool in wanted and text.lower() in BOOLS:
        return BOOLS[text.lower()]
    for number in (int, float):
        if number in wanted:
            try:
                return number(text)
            except ValueError:
                continue
    if any(get_origin(option) in (list, dict) for option in options):
        found = from_yaml_flow(text)
        if str not in options or isinstance(found, list | dict):
            for option in options:
                if isinstance(found, get_origin(option) or ()):
                    return from_text(found, option)
    return str(value)


def from_yaml_flow(text: str) -> object:
    """Read `[0, 2]`, `0,2` or `{a: 1}`; a single word becomes a list of one."""
    if text.startswith(("[", "{")):
        return read_node(compose(text, "the value"), "the value")
    return [Text(item.strip()) for item in text.split(",") if item.strip()]


def read_yaml(path: Path) -> dict[str, object]:
    """Read a YAML (or JSON) file of NAME: VALUE; values without quotes stay Text until a declared type reads them."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ParameterError(f"the parameters file {path} cannot be read: {error}.") from None
    node = compose(text, str(path))
    found = read_node(node, str(path)) if node else {}
    if not isinstance(found, dict):
        raise ParameterError(f"{path} must hold lines NAME: VALUE, got a {type(found).__name__}.")
    return found


def compose(text: str, where: str) -> yaml.Node | None:
    """Parse YAML into nodes. Aliases are refused (a few of them can stand for gigabytes)."""
    try:
        depth = 0
        for item in yaml.scan(text, Loader=yaml.SafeLoader):
            if isinstance(item, yaml.AliasToken):
                raise ParameterError(f"{where} uses YAML aliases (*name): write the value out.")
            depth += isinstance(item, OPENING) - isinstance(item, CLOSING)
            if depth > DEEPEST:
                raise ParameterError(f"{where} is nested more than {DEEPEST} deep, which no parameter is.")
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ParameterError(f"{where} is not YAML: {' '.join(str(error).split())}.") from None


def read_node(node: yaml.Node | None, where: str) -> object:
    """Turn a YAML node into lists, dictionaries, strings (quoted) and Text (not quoted)."""
    if node is None:
        return Text("")
    if not str(node.tag).startswith("tag:yaml.org,2002:") or str(node.tag).startswith("tag:yaml.org,2002:python"):
        raise ParameterError(f"{where} uses the YAML tag {node.tag}: only plain values are read.")
    if isinstance(node, yaml.SequenceNode):
        return [read_node(item, where) for item in node.value]
    if isinstance(node, yaml.ScalarNode):
        return Text(node.value) if node.style is None else str(node.value)
    found: dict[str, object] = {}
    for name_node, value_node in node.value:
        name = read_node(name_node, where)
        if not isinstance(name, str) or name in found:
            raise ParameterError(f"{where}: {name!r} is no name or is given twice.")
        found[str(name)] = read_node(value_node, where)
    return found


def plain(value: object) -> str | None:
    """Return why a value is not JSON data, or None if it is."""
    if value is None or type(value) in (str, bool, int):
        return (
            "it holds characters that no file can (lone surrogates)" if isinstance(value, str) and torn(value) else None
        )
    if type(value) is float:
        return None if math.isfinite(value) else f"{value} is not a finite number"
    if type(value) is list:
        return next((problem for item in value if (problem := plain(item))), None)
    if type(value) is dict:
        return next((problem for pair in value.items() for item in pair if (problem := plain(item))), None)
    return f"{type(value).__name__} is not plain data (text, number, true or false, null, list, dict)"


def torn(text: str) -> bool:
    """Tell if text cannot be stored as UTF-8."""
    try:
        json.dumps(text, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
