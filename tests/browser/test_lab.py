"""Every notebook in a real JupyterLab: all cells run, nothing raises, the page reports no error, still forms stay."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from tests.browser.conftest import ConsoleErrors, LabServer
from tests.test_notebooks import NOTEBOOKS

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PLOTLY = "application/vnd.plotly.v1+json"
KERNEL = "() => jupyterapp.shell.currentWidget.context.sessionContext.session?.kernel?.status ?? null"
CURVES = "() => jupyterapp.shell.currentWidget.node.querySelectorAll('.js-plotly-plot').length"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_all_cells_run_in_the_browser(
    path: Path,
    lab_server: LabServer,
    page: Page,
    console_errors: ConsoleErrors,
    open_notebook: Callable[..., None],
    run_all: Callable[..., dict[str, Any]],
    shoot: Callable[..., Path],
) -> None:
    open_notebook(page, f"notebooks/{path.name}")
    found = run_all(page)
    shoot(page, path.stem)
    page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    assert found["errors"] == []  # a notebook alone may need what an earlier one leaves: run the whole file
    assert found["cells"] > 3
    assert console_errors.found == []
    saved = json.loads((lab_server.home / "notebooks" / path.name).read_text(encoding="utf-8"))
    executed = [cell for cell in saved["cells"] if cell["cell_type"] == "code" and cell["execution_count"]]
    assert len(executed) == found["cells"]
    drawn = [output for cell in executed for output in cell["outputs"] if PLOTLY in output.get("data", {})]
    assert page.evaluate(CURVES) == len(drawn)
    assert len({json.dumps(output["data"][PLOTLY]) for output in drawn}) == len(
        drawn
    )  # a live curve is one, not one an update


def trust(path: Path, lab_server: LabServer) -> None:
    """Do as `jupyter trust` does: JupyterLab shows no SVG of a notebook that was made elsewhere."""
    program = "from nbformat.sign import TrustNotebookApp; TrustNotebookApp.launch_instance()"
    places = {**os.environ, "JUPYTER_DATA_DIR": str(lab_server.home / ".jupyter" / "data")}
    subprocess.run([sys.executable, "-c", program, str(path)], env=places, check=True, capture_output=True)


def test_live_and_still_forms_are_seen_without_a_kernel(
    tiny_run: Path,
    lab_server: LabServer,
    page: Page,
    open_notebook: Callable[..., None],
    shoot: Callable[..., Path],
) -> None:
    """A saved notebook whose kernel is gone: its figure and the twin of its widget are there all the same."""
    for name in ("00_figures", "01_widgets"):
        path = Path(shutil.copy(tiny_run / name / f"{name}.ipynb", lab_server.home / f"{name}.ipynb"))
        book = json.loads(path.read_text(encoding="utf-8"))
        book["metadata"]["kernelspec"] = {"name": "gone", "display_name": "Gone", "language": "python"}
        if name == "00_figures":  # as a viewer without plotly sees it
            for cell in book["cells"]:
                for output in cell.get("outputs", []):
                    output.get("data", {}).pop(PLOTLY, None)
        path.write_text(json.dumps(book), encoding="utf-8")
        trust(path, lab_server)
        open_notebook(page, path.name, kernel=False)
        page.get_by_role("button", name="No Kernel", exact=True).click()
        if name == "00_figures":
            picture = page.locator(".jp-OutputArea-output img[src^='data:image/svg'], .jp-OutputArea-output svg").first
            picture.wait_for(state="visible")
            box = picture.bounding_box()
            assert box is not None
            assert box["width"] > 300 and box["height"] > 150
        else:
            page.get_by_text("slider at 7", exact=True).wait_for(state="visible")
        assert page.evaluate(KERNEL) is None
        shoot(page, f"without-kernel-{name}", tall=False)


def test_a_notebook_in_the_dark(
    tiny_run: Path,
    lab_server: LabServer,
    page: Page,
    console_errors: ConsoleErrors,
    open_notebook: Callable[..., None],
    run_all: Callable[..., dict[str, Any]],
    shoot: Callable[..., Path],
) -> None:
    """In the dark theme figures keep a light ground under their dark letters."""
    open_notebook(page, "notebooks/00_start_here.ipynb")
    page.evaluate("() => jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
    assert run_all(page)["errors"] == []
    ground = page.locator(".js-plotly-plot .main-svg").first
    ground.wait_for(state="visible")
    assert ground.evaluate("(node) => getComputedStyle(node).backgroundColor") == "rgb(255, 255, 255)"
    shoot(page, "dark-00_start_here")
    page.evaluate("() => jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Light'})")
    assert console_errors.found == []
