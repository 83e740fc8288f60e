"""What a fine-tune trains: LoRA and its kin, virtual tokens before the text, or all weights.

lora     low-rank matrices beside the linear layers (arXiv 2106.09685); over 4-bit weights: QLoRA (arXiv 2305.14314)
rslora   the same, scaled by alpha / sqrt(rank), so that a larger rank does not learn more slowly (arXiv 2312.03732)
dora     low rank for the direction of each weight column, a number of its own for its length (arXiv 2402.09353)
prompt   embeddings before the text (prompt tuning, arXiv 2104.08691)
prefix   keys and values of every layer before the text (prefix tuning, arXiv 2101.00190), without the paper's MLP
full     every weight; the result is a model folder, not an adapter

All but the last through PEFT 0.21. Here are their settings, defaults and contradictions; the training is in `trainer`.
"""

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from workbench.files import sha256
from workbench.interventions.virtual import check_plain_cache

if TYPE_CHECKING:
    from workbench.finetuning.memory import Plan
    from workbench.finetuning.recipe import Recipe
    from workbench.interventions import Adapter
    from workbench.models import LM

Method = Literal["lora", "qlora", "rslora", "dora", "prompt", "prefix", "full"]
LOW_RANK = ("lora", "rslora", "dora")
VIRTUAL = ("prompt", "prefix")
BYTES = 16  # a trained number: float32 value, gradient and two Adam moments
RATES = {"full": 0.1, "prompt": 25.0, "prefix": 10.0}  # times LoRA's rate; the papers' own: 0.3 with Adafactor, 5e-5


def settle_method(method: str, quantization: str) -> tuple[str, str]:
    """Method and quantisation as they are run: QLoRA is LoRA over 4-bit weights. Refuses contradictions by name."""
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is not known. Choose one of: {', '.join(get_args(Method))}.")
    if method == "qlora" and quantization == "none":
        raise ValueError("method='qlora' trains over 4-bit weights, but quantization='none'. Use method='lora'.")
    if method == "full" and quantization == "nf4":
        raise ValueError(
            "method='full' trains all weights, but quantization='nf4' would freeze them in 4 bits. Use "
            "quantization='none', or method='lora' over 4-bit weights."
        )
    return ("lora", "nf4") if method == "qlora" else (method, "none" if method == "full" else quantization)


def check_method(lm: "LM", recipe: "Recipe") -> None:
    """Raise ValueError (or ModelError, which is one) for settings that this method or model has no use for."""
    if recipe.method not in LOW_RANK:
        given = {"targets": recipe.targets != "all-linear", "dropout": recipe.dropout != 0}
        for name in [name for name, wrong in given.items() if wrong]:
            raise ValueError(
                f"{name}={getattr(recipe, name)!r} belongs to LoRA and has no meaning with method={recipe.method!r}. "
                f"Leave {name} out, or use method='lora'."
            )
    if recipe.method == "full" and getattr(lm.model, "is_loaded_in_4bit", False):
        raise ValueError(
            f"method='full' trains all weights, but {lm.name!r} is loaded with quantization='nf4'. Load it with "
            "quantization=None."
        )
    if recipe.method in VIRTUAL:
        if recipe.virtual_tokens < 1:
            raise ValueError(f"virtual_tokens={recipe.virtual_tokens} is too small: give 1 or more.")
        check_plain_cache(lm)


def default_rate(method: str, rate: float, reason: str) -> tuple[float, str]:
    """The learning rate of a method, from LoRA's for the same model.

    >>> default_rate("full", 2e-4, "0.0002: QLoRA's rate")
    (2e-05, "2e-05: 0.1 times LoRA's, because method='full' (LoRA's is 0.0002: QLoRA's rate)")
    """
    factor = RATES.get(method, 1.0)
    if factor == 1.0:
        return rate, reason
    own = float(f"{rate * factor:.6g}")
    return own, f"{own:g}: {factor:g} times LoRA's, because method={method!r} (LoRA's is {reason})"


def peft_config(model: Any, recipe: "Recipe") -> Any:
    """PEFT's configuration of the method; None where all weights are trained."""
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig

    if recipe.method == "prompt":
        return PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=recipe.virtual_tokens, prompt_tuning_init="SAMPLE_VOCAB"
        )
    if recipe.method == "prefix":
        config = model.config.get_text_config()
        heads, width = _cache_shape(config)
        return PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=recipe.virtual_tokens, num_layers=config.num_hidden_layers,
            num_attention_heads=heads, token_dim=heads * width, encoder_hidden_size=config.hidden_size,
        )  # fmt: skip
    if recipe.method == "full":
        return None
    return LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, bias="none", task_type="CAUSAL_LM",
        target_modules=recipe.targets, use_rslora=recipe.method == "rslora", use_dora=recipe.method == "dora",
    )  # fmt: skip


