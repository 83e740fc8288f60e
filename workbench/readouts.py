"""Look inside a forward pass, changing nothing: what each layer would say, which heads write, where they look.

`logit_lens` reads every layer with the model's own final norm and head (nostalgebraist, 2020, "interpreting GPT: the
logit lens"); `head_attribution` splits a residual state into what each head and MLP wrote (direct logit attribution,
transformer-circuits.pub/2021/framework); `attention_to` shows attention weights; `trace` (in `tracing`) shows where
interventions really acted. All look at one prompt, under whatever interventions are in force. Gradients and patching
are not here.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.interventions import Residual
from workbench.interventions.concept import check_layers
from workbench.interventions.heads import heads_of, units_of
from workbench.models import LM, ModelError
from workbench.tracing import trace
from workbench.turns import in_turn

__all__ = ["attention_to", "head_attribution", "logit_lens", "trace"]

Prompt = str | list[dict[str, str]]
MLP = ("mlp", "feed_forward", "block_sparse_moe")


@in_turn
def logit_lens(lm: LM, prompt: Prompt, layers: Iterable[int] | None = None, top: int = 5) -> pd.DataFrame:
    """What the model would say next if it stopped after each layer: one row a layer, position and rank 1 to `top`.

    token: the prompt's token at `position`; guess, probability: the layer's rank-th most likely next token. final_rank:
    where the layer ranks the token that the whole model puts first. The last layer's row is the model's own output.

    >>> from workbench.models import load_model
    >>> logit_lens(load_model("lab-small"), "2+3=", layers=[0], top=1).columns.tolist()
    ['layer', 'position', 'token', 'rank', 'guess', 'probability', 'final_rank']
    """
    wanted = list(range(len(lm.blocks))) if layers is None else list(layers)
    check_layers(wanted, lm)
    ids = _ids(lm, prompt)
    with torch.no_grad():
        states, output, norm = _states(lm, ids)
        winners = _head(lm, ids, output, output.last_hidden_state).argmax(-1, keepdim=True)
        rows: list[dict[str, Any]] = []
        for layer in wanted:
            hidden = output.last_hidden_state if layer == len(states) - 1 else norm(states[layer])
            logits = _head(lm, ids, output, hidden)
            ranks = 1 + (logits > logits.gather(-1, winners)).sum(-1)
            best = logits.float().softmax(-1).topk(min(top, logits.shape[-1]))
            for position, token in enumerate(ids[0].tolist()):
                guesses = zip(best.indices[position].tolist(), best.values[position].tolist(), strict=True)
                rows += [
                    {
                        "layer": layer, "position": position, "token": _text(lm, token), "rank": rank,
                        "guess": _text(lm, guess), "probability": share, "final_rank": int(ranks[position]),
                    }
                    for rank, (guess, share) in enumerate(guesses, start=1)
                ]  # fmt: skip
    return pd.DataFrame(rows)


@in_turn
def head_attribution(
    lm: LM, prompt: Prompt, direction: Residual | dict[int, Tensor] | Tensor, layer: int
) -> pd.DataFrame:
    """What each part wrote along a unit direction into the last token's residual state after block `layer`.

    One row a part: the embedding, every head, projection bias and MLP of layers 0 to `layer`, and interventions in
    force; their contributions add up to the state's component along the direction. Refuses models whose blocks do
    more than add attention and MLP to the stream (norms behind them as in Gemma or OLMo 2, multipliers as in Granite).

    >>> from workbench.models import load_model
    >>> lm = load_model("lab-small")
    >>> head_attribution(lm, "2+3=", torch.ones(lm.d_model), layer=0).part.unique().tolist()
    ['embedding', 'head', 'mlp']
    """
    check_layers([layer], lm)
    unit = units_of(lm, {layer: direction} if isinstance(direction, Tensor) else direction).get(layer)
    if unit is None:
        raise ModelError(f"There is no direction for layer {layer}. Give one: {{{layer}: vector}}.")
    parts = _last_token(lm, prompt, layer)
    rows: list[tuple[str, int | None, int | None, float]] = []

    def add(part: str, number: int | None, head: int | None, written: Tensor) -> None:
        rows.append((part, number, head, float(written.float().cpu() @ unit)))

    add("embedding", None, None, parts[0]["before"])
    for number in range(layer + 1):
        seen, output = parts[number], heads_of(lm, number)
        heads = seen["heads"].unflatten(0, (output.heads, -1)).float()
        for head, written in enumerate(torch.einsum("dhk,hk->hd", output.weight.float(), heads)):
            add("head", number, head, written)
        bias = getattr(output.module, "bias", None)
        if bias is not None:
            add("attention bias", number, None, bias)
        add("mlp", number, None, seen["mlp"])
        if not torch.equal(seen["after"], seen["raw"]):
            add("intervention", number, None, seen["after"] - seen["raw"])
    table = pd.DataFrame(rows, columns=["part", "layer", "head", "contribution"])
    return table.astype({"layer": "Int64", "head": "Int64"})


@in_turn
def attention_to(lm: LM, prompt: Prompt, position: int) -> pd.DataFrame:
    """How much every head of every layer attends from the last token to one position (negative: from the end).

    Runs the model's plain attention for this call, because fused kernels keep no weights. One row a layer and head;
    layers without attention weights (linear attention) are left out.

    >>> from workbench.models import load_model
    >>> attention_to(load_model("lab-small"), "2+3=", 0).columns.tolist()
    ['layer', 'head', 'position', 'token', 'weight']
    """
    ids = _ids(lm, prompt)
    length = ids.shape[1]
    if not -length <= position < length:
        raise ModelError(f"position={position} of a prompt of {length} tokens: give {-length} to {length - 1}.")
    place = position % length
    found: dict[int, Tensor] = {}

    def hook_of(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for entry in output if isinstance(output, tuple) else ():
                if isinstance(entry, Tensor) and entry.ndim == 4 and entry.shape[-1] == length:
                    found[layer] = entry[0, :, -1, place].float().cpu()

        return hook

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(_plain_attention(lm))
        for layer, block in enumerate(lm.blocks):
            for module in block.modules():
                if "attention" in type(module).__name__.lower():
                    stack.callback(module.register_forward_hook(hook_of(layer)).remove)
        switched = lm.model.config.get_text_config()._attn_implementation == "eager"  # Falcon can't, and must be asked
        lm.base(input_ids=ids, use_cache=False, **({} if switched else {"output_attentions": True}))
    if not found:
        raise ModelError(f"{type(lm.model).__name__} shows no attention weights. Look with head_attribution instead.")
    token = _text(lm, int(ids[0, place]))
    rows = [
        {"layer": layer, "head": head, "position": place, "token": token, "weight": weight}
        for layer, weights in sorted(found.items())
        for head, weight in enumerate(weights.tolist())
    ]
    return pd.DataFrame(rows)


def _ids(lm: LM, prompt: Prompt) -> Int[Tensor, "1 seq"]:
    return torch.tensor([lm.encode(prompt)], device=lm.device)


def _text(lm: LM, token: int) -> str:
    return lm.tokenizer.decode([token])


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _states(lm: LM, ids: Int[Tensor, "1 seq"]) -> tuple[list[Float[Tensor, "1 seq d_model"]], Any, nn.Module]:
    """Every block's output, the output of the model below its head, and the norm between the two.

    The norm is found by a run: the module outside of the blocks that is given the very tensor that the last returned.
    """
    parts: list[list[Tensor]] = [[] for _ in lm.blocks]  # a KV edit runs the prompt in two parts
    found: list[nn.Module] = []
    inside = {id(module) for block in lm.blocks for module in block.modules()}

    def keep(layer: int) -> Callable[..., None]:
        return lambda module, args, output: parts[layer].append(_hidden(output))

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if parts[-1] and any(value is parts[-1][-1] for value in (*args, *kwargs.values())):
            found.append(module)

    with ExitStack() as hooks:
        for layer, block in enumerate(lm.blocks):
            hooks.callback(block.register_forward_hook(keep(layer)).remove)
        for module in lm.base.modules():
            if id(module) not in inside and module is not lm.base:
                hooks.callback(module.register_forward_pre_hook(compare, with_kwargs=True).remove)
        output = lm.base(input_ids=ids, use_cache=False)
    states = [torch.cat(part, dim=1)[:, -ids.shape[1] :] for part in parts]  # a gate runs the prompt once before
    if not found or not torch.allclose(found[0](states[-1]), output.last_hidden_state, rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"{type(lm.model).__name__} does something other than one norm between its last block and its head, so "
            "earlier layers can't be read with it. Look with head_attribution or attention_to instead."
        )
    return states, output, found[0]


def _head(
    lm: LM, ids: Int[Tensor, "1 seq"], output: Any, hidden: Float[Tensor, "1 seq d_model"]
) -> Float[Tensor, "seq vocabulary"]:
    """Logits of normed states from the model's own head, with whatever it does to them (scales, soft caps)."""
    own = vars(lm.base).get("forward")  # a session or accelerate keeps a wrapped forward here
    lm.base.forward = lambda *args, **kwargs: type(output)(last_hidden_state=hidden)
    try:
        return lm.model(input_ids=ids, use_cache=False).logits[0]
    finally:
        del lm.base.forward
        if own is not None:
            lm.base.forward = own


