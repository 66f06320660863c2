"""How everything in the course looks: colours by role, marks beside colours, type, and pictures that never vary.

Colours are Okabe and Ito's, chosen for readers with any kind of colour vision. No meaning hangs on colour alone: every
fill has a mark (hatch) or a letter, and every magnitude its number.
"""

import io
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

BLACK, WHITE, GREY = "#000000", "#FFFFFF", "#BBBBBB"
DARK = "#444444"                        # secondary text and lines
ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"


class Fill(NamedTuple):
    """A colour and the hatch that repeats its meaning: '' none, '/', '\\\\', '|', '-', '.' or 'x'."""

    colour: str
    mark: str = ""


PARTS = {                               # of a model, wherever parameters are shown
    "routed experts": Fill(ORANGE),
    "shared experts": Fill(YELLOW, "/"),
    "attention": Fill(SKY, "|"),
    "dense FFN": Fill(GREEN, "\\"),
    "embedding + head": Fill(GREY, "-"),
    "router + norms": Fill(DARK, "x"),
}
PASSES = {                              # of a training step, wherever time is shown
    "forward": Fill(BLUE),
    "backward for inputs": Fill(ORANGE, "/"),
    "backward for weights": Fill(GREEN, "\\"),
    "communication": Fill(PURPLE, "."),
    "idle": Fill(WHITE, "x"),
}
CACHE = {"latent": Fill(SKY, "|"), "rope key": Fill(VERMILION, "/")}

RC = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.titlesize": 12, "axes.titleweight": "bold",
    "axes.labelsize": 11, "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.fontsize": 10,
    "figure.facecolor": WHITE, "axes.facecolor": WHITE, "savefig.facecolor": WHITE,
    "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.7, "figure.dpi": 100,
}


class Picture(Figure):
    """A figure that shows itself in a notebook as a PNG with alternative text, the same bytes each time it is drawn.

    It keeps its exact size in pixels (100 an inch), so that two pictures of one kind can be laid over each other.
    """

    def __init__(self, width: float, height: float, alt: str, colours: int = 64):
        """width and height in inches; `alt` says in two sentences what is drawn and what to see.

        `colours` is how many the file keeps: 16 are enough for a few fills and grey letters, and make it smaller.
        """
        super().__init__(figsize=(width, height))
        FigureCanvasAgg(self)
        self.alt, self.colours = alt, colours

    def png(self) -> bytes:
        """The picture as a PNG file of few colours, a third of the size, and without the name of the program."""
        with matplotlib.rc_context(RC):
            self.canvas.draw()
        drawn = Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB")
        buffer = io.BytesIO()
        few = drawn.quantize(self.colours, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        few.save(buffer, format="png", optimize=True)
        return buffer.getvalue()

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        return {"image/png": self.png(), "text/plain": self.alt}, {"image/png": {"alt": self.alt}}


def styled(draw):
    """Decorator: run a drawing function under the course's matplotlib settings."""
    return matplotlib.rc_context(RC)(draw)


def luminance(colour: str) -> float:
    """Relative luminance, 0 for black to 1 for white (WCAG 2.2). `colour` is '#RRGGBB'."""
    channels = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """WCAG's contrast ratio of two colours, 1 to 21; text needs at least 4.5."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def ink(fill: str) -> str:
    """Black or white, whichever is easier to read on `fill`."""
    return max((BLACK, WHITE), key=lambda colour: contrast(colour, fill))


def human(number: float, digits: int = 3) -> str:
    """A number at a fixed number of digits with T, B, M or K: 671026419200 is '671 B', 187107328 at 4 is '187.1 M'."""
    for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " K"), (1, "")):
        if abs(number) >= size * (1 - 0.5 * 10 ** -digits):
            scaled = number / size
            before = len(f"{abs(scaled):.0f}")
            return f"{scaled:.{max(digits - before, 0)}f}{letter}"
    return f"{number:.{digits}g}" if number else "0"
