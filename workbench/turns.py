"""One thread at a time on a model: hooks and edited weights would otherwise act on another thread's forwards too.

Generation, `lm.apply` and whatever is built on them take their turn by themselves. Code of your own that calls
`lm.model` while another thread may generate with it (a playground in a notebook does) does so inside `with turn(lm):`.
"""

from threading import Lock, RLock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

if TYPE_CHECKING:
    from workbench.models import LM

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
