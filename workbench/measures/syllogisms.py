"""Whether a statement follows from two others, by trying every way in which the terms may overlap.

Every term has at least one member (existential import, as Aristotle and the data set's questions have it).
"""

import re
from functools import cache
from itertools import chain, combinations, product

_FORM = re.compile(r"(All|No|Some) (.+?) (are not|are) (.+)")
_QUESTION = re.compile(
    r"^Consider these statements: 1\. (?P<first>.+?) 2\. (?P<second>.+?) Does it logically follow that: "
    r"(?P<third>.+?)\? \(Answer Yes or No\)$"
)


def parsed(question: str) -> tuple[str, str, str] | None:
    """Both premises and the conclusion of a syllogism question; None for any other text."""
    found = _QUESTION.match(question)
    if not found or not all(_FORM.fullmatch(each) for each in found.groups()):
        return None
    return found["first"], found["second"], found["third"]


def follows(first: str, second: str, conclusion: str) -> bool:
    """Whether the conclusion holds in every world in which both premises hold and no term is empty.

    >>> follows("All cats are pets", "All pets are kind", "Some cats are kind")
    True
    >>> follows("All cats are pets", "Some pets are kind", "Some cats are kind")
    False
    """
    forms = []
    places: dict[str, int] = {}
    for statement in (first, second, conclusion):
        match = _FORM.fullmatch(statement)
        if match is None:
            raise ValueError(f"{statement!r} is no statement of the form 'All|No|Some A are|are not B'.")
        quantifier, left, verb, right = match.groups()
        places.setdefault(left, len(places))
        places.setdefault(right, len(places))
        forms.append((f"{quantifier} {verb}", places[left], places[right]))
    terms = len(places)
    return all(
        _holds(forms[2], world) for world in _worlds(terms) if _holds(forms[0], world) and _holds(forms[1], world)
    )


@cache
def _worlds(terms: int) -> list[tuple[tuple[bool, ...], ...]]:
    """Sets of kinds of individuals that exist, each told by the terms it falls under; every term has a member."""
    kinds = list(product((False, True), repeat=terms))
    every = chain.from_iterable(combinations(kinds, size) for size in range(1, len(kinds) + 1))
    return [world for world in every if all(any(kind[term] for kind in world) for term in range(terms))]


def _holds(form: tuple[str, int, int], world: tuple[tuple[bool, ...], ...]) -> bool:
    name, left, right = form
    both = any(kind[left] and kind[right] for kind in world)
    only = any(kind[left] and not kind[right] for kind in world)
    return {"All are": not only, "No are": not both, "Some are": both, "Some are not": only}.get(name, False)
