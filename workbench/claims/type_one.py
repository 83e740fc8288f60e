"""How often each test cries wolf: shares of rejections at 5 % when nothing differs, by simulation.

`python -m workbench.claims.type_one` prints the table. A test is right where the share is 4 to 6 %: more means false
claims, less means effects missed (an exact test of counts must lie below where few pairs differ). Beside the package's
tests stand the ones that are commonly used and wrong: questions of one passage counted as independent, seeds ignored, a
p-value read after every question. Given the share of pairs that differ, accuracy itself does not matter to a paired
test, so it is varied for intervals of one share only. Not covered: power, and data unlike those drawn here.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from workbench.files import write_atomic
from workbench.statistics import questions_needed, wilson
from workbench.statistics.clustered import share_limits, spread
from workbench.statistics.crossed import half_width, mean_squares
from workbench.statistics.paired import sign_test
from workbench.statistics.resampling import sign_flip
from workbench.statistics.sequential import log_wealth

ALPHA = 0.05
Found = tuple[str, dict[str, Any], np.ndarray]  # test, setting, whether each simulated data set was rejected


def type_one(runs: int = 4000, seed: int = 0) -> pd.DataFrame:
    """Table of rejections under the null: one row a test and setting, with the Wilson interval of the share.

    Columns: test, n, clusters, icc, accuracy, discordance, other, runs, rejected, low, high.

    >>> table = type_one(runs=50)
    >>> bool(((table.low <= table.rejected) & (table.rejected <= table.high)).all()), table.runs.unique().tolist()
    (True, [50])
    """
    rng = np.random.default_rng(seed)
    lines = []
    for source in (pairs_alone, pairs_clustered, shares_clustered, seeds, family, looking):
        for test, setting, rejected in source(rng, runs):
            share = wilson(int(rejected.sum()), len(rejected))
            line = {"test": test, **setting, "runs": len(rejected)}
            lines.append(line | {"rejected": share.estimate, "low": share.low, "high": share.high})
    columns = ["test", "n", "clusters", "icc", "accuracy", "discordance", "other", "runs", "rejected", "low", "high"]
    return pd.DataFrame(lines).reindex(columns=columns)


def pairs_alone(rng: np.random.Generator, runs: int) -> Iterator[Found]:
    """Right/wrong pairs that are independent."""
    for n in (50, 100, 200, 1000):
        for rate in (0.05, 0.1, 0.2, 0.4):
            only_a, only_b, _ = rng.multinomial(n, [rate / 2, rate / 2, 1 - rate], size=runs).T
            setting = {"n": n, "discordance": rate}
            yield "exact McNemar", setting, sign_test(only_a, only_b) <= ALPHA
            yield "mid-p McNemar", setting, sign_test(only_a, only_b, mid=True) <= ALPHA


def pairs_clustered(rng: np.random.Generator, runs: int) -> Iterator[Found]:
    """Right/wrong pairs in clusters whose differences are related, of equal and unequal sizes."""
    for clusters, size, rate, icc, uneven in (
        (10, 10, 0.4, 0.0, False), (10, 10, 0.4, 0.2, False), (20, 10, 0.2, 0.1, False), (20, 10, 0.4, 0.0, False),
        (20, 10, 0.4, 0.1, False), (20, 10, 0.4, 0.3, False), (20, 10, 0.4, 0.3, True), (50, 4, 0.3, 0.2, False),
        (50, 4, 0.3, 0.2, True), (100, 10, 0.2, 0.1, False),
    ):  # fmt: skip
        sizes = spread_sizes(clusters, size) if uneven else np.full(clusters, size)
        up, down = clustered_pairs(rng, runs, sizes, rate, icc)
        sums, squares = (up - down).astype(float), (up + down).astype(float)
        setting: dict[str, Any] = {"n": int(sizes.sum()), "clusters": clusters, "icc": icc, "discordance": rate}
        setting["other"] = "uneven" if uneven else ""
        yield "McNemar, clusters ignored", setting, sign_test(down.sum(1), up.sum(1)) <= ALPHA
        yield "sign flip over clusters", setting, sign_flip(sums, resamples=4000) <= ALPHA
        yield "sign flip over clusters, mid-p", setting, sign_flip(sums, resamples=4000, mid=True) <= ALPHA
        low, high = bootstrap_limits(sums, sizes)
        yield "bootstrap interval over clusters", setting, (low > 0) | (high < 0)
        yield "clustered_interval (CR2)", setting, outside_t(sums, sizes, squares, 0.0)


def shares_clustered(rng: np.random.Generator, runs: int) -> Iterator[Found]:
    """One condition's accuracy in clusters, beta-binomial counts; rejected: the interval leaves the truth out."""
    for clusters, size, share, icc, uneven in (
        (10, 10, 0.5, 0.2, False), (20, 10, 0.5, 0.0, False), (20, 10, 0.5, 0.3, False), (20, 10, 0.8, 0.3, False),
        (20, 10, 0.95, 0.1, False), (20, 10, 0.8, 0.3, True), (50, 4, 0.8, 0.2, False), (50, 4, 0.95, 0.2, True),
    ):  # fmt: skip
        sizes = spread_sizes(clusters, size) if uneven else np.full(clusters, size)
        own = np.full((runs, clusters), share)
        if icc:
            own = rng.beta(share * (1 / icc - 1), (1 - share) * (1 / icc - 1), size=(runs, clusters))
        counts = rng.binomial(sizes, own).astype(float)
        setting: dict[str, Any] = {"n": int(sizes.sum()), "clusters": clusters, "icc": icc, "accuracy": share}
        setting["other"] = "uneven" if uneven else ""
        total = int(sizes.sum())
        limits = np.array([(x.low, x.high) for x in (wilson(k, total) for k in range(total + 1))])
        naive = limits[counts.sum(1).astype(int)]
        yield "Wilson, clusters ignored", setting, (naive[:, 0] > share) | (naive[:, 1] < share)
        yield "clustered_interval (CR2)", setting, outside_t(counts, sizes, counts, share)
        _, low, high = share_limits(counts, sizes, ALPHA / 2)
        yield "beta_binomial_interval", setting, (low > share) | (high < share)


