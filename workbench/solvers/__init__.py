"""Ways to answer a question, as a part of a condition of `evaluate`: each a frozen dataclass with `solve(ask)`."""
