r"""Answers that can be right in part: an ordering by the pairs it gets right, a span of text by the words it shares.

Both give a score from 0 to 1 beside the strict verdict, which is right only at the whole order or the same words.
Sources: Kendall 1938, Biometrika 30:81-93 (an ordering's score is (tau + 1) / 2 where no item is missing); Rajpurkar
et al. 2016, arXiv 1606.05250 (exact match and F1 of SQuAD's evaluation script). Not covered: orders with ties.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from workbench.tasks.answers import final_text, normalise, statements

_SEPARATOR = re.compile(r"\s*(?:,\s*(?:and|then|y)\s+|\b(?:and|then)\b\s+|[,;\n<>→]|->|=>)\s*")
_BULLET = re.compile(r"^\s*(?:\(?\d+[.):]|[-*•])\s+", flags=re.MULTILINE)


def items_of(text: str) -> list[str]:
    """The items of an order, normalised: between commas, arrows or lines; else, where there are none of these, words.

    >>> items_of("1. pear\\n2. Apple"), items_of("pear -> apple, fig"), items_of("pear apple")
    (['pear', 'apple'], ['pear', 'apple', 'fig'], ['pear', 'apple'])
    """
    pieces = [piece for part in _SEPARATOR.split(_BULLET.sub("", text)) if (piece := normalise(part))]
    return pieces if len(pieces) != 1 else pieces[0].split()


def gold_items(gold: Any) -> list[str]:
    """The items of a gold order: a list, or a text as `items_of` reads it."""
    return [normalise(str(item)) for item in gold] if isinstance(gold, list | tuple) else items_of(str(gold))


def ordering(gold: Any, text: str) -> tuple[list[str] | None, float]:
    """The order that a text gives, and the share of the gold order's pairs that stand in it the right way round.

    A pair with a missing item is wrong, a repeated item counts where it first stands. None: no item of the gold order
    is named, which says nothing about their order.

    >>> ordering("apple, fig, pear", "The answer is apple, pear, fig.")
    (['apple', 'pear', 'fig'], 0.6666666666666666)
    """
    wanted, known = gold_items(gold), set(gold_items(gold))
    for candidate in _candidates(text):
        given = items_of(candidate)
        if known & set(given):
            place = {item: number for number, item in reversed(list(enumerate(given)))}
            pairs = list(combinations(wanted, 2))
            right = sum(a in place and b in place and place[a] < place[b] for a, b in pairs)
            return given, right / len(pairs)
    return None, 0.0


def _candidates(text: str) -> list[str]:
    """Where an order may stand, first choice first: behind a statement, a list at the end, the last line."""
    final = final_text(text)
    found = []
    for clause, rest in statements(final):
        found += [rest if _BULLET.match(rest) or "\n" not in clause and _BULLET.search(rest) else clause]
    lines = [line for line in final.splitlines() if line.strip()]
    listed: list[str] = []
    for line in reversed(lines):
        if not _BULLET.match(line):
            break
        listed.insert(0, line)
    return [
        *found,
        *(["\n".join(listed)] if len(listed) > 1 else []),
        *[line.rpartition(":")[2] for line in lines[-1:]],
    ]


def words_of(text: str) -> list[str]:
    """The words of a span as SQuAD compares them: no case, punctuation or English articles.

    >>> words_of("The Eiffel-Tower, Paris")
    ['eiffeltower', 'paris']
    """
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(?:a|an|the)\b", " ", bare).split()


def span(golds: Any, text: str) -> tuple[str | None, bool, float]:
    """The span that a text gives, whether it is one of the gold spans, and the best F1 of its words with one of them.

    golds: one accepted span, or a list of them.

    >>> span(["Denver Broncos", "The Broncos"], "The answer is the Denver Broncos team.")
    ('the Denver Broncos team', False, 0.8)
    """
    accepted: Sequence[Any] = golds if isinstance(golds, list | tuple) else [golds]
    final = final_text(text)
    lines = [line.strip() for line in final.splitlines() if line.strip()]
    said = next((clause for clause, _ in statements(final) if clause), lines[-1] if lines else "")
    said = said.strip("*_`\"' ").removesuffix(".")
    given = words_of(said)
    if not given:
        return None, False, 0.0
    scores = [_f1(words_of(str(each)), given) for each in accepted]
    return said, any(words_of(str(each)) == given for each in accepted), max(scores)


def _f1(wanted: list[str], given: list[str]) -> float:
    shared = sum((Counter(wanted) & Counter(given)).values())
    return 2 * shared / (len(wanted) + len(given)) if shared else 0.0
