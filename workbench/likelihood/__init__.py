"""Scoring by log-likelihood under interventions: requests, multiple choice, minimal pairs, perplexity of texts.

Prefixes that requests share are run once, whatever their number, with scores as if each request had been run alone;
tokenization and measures are those of lm-evaluation-harness 0.4, so that scores compare (`workbench.harness` runs its
own tasks). Does not generate text. `scoring` sorts requests, `tree`, `packs` and `engine` run them.
"""

from workbench.likelihood.choices import Choice, multiple_choice, option_texts
from workbench.likelihood.normalising import NORMALISATIONS, best, normalised
from workbench.likelihood.rolling import Document, Perplexity, perplexity, rolling_likelihoods
from workbench.likelihood.scoring import Scored, loglikelihoods
from workbench.likelihood.sentences import Pair, minimal_pairs, pair_accuracy

__all__ = [
    "NORMALISATIONS",
    "Choice",
    "Document",
    "Pair",
    "Perplexity",
    "Scored",
    "best",
    "loglikelihoods",
    "minimal_pairs",
    "multiple_choice",
    "normalised",
    "option_texts",
    "pair_accuracy",
    "perplexity",
    "rolling_likelihoods",
]
