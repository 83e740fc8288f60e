"""Results made by hand, for the tests of judges, raters and files of other tools."""

import pandas as pd

from workbench.results import Results


def results_of(answers: dict[str, list[tuple[str, bool]]], questions: list[str] | None = None) -> Results:
    """Results whose question i was answered, by condition, with a text and whether it is right."""
    lines = []
    for condition, given in answers.items():
        for number, (text, right) in enumerate(given):
            question = questions[number] if questions else f"What is {number} plus 1?"
            lines.append(
                {
                    "id": f"q{number}", "prompt": f"<|user|>{question}<|end|><|assistant|>\n", "output": text,
                    "answer": str(number + 1), "extracted": text.split()[-1] if text else None, "correct": right,
                    "unparsed": not text, "steps": "=" in text, "tokens_in": 9, "tokens_out": len(text.split()),
                    "seconds": 0.25, "forward_passes": 3, "condition": condition, "task": "sums",
                }
            )  # fmt: skip
    costs = {name: {"seconds": 2.5, "peak_memory_mb": 100.0, "model_calls": 7.0} for name in answers}
    about = {"task": "sums", "split": "test", "seed": 0, "n": len(lines) // len(answers), "model": "lab"}
    extracted = pd.Series([line["extracted"] for line in lines], dtype=object)  # keeps None
    return Results(pd.DataFrame(lines).assign(extracted=extracted), costs, about)
