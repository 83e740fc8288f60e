"""Where interventions really acted, token by token: measured in the forward passes, not read off the plan.

Covers changes of the residual stream, of cached keys and values and of which are still there, of one prompt. Weight
edits and adapters act on every token, logit edits on none: they have no rows. (A trace as the oracle of a steering
library: EasySteer's tests.)
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from workbench.interventions import Adapter, Intervention
from workbench.interventions.kv_quantize import FewBitsLayer
from workbench.interventions.session import ACTIVE
from workbench.interventions.weights import Weights
from workbench.models import LM, ModelError
from workbench.turns import in_turn


@in_turn
def trace(
    lm: LM,
    prompt: str | list[dict[str, str]],
    x: Intervention,
    max_new_tokens: int = 32,
    *,
    use_cache: bool = True,
    untouched: bool = False,
) -> pd.DataFrame:
    """Where an intervention really acted while the prompt was continued: a row a position, layer and kind.

    The prompt is continued greedily under `x`, then the same tokens run again, one a step, and are measured. Amount:
    for "residual" the norm of a block's output after minus before the intervention, in one and the same forward; for
    "kv" the norm of the change in a cached token's keys and values between two forwards; for "dropped" the share of
    the layer's key-value heads that no longer hold or see the token. Rows with amount 0 are left out. The last new
    token is never processed. use_cache=False recomputes everything for each token, as
    `model.generate(use_cache=False)` does; the answer is the same. untouched=True also gives a row with amount 0, and
    no layer and kind, to every token that nothing changed: the whole text, as `plots.trace_strip` draws it. Adapters
    and weight edits change every token and are refused; so are spliced blocks, whose tokens are not in the text.
    """
    wrong = sorted({type(part).__name__ for part in x.parts if isinstance(part, (Adapter, Weights))})
    if wrong:
        raise ModelError(
            f"A change of weights ({', '.join(wrong)}) acts on every token and leaves no place to show. Trace the rest "
            "inside of it: with lm.apply(adapter): trace(lm, prompt, other)"
        )
    start = torch.tensor([lm.encode(prompt)], device=lm.device)
    new = lm.generate([prompt], x, max_new_tokens=max_new_tokens)[0].token_ids
    ids = torch.cat([start, torch.tensor([new[:-1]], dtype=torch.long, device=start.device)], dim=1)
    length = start.shape[1]
    recorder = _Recorder(lm)
    with lm.apply(x), recorder.listening(), torch.no_grad():
        cache = DynamicCache(config=lm.model.config) if use_cache else None
        for stop in range(length, ids.shape[1] + 1):
            first = 0 if cache is None or stop == length else stop - 1
            recorder.begin(first, stop)
            lm.model(input_ids=ids[:, first:stop], past_key_values=cache, use_cache=use_cache)
    return _table(lm, [*ids[0].tolist(), *new[-1:]], length, recorder.amounts, untouched)


def _table(
    lm: LM, text: list[int], length: int, amounts: dict[tuple[int, int, str], float], untouched: bool
) -> pd.DataFrame:
    rows: list[tuple[int, int | None, str | None, float]] = [
        (position, layer, kind, amount) for (position, layer, kind), amount in sorted(amounts.items())
    ]
    if untouched:
        acted = {row[0] for row in rows}
        rows += [(position, None, None, 0.0) for position in range(len(text)) if position not in acted]
        rows.sort(key=lambda row: row[0])  # stable: layers stay in order
    lines = [
        {
            "position": position, "token": lm.tokenizer.decode([text[position]]), "layer": layer,
            "part": "prompt" if position < length else "generated", "kind": kind, "amount": amount,
        }
        for position, layer, kind, amount in rows
    ]  # fmt: skip
    table = pd.DataFrame(lines, columns=["position", "token", "part", "layer", "kind", "amount"])
    return table.astype({"layer": "Int64"}) if untouched else table


class _Recorder:
    """Hooks around every block: its output before and after the session's own hooks, and its cache between calls."""

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.amounts: dict[tuple[int, int, str], float] = {}
        self.seen: dict[int, int] = {}
        self.raw: dict[int, Tensor] = {}
        self.caches: dict[int, tuple[Any, Tensor, Tensor]] = {}

    def begin(self, first: int, stop: int) -> None:
        """The next forward holds the tokens at positions first to stop - 1, in one part or several."""
        self.first, self.stop = first, stop
        self.seen = dict.fromkeys(range(len(self.lm.blocks)), first)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside a session: hooks put in front now run before its own, hooks at the end after them."""
        with ExitStack() as hooks:
            for layer, block in enumerate(self.lm.blocks):
                for handle in (
                    block.register_forward_pre_hook(self._before(layer), with_kwargs=True),
                    block.register_forward_hook(self._raw(layer), prepend=True),
                    block.register_forward_hook(self._after(layer), with_kwargs=True),
                ):
                    hooks.callback(handle.remove)
            yield

    def _before(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.seen[layer] == self.stop:  # a gate has run the prompt once before
                self.seen[layer] = self.first
            cache, entry = _entry(layer, args, kwargs)
            old, layout = self.caches.get(layer), ACTIVE[self.lm.model][-1].layout
            if layout is not None and layout.added:
                raise ModelError(
                    "A spliced block's tokens are not in the text, and all behind them move up: there are no positions "
                    "to trace. Trace the rest of the sum without it."
                )
            if entry is None or old is None or old[0] is not cache:
                return
            keys, values = _stored(entry)
            first = self.seen[layer] - old[1].shape[2]  # a sliding cache has let go of the first ones
            if keys.shape != old[1].shape:
                self._note(layer, "dropped", first, _let_go(layer, (old[1], old[2]), (keys, values)))
                return
            change = (keys - old[1]).square().sum((0, 1, 3)) + (values - old[2]).square().sum((0, 1, 3))
            self._note(layer, "kv", first, change.sqrt())
            if layout is not None and layout.changed and not getattr(entry, "gone", 0):
                unseen = ~layout.visible[0, first : first + keys.shape[2]]
                self._note(layer, "dropped", first, unseen.float())

        return hook

    def _raw(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.raw[layer] = _hidden(output).clone()

        return hook

    def _after(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            hidden = _hidden(output)
            change = (hidden.float() - self.raw.pop(layer).float()).norm(dim=-1)[0]
            self._note(layer, "residual", self.seen[layer], change)
            self.seen[layer] += hidden.shape[1]
            cache, entry = _entry(layer, args, kwargs)
            if entry is not None:
                keys, values = _stored(entry)
                self.caches[layer] = (cache, keys.clone(), values.clone())

        return hook

    def _note(self, layer: int, kind: str, first: int, amounts: Float[Tensor, " tokens"]) -> None:
        for place, amount in enumerate(amounts.tolist()):
            if amount > 0:
                self.amounts[first + place, layer, kind] = amount


def _entry(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The cache that a block was given, and its own layer where that holds keys; None where there is none."""
    cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
    entry = cache.layers[layer] if cache is not None and layer < len(cache.layers) else None
    return cache, entry if isinstance(getattr(entry, "keys", None), Tensor) else None


def _stored(entry: Any) -> tuple[Float[Tensor, "1 heads tokens size"], Float[Tensor, "1 heads tokens value_size"]]:
    """Keys and values of a cache layer in float32, unpacked where they are packed."""
    keys, values = entry.entries if isinstance(entry, FewBitsLayer) else (entry.keys, entry.values)
    return keys.float(), values.float()


def _let_go(layer: int, old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]) -> Float[Tensor, " tokens"]:
    """The share of key-value heads that no longer hold a token; those that stay are found again by their entries."""
    before, after = (torch.cat(pair, dim=-1)[0] for pair in (old, new))
    stays = (before[:, :, None] == after[:, None]).all(-1)
    if not stays.any(1).all():
        raise ModelError(
            f"The cache of layer {layer} went from {before.shape[1]} to {after.shape[1]} tokens, and what is left was "
            "changed as well: there is no saying which went. Trace the parts of this sum one by one."
        )
    return 1 - stays.any(2).float().mean(0)


def _hidden(output: Any) -> Float[Tensor, "1 seq d_model"]:
    return output[0] if isinstance(output, tuple) else output
