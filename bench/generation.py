"""Generation, a grid and an evaluation beside plain loops: what a careful person would write with transformers alone.

The loops take one prompt at a time, the grid's one cell at a time. Results are compared before times are shown; times
are wall clock, the smallest of the repeats.
"""

import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch

import workbench as wb
from workbench.models import end_tokens


def best_of(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """The smallest wall-clock time in seconds, and the result."""
    times, result = [], None
    for _ in range(repeats):
        began = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - began)
    return min(times), result


def plain_generate(lm: wb.LM, prompts: list[Any], limit: int) -> list[list[int]]:
    """The reference: transformers' greedy `generate`, one prompt at a time."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([lm.encode(prompt)], device=lm.device)
        output = lm.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit)
        found.append(output[0, ids.shape[1] :].tolist())
    return found


def line(name: str, compared: str, plain: float, ours: float, same: str, goal: str = "") -> dict[str, Any]:
    """One row of the table."""
    return {
        "what": name, "compared with": f"{compared}, transformers {version('transformers')}", "that, s": plain,
        "workbench, s": ours, "ratio": plain / ours, "goal": goal, "same result": same,
    }  # fmt: skip


def generation(lm: wb.LM, task: wb.Task, n: int, limit: int, repeats: int) -> list[dict[str, Any]]:
    """Direct answers, answers with steps, and answers after shared examples."""
    lines = []
    rows = task.rows("tuning", n=n)
    shared = task.messages(rows[0], wb.few_shot("steps", 3))[:-1]
    cases = {
        "generate, question alone": [task.messages(row) for row in rows],
        "generate, told to show steps": [task.messages(row, wb.instruction("steps")) for row in rows],
        "generate, 3 own examples": [task.messages(row, wb.few_shot("steps", 3)) for row in rows],
        "generate, 3 shared examples": [[*shared, *task.messages(row)] for row in rows],
    }
    for name, prompts in cases.items():
        plain, reference = best_of(lambda prompts=prompts: plain_generate(lm, prompts, limit), 1)
        ours, found = best_of(lambda prompts=prompts: lm.generate(prompts, max_new_tokens=limit), repeats)
        equal = sum(a == b.token_ids for a, b in zip(reference, found, strict=True))
        lines.append(line(name, "one generate a prompt", plain, ours, f"{equal} of {n} token for token"))
    return lines


def plain_batch(lm: wb.LM, prompts: list[Any], limit: int) -> list[list[int]]:
    """The reference for a grid: transformers' greedy `generate` on all prompts at once, padded on the left."""
    texts = [lm.encode(prompt) for prompt in prompts]
    width, pad = max(map(len, texts)), lm.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(text)) + text for text in texts], device=lm.device)
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts], device=lm.device)
    output = lm.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=limit)[:, width:].tolist()
    ends = end_tokens(lm)
    cuts = [next((place + 1 for place, token in enumerate(row) if token in ends), len(row)) for row in output]
    return [row[:cut] for row, cut in zip(output, cuts, strict=True)]


def cells(lm: wb.LM, task: wb.Task, n: int, limit: int, repeats: int) -> list[dict[str, Any]]:
    """A grid of strengths and layers: one generation against one `model.generate` a cell, each on all prompts."""
    vector = wb.extract(lm, wb.contrast(task, shots=3, n=20, lm=lm))
    layers = list(range(1, len(lm.blocks)))[:5]
    grid = [
        s * vector.at(layers=[layer], positions="last") for layer in layers for s in (0.0, 0.25, 0.5, 1, 1.5, 2, 3, 4)
    ]
    prompts = [lm.render(task.messages(row)) for row in task.rows("tuning", n=n)]

    def loop() -> list[list[int]]:
        found = []
        for x in grid:
            with lm.apply(x):
                found += plain_batch(lm, prompts, limit)
        return found

    plain, reference = best_of(loop, 1)
    ours, answers = best_of(
        lambda: lm.generate(prompts * len(grid), [x for x in grid for _ in prompts], limit), repeats
    )
    equal = sum(a == b.token_ids for a, b in zip(reference, answers, strict=True))
    same = f"{equal} of {len(answers)} token for token"
    return [line(f"grid, {len(grid)} cells x {n}", f"{len(grid)} batched generates", plain, ours, same, ">= 8")]


def evaluation(lm: wb.LM, task: wb.Task, n: int, limit: int, repeats: int) -> list[dict[str, Any]]:
    """Three conditions on the same questions, verified: `evaluate` against a loop over `model.generate`."""
    vector = wb.extract(lm, wb.contrast(task, shots=3, n=20, lm=lm)).at(layers=[1], positions="last")
    conditions = {"plain": [], "told": [wb.instruction("steps")], "steered": [vector]}
    rows = task.rows("tuning", n=n)

    def loop() -> list[bool]:
        right = []
        for strategy, change in ((None, 0.0), (wb.instruction("steps"), 0.0), (None, 1.0)):
            prompts = [task.messages(row, strategy) for row in rows]
            with lm.apply(change * vector):
                tokens = plain_generate(lm, prompts, limit)
            texts = [lm.tokenizer.decode(each, skip_special_tokens=True) for each in tokens]
            right += [task.verify(row, text).correct for row, text in zip(rows, texts, strict=True)]
        return right

    plain, reference = best_of(loop, 1)
    ours, found = best_of(lambda: wb.evaluate(lm, task, conditions, n=n, split="tuning", max_new_tokens=limit), repeats)
    equal = sum(a == b for a, b in zip(reference, found.rows.correct.tolist(), strict=True))
    same = f"{equal} of {3 * n} verdicts"
    return [line(f"evaluate, 3 conditions x {n}", "one generate a prompt", plain, ours, same)]
