r"""Reading the answer out of a model's text, because a score is only as good as this rule.

Only the final answer counts: thinking blocks and anything after the end of the turn are removed first. An answer is
taken from the last statement of one (`#### 18`, `\boxed{18}`, "the answer is 18", "la respuesta es 18", a line `A:
18`); only a text without any such statement falls back to its last number or its last line, and no rule ever guesses.
With this rule the four models' solutions that GSM8K ships get exactly the 5,276 labels that its authors gave them.

Does not cover: comparing answers (`workbench.tasks.verifiers`), LaTeX equality (`workbench.tasks.latex`).
"""

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from workbench.tasks.latex import plain

KINDS: tuple[str, ...] = ("number", "latex", "option", "text", "list", "ordering", "span", "code")
CLOSED: tuple[frozenset[str], ...] = tuple(
    frozenset(words.split()) for words in ("yes no", "true false", "valid invalid", "sí no", "verdadero falso")
)
_TURN_END = re.compile(
    r"<\|(?:end|im_end|endoftext|end_of_text|eot_id|return|user|system)\|>|<\|im_start\|>user|<end_of_turn>|<eos>|</s>"
    r"|<｜end▁of▁sentence｜>"
)
_NEXT_QUESTION = re.compile(r"(?<=\S)\s*\n\s*(?:Question|Pregunta|Human|User|Q)\s*:")
_THINK = re.compile(r"<(think|thinking)>.*?</\1>", flags=re.DOTALL)
_MARKER = re.compile(
    r"\#{4}(?!\#)(?!\s*(?:step|paso)\b)(?!\s*\d+[.)]\s+\w)"  # GSM8K's "#### 18"; not a heading "#### 2. Add up"
    r"|^[\s*_]*(?:A|R)\s*:"  # a line "A: 18"
    r"|<answer>|^\W*(?:final\s+)?(?:answer|respuesta)\W*$"  # a tag; a heading
    r"|\b(?:answer|respuesta|(?:correct|right|best)\s+(?:option|choice))\b(?:\s+(?:final|correcta))?"
    r"(?:\s+(?:to|for|choice|option|a)\b[^.:=\n]{0,80}?)?[\s*_]*(?:\bis\b|\bare\b|\bwould\s+be\b|\bes\b|\bson\b|=|:|\s[-–]\s)",
    flags=re.IGNORECASE | re.MULTILINE,
)
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]%])[-+])?(?:(?<![A-Za-z_])|(?<=Rs)|(?<=USD)|(?<=EUR))(?:[$€£¥]\s?)?(?P<inner>(?<=[$€£¥])-)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:[eE](?P<exponent>[-+]?\d{1,3})(?!\w)|\s?(?:×|x|\*|\\times|\\cdot)\s?10\^\{?(?P<power>-?\d{1,3})\}?)?"
    r"(?:\s(?P<part>\d+)\s?/\s?(?P<whole>\d+)(?![\d/]))?(?:\s?/\s?(?P<under>\d+)(?![\d/]))?"
)
LONGEST = 1000  # digits; a longer "number" is a model that repeats itself, and from 4,300 on Python won't convert it


def final_text(text: str) -> str:
    """What a reader of the answer sees: this turn only, without thinking.

    >>> final_text("<think>It is 7.</think>The answer is 8.<|end|><|user|>Next: 9")
    'The answer is 8.'
    """
    text = _TURN_END.split(text, maxsplit=1)[0]
    text = _THINK.sub(" ", text)
    text = re.split(r"</think(?:ing)?>", text)[-1]  # the prompt itself may have opened the block
    text = re.split(r"<think(?:ing)?>", text, maxsplit=1)[0]  # still thinking when the tokens ran out
    return _NEXT_QUESTION.split(text, maxsplit=1)[0].strip()


def reopened(prompt: str, text: str) -> str:
    """An answer with the thinking block that its prompt opened, so that unfinished thoughts are known as such.

    Some chat templates end the prompt in `<think>`; if the tokens run out before it is closed, the text has no mark.

    >>> final_text("17 or so"), final_text(reopened("7+9?<|assistant|><think>\\n", "17 or so"))
    ('17 or so', '')
    """
    opened = re.search(r"<(think|thinking)>\s*$", prompt)
    return opened[0] + text if opened else text


def this_turn(text: str) -> str:
    """A text up to the end of its turn, thoughts included: what a second call may go on from.

    >>> this_turn("<think>2+2</think>It is 4.\\nQuestion: And 3+3?")
    '<think>2+2</think>It is 4.'
    """
    text = _TURN_END.split(text, maxsplit=1)[0]
    thoughts = max((mark.end() for mark in re.finditer(r"</think(?:ing)?>", text)), default=0)
    if re.search(r"<think(?:ing)?>", text[thoughts:]):
        return text
    return text[:thoughts] + _NEXT_QUESTION.split(text[thoughts:], maxsplit=1)[0]


