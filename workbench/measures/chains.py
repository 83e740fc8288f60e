"""Gold answers worked out again after one number of a question has changed, where the file shows the calculation.

GSM8K's solutions carry calculator notes, <<16-3-4=9>>; SVAMP's rows an equation. A calculation is only used when it
gives the original gold answer exactly, when every operand can be traced to one place (a number of the question, an
earlier result, a number word, a usual constant), and when the number that changes stands once in the question and
once in the calculation. Everything else is left out, with the reason: a wrong gold answer is worse than a row less.

Does not cover: MATH, AQuA (their rationales are prose).
"""

import ast
import operator
import re
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from typing import Any

Row = dict[str, Any]
_NOTE = re.compile(r"<<([^<>\n=]+)=([^<>\n]+)>>")
_NUMBER = re.compile(r"(?<![\w.,/-])\$?(\d{1,3}(?:,\d{3})+|\d+(?:\.\d+)?)(?![\w/]|[.,]\d|-\w|:\d)")
_OPERAND = re.compile(r"\d+(?:\.\d+)?|(?<!\d)\.\d+")
_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_VALUES = {word: Fraction(number) for number, word in enumerate(_WORDS)}
_VALUES |= {
    "once": Fraction(1),
    "twice": Fraction(2),
    "thrice": Fraction(3),
    "double": Fraction(2),
    "half": Fraction(2),
}
_VALUES |= {"dozen": Fraction(12), "triple": Fraction(3), "quarter": Fraction(4), "third": Fraction(3)}
CONSTANTS = frozenset(map(Fraction, (2, 7, 12, 24, 30, 52, 60, 100, 365, 1000)))  # twice, weeks, months, per cent, ...
_OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


@dataclass(frozen=True)
class Calculation:
    """Expressions in order; an operand is `n0` (a number of the question), `r0` (a result) or itself."""

    expressions: tuple[str, ...]
    inputs: dict[str, Fraction]
    spans: dict[str, tuple[int, int]]  # where an input stands in the question

    def results(self, inputs: dict[str, Fraction]) -> list[Fraction] | None:
        """Value of every expression; None where one can't be computed."""
        names = dict(inputs)
        for place, expression in enumerate(self.expressions):
            value = evaluated(expression, names)
            if value is None:
                return None
            names[f"r{place}"] = value
        return [names[f"r{place}"] for place in range(len(self.expressions))]


def evaluated(expression: str, names: dict[str, Fraction]) -> Fraction | None:
    """What an expression of numbers, names, + - * / and brackets comes to, exactly; None for anything else.

    >>> evaluated("(n0 + 2) / 3", {"n0": Fraction(4)})
    Fraction(2, 1)
    """

    def of(node: ast.AST) -> Fraction:
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -of(node.operand)
        if isinstance(node, ast.BinOp):
            return _OPERATIONS[type(node.op)](of(node.left), of(node.right))
        if isinstance(node, ast.Name):
            return names[node.id]
        return Fraction(str(node.value))  # type: ignore[attr-defined]  # else: AttributeError, caught below

    try:
        return of(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, ValueError, AttributeError, KeyError):
        return None


def calculation_of(row: Row) -> Calculation | str:
    """The calculation that a row shows, with operands traced; or why it can't be used."""
    if isinstance(row.get("equation"), str):
        notes = [(row["equation"], str(row["answer"]))]
    else:
        solution = row.get("solution")
        notes = _NOTE.findall(solution) if isinstance(solution, str) else []
    if not notes:
        return "no worked calculation in the row"
    told = _told(row["question"])
    traced: list[str] = []
    inputs: dict[str, Fraction] = {}
    spans: dict[str, tuple[int, int]] = {}
    values: list[Fraction] = []
    for left, right in notes:
        left = re.sub(r"(\d),(?=\d{3})", r"\1", left).replace("$", "")
        given, value = _fraction(right), evaluated(left, {})
        if value is None or given is None or value != given:
            return "a note that is no plain calculation"
        expression = _traced(left, told, row["question"], values, inputs, spans)
        if expression is None:
            return "an operand that can't be traced to one place"
        traced.append(expression)
        values.append(value)
    if values[-1] != _fraction(row["answer"]):
        return "the calculation doesn't end in the gold answer"
    return Calculation(tuple(traced), inputs, spans)


