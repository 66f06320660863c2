"""Chapter 04's view: a matrix in a format, with a scale for all of it or for each tile: where its numbers come to lie
on the line of codes, and what of them comes back.

What it teaches: a scale slides numbers along the line, and floating point looks alike wherever they lie; an outlier
ruins int8 at once and E4M3 only when a tile's range passes 2^14; rows of different size are what tiles are for.
"""

import math
from functools import lru_cache
from html import escape

import torch
from torch import Tensor

from ..formats import E4M3, E5M2, E5M6, INT8, Format, decode, round_to, scale_of_each
from .explore import View, choice, explore, log_slider, slider
from .fp8 import BELOW, FEW, ZERO, power
from .style import BLACK, BLUE, DARK, ORANGE, VERMILION, WHITE, Fill, Picture, styled
from .svg import line, page, rectangle, text

FORMATS = {format.name: format for format in (E4M3, E5M2, E5M6, INT8)}
GRANULARITY = {"one scale for all": (None, None), "one a row": (1, None), "128 x 128": (128, 128), "1 x 128": (1, 128)}
SCALES = {"exact": False, "powers of two": True}
SHAPE, OUTLIER = (256, 256), (40, 200)          # of the matrix, and where its outlier stands
LOW, HIGH = -26, 20                             # octaves that are drawn


def start_state(**changes) -> dict:
    """The controls' values, some of them changed. Raises ValueError for a control that does not exist."""
    state = {"format": "E4M3", "granularity": "one scale for all", "outlier": 1000.0, "spread": 0, "scales": "exact",
             "shift": 0}
    unknown = set(changes) - set(state)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} is no control of the format explorer; it has "
                         f"{', '.join(state)}")
    return state | changes


# ---- numbers --------------------------------------------------------------------------------------------------------


@lru_cache
def _noise() -> tuple[Tensor, Tensor]:
    """Gaussian numbers [rows, columns], and one for each row's size; drawn in float64, which is alike everywhere."""
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in (SHAPE, (SHAPE[0], 1)))


def matrix(state: dict) -> Tensor:
    """Gaussian numbers; rows differ in size by the spread, and one number is the outlier (1: there is none)."""
    numbers, sizes = _noise()
    x = (numbers * torch.exp(state["spread"] * sizes)).float()
    if state["outlier"] > 1:
        x[OUTLIER] = state["outlier"]
    return x


def scaled(state: dict) -> Tensor:
    """Each number over its scale: its place on the line of codes."""
    x = matrix(state)
    scales = scale_of_each(x, FORMATS[state["format"]], GRANULARITY[state["granularity"]], SCALES[state["scales"]])
    return x / (scales * 2.0 ** state["shift"])


def others(values: Tensor) -> Tensor:
    """All numbers but the outlier, whose error is not what one asks about; it counts as 0."""
    values = values.clone()
    values[OUTLIER] = 0
    return values


def error(state: dict) -> float:
    """|back - x| / |x| of a row without the outlier, mean over rows."""
    x, places = matrix(state), scaled(state)
    scales = x / places
    wrong = others((round_to(places, FORMATS[state["format"]]) - places) * scales)
    return (wrong.norm(dim=1) / others(x).norm(dim=1)).mean().item()


