"""Extraction beside other code: steering-vectors, repeng and the loop of the cache-steering paper, on the same pairs.

All on one machine, with one thread count, one after another in each repeat: the workbench, then the others. The two
libraries run as they do by default, in their own environments (`make outside`). Pairs either have examples of their
own, or share ten sets of them. Results are compared before times are shown; loading is in no time.
"""

import gc
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import workbench as wb
from bench.outside.program import Program, interpreter, save_for_transformers_4

Layers = dict[int, torch.Tensor]
Timed = tuple[float, float, Any]  # wall seconds, CPU seconds, result
SHOTS = 5
GOALS = {"steering-vectors": ">= 5", "repeng": ">= 3", "batch 1": ">= 5"}


def lines(lm: wb.LM, task: wb.Task, n: int, repeats: int) -> list[dict[str, Any]]:
    """Extraction of `n` five-shot pairs, all layers: a line for each other program and kind of pairs."""
    found = []
    for kind, groups in (("own examples", None), ("10 sets of examples", 10)):
        pairs = wb.contrast(task, shots=SHOTS, n=n, lm=lm, groups=groups)
        name = f"extract, {n} pairs of {SHOTS} shots, {kind}"
        found += [beside_steering_vectors(lm, pairs, name, repeats), beside_repeng(lm, pairs, name, repeats)]
        found += [beside_batch_1(lm, pairs, name, repeats)]
    return found


def beside_steering_vectors(lm: wb.LM, pairs: wb.Pairs, name: str, repeats: int) -> dict[str, Any]:
    """Mean differences: its default, batch 1, states of all tokens of all layers, and the language-model head."""
    return _beside_library(lm, pairs, name, repeats, "steering-vectors", lambda: wb.extract(lm, pairs).vectors)


def beside_repeng(lm: wb.LM, pairs: wb.Pairs, name: str, repeats: int) -> dict[str, Any]:
    """Principal directions of centred differences: its default, batch 32 with padding, all hidden states.

    Its first layer is not read and its last one is read behind the final norm: both are left out of the comparison.
    """
    return _beside_library(lm, pairs, name, repeats, "repeng", lambda: centred_directions(lm, pairs))


def centred_directions(lm: wb.LM, pairs: wb.Pairs) -> Layers:
    """What repeng's default computes, from our states."""
    states = wb.read_pairs(lm, pairs, kv=False).states
    differences = {layer: both[0] - both[1] for layer, both in list(states.items())[1:-1]}
    return {
        layer: torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[0] for layer, rows in differences.items()
    }


def beside_batch_1(lm: wb.LM, pairs: wb.Pairs, name: str, repeats: int) -> dict[str, Any]:
    """Keys and values, as the code of the cache-steering paper does it (arXiv 2507.08799)."""
    pairs_of_times = []
    for _ in range(repeats):
        ours = timed(lambda: wb.extract(lm, pairs, site="kv"))
        theirs = timed(lambda: batch_1(lm, pairs))
        pairs_of_times.append((ours, theirs))
    values, mine = pairs_of_times[-1][1][2][1], pairs_of_times[-1][0][2].values
    error = sum((mine[layer] - values[layer]).norm() for layer in mine) / sum(v.norm() for v in values.values())
    versions = f"batch-1 loop of the paper, transformers {version('transformers')}"
    return line(name, versions, pairs_of_times, f"values: relative difference {error:.1e}", GOALS["batch 1"])


def batch_1(lm: wb.LM, pairs: wb.Pairs, token: int = -2) -> tuple[Layers, Layers]:
    """Mean differences of a token's cached keys (as cached) and values: two whole forwards a pair, one text each."""
    keys, values = {}, {}
    for positive, negative in zip(pairs.positive, pairs.negative, strict=True):
        caches = []
        for text in (positive, negative):
            ids = torch.tensor([lm.encode(text)], device=lm.device)
            with torch.no_grad():
                caches.append(lm.model(ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values)
        for layer in range(len(lm.blocks)):
            one, other = (cache.layers[layer] for cache in caches)
            keys.setdefault(layer, []).append((one.keys[0, :, token] - other.keys[0, :, token]).cpu())
            values.setdefault(layer, []).append((one.values[0, :, token] - other.values[0, :, token]).cpu())
    means = ({layer: torch.stack(each).mean(0) for layer, each in store.items()} for store in (keys, values))
    return tuple(means)


def _beside_library(
    lm: wb.LM, pairs: wb.Pairs, name: str, repeats: int, library: str, work: Callable[[], Layers]
) -> dict[str, Any]:
    """Its training by default against `work`, in turn."""
    if interpreter(library) is None:
        return {"what": name, "compared with": f"{library}: not installed, make outside", "goal": GOALS[library]}
    with TemporaryDirectory() as folder, Program(library) as program:
        saved = save_for_transformers_4(lm, Path(folder))
        program.train(saved, positive=pairs.positive[:2], negative=pairs.negative[:2])  # first calls are slower
        both = []
        for _ in range(repeats):
            ours = timed(work)
            vectors, facts = program.train(saved, positive=pairs.positive, negative=pairs.negative)
            both.append((ours, (facts["wall"], facts["cpu"], vectors)))
    mine = both[-1][0][2]
    least = least_cosine({layer: both[-1][1][2][layer] for layer in mine}, mine)
    versions = facts["versions"]
    said = f"{library} {versions[library]}, transformers {versions['transformers']}"
    return line(name, said, both, f"cosine {least:.6f}", GOALS[library])


def least_cosine(theirs: Layers, mine: Layers) -> float:
    """The smallest cosine of a layer, but for the sign, which is a convention for principal directions."""
    cosines = [torch.cosine_similarity(theirs[layer], mine[layer], dim=0).abs().item() for layer in mine]
    return min(cosines)


def timed(work: Callable[[], Any]) -> Timed:
    """Wall seconds, CPU seconds and result of one call."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def line(name: str, compared: str, both: list[tuple[Timed, Timed]], same: str, goal: str) -> dict[str, Any]:
    """One row of the table: the smallest seconds of each side, wall and CPU."""
    ours, theirs = ([min(run[side][clock] for run in both) for clock in (0, 1)] for side in (0, 1))
    return {
        "what": name, "compared with": compared, "that, s": theirs[0], "workbench, s": ours[0],
        "ratio": theirs[0] / ours[0], "CPU ratio": theirs[1] / ours[1], "goal": goal, "same result": same,
    }  # fmt: skip
