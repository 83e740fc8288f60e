"""The notebook kernel of a run: ipykernel, except that it dies with the process that started it.

Started by the kernel specification that `runs` writes, as `python -m workbench.runs.kernel -f FILE`. ipykernel polls
its parent once a second by itself; the difference is that here nothing is written in that second.
"""

import os

from workbench.runs.processes import die_with_parent


def main() -> None:
    """Tie this process to its parent and become an ordinary kernel."""
    die_with_parent(int(os.environ.get("JPY_PARENT_PID") or 0) or None)
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance()


if __name__ == "__main__":
    main()
