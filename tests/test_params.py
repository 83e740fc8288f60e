"""Parameters mean the same from the command line, from YAML and from Python, and everything else is refused."""

import json
from pathlib import Path

import pytest
import yaml

from tests.faults.small import write_notebook
from workbench.runs import params
from workbench.runs.params import ParameterError
from workbench.runs.values import Text

CELL = """from typing import Annotated, Literal
from pydantic import Field
"A line of text is allowed."
model: str = "lab"  # a comment too
n: Annotated[int, Field(ge=1, le=100_000)] = 200
learning_rate: float = 2e-4
quantization: Literal["none", "nf4", "auto"] = "auto"
layers: list[int] | None = None
flag: bool = False
revision: str | None = None
weights: dict[str, float] = {"a": 1.0}
either: int | str = 3
max_new_tokens: int = 256
out: str = "outputs/interactive"
"""


@pytest.fixture
def declaration(tmp_path: Path) -> params.Declaration:
    return params.read_parameters(write_notebook(tmp_path / "nb.ipynb", [], CELL))


def three_ways(declaration: params.Declaration, folder: Path, name: str, text: str, value: object) -> list[object]:
    """Give one value by command line, YAML and Python; return what each became (or the error's type)."""
    file = folder / "given.yaml"
    file.write_text(f"{name}: {text}\n", encoding="utf-8")
    found = []
    for given in (params.parse_assignments([f"{name}={text}"]), params.gather((), file), {name: value}):
        try:
            found.append(params.check(declaration, given)[name])
        except ParameterError:
            found.append(ParameterError)
    return found


@pytest.mark.parametrize(
    ("name", "text", "value", "expected"),
    [
        ("learning_rate", "1e-4", 1e-4, 1e-4),
        ("learning_rate", "1", 1, 1.0),
        ("learning_rate", "true", True, ParameterError),
        ("learning_rate", ".inf", float("inf"), ParameterError),
        ("learning_rate", "nan", float("nan"), ParameterError),
        ("revision", "12e4", "12e4", "12e4"),
        ("revision", "0012345", "0012345", "0012345"),
        ("revision", "null", None, None),
        ("revision", "2024-01-01", "2024-01-01", "2024-01-01"),
        ("n", "100_000", 100_000, 100_000),
        ("n", "0", 0, ParameterError),
        ("n", "5.0", 5.0, ParameterError),
        ("n", "1e3", 1e3, ParameterError),
        ("n", "true", True, ParameterError),
        ("n", "[5]", [5], ParameterError),
        ("flag", "true", True, True),
        ("flag", "No", False, False),
        ("flag", "1", 1, ParameterError),
        ("quantization", "none", "none", "none"),
        ("quantization", "nf8", "nf8", ParameterError),
        ("quantization", "null", None, ParameterError),
        ("layers", "[0, 2]", [0, 2], [0, 2]),
        ("layers", "[]", [], []),
        ("layers", "none", None, None),
        ("layers", "[0, a]", [0, "a"], ParameterError),
        ("layers", "[1.5]", [1.5], ParameterError),
        ("weights", "{a: 1e-3, b: 2}", {"a": 1e-3, "b": 2}, {"a": 1e-3, "b": 2.0}),
        ("either", "7", 7, 7),
        ("either", "seven", "seven", "seven"),
        ("model", "no", "no", "no"),
        ("model", "", "", ""),
    ],
)
def test_three_sources_agree(
    declaration: params.Declaration, tmp_path: Path, name: str, text: str, value: object, expected: object
) -> None:
    found = three_ways(declaration, tmp_path, name, text, value)
    assert found == [expected] * 3
    assert [type(item) for item in found] == [type(expected)] * 3


def test_quoting_in_yaml_is_a_python_string(declaration: params.Declaration, tmp_path: Path) -> None:
    file = tmp_path / "given.yaml"
    file.write_text('revision: "null"\neither: "7"\nlearning_rate: "1e-4"\n', encoding="utf-8")
    found = params.check(declaration, params.gather((), file))
    assert (found["revision"], found["either"], found["learning_rate"]) == ("null", "7", 1e-4)
    assert found == params.check(declaration, {"revision": "null", "either": "7", "learning_rate": "1e-4"})


def test_values_are_json_and_default_where_not_given(declaration: params.Declaration) -> None:
    found = params.check(declaration, {"n": 5})
    assert json.loads(json.dumps(found)) == found
    assert {**found, "n": 200} == declaration.defaults


