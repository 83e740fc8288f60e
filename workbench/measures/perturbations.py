"""Changes of a question whose new gold answer is known: other words, other names, a number, a quantifier, a gap.

Each takes a row and a random stream and returns the changed row, or the reason why this row has none. The lab's
families are read back from their text and worked out again by rule, GSM8K and SVAMP by their own calculation
(`chains`); other tasks only get other words around the question.

| change | gold answer | works on |
|---|---|---|
| `paraphrase` | stays | all: lab families in their own or other wordings, the rest by the words around the question |
| `rename` | stays | word-problems |
| `change_number` | changes | all lab families but syllogism, gsm8k, svamp |
| `change_quantifier` | changes | word-problems (gain, loss), chain-sum (sign), number-sorting (order), syllogism |
| `delete_number` | "cannot be answered" | all lab families but syllogism, gsm8k, svamp |

Does not cover: paraphrases by a model, typing errors, premises that contradict each other.
Sources: contrast sets, Gardner et al. 2020 (arXiv 2004.02709); numbers and names changed in GSM8K, Mirzadeh et al.
2024 (arXiv 2410.05229); missing premises, Fan et al. 2025 (arXiv 2504.06514).
"""

import math
import re
from random import Random
from typing import Any

from workbench.measures import chains
from workbench.measures.syllogisms import follows, parsed
from workbench.measures.word_problems import Problem, reading

Row = dict[str, Any]
CANNOT = "cannot be answered"
WORDINGS = (
    "Please solve this problem. {}", "Here is a question. {}", "{}\nGive the answer.", "Question: {}",
    "Read this carefully and answer. {}",
)  # fmt: skip
_SUM = re.compile(r"^(?P<head>.*: )(?P<sum>\d+(?: [-+] \d+)+) =$")
_LEGS = re.compile(r"^How many legs are there in total if you have (?P<animals>.+)\?$")
_SORT = re.compile(r"^Sort these numbers in (?P<order>ascending|descending) order: (?P<numbers>[-\d, ]+)$")
_GCD = re.compile(r"^Find the Greatest Common Divisor \(GCD\) of these numbers: (?P<numbers>[\d, ]+)\.$")


def paraphrase(row: Row, rng: Random) -> Row | str:
    """The same problem in other words; the gold answer stays.

    Word problems keep the lab's own vocabulary (buys, finds, brings; loses, sells, gives); the other lab families
    get a wording that the lab model was not trained on; other tasks get other words around the question.
    """
    question = row["question"]
    if problem := reading(question):
        other = problem.reworded(rng)
        return row | {"question": other.text()} if other.text() != question else "nothing in it has another wording"
    if found := _SUM.match(question):
        heads = ("What is {}?", "Work out {} and give the result.", "Calculate: {} =")
        return row | {"question": rng.choice(heads).format(found["sum"])}
    if found := _LEGS.match(question):
        animals = found["animals"].split(", ")
        rng.shuffle(animals)
        return row | {"question": f"You have {', '.join(animals)}. How many legs are there in total?"}
    if found := _SORT.match(question):
        return row | {"question": f"Put these numbers in {found['order']} order: {found['numbers']}"}
    if found := _GCD.match(question):
        return row | {"question": f"What is the greatest common divisor of these numbers: {found['numbers']}?"}
    if statements := parsed(question):
        first, second, conclusion = statements
        said = f"Consider these statements: 1. {second} 2. {first} Does it logically follow that: {conclusion}?"
        return row | {"question": f"{said} (Answer Yes or No)"}
    return row | {"question": rng.choice(WORDINGS).format(question)}


def rename(row: Row, rng: Random) -> Row | str:
    """Other people and another thing in a word problem; the gold answer stays."""
    problem = reading(row["question"])
    return row | {"question": problem.renamed(rng).text()} if problem else "not one of the lab's word problems"


