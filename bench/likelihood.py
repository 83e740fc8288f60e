"""Scores by likelihood beside lm-evaluation-harness's own `hf` model, and a pass over strengths beside a pass for each.

Both sides get the same requests, as the harness hands them over, on one machine and thread count; `hf` has the better
of two batch sizes. Scores (or texts) are compared before times are shown; building requests is in no time.
"""

import importlib.util
from collections.abc import Sequence
from contextlib import redirect_stderr
from importlib.metadata import version
from io import StringIO
from typing import Any

import torch

import workbench as wb
from bench.generation import best_of
from workbench.likelihood.requests import encode_requests

BATCHES = (16, 64)  # of the harness's model; the better one counts
SHOTS, STRENGTHS = 5, 16
GSM8K_SHOTS = 5  # as many as the harness's own GSM8K has, the same for all questions (there gsm8k_cot's are)
NEAR = 1e-3  # nats; float32 sums over a hundred tokens in other orders
Requests = list[tuple[str, str]]


def missing() -> str | None:
    """Why this part can't run, or None."""
    needed = importlib.util.find_spec("lm_eval") is None
    return "it needs lm_eval (make outside) in the environment that runs it" if needed else None


def lines(lm: wb.LM, repeats: int, choices: int = 64, pairs: int = 20, texts: int = 64) -> list[dict[str, Any]]:
    """A line a comparison; choices, texts: questions. pairs: of each of BLiMP's paradigms."""
    aqua = wb.load_task("aqua")
    few, rows = _head(aqua.rows("tuning", n=SHOTS)), aqua.rows(n=choices)
    fixed = [(few + _asked(row), f" {chr(65 + place)}") for row in rows for place in range(len(row["option_texts"]))]
    sentences = wb.load_task("blimp", per_paradigm=pairs).rows()
    alone = [("", row[side]) for row in sentences for side in ("good", "bad")]
    found = [
        _beside_harness(lm, f"AQuA, {SHOTS} fixed shots, {choices} questions", "loglikelihood", fixed, repeats, ">= 5"),
        _beside_harness(lm, f"BLiMP, {len(sentences)} pairs", "loglikelihood", alone, repeats, ">= 2"),
    ]
    gsm8k = wb.load_task("gsm8k")
    solved = "".join(f"{_asked(row)} {row['solutions']['steps']}\n\n" for row in gsm8k.rows("tuning", n=GSM8K_SHOTS))
    options = {"until": ["Question:", "\n\n"], "max_gen_toks": 64, "do_sample": False}
    for name, before in ((f"{GSM8K_SHOTS} fixed shots, ", solved), ("", "")):
        asks = [(before + _asked(row), options) for row in gsm8k.rows(n=texts)]
        found.append(_beside_harness(lm, f"GSM8K, {name}{texts} texts", "generate_until", asks, repeats, ">= 3"))
    return found + strengths(lm, fixed[: 5 * min(choices, 8)], repeats)


def _head(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(f"{_asked(row)} {row['answer']}\n\n" for row in rows)


def _asked(row: dict[str, Any]) -> str:
    return f"Question: {row['question']}\nAnswer:"


def _beside_harness(
    lm: wb.LM, name: str, kind: str, arguments: Sequence[tuple[Any, Any]], repeats: int, goal: str
) -> dict[str, Any]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from workbench.harness import HarnessModel

    requests = [Instance(kind, {}, pair, place) for place, pair in enumerate(arguments)]

    def timed(model: Any) -> tuple[float, Any]:
        with redirect_stderr(StringIO()):
            return best_of(lambda: getattr(model, kind)(requests, disable_tqdm=True), repeats)

    ours, mine = timed(HarnessModel(lm))
    theirs = {size: timed(HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=size)) for size in BATCHES}
    size = min(theirs, key=lambda each: theirs[each][0])
    same = sum(_equal(*both) for both in zip(mine, theirs[size][1], strict=True))
    return _line(
        name, f"lm_eval {version('lm_eval')} hf, batch {size}", theirs[size][0], ours, f"{same} of {len(mine)}", goal
    )


def _equal(a: Any, b: Any) -> bool:
    return a == b if isinstance(a, str) else abs(a[0] - b[0]) < NEAR and bool(a[1]) == bool(b[1])


def strengths(lm: wb.LM, requests: Requests, repeats: int) -> list[dict[str, Any]]:
    """One pass over many strengths of one vector on the last prompt token: beside a pass each, and plain forwards.

    The plain loop is one forward a request and strength; it is also what the scores are compared with.
    """
    generator = torch.Generator().manual_seed(0)
    layer = len(lm.blocks) // 2
    x = wb.Residual({layer: torch.randn(lm.d_model, generator=generator)}, "last", 0.1)
    steps = [place / 4 for place in range(STRENGTHS)]
    rows = [step * x for step in steps for _ in requests]
    ours, found = best_of(lambda: wb.loglikelihoods(lm, requests * len(steps), rows), repeats)
    runs, each = best_of(lambda: [one for s in steps for one in wb.loglikelihoods(lm, requests, s * x)], repeats)
    plain, reference = best_of(lambda: _plain_loop(lm, requests, x, steps), 1)
    mine = [one.logprob for one in found]
    name = f"{len(steps)} strengths, {len(requests)} requests"
    compared: list[tuple[str, float, list[float], str]] = [
        ("a pass of ours each", runs, [one.logprob for one in each], ""),
        ("one plain forward a request", plain, reference, ">= 8"),
    ]
    return [_line(name, other, seconds, ours, _share(mine, scores), goal) for other, seconds, scores, goal in compared]


def _plain_loop(lm: wb.LM, requests: Requests, x: wb.Intervention, steps: Sequence[float]) -> list[float]:
    found = []
    encoded = encode_requests(lm, requests)
    for step in steps:
        for one in encoded:
            ids = torch.tensor([one.context + one.continuation], device=lm.device)
            with torch.no_grad(), lm.apply(step * x, prompt_lengths=[len(one.context)]):
                logits = lm.model(ids[:, :-1], use_cache=False).logits[0, len(one.context) - 1 :].float()
            found.append(float(logits.log_softmax(-1).gather(1, ids[0, len(one.context) :, None]).sum()))
    return found


def _share(a: Sequence[float], b: Sequence[float]) -> str:
    return f"{sum(abs(one - other) < NEAR for one, other in zip(a, b, strict=True))} of {len(a)}"


def _line(name: str, compared: str, that: float, ours: float, same: str, goal: str) -> dict[str, Any]:
    return {
        "what": name, "compared with": compared, "that, s": that, "workbench, s": ours, "ratio": that / ours,
        "goal": goal, "same scores": same,
    }  # fmt: skip
