"""Each check of `doctor` meets the bad condition it is there for, made for real."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.folders import reachable
from workbench import doctor
from workbench.models import choose_device, choose_dtype
from workbench.sandbox import isolation


def test_an_old_python_fails_and_this_one_passes():
    assert doctor.python((3, 10)).status == "FAIL"
    assert "3.11 or newer" in doctor.python((3, 10)).reason
    assert doctor.python().status == "OK"


@pytest.mark.parametrize(
    ("requirement", "words"),
    [("pytest>=1000", "pytest is"), ("no-such-package-here>=2", "no-such-package-here is absent (>=2 needed)")],
)
def test_packages_outside_their_bounds_are_named(requirement: str, words: str):
    check = doctor.packages(["numpy>=1", requirement])
    assert check.status == "FAIL"
    assert words in check.reason
    assert check.next_command


def test_packages_of_extras_are_not_asked_for():
    assert doctor.packages(["numpy>=1", "no-such-package-here; extra == 'gpu'"]).status == "OK"


@pytest.mark.parametrize(
    ("hidden", "line"),
    [("reasoning_gym", "its tasks are not available"), ("pycosat", "zebra_puzzles can't be made, all else can")],
)
def test_an_absent_extra_is_optional(hidden: str, line: str):
    program = f"import sys; sys.modules[{hidden!r}] = None; from workbench import doctor; print(doctor.extras())"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.startswith("OPTIONAL")
    assert line in found
    assert "next: make reasoning-gym" in found


@pytest.mark.skipif(find_spec("pycosat") is None, reason="pycosat is not installed (make reasoning-gym)")
def test_a_present_extra_is_ok():
    assert doctor.extras().status == "OK"


def test_the_device_is_the_one_a_model_is_loaded_on():
    place, reason = choose_device(None)
    check = doctor.device(driver="no-such-driver-here")
    assert check.status == "OK"
    assert check.reason == f"{reason}; {choose_dtype(None, place)[1]}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine on which torch finds no GPU")
def test_a_driver_without_a_usable_gpu_is_said():
    check = doctor.device(driver="sh")
    assert check.status == "OPTIONAL"
    assert torch.__version__ in check.reason


def test_nf4_agrees_with_its_dequantised_weight_and_a_tighter_limit_than_possible_fails():
    assert doctor.four_bit().status == "OK", doctor.four_bit().reason
    assert doctor.four_bit(tolerance=-1.0).status == "FAIL"


def test_a_nan_from_the_4_bit_layer_is_a_fault():
    assert doctor.four_bit(lambda: {"training": float("nan")}).status == "FAIL"


def kernel_spec(folder: Path, name: str, command: str) -> None:
    spec = folder / "kernels" / name
    spec.mkdir(parents=True)
    argv = [command, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": name, "language": "python"}))


def test_kernels_that_are_absent_broken_or_elsewhere_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    kernel_spec(tmp_path, "broken", str(tmp_path / "gone" / "python"))
    kernel_spec(tmp_path, "here", sys.executable)
    kernel_spec(tmp_path, "bare", "python")
    assert "no kernel named absent" in doctor.kernel("absent").reason
    assert "does not start" in doctor.kernel("broken").reason
    assert "outside this environment" in doctor.kernel("here", prefix=str(tmp_path)).reason
    assert {doctor.kernel(n).status for n in ("absent", "broken")} == {"FAIL"}
    assert {doctor.kernel(n).status for n in ("here", "bare")} == {"OK"}


def test_a_full_disk_fails(tmp_path: Path):
    assert doctor.disk(tmp_path, least_gb=1e9).status == "FAIL"
    assert doctor.disk(tmp_path, least_gb=0.0).status == "OK"


def program(folder: Path, body: str) -> str:
    folder = Path(tempfile.mkdtemp(prefix=folder.name, dir=folder))
    file = folder / "bwrap"
    file.write_text(f"#!/bin/sh\n{body}\n")
    file.chmod(0o755)
    reachable(file.parent)
    return str(file)


def test_a_sandbox_that_is_absent_or_cannot_start_is_optional(tmp_path: Path):
    refused = doctor.sandbox(program(tmp_path, "echo 'No permissions to create new namespace' >&2; exit 1"))
    assert refused.status == "OPTIONAL"
    assert "No permissions to create new namespace" in refused.reason
    assert refused.next_command
    absent = doctor.sandbox("no-such-program-here")
    assert absent.status == "OPTIONAL"
    assert "no 'no-such-program-here' on the PATH" in absent.reason
    assert "apt install bubblewrap" in absent.next_command


@pytest.mark.parametrize("body", ["exit 0", 'while [ "$1" != -- ]; do shift; done; shift; exec "$@"'])
def test_a_sandbox_that_lets_everything_through_is_no_sandbox(tmp_path: Path, body: str):
    found = doctor.sandbox(program(tmp_path, body))
    assert found.status == "OPTIONAL"
    assert "could not start" in found.reason


@pytest.mark.skipif(not isolation(), reason="bubblewrap is missing or can't start here (python -m workbench doctor)")
def test_a_sandbox_that_isolates_is_ok():
    assert doctor.sandbox().status == "OK"


def test_lab_weights_are_compared_with_their_card(tmp_path: Path):
    weights, card = tmp_path / "model.safetensors", tmp_path / "card.json"
    assert doctor.lab_model(tmp_path).next_command == "make lab-model"
    weights.write_bytes(b"weights")
    assert "card.json is absent" in doctor.lab_model(tmp_path).reason
    card.write_text("{}")
    assert "no sha256" in doctor.lab_model(tmp_path).reason
    card.write_text(json.dumps({"sha256": hashlib.sha256(b"weights").hexdigest()}))
    assert doctor.lab_model(tmp_path).status == "OK"
    weights.write_bytes(b"weight")
    assert "changed or cut short" in doctor.lab_model(tmp_path).reason


def test_the_data_folder_is_optional(tmp_path: Path):
    assert doctor.data_folder({}).status == "OK"
    assert doctor.data_folder({"WORKBENCH_DATA": str(tmp_path)}).status == "OK"
    assert doctor.data_folder({"WORKBENCH_DATA": str(tmp_path / "gone")}).status == "OPTIONAL"


def absent_library() -> doctor.Check:
    raise ImportError("libcudart.so.13: cannot open shared object file")


def test_the_exit_code_counts_failures_and_forgives_what_is_optional(capsys: pytest.CaptureFixture[str]):
    assert doctor.main([doctor.python, lambda: doctor.sandbox("no-such-program-here")]) == 0
    assert "Ready. 1 optional" in capsys.readouterr().out
    assert doctor.main([doctor.python, absent_library]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("OK")
    assert lines[1].startswith("FAIL      absent_library  ImportError: libcudart")
    assert "next:" in lines[2]
    assert lines[-1].startswith("1 of 2 checks failed")


def test_every_fault_comes_with_a_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("workbench.tasks.gym.has_solver", lambda: False)
    faults = [
        doctor.python((3, 10)),
        doctor.packages(["pytest>=1000"]),
        doctor.extras(),
        doctor.four_bit(tolerance=-1.0),
        doctor.kernel("absent"),
        doctor.disk(tmp_path, least_gb=1e9),
        doctor.sandbox("no-such-program-here"),
        doctor.lab_model(tmp_path),
        doctor.data_folder({"WORKBENCH_DATA": os.devnull}),
    ]
    assert [c.name for c in faults if c.status == "OK" or not c.next_command] == []