def boxed(text: str) -> list[tuple[int, str]]:
    r"""Start and content of every `\boxed{...}`, with braces balanced; an unfinished one is left out.

    >>> boxed(r"so \boxed{\frac{1}{2}}.")
    [(3, '\\frac{1}{2}')]
    """
    found = []
    for match in re.finditer(r"\\f?boxed\s*\{", text):
        depth, end = 1, match.end()
        while end < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            end += 1
        if not depth:
            found.append((match.start(), text[match.end() : end - 1].strip()))
    return found


def statements(text: str) -> list[tuple[str, str]]:
    """Every statement of an answer, last first: its own clause, and all the text after its marker.

    >>> statements("The answer is 4. No: the answer is **5 apples**, I think. Bye.")[0][0]
    '5 apples**, I think'
    """
    found = [(start, content, content) for start, content in boxed(text)]
    for match in _MARKER.finditer(text):
        rest = text[match.end() :].partition("</answer>")[0].strip().lstrip("*:").removeprefix("__").strip()
        found.append((match.start(), _clause(rest), rest))
    return [(clause, rest) for _, clause, rest in sorted(found, key=lambda item: item[0], reverse=True)]


def _clause(rest: str) -> str:
    """The first line with content, up to the end of its sentence."""
    line = next((line for line in rest.splitlines() if re.search(r"\w|[^\s$\\\[\]*_]", line.strip("$\\[]* "))), "")
    return re.split(r"(?<=[^\s.\\])[.!?;](?=\s|[*_\"')]*$)", line.strip(), maxsplit=1)[0].strip()


def numbers(text: str) -> list[str]:
    r"""All numbers of a text in canonical form: no separators, currency or units; a fraction stays one.

    >>> numbers(r"$1,234.50, 3/4 of it, -\frac{1}{2} and 18.00 dollars.")
    ['1234.5', '3/4', '-1/2', '18']
    """
    return [_canonical(match) for match in _NUMBER.finditer(plain(text))]


def _canonical(match: re.Match[str]) -> str:
    sign = "-" if "-" in (match["sign"] or "") + (match["inner"] or "") else ""
    digits = match["digits"].replace(",", "")
    if len(digits) > LONGEST:
        return sign + digits
    power = match["exponent"] or match["power"]
    if power:
        digits = _decimal(Fraction(digits) * Fraction(10) ** int(power))
    if match["part"] and int(match["whole"]):  # a mixed number, "1 1/2"
        return f"{sign}{Fraction(digits) + Fraction(int(match['part']), int(match['whole']))}"
    if match["under"] and int(match["under"]):
        value = Fraction(digits) / int(match["under"])
        return f"{sign}{value}"
    return sign + _decimal(Fraction(digits)) if Fraction(digits) else "0"


