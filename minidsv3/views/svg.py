"""Strings of SVG for the interactive views: a page 900 wide, rectangles with drawn hatches, escaped text.

No ids (two views on a page would share them, and hatches would vanish with the first), no focus inside, white ground.
"""

from html import escape

from .style import BLACK, DARK, Fill

WIDTH = 900
SMALLEST_TEXT = 12


def page(title: str, height: float, parts: list[str]) -> str:
    """A whole drawing. `title` is what a screen reader says first."""
    return (f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {WIDTH} {number(height)}" '
            f'width="100%" style="max-width:{WIDTH}px;background:#FFFFFF" font-family="sans-serif">'
            f'<title>{escape(title)}</title>'
            f'<rect width="{WIDTH}" height="{number(height)}" fill="#FFFFFF"/>{"".join(parts)}</svg>')


def text(x: float, y: float, words: str, size: int = 14, anchor: str = "start", colour: str = BLACK,
         bold: bool = False) -> str:
    """Words with their baseline at y; `size` in pixels, at least 12."""
    if size < SMALLEST_TEXT:
        raise ValueError(f"text of size {size} is too small to read; the smallest is {SMALLEST_TEXT}")
    weight = ' font-weight="bold"' if bold else ""
    return (f'<text x="{number(x)}" y="{number(y)}" font-size="{size}" text-anchor="{anchor}" '
            f'fill="{colour}"{weight}>{escape(words)}</text>')


def rectangle(x: float, y: float, width: float, height: float, fill: Fill, outline: str = BLACK) -> str:
    """A rectangle with its fill's hatch drawn as lines."""
    box = (f'<rect x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}" '
           f'fill="{fill.colour}" stroke="{outline}" stroke-width="0.8"/>')
    return box + "".join(_hatch(x, y, width, height, fill.mark))


def line(x1: float, y1: float, x2: float, y2: float, width: float = 1.0, dashes: str = "", colour: str = DARK) -> str:
    """A line; `dashes` is SVG's list of lengths, as '5 4'."""
    dash = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (f'<line x1="{number(x1)}" y1="{number(y1)}" x2="{number(x2)}" y2="{number(y2)}" stroke="{colour}" '
            f'stroke-width="{number(width)}"{dash}/>')


def polygon(points: list[tuple[float, float]], colour: str, opacity: float = 1.0) -> str:
    corners = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return f'<polygon points="{corners}" fill="{colour}" fill-opacity="{opacity:.2f}"/>'


def number(value: float) -> str:
    """A coordinate at one fixed digit, never -0.0."""
    rounded = round(value, 1) + 0.0
    return f"{rounded:.1f}"


def _hatch(x: float, y: float, width: float, height: float, mark: str, step: float = 9) -> list[str]:
    """The lines of '|', '-', '.', '/', '\\' or 'x' inside a rectangle; '' has none."""
    lines = []
    if mark == "|":
        lines = [(x + i, y, x + i, y + height) for i in _steps(width, step)]
    elif mark in ("-", "."):
        lines = [(x, y + i, x + width, y + i) for i in _steps(height, step)]
    elif mark:
        for i in _steps(width + height, step):      # the diagonal whose horizontal and vertical distances add up to i
            start, stop = max(i - height, 0), min(i, width)
            rising = (x + start, y + i - start, x + stop, y + i - stop)
            falling = (x + start, y + height - i + start, x + stop, y + height - i + stop)
            lines += {"/": [rising], "\\": [falling], "x": [rising, falling]}[mark]
    dashes = "1.5 5" if mark == "." else ""
    return [line(*ends, width=0.6, dashes=dashes) for ends in lines]


def _steps(length: float, step: float) -> list[float]:
    return [step * i for i in range(1, int(length / step) + 1) if step * i < length]
