"""Put interventions to work in a model's forward passes, and take them out again without a trace.

A session wraps the forward of the model below its head and hooks its decoder blocks. It works out where each token
stands in its own row's text (attention mask, position ids, cache length), so that positions mean the same with and
without a cache and with any padding; and it splits a forward in two where a cached token has to be edited in between.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor, nn

from workbench.interventions.adapter import Adapter, activated
from workbench.interventions.cache_layout import Layout
from workbench.interventions.cache_plan import CachePlan
from workbench.interventions.concept import Intervention
from workbench.interventions.forward import named, parameters_of, text_positions, wants_cache
from workbench.interventions.gate import ask, gates_of, resolved
from workbench.interventions.kv import KV, plan_kv
from workbench.interventions.logits import Companions, Logits
from workbench.interventions.low_rank import LowRank
from workbench.interventions.residual import Residual, span_mask
from workbench.interventions.residual_plan import plan_residual
from workbench.interventions.rotary import rotary_of
from workbench.interventions.shared_weights import common
from workbench.interventions.splitting import dressed, split
from workbench.interventions.steady import Steady
from workbench.interventions.virtual import refuse_edits
from workbench.interventions.weights import Weights, changed
from workbench.models import LM, ModelError
from workbench.turns import turn

ACTIVE: WeakKeyDictionary[nn.Module, "list[Session]"] = WeakKeyDictionary()


class Session:
    """Interventions, one for all rows or one a row, in force inside a `with` block instead of an outer session's."""

    def __init__(self, lm: LM, rows: Sequence[Intervention | None], lengths: Sequence[int] | None = None) -> None:
        self.lm = lm
        self.rows = list(rows)
        parts = [row.parts if row is not None else () for row in self.rows]
        for part in {id(part): part for row in parts for part in row}.values():
            part.check(lm)
        whole = common(parts)
        self.adapters = [part for part in whole if isinstance(part, Adapter)]
        self.virtual = sum(adapter.virtual for adapter in self.adapters)  # entries of the cache before the text
        self.weights = [part for part in whole if isinstance(part, Weights)]
        self.companions = Companions([[p for p in row if isinstance(p, Logits)] for row in parts], lm)
        self.parts, self.gates = parts, gates_of(parts)
        self._plan([resolved(row, dict.fromkeys(self.gates, True)) for row in parts])
        self.hooked = list(self.residual)
        refuse_edits(self.virtual if self.kv or self.edits else 0)
        self.empty = not (self.residual or self.kv or self.edits)  # nothing below the head: adapters and logits alone
        self.given = None if lengths is None else torch.tensor(list(lengths), device=lm.device)
        self.lengths = torch.empty(0, dtype=torch.long) if self.given is None else self.given
        self.selected: Tensor | None = None
        self.masks: Tensor | None = None
        self.previous: Tensor | None = None
        self.layout: Layout | None = None  # of the cache `laid`, once it was edited
        self.laid: Any = None
        self.steady: Steady | None = None  # once all prompts have been read
        self.decoding = False  # whether the forward at hand is a steady one
        self.paused = False
        self.pending = True  # whether the last prompt token of some row, and with it a KV edit, is still to come
        self.exits = ExitStack()

    def _plan(self, parts: Sequence[Sequence[Intervention]]) -> None:
        """Tensors for these rows; `planned` says how many there are."""
        self.planned = len(parts)
        residuals = [[part for part in row if isinstance(part, Residual | LowRank)] for row in parts]
        self.residual, self.spans = plan_residual(residuals, self.lm)
        self.kv = plan_kv([[part for part in row if isinstance(part, KV)] for row in parts], self.lm)
        self.edits = CachePlan(parts, self.lm)
        self.rotary = rotary_of(self.lm) if any(plan.rotate for plan in self.kv) else None

    def begin(self, rows: Sequence[int]) -> None:
        """These rows' prompts come next, whatever a cache may hold of them already."""
        self.select(rows)
        self.pending, self.previous = True, None
        self.layout = self.laid = self.steady = None
        if self.given is None:
            self.lengths = torch.empty(0, dtype=torch.long)

    def select(self, rows: Sequence[int]) -> None:
        """From here on the forward's rows are these rows of the session, in this order."""
        self.selected = torch.tensor(list(rows), device=self.lm.device)
        if self.steady is not None:
            self.steady.forget_rows()
        if self.given is not None:
            self.lengths = self.given[self.selected]

    def __enter__(self) -> "Session":
        turn(self.lm).acquire()
        stack = ACTIVE.setdefault(self.lm.model, [])
        if stack:
            stack[-1].detach()
        try:
            self.attach()
        except BaseException:
            self.detach()
            if stack:
                stack[-1].attach()
            turn(self.lm).release()
            raise
        stack.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack = ACTIVE[self.lm.model]
        inner = stack[-1] is self  # an outer block may be left before an inner one
        try:
            self.detach()
            stack.remove(self)
            if inner and stack:
                stack[-1].attach()
        finally:
            turn(self.lm).release()

    def attach(self) -> None:
        """Put adapters, hooks and the wrapped forward in place."""
        self.exits.enter_context(changed(self.lm, self.weights))
        self.exits.enter_context(activated(self.lm, self.adapters))
        if self.companions.plans:
            self.spoken = self._wrap(self.lm.model, self.speak)
        if self.empty:
            return
        self.original = self._wrap(self.lm.base, self.forward)
        self.names = parameters_of(self.original)
        for layer in self.hooked:
            handle = self.lm.blocks[layer].register_forward_hook(self._hook(layer), prepend=True)
            self.exits.callback(handle.remove)

    def _wrap(self, module: nn.Module, instead: Callable[..., Any]) -> Callable[..., Any]:
        """Put a function in the place of a module's forward until `detach`; the forward that was there."""
        own = vars(module).get("forward")  # accelerate keeps a wrapped forward here
        original: Callable[..., Any] = module.forward
        module.forward = instead

        def restore() -> None:
            del module.forward
            if own is not None:
                module.forward = own

        self.exits.callback(restore)
        return original

    def detach(self) -> None:
        """Take everything out again."""
        self.layout = self.laid = self.steady = None
        self.exits.close()

    def _hook(self, layer: int) -> Any:
        def change(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            plan = self.residual.get(layer)
            hidden = output[0] if isinstance(output, tuple) else output
            if self.decoding and self.steady is not None:
                changed = self.steady.change(layer, hidden)
            elif self.masks is not None and plan is not None:
                changed = plan.change(hidden, self.masks.to(hidden.device), self.chosen(len(hidden)).to(hidden.device))
            else:
                return output
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return change

    def chosen(self, count: int) -> Int[Tensor, " rows"]:
        """For every row of the forward, its number among the session's rows."""
        if self.selected is not None:
            return self.selected
        if self.planned == 1:
            return torch.zeros(count, dtype=torch.long, device=self.lm.device)
        if self.planned != count:
            raise ModelError(
                f"The block holds interventions for {self.planned} rows, but the forward has {count}. Give one a "
                "row, or one for all."
            )
        return torch.arange(count, device=self.lm.device)

    def _seen(self, past: Any) -> int:
        """Tokens of the text that a cache holds; virtual tokens before it do not count."""
        return max(past.get_seq_length() - self.virtual, 0) if past is not None else 0  # an empty cache is falsy

    def speak(self, *args: Any, **kwargs: Any) -> Any:
        """The whole model's forward, its logits changed by those of other models."""
        call = named(parameters_of(self.spoken), args, kwargs)
        past = call.get("past_key_values")
        seen = self._seen(past)  # before the forward fills it
        output = self.spoken(**call)
        return self.companions.change(call, output, seen, self.chosen(len(output.logits)))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, under the interventions in force here."""
        if self.paused:
            return self.original(*args, **kwargs)
        call = named(self.names, args, kwargs) if args else kwargs
        tokens = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        past = call.get("past_key_values")
        if self.steady is not None and self.steady.holds(past, tokens.shape[1]):
            return self._decode(self.steady, call, len(tokens))
        seen = self._seen(past)
        if self.layout is not None and past is self.laid:
            seen -= self.layout.added
        cached = past is not None or wants_cache(call, self.lm)
        text = text_positions(call, seen, *tokens.shape[:2]).to(tokens.device)
        begins = self._note_prompt(call, text, seen, cached)
        if self.gates and begins:
            self._decide(call, text)
        try:
            self.pending |= begins
            if begins:
                self.layout = self.laid = None
            if (self.kv or self.edits) and (self.pending or not cached):
                output = split(self, call, text, seen, cached)
            else:
                output = self.run(dressed(self, call, len(text), seen), text)
        finally:
            self.masks = None
        if cached and not self.edits and not torch.compiler.is_compiling():
            self._settle(past if past is not None else getattr(output, "past_key_values", None), text, seen)
        return output

    def _settle(self, cache: Any, text: Int[Tensor, "rows seq"], seen: Any) -> None:
        """From here on decoding is steady, if all prompts have ended and no row differs from token to token."""
        self.steady = None
        if all(plan.constant for plan in self.residual.values()) and isinstance(seen, int):
            steady = Steady.after(cache, self.virtual + seen + text.shape[1], self.spans)
            if steady is not None and bool((text.amax(1) >= self.lengths - 1).all()):
                self.steady = steady

    def _decode(self, steady: Steady, call: dict[str, Any], count: int) -> Any:
        """One new token a row behind prompts that have all ended."""
        if steady.count != count:
            steady.prepare(self.residual, self.chosen(count))
        self.decoding = True
        try:
            return self.original(**call)
        finally:
            self.decoding = False

    def run(self, call: dict[str, Any], text: Int[Tensor, "rows seq"]) -> Any:
        """The forward that was there before, with the residual interventions at these positions."""
        if self.spans:
            self.masks = torch.stack([span_mask(span, text, self.lengths) for span in self.spans], dim=-1)
        return self.original(**call)

    def _decide(self, call: dict[str, Any], text: Int[Tensor, "rows seq"]) -> None:
        """Ask the gates about each row of this prompt, in a plain forward of its own, and plan for what they said."""
        count = len(text)
        last = text == self.lengths[:, None] - 1
        if not last.any(1).all():
            raise ModelError("A gate reads the last prompt token, and this forward ends before it. Prefill at once.")
        plain = {**call, "past_key_values": None, "use_cache": False, "output_hidden_states": False}
        said = ask(self.lm, self.gates, lambda: self.original(**plain), last)
        chosen = self.selected.tolist() if self.selected is not None else range(count)
        own = self.parts * count if len(self.parts) == 1 else self.parts
        if len(own) <= max(chosen):
            raise ModelError(f"The block holds interventions for {len(own)} rows, but the forward has {count}.")
        answers = {row: {gate: bool(said[gate][place]) for gate in self.gates} for place, row in enumerate(chosen)}
        self._plan([resolved(row, answers.get(number, {})) for number, row in enumerate(own)])

    def _note_prompt(self, call: dict[str, Any], text: Int[Tensor, "rows seq"], seen: int, cached: bool) -> bool:
        """Row lengths of the prompt: given, or those of the first forward on an empty cache; whether it begins here.

        Without any cache every forward starts from nothing; one that repeats the last one's tokens and adds one is its
        continuation.
        """
        if self.given is not None:
            if len(self.lengths) != len(text):
                raise ModelError(
                    f"prompt_lengths has {len(self.lengths)} entries, but the forward has {len(text)} rows."
                )
            return seen == 0
        ids, previous = call.get("input_ids"), self.previous
        self.previous = None if cached else ids
        grown = (
            previous is not None
            and ids is not None
            and ids.shape == (len(previous), previous.shape[1] + 1)
            and torch.equal(ids[:, :-1], previous)
        )
        begins = (seen == 0 and not grown) or len(self.lengths) != len(text)
        if begins:
            self.lengths = text.amax(1) + 1
        return begins


def inherit(lm: LM, rows: Sequence[Intervention | None]) -> list[Intervention | None]:
    """These rows on top of what an enclosing block already applies; one row stands for any number."""
    stack = ACTIVE.get(lm.model)
    outer = stack[-1].rows if stack else [None]
    inner = list(rows)
    if len(outer) != len(inner) and 1 not in (len(outer), len(inner)):
        raise ModelError(
            f"The outer block holds interventions for {len(outer)} rows, the inner one for {len(inner)}. "
            "Give as many, or one for all."
        )
    count = max(len(outer), len(inner))
    outer, inner = (list(side) * count if len(side) == 1 else list(side) for side in (outer, inner))
    return [a if b is None else b if a is None else a + b for a, b in zip(outer, inner, strict=True)]
