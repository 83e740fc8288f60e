"""Teaching: exercises in notebooks that answer back, and the student's and teacher's versions of one source.

Does not grade or store anything: an answer is looked at in the notebook, and stays there.
"""

from workbench.teaching.checks import Checked, check, check_prediction

__all__ = ["Checked", "check", "check_prediction"]
