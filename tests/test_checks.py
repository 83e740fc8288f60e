"""Answers of every kind, right, wrong and blank; what is said is what a person reads."""

from typing import Any

import numpy as np
import pytest

import workbench as wb


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        (3, 3, True), (3.0, 3, True), (np.int64(3), 3, True), (np.float64(0.5), 0.5, True), (4, 3, False),
        (True, 1, False), (1, True, False), (True, True, True), (" Last ", "last", True), ("first", "last", False),
        ("3", 3, False), ([1, 2], (1, 2), True), ([1, 2], [2, 1], False), ({1, 2}, {2, 1}, True), (1, {1, 2}, True),
        (3, {1, 2}, False), (None, None, True), (None, 0, False), (float("nan"), 0.0, False),
        ({"a": 1}, {"a": 1}, True),
    ],
)  # fmt: skip
def test_answers_are_compared_by_what_they_mean(answer: Any, expected: Any, right: bool) -> None:
    assert wb.check(answer, expected).right is right


def test_what_is_said() -> None:
    assert wb.check(..., 1).right is None
    assert "Hint: count" in wb.check(..., 1, hint="count").said
    assert wb.check(0.54, 0.5, near=0.05).right
    assert not wb.check(0.56, 0.5, near=0.05).right
    assert wb.check(2, 1, wrong={2: "that counts twice"}, hint="count").said == "Not yet: that counts twice"
    assert wb.check(3, 1, wrong={2: "that counts twice"}, hint="count").said == "Not yet: 3 is not it. Hint: count"
    assert wb.check(3, 3, because="all of them").said == "Right: all of them"


def test_a_function_judges_and_never_stops_the_notebook() -> None:
    def even(answer: int) -> bool | str:
        return answer % 2 == 0 or f"{answer} is odd"

    assert wb.check(4, even).right
    assert wb.check(3, even).said == "Not yet: 3 is odd"
    assert "TypeError" in wb.check(None, even).said
    assert wb.check(lambda x: x + 1, lambda f: f(1) == 2).right


def test_predictions_are_no_faults() -> None:
    assert wb.check_prediction(..., 0.25).said == "No prediction made; measured was 0.25"
    assert wb.check_prediction(0.2, 0.25, near=0.1).right
    assert wb.check_prediction("late", "early").said == "You said 'late', measured was 'early'"