def test_the_command_line_wins_over_the_file(declaration: params.Declaration, tmp_path: Path) -> None:
    file = tmp_path / "given.yaml"
    file.write_text("n: 5\nflag: yes\n", encoding="utf-8")
    found = params.check(declaration, params.gather(["n=6"], file))
    assert (found["n"], found["flag"]) == (6, True)


@pytest.mark.parametrize("name", ["learning_rat", "Learning_Rate", "lerning_rate"])
def test_a_wrong_name_gets_the_nearest_right_one(declaration: params.Declaration, name: str) -> None:
    with pytest.raises(ParameterError, match="did you mean learning_rate"):
        params.check(declaration, {name: 1.0})


def test_a_slip_in_a_count_of_tokens_is_no_secret(declaration: params.Declaration) -> None:
    with pytest.raises(ParameterError, match="did you mean max_new_tokens"):
        params.check(declaration, {"max_new_token": 5})


@pytest.mark.parametrize(
    "name",
    [
        "n=1\nimport os\nos.system('true')\nm",
        "n;import os",
        "__class__",
        "_n",
        "class",
        "n ",
        "n\u00e9",
        "\uff4e",  # a full-width n, which Python would normalise to n
        "",
        "a" * 10_000,
        "model.x",
        "f(x)",
        "lambda",
        5,
        None,
    ],
)
def test_hostile_names_are_refused_before_any_use(declaration: params.Declaration, name: object) -> None:
    for given in ({name: 1}, {name: "x", "n": 2}):
        with pytest.raises(ParameterError) as caught:
            params.check(declaration, given)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "name", ["token", "hf_token", "HF_TOKEN", "hftoken", "api_key", "apikey", "secret", "hfToken", "password"]
)
def test_secrets_are_refused_without_repeating_their_value(declaration: params.Declaration, name: str) -> None:
    with pytest.raises(ParameterError, match="secret") as caught:
        params.check(declaration, {name: "planted-value"})
    assert "planted-value" not in str(caught.value)


def test_a_value_that_is_an_access_token_is_refused_without_repeating_it(declaration: params.Declaration) -> None:
    planted = "hf_" + "a1B2" * 8
    with pytest.raises(ParameterError, match="access token") as caught:
        params.check(declaration, {"model": planted})
    assert planted not in str(caught.value)


def test_a_notebook_may_not_declare_a_secret(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="looks like a secret"):
        params.read_parameters(write_notebook(tmp_path / "nb.ipynb", [], 'api_key: str = ""'))
    number = write_notebook(tmp_path / "number.ipynb", [], "stop_token: int = 3")
    assert params.read_parameters(number).defaults == {"stop_token": 3}


class Sly(str):
    """A string whose representation is a statement, as a parameter printed raw would be."""

    def __repr__(self) -> str:
        return "x'); import os; ('"


@pytest.mark.parametrize("value", [(1, 2), {1}, b"x", object(), 1j, {"a": {1}}, Path("x"), "\ud800"])
def test_values_that_are_no_json_are_refused(declaration: params.Declaration, value: object) -> None:
    for name in ("model", "layers", "either"):
        with pytest.raises(ParameterError):
            params.check(declaration, {name: value})


def test_numbers_of_other_libraries_are_refused_or_become_plain(declaration: params.Declaration) -> None:
    numpy = pytest.importorskip("numpy", reason="NumPy is not installed")
    with pytest.raises(ParameterError):
        params.check(declaration, {"n": numpy.int64(5)})
    with pytest.raises(ParameterError):
        params.check(declaration, {"flag": numpy.bool_(True)})


def test_hostile_strings_arrive_as_they_are_and_as_plain_strings(declaration: params.Declaration) -> None:
    for value in ("'); import os; ('", '"""\nimport os\n"""', "\\", "{0}", "%s", "\x00\u2028", Sly("payload")):
        found = params.check(declaration, {"model": value})["model"]
        assert found == str(value)
        assert type(found) is str


@pytest.mark.parametrize(
    "text",
    [
        "n: !!python/object/apply:os.system ['true']",
        "n: !!python/name:os.system",
        "a: &a [1]\nlayers: *a",
        "- 1",
        "n: 1\nn: 2",
        "n: [",
        "{[1]: 2}",
        "[" * 5000,
    ],
)
def test_yaml_beyond_plain_values_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "given.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ParameterError):
        params.gather((), file)


