"""Keep what a playground's dials describe: a file in the person's own run folder, and the code that makes it again.

Two files a name: NAME.safetensors is the change as it was at work, NAME.source.safetensors what it was made from. What
exists is never overwritten by something else.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from workbench.files import write_atomic
from workbench.interventions import Intervention
from workbench.models import ModelError
from workbench.widgets.wishes import Wish, changed, code

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,79}")
__all__ = ["SavedCondition", "save_condition"]


@dataclass(frozen=True)
class SavedCondition:
    """file: what `wb.load_intervention` reads. expression: the same change, made anew from its source. code: both."""

    file: Path
    expression: str
    code: str


def save_condition(
    out: Path | None, name: str | None, wish: Wish, interventions: Mapping[str, Intervention | None]
) -> SavedCondition:
    """Write a wish's change and its source into `out`; ModelError where there is no folder, no change or no free name.

    name: None makes one of the dials. The same name may be used again for the same change.
    """
    if out is None:
        raise ModelError("There is no folder to save to. Next: wb.playground(lm, interventions, out=folder).")
    name = own_name(wish) if name is None else name
    if not NAME.fullmatch(name) or name.endswith("."):
        raise ModelError(
            f"{name!r} is no name for a file. Use up to 80 letters, digits, spaces and . _ + -, the first a letter "
            "or digit."
        )
    x, source = changed(wish, interventions), interventions[wish.name]
    if x is None or source is None:
        raise ModelError("The plain model is not changed: there is nothing to save. Choose an intervention first.")
    file, origin = out / f"{name}.safetensors", out / f"{name}.source.safetensors"
    written = {file: _bytes(x), origin: _bytes(source)}
    for path, data in written.items():
        if path.exists() and path.read_bytes() != data:
            raise ModelError(f"{path} exists and holds something else. Choose another name.")
    out.mkdir(parents=True, exist_ok=True)
    for path, data in written.items():
        if not path.exists():
            write_atomic(path, data)
    again = code(wish, source, f"wb.load_intervention({str(origin)!r})")
    lines = f"x = wb.load_intervention({str(file)!r})\n# the same, made anew:\nx = {again}"
    return SavedCondition(file, again, lines)


def own_name(wish: Wish) -> str:
    """A file's name that says what the dials say.

    >>> own_name(Wish("my steps!", "", 0.8, 3, "last"))
    'my-steps-0.8-layer3-last'
    """
    parts = [re.sub(r"[^A-Za-z0-9]+", "-", wish.name).strip("-") or "change", f"{wish.strength:g}"]
    parts += [] if wish.layer is None else [f"layer{wish.layer}"]
    return "-".join([*parts, wish.positions] if wish.positions else parts)[:80]


def _bytes(x: Intervention) -> bytes:
    with TemporaryDirectory() as folder:
        return x.save(Path(folder) / "x.safetensors").read_bytes()
