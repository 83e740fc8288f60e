"""The lab's word problems read back from their text, so that a changed one is worked out again exactly.

Knows the sentences of `workbench.lab.families` and no others. Does not cover other people's word problems.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

from workbench.lab import families

T = TypeVar("T")
LARGEST = families.LARGEST
PEOPLE: dict[str, str] = families._PEOPLE
THINGS: tuple[str, ...] = families._OBJECTS
_START = re.compile(
    r"^(?P<name>\w+) has (?P<value>\d+) (?P<thing>\w+)\. (?P<told>.*) ?How many \w+ does \w+ have now\?$"
)
_GAINS = ("{subject} buys {n} more.", "{subject} finds {n} more.", "{other} brings {n} more.")
_LOSSES = ("{subject} loses {n}.", "{subject} sells {n}.", "{subject} gives {n} to {other}.")
_FIXED = {"double": "The number doubles.", "triple": "The number triples.", "half": "{subject} gives half to {other}."}
_READ = (
    ("plus", re.compile(r"\w+ (?:buys|finds|brings) (\d+) more\.")),
    ("minus", re.compile(r"\w+ (?:loses|sells) (\d+)\.|\w+ gives (\d+) to \w+\.")),
    ("double", re.compile(r"The number doubles\.")),
    ("triple", re.compile(r"The number triples\.")),
    ("half", re.compile(r"\w+ gives half to \w+\.")),
)


@dataclass(frozen=True)
class Event:
    """One thing that happens: its kind, its number (0 where it has none), and the sentence with places to fill."""

    kind: str
    n: int
    wording: str


@dataclass(frozen=True)
class Problem:
    """A word problem: who, of what, how many at first, and what happens."""

    name: str
    other: str
    thing: str
    start: int
    events: tuple[Event, ...]

    def text(self) -> str:
        """The question."""
        told = [f"{self.name} has {self.start} {self.thing}.", *(self._sentence(event) for event in self.events)]
        return f"{' '.join(told)} How many {self.thing} does {self.name} have now?"

    def _sentence(self, event: Event) -> str:
        return event.wording.format(subject=PEOPLE[self.name], other=self.other, n=event.n)

    def value(self) -> int | None:
        """The answer; None where a number would be a fraction, below one or above `LARGEST`."""
        value = self.start
        for event in self.events:
            if event.kind == "half" and value % 2:
                return None
            value = {
                "plus": value + event.n, "minus": value - event.n, "double": 2 * value, "triple": 3 * value,
                "half": value // 2,
            }[event.kind]  # fmt: skip
            if not 1 <= value <= LARGEST:
                return None
        return value

    def reworded(self, rng: Random) -> "Problem":
        """Every gain and loss in another of the family's wordings."""

        def other(event: Event) -> Event:
            family = _GAINS if event.kind == "plus" else _LOSSES if event.kind == "minus" else ()
            choices = [wording for wording in family if wording != event.wording]
            return replace(event, wording=rng.choice(choices)) if choices else event

        return replace(self, events=tuple(map(other, self.events)))

    def renamed(self, rng: Random) -> "Problem":
        """Other people and another thing."""
        name, other = rng.sample(sorted(set(PEOPLE) - {self.name, self.other}), 2)
        return replace(self, name=name, other=other, thing=rng.choice([each for each in THINGS if each != self.thing]))

    def other_numbers(self, rng: Random) -> "Problem | None":
        """One number is another one, all results stay whole and in range; None where there is no such number."""
        tries = [(place, n) for place, event in enumerate(self.events) if event.n for n in range(2, 100)]
        tries += [(-1, n) for n in range(2, 100)]
        return self._first(rng.sample(tries, len(tries)), self._with_number)

    def _with_number(self, choice: tuple[int, int]) -> "Problem":
        place, n = choice
        if place < 0:
            return replace(self, start=n)
        return self._with(place, replace(self.events[place], n=n))

    def other_quantifiers(self, rng: Random) -> "Problem | None":
        """A gain becomes a loss (or the other way), or doubling tripling; None where that leaves the range."""
        kinds = {"plus": "minus", "minus": "plus", "double": "triple", "triple": "double"}
        places = [place for place, event in enumerate(self.events) if event.kind in kinds]

        def flipped(place: int) -> Problem:
            event = self.events[place]
            kind = kinds[event.kind]
            wording = _FIXED.get(kind) or rng.choice(_GAINS if kind == "plus" else _LOSSES)
            return self._with(place, Event(kind, event.n, wording))

        return self._first(rng.sample(places, len(places)), flipped)

    def without_number(self, rng: Random) -> str:
        """The question with 'some' for one of its numbers; each of them is needed."""
        places = [-1, *(place for place, event in enumerate(self.events) if event.n)]
        place = rng.choice(places)
        sentences = [f"{self.name} has {self.start} {self.thing}.", *map(self._sentence, self.events)]
        sentences[place + 1] = re.sub(r"\d+", "some", sentences[place + 1])
        return f"{' '.join(sentences)} How many {self.thing} does {self.name} have now?"

    def _with(self, place: int, event: Event) -> "Problem":
        return replace(self, events=(*self.events[:place], event, *self.events[place + 1 :]))

    def _first(self, choices: Sequence[T], make: "Callable[[T], Problem]") -> "Problem | None":
        before = self.value()
        found = (make(choice) for choice in choices)
        return next((problem for problem in found if problem.value() not in (None, before)), None)


def reading(question: str) -> Problem | None:
    """The word problem that a text tells; None where it is not one of the lab's, word for word.

    >>> reading("Ana has 36 stones. She sells 7. How many stones does Ana have now?").value()
    29
    """
    found = _START.match(question)
    if not found or found["name"] not in PEOPLE:
        return None
    subject = PEOPLE[found["name"]]
    sentences = re.findall(r"[^.]+\.", found["told"])
    others = {word for word in re.findall(r"\w+", found["told"]) if word in PEOPLE} - {found["name"]}
    unused = sorted(set(PEOPLE) - {found["name"]})
    other = others.pop() if others else unused[int(found["value"]) % len(unused)]
    events = []
    for sentence in map(str.strip, sentences):
        match = next(((kind, m) for kind, pattern in _READ if (m := pattern.fullmatch(sentence))), None)
        if match is None:
            return None
        kind, numbers = match
        n = next((int(number) for number in numbers.groups() if number), 0)
        wordings = _GAINS if kind == "plus" else _LOSSES if kind == "minus" else (_FIXED[kind],)
        wording = next((each for each in wordings if each.format(subject=subject, other=other, n=n) == sentence), None)
        if wording is None:
            return None
        events.append(Event(kind, n, wording))
    problem = Problem(found["name"], other, found["thing"], int(found["value"]), tuple(events))
    return problem if problem.text() == question else None
