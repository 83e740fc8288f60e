"""What a fine-tune is asked to do: its settings, their defaults and contradictions, and the records that it reads."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.files import content_key
from workbench.finetuning.methods import VIRTUAL, check_method, default_rate, goes_on_from, settle_method
from workbench.synthesis.records import Data, Record, RecordError, check_record, load_data

if TYPE_CHECKING:
    from workbench.interventions.adapter import Adapter
    from workbench.models import LM


@dataclass(frozen=True)
class Recipe:
    """Everything, besides base and records, that the result depends on, and how it is run."""

    rank: int
    alpha: int
    targets: str | list[str]
    epochs: float
    learning_rate: float
    batch_tokens: int
    batch_size: int
    max_length: int
    quantization: str
    packing: bool
    dropout: float
    warmup: float
    seed: int
    save_steps: int
    method: str = "lora"
    virtual_tokens: int = 20
    start: str | None = None  # SHA-256 of the adapter that this one goes on from
    order: str = "shuffled"
    checkpointing: bool | None = None

    def settings(self) -> dict[str, Any]:
        """What the result depends on; later fields only where they were used, so that older folders stay finished."""
        later = {"method": "lora", "virtual_tokens": 20, "start": None, "order": "shuffled"}
        how = ("save_steps", "checkpointing")  # neither how often it is saved nor what is recomputed changes the end
        return {
            name: value for name, value in asdict(self).items() if name not in how and later.get(name, self) != value
        }


def make_recipe(lm: "LM", start: "Adapter | None", until: float, **asked: Any) -> tuple[Recipe, str]:
    """What `finetune` is asked for with all that follows from the model filled in, and why this learning rate.

    asked: all fields of `Recipe` but `start`, where alpha, learning_rate and max_length may be None. Raises ValueError
    for numbers that can't be, contradictions, and methods that the model can't be trained by.
    """
    method, quantization = settle_method(asked["method"], asked["quantization"])
    rate, reason = rate_for(lm, asked["learning_rate"], method)
    settled = {
        "alpha": 2 * asked["rank"] if asked["alpha"] is None else asked["alpha"],
        "learning_rate": rate,
        "max_length": length_limit(lm, asked["max_length"], asked["batch_tokens"]),
        "quantization": quantization,
        "method": method,
        "virtual_tokens": asked["virtual_tokens"] if method in VIRTUAL else 20,
    }
    recipe = Recipe(**{**asked, **settled})
    recipe = recipe if start is None else goes_on_from(lm, recipe, start)
    check(recipe, until)
    check_method(lm, recipe)
    return recipe, reason


def check(recipe: Recipe, until: float) -> None:
    """Raise ValueError for numbers that can't be."""
    check_least(recipe, rank=1, alpha=1, batch_tokens=1, batch_size=1, max_length=2, save_steps=1)
    if recipe.epochs <= 0 or recipe.learning_rate <= 0:
        raise ValueError(f"epochs={recipe.epochs} and learning_rate={recipe.learning_rate} must both be above 0.")
    if not 0 <= recipe.dropout < 1 or not 0 <= recipe.warmup < 1:
        raise ValueError(f"dropout={recipe.dropout} and warmup={recipe.warmup} are shares: give numbers from 0 to 1.")
    if recipe.quantization not in ("auto", "nf4", "none"):
        raise ValueError(f"quantization={recipe.quantization!r} is not known. Choose 'auto', 'nf4' or 'none'.")
    if not 0 < until <= 1:
        raise ValueError(f"until={until} is no share of the steps: give a number above 0 and at most 1.")
    if until < 1 and recipe.method == "full":
        raise ValueError(f"until={until} pauses with an adapter, and method='full' makes none. Leave until out.")
    if recipe.order not in ("shuffled", "given"):
        raise ValueError(f"order={recipe.order!r} is not known. Choose 'shuffled' or 'given'.")
    if recipe.order == "given" and recipe.packing:
        raise ValueError(
            "order='given' keeps the records' order, and packing=True puts them where they fit. Pass packing=False."
        )


def check_least(recipe: Any, **least: float) -> None:
    """Raise ValueError for a number of `recipe` that is below its least value here."""
    for name, limit in least.items():
        if getattr(recipe, name) < limit:
            raise ValueError(f"{name}={getattr(recipe, name)} is too small: give {limit} or more.")


def length_limit(lm: "LM", asked: int | None, otherwise: int) -> int:
    """Tokens that a record may have: as asked for, at most the model's context (`otherwise` where it says none)."""
    context = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None) or otherwise
    return context if asked is None else min(asked, context)


def kept_records(data: Data | str | Path | list[Record]) -> tuple[list[Record], str]:
    """The records to learn from and where they are from; raises RecordError when there are none."""
    if isinstance(data, list):
        kept = [check_record(record, f"record {number}") for number, record in enumerate(data, start=1)]
        kept, where = [record for record in kept if record.get("kept", True)], "the given list"
        total = len(data)
    else:
        data = data if isinstance(data, Data) else load_data(data)
        kept, where, total = data.kept, str(data.folder), len(data)
    if not kept:
        raise RecordError(
            f"{where} holds no record to train on ({total} records, 0 kept). Look at the reasons in card.md; ask more "
            "questions (n=), allow more samples, or choose a strategy that the model gets right."
        )
    return kept, where


def records_key(records: list[Record]) -> str:
    """A key of what is learnt: the messages and, where there are any, what is given of the answers and the phases."""
    more = {name: [record.get(name) for record in records] for name in ("given", "phase")}
    used = {name: values for name, values in more.items() if any(values)}
    return content_key(messages=[record["messages"] for record in records], **used)


def rate_for(lm: "LM", given: float | None, method: str = "lora") -> tuple[float, str]:
    """The learning rate and why: LoRA bears about ten times that of all weights, and small models more than large."""
    if given is not None:
        return given, f"{given:g}: asked for"
    size = lm.model.num_parameters()
    for limit, rate in ((50e6, 2e-3), (1e9, 5e-4)):
        if size < limit:
            return default_rate(method, rate, f"{rate:g}: {size / 1e6:.3g}M parameters, fewer than {limit / 1e6:g}M")
    return default_rate(method, 2e-4, f"0.0002: {size / 1e9:.2g}B parameters, QLoRA's rate for models of this size")
