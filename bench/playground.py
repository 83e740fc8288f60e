"""What a person waits for: a slider to the first changed token in a browser; a kernel's start and memory.

The moves are those of tests/browser/test_live.py, which a real JupyterLab and Chromium make; the kernel's numbers are
of a fresh process that imports the workbench, loads the lab model and answers one question.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KERNEL = """
import json, sys, time
began = time.perf_counter()
import ipykernel.kernelapp, ipywidgets, psutil
import workbench as wb
lm = wb.load_model("lab")
lm.generate([[{"role": "user", "content": "2+3?"}]], max_new_tokens=4)
print(json.dumps([time.perf_counter() - began, psutil.Process().memory_info().rss / 1e6]))
"""


def lines(moves: int = 50) -> list[dict[str, Any]]:
    """A line a question, with its limit and what was measured."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    told = subprocess.run(
        [sys.executable, "-c", KERNEL], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )
    seconds, megabytes = json.loads(told.stdout.splitlines()[-1])
    found = [
        _line("kernel: import, lab model, first answer", seconds, "s", 10, 1),
        _line("kernel: resident memory", megabytes, "MB", 700, 1),
    ]
    with tempfile.TemporaryDirectory() as folder:
        words = ["-q", "-p", "no:cacheprovider", "tests/browser/test_live.py", "-k", "slider"]
        environment |= {"BROWSER_MOVES": str(moves), "BROWSER_SHOTS": folder}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *words], capture_output=True, text=True, env=environment, cwd=ROOT
        )
        file = Path(folder) / "latency.json"
        if done.returncode or not file.exists():
            print(f"the browser made no moves: {done.stdout.strip().splitlines()[-1:]}")
            return found
        waits = json.loads(file.read_text(encoding="utf-8"))
    found.append(_line("slider to first changed token, median", waits["median_ms"], "ms", 100, moves))
    found.append(_line("slider to first changed token, largest", waits["largest_ms"], "ms", None, moves))
    return found


def _line(what: str, value: float, unit: str, limit: float | None, n: int) -> dict[str, Any]:
    share = value / limit if limit else float("nan")
    return {"what": what, "n": n, "measured": value, "unit": unit, "limit": limit, "of the limit": share}
