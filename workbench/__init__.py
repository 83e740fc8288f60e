"""A workbench for experiments on small language models: synthesize, fine-tune, intervene, evaluate.

`import workbench as wb` is quick: a name loads its module, and torch with it, when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.calibration import calibrate, compare_at_budget, damage
    from workbench.evaluation import evaluate
    from workbench.exchange import joined, read_results
    from workbench.finetuning import finetune
    from workbench.finetuning.conditioning import condition, refusals
    from workbench.finetuning.merging import merge
    from workbench.finetuning.pairs import preference_pairs
    from workbench.finetuning.preference import prefer
    from workbench.finetuning.reward import reinforce
    from workbench.finetuning.stages import Stage, finetune_stages
    from workbench.finetuning.weighting import critical_weights
    from workbench.generate import Generation
    from workbench.interventions import (
        KV,
        Adapter,
        CompressCache,
        DropTokens,
        Intervention,
        Logits,
        LowRank,
        QuantizeCache,
        ReplaceTokens,
        Residual,
        ScaleTokens,
        SpliceBlock,
        Weights,
        extract,
        fit_gate,
        heads_writing,
        isolate,
        load_intervention,
        project_out,
        random_like,
        read_pairs,
        train_vector,
    )
    from workbench.judging import agreement, grade_answers, judge_pairs, read_votes
    from workbench.likelihood import loglikelihoods, minimal_pairs, multiple_choice, perplexity
    from workbench.models import LM, ModelError, load_model
    from workbench.prompts import Pairs, Strategy, contrast, few_shot, instruction
    from workbench.readouts import attention_to, head_attribution, logit_lens, trace
    from workbench.results import Results, load_results
    from workbench.served import connect
    from workbench.sweeps import Sweep, sweep
    from workbench.synthesis import synthesize
    from workbench.synthesis.mixing import mix
    from workbench.synthesis.records import Data, load_data
    from workbench.synthesis.reviewing import read_reviews, review_agreement, reviewed
    from workbench.tasks import Task, Verdict, load_task, task_names
    from workbench.teaching import check, check_prediction
    from workbench.widgets import playground, rate, review, show_tokens, watch

__version__ = "0.1.0"

_HOMES = {
    "workbench.calibration": ("calibrate", "compare_at_budget", "damage"),
    "workbench.evaluation": ("evaluate",),
    "workbench.finetuning": ("finetune",),
    "workbench.finetuning.conditioning": ("condition", "refusals"),
    "workbench.finetuning.merging": ("merge",),
    "workbench.finetuning.pairs": ("preference_pairs",),
    "workbench.finetuning.preference": ("prefer",),
    "workbench.finetuning.reward": ("reinforce",),
    "workbench.finetuning.stages": ("Stage", "finetune_stages"),
    "workbench.finetuning.weighting": ("critical_weights",),
    "workbench.exchange": ("joined", "read_results"),
    "workbench.generate": ("Generation",),
    "workbench.interventions": (
        "KV",
        "Adapter",
        "CompressCache",
        "DropTokens",
        "Intervention",
        "Logits",
        "LowRank",
        "QuantizeCache",
        "ReplaceTokens",
        "Residual",
        "ScaleTokens",
        "SpliceBlock",
        "Weights",
        "extract",
        "fit_gate",
        "heads_writing",
        "isolate",
        "load_intervention",
        "project_out",
        "random_like",
        "read_pairs",
        "train_vector",
    ),
    "workbench.judging": ("agreement", "grade_answers", "judge_pairs", "read_votes"),
    "workbench.readouts": ("attention_to", "head_attribution", "logit_lens", "trace"),
    "workbench.likelihood": ("loglikelihoods", "minimal_pairs", "multiple_choice", "perplexity"),
    "workbench.models": ("LM", "ModelError", "load_model"),
    "workbench.prompts": ("Pairs", "Strategy", "contrast", "few_shot", "instruction"),
    "workbench.served": ("connect",),
    "workbench.synthesis.mixing": ("mix",),
    "workbench.synthesis.records": ("Data", "load_data"),
    "workbench.synthesis.reviewing": ("read_reviews", "review_agreement", "reviewed"),
    "workbench.sweeps": ("Sweep", "sweep"),
    "workbench.results": ("Results", "load_results"),
    "workbench.synthesis": ("synthesize",),
    "workbench.tasks": ("Task", "Verdict", "load_task", "task_names"),
    "workbench.teaching": ("check", "check_prediction"),
    "workbench.widgets": ("playground", "rate", "review", "show_tokens", "watch"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = ("plots", "runs", "statistics", "report")

__all__ = [
    "KV", "LM", "Adapter", "CompressCache", "Data", "DropTokens", "Generation", "Intervention", "Logits", "LowRank",
    "ModelError", "Pairs", "QuantizeCache", "ReplaceTokens", "Residual", "Results", "ScaleTokens", "SpliceBlock",
    "Stage", "Strategy", "Sweep", "Task", "Verdict", "Weights", "agreement", "attention_to", "calibrate", "check",
    "check_prediction", "compare_at_budget", "condition", "connect", "contrast", "critical_weights", "damage",
    "evaluate", "extract",
    "few_shot", "finetune", "finetune_stages", "fit_gate", "grade_answers", "head_attribution", "heads_writing",
    "instruction", "isolate", "joined", "judge_pairs", "load_data", "load_intervention", "load_model",
    "load_results", "load_task", "logit_lens", "loglikelihoods", "merge", "minimal_pairs", "mix", "multiple_choice",
    "perplexity", "playground", "plots", "prefer", "preference_pairs", "project_out", "random_like", "rate",
    "read_pairs", "read_results", "read_reviews", "read_votes", "refusals", "reinforce", "report", "review",
    "review_agreement", "reviewed", "runs", "show_tokens", "statistics", "sweep", "synthesize", "task_names", "trace",
    "train_vector", "watch",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    if name in _MODULES:
        return import_module(f"workbench.{name}")
    raise AttributeError(f"workbench has no {name!r}. It has: {', '.join(__all__)}.")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
