"""A strip of tokens, each on a colour that says how much of a measure it has: as a picture that needs nothing else.

SVG, because a notebook's saved output shows it everywhere: in JupyterLab, in nbconvert's HTML, and where a web site
strips styles and scripts. Letters stand in cells of equal width, so that nothing has to be measured.
"""

from html import escape

import numpy as np

from workbench.generate import Generation
from workbench.plots.palette import CARD, FONT, INK, ink_on
from workbench.token_readings import MEASURES, TokenReadings, read_tokens

__all__ = ["Strip", "show_tokens", "shown", "strip_svg"]

COLUMNS = 88  # letters a line
CELL, LINE, LETTER = 9.1, 26, 15  # pixels: width of a letter, height of a line, size of the letters
LOW, HIGH = (255, 255, 255), (0, 114, 178)  # white to the blue of Okabe and Ito
MONO = "DejaVu Sans Mono, Menlo, Consolas, monospace"


def shown(token: str) -> str:
    """A token as it is written in the strip: spaces, line breaks and tabs are visible.

    >>> shown(" The"), shown(chr(10))
    ('·The', '↵')
    """
    return token.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥").replace("\r", "") or "∅"


def strip_svg(readings: TokenReadings, by: str = "kl", title: str = "") -> str:
    """The strip as SVG text, with a scale below, a mark under tokens where the intervention acted, and alt text.

    by: one of `token_readings.MEASURES`. A line break of the answer begins a new line of the strip.
    """
    values = readings.values(by)
    most = float(np.abs(values).max()) if len(values) else 0.0
    places, rows = _laid_out([shown(token) for token in readings.tokens], readings.tokens)
    width, top = COLUMNS * CELL + 20, 34 if title else 10
    height = top + rows * LINE + 40
    words = f"{title + ': ' if title else ''}{''.join(readings.tokens)!r}, tokens coloured by {MEASURES[by]}, "
    words += (
        f"highest {most:.3g} at {readings.tokens[int(np.abs(values).argmax())]!r}." if len(values) else "no tokens."
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" role="img" aria-label="{escape(words)}"><title>{escape(words)}</title>'
        f'<rect width="100%" height="100%" rx="8" fill="{CARD}"/>'
    ]
    if title:
        parts.append(f'<text x="10" y="22" font-family="{FONT}" font-size="15" fill="{INK}">{escape(title)}</text>')
    for number, (row, column, text) in enumerate(places):
        share = abs(float(values[number])) / most if most else 0.0
        parts.append(_token(text, 10 + column * CELL, top + row * LINE, share, bool(readings.acted[number])))
    parts.append(_scale(by, most, top + rows * LINE + 8, bool(len(values)) and float(values.min()) < 0))
    return "".join([*parts, "</svg>"])


def _laid_out(texts: list[str], tokens: list[str]) -> tuple[list[tuple[int, int, str]], int]:
    """Row, column and text of every token; one that is longer than a line is cut."""
    places, row, column = [], 0, 0
    for text, token in zip(texts, tokens, strict=True):
        text = text if len(text) <= COLUMNS else f"{text[: COLUMNS - 1]}…"
        if column + len(text) > COLUMNS:
            row, column = row + 1, 0
        places.append((row, column, text))
        column += len(text)
        if "\n" in token:
            row, column = row + 1, 0
    return places, max((place[0] for place in places), default=0) + 1


def _token(text: str, x: float, y: float, share: float, acted: bool) -> str:
    colour = tuple(round(low + share * (high - low)) for low, high in zip(LOW, HIGH, strict=True))
    ink = ink_on((colour[0], colour[1], colour[2]))
    mark = f'<rect x="{x:.1f}" y="{y + LINE - 5}" width="{len(text) * CELL - 1:.1f}" height="3" fill="#D55E00"/>'
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{len(text) * CELL - 1:.1f}" height="{LINE - 6}" rx="2" '
        f'fill="rgb{colour}"/><text x="{x:.1f}" y="{y + 15}" font-family="{MONO}" font-size="{LETTER}" fill="{ink}" '
        f'textLength="{len(text) * CELL - 1:.1f}" lengthAdjust="spacingAndGlyphs" xml:space="preserve">{escape(text)}'
        f"</text>{mark if acted else ''}"
    )


def _scale(by: str, most: float, y: float, negative: bool) -> str:
    steps = 24
    cells = "".join(
        f'<rect x="{10 + 5 * step}" y="{y}" width="5" height="12" '
        f'fill="rgb{tuple(round(a + step / (steps - 1) * (b - a)) for a, b in zip(LOW, HIGH, strict=True))}"/>'
        for step in range(steps)
    )
    sign = "-" if negative else ""
    said = f"0 to {sign}{most:.3g}: {MEASURES[by]}; orange line: the intervention acted"
    x = 10 + 5 * steps + 8
    frame = f'<rect x="10" y="{y}" width="{5 * steps}" height="12" fill="none" stroke="{INK}" stroke-width="0.5"/>'
    return f'{cells}{frame}<text x="{x}" y="{y + 11}" font-family="{FONT}" font-size="12" fill="{INK}">{said}</text>'


class Strip:
    """An answer's tokens on their colours; the last line of a cell shows it. `readings` holds the numbers."""

    def __init__(self, readings: TokenReadings, by: str, title: str) -> None:
        self.readings, self.by, self.title = readings, by, title
        self.svg = strip_svg(readings, by, title)

    def _repr_svg_(self) -> str:
        return self.svg


def show_tokens(generation: Generation, by: str = "kl", *, title: str = "", top: int = 5) -> Strip:
    """An answer of `lm.generate` with every token on a colour that says what stood behind it.

    by: "kl" (from the plain model), "entropy", "logprob" or "acted" (`token_readings.MEASURES`). Errors as for
    `token_readings.read_tokens`; `.readings` of the result holds all measures, and the `top` alternatives a token.
    """
    return Strip(read_tokens(generation, top=top), by, title)
