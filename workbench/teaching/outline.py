"""The sections of a notebook: what each asks for, and how long the teacher's notes say that it takes."""

import re
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Section", "sections", "source_of", "tags_of", "timetable"]

Book = dict[str, Any]
Cell = dict[str, Any]
MINUTES = re.compile(r"(\d+)\s+minutes?\b")
ASK_NOTHING = ("setup", "recap", "keep it")  # headings, without their number


@dataclass(frozen=True)
class Section:
    """What lies below one heading: minutes by the teacher's notes, how many cells ask for something, and its parts."""

    title: str
    minutes: int = 0
    predictions: int = 0
    exercises: int = 0
    parts: int = 0  # headings of the next level

    @property
    def asks(self) -> bool:
        """Whether predictions and exercises belong here; setting up, looking back and saving ask nothing.

        >>> Section("2. Which layer?").asks, Section("8. Keep it").asks, Section("Recap").asks
        (True, False, False)
        """
        return re.sub(r"^\d+\. *", "", self.title).casefold() not in ASK_NOTHING


def timetable(book: Book) -> str:
    """A markdown table of a notebook's sections: minutes from the teacher's notes, predictions and exercises."""
    found = sections(book)
    lines = ["**For the teacher: sections and minutes**", "", "| section | minutes | predictions | exercises |"]
    lines += ["|---|---|---|---|"]
    lines += [f"| {s.title} | {s.minutes or ''} | {s.predictions or ''} | {s.exercises or ''} |" for s in found]
    total = sum(section.minutes for section in found)
    lines += [f"| **all** | **{total}** | | |", "", "Your notes stand open at the end of each section."]
    return "\n".join(lines)


def sections(book: Book) -> list[Section]:
    """The sections of a notebook in order; what stands above the first heading is of none."""
    found: list[Section] = []
    for cell in book["cells"]:
        source, tags = source_of(cell), tags_of(cell)
        if cell["cell_type"] == "markdown" and (heading := re.search(r"^## (.+)$", source, re.MULTILINE)):
            found.append(Section(heading[1].strip()))
        if not found:
            continue
        last = found[-1]
        minutes = MINUTES.search(source) if "teacher" in tags else None
        found[-1] = replace(
            last,
            minutes=last.minutes + (int(minutes[1]) if minutes else 0),
            predictions=last.predictions + ("predict" in tags),
            exercises=last.exercises + ("exercise" in tags),
            parts=last.parts + (cell["cell_type"] == "markdown" and len(re.findall("^### ", source, re.MULTILINE))),
        )
    return found


def tags_of(cell: Cell) -> set[str]:
    """A cell's tags."""
    return set(cell.get("metadata", {}).get("tags", []))


def source_of(cell: Cell) -> str:
    """A cell's text, which files hold as one string or as a list of lines."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)
