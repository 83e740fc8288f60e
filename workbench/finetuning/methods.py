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
from workbench.interventions.virtual import cache_shape, check_plain_cache

if TYPE_CHECKING:
    from workbench.finetuning.memory import Plan
    from workbench.finetuning.recipe import Recipe
    from workbench.interventions import Adapter
    from workbench.models import LM

Method = Literal["lora", "qlora", "rslora", "dora", "prompt", "prefix", "full"]
LOW_RANK = ("lora", "rslora", "dora")
VIRTUAL = ("prompt", "prefix")
# Times LoRA's rate: the best of those tried with the lab model on tuning questions (docs/log.md). The papers have 0.3
# with Adafactor for prompts and 5e-5 for prefixes. rsLoRA scales its update by the root of the rank more than LoRA.
RATES = {"full": 0.1, "prompt": 25.0, "prefix": 100.0, "rslora": 0.3}


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
        heads, width = cache_shape(config)
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
    from workbench.finetuning.memory import ADAPTER_BYTES, linear_layers, widths

    config = model.config.get_text_config()
    trained = planned.adapter_parameters
    if recipe.method == "dora":  # learns a length for each output
        trained += sum(widths(layer)[1] for layer in linear_layers(model, recipe.targets)[0])
    elif recipe.method == "prompt":
        trained = recipe.virtual_tokens * int(model.get_input_embeddings().weight.shape[1])
    elif recipe.method == "prefix":
        heads, width = cache_shape(config)
        trained = recipe.virtual_tokens * 2 * int(config.num_hidden_layers) * heads * width
    elif recipe.method == "full":
        trained = model.num_parameters()
    parts = {**planned.parts, "adapter": ADAPTER_BYTES * trained}
    reasons = dict(planned.reasons)
    if not checkpoints(recipe.method):
        reasons["checkpointing"] = "off: method='prefix' keeps a cache, which it would fill twice"
    return replace(planned, adapter_parameters=trained, parts=parts, bytes_needed=sum(parts.values()), reasons=reasons)


def checkpoints(method: str) -> bool:
    """Whether activations can be made anew: with prefix tuning a layer's second run would find its cache filled."""
    return method != "prefix"


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


def start_settings(lm: "LM", start: "Adapter") -> dict[str, Any]:
    """PEFT's settings of an adapter to go on from; raises ValueError for one that is scaled or of another model."""
    start.check(lm)
    if start.strength != 1:
        raise ValueError(
            f"start has strength {start.strength:g}; training goes on from the adapter as it was saved. Pass "
            f"Adapter({str(start.path)!r})."
        )
    config: dict[str, Any] = json.loads((start.path / "adapter_config.json").read_text(encoding="utf-8"))
    if isinstance(config.get("target_modules"), list):  # PEFT writes the names that "all-linear" stood for in any order
        config["target_modules"].sort()
    return config


def goes_on_from(lm: "LM", recipe: "Recipe", start: "Adapter") -> "Recipe":
    """The recipe with the shape of the adapter that it goes on from; refuses one of another method."""
    config = start_settings(lm, start)
    low_rank = "dora" if config.get("use_dora") else "rslora" if config.get("use_rslora") else "lora"
    method = {"PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}.get(config["peft_type"], low_rank)
    if method != recipe.method:
        raise ValueError(
            f"start={str(start.path)!r} was trained with method={method!r}, but method={recipe.method!r} is asked for. "
            f"Give method={method!r} to go on with it, or leave start out."
        )
    weights = sha256(start.path / "adapter_model.safetensors")
    if method in VIRTUAL:
        return replace(recipe, start=weights, virtual_tokens=int(config["num_virtual_tokens"]))
    shape = {"rank": config["r"], "alpha": config["lora_alpha"], "targets": config["target_modules"]}
    return replace(recipe, start=weights, **shape)
