"""What a comparison at equal damage compares: ways to put a style into a model, each with its free choice made alike.

An arm is one way: a prompt, a residual vector, an edit of the cache, a random direction. Every arm's candidates
(layers, shares of keys) are brought to the same KL budget and the best of them on tuning questions is kept, so that no
arm is favoured by care. Reporting is `cache_steering`' matter; what KL means here is `divergence`'s.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from workbench.calibration import calibrate
from workbench.grid import grid
from workbench.interventions import KV, Intervention, Residual, random_like, read_pairs
from workbench.interventions.kv_layers import describe_cache
from workbench.interventions.reading import Pairs
from workbench.models import LM, ModelError
from workbench.prompts import Strategy
from workbench.runs.heartbeats import heartbeat
from workbench.tasks import Task

PLAIN, TOLD = "plain", "told in the prompt"
LAST, EACH = "residual, last token", "residual, each step"
STEPS = slice(-1, None)  # the last prompt token and every generated one: what is processed while decoding
VALUES, KEYS, AS_CACHED = "KV values", "KV values + keys", "KV values + keys as cached"
FLOORS = {"random, cache": VALUES, "random, residual": LAST}
Candidates = Mapping[str, Mapping[str, Intervention] | str]  # arm -> label -> change; or why the arm is left out


@dataclass(frozen=True, eq=False)
class Directions:
    """Mean differences from one pass: residual vectors, and keys and values of the last cached token.

    as_cached: the same edit with keys averaged and added with their rotary position in them; None where keys carry
    none. left_out: which layers the cache edit leaves out, and why; it is empty (does nothing) where none can be read.
    """

    vector: Residual
    kv: KV
    as_cached: KV | None
    left_out: str = ""


@dataclass(frozen=True, eq=False)
class Arm:
    """One line of the comparison. change: at the strength that spends the budget; None for a prompt or where refused.

    choice: which candidate was best on tuning questions. kl: 95th percentile over tokens, in nats, on those. note: why
    there is no strength, or why the KL is below the budget.
    """

    name: str
    change: Intervention | None = None
    strategy: Strategy | None = None
    choice: str = ""
    strength: float = math.nan
    kl: float = math.nan
    note: str = ""

    @property
    def runs(self) -> bool:
        """Whether there is something to run."""
        return self.name == PLAIN or self.change is not None or self.strategy is not None

    @property
    def condition(self) -> list[Intervention | Strategy]:
        """What `evaluate` takes."""
        return [part for part in (self.change, self.strategy) if part is not None]


def read_directions(lm: LM, pairs: Pairs) -> Directions:
    """Residual vectors of all layers and a cache edit of all layers that allow one, un-rotated and as cached.

    >>> from workbench import contrast, load_model, load_task
    >>> lm, task = load_model("lab-small"), load_task("word-problems")
    >>> found = read_directions(lm, contrast(task, shots=1, n=2, lm=lm))
    >>> found.kv.rotated, found.as_cached.rotated, found.left_out
    ((0, 1, 2, 3), (), '')
    """
    try:
        cached = states = read_pairs(lm, pairs)
        left_out = ""
    except ModelError as refused:
        left_out, states = str(refused), read_pairs(lm, pairs, kv=False)
        try:
            table = describe_cache(lm)
            layers = [layer for layer in table.layer[table["add"]].tolist() if layer >= 1]
            cached = read_pairs(lm, pairs, layers=layers)
            left_out = f"The cache is read and edited in layers {layers} only. {left_out}"
        except ModelError:
            nothing = KV({}, {}, model=lm.name, revision=lm.revision)
            return Directions(states.vector(), nothing, None, left_out)
    return Directions(states.vector(), cached.kv(), cached.kv(as_cached=True) if cached.rotated else None, left_out)


def candidates(
    found: Directions, most_layers: int = 8, key_shares: Sequence[float] = (1.0,)
) -> dict[str, dict[str, Intervention] | str]:
    """Every arm's candidates: one layer of the residual vector, or one share c_k / c_v of the keys; or a reason.

    most_layers: at most so many, evenly spread. Keys are averaged and added as the arm says, values the same in each.
    """
    every = sorted(found.vector.vectors)
    count = min(most_layers, len(every))
    places = [(number + 0.5) / count if count < 2 else number / (count - 1) for number in range(count)]
    layers = [every[round(place * (len(every) - 1))] for place in places]
    arms: dict[str, dict[str, Intervention] | str] = {
        name: {f"layer {layer}": found.vector.at(layer, span) for layer in layers}
        for name, span in ((LAST, "last"), (EACH, STEPS))
    }
    edits = {VALUES: (found.kv, (0.0,)), KEYS: (found.kv, key_shares), AS_CACHED: (found.as_cached, key_shares)}
    for name, (kv, shares) in edits.items():
        if not found.kv.values:
            arms[name] = f"This model's cache is not edited: {found.left_out}"
        elif kv is None:
            arms[name] = "Keys carry no rotary position here: as cached is the same as un-rotated."
        else:
            arms[name] = {f"keys x {share:g}" if share else "values alone": kv.scaled(keys=share) for share in shares}
    return arms


def tune(
    lm: LM,
    task: Task,
    choices: Candidates,
    *,
    budget: float = 0.5,
    n: int = 32,
    seed: int = 0,
    split: str = "tuning",
    max_new_tokens: int = 256,
    kl_tokens: int = 16,
) -> list[Arm]:
    """Bring every candidate to the budget and keep each arm's best on the same n questions; then the random floors.

    best: most right answers, of equals most with steps, of equals the first; candidates that reach the budget go
    before those that stay below it. kl_tokens: how many tokens of the plain model's answers the KL looks at: a change
    of one token acts on the first of them, and among many its KL would pass under the 95th percentile.
    Raises ValueError for the test split, which is for reporting.
    """
    if split == "test":
        raise ValueError("Arms are tuned on a split that is not for reporting: split='tuning' or 'train'.")
    prompts = [lm.render(task.messages(row)) for row in task.rows(split, n=n, seed=seed)]

    def settle(choices: Candidates) -> list[Arm]:
        found = []
        for place, (name, options) in enumerate(choices.items(), start=1):
            found.append(_brought(lm, name, options, prompts, budget, kl_tokens))
            heartbeat("calibrate", place, len(choices))
        cells = [({"arm": arm.name}, arm.change) for options in found for arm in options if arm.change is not None]
        if not cells:
            return [options[0] for options in found]
        table = grid(lm, task, cells, n=n, seed=seed, split=split, max_new_tokens=max_new_tokens)
        scores = dict(
            zip([id(change) for _, change in cells], zip(table.accuracy, table.steps, strict=True), strict=True)
        )
        return [_best(options, scores) for options in found]

    arms = settle(choices)
    return [*arms, *settle(_floors(choices, arms, seed))]


def _best(options: Sequence[Arm], scores: Mapping[int, tuple[float, float]]) -> Arm:
    return max(options, key=lambda arm: (arm.change is not None, not arm.note, scores.get(id(arm.change), (0.0, 0.0))))


def _floors(choices: Candidates, arms: Sequence[Arm], seed: int) -> dict[str, dict[str, Intervention] | str]:
    """A random direction of equal norm for the chosen candidate of the arms in `FLOORS`."""
    floors: dict[str, dict[str, Intervention] | str] = {}
    for name, twin in FLOORS.items():
        arm = next((arm for arm in arms if arm.name == twin), None)
        options = choices.get(twin, "")
        if arm is not None and not isinstance(options, str) and arm.choice in options:
            floors[name] = {arm.choice: random_like(options[arm.choice], seed)}
        elif arm is not None:
            floors[name] = f"There is no {twin} arm to compare with."
    return floors


def _brought(
    lm: LM,
    name: str,
    options: Mapping[str, Intervention] | str,
    prompts: Sequence[str],
    budget: float,
    kl_tokens: int,
) -> list[Arm]:
    """The candidates of one arm, each at the strength that spends the budget, or with the reason why there is none."""
    if isinstance(options, str):
        return [Arm(name, note=options)]
    arms = []
    for label, change in options.items():
        try:
            found = calibrate(lm, change, prompts, budget=budget, max_new_tokens=kl_tokens)
        except ModelError as reason:
            arms.append(Arm(name, choice=label, note=str(reason)))
            continue
        note = "" if found.converged else f"KL jumps over the budget; {found.kl:.2g} is the most below it."
        arms.append(Arm(name, found.intervention, None, label, found.strength, found.kl, note))
    return arms
