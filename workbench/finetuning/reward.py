"""Train an adapter on the model's own answers, rewarded by the task's verifier: GRPO and its kin through TRL.

A step asks some questions, several times each, and raises the likelihood of answers with more reward than their
question's mean. With A the advantage, p the policy, G answers a question; every step uses fresh answers once, so the
ratio to the policy that sampled is 1 and clipping never acts:

- "grpo": A = (R - mean) / (std + 1e-4) over the question's answers; mean over an answer's tokens, then over answers.
  arXiv 2402.03300, equations 3 and 21; its KL term (k3 estimator) has the weight `beta`, 0 unless asked for.
- "dr-grpo": A = R - mean; the sum over tokens divided by answers times `max_new_tokens`. arXiv 2503.20783, section 3.2.
- "dapo": grpo's A; the mean over all tokens of the step. arXiv 2503.14476, equation 8, without its other changes.

Rewards judge all answers to one question together, in the main thread (math-verify sets alarms). Not covered: learnt
reward models, several updates on the same answers, servers for generation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.files import content_key
from workbench.finetuning.adapting import Begin, Job, settle, train_adapter
from workbench.finetuning.recipe import check_least
from workbench.interventions.adapter import Adapter
from workbench.synthesis.stages import described, plain

if TYPE_CHECKING:
    from workbench.models import LM
    from workbench.prompts import Strategy
    from workbench.tasks import Task

METHODS = {"grpo": ("grpo", "group"), "dr-grpo": ("dr_grpo", "none"), "dapo": ("dapo", "group")}  # TRL's loss, scale
CURVE = {
    "reward": "reward", "reward_std": "reward_std", "right": "right", "unparsed": "unparsed",
    "completions/mean_length": "length", "cut_off": "cut_off", "entropy": "entropy", "kl": "kl",
    "frac_reward_zero_std": "questions_without_signal", "sampled_tokens": "sampled_tokens", "num_tokens": "tokens",
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """A sampled answer as a reward sees it. correct: verified and ended by a stop token; tokens include that one."""

    text: str
    correct: bool
    parsed: bool
    tokens: int
    finished: bool


Reward = Callable[[Sequence[Answer]], list[float]]


def right(group: Sequence[Answer]) -> list[float]:
    """1 for a verified and finished answer, else 0.

    >>> right([Answer("4", True, True, 2, True), Answer("5", False, True, 2, True)])
    [1.0, 0.0]
    """
    return [float(answer.correct) for answer in group]


def parsed(group: Sequence[Answer], penalty: float = 0.5) -> list[float]:
    """1 for right, 0 for wrong, -penalty where no answer could be read or it was cut off."""
    return [float(each.correct) if each.parsed and each.finished else -penalty for each in group]


def short(group: Sequence[Answer], weight: float = 0.5) -> list[float]:
    """1 for right plus weight times the length reward of Kimi k1.5 (arXiv 2501.12599, section 2.3.3).

    With lengths between `low` and `high` among the question's answers, l = 0.5 - (tokens - low) / (high - low); a right
    answer gets l, a wrong one min(0, l); all get 0 where the lengths are equal. So short right answers gain, long ones
    lose, and a wrong answer never gains by being short.

    >>> short([Answer("4", True, True, 2, True), Answer("2+2=4", True, True, 6, True)])
    [1.25, 0.75]
    """
    low, high = min(each.tokens for each in group), max(each.tokens for each in group)
    rewards = []
    for each in group:
        bonus = 0.0 if low == high else 0.5 - (each.tokens - low) / (high - low)
        rewards.append(float(each.correct) + weight * (bonus if each.correct else min(0.0, bonus)))
    return rewards


REWARDS: dict[str, Reward] = {"right": right, "parsed": parsed, "short": short}


@dataclass(frozen=True)
class RewardRecipe:
    """Everything, besides base, questions and the adapter's shape, that the result depends on."""

    method: str
    steps: int
    questions: int
    answers: int
    max_new_tokens: int
    temperature: float
    beta: float
    top_entropy: float
    learning_rate: float
    batch_size: int
    warmup: float
    seed: int
    save_steps: int


def reinforce(
    lm: "LM",
    task: "Task",
    out: str | Path,
    method: Literal["grpo", "dr-grpo", "dapo"] = "grpo",
    *,
    reward: str | Reward = "right",
    start: Adapter | None = None,
    rank: int | None = None, alpha: float | None = None, targets: str | list[str] | None = None,
    steps: int = 40, questions: int = 8, answers: int = 8,
    n: int | None = None, split: str = "train", strategy: "Strategy | None" = None,
    max_new_tokens: int = 256, temperature: float = 1.0,
    beta: float = 0.0, top_entropy: float = 1.0, batch_size: int | None = None,
    learning_rate: float | None = None, warmup: float = 0.0, seed: int = 0, save_steps: int = 10,
    quantization: Literal["auto", "nf4", "none"] = "auto",
) -> Adapter:  # fmt: skip
    """Train a LoRA adapter by reward and write it to the folder `out`, as `finetune` does; returns the adapter.

    Args:
        reward: "right", "parsed", "short", or a function (a `functools.partial` of one) of all answers to a question.
        start: an adapter to go on from; with `beta` above 0 also the reference. Else a new one on the base.
        steps, questions, answers: updates, questions a step, answers a question (all sampled at `temperature`).
        n: different questions, drawn from `split` with `seed` (default: a new one each time); they are asked in turn.
        strategy: how questions are put; default: alone, so that the adapter needs no cue afterwards.
        top_entropy: share of the step's tokens, those with the highest entropy, that the loss looks at: 0.2 in arXiv
            2506.01939; 1.0 for all.
        batch_size: answers a forward and backward pass; default all of a step. It must divide a step into whole passes.

    losses.jsonl has a line a step: loss, mean reward, share right, unparsed and cut off, mean tokens, entropy in nats,
    kl (with `beta`), the share of questions whose answers all got the same reward, and tokens sampled.

    Raises ValueError for contradictory settings.
    """
    begin = settle(
        lm, out, start, rank=rank, alpha=alpha, targets=targets, quantization=quantization, learning_rate=learning_rate
    )
    size = questions * answers if batch_size is None else batch_size
    recipe = RewardRecipe(
        method, steps, questions, answers, max_new_tokens, temperature, beta, top_entropy, begin.learning_rate, size,
        warmup, seed, save_steps,
    )  # fmt: skip
    judge = _reward(reward)
    _check(recipe)
    asked = task.rows(split, n=_asked(n, recipe), seed=seed)
    return _run(begin, task, asked, strategy, judge, recipe)