def change_number(row: Row, rng: Random) -> Row | str:
    """One number is another one, and so is the gold answer."""
    question = row["question"]
    if problem := reading(question):
        return _changed(row, problem, problem.other_numbers(rng))
    if found := _SUM.match(question):
        pick = rng.choice(list(re.finditer(r"\d+", found["sum"])))
        new = rng.choice([n for n in range(1, 100) if n != int(pick[0])])
        return _sum_row(row, found["head"], f"{found['sum'][: pick.start()]}{new}{found['sum'][pick.end() :]}")
    if found := _LEGS.match(question):
        return _legs_row(row, found["animals"].split(", "), rng)
    if found := _SORT.match(question):
        numbers = list(map(int, found["numbers"].split(", ")))
        numbers[rng.randrange(len(numbers))] = rng.choice([n for n in range(100) if n not in numbers])
        return _sort_row(row, numbers, found["order"])
    if found := _GCD.match(question):
        numbers = list(map(int, found["numbers"].split(", ")))
        place = rng.randrange(len(numbers))
        rest = [math.gcd(n, *numbers[:place], *numbers[place + 1 :]) for n in range(2, 61)]
        fitting = [n for n, value in enumerate(rest, start=2) if value != math.gcd(*numbers)]
        if not fitting:
            return "no other number changes the divisor"
        numbers[place] = rng.choice(fitting)
        text = f"Find the Greatest Common Divisor (GCD) of these numbers: {', '.join(map(str, numbers))}."
        return row | {"question": text, "answer": str(math.gcd(*numbers))}
    return chains.changed_number(row, rng)


def change_quantifier(row: Row, rng: Random) -> Row | str:
    """More becomes less, double triple, ascending descending, all some or no; left out where the answer stays.

    Syllogisms only where the gold answer is the one that follows from the statements: the data set's own rule
    accepts some that don't follow, and no answer can be worked out again by a rule that differs.
    """
    question = row["question"]
    if problem := reading(question):
        return _changed(row, problem, problem.other_quantifiers(rng))
    if found := _SUM.match(question):
        signs = list(re.finditer(r" [-+] ", found["sum"]))
        pick = rng.choice(signs)
        flipped = " - " if pick[0] == " + " else " + "
        return _sum_row(row, found["head"], f"{found['sum'][: pick.start()]}{flipped}{found['sum'][pick.end() :]}")
    if found := _SORT.match(question):
        order = "ascending" if found["order"] == "descending" else "descending"
        changed = _sort_row(row, list(map(int, found["numbers"].split(", "))), order)
        return changed if changed["answer"] != str(row["answer"]) else "the answer stays the same"
    if statements := parsed(question):
        return _syllogism_row(row, statements, rng)
    return "no rule works its gold answer out again"


def delete_number(row: Row, rng: Random) -> Row | str:
    """A number that the answer needs is gone ("some", "?"): the gold answer is `CANNOT`, and `unanswerable` is set."""
    question = row["question"]
    if problem := reading(question):
        changed = problem.without_number(rng)
    elif found := _SUM.match(question) or _SORT.match(question) or _GCD.match(question):
        start = found.start("sum" if "sum" in found.groupdict() else "numbers")
        numbers = list(re.finditer(r"\d+", question[start:]))
        if _GCD.match(question):  # where the others have no common divisor the answer is 1 whatever is missing
            values = [int(each[0]) for each in numbers]
            numbers = [m for k, m in enumerate(numbers) if math.gcd(*values[:k], *values[k + 1 :]) > 1]
        if not numbers:
            return "the answer is the same whatever number is missing"
        pick = rng.choice(numbers)
        changed = f"{question[: start + pick.start()]}?{question[start + pick.end() :]}"
    elif found := _LEGS.match(question):
        legs = _legs(row, found["animals"].split(", "))
        with_legs = [m for m, each in zip(re.finditer(r"\d+", question), legs, strict=False) if each]
        if not with_legs:
            return "its worked steps don't show the legs of each animal"
        pick = rng.choice(with_legs)
        changed = f"{question[: pick.start()]}some{question[pick.end() :]}"
    else:
        said = _without_number(row, rng)
        if isinstance(said, tuple):
            return said[0]
        changed = said
    return row | {"question": changed, "answer": CANNOT, "unanswerable": True}


