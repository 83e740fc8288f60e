"""One thread at a time on a model: hooks and edited weights would otherwise act on another thread's forwards too.

Generation, `lm.apply`, extraction, readouts and likelihoods take their turn by themselves; training does not. Code of
your own that calls `lm.model` while another thread may generate with it (a playground in a notebook does) does so
inside `with turn(lm):`.
"""

from collections.abc import Callable
from functools import wraps
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

if TYPE_CHECKING:
    from workbench.models import LM

P = ParamSpec("P")
R = TypeVar("R")
_TURNS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_MAKING = Lock()


def turn(lm: "LM") -> Any:
    """The model's lock, the same for every LM that shares it; the thread that holds it may take it again.

    >>> from workbench import load_model
    >>> lm = load_model("lab")
    >>> with turn(lm), turn(lm):
    ...     turn(lm) is turn(lm)
    True
    """
    with _MAKING:
        return _TURNS.setdefault(lm.model, RLock())


def in_turn(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose first argument is an LM, with that model to itself for the whole call."""

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        lm: Any = args[0] if args else kwargs.get("lm")
        if not isinstance(getattr(lm, "model", None), nn.Module):  # a server's model, or a mistake that it will name
            return function(*args, **kwargs)
        with turn(lm):
            return function(*args, **kwargs)

    return alone