def explorer_facts(state: dict) -> dict[str, int]:
    """Whole numbers behind the drawing."""
    format = FORMATS[state["format"]]
    places = others(scaled(state))
    back, there = round_to(places, format), places != 0
    tile = GRANULARITY[state["granularity"]]
    shared = (tile[0] or SHAPE[0]) * (tile[1] or SHAPE[1])
    return {"error in thousandths": round(1000 * error(state)),
            "lost of 10,000": round(1e4 * ((back == 0) & there).sum().item() / there.sum().item()),
            "saturated of 10,000": round(1e4 * (places.abs() > 1.001 * format.largest).double().mean().item()),
            "numbers of the format in use": len(back.abs().unique()) - 1, "numbers of the format": format.largest_code,
            "scales": SHAPE[0] * SHAPE[1] // shared, "bits a value": round(format.bits + 32 / shared)}


# ---- the drawing ----------------------------------------------------------------------------------------------------

LEFT, RIGHT, BASE = 40, 880, 280                # of the histogram
OCTAVE = (RIGHT - LEFT) / (HIGH - LOW)


def at(octave: float) -> float:
    """Where log2 = `octave` lies on the page."""
    return LEFT + (min(max(octave, LOW), HIGH) - LOW) * OCTAVE


def render_explorer(state: dict) -> str:
    """A sentence and an SVG for one state of the controls. Pure: the same state gives the same string."""
    facts = explorer_facts(state)
    sentence = _sentence(state, facts)
    parts = [*_zones(FORMATS[state["format"]]), *_histogram(state), *_line(FORMATS[state["format"]]),
             *_errors(state), *_numbers(facts)]
    return f"<p>{escape(sentence)}</p>" + page("Format explorer: " + sentence, 570, parts)


def _sentence(state: dict, facts: dict) -> str:
    outlier = f"an outlier of {state['outlier']:,.10g}" if state["outlier"] > 1 else "no outlier"
    shift = f", all scales times 2^{state['shift']}" if state["shift"] else ""
    sizes = f"rows whose sizes differ by a factor of e^{state['spread']}" if state["spread"] else "rows of one size"
    return (f"{state['format']}, scales: {state['granularity']}, {state['scales']}{shift}; {sizes}, {outlier}. The "
            f"others come back with an error of {facts['error in thousandths'] / 10:.1f} %; "
            f"{facts['lost of 10,000'] / 100:.2f} % of them became 0, and {facts['saturated of 10,000'] / 100:.2f} % "
            f"were too large. They use {facts['numbers of the format in use']:,} of "
            f"{facts['numbers of the format']:,} magnitudes.")


def _zones(format: Format) -> list[str]:
    first, last, top = (math.log2(x) for x in (format.smallest / 2, format.smallest_normal, format.largest))
    last = min(last, top)                       # int8 has equal steps throughout, and no such octaves
    octaves = f"{2 ** format.mantissa_bits} steps an octave" if format.exponent_bits else "(no octaves)"
    return [rectangle(at(LOW), 60, at(first) - at(LOW), BASE - 60, Fill(WHITE, "x"), DARK),
            rectangle(at(first), 60, at(last) - at(first), BASE - 60, Fill(WHITE, "/"), DARK),
            rectangle(at(last), 60, at(top) - at(last), BASE - 60, Fill(WHITE), DARK),
            rectangle(at(top), 60, at(HIGH) - at(top), BASE - 60, Fill(WHITE, "\\"), DARK),
            rectangle(LEFT, 10, 22, 16, Fill(WHITE, "x")), text(LEFT + 30, 23, "becomes 0", 13),
            rectangle(LEFT + 140, 10, 22, 16, Fill(WHITE, "/")), text(LEFT + 170, 23, "steps of equal width", 13),
            rectangle(LEFT + 350, 10, 22, 16, Fill(WHITE)), text(LEFT + 380, 23, octaves, 13),
            rectangle(LEFT + 540, 10, 22, 16, Fill(WHITE, "\\")), text(LEFT + 570, 23, "becomes the largest", 13),
            text(LEFT, 50, "how many of the numbers lie where, after division by their scale", 14, bold=True)]


def _histogram(state: dict) -> list[str]:
    places = others(scaled(state)).abs().flatten()
    octaves = places[places > 0].log2().clamp(LOW, HIGH - 1e-3)
    counts = torch.histogram(octaves.double(), 2 * (HIGH - LOW), range=(LOW, HIGH))[0].tolist()
    tallest = max(counts)
    bars = [rectangle(at(LOW + i / 2), BASE - 190 * count / tallest, OCTAVE / 2, 190 * count / tallest, Fill(ORANGE))
            for i, count in enumerate(counts) if count]
    if state["outlier"] > 1:
        x = at(math.log2(scaled(state)[OUTLIER].item()))
        bars += [line(x, 72, x, BASE, 3, colour=VERMILION), text(x - 8, 84, "outlier", 13, "end", bold=True)]
    return bars


def _line(format: Format) -> list[str]:
    """The format's numbers as strokes, and the axis under them."""
    drawn = [text(LEFT, BASE + 52, f"the numbers of {format.name}", 14, bold=True)]
    if format.mantissa_bits > 3 and format.exponent_bits:       # strokes would touch each other
        left, right = (at(math.log2(x)) for x in (format.smallest, format.largest))
        drawn.append(rectangle(left, BASE + 4, right - left, 28, Fill(BLUE)))
    else:
        numbers = decode(torch.arange(1, format.largest_code + 1), format).log2().tolist()
        drawn += [line(at(n), BASE + 4, at(n), BASE + 32, 0.9, colour=BLACK) for n in numbers]
    for octave in range(LOW + 2, HIGH, 4):
        drawn += [line(at(octave), BASE, at(octave), BASE + 38, 0.6, "2 3"),
                  text(at(octave), BASE + 74, power(2.0 ** octave), 13, "middle")]
    return drawn


def _errors(state: dict) -> list[str]:
    """Bars of the error for every granularity, the present one outlined and marked by a dot."""
    drawn = [text(LEFT, 392, "error of the others, by what shares a scale", 14, bold=True)]
    for i, name in enumerate(GRANULARITY):
        percent, y, live = 100 * error(state | {"granularity": name}), 404 + 36 * i, name == state["granularity"]
        drawn += [text(LEFT + 130, y + 18, f"{chr(9679) + ' ' if live else ''}{name}", 13, "end", bold=live),
                  rectangle(LEFT + 140, y, max(3.0 * percent, 2), 24, Fill(ORANGE if live else WHITE)),
                  text(LEFT + 148 + 3.0 * percent, y + 18, f"{percent:.1f} %", 13, bold=live)]
    return drawn


def _numbers(facts: dict) -> list[str]:
    many = "one scale" if facts["scales"] == 1 else f"{facts['scales']:,} scales"
    words = (f"{many}, {facts['bits a value']} bits a value",
             f"{facts['lost of 10,000'] / 100:.2f} % became 0", f"{facts['saturated of 10,000'] / 100:.2f} % too large",
             f"{facts['numbers of the format in use']:,} of {facts['numbers of the format']:,} magnitudes in use")
    return [text(590, 422 + 36 * i, entry, 14) for i, entry in enumerate(words)]


def format_explorer() -> View:
    """The view: a format, what shares a scale, an outlier, rows of different size, and scales that are off."""
    state = start_state()
    return explore(
        render_explorer, explorer_facts,
        format=choice("format", state["format"], list(FORMATS)),
        granularity=choice("what shares a scale", state["granularity"], list(GRANULARITY)),
        outlier=log_slider("outlier, times the others (1: none)", state["outlier"], 0, 6),
        spread=slider("sizes of rows differ by e^n, n", state["spread"], 0, 5),
        scales=choice("scales are", state["scales"], list(SCALES)),
        shift=slider("all scales times 2^n, n", state["shift"], -14, 14))


# ---- the same on paper ----------------------------------------------------------------------------------------------


@styled
def format_explorer_states(states: dict[str, dict]) -> Picture:
    """Histograms on the line of codes for several states, with the error of the others."""
    errors = {name: 100 * error(state) for name, state in states.items()}
    picture = Picture(11, 3.1, "Histograms of numbers on the line of codes, for several states of the explorer. "
                      + "; ".join(f"{name}: error {percent:.1f} %" for name, percent in errors.items()) + ".", FEW)
    for axes, (name, state) in zip(picture.subplots(1, len(states), sharey=True), states.items()):
        format, places = FORMATS[state["format"]], others(scaled(state)).abs().flatten()
        octaves = places[places > 0].log2().clamp(LOW, HIGH - 1e-3).double()
        counts = torch.histogram(octaves, HIGH - LOW, range=(LOW, HIGH))[0] / len(octaves)
        axes.bar(range(LOW, HIGH), counts.tolist(), width=1, align="edge", color=ORANGE, edgecolor=BLACK,
                 linewidth=0.5)
        first, last, top = (math.log2(x) for x in (format.smallest / 2, format.smallest_normal, format.largest))
        axes.axvspan(LOW, first, facecolor=ZERO.colour, hatch=ZERO.mark, alpha=0.35, edgecolor=DARK, zorder=0)
        axes.axvspan(first, min(last, top), facecolor=BELOW.colour, hatch=BELOW.mark, alpha=0.35, edgecolor=DARK,
                     zorder=0)
        axes.axvline(top, color=BLACK, linewidth=1.6)
        axes.set(xlim=(LOW, HIGH), yticks=(), xticks=range(LOW + 2, HIGH, 8), xlabel="octave of |x| / scale")
        axes.set_title(f"{name}\nerror {errors[name]:.1f} %", fontsize=10.5)
    picture.tight_layout()
    return picture
