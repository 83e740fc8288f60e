"""The places that name dependencies agree: pyproject.toml, environment.yml, both locks and the imports themselves."""

import ast
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCKS = ("requirements.lock", "requirements-reasoning-gym.lock")

CONDA_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
"""conda-forge's name of a package -> the name on PyPI, where they differ."""

CONDA_ONLY = {"python", "pip", "pycosat"}
"""pip and Python are no requirements on PyPI; pycosat is there ready built, for reasoning-gym."""

IMPORT_NAMES = {"yaml": "pyyaml", "antlr4": "antlr4-python3-runtime", "IPython": "ipykernel", "traitlets": "ipywidgets"}
"""Import name -> a declared package that brings it, where it is not the name itself."""

BROUGHT = {
    "pil": "matplotlib",
    "jupyter-client": "nbclient",
    "tokenizers": "transformers",
    "rich": "typer",
    "click": "typer",
}
"""Imported package -> the declared one whose own requirement it is."""


def requirements(lines: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r for r in parsed}


def declared(*extras: str) -> dict[str, Requirement]:
    lines = list(PROJECT["dependencies"])
    for extra in extras or PROJECT["optional-dependencies"]:
        lines += PROJECT["optional-dependencies"][extra]
    return requirements(lines)


def locked(name: str) -> dict[str, Requirement]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return requirements([line for line in lines if line and not line.startswith("#")])


def conda() -> dict[str, Requirement]:
    listed = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    names = [line for line in listed if isinstance(line, str)]
    (pip,) = [entry["pip"] for entry in listed if isinstance(entry, dict)]
    names += [line for line in pip if not line.startswith("--")]
    renamed = [re.sub(r"^[\w.-]+", lambda m: CONDA_NAMES.get(m[0], m[0]), line) for line in names]
    return requirements(renamed)


def test_environment_yml_and_pyproject_name_the_same_packages_and_bounds():
    pip_side = {name: str(r.specifier) for name, r in declared().items()}
    conda_side = {name: str(r.specifier) for name, r in conda().items() if name not in CONDA_ONLY}
    assert conda_side == pip_side
    assert str(conda()["python"].specifier) == PROJECT["requires-python"]


@pytest.mark.parametrize(("lock", "extra"), [(LOCKS[0], "dev"), (LOCKS[1], "reasoning-gym")])
def test_the_locks_hold_every_declared_package_within_its_bounds(lock: str, extra: str):
    pins = {name: re.sub("^==", "", str(r.specifier)) for name, r in locked(lock).items()}
    wanted = declared("dev") if extra == "dev" else requirements(PROJECT["optional-dependencies"][extra])
    assert set(wanted) <= set(pins)
    outside = [f"{r} but {pins[name]}" for name, r in wanted.items() if not r.specifier.contains(pins[name])]
    assert outside == []


def test_locks_are_exact_portable_and_disjoint():
    pins = {lock: locked(lock) for lock in LOCKS}
    assert set(pins[LOCKS[0]]).isdisjoint(pins[LOCKS[1]])
    for requirement in (r for lock in LOCKS for r in pins[lock].values()):
        text = str(requirement.specifier)
        assert text.startswith("=="), requirement
        assert Version(text[2:]).local is None, f"{requirement}: a build suffix exists on one machine only"
        assert not requirement.name.startswith(("nvidia", "cuda", "triton")), requirement


def test_every_bound_says_why():
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    bounds = [line for line in lines if re.match(r'\s*"[\w-]+[=<>~]=?', line) and line.rstrip()[-1] != "]"]
    assert len(bounds) >= len(declared())
    assert [line for line in bounds if "#" not in line] == []


