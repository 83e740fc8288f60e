"""Say whether this machine can run the workbench, line by line, with the next command for each fault.

Every check does the thing it reports on (quantises, starts the kernel's interpreter, hashes the file) and returns a
`Check`; none changes anything. Not covered: speed and memory under load (`make bench`), and whether results are right
(`make test`). The OK / FAIL lines follow the environment checker of rasbt/LLMs-from-scratch in spirit.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
OLDEST_PYTHON = (3, 11)
LEAST_DISK_GB = 5.0  # one run's outputs with adapters and checkpoints of a 1B model; the lab model needs far less
NF4_TOLERANCE = 0.02  # relative; CPU kernels that multiply in bfloat16 (8 bits of mantissa) stay under 0.01


@dataclass(frozen=True)
class Check:
    """One line of the report. FAIL stops the workbench; OPTIONAL is a fault that only some uses meet.

    >>> print(Check("disk", "FAIL", "1.0 GB free, 5.0 needed", "du -sh outputs/*"))
    FAIL      disk            1.0 GB free, 5.0 needed
                              next: du -sh outputs/*
    """

    name: str
    status: Literal["OK", "FAIL", "OPTIONAL"]
    reason: str
    next_command: str = ""

    def __str__(self) -> str:
        line = f"{self.status:<9} {self.name:<15} {self.reason}"
        return f"{line}\n{'':<26}next: {self.next_command}" if self.next_command else line


def python(version: tuple[int, int] = sys.version_info[:2]) -> Check:
    """Compare the interpreter's `version` (major, minor) with the oldest that the dependencies accept."""
    found, needed = (".".join(map(str, v)) for v in (version, OLDEST_PYTHON))
    if version < OLDEST_PYTHON:
        return Check(
            "Python", "FAIL", f"{found} at {sys.executable}, {needed} or newer needed", "make clean-all && make"
        )
    return Check("Python", "OK", f"{found} at {sys.executable}")


def packages(requirements: Iterable[str] | None = None) -> Check:
    """Compare installed versions with `requirements` (default: the core ones in this package's own metadata)."""
    from packaging.requirements import Requirement

    if requirements is None:
        try:
            requirements = importlib.metadata.requires("workbench") or []
        except importlib.metadata.PackageNotFoundError:
            return Check("packages", "FAIL", "the workbench is not installed in this environment", "make environment")
    core = [r for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in core:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is absent ({requirement.specifier} needed)")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version} ({requirement.specifier} needed)")
    if wrong:
        return Check("packages", "FAIL", "; ".join(wrong), "rm -f .venv/.installed && make environment")
    torch_version = importlib.metadata.version("torch")
    return Check("packages", "OK", f"{len(core)} packages within their bounds, torch {torch_version}")


def extras() -> Check:
    """Whether reasoning-gym's tasks can be made, and the one whose solver a C compiler has to build."""
    from workbench.tasks import gym

    try:
        complete = gym.has_solver()
    except (ValueError, ImportError) as error:
        return Check("reasoning-gym", "OPTIONAL", f"its tasks are not available: {error}", "make reasoning-gym")
    if not complete:
        reason = "pycosat is not installed (it needs a C compiler): zebra_puzzles can't be made, all else can"
        return Check("reasoning-gym", "OPTIONAL", reason, "make reasoning-gym")
    return Check("reasoning-gym", "OK", f"{len(gym.names())} data sets")


def device(driver: str = "nvidia-smi") -> Check:
    """Name the device and dtype that `load_model` chooses, and why; a `driver` without a GPU for torch is a fault."""
    import torch

    from workbench.models import choose_device, choose_dtype

    place, reason = choose_device(None)
    reasons = f"{reason}; {choose_dtype(None, place)[1]}"
    if place.type == "cpu" and shutil.which(driver) is not None:
        cause = "is built without CUDA" if torch.version.cuda is None else "cannot reach the GPU"
        return Check("device", "OPTIONAL", f"{driver} is here, but torch {torch.__version__} {cause}", driver)
    return Check("device", "OK", reasons)


def nf4_errors(size: int = 128, *, seed: int = 0) -> dict[str, float]:
    """Relative errors of a 4-bit layer (`size` in, `size` out) against its own dequantised weight.

    Keys: `training` output, its input `gradient`, and `inference` output, which takes another kernel on some CPUs.
    The reference is the plain product with the weight that bitsandbytes itself gives back.
    """
    import torch

    from workbench.placement import without_kernel_advice

    without_kernel_advice()
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    place = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(seed)
    layer = Linear4bit(size, size, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight.data.copy_(torch.randn(size, size, generator=generator))
    layer = layer.to(place)  # moving is what quantises
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    x = torch.randn(16, size, generator=generator).to(place).requires_grad_()
    upstream = torch.randn(16, size, generator=generator).to(place)
    y = layer(x)
    y.backward(upstream)
    with torch.inference_mode():
        pairs = {
            "training": (y, x @ weight.T),
            "gradient": (torch.zeros_like(x) if x.grad is None else x.grad, upstream @ weight),
            "inference": (layer.eval()(x), x @ weight.T),
        }
        return {name: ((got - want).norm() / want.norm()).item() for name, (got, want) in pairs.items()}


def four_bit(measure: Callable[[], Mapping[str, float]] = nf4_errors, tolerance: float = NF4_TOLERANCE) -> Check:
    """Quantise a small layer to NF4 and compare outputs and gradient with the dequantised product."""
    errors = measure()
    numbers = "differs by " + ", ".join(f"{value:.0e} ({name})" for name, value in errors.items())
    if not all(value <= tolerance for value in errors.values()):  # written so that a NaN fails
        reason = f"{numbers} from the dequantised product, {tolerance:g} allowed"
        return Check("4-bit (NF4)", "FAIL", reason, "rm -f .venv/.installed && make environment")
    return Check("4-bit (NF4)", "OK", f"{numbers} from the dequantised product")


def kernel(name: str = "python3", prefix: str = sys.prefix) -> Check:
    """Start the interpreter of Jupyter kernel `name` and see that it lives in this environment (`prefix`)."""
    from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

    repair = f'"{sys.executable}" -m ipykernel install --sys-prefix --name {name}'
    try:
        command = KernelSpecManager().get_kernel_spec(name).argv[0]
    except NoSuchKernel:
        return Check("kernel", "FAIL", f"Jupyter has no kernel named {name}", repair)
    # jupyter_client itself replaces a bare "python" by the interpreter that starts the kernel.
    command = sys.executable if command in {"python", "python3"} else command
    try:
        started = subprocess.run(
            [command, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        return Check("kernel", "FAIL", f"{name} is {command}, which does not start ({error})", repair)
    if Path(started.stdout.strip()).resolve() != Path(prefix).resolve():
        return Check("kernel", "FAIL", f"{name} starts {command}, outside this environment ({prefix})", repair)
    return Check("kernel", "OK", f"{name} starts {command}")


def disk(folder: Path = ROOT, least_gb: float = LEAST_DISK_GB) -> Check:
    """Compare free space under `folder` with `least_gb` gigabytes (1e9 bytes)."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < least_gb:
        return Check(
            "disk", "FAIL", f"{free:.1f} GB free in {folder}, {least_gb:g} needed", f'du -sh "{folder}"/outputs/*'
        )
    return Check("disk", "OK", f"{free:.1f} GB free in {folder}")


def sandbox(program: str = "bwrap") -> Check:
    """Start a sandbox and look around in it: present is not enough, many container hosts forbid user namespaces."""
    from workbench.sandbox import jail

    found, fault = jail.probe(program)
    if found:
        return Check("sandbox", "OK", f"model-written code is isolated: {found}")
    reason, _, hint = fault.partition(" Next: ")
    return Check("sandbox", "OPTIONAL", f"{reason} Only tasks that run model-written code need it", hint or jail.HINT)


def lab_model(folder: Path = ROOT / "data" / "lab") -> Check:
    """Compare the SHA-256 of `folder`/model.safetensors with the one on its card, `folder`/card.json."""
    weights, card = folder / "model.safetensors", folder / "card.json"
    for file in (weights, card):
        if not file.is_file():
            return Check("lab model", "FAIL", f"{file} is absent", "make lab-model")
    try:
        expected = json.loads(card.read_text(encoding="utf-8"))["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        return Check("lab model", "FAIL", f"{card} gives no sha256 ({error!r})", f'git checkout -- "{card}"')
    with weights.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        reason = f"{weights} is {found[:12]}, its card says {str(expected)[:12]}: changed or cut short"
        return Check("lab model", "FAIL", reason, f'git checkout -- "{folder}"')
    return Check("lab model", "OK", f"{weights.stat().st_size / 1e6:.1f} MB, sha256 {found[:12]} as on its card")


def data_folder(environment: Mapping[str, str] = os.environ) -> Check:
    """Whether WORKBENCH_DATA names a folder of benchmark files; the lab tasks need none."""
    value = environment.get("WORKBENCH_DATA", "")
    if not value:
        return Check("WORKBENCH_DATA", "OK", "not set, and optional: the lab tasks need no files")
    if not Path(value).is_dir():
        return Check("WORKBENCH_DATA", "OPTIONAL", f"{value} is no folder", "unset WORKBENCH_DATA")
    return Check("WORKBENCH_DATA", "OK", f"{value} ({sum(1 for _ in Path(value).iterdir())} entries)")


CHECKS: tuple[Callable[[], Check], ...] = (
    python, packages, extras, device, four_bit, kernel, disk, sandbox, lab_model, data_folder,
)  # fmt: skip


def run_check(check: Callable[[], Check]) -> Check:
    """Run one check; anything it raises is itself the finding (a broken install raises from deep inside)."""
    try:
        return check()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        return Check(check.__name__, "FAIL", reason, "rm -f .venv/.installed && make environment")


def main(checks: Iterable[Callable[[], Check]] = CHECKS) -> int:
    """Print one line a check as it ends; return 0 when nothing needed is missing, else 1."""
    done = []
    for check in checks:
        done.append(run_check(check))
        print(done[-1], flush=True)
    faults = sum(c.status == "FAIL" for c in done)
    absent = sum(c.status == "OPTIONAL" for c in done)
    if faults:
        print(f"{faults} of {len(done)} checks failed: type the commands after 'next:', then doctor again.")
    else:
        print("Ready." + (f" {absent} optional part(s) absent." if absent else ""))
    return 1 if faults else 0
