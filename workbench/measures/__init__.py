"""What accuracy doesn't say: one measure a file, from the per-question rows that `evaluate` gives.

| file | asks |
|---|---|
| `confidence`, `elicitation` | does the model know when it is right? calibration, and where confidences come from |
| `robustness`, `perturbations`, `chains` | does the answer stay when it should and follow when the problem changes? |
| `faithfulness` | does the answer depend on the chain of thought? |
| `abstention` | does it answer what can't be answered, and refuse what can? |
| `bias` | does it choose an option for its letter or place? |
| `consistency` | does it contradict itself, over questions that exclude each other and over wordings? |
| `length` | how long are answers, cut off or repeating themselves, and what is a difference at equal length? |
| `contamination` | were test questions in the training texts, and is it better on those? |
| `forgetting` | what was lost on other tasks? |

Measures are pure functions over data frames; a perturbation makes another `Task`, which `evaluate` takes unchanged.
"""
