"""Scoring by log-likelihood under interventions."""

from workbench.likelihood.scoring import Scored, loglikelihoods

__all__ = ["Scored", "loglikelihoods"]
