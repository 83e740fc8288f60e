"""Buttons that are heard while a cell keeps the kernel's main thread busy."""

from typing import Any


def answer_while_busy(box: Any) -> None:
    """Let these widgets be heard while a cell runs, where the front end talks to the kernel through a subshell.

    ipykernel 7.4 hands a widget's messages to the thread that last wrote to it, which is the busy main one for all that
    a cell made; here they go to the subshell that the front end asked for. Other versions are left alone.
    """
    comm: Any = getattr(box, "comm", None)
    if comm is not None and hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda data, default: default
    for child in getattr(box, "children", ()):
        answer_while_busy(child)
