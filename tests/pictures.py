"""What holds for every picture of the course: drawn twice it has the same bytes, it says in two sentences what it
shows, and all its words are on the page and large enough to read."""

import re
from collections.abc import Callable

import torch

from minidsv3.views.style import Picture

SMALLEST = 8.64        # points: 12 pixels at 100 an inch
LARGEST = 24_000       # bytes of a PNG; a notebook holds ten of them and more


def check_picture(draw: Callable[[], Picture], smallest: float = SMALLEST) -> None:
    """Raises AssertionError if the picture that `draw` draws breaks a rule. `smallest` counts points."""
    torch.manual_seed(0)
    first = draw()
    torch.manual_seed(0)
    assert first.png() == draw().png() and len(first.png()) < LARGEST
    assert len(re.findall(r"[.] |[.]$", first.alt)) >= 2
    check_words(first, smallest)


def check_words(picture: Picture, smallest: float) -> None:
    """Labels of ticks beyond the ends of an axis are not drawn, so they may lie anywhere."""
    words = [text for axes in picture.axes for text in (*axes.texts, axes.title, axes._left_title, axes.xaxis.label,
                                                        axes.yaxis.label)]
    words = [text for text in (*words, *(text for legend in picture.legends for text in legend.texts))
             if text.get_text()]
    labels = [text for axes in picture.axes if axes.axison
              for text in (*axes.get_xticklabels(), *axes.get_yticklabels()) if text.get_text()]
    assert words and min(text.get_fontsize() for text in words + labels) >= smallest
    width, height = picture.get_size_inches() * 100
    for text in words:
        box = text.get_window_extent()
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text