def seeds(rng: np.random.Generator, runs: int) -> Iterator[Found]:
    """Paired differences question x seed; `other`: the seeds' variance of the mean / all the rest."""
    for questions, number, ratio in (
        (50, 3, 0), (50, 3, 1), (50, 3, 5), (100, 5, 0), (100, 5, 1), (100, 5, 5), (200, 3, 1), (200, 10, 1), (200, 10,
        5), ):  # fmt: skip
        lean = rng.normal(scale=0.5, size=(runs, questions, 1))  # a question's own leaning to one of the conditions
        error = (
            np.sqrt(ratio * number / questions * (0.026 + 0.374 / number)) / 0.32
        )  # 0.32: difference for a lean of 1
        lean = lean + error * rng.normal(size=(runs, 1, number))
        noise, ease = rng.random((runs, questions, number)), 0.4
        up = stats.norm.cdf(lean) * ease
        table = (noise < up).astype(float) - (noise > 1 - (ease - up))
        by_question, by_seed, rest = mean_squares(table)
        mean = np.abs(table.mean((1, 2)))
        setting = {"n": questions, "discordance": ease, "other": f"{number} seeds, ratio {ratio}"}
        yield "crossed_difference", setting, mean > half_width(by_question, by_seed, rest, questions, number, ALPHA / 2)
        alone = half_width(by_question, 0.0, 0.0, questions, number, ALPHA / 2)
        yield "questions as clusters, seeds ignored", setting, mean > alone


def family(rng: np.random.Generator, runs: int, tests: int = 12) -> Iterator[Found]:
    """Twelve conditions beside one baseline on the same questions; rejected: any of the twelve."""
    n, flip = 200, 0.12
    base = rng.random((runs, 1, n)) < flip
    other = rng.random((runs, tests, n)) < flip
    only_a, only_b = (base & ~other).sum(-1), (~base & other).sum(-1)
    setting = {"n": n, "discordance": 2 * flip * (1 - flip), "other": f"any of {tests}"}
    steps = np.arange(1, tests + 1)
    for name, mid in (("exact McNemar", False), ("mid-p McNemar", True)):
        p = np.sort(sign_test(only_a, only_b, mid), axis=1)
        yield f"{name}, not adjusted", setting, p[:, 0] <= ALPHA
        yield f"{name}, Holm", setting, p[:, 0] * tests <= ALPHA
        yield f"{name}, Benjamini-Hochberg", setting, np.any(p * tests / steps <= ALPHA, axis=1)


def looking(rng: np.random.Generator, runs: int, n: int = 500) -> Iterator[Found]:
    """A look after every question up to n; rejected: at any of the looks."""
    for rate in (0.1, 0.4):
        setting = {"n": n, "discordance": rate, "other": "every look"}
        draws = rng.choice(3, size=(runs, n), p=[rate / 2, 1 - rate, rate / 2])
        yield "sequential_difference", setting, np.any(looks(draws, (0.0, 0.5, 1.0), 0.5), axis=1)
        only_a, only_b = np.cumsum(draws == 0, axis=1), np.cumsum(draws == 2, axis=1)
        yield "exact McNemar at every look", setting, np.any((sign_test(only_a, only_b) <= ALPHA), axis=1)
    for share in (0.5, 0.9):
        draws = (rng.random((runs, n)) < share).astype(int)
        setting = {"n": n, "accuracy": share, "other": "every look"}
        yield "sequential_mean", setting, np.any(looks(draws, (0.0, 1.0), share), axis=1)


