"""Temporary folders as another user needs them."""

import tempfile
from pathlib import Path


def reachable(folder: Path) -> None:
    """Let every user walk there: root starts sandboxes as nobody, and pytest keeps its temporary folders private."""
    top = Path(tempfile.gettempdir()).resolve()
    while folder != top and top in folder.parents:
        folder.chmod(0o755)
        folder = folder.parent
