"""Every notebook in a real JupyterLab: all cells run, nothing raises, the page reports no error, still forms stay."""

import json
import shutil
from pathlib import Path

import pytest

from tests.browser.conftest import LabServer
from tests.test_notebooks import NOTEBOOKS

pytestmark = [pytest.mark.browser, pytest.mark.slow]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_all_cells_run_in_the_browser(
    path: Path, lab_server: LabServer, page, open_notebook, run_all, console_errors, shoot
) -> None:
    needs = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("workbench", {}).get("needs", [])
    open_notebook(page, f"notebooks/{path.name}")
    found = run_all(page)
    shoot(page, path.stem)
    page.evaluate("() => jupyterapp.commands.execute('docmanager:save')")
    page.evaluate("() => jupyterapp.shell.currentWidget.context.sessionContext.shutdown()")
    assert found["errors"] == [], f"it reads what {needs} leave"
    assert found["cells"] > 3
    assert console_errors.found == []
    saved = json.loads((lab_server.home / "notebooks" / path.name).read_text(encoding="utf-8"))
    assert sum(cell["cell_type"] == "code" and bool(cell["execution_count"]) for cell in saved["cells"]) == found["cells"]