def test_plain_yaml_agrees_with_the_reference_reader_where_that_one_is_right(tmp_path: Path) -> None:
    text = "a: hello\nb: [x, y]\nc: {d: e}\nf: 'quoted'\n"
    file = tmp_path / "given.yaml"
    file.write_text(text, encoding="utf-8")
    assert params.gather((), file) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("cell", "problem"),
    [
        ("n = 5", "typed"),
        ("n: int = f()", "plain value"),
        ("import os; os.system('true')", "typed"),
        ("n: int = __import__('os').system('true')", "plain value"),
        ("for i in range(3): pass", "typed"),
        ("n: int = 'five'", "breaks its own declaration"),
        ("n: Annotated[int, Field(ge=10)] = 5", "breaks its own declaration"),
        ("n: Annotated[int, Field(default_factory=print)] = 5", "not known"),
        ("n: Annotated[int, print('x')] = 5", "bounds are written"),
        ("n: Annotated[int, Field(pattern='x')] = 5", "cannot be|Unable to apply|pattern"),
        ("n: Path = 'x'", "is not known"),
        ("n: set[int] = [1]", "is not known"),
        ("n: int = 1\nn: int = 2", "twice"),
        ("n: int", "typed"),
        ("x.n: int = 1", "typed"),
        ("n: int = (", "not Python"),
        ("_n: int = 1", "plain words"),
        ("n: float = 1e999", "finite"),
    ],
)
def test_a_cell_that_holds_more_than_typed_values_is_refused(tmp_path: Path, cell: str, problem: str) -> None:
    with pytest.raises(ParameterError, match=problem):
        params.read_parameters(write_notebook(tmp_path / "nb.ipynb", [], cell))


def test_optional_and_nested_forms_are_read(tmp_path: Path) -> None:
    cell = (
        "a: Optional[int] = None\nb: Union[int, float] = 1.5\nc: List[Literal['x', 'y']] = ['x']\nd: 'int' = 3\n"
        "e: Annotated[int, Field(gt=0)] | None = None\nf: typing.Literal[1, 2] = 1\ng: list[list[float]] = [[1]]\n"
    )
    declaration = params.read_parameters(write_notebook(tmp_path / "nb.ipynb", [], cell))
    given = params.parse_assignments(["a=4", "b=2", "c=x,y", "e=none", "f=2", "g=[[1e-3, 2], []]"])
    found = params.check(declaration, given)
    assert found == {"a": 4, "b": 2, "c": ["x", "y"], "d": 3, "e": None, "f": 2, "g": [[1e-3, 2.0], []]}
    with pytest.raises(ParameterError, match="greater than 0"):
        params.check(declaration, {"e": 0})
    with pytest.raises(ParameterError):
        params.check(declaration, params.parse_assignments(["c=x,z"]))


def test_contradictions_name_both_sides(tmp_path: Path) -> None:
    pairs = [["layers", "flag"], ["quantization=nf4", "flag=true"]]
    declaration = params.read_parameters(write_notebook(tmp_path / "nb.ipynb", [], CELL, conflicts=pairs))
    assert params.check(declaration, {"layers": [1]})["layers"] == [1]
    with pytest.raises(ParameterError, match="layers and flag contradict"):
        params.check(declaration, {"layers": [1], "flag": True})
    with pytest.raises(ParameterError, match="quantization=nf4 and flag=true"):
        params.check(declaration, {"quantization": "nf4", "flag": True})
    with pytest.raises(ParameterError, match="does not declare"):
        params.read_parameters(write_notebook(tmp_path / "bad.ipynb", [], CELL, conflicts=[["layerz", "n"]]))


def test_parameters_go_to_the_notebooks_that_declare_them(tmp_path: Path) -> None:
    one = params.read_parameters(write_notebook(tmp_path / "one.ipynb", [], "n: int = 1\na: int = 1"))
    two = params.read_parameters(
        write_notebook(tmp_path / "two.ipynb", [], "n: Annotated[int, Field(le=9)] = 1\nb: int = 1")
    )
    both = {"one": one, "two": two}
    assert params.assign(both, {"n": Text("5"), "a": 2}) == {"one": {"n": 5, "a": 2}, "two": {"n": 5, "b": 1}}
    with pytest.raises(ParameterError, match="less than or equal to 9"):
        params.assign(both, {"n": 10})
    with pytest.raises(ParameterError, match="one, two has no parameter c"):
        params.assign(both, {"c": 10})
    with pytest.raises(ParameterError, match="--out"):
        params.assign(both, {"out": "x"})


def test_a_notebook_without_the_cell_declares_nothing_and_a_torn_one_is_named(tmp_path: Path) -> None:
    assert params.read_parameters(write_notebook(tmp_path / "nb.ipynb", ["x = 1"], None)).parameters == {}
    torn = tmp_path / "torn.ipynb"
    torn.write_text('{"cells": [', encoding="utf-8")
    with pytest.raises(ParameterError, match=r"torn\.ipynb is not a readable notebook"):
        params.read_parameters(torn)