def savings(runs: int = 1000, seed: int = 0, effect: float = 0.1) -> pd.DataFrame:
    """Questions asked until `sequential_difference` stops, beside the fixed n planned for `effect` at 80 % power.

    The true difference is as planned, twice that, or none; a run ends at twice the planned n. Columns: discordance,
    true, fixed, mean, median (questions asked), found (share that stopped), saved (1 - mean / fixed).
    """
    rng = np.random.default_rng(seed)
    lines = []
    for rate in (0.2, 0.4):
        fixed = questions_needed(effect, discordant_rate=rate)
        for true in (0.0, effect, 2 * effect):
            chances = [(rate - true) / 2, 1 - rate, (rate + true) / 2]
            stopped = looks(rng.choice(3, size=(runs, 2 * fixed), p=chances), (0.0, 0.5, 1.0), 0.5)
            asked = np.where(stopped.any(1), stopped.argmax(1) + 1, 2 * fixed)
            line = {"discordance": rate, "true": true, "fixed": fixed, "mean": asked.mean()}
            line |= {"median": np.median(asked), "found": stopped.any(1).mean(), "saved": 1 - asked.mean() / fixed}
            lines.append(line)
    return pd.DataFrame(lines)


def clustered_pairs(
    rng: np.random.Generator, runs: int, sizes: np.ndarray, rate: float, icc: float
) -> tuple[np.ndarray, np.ndarray]:
    """Counts [runs, clusters] of pairs won and lost; the differences' correlation in a cluster is `icc` <= `rate`."""
    differing = rng.binomial(sizes, rate, size=(runs, len(sizes)))
    won: float | np.ndarray = 0.5
    if icc:  # Beta(a, a) shares won: correlation of the differences is rate / (2 a + 1)
        shape = (rate / icc - 1) / 2
        won = rng.beta(shape, shape, size=differing.shape)
    up = rng.binomial(differing, won)
    return up, differing - up


def spread_sizes(clusters: int, size: int) -> np.ndarray:
    """Sizes with the given mean, a third of them small, a third double."""
    return np.resize([max(1, size // 4), size, 2 * size - max(1, size // 4)], clusters)


def bootstrap_limits(
    sums: np.ndarray, sizes: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Limits of `bootstrap_mean` with clusters for many data sets [runs, clusters], with the same draws."""
    k = len(sizes)
    picked = np.random.default_rng(seed).integers(0, k, size=(resamples, k))
    times = np.zeros((resamples, k))
    np.add.at(times, (np.arange(resamples)[:, None], picked), 1)
    low, high = np.percentile(sums @ times.T / (times @ sizes), [100 * ALPHA / 2, 100 * (1 - ALPHA / 2)], axis=1)
    return low, high


def outside_t(sums: np.ndarray, sizes: np.ndarray, squares: np.ndarray, truth: float) -> np.ndarray:
    """Whether `clustered_interval` leaves the truth out, for many data sets [runs, clusters] at once."""
    found = spread(sums, sizes, squares)
    return np.abs(found.mean - truth) > stats.t.isf(ALPHA / 2, found.df) * np.sqrt(found.variance)


def looks(draws: np.ndarray, points: Sequence[float], mean: float, at_once: int = 200) -> np.ndarray:
    """Whether the wealth against `mean` has reached 1 / alpha, for draws [runs, n] of places in `points`, by look."""
    parts = []
    for start in range(0, len(draws), at_once):
        counts = np.stack([np.cumsum(draws[start : start + at_once] == k, axis=1) for k in range(len(points))], axis=-1)
        parts.append(log_wealth(counts, np.array(points), mean) >= -np.log(ALPHA))
    return np.concatenate(parts)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m workbench.claims.type_one", description=(__doc__ or "")[:80])
    parser.add_argument("--runs", type=int, default=4000, help="simulated data sets a setting")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the table here, as CSV")
    options = parser.parse_args()
    table = type_one(options.runs, options.seed)
    if options.out:
        write_atomic(options.out, table.to_csv(index=False))
    shares = 100 * table[["rejected", "low", "high"]].to_numpy(dtype=float)
    said = [f"{share:.1f} % [{low:.1f}, {high:.1f}]" for share, low, high in shares]
    print(markdown(table.drop(columns=["rejected", "low", "high"]).assign(rejected=said)))
    print()
    print(markdown(savings(max(200, options.runs // 4), options.seed)))


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table; cells that say nothing stay empty."""
    rows = [[_cell(x) for x in row] for row in table.to_numpy(dtype=object).tolist()]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(map(str, table)), ["---"] * len(table.columns), *rows])


def _cell(value: Any) -> str:
    if value is None or value != value:  # nan differs from itself
        return ""
    return f"{value:.3g}" if isinstance(value, float) and value < 1000 else str(value)


if __name__ == "__main__":
    main()
