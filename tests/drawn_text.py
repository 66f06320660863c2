"""Where the words of a view's SVG come to lie, in DejaVu Sans, the widest font that browsers take for `sans-serif`."""

import xml.etree.ElementTree as ElementTree
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

import matplotlib
from PIL import ImageFont

TAG = "{http://www.w3.org/2000/svg}"
BEFORE = {"start": 0.0, "middle": 0.5, "end": 1.0}      # the share of its width that stands before a text's x
CAPITALS = 0.73                                         # height of capital letters, times the size


class Words(NamedTuple):
    text: str
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: "Words") -> bool:
        return (self.left < other.right and other.left < self.right
                and self.top < other.bottom and other.top < self.bottom)


@lru_cache
def font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/{name}", size)


def words_of(svg: ElementTree.Element) -> list[Words]:
    """All horizontal words. Single letters mark points, which may come to lie on each other."""
    found = []
    for element in svg.iter(f"{TAG}text"):
        letters = font(int(element.get("font-size")), element.get("font-weight") == "bold")
        for piece in (element, *element):
            if len(piece.text or "") > 1 and not element.get("transform"):
                width, bottom = letters.getlength(piece.text), float(piece.get("y"))
                left = float(piece.get("x")) - width * BEFORE[element.get("text-anchor", "start")]
                found.append(Words(piece.text, left, bottom - CAPITALS * letters.size, left + width, bottom))
    return found


def misplaced(html: str) -> list[str]:
    """Sentences on words that leave the drawing or lie on others."""
    svg = ElementTree.fromstring(html[html.index("<svg"):])
    _, _, width, height = map(float, svg.get("viewBox").split())
    words = words_of(svg)
    outside = [f"{each.text!r} leaves the drawing" for each in words
               if each.left < 0 or each.right > width or each.top < 0 or each.bottom > height]
    return outside + [f"{first.text!r} lies on {second.text!r}" for first, second in combinations(words, 2)
                      if first.overlaps(second)]
