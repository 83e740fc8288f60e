"""Train an adapter to prefer right chains to wrong ones: preference losses on verified pairs, through TRL and PEFT.

With r(y) = log p(y) - log p_ref(y), summed over the answer's tokens, stop token included; y+ right, y- wrong; s(x) the
logistic function; |y| the answer's tokens:

- "dpo": -log s(beta (r(y+) - r(y-))). Direct preference optimization, arXiv 2305.18290, equation 7.
- "dpo-norm": -log s(beta (r(y+)/|y+| - r(y-)/|y-|)). Length-normalised form, arXiv 2411.15124,
  section 5; beta is per token.
- "dpo-sft": the first plus the mean negative log-likelihood of the right answers' tokens in the batch (a constant times
  that of arXiv 2404.19733, equation 2, which averages over each answer first).
- "sft": that second term alone: what the right answers teach without the wrong ones, as a control; beta does nothing.
- "kto": 1 - s(beta (r(y+) - z)) and 1 - s(beta (z - r(y-))), z = max(0, mean r of mismatched answers in the batch).
  Answers count one by one; arXiv 2402.01306, equation 7.

The reference is the adapter that training starts from, frozen, or else the base. Not covered: ORPO and SimPO (TRL 1.16
keeps them among its experiments or not at all). Where pairs come from is in `pairs`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.files import content_key
from workbench.finetuning.adapting import Begin, Job, check_above, settle, train_adapter
from workbench.finetuning.pairs import Pair, Preferences, encode_pairs, single_answers
from workbench.finetuning.recipe import check_least, length_limit
from workbench.interventions.adapter import Adapter
from workbench.synthesis.records import RecordError

if TYPE_CHECKING:
    from workbench.models import LM

Method = Literal["dpo", "dpo-norm", "dpo-sft", "kto", "sft"]
LOSSES: dict[str, dict[str, float]] = {  # TRL's loss types with weights
    "dpo": {"sigmoid": 1.0}, "dpo-norm": {"sigmoid_norm": 1.0}, "dpo-sft": {"sigmoid": 1.0, "sft": 1.0},
    "sft": {"sft": 1.0},
}  # fmt: skip
BETA = {
    "dpo": 0.1,
    "dpo-norm": 5.0,
    "dpo-sft": 0.1,
    "kto": 0.1,
    "sft": 0.1,
}  # dpo-norm: as in arXiv 2411.15124, others as in TRL
CURVE = {
    "epoch": "epoch", "rewards/chosen": "reward_chosen", "rewards/rejected": "reward_rejected",
    "rewards/margins": "margin", "rewards/accuracies": "pairs_ranked", "kl": "kl", "entropy": "entropy",
    "num_tokens": "tokens",
}  # fmt: skip


@dataclass(frozen=True)
class PreferenceRecipe:
    """Everything, besides base, pairs and the adapter's shape, that the result depends on."""

    method: str
    beta: float
    epochs: float
    learning_rate: float
    batch_size: int
    accumulation: int
    max_length: int
    warmup: float
    seed: int
    save_steps: int


def prefer(
    lm: "LM",
    pairs: Preferences | Sequence[Pair],
    out: str | Path,
    method: Method = "dpo",
    *,
    start: Adapter | None = None,
    rank: int | None = None, alpha: float | None = None, targets: str | list[str] | None = None,
    beta: float | None = None,
    epochs: float = 1, learning_rate: float | None = None, warmup: float = 0.05,
    batch_size: int = 16, accumulation: int = 1,
    max_length: int | None = None,
    quantization: Literal["auto", "nf4", "none"] = "auto",
    seed: int = 0,
    save_steps: int = 25,
) -> Adapter:  # fmt: skip
    """Train a LoRA adapter on pairs and write it to the folder `out`, as `finetune` does; returns the adapter.

    Args:
        method: the loss; formulas above.
        start: an adapter to go on from, which is then also the frozen reference; else a new adapter (rank 16, alpha
            twice the rank, all linear layers) is trained on the base, and the base is the reference.
        beta: how strongly the reference holds (default: `BETA` of the method).
        learning_rate: default a tenth of what `finetune` takes for this size (printed).
        batch_size: pairs a forward pass (for "kto", twice as many answers); `accumulation` passes make a step.
        max_length: pairs with a longer answer and prompt, in tokens, are left out and counted (default: the context).

    losses.jsonl has a line a step: loss, mean implicit rewards beta r of right and wrong answers and their margin,
    share of pairs ranked right, entropy and tokens; for "kto" kl instead of the share.

    Raises RecordError for pairs that can't be encoded and ValueError for contradictory settings.
    """
    begin = settle(
        lm, out, start, rank=rank, alpha=alpha, targets=targets, quantization=quantization, learning_rate=learning_rate
    )
    recipe = PreferenceRecipe(
        method, BETA.get(method, 0.0) if beta is None else beta, epochs, begin.learning_rate, batch_size, accumulation,
        length_limit(lm, max_length, 2048), warmup, seed, save_steps,
    )  # fmt: skip
    _check(recipe)
    if not len(pairs):
        raise RecordError("There are no pairs to learn from. Make some with preference_pairs(data).")
    return _run(begin, pairs, recipe)


def _run(begin: Begin, pairs: Preferences | Sequence[Pair], recipe: PreferenceRecipe) -> Adapter:
    rows = pairs.pairs if isinstance(pairs, Preferences) else list(pairs)
    encoded, left_out = encode_pairs(begin.lm, rows, recipe.max_length)
    longest = max(len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in encoded)
    used: dict[str, Any] = {"used": len(encoded), "left_out": left_out}
    if isinstance(pairs, Preferences):
        used["questions"] = pairs.counts
    key = content_key(pairs=[asdict(pair) for pair in rows])
    told = {"pairs": f"{len(encoded)}, {left_out} left out as too long", "reference": begin.reference}
    job = Job("prefer", key, recipe, 2 * recipe.batch_size * longest, CURVE, told, used)

    def make(model: Any, tokenizer: Any, lora: Any, checkpoints: Path, checkpointing: bool) -> Any:
        from workbench.finetuning import alignment

        common = alignment.arguments(model, checkpoints, checkpointing, recipe)
        common |= alignment.passes(recipe)
        if recipe.method == "kto":
            single = single_answers(encoded, 2 * recipe.batch_size, recipe.seed)
            return alignment.make_kto(model, tokenizer, lora, single, common)
        return alignment.make_dpo(model, tokenizer, lora, encoded, common, LOSSES[recipe.method])

    return train_adapter(begin, job, make)


def _check(recipe: PreferenceRecipe) -> None:
    if recipe.method not in BETA:
        raise ValueError(f"method={recipe.method!r} is not known. Choose one of {', '.join(BETA)}.")
    check_least(recipe, batch_size=1, accumulation=1, max_length=2, save_steps=1)
    check_above(recipe, "beta", "epochs", "learning_rate")
    if not 0 <= recipe.warmup < 1:
        raise ValueError(f"warmup={recipe.warmup} is a share: give a number from 0 to 1.")
