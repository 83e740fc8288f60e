"""Krippendorff's alpha against his worked examples, against a direct count of pairs, and what it must not depend on."""

import itertools
import math
from random import Random

import numpy as np
import pytest

from workbench.synthesis.agreement import krippendorff, krippendorff_interval

_ = None
FOUR = [  # Krippendorff 2011, section D: 4 observers, 12 units
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _, _, _],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _, 3],
    [_, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _],
]
LEVELS = ("nominal", "ordinal", "interval")


def by_pairs(ratings: list[list], level: str) -> float:
    """The definition word for word: mean distance of pairs within units over that of all pairable values."""
    units = [[row[u] for row in ratings if row[u] is not None] for u in range(len(ratings[0]))]
    units = [unit for unit in units if len(unit) > 1]
    pool = [value for unit in units for value in unit]

    def distance(a: float, b: float) -> float:
        if level == "nominal":
            return float(a != b)
        if level == "interval":
            return (a - b) ** 2
        between = sum(min(a, b) <= value <= max(a, b) for value in pool)
        return (between - (pool.count(a) + pool.count(b)) / 2) ** 2 if a != b else 0.0

    n = len(pool)
    observed = sum(sum(distance(a, b) for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units)
    expected = sum(distance(a, b) for a, b in itertools.permutations(pool, 2))
    return 1 - (observed / n) / (expected / (n * (n - 1)))


def drawn(seed: int, raters: int = 3, units: int = 40, values: int = 4) -> list[list]:
    """Raters who mostly repeat a truth; a tenth is missing."""
    rng = Random(seed)
    truth = [rng.randrange(values) for _ in range(units)]
    return [
        [None if rng.random() < 0.1 else t if rng.random() < 0.6 else rng.randrange(values) for t in truth]
        for _ in range(raters)
    ]


@pytest.mark.parametrize(("level", "published"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_the_worked_example_of_four_observers(level: str, published: float) -> None:
    assert krippendorff(FOUR, level) == pytest.approx(published, abs=5e-4)
    assert krippendorff(FOUR, level) == pytest.approx(by_pairs(FOUR, level), abs=1e-12)


def test_the_worked_example_of_two_observers() -> None:
    table = [list("aabbdcccedda"), list("babbbccceddd")]  # Krippendorff 2011, section B: 12 articles, 5 categories
    assert krippendorff(table) == pytest.approx(0.692, abs=5e-4)
    assert krippendorff(table) == pytest.approx(by_pairs(table, "nominal"), abs=1e-12)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("seed", range(4))
def test_random_tables_equal_the_definition_by_pairs(level: str, seed: int) -> None:
    table = drawn(seed)
    assert krippendorff(table, level) == pytest.approx(by_pairs(table, level), abs=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_perfect_agreement_is_one_and_chance_is_about_zero(level: str) -> None:
    truth = [1, 2, 3, 1, 2, None]
    assert krippendorff([truth, truth, [3, *truth[1:]]], level) < 1
    assert krippendorff([truth, truth, truth], level) == 1
    rng = Random(1)
    noise = [[rng.randrange(3) for _ in range(4000)] for _ in range(2)]
    assert abs(krippendorff(noise, level)) < 0.05
    assert krippendorff([[0, 1] * 20, [1, 0] * 20], level) < -0.9


@pytest.mark.parametrize("level", LEVELS)
def test_order_of_raters_and_units_and_lone_ratings_do_not_matter(level: str) -> None:
    alpha = krippendorff(FOUR, level)
    assert krippendorff(FOUR[::-1], level) == pytest.approx(alpha)
    assert krippendorff([row[::-1] for row in FOUR], level) == pytest.approx(alpha)
    lone = [[*row, 9 if number == 0 else None] for number, row in enumerate(FOUR)]
    assert krippendorff(lone, level) == pytest.approx(alpha)


def test_names_do_not_matter_to_nominal_nor_the_unit_to_interval_ratings() -> None:
    names = {1: "x", 2: "a", 3: "m", 4: "b", 5: "q", None: None}
    renamed = [[names[value] for value in row] for row in FOUR]
    assert krippendorff(renamed) == pytest.approx(krippendorff(FOUR))
    moved = [[None if v is None else 3.5 * v - 7 for v in row] for row in FOUR]
    assert krippendorff(moved, "interval") == pytest.approx(krippendorff(FOUR, "interval"))
    stretched = [[None if v is None else 10.0**v for v in row] for row in FOUR]
    assert krippendorff(stretched, "ordinal") == pytest.approx(krippendorff(FOUR, "ordinal"))
    assert krippendorff(stretched, "interval") != pytest.approx(krippendorff(FOUR, "interval"))


def test_the_interval_repeats_holds_the_estimate_and_narrows_with_units() -> None:
    few, many = krippendorff_interval(drawn(0, units=40)), krippendorff_interval(drawn(0, units=640))
    assert few == krippendorff_interval(drawn(0, units=40))
    assert few.estimate == krippendorff(drawn(0, units=40))
    for found in (few, many):
        assert found.low < found.estimate < found.high
    assert 2 < (few.high - few.low) / (many.high - many.low) < 8  # a root of 16, about
    assert krippendorff_interval(FOUR).n == 11  # the twelfth unit has one rating


def test_units_of_one_cluster_are_drawn_together() -> None:
    table = drawn(3, units=60)
    alone = krippendorff_interval(table)
    assert krippendorff_interval(table, clusters=range(60)) == alone
    copied = [[value for value in row for _ in range(9)] for row in table]
    together = krippendorff_interval(copied, clusters=np.repeat(np.arange(60), 9).tolist())
    assert krippendorff_interval(copied).high - krippendorff_interval(copied).low < (alone.high - alone.low) / 2
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_without_variation_alpha_is_undefined_and_says_so() -> None:
    assert math.isnan(krippendorff([[1, 1], [1, 1]]))
    assert math.isnan(krippendorff([[1, None], [None, 2]]))
    assert "undefined" in krippendorff_interval([[1, 1], [1, 1]]).note
    rare = krippendorff_interval([[1, 1, 1, 2], [1, 1, 1, 2]])
    assert rare.estimate == 1
    assert "without variation" in rare.note and "no spread seen" in rare.note


@pytest.mark.parametrize(
    ("ratings", "level", "message"),
    [
        ([[1, 2]], "nominal", "two raters or more"),
        ([[1, 2], [1]], "nominal", r"got 2 raters with \[1, 2\] units"),
        ([[1], [2]], "ratio", "level='ratio' is not known"),
        ([["a"], ["b"]], "ordinal", "finite numbers, or None; got 'a'"),
        ([[1.0], [math.inf]], "interval", "finite numbers"),
    ],
)
def test_ratings_that_cannot_be_used_are_told(ratings: list[list], level: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        krippendorff(ratings, level)


def test_a_missing_rating_is_none_and_numbers_of_numpy_are_numbers() -> None:
    for level in LEVELS:
        with pytest.raises(ValueError, match="Write None where a rating is missing"):
            krippendorff([[1, math.nan], [1, 2]], level)
    table = np.array([[1, 2, 1, 3], [1, 2, 2, 3]])
    assert krippendorff([list(row) for row in table], "ordinal") == krippendorff(table.tolist(), "ordinal")
