"""Say how sure a number is: intervals, paired tests, correction for many tests, and the smallest effect n could see.

Everything here compares conditions on the *same* questions, because pairing removes the difficulty of the questions
from the noise (Miller 2024, arXiv 2411.00640). Which to take: `paired_difference` for two conditions, with `clusters`
where questions share a passage; `crossed_difference` for several seeds; `sequential_difference` to look before the end;
`questions_needed` before the run. `python -m workbench.claims.type_one` measures how often each is wrong.
Not covered: Bayesian estimates, regression. Leans on numpy and scipy; the tests hold the results against statsmodels.
"""

from workbench.statistics.clustered import ClusteredInterval, beta_binomial_interval, clustered_interval
from workbench.statistics.crossed import (
    CrossedInterval,
    SamplingVariance,
    crossed_difference,
    crossed_interval,
    sampling_variance,
)
from workbench.statistics.estimates import Comparison, Interval
from workbench.statistics.families import benjamini_hochberg, holm
from workbench.statistics.paired import McNemar, mcnemar_exact, mcnemar_midp, paired_difference
from workbench.statistics.power import mcnemar_power, mean_power, minimum_detectable_effect, questions_needed
from workbench.statistics.proportions import tango, wilson
from workbench.statistics.raters import cohen_kappa
from workbench.statistics.resampling import bootstrap_mean, paired_bootstrap
from workbench.statistics.samples import StatisticsError
from workbench.statistics.sequential import Sequential, sequential_difference, sequential_mean

__all__ = [
    "ClusteredInterval",
    "Comparison",
    "CrossedInterval",
    "Interval",
    "McNemar",
    "SamplingVariance",
    "Sequential",
    "StatisticsError",
    "benjamini_hochberg",
    "beta_binomial_interval",
    "bootstrap_mean",
    "clustered_interval",
    "cohen_kappa",
    "crossed_difference",
    "crossed_interval",
    "holm",
    "mcnemar_exact",
    "mcnemar_midp",
    "mcnemar_power",
    "mean_power",
    "minimum_detectable_effect",
    "paired_bootstrap",
    "paired_difference",
    "questions_needed",
    "sampling_variance",
    "sequential_difference",
    "sequential_mean",
    "tango",
    "wilson",
]