def _decimal(value: Fraction) -> str:
    """Exact decimal digits of a fraction whose denominator divides a power of ten."""
    if value.denominator == 1:
        return str(value.numerator)
    places = next(n for n in range(1, 5 * LONGEST) if 10**n % value.denominator == 0)
    whole, part = divmod(abs(value.numerator) * 10**places // value.denominator, 10**places)
    return f"{'-' if value < 0 else ''}{whole}.{part:0{places}d}"


def _number(text: str) -> str | None:
    given = statements(text)
    for place, (clause, rest) in enumerate(given):
        clause = plain(clause)
        while equation := re.match(r"\W*(?:[A-Za-z]\w{0,2}|[-\d.,\s+*/×÷x^()$€£%]+)\s*=", clause):
            clause = clause[equation.end() :]
        if found := numbers(clause) or (numbers(rest)[-1:] if place == 0 else []):
            return found[0]
    return None if given else next(iter(numbers(text)[-1:]), None)


def _list(text: str) -> str | None:
    spans = (
        [clause for clause, _ in statements(text)] or re.findall(r"\[[^\[\]]*\]", text)[-1:] or text.splitlines()[-1:]
    )
    for span in spans:
        if items := re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", plain(span).replace("'", " ")):
            return ", ".join(numbers(item)[0] for item in items)
    return None


_LEAD = re.compile(
    r"(?:\W*\b(?:the|option|choice|letter|therefore|thus|hence|so|likely|probably|clearly|opción|la)\b)*\W*", re.I
)
_HEDGE = re.compile(r"\W*\b(?:or|and|o|y)\b\W*[A-Z]\b|\)?\s*[,/&]\s*\(?[A-Z]\b(?!\w)")


def _option(text: str) -> str | None:
    for clause, _ in statements(text):
        if letter := _letter(plain(clause)):
            return letter
    lines = [plain(line).strip() for line in text.splitlines() if line.strip()]
    if not lines or statements(text) and len(lines) > 1:
        return None
    listing = re.compile(r"\W*[A-Z][).:]\s*\S")
    if len(lines) > 1 and listing.match(lines[-1]) and listing.match(lines[-2]):
        return None  # the options were repeated: the last of them is no answer
    if said := re.search(r"\b(?:answer|ans|option|choice)\b\W*\(?([A-Z])\)?\W*$", lines[-1], flags=re.IGNORECASE):
        return said[1].upper()
    return _letter(lines[-1], bare=True)


def _letter(clause: str, bare: bool = False) -> str | None:
    """The letter that a clause starts with, or its only letter in brackets; None when it names several.

    `bare`: the clause wasn't announced as an answer, so that the letter must stand alone or like an option, "B) 600".
    """
    start = _LEAD.match(clause)
    rest = clause[start.end() :] if start else clause
    bracketed = set(re.findall(r"\(([A-Z])\)", clause.upper() if re.search(r"\([a-z]\)", clause) else clause))
    if len(bracketed) == 1 and not re.search(r"\bnot\b", clause):
        return bracketed.pop()
    if bracketed:
        return None
    match = re.match(r"([A-Z])(?![\w'’])|([a-z])\W*$", rest)
    if not match or _HEDGE.match(rest[1:]) or bare and not re.match(r"\W*$|[).:]", rest[1:]):
        return None
    if rest[0] in "AI" and re.match(r"\s+(?!because|since|as\b|which|is\b)[a-z]", rest[1:]):
        return None  # "A car", "I think"
    return rest[0].upper()


def normalise(text: str) -> str:
    """Text as compared: without case, quotes, emphasis, commas, the closing full stop, or spaces between mere brackets.

    >>> normalise('"Yes".') == normalise("yes"), normalise("] ] )")
    (True, ']])')
    """
    text = re.sub(r"[*_`\"“”,;]|(?<!\w)['’]|['’](?!\w)", " ", plain(text).casefold())
    text = " ".join(text.split()).rstrip(".!? ")
    return text.replace(" ", "") if re.fullmatch(r"[\s()\[\]{}<>]+", text) else text


def _text(text: str, gold: str) -> str | None:
    choices = next((words for words in CLOSED if normalise(gold) in words), frozenset())
    pattern = rf"\b(?:{'|'.join(sorted(choices, key=len, reverse=True))})\b" if choices else None
    for clause, _ in statements(text):
        if pattern and (match := re.match(rf"\W*({pattern})", clause, flags=re.IGNORECASE)):
            return match[1].lower()
        if normalise(clause):
            return normalise(clause)
    lines = [line for line in text.splitlines() if line.strip()]
    if pattern and lines:
        named = {word.lower() for word in re.findall(pattern, lines[-1], flags=re.IGNORECASE)}
        return named.pop() if len(named) == 1 else None
    return normalise(lines[0]) or None if len(lines) == 1 and not statements(text) else None


_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$((?:\\.|[^$\\])+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", flags=re.DOTALL)
# what stands between the boxes of one answer
_JOINT = re.compile(
    r"(?:\\q?quad|\\text\{[^{}]*\}|\\[()\[\],;: ]|[\s,;$=]|and|or|[a-z]_\{?\d\}?)*"
)  # between boxes of one answer


def _latex(text: str) -> str | None:
    if given := _last_boxes(text):
        return given
    for clause, rest in statements(text):
        told = re.split(r"\$\s+(?:is|are|equals)\s+", clause)[-1].strip()  # "the largest $n$ is 34"
        found = _FORMULA.search(told) or _FORMULA.search(rest.splitlines()[0] if told == clause and rest else "")
        found = found or _FORMULA.fullmatch(rest)
        if found or clause:
            return next(filter(None, found.groups())).strip() if found else told.strip("*_` ")
    if all_found := _FORMULA.findall(text):
        return next(filter(None, all_found[-1])).strip()
    return next(iter(numbers(text)[-1:]), None)


def _last_boxes(text: str) -> str | None:
    """The content of the last box; with those right before it where only connecting words stand between them."""
    found = boxed(text)
    if not found or not found[-1][1]:
        return None
    starts = [start for start, _ in found]
    first = len(found) - 1
    while first and found[first - 1][1]:
        end = _box_end(text, starts[first - 1])
        if not _JOINT.fullmatch(text[end : starts[first]]):
            break
        first -= 1
    return ", ".join(content for _, content in found[first:])


def _box_end(text: str, start: int) -> int:
    """Where the box that starts there ends."""
    depth, end = 1, text.index("{", start) + 1
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
        end += 1
    return end


READERS: dict[str, Callable[[str], str | None]] = {
    "number": _number, "latex": _latex, "option": _option, "list": _list
}  # fmt: skip


def read(kind: str, text: str, gold: Any = "") -> str | None:
    """The answer of a whole text by kind "text" or one of `READERS`, in canonical form, or None."""
    if kind == "text":
        return _text(final_text(text), str(gold))
    return READERS[kind](re.sub(r"<<[^<>\n]*>>", "", final_text(text)))  # GSM8K's calculator notes are no answers
