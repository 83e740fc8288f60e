"""A text file as passages, and the check that a quote is in one of them word for word.

Files are UTF-8; passages end at blank lines. Places are characters of the file's text, so `text[start:end]` of the
whole file is the passage or the quote. Not covered: HTML, PDF, Markdown's structure.
"""

import re
from dataclasses import dataclass
from pathlib import Path

LEAST = 3  # words of a quote: a single one is in most passages by chance


@dataclass(frozen=True)
class Passage:
    """A part of a file: its number from 0, where it starts in the file's text (characters), and its text."""

    number: int
    start: int
    text: str


def passages(file: Path, longest: int = 1200) -> list[Passage]:
    """Passages of at most `longest` characters; a longer one is cut after a sentence, else between words.

    Raises ValueError for a file that is missing, is not UTF-8 (with the lines), or holds no text.
    """
    if longest < 1:
        raise ValueError(f"longest={longest} is too small: give the characters of a passage, such as 1200.")
    if not file.is_file():
        raise ValueError(f"corpus={str(file)!r} is no file. Give the path of a UTF-8 text file.")
    text = _decoded(file)
    found: list[Passage] = []
    for match in re.finditer(r"(?:[^\n]*\S[^\n]*(?:\n|\Z))+", text):  # lines that are not blank
        start, end = match.span()
        while text[start:end].strip():
            start += len(text[start:end]) - len(text[start:end].lstrip())
            cut = end if end - start <= longest else start + _cut(text[start : start + longest + 1])
            found.append(Passage(len(found), start, text[start:cut].rstrip()))
            start = cut
    if not found:
        raise ValueError(f"{file} holds no text. Give a file with at least one passage.")
    return found


def _cut(text: str) -> int:
    """Where to cut a text, whose last character is one too many: after a sentence in its second half, or a word."""
    room = len(text) - 1
    ends = [m.end() for m in re.finditer(r"[.!?][\"')\]]*(?=\s)", text) if room // 2 <= m.end() <= room]
    spaces = [m.start() for m in re.finditer(r"\s", text) if m.start()]
    return ends[-1] if ends else spaces[-1] if spaces else room


def _decoded(file: Path) -> str:
    raw = file.read_bytes()
    try:
        return raw.decode("utf-8").replace("\ufeff", " ", 1) if raw[:3] == b"\xef\xbb\xbf" else raw.decode("utf-8")
    except UnicodeDecodeError:
        bad = []
        for number, line in enumerate(raw.split(b"\n"), start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                bad.append(f"line {number} (byte 0x{line[error.start]:02x} after {error.start} bytes)")
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"{file} is not UTF-8: {', '.join(bad[:5])}{more}. Convert it, for example: "
            f"iconv -f latin1 -t utf-8 {file.name} > {file.stem}-utf8{file.suffix}"
        ) from None


def parsed(text: str) -> dict[str, str] | None:
    """Question, answer and quote from three labelled parts in this order; None where one is missing or empty.

    >>> parsed("Question: Who came?\\nAnswer: Ana.\\nQuote: \\"Ana came first\\"")
    {'question': 'Who came?', 'answer': 'Ana.', 'quote': 'Ana came first'}
    """
    found = re.search(
        r"\bquestion\s*:\s*(?P<question>\S.*?)\s*^\W*answer\s*:\s*(?P<answer>\S.*?)\s*"
        r"^\W*quote\s*:\s*(?P<quote>\S[^\n]*)",
        text,
        flags=re.IGNORECASE | re.MULTILINE | re.DOTALL,
    )
    parts = {name: part.strip() for name, part in found.groupdict().items()} if found else {}
    if parts:
        parts["quote"] = parts["quote"].strip("\"“”'‘’« »")
    return parts if parts and all(parts.values()) else None


def located(passage: str, quote: str) -> tuple[int, int] | None:
    """Where the quote's words are in the passage, as characters; None where they are not, or are fewer than three.

    Spaces and line breaks may differ, nothing else: case, punctuation and every letter count.

    >>> located("It was late.\\nAna came  first.", "late. Ana came first")
    (7, 28)
    >>> located("Ana came first.", "ana came first") is located("Ana came first.", "na came first") is None
    True
    """
    words = quote.split()
    if len(words) < LEAST:
        return None
    body = r"\s+".join(map(re.escape, words))
    found = re.search(rf"(?<!\w){body}(?!\w)", passage)
    return found.span() if found else None
