"""The one concept: a frozen value that says what to change in a model, where and how much.

Values are scaled (`2 * x`), added (`x + y`), saved and loaded; `apply` or `generate` puts them to work. The kinds live
in `residual`, `kv` and `adapter`; the mechanics of a forward pass in `session`.
"""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from workbench.models import LM, ModelError

if TYPE_CHECKING:
    from workbench.interventions.gate import Conditional, Gate


class Intervention:
    """What the kinds share: arithmetic, saving and the check against a model.

    calibration: what was measured on exactly this value, see `with_calibration`; None where nothing was.
    """

    model: str = ""
    revision: str = ""
    calibration: Mapping[str, Any] | None = None

    def scale(self, factor: float) -> "Intervention":
        """The same change, `factor` times as strong."""
        raise TypeError(f"{type(self).__name__} has no strength to scale.")

    def check(self, lm: LM) -> None:
        """Raise ModelError where this cannot be applied to `lm`."""

    @property
    def parts(self) -> "tuple[Intervention, ...]":
        """The single kinds this consists of."""
        return (self,)

    def with_calibration(self, record: Mapping[str, Any]) -> Self:
        """The same value with a record (of JSON values) of its calibration, which is saved and loaded with it.

        The record is of this value alone: whatever is made from it, scaled, moved to other layers or positions, or
        bound to another model, has none. A sum keeps those of its parts, each of which was measured alone.
        """
        new = copy(self)
        object.__setattr__(new, "calibration", dict(record))  # no field, so that dataclasses.replace leaves it behind
        return new

    def save(self, file: str | Path) -> Path:
        """Write one safetensors file; `load_intervention` reads it."""
        from workbench.interventions.files import save

        return save(self, Path(file))

    def when(self, gate: "Gate") -> "Conditional":
        """The same change for those rows only whose prompts make `gate` fire; see `workbench.interventions.gate`."""
        from workbench.interventions.gate import Conditional

        return Conditional(self, gate)

    def rebind(self, lm: LM) -> Self:
        """The same values, declared to belong to `lm`: for a copy or a tuned relative of the model behind them."""
        return replace(self, model=lm.name, revision=lm.revision)  # type: ignore[type-var]

    def __mul__(self, factor: float) -> "Intervention":
        if not isinstance(factor, (int, float)):
            return NotImplemented
        return self.scale(float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> "Intervention":
        return self.scale(-1.0)

    def __add__(self, other: "Intervention | int") -> "Intervention":
        if isinstance(other, int) and other == 0:  # so that the built-in sum() works
            return self
        if not isinstance(other, Intervention):
            return NotImplemented
        return Sum((*self.parts, *other.parts))

    __radd__ = __add__

    def __sub__(self, other: "Intervention") -> "Intervention":
        return self + -other


@dataclass(frozen=True, eq=False)
class Sum(Intervention):
    """Several interventions applied together, of one kind or of several."""

    members: tuple[Intervention, ...]

    def __post_init__(self) -> None:
        """Sums in sums are one sum."""
        object.__setattr__(self, "members", tuple(part for member in self.members for part in member.parts))

    def scale(self, factor: float) -> "Sum":
        return Sum(tuple(part.scale(factor) for part in self.members))

    def check(self, lm: LM) -> None:
        for part in self.members:
            part.check(lm)

    def rebind(self, lm: LM) -> "Sum":
        return Sum(tuple(part.rebind(lm) for part in self.members))

    @property
    def parts(self) -> tuple[Intervention, ...]:
        return self.members


class Made(Protocol):
    """What knows the model that it was made on."""

    @property
    def model(self) -> str: ...
    @property
    def revision(self) -> str: ...


def check_origin(x: Made, lm: LM) -> None:
    """Refuse what was extracted from other weights: its directions mean nothing here, even where the shapes agree."""
    known = x.revision not in ("", "unknown")
    if (x.revision != lm.revision) if known else (x.model not in ("", lm.name)):
        raise ModelError(
            f"This {type(x).__name__} was made on {x.model!r} (revision {x.revision}), the model is {lm.name!r} "
            f"(revision {lm.revision}). Extract it again on this model, or, for a copy or a tuned relative, use "
            "x.rebind(lm)."
        )


def check_layers(layers: Iterable[int], lm: LM) -> None:
    """Refuse layer numbers that the model does not have."""
    wrong = sorted(layer for layer in layers if not 0 <= layer < len(lm.blocks))
    if wrong:
        raise ModelError(
            f"{lm.name!r} has layers 0 to {len(lm.blocks) - 1} (layer l = output of decoder block l); got {wrong}."
        )
