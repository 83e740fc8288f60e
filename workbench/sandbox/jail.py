"""The walls around model-written Python: a bubblewrap command line, a system call filter, and a probe that they hold.

Inside there are: the base interpreter and the system's shared libraries, read-only; a temporary folder of limited size;
three harmless devices. There are no /proc, home, project, network, other processes, capabilities or environment.
bubblewrap makes the namespaces and drops everything; the filter (seccomp) refuses what a namespace doesn't separate:
keyrings, tracing, sockets but local ones, memory outside of any limit, new namespaces. Where a part is missing nothing
runs at all (`SandboxError`). Limits on time and output are in `supervise`, limits that a process carries in `inside`.

Does not cover: holes in the kernel itself; a virtual machine is the answer to those. Linux on x86_64 or arm64 only.
"""

import functools
import os
import platform
import shutil
import stat
import struct
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, fields
from pathlib import Path

NOBODY = 65534  # the unprivileged user and group, outside (when root starts the sandbox) and inside
MiB = 1 << 20
_SYSTEM = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


class SandboxError(RuntimeError):
    """Model-written code can't be isolated here, so it was not run; the message says what is missing and what to do."""


@dataclass(frozen=True)
class Limits:
    """What a program may use before it is killed.

    Attributes:
        seconds: wall clock, from the moment the isolated interpreter is up.
        cpu: processor seconds of each process.
        memory: bytes of address space of each process, and of resident memory of all its processes together.
        processes: processes and threads at one time.
        file_size: bytes of one file; the temporary folder holds four times as much.
        files: files and folders in the temporary folder.
        output: bytes on stdout, and as many on stderr; the program is killed at the first byte more.

    Raises:
        ValueError: a limit below 1, or memory in which no interpreter starts.
    """

    seconds: float = 10.0
    cpu: int = 10
    memory: int = 512 * MiB
    processes: int = 16
    file_size: int = 16 * MiB
    files: int = 4096
    output: int = MiB

    def __post_init__(self) -> None:
        for field in fields(self):
            if (value := getattr(self, field.name)) <= 0 or (field.type is int and not isinstance(value, int)):
                raise ValueError(f"{field.name}={value!r} is no limit: give a number above 0.")
        if self.memory < 64 * MiB:
            raise ValueError(f"memory={self.memory} bytes is too little for Python itself: give 64 MiB or more.")