def _told(question: str) -> dict[Fraction, list[tuple[int, int]]]:
    """Numbers of a question with their places."""
    found: dict[Fraction, list[tuple[int, int]]] = {}
    for match in _NUMBER.finditer(question):
        found.setdefault(Fraction(match[1].replace(",", "")), []).append(match.span(1))
    return found


def _traced(
    expression: str,
    told: dict[Fraction, list[tuple[int, int]]],
    question: str,
    values: list[Fraction],
    inputs: dict[str, Fraction],
    spans: dict[str, tuple[int, int]],
) -> str | None:
    """The expression with each operand replaced by its source; None where one has none, or more than one."""
    words = {_VALUES[word.lower()] for word in re.findall(r"[A-Za-z]+", question) if word.lower() in _VALUES}
    failed = False

    def source(match: "re.Match[str]") -> str:
        nonlocal failed
        number = Fraction(match[0])
        sources: list[str] = [f"r{place}" for place, value in enumerate(values) if value == number]
        if number in told:
            name = f"n{len(inputs)}" if len(told[number]) == 1 else ""
            sources += [next((known for known, value in inputs.items() if value == number), name)]
            if name and sources == [name]:
                inputs[name], spans[name] = number, told[number][0]
        if len(sources) > 1 or sources == [""]:
            failed = True
        if not sources and number not in words and number not in CONSTANTS and number != 1:
            failed = True
        return sources[0] if sources else match[0]

    result = _OPERAND.sub(source, expression)
    return None if failed else result


def changed_number(row: Row, rng: Random) -> Row | str:
    """The row with one number of its question changed and the gold answer worked out again; or why there is none.

    The new number lies within 9 of the old one (decimals: whole steps away), and every result that was a whole number
    or above zero stays so.
    """
    found = calculation_of(row)
    if isinstance(found, str):
        return found
    before = found.results(found.inputs)
    assert before is not None
    places = usable_numbers(row, found)
    steps = [step for step in range(-9, 10) if step]
    tries = [(name, step) for name in places for step in steps]
    rng.shuffle(tries)
    for name, step in tries:
        after = found.results(found.inputs | {name: found.inputs[name] + step})
        if found.inputs[name] + step < 2 or after is None or after[-1] == before[-1]:
            continue
        if all(_alike(old, new) for old, new in zip(before, after, strict=True)):
            start, end = found.spans[name]
            question = f"{row['question'][:start]}{_written(found.inputs[name] + step)}{row['question'][end:]}"
            return row | {"question": question, "answer": _written(after[-1])}
    return "no number that can be changed alone" if not places else "no other value keeps the results whole"


def usable_numbers(row: Row, found: Calculation) -> list[str]:
    """Inputs that stand once in the question and once in the calculation, and are no word or usual constant there."""
    words = {_VALUES[word.lower()] for word in re.findall(r"[A-Za-z]+", row["question"]) if word.lower() in _VALUES}
    together = " ".join(found.expressions)
    return [
        name
        for name, value in found.inputs.items()
        if len(re.findall(rf"\b{name}\b", together)) == 1 and value not in words and value not in CONSTANTS
    ]


def is_needed(found: Calculation, name: str) -> bool:
    """Whether the last result depends on an input; a solution may work out numbers that it doesn't use."""
    ends = {
        after[-1] for step in range(3) if (after := found.results(found.inputs | {name: found.inputs[name] + step}))
    }
    return len(ends) > 1


def _alike(old: Fraction, new: Fraction) -> bool:
    return (old > 0) == (new > 0) and (new.denominator == 1 if old.denominator == 1 else _is_decimal(new))


def _is_decimal(value: Fraction) -> bool:
    return 10**4 % value.denominator == 0


def _written(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):g}"


def _fraction(text: Any) -> Fraction | None:
    try:
        return Fraction(str(text).replace(",", "").replace("$", "").strip())
    except (ValueError, ZeroDivisionError):
        return None
