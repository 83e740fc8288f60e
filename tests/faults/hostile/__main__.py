"""Print the table: program, what it tries, what happened, verdict."""

import sys
import tempfile
import time
from pathlib import Path

from tests.faults.hostile.harness import run_all, survivors
from workbench.sandbox import isolation


def main() -> int:
    """Run all programs; return 0 when every one of them was held."""
    if not isolation():
        print("Nothing was run: this machine can't isolate (python -m workbench doctor says why).")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        findings, outside = run_all(Path(folder))
    time.sleep(1)
    alive = [finding.case.name for finding in findings if survivors(finding.outcome, finding.ended)]
    for finding in findings:
        case = finding.case
        print(f"{case.name:<28} {case.tries:<58} {finding.happened[:110]:<112} {finding.fault or 'held'}")
    broken = sum(bool(finding.fault) for finding in findings)
    print(f"{len(findings)} programs: {len(findings) - broken} held, {broken} broken; "
          f"canaries touched: {outside.touched or 'none'}; alive one second later: {alive or 'none'}")  # fmt: skip
    return 1 if broken or outside.touched or alive else 0


if __name__ == "__main__":
    sys.exit(main())
