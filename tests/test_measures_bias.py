"""Options in other orders, and models that know, that always say A, and that say A at times."""

import math
import re
from random import Random

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from workbench.likelihood.choices import Choice
from workbench.measures.bias import by_option, choice_rows, option_bias, permuted, reordered, rotated
from workbench.tasks import load_task


def questions(n: int, options: int = 4, turns: bool = True) -> list[dict]:
    found = []
    for number in range(n):
        texts = [f"thing {number} {place}" for place in range(options)]
        listed = "\n".join(f"({chr(65 + place)}) {text}" for place, text in enumerate(texts))
        answer = chr(65 + Random(number).randrange(options))
        row = {"id": str(number), "question": f"Which is {number}?\nOptions:\n{listed}", "answer": f"({answer})"}
        for by in range(options if turns else 1):
            order = [(place + by) % options for place in range(options)]
            turned = reordered(row, order)
            found.append(turned | {"id": f"{number}~{by}", "order": order, "original": str(number)})
    return found


def answered(asked: list[dict], say, condition: str = "model") -> pd.DataFrame:
    lines = []
    for row in asked:
        said = say(row)
        lines.append((row["id"], condition, said, said == row["answer"].strip("()")))
    return pd.DataFrame(lines, columns=["id", "condition", "extracted", "correct"])


def test_one_that_knows_and_one_that_always_says_a():
    asked = questions(30)
    knows = answered(asked, lambda row: row["answer"].strip("()"), "knows")
    found = option_bias(pd.concat([knows, answered(asked, lambda row: "A", "A")]), asked).set_index("condition")
    assert found.loc["knows", ["tvd", "rstd", "consistency", "p_value"]].tolist() == [0, 0, 1, 1]
    assert found.loc["A", ["tvd", "consistency", "questions"]].tolist() == [0.75, 0, 30]
    alone = stats.chisquare([30, 0, 0, 0])  # four rows a question that say the same say it once
    assert found.loc["A", ["chi2", "df", "p_value"]].tolist() == pytest.approx([alone.statistic, 3, alone.pvalue])
    few = questions(2)
    assert option_bias(answered(few, lambda row: "A"), few).p_value[0] == pytest.approx(0.1116, abs=1e-4)
    assert found.loc["A", "rstd"] == pytest.approx(np.std([1, 0, 0, 0]))
    letters = by_option(answered(asked, lambda row: "A"), asked)
    assert letters.accuracy.tolist() == letters.chosen.tolist() == [1, 0, 0, 0] and letters.n.tolist() == [30] * 4
    assert letters.uniform.tolist() == [0.25] * 4 and letters.accuracy_high[1] > 0


def test_a_planted_share_of_a_is_found_and_a_wrong_but_steady_content_is_no_bias():
    asked, rng = questions(200), Random(0)
    say = lambda row: "A" if rng.random() < 0.3 else rng.choice("ABCD")  # noqa: E731  # tvd 0.3 * 0.75
    found = option_bias(answered(asked, say), asked).iloc[0]
    assert found.tvd_low < 0.225 < found.tvd_high and found.tvd_low > 0.1 and found.p_value < 1e-6
    steady = answered(asked, lambda row: chr(65 + row["order"].index(int(row["original"]) % 4)))
    found = option_bias(steady, asked).iloc[0]
    assert found.tvd == 0 and found.consistency == 1 and found.p_value == 1
    half = answered(asked, lambda row: "B" if int(row["original"]) % 2 else row["answer"].strip("()"))
    assert option_bias(half, asked).consistency[0] == 0.5


def test_chi_square_is_pearsons_alone_and_keeps_its_level_in_clusters():
    alone, rng = questions(400, turns=False), Random(1)
    rows = answered(alone, lambda row: rng.choice("AABCD"))
    found = option_bias(rows, alone).iloc[0]
    reference = stats.chisquare(np.bincount([ord(each) - 65 for each in rows.extracted]))
    assert found.chi2 == pytest.approx(reference.statistic, rel=0.15)
    assert found.p_value == pytest.approx(reference.pvalue, abs=0.05) and math.isnan(found.consistency)
    false, naive = 0, 0
    asked = questions(25)
    for seed in range(120):  # the same letter in all four orders of a question: 25 independent ones, not 100
        letters = {str(number): Random(f"{seed}/{number}").choice("ABCD") for number in range(25)}
        rows = answered(asked, lambda row, letters=letters: letters[row["original"]])
        counts = np.bincount([ord(each) - 65 for each in rows.extracted], minlength=4)
        naive += stats.chisquare(counts).pvalue < 0.05
        false += _p(rows, asked) < 0.05
    assert naive > 40 and 0 < false <= 14  # 5 % is 6 of 120; 14 has a chance of 1 in 1,000 there


def _p(rows: pd.DataFrame, asked: list[dict]) -> float:
    from workbench.measures.bias import _asked, _chi_square

    return _chi_square(_asked(rows, asked))[2]


def test_options_that_cannot_be_moved():
    row = questions(1)[0]
    bound = row | {"question": row["question"].replace("thing 0 3", "None of the above")}
    del bound["option_texts"]
    assert "place or letter" in reordered(bound, [3, 2, 1, 0])
    assert "not listed" in reordered(row | {"question": "Which?"}, [3, 2, 1, 0])
    with pytest.raises(ValueError, match="no order of 4"):
        reordered(row, [0, 0, 1, 2])
    with pytest.raises(ValueError, match="none of the 4 questions"):
        option_bias(answered(questions(2), lambda row: "A"), questions(1))
    with pytest.raises(ValueError, match="no answer of 4"):
        option_bias(answered(questions(1), lambda row: None), questions(1))


@pytest.mark.parametrize("name", ["aqua", "bbh:penguins_in_a_table"])
def test_real_options_keep_their_right_content(name, data_folder):
    task = load_task(name, path=data_folder)
    before = {row["id"]: row for row in task.rows()}
    for changed in (rotated(task), permuted(task, 1)):
        rows = changed.rows()
        for row in rows:
            own = before[row["original"]]
            line = re.compile(rf"^\({row['answer'].strip('()')}\) (.*)$", flags=re.MULTILINE)
            gold = re.search(rf"^\({own['answer'].strip('()')}\) (.*)$", own["question"], flags=re.MULTILINE)
            assert line.search(row["question"])[1] == gold[1]
            assert "solutions" not in row
            assert changed.verify(row, f"The answer is {row['answer']}.").correct
        assert len({row["original"] for row in rows}) > 0.8 * len(before)
        assert len({row["id"] for row in rows}) == len(rows)
    turned = rotated(task).rows(n=3)
    assert turned[0]["question"] == before[turned[0]["original"]]["question"] and len(turned) >= 12
    found = option_bias(answered(rotated(task).rows(n=20), lambda row: "A"), rotated(task).rows(n=20))
    assert found.tvd[0] == pytest.approx(0.8, abs=0.02) and found.consistency[0] == 0


def test_choices_by_likelihood():
    asked = questions(2, turns=False)
    made = [Choice(row["id"], "", ("a", "b", "c", "d"), 0, 2, False, (), 0.0, 0.0, ()) for row in asked]
    found = by_option(choice_rows(made), asked)
    assert found.chosen.tolist() == [0, 0, 1, 0]


def test_one_question_has_no_limits():
    asked = questions(1)
    found = option_bias(answered(asked, lambda row: "A"), asked).iloc[0]
    assert found.tvd == 0.75 and found[["tvd_low", "tvd_high", "rstd_low", "rstd_high"]].isna().all()