def _run(
    begin: Begin,
    task: "Task",
    asked: list[dict[str, Any]],
    strategy: "Strategy | None",
    judge: Reward,
    recipe: RewardRecipe,
) -> Adapter:
    lm = begin.lm
    rows = [asked[number % len(asked)] for number in range(recipe.steps * recipe.questions)]
    prompts = [lm.render(task.messages(row, strategy)) for row in rows]
    longest = max(len(lm.encode(prompt)) for prompt in set(prompts)) + recipe.max_new_tokens
    gold = [str(row["answer"]) for row in rows]
    key = content_key(task=task.name, prompts=prompts, gold=gold, strategy=plain(strategy), reward=described(judge))
    told = {
        "reference": begin.reference if recipe.beta else "none: beta is 0", "reward": str(described(judge)),
        "answers": f"{recipe.steps} steps of {recipe.questions} questions x {recipe.answers} answers; "
        f"{len(asked)} different questions",
    }  # fmt: skip
    job = Job("reinforce", key, recipe, recipe.batch_size * longest, CURVE, told, {"questions": len(asked)})

    def make(model: Any, tokenizer: Any, lora: Any, checkpoints: Path, checkpointing: bool) -> Any:
        from workbench.finetuning import alignment

        common = alignment.arguments(model, checkpoints, checkpointing, recipe)
        score = _scorer(lm, task, rows, judge, recipe.answers)
        return alignment.make_grpo(model, tokenizer, lora, prompts, common, recipe, METHODS[recipe.method], score)

    return train_adapter(begin, job, make)


def _scorer(
    lm: "LM", task: "Task", rows: Sequence[dict[str, Any]], judge: Reward, size: int
) -> Callable[..., list[float]]:
    """What TRL calls with a step's answers, those to one question side by side."""
    from workbench.finetuning.packing import stop_tokens

    stops = stop_tokens(lm)

    def score(
        completions: list[str], completion_ids: list[list[int]], number: list[int],
        log_metric: Callable[[str, float], None], **_: Any,
    ) -> list[float]:  # fmt: skip
        group = []
        for text, ids, own in zip(completions, completion_ids, number, strict=True):
            verdict, finished = task.verify(rows[own], text), bool(ids) and ids[-1] in stops
            group.append(Answer(text, verdict.correct and finished, verdict.extracted is not None, len(ids), finished))
        log_metric("right", sum(each.correct for each in group) / len(group))
        log_metric("unparsed", sum(not each.parsed for each in group) / len(group))
        log_metric("cut_off", sum(not each.finished for each in group) / len(group))
        log_metric("sampled_tokens", sum(each.tokens for each in group))
        rewards = [judge(group[begin : begin + size]) for begin in range(0, len(group), size)]
        return [value for values in rewards for value in values]

    return score


def _reward(reward: str | Reward) -> Reward:
    if not isinstance(reward, str):
        described(reward)  # its own error for a lambda, before work starts
        return reward
    if reward not in REWARDS:
        raise ValueError(f"reward={reward!r} is not known. Choose one of {', '.join(REWARDS)}, or pass a function.")
    return REWARDS[reward]


def _asked(n: int | None, recipe: RewardRecipe) -> int:
    """How many different questions."""
    if n is not None and n < 1:
        raise ValueError(f"n={n} is too small: give 1 question or more, or leave it out for a new one each time.")
    return recipe.steps * recipe.questions if n is None else n


def _check(recipe: RewardRecipe) -> None:
    if recipe.method not in METHODS:
        raise ValueError(f"method={recipe.method!r} is not known. Choose one of {', '.join(METHODS)}.")
    check_least(recipe, steps=1, questions=1, answers=2, max_new_tokens=1, batch_size=1, save_steps=1)
    total = recipe.questions * recipe.answers
    if total % recipe.batch_size:
        raise ValueError(
            f"batch_size={recipe.batch_size} does not divide the {total} answers of a step ("
            f"{recipe.questions} questions x {recipe.answers}) into whole passes. Choose a divisor of {total}."
        )
    if recipe.temperature <= 0 or recipe.learning_rate <= 0 or recipe.beta < 0:
        raise ValueError(
            f"temperature={recipe.temperature} and learning_rate={recipe.learning_rate} must be above 0, and "
            f"beta={recipe.beta} not below 0."
        )
    if not 0 < recipe.top_entropy <= 1 or not 0 <= recipe.warmup < 1:
        raise ValueError(f"top_entropy={recipe.top_entropy} and warmup={recipe.warmup} are shares of 1.")