def fit_plan(planned: "Plan", model: Any, recipe: "Recipe") -> "Plan":
    """The plan of a LoRA adapter, with the numbers that this method trains in its place."""
    config = model.config.get_text_config()
    if recipe.method in ("lora", "rslora"):
        return planned
    trained = planned.adapter_parameters
    if recipe.method == "dora":
        trained = planned.adapter_parameters + _outputs(model, recipe.targets)
    elif recipe.method == "prompt":
        trained = recipe.virtual_tokens * int(model.get_input_embeddings().weight.shape[1])
    elif recipe.method == "prefix":
        heads, width = _cache_shape(config)
        trained = recipe.virtual_tokens * 2 * int(config.num_hidden_layers) * heads * width
    elif recipe.method == "full":
        trained = model.num_parameters()
    need = planned.bytes_needed + BYTES * (trained - planned.adapter_parameters)
    planned = replace(planned, adapter_parameters=trained, bytes_needed=need)
    if recipe.method != "prefix":
        return planned
    # a checkpointed layer runs again in the backward pass, and would find the cache already filled
    reasons = {**planned.reasons, "checkpointing": "off: method='prefix' keeps a cache, which it would fill twice"}
    return replace(planned, checkpointing=False, reasons=reasons)


def packing_reason(method: str) -> str | None:
    """Why a method can't be packed, or None."""
    if method in VIRTUAL:
        return (
            f"off: method={method!r} puts virtual tokens before a row, and of several records packed into it only the "
            "first would stand right behind them"
        )
    return None


def trainable(model: Any, recipe: "Recipe", start: "Adapter | None") -> tuple[Any, Any]:
    """The model with what is trained in it, and PEFT's configuration where the trainer has still to put it there."""
    if start is not None and recipe.method in VIRTUAL:  # PEFT loads virtual tokens only to apply them
        from peft import get_peft_model
        from safetensors.torch import load_file

        wrapped = get_peft_model(model, peft_config(model, recipe))
        learnt = load_file(start.path / "adapter_model.safetensors")["prompt_embeddings"]
        wrapped.prompt_encoder["default"].embedding.weight.data.copy_(learnt)
        return wrapped, None
    if start is not None:
        from peft import PeftConfig, PeftModel

        config: Any = PeftConfig.from_pretrained(str(start.path))
        config.lora_dropout = recipe.dropout  # what is asked for now, not what the start was trained with
        return PeftModel.from_pretrained(model, str(start.path), is_trainable=True, config=config), None
    if recipe.method == "full":
        model.requires_grad_(True)
        return model, None
    return model, peft_config(model, recipe)


def goes_on_from(lm: "LM", recipe: "Recipe", start: "Adapter") -> "Recipe":
    """The recipe with the shape of the adapter that it goes on from; refuses one of another method."""
    start.check(lm)
    config = json.loads((start.path / "adapter_config.json").read_text(encoding="utf-8"))
    low_rank = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    method = {"PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}.get(config["peft_type"], low_rank)
    if method != recipe.method:
        raise ValueError(
            f"start={str(start.path)!r} was trained with method={method!r}, but method={recipe.method!r} is asked for. "
            f"Give method={method!r} to go on with it, or leave start out."
        )
    if start.strength != 1:
        raise ValueError(f"start has the strength {start.strength}: training goes on from an adapter at strength 1.")
    weights = sha256(start.path / "adapter_model.safetensors")
    if method in VIRTUAL:
        return replace(recipe, start=weights, virtual_tokens=int(config["num_virtual_tokens"]))
    targets = sorted(config["target_modules"])  # PEFT writes the names that "all-linear" stood for, in any order
    return replace(recipe, start=weights, rank=config["r"], alpha=config["lora_alpha"], targets=targets)


def _cache_shape(config: Any) -> tuple[int, int]:
    """Key-value heads of a layer and the width of one."""
    heads = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(heads or config.num_attention_heads), int(width)


def _outputs(model: Any, targets: str | list[str]) -> int:
    """Output widths of the adapted layers: DoRA learns a length for each."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    chosen = [
        m for name, m in layers if "lm_head" not in name and (targets == "all-linear" or name.split(".")[-1] in targets)
    ]
    return sum(int(m.nf if isinstance(m, Conv1D) else m.out_features) for m in chosen)
