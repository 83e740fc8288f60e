"""A real JupyterLab on copies of the notebooks, and a real Chromium in front of it; both are skipped where missing.

Everything is written to temporary folders: settings, workspaces, the notebooks' outputs. Pictures of the pages go to
the folder that BROWSER_SHOTS names, outputs/browser by default.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

import pytest

from tests.test_notebooks import NOTEBOOKS, SMALL
from tests.test_site import make_run

pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: make environment")
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
SHOTS = Path(os.environ.get("BROWSER_SHOTS") or ROOT / "outputs" / "browser")
NAMES = ("chromium", "chromium-browser", "google-chrome")
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # so that a picture of the page holds every cell
}
QUIET = ("--no-browser", "--allow-root", "--expose-app-in-browser", "--ServerApp.terminals_enabled=False",
         "--LabApp.extension_manager=readonly", "--ServerApp.port_retries=0", "--log-level=WARN")  # fmt: skip
QUICK = {**SMALL, "model": "lab-small"}
TOKEN = "for-these-tests-only"
# What JupyterLab itself says without any fault of a notebook, each with its reason.
HARMLESS: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabServer:
    """A running JupyterLab: its address, and the folder that it shows (`notebooks` in it, as in the repository)."""

    address: str
    home: Path

    def url(self, path: str) -> str:
        """The page that opens a file of `home`, in a workspace with nothing else."""
        return f"{self.address}/lab/tree/{path}?reset&token={TOKEN}"


@dataclass
class ConsoleErrors:
    """What a page reported: errors on its console, exceptions, and addresses elsewhere that it asked for."""

    found: list[str] = field(default_factory=list)

    def console(self, message: ConsoleMessage) -> None:
        """Note an error that is not known to be harmless."""
        told = f"{message.text} ({message.location.get('url')})"
        if message.type == "error" and not any(re.search(pattern, told) for pattern in HARMLESS):
            self.found.append(told)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The system's browser."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"none of {', '.join(NAMES)} is installed (Debian: apt install chromium)")
    return path


# Not for the session: while Playwright runs, its event loop would be in the way of other test files of the worker.
@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """One browser for a file of tests."""
    with sync_playwright() as playwright:
        root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        found = playwright.chromium.launch(executable_path=chromium, args=[*root, "--disable-dev-shm-usage"])
        yield found
        found.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A fresh profile."""
    made = browser.new_context(viewport={"width": 1400, "height": 1000})
    made.set_default_timeout(60_000)
    yield made
    made.close()


@pytest.fixture
def console_errors() -> ConsoleErrors:
    """What `page` has reported so far, in `found`."""
    return ConsoleErrors()


