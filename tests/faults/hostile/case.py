"""One hostile program, what it tries and what must come of it."""

import textwrap
from dataclasses import dataclass
from typing import Literal

PRELUDE = """\
import ctypes, ctypes.util, errno, fcntl, mmap, os, pathlib, resource, select, shutil, signal, socket
import struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
CALLS = @CALLS@
def checked(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
def call(name, *args):
    return checked(libc.syscall(CALLS[name], *args))
"""
ATTEMPT = """\
def attempt():
{body}
try:
    print("REACHED", attempt())
except BaseException as error:
    print("refused", type(error).__name__, error)
"""


@dataclass(frozen=True)
class Case:
    """`expect`: 'refused' (it tried and met an error), a field of Limits, 'ends' (whatever it does, it is over), or
    'judged wrong'. `against` is what the program is given to.
    """

    name: str
    tries: str
    code: str
    expect: str
    against: Literal["run_python", "judge_tests"] = "run_python"


def escape(name: str, tries: str, body: str) -> Case:
    """A program whose `body` returns when it gets through and raises when it doesn't."""
    body = textwrap.indent(textwrap.dedent(body).strip(), "    ")
    return Case(name, tries, PRELUDE + ATTEMPT.format(body=body), "refused")


def exhaust(name: str, tries: str, expect: str, code: str) -> Case:
    """A program that uses up something."""
    return Case(name, tries, PRELUDE + textwrap.dedent(code).strip() + "\n", expect)


def forge(name: str, tries: str, code: str) -> Case:
    """A program with a wrong function `add` that wants to pass its tests."""
    return Case(name, tries, textwrap.dedent(code).strip() + "\n", "judged wrong", "judge_tests")


def pretend(name: str, tries: str, code: str) -> Case:
    """A program that doesn't know the answer and wants to be judged right."""
    return Case(name, tries, PRELUDE + textwrap.dedent(code).strip() + "\n", "judged wrong")
