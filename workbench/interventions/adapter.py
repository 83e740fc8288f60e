"""An adapter as an intervention: active while applied, gone afterwards (PEFT).

Covers LoRA (arXiv 2106.09685) and its kin rsLoRA and DoRA (arXiv 2402.09353), and the virtual tokens of prompt and
prefix tuning (see `virtual`). Reads adapters that `peft` saved as safetensors; does not train or merge them.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from workbench.interventions.concept import Intervention
from workbench.interventions.virtual import KINDS, check_virtual, prefixed, virtual_tokens
from workbench.models import LM, ModelError


@dataclass(frozen=True)
class Adapter(Intervention):
    """A folder that peft's `save_pretrained` wrote; `strength` multiplies the adapter's own scaling."""

    path: Path
    strength: float = 1.0

    def __post_init__(self) -> None:
        folder = Path(self.path).expanduser().resolve()
        object.__setattr__(self, "path", folder)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / name).is_file():
                raise ModelError(
                    f"{folder} is not an adapter: {name} is missing. Save one with peft's save_pretrained(FOLDER)."
                )

    def scale(self, factor: float) -> "Adapter":
        return replace(self, strength=self.strength * factor)

    def rebind(self, lm: LM) -> "Adapter":
        return replace(self)

    @property
    def virtual(self) -> int:
        """How many virtual tokens stand before the text while this is applied; 0 for LoRA."""
        return virtual_tokens(self.path)

    def check(self, lm: LM) -> None:
        config = json.loads((self.path / "adapter_config.json").read_text(encoding="utf-8"))
        kind, bias = config.get("peft_type"), config.get("bias", "none")
        if kind not in ("LORA", *KINDS) or bias != "none":
            said = f"trained the model's own biases (bias={bias!r})" if kind == "LORA" else f"is a {kind} adapter"
            raise ModelError(
                f"{self.path} {said}; only adapters beside the weights (LORA, {', '.join(KINDS)}) can be applied and "
                "taken off exactly."
            )
        whole = [name for name in ("modules_to_save", "trainable_token_indices") if config.get(name)]
        fixed = f"replaces whole parts of the model ({', '.join(whole)})" if whole else ""
        if config.get("use_dora"):
            fixed = "is a DoRA adapter, whose change of the weights is not in proportion to its scaling"
        elif kind in KINDS:
            fixed = f"puts {self.virtual} virtual tokens before the text, which are there or not"
        if fixed and self.strength not in (0.0, 1.0):
            raise ModelError(
                f"{self.path} {fixed}, so it can't be scaled; got strength {self.strength}. Use it at strength 1."
            )
        if kind in KINDS:
            check_virtual(lm, self.path)


@contextmanager
def activated(lm: LM, adapters: Sequence[Adapter]) -> Iterator[None]:
    """Adapters in the model for the length of the block; the original layers come back as the same objects."""
    layers = [adapter for adapter in adapters if not adapter.virtual]
    before = [adapter for adapter in adapters if adapter.virtual]
    if len(before) > 1:
        names = " and ".join(str(adapter.path) for adapter in before)
        raise ModelError(f"{names} both put virtual tokens before the text. Apply one of them at a time.")
    with ExitStack() as exits:
        if layers:
            exits.enter_context(restored(lm.model))
            with _packing_kept(lm.model), quiet_peft():
                _inject(lm, layers)
        for adapter in before:
            exits.enter_context(prefixed(lm, adapter.path))
        yield


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Leave out warnings that say nothing to a user of this package.

    PEFT 0.21 and TRL 1.16 use transformers' old name of activation checkpointing; PEFT corrects the orientation of
    GPT-2's layers by itself; and it says of an adapter with a bias that it can't be merged, which nothing here does.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False", category=UserWarning)
        warnings.filterwarnings("ignore", message=".lora_bias=True. was passed but the targeted layer")
        yield


def _inject(lm: LM, adapters: Sequence[Adapter]) -> None:
    from peft import PeftModel  # here, because it takes a second and wakes bitsandbytes
    from peft.tuners.lora import LoraLayer

    wrapped: Any = None
    names = [f"adapter{number}" for number in range(len(adapters))]
    for name, adapter in zip(names, adapters, strict=True):
        try:
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(lm.model, str(adapter.path), adapter_name=name)
            else:
                wrapped.load_adapter(str(adapter.path), adapter_name=name)
        except (RuntimeError, ValueError, KeyError) as error:
            first = " ".join(str(error).split())[:300]
            raise ModelError(
                f"The adapter {adapter.path} does not fit {lm.name!r}. Use the model it was trained on "
                f"(base_model_name_or_path in its adapter_config.json). The library said: {first}"
            ) from None
        for module in wrapped.modules():
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.scaling[name] *= adapter.strength
    wrapped.base_model.set_adapter(names, inference_mode=True)
    lm.model.eval()


@contextmanager
def _packing_kept(model: nn.Module) -> Iterator[None]:
    """Keep 4-bit weights as they are while PEFT loads.

    PEFT asks for a state dict, and for each of those bitsandbytes on a CPU unpacks its weights and rounds their
    double-quantised scales anew: without this they drift with every load.
    """
    kept = []
    for weight in model.parameters():
        state = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            kept.append((weight, weight.data, state, dict(vars(state))))
    try:
        yield
    finally:
        for weight, data, state, values in kept:
            weight.data = data
            vars(state).clear()
            vars(state).update(values)


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Give every module its own children, flags and attributes back, also after a load that failed half-way."""
    children = [(module, dict(module._modules), module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = dict(vars(model))
    try:
        yield
    finally:
        for module, own, training in children:
            module._modules.clear()
            module._modules.update(own)
            module.training = training
        for parameter, needed in gradients:
            parameter.requires_grad_(needed)
        for name in set(vars(model)) - set(attributes):
            delattr(model, name)