def imported(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    own = {"workbench", "bench", "tests", "conftest"} | {file.stem for file in folder.rglob("*.py")}
    return {IMPORT_NAMES.get(name, name) for name in names - set(sys.stdlib_module_names) - own}


@pytest.mark.parametrize("folder", ["workbench", "tests", "bench"])
def test_what_is_imported_is_declared(folder: str):
    extras = ("reasoning-gym",) if folder == "workbench" else ("reasoning-gym", "dev")
    places = ("harnesses", "site")  # what has an environment of its own is imported only there
    beside = "".join((ROOT / f"requirements-outside-{place}.lock").read_text(encoding="utf-8") for place in places)
    names = {canonicalize_name(name) for name in imported(ROOT / folder)}
    names -= {name for name in ("lm-eval", "docutils") if f"{name.replace('-', '_')}==" in beside}
    assert {name for name in names if BROUGHT.get(name, name) not in declared(*extras)} == set()


def test_the_licence_and_the_version_agree_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def make(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path or "/usr/bin:/bin"}
    return subprocess.run(
        ["/usr/bin/env", "make", "-C", str(ROOT), *arguments],
        capture_output=True, text=True, check=False, env=environment, timeout=120,
    )  # fmt: skip


def fake_python(folder: Path, body: str) -> Path:
    file = folder / "python3"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    return file


def test_make_alone_lists_every_documented_command():
    listed = make().stdout
    for command in ("run", "test", "lab", "lab-model", "bench", "doctor", "lint", "types", "clean"):
        assert re.search(rf"^  {command} +\S", listed, flags=re.MULTILINE), command


def test_an_old_python_is_refused_in_words(tmp_path: Path):
    old = fake_python(tmp_path, 'test "$1" = --version && echo "Python 3.9.6" && exit 0; exit 1')
    done = make("venv", f"VENV={tmp_path / 'env'}", f"PYTHON={old}")
    assert done.returncode != 0
    assert "'Python 3.9.6'; the workbench needs Python 3.11 to 3.14." in done.stdout
    assert not (tmp_path / "env").exists()


def test_no_python_at_all_is_refused_in_words(tmp_path: Path):
    done = make("venv", f"VENV={tmp_path / 'env'}", "PYTHON=")
    assert done.returncode != 0
    assert "No Python 3.11 to 3.14 found" in done.stdout
    assert "make PYTHON=" in done.stdout


def test_debian_without_venv_is_told_the_package(tmp_path: Path):
    body = f'case "$2" in "import ensurepip, venv") exit 1;; esac; exec "{sys.executable}" "$@"'
    done = make("venv", f"VENV={tmp_path / 'env'}", f"PYTHON={fake_python(tmp_path, body)}")
    assert done.returncode != 0
    assert "sudo apt install python{}.{}-venv".format(*sys.version_info) in done.stdout


def test_an_interrupted_environment_is_made_again_and_a_whole_one_is_kept(tmp_path: Path):
    environment = tmp_path / "env"
    venv.create(environment, with_pip=False)  # what an interrupted `python -m venv` leaves
    first = make("venv", f"VENV={environment}", f"PYTHON={sys.executable}")
    assert first.returncode == 0, first.stdout + first.stderr
    (pip,) = environment.glob("lib/python*/site-packages/pip-*.dist-info")
    again = make("venv", f"VENV={environment}", f"PYTHON={sys.executable}")
    assert (again.returncode, "Making" in again.stdout) == (0, False)
    assert pip.exists()


def test_a_package_that_was_cut_off_half_way_is_installed_anew(tmp_path: Path):
    environment = tmp_path / "env"
    venv.create(environment, system_site_packages=True)
    (packages,) = environment.glob("lib/python*/site-packages")
    whole, half = packages / "whole-1.0.dist-info", packages / "half-1.0.dist-info"
    for info in (whole, half):
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: x\nVersion: 1.0\n")
    (whole / "INSTALLER").write_text("pip\n")
    assert make("venv", f"VENV={environment}").returncode == 0
    assert (whole.exists(), half.exists()) == (True, False)


def test_the_environment_is_made_anew_when_a_lock_is_newer_than_the_stamp(tmp_path: Path):
    stamp = tmp_path / ".installed"
    stamp.touch()
    fresh = ("-n", "environment", f"VENV={tmp_path}")
    assert "pip" not in make(*fresh, *(f"--old-file={lock}" for lock in LOCKS)).stdout
    for lock in LOCKS:
        assert re.search(rf"{lock}.* install |install .*{lock}", make(*fresh, f"--what-if={lock}").stdout)
    stamp.unlink()
    assert "-r requirements.lock" in make(*fresh).stdout


def test_every_recipe_edit_and_score_is_in_the_readme_with_its_paper():
    """One table names them all; a paper that the code follows is one that the table names."""
    from workbench.synthesis import edits, programs, questions, recipes, roles, scores

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = [line for line in readme.splitlines() if line.startswith("| ")]
    functions = [
        getattr(module, name) for module in (recipes, roles, questions, programs, edits) for name in module.__all__
    ]
    functions += [scores.easy, scores.middling, scores.with_solve_rate, scores.diverse, scores.probed]
    for function in functions:
        lines = [line for line in table if f"`{function.__name__}`" in line]
        assert len(lines) == 1, f"{function.__name__} is in {len(lines)} lines of the table"
        named = set(re.findall(r"\d{4}\.\d{5}", lines[0]))
        told = set(re.findall(r"\d{4}\.\d{5}", f"{function.__doc__} {sys.modules[function.__module__].__doc__}"))
        assert named <= told, f"{function.__name__}: the table names {named - told}, its docstring does not"