def _without_number(row: Row, rng: Random) -> str | tuple[str]:
    """A GSM8K or SVAMP question without a number that its calculation uses; the reason in a tuple."""
    found = chains.calculation_of(row)
    if isinstance(found, str):
        return (found,)
    names = [name for name in chains.usable_numbers(row, found) if chains.is_needed(found, name)]
    if not names:
        return ("no number that can be deleted alone",)
    start, end = found.spans[rng.choice(names)]
    before, after = row["question"][:start], row["question"][end:]
    if re.search(r"\$\s?$", before):
        return f"{before.rstrip(' $')} some money{after}"
    said = "some percent" if after.startswith("%") else "some"
    said = said.capitalize() if re.search(r"(^|[.?!]\s+)$", before) else said
    return f"{before}{said}{after.removeprefix('%')}"


def _changed(row: Row, before: Problem, after: Problem | None) -> Row | str:
    value = after.value() if after else None
    if after is None or value is None or value == before.value():
        return "no such change keeps the numbers whole and in range"
    return row | {"question": after.text(), "answer": str(value)}


def _sum_row(row: Row, head: str, expression: str) -> Row | str:
    value = chains.evaluated(expression, {})
    if str(value) == str(row["answer"]):
        return "the answer stays the same"
    return row | {"question": f"{head}{expression} =", "answer": str(value)}


def _legs_row(row: Row, animals: list[str], rng: Random) -> Row | str:
    """One animal with legs more or less often."""
    legs = _legs(row, animals)
    places = [place for place, each in enumerate(legs) if each]
    if not places:
        return "its worked steps don't show the legs of each animal"
    place = rng.choice(places)
    count, each = int(animals[place].split(" ", 1)[0]), legs[place]
    new = rng.choice([n for n in range(2, 10) if n != count])
    name = animals[place].split(" ", 1)[1]
    name = name if count > 1 or name.endswith("s") else f"{name}s"
    listed = ", ".join([*animals[:place], f"{new} {name}", *animals[place + 1 :]])
    answer = int(row["answer"]) + (new - count) * each
    return row | {"question": f"How many legs are there in total if you have {listed}?", "answer": str(answer)}


def _legs(row: Row, animals: list[str]) -> list[int]:
    """Legs of one of each animal, read from the worked steps; nothing where these tell of others."""
    found = re.findall(r"(\d+)\*(\d+)=", (row.get("solutions") or {}).get("steps") or "")
    told = [count for count, _ in found] == [animal.split(" ", 1)[0] for animal in animals]
    return [int(each) for _, each in found] if told else []


def _sort_row(row: Row, numbers: list[int], order: str) -> Row:
    placed = ", ".join(map(str, sorted(numbers, reverse=order == "descending")))
    question = f"Sort these numbers in {order} order: {', '.join(map(str, numbers))}"
    return row | {"question": question, "answer": placed}


def _syllogism_row(row: Row, statements: tuple[str, str, str], rng: Random) -> Row | str:
    first, second, conclusion = statements
    if ("Yes" if follows(first, second, conclusion) else "No") != row["answer"]:
        return "its gold answer is not what follows from the statements"
    options = []
    for quantifier in ("All", "No", "Some"):
        for changed in (
            re.sub(r"^(All|No|Some)\b", quantifier, first),
            re.sub(r"^(All|No|Some)\b", quantifier, second),
        ):
            pair = (changed, second) if changed.split(" ", 1)[1] == first.split(" ", 1)[1] else (first, changed)
            if pair != (first, second) and "are not" not in changed:
                options.append(pair)
    flipped = [pair for pair in options if ("Yes" if follows(*pair, conclusion) else "No") != row["answer"]]
    if not flipped:
        return "no other quantifier changes the answer"
    one, two = rng.choice(flipped)
    said = f"Consider these statements: 1. {one} 2. {two} Does it logically follow that: {conclusion}?"
    return row | {
        "question": f"{said} (Answer Yes or No)",
        "answer": "No" if row["answer"] == "Yes" else "Yes",
    }
