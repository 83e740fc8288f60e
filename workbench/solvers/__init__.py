"""Ways to answer a question, as part of a condition of `evaluate`: samples, votes, searches, a second model, programs.

A solver is a frozen dataclass with `solve(ask) -> list[Answer]` (`workbench.evaluation.asking`). Greedy decoding is
`evaluation.Greedy`, wordings of the prompt are `workbench.prompts`, estimates from stored samples without asking again
are `workbench.evaluation.stored`.
"""

from workbench.solvers.best_of import BestOf
from workbench.solvers.budget import Budget, StopBias
from workbench.solvers.cascade import DraftVerify, HandOver, choose_threshold
from workbench.solvers.correction import Correct
from workbench.solvers.likelihood import Likelihood
from workbench.solvers.probe import Probe, fit_probe
from workbench.solvers.programs import Program
from workbench.solvers.sampling import Samples, SelfConsistency
from workbench.solvers.tree_search import StepBeam, TreeSearch
from workbench.solvers.two_stage import ThinkThenAnswer
from workbench.solvers.verifier import AskedVerifier

__all__ = [
    "AskedVerifier",
    "BestOf",
    "Budget",
    "Correct",
    "DraftVerify",
    "HandOver",
    "Likelihood",
    "Probe",
    "Program",
    "Samples",
    "SelfConsistency",
    "StepBeam",
    "StopBias",
    "ThinkThenAnswer",
    "TreeSearch",
    "choose_threshold",
    "fit_probe",
]