def _last_token(lm: LM, prompt: Prompt, layer: int) -> list[dict[str, Tensor]]:
    """What the last token brought to, and got from, each part of blocks 0 to `layer`; checked to add up."""
    seen: list[dict[str, Tensor]] = [{} for _ in range(layer + 1)]

    def keep(number: int, **names: Callable[[Any, Any, Any], Tensor]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any = None) -> None:
            for name, choose in names.items():
                seen[number][name] = choose(args, kwargs, output)[0, -1].float().clone()

        return hook

    def stream(args: Any, kwargs: dict[str, Any], output: Any) -> Tensor:
        return args[0] if args else kwargs["hidden_states"]

    def result(args: Any, kwargs: dict[str, Any], output: Any) -> Tensor:
        return _hidden(output)

    with ExitStack() as hooks, torch.no_grad():
        for number, block in enumerate(lm.blocks[: layer + 1]):
            mlp = next((child for name, child in block.named_children() if name in MLP), None)
            if mlp is None:
                raise ModelError(f"Layer {number} of {type(lm.model).__name__} has no module named {', '.join(MLP)}.")
            raw, projection = keep(number, raw=result), heads_of(lm, number).module
            for handle in (
                block.register_forward_pre_hook(keep(number, before=stream), with_kwargs=True),
                block.register_forward_hook(raw, with_kwargs=True, prepend=True),  # in front of a session's own
                block.register_forward_hook(keep(number, after=result), with_kwargs=True),
                projection.register_forward_hook(keep(number, heads=stream, attention=result), with_kwargs=True),
                mlp.register_forward_hook(keep(number, mlp=result), with_kwargs=True),
            ):
                hooks.callback(handle.remove)
        lm.base(input_ids=_ids(lm, prompt), use_cache=False)
    close = max(1e-4, 8 * torch.finfo(lm.model.dtype).eps)
    for number, part in enumerate(seen):
        sizes = [part[name].norm() for name in ("before", "attention", "mlp", "raw")]
        if (part["before"] + part["attention"] + part["mlp"] - part["raw"]).norm() > close * max(sizes):
            raise ModelError(
                f"Layer {number} of {type(lm.model).__name__} does more than add attention and MLP to the stream (a "
                "norm behind them, or a multiplier), so heads have no share of their own. Look with logit_lens instead."
            )
    return seen


@contextmanager
def _plain_attention(lm: LM) -> Iterator[None]:
    """The model's plain ("eager") attention for the length of the block, then the one it had."""
    config = lm.model.config
    before = {name: getattr(config, name)._attn_implementation for name in config.sub_configs}
    before[""] = config._attn_implementation
    lm.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        lm.model.set_attn_implementation(before)