@pytest.fixture
def page(context: BrowserContext, console_errors: ConsoleErrors) -> Page:
    """A page that can reach this machine alone; asking for more counts as an error."""

    def guard(route: Any) -> None:
        if urlsplit(route.request.url).hostname in ("127.0.0.1", None):
            route.continue_()
        else:
            console_errors.found.append(f"asked for {route.request.url}")
            route.abort()

    context.route("**/*", guard)
    made = context.new_page()
    made.on("console", console_errors.console)
    made.on("pageerror", lambda error: console_errors.found.append(f"exception: {error}"))
    return made


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two notebooks: a figure, widgets with static twins."""
    return make_run(tmp_path_factory.mktemp("browser"))


@pytest.fixture(scope="session")
def lab_server(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabServer]:
    """JupyterLab on a free port of this machine, with small copies of all notebooks."""
    home = tmp_path_factory.mktemp("lab")
    copy_notebooks(home / "notebooks")
    own = home / ".jupyter"
    for name, values in SETTINGS.items():
        path = own / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values), encoding="utf-8")
    kinds = ("JUPYTER_CONFIG", "JUPYTER_DATA", "JUPYTER_RUNTIME", "JUPYTERLAB_SETTINGS", "JUPYTERLAB_WORKSPACES")
    places = {f"{kind}_DIR": str(own / kind.partition("_")[2].lower()) for kind in kinds}
    places["IPYTHONDIR"] = str(own / "ipython")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    words = [
        *QUIET,
        "--ip=127.0.0.1",
        f"--port={port}",
        f"--IdentityProvider.token={TOKEN}",
        f"--ServerApp.root_dir={home}",
    ]
    with (own / "log.txt").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *words],
            cwd=home, env={**os.environ, **places, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            wait_for(f"http://127.0.0.1:{port}/api/status?token={TOKEN}", server, own / "log.txt")
            yield LabServer(f"http://127.0.0.1:{port}", home)
        finally:
            server.terminate()  # it ends its kernels before it goes
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def wait_for(address: str, server: "subprocess.Popen[bytes]", log: Path) -> None:
    """Return when a server answers; fail with its log if it ends or never does."""
    until = time.monotonic() + 90
    while server.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text(errors='replace')[-3000:]}")


def copy_notebooks(folder: Path, values: dict[str, object] = QUICK) -> None:
    """Copy all notebooks with other values in their parameters cells."""
    folder.mkdir(parents=True)
    for path in NOTEBOOKS:
        book = json.loads(path.read_text(encoding="utf-8"))
        for cell in book["cells"]:
            if "parameters" in cell["metadata"].get("tags", []):
                cell["source"] = "\n".join(changed(line, values) for line in "".join(cell["source"]).splitlines())
        (folder / path.name).write_text(json.dumps(book), encoding="utf-8")


def changed(line: str, values: dict[str, object]) -> str:
    """Return a line of a parameters cell, `name: type = value`, with another value if there is one for its name."""
    name = line.partition(":")[0].strip()
    return f"{line.partition(' = ')[0]} = {values[name]!r}" if name in values else line


@pytest.fixture
def open_notebook(lab_server: LabServer) -> Callable[[Page, str], None]:
    """`open_notebook(page, "notebooks/NAME.ipynb")` shows a file of the server's folder and waits for its kernel."""

    def opened(page: Page, path: str, *, kernel: bool = True) -> None:
        page.goto(lab_server.url(path))
        page.wait_for_function("window.jupyterapp?.shell?.currentWidget?.content?.model?.cells?.length > 0")
        if kernel:
            page.wait_for_function(
                "jupyterapp.shell.currentWidget.context.sessionContext.session?.kernel?.status === 'idle'"
            )

    return opened


PROGRESS = """() => {
  const panel = jupyterapp.shell.currentWidget, model = panel.context.model.sharedModel;
  const code = model.cells.map((cell, index) => ({cell, index})).filter(
    ({cell}) => cell.cell_type === 'code' && cell.source.trim());
  const errors = code.flatMap(({cell, index}) => cell.outputs.filter(item => item.output_type === 'error')
    .map(item => `cell ${index + 1}: ${item.ename}: ${item.evalue}`));
  const idle = panel.context.sessionContext.session?.kernel?.status === 'idle';
  const counted = code.every(({cell}) => cell.execution_count !== null);
  return errors.length || (idle && counted) ? {errors, cells: code.length} : null;
}"""


@pytest.fixture
def run_all() -> Callable[[Page], dict[str, Any]]:
    """`run_all(page)` runs all cells and returns, when the kernel is idle, how many ran and which raised what."""

    def ran(page: Page, *, seconds: float = 120) -> dict[str, Any]:
        page.evaluate("() => { jupyterapp.commands.execute('runmenu:run-all') }")
        found: dict[str, Any] = page.wait_for_function(PROGRESS, timeout=seconds * 1000, polling=200).json_value()
        return found

    return ran


HEIGHT = """() => {
  const cells = document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer');
  if (cells) cells.scrollTop = 0;
  return cells ? [...cells.querySelectorAll('.jp-Cell')].reduce((sum, cell) => sum + cell.offsetHeight + 10, 0)
               : document.documentElement.scrollHeight;
}"""


@pytest.fixture
def shoot() -> Callable[[Page, str], Path]:
    """`shoot(page, name)` keeps a picture of a whole notebook (or page) and returns its path."""

    def shot(page: Page, name: str, *, tall: bool = True) -> Path:
        SHOTS.mkdir(parents=True, exist_ok=True)
        if tall:
            page.evaluate("() => window.jupyterapp?.shell.collapseLeft()")
            for _ in range(2):  # what comes into view may change the height
                page.set_viewport_size({"width": 1400, "height": min(16_000, int(page.evaluate(HEIGHT)) + 120)})
                page.wait_for_timeout(200)
        path = SHOTS / f"{name}.png"
        page.screenshot(path=path)
        return path

    return shot