def command(
    words: list[str], files: dict[str, bytes], limits: Limits, info: int, program: str = "bwrap"
) -> tuple[list[str], list[int]]:
    """The command line that runs the isolated interpreter on `words`, and the descriptors that it needs to inherit.

    Args:
        words: arguments of the interpreter.
        files: names and contents of the files that lie read-only in /sandbox.
        limits: here only the size of the temporary folder counts.
        info: descriptor that bubblewrap tells its child's process id on.
    """
    python, walls = _walls(program)
    descriptors = [readable(data) for data in files.values()]
    filtered = readable(syscall_filter())
    args = [*walls, "--info-fd", str(info), "--seccomp", str(filtered)]
    for name, descriptor in zip(files, descriptors, strict=True):
        args += ["--perms", "0444", "--ro-bind-data", str(descriptor), f"/sandbox/{name}"]
    args += ["--perms", "1777", "--size", str(4 * limits.file_size), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    # -I would also ignore PYTHONHASHSEED, and the environment holds nothing but what is set here.
    return [*args, "--remount-ro", "/", "--", python, "-sPSB", *words], [info, filtered, *descriptors]


def readable(data: bytes) -> int:
    """A descriptor at the start of `data`, open for reading only; the caller closes it."""
    writable = os.memfd_create("sandbox", os.MFD_CLOEXEC)
    try:
        with open(writable, "wb", closefd=False) as stream:
            stream.write(data)
        return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(writable)


@functools.cache
def _walls(program: str) -> tuple[str, list[str]]:
    """The interpreter's path, and all arguments that are the same for every run."""
    bwrap = shutil.which(program)
    if sys.platform != "linux" or platform.machine() not in _CALLS:
        raise SandboxError(
            f"Model-written code runs only where it can be isolated: Linux on {' or '.join(_CALLS)}, and this is "
            f"{sys.platform} on {platform.machine()}. Nothing was run. Next: use such a machine, or a Linux container."
        )
    if bwrap is None:
        raise SandboxError(
            f"Model-written code needs bubblewrap to be isolated, and there is no {program!r} on the PATH. Nothing was "
            "run. Next: sudo apt install bubblewrap   (Fedora: sudo dnf install bubblewrap)"
        )
    prefix, python = Path(sys.base_prefix).resolve(), Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    for inner in (Path.home(), Path(__file__).resolve().parents[2]):
        if inner.is_relative_to(prefix):
            raise SandboxError(
                f"The interpreter's folder {prefix} holds {inner}, which the code could then read. Nothing was run. "
                "Next: make the environment with another Python: make clean-all && make PYTHON=/usr/bin/python3"
            )
    before, source = _dropped_rights(prefix)
    args = [*before, bwrap, "--unshare-all", "--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    args += ["--hostname", "sandbox", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"]
    for name, value in {"PATH": "/nowhere", "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "TMPDIR": "/tmp"}.items():
        args += ["--setenv", name, value]
    for place in filter(os.path.lexists, _SYSTEM):
        link = Path(place).is_symlink()
        args += ["--symlink", str(Path(place).readlink()), place] if link else ["--ro-bind", place, place]
    if prefix != Path("/usr"):
        args += ["--ro-bind", source, str(prefix)]
    if prefix == Path("/usr") or not python.is_relative_to(prefix):
        args += ["--ro-bind", str(python), str(python)]
    packages = sysconfig.get_path("purelib", vars={"base": str(prefix)})
    if Path(packages).is_dir() and Path(packages).is_relative_to(prefix):
        args += ["--tmpfs", packages, "--remount-ro", packages]  # the standard library alone
    for device in _DEVICES:
        args += ["--dev-bind", device, device]
    return str(python), args


def _dropped_rights(prefix: Path) -> tuple[list[str], str]:
    """Words that make root become nobody before bubblewrap starts, and where the interpreter's folder lies then.

    Root must not start it as root: the kernel would count the code as root's, who has no limit on processes, and who
    owns files. Where nobody may not walk to the interpreter (in the home of root), it is first mounted on /mnt, seen
    by the sandbox alone.
    """
    if os.geteuid() != 0:
        return [], str(prefix)
    drop = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]
    if all(folder.stat().st_mode & stat.S_IXOTH for folder in (prefix, *prefix.parents)):
        return drop, str(prefix)
    script = 'mount --bind "$1" /mnt && shift && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", str(prefix), *drop], "/mnt"


# System calls that fail with EPERM, and their numbers on x86_64 and arm64.
_NAMES = (
    "ptrace process_vm_readv process_vm_writev kcmp pidfd_getfd perf_event_open bpf userfaultfd "
    "add_key request_key keyctl io_uring_setup io_uring_enter io_uring_register "
    "mount umount2 pivot_root chroot unshare setns open_tree move_mount fsopen fsconfig fsmount fspick mount_setattr "
    "name_to_handle_at open_by_handle_at fanotify_init quotactl acct syslog personality reboot swapon swapoff "
    "init_module finit_module delete_module kexec_load kexec_file_load settimeofday clock_settime adjtimex "
    "clock_adjtime memfd_create memfd_secret shmget semget msgget mq_open mbind set_mempolicy migrate_pages "
    "move_pages socket clone clone3"
)
_CALLS: dict[str, dict[str, int]] = {
    machine: dict(zip(_NAMES.split(), numbers, strict=True))
    for machine, numbers in {
        "x86_64": (
            101, 310, 311, 312, 438, 298, 321, 323, 248, 249, 250, 425, 426, 427, 165, 166, 155, 161, 272, 308, 428,
            429, 430, 431, 432, 433, 442, 303, 304, 300, 179, 163, 103, 135, 169, 167, 168, 175, 313, 176, 246, 320,
            164, 227, 159, 305, 319, 447, 29, 64, 68, 240, 237, 238, 256, 279, 41, 56, 435,
        ),
        "aarch64": (
            117, 270, 271, 272, 438, 241, 280, 282, 217, 218, 219, 425, 426, 427, 40, 39, 41, 51, 97, 268, 428,
            429, 430, 431, 432, 433, 442, 264, 265, 262, 60, 89, 116, 92, 142, 224, 225, 105, 273, 106, 104, 294,
            170, 112, 171, 266, 279, 447, 194, 190, 186, 180, 235, 237, 238, 239, 198, 220, 435,
        ),
    }.items()
}  # fmt: skip
_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_* of linux/audit.h
_NEW_NAMESPACES = 0x7E020000  # every CLONE_NEW* flag of clone(2)
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


@functools.cache
def syscall_filter(machine: str = platform.machine()) -> bytes:
    """The filter as a classic BPF program (seccomp(2)): a list of calls that are refused, all others are allowed.

    `socket` is left for local sockets only, `clone` without new namespaces; `clone3`, whose flags a filter can't see,
    doesn't exist, so the C library falls back to `clone`. Calls of another architecture kill the process.
    """
    calls = dict(_CALLS[machine])
    socket, clone, clone3 = (calls.pop(name) for name in ("socket", "clone", "clone3"))
    end = 7 + len(calls)  # after the list of calls: what is in none of these places is allowed
    at_socket, at_clone, allow, eperm, enosys, kill = end + 1, end + 3, end + 5, end + 6, end + 7, end + 8
    steps: list[tuple[int, int, int | None, int | None]] = [  # operation, operand, target if true, target if false
        (_LOAD, 4, None, None), (_EQUAL, _ARCHITECTURE[machine], None, kill), (_LOAD, 0, None, None),
        (_AT_LEAST, 0x40000000, enosys, None),  # calls of the x32 ABI
        (_EQUAL, clone3, enosys, None), (_EQUAL, socket, at_socket, None), (_EQUAL, clone, at_clone, None),
        *((_EQUAL, number, eperm, None) for number in calls.values()), (_RETURN, _ALLOW, None, None),
        (_LOAD, 16, None, None), (_EQUAL, 1, allow, eperm),  # the family is AF_UNIX
        (_LOAD, 16, None, None), (_ANY_BIT, _NEW_NAMESPACES, eperm, allow),
        (_RETURN, _ALLOW, None, None), (_RETURN, _EPERM, None, None), (_RETURN, _ENOSYS, None, None),
        (_RETURN, _KILL, None, None),
    ]  # fmt: skip
    program = b""
    for here, (operation, operand, true, false) in enumerate(steps):
        jumps = [0 if target is None else target - here - 1 for target in (true, false)]
        program += struct.pack("=HBBI", operation, *jumps, operand)
    return program


_PROBE = "import os; print(os.getuid(), sorted(set(os.listdir('/')) & {'proc', 'home', 'sandbox'}))"
HINT = "sysctl kernel.unprivileged_userns_clone kernel.apparmor_restrict_unprivileged_userns user.max_user_namespaces"


@functools.cache
def probe(program: str = "bwrap") -> tuple[str, str]:
    """What isolates here and "", or "" and why nothing does; found once, by starting a sandbox."""
    from workbench.sandbox import supervise

    try:
        found = supervise.run_inside([supervise.script(_PROBE)], Limits(), program)[0]
    except SandboxError as error:
        return "", str(error)
    if found.stdout.strip() != f"{NOBODY} ['sandbox']":
        said = f"the probe printed {found.stdout!r} {found.stderr[-200:]!r}"
        return "", f"{program} starts but does not isolate: {said}. Nothing else was run. Next: {program} --version"
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.strip()
    return f"{version or program}, user {NOBODY}, system call filter", ""


def isolation(program: str = "bwrap") -> str | None:
    """What isolates model-written code on this machine, or None; the first call starts a sandbox (50 ms)."""
    return probe(program)[0] or None


def required(program: str = "bwrap") -> None:
    """Raise `SandboxError` where code can't be isolated."""
    found, fault = probe(program)
    if not found:
        raise SandboxError(fault)


def refused(fault: str) -> SandboxError:
    """The error for a bubblewrap that is there and can't start."""
    return SandboxError(
        f"bubblewrap is installed and could not start a sandbox ({fault.strip() or 'it said nothing'}); many hosts "
        f"forbid user namespaces. Nothing was run. Next: {HINT}   then what it shows to be off, for example: "
        "sudo sysctl -w kernel.unprivileged_userns_clone=1   (Ubuntu from 24.04: "
        "sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0; in Docker: --security-opt seccomp=unconfined)"
    )
