"""Chapter 04's still pictures: numbers above the line of codes, the three products with their scales, errors as curves,
and what waits in how many bytes. Training is in fp8_training.py.

Each takes plain numbers or asks the package, so that a toy, a run and a stored experiment are drawn alike.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from ..formats import Format, decode, round_to
from .style import BLACK, BLUE, DARK, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, WHITE, YELLOW, Fill, Picture, styled

LOOKS = ((BLUE, "-", "o"), (VERMILION, "--", "s"), (GREEN, "-.", "^"), (PURPLE, ":", "D"), (ORANGE, "-", "v"),
         (DARK, "--", "x"))             # colour, dashes and mark, so that no line hangs on its colour alone
FEW = 12                                # colours that are enough here, see `Picture`
BELOW, ZERO = Fill(SKY, "/"), Fill(GREY, "x")       # below the normal numbers, and what becomes 0


# ---- the line of codes ----------------------------------------------------------------------------------------------


@styled
def number_line(values: Mapping[str, Sequence[float]], format: Format) -> Picture:
    """Histograms of magnitudes above the format's numbers, on an axis of octaves; one panel for each name.

    `values` are already divided by their scales. Zeros are counted as such and have no place on the axis.
    """
    low, high = math.log2(format.smallest) - 4, math.log2(format.largest) + 1.5
    picture = Picture(9.6, 1.5 + 1.3 * len(values), f"Histograms of {', '.join(values)} on an axis of octaves, and "
                      f"below them every number of {format.name} as a stroke. Look for what lies in the zone that "
                      "becomes 0.", FEW)
    panels = picture.subplots(len(values) + 1, 1, sharex=True, height_ratios=[1] * len(values) + [0.55])
    for axes, (name, numbers) in zip(panels, values.items()):
        x = torch.tensor(numbers, dtype=torch.float64).abs()
        x = x[x > 0]
        counts, edges = torch.histogram(x.log2().clamp(low, high), int(2 * (high - low)), range=(low, high))
        axes.bar(edges[:-1].tolist(), (counts / len(x)).tolist(), width=0.5, align="edge", color=ORANGE,
                 edgecolor=BLACK, linewidth=0.5)
        lost = (round_to(x, format) == 0).double().mean().item()
        axes.set_title(f"{name}: {100 * lost:.1f} % become 0", loc="left", fontsize=11)
        axes.set(yticks=(), ylim=(0, 1.1 * (counts / len(x)).max().item()))
    _codes(panels[-1], format, low, high)
    for axes in panels:
        _zones(axes, format, low)
    panels[-1].set_xlabel(f"|x| / scale: {format.name} goes from {power(format.smallest)} to {format.largest:g}")
    picture.tight_layout(h_pad=0.4)
    return picture


def _codes(axes, format: Format, low: float, high: float) -> None:
    numbers = decode(torch.arange(1, format.largest_code + 1), format).log2()
    axes.vlines(numbers.tolist(), 0, 1, color=BLACK, linewidth=1 if format.mantissa_bits < 5 else 0.3)
    at = range(math.ceil(low) + math.ceil(low) % 2, math.floor(high) + 1, 2)
    axes.xaxis.set_major_locator(FixedLocator(list(at)))
    axes.xaxis.set_major_formatter(FixedFormatter([power(2.0 ** n) for n in at]))
    axes.set(yticks=(), ylim=(0, 1.9), xlim=(low, high))
    first, last = math.log2(format.smallest), math.log2(format.smallest_normal)
    for left, right, words in ((low, first - 1, "becomes 0"), (first - 1, last, "steps of equal width"),
                               (last, high, f"{2 ** format.mantissa_bits} numbers an octave")):
        axes.text((left + right) / 2, 1.45, words, ha="center", va="center", fontsize=10,
                  bbox=dict(facecolor=WHITE, edgecolor="none", pad=1))


def _zones(axes, format: Format, low: float) -> None:
    first, last = math.log2(format.smallest) - 1, math.log2(format.smallest_normal)
    for left, right, fill in ((low, first, ZERO), (first, last, BELOW)):
        axes.axvspan(left, right, facecolor=fill.colour, hatch=fill.mark, alpha=0.3, edgecolor=DARK, linewidth=0,
                     zorder=0)


def power(value: float) -> str:
    """`8` for 8 and `2^-9` in raised letters below 1/4."""
    return f"{value:g}" if value >= 0.25 else f"2{str(round(math.log2(value))).translate(RAISED)}"


RAISED = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")


# ---- three products -------------------------------------------------------------------------------------------------

TILED = {                               # rows and columns of one tile, in units of the drawing
    "1 x 128": (0.25, 1.0), "128 x 1": (1.0, 0.25), "128 x 1, turned": (0.25, 1.0), "128 x 128": (1.0, 1.0)}
PRODUCTS = (                            # name, summed over; letter, rows, columns and tiles of each of three matrices
    ("Fprop", "channels of x", ("x", 2, 3, "1 x 128"), ("W\u1d40", 3, 2, "128 x 128"), ("y", 2, 2, "BF16")),
    ("Dgrad", "channels of y", ("dy", 2, 2, "1 x 128"), ("W", 2, 3, "128 x 128"), ("dx", 2, 3, "BF16")),
    ("Wgrad", "tokens", ("dy\u1d40", 2, 2, "128 x 1, turned"), ("x", 2, 3, "128 x 1"), ("dW", 2, 3, "FP32")),
)
SIDES = {"x": Fill(SKY), "W": Fill(YELLOW), "dy": Fill(ORANGE), "y": Fill(WHITE), "dx": Fill(WHITE), "dW": Fill(WHITE)}


@styled
def three_products() -> Picture:
    """The products of a linear layer as rectangles, cut into the tiles that share a scale (sections 3.3.1, 3.3.2)."""
    picture = Picture(9.6, 6.6, "Three rows, one for each product of a linear layer: two operands cut into tiles that "
                      "share a scale, and the result. See that in each row tiles are 128 long along the arrow, the "
                      "direction that is summed, and that x and dy are needed in two ways.", FEW)
    axes = picture.add_axes((0.01, 0.01, 0.98, 0.98))
    for i, (name, summed, left, right, result) in enumerate(PRODUCTS):
        middle = 8.5 - 3.9 * i
        axes.text(0.1, middle + 0.5, name, fontsize=14, weight="bold", va="center")
        axes.text(0.1, middle + 0.1, f"sums over\n{summed}", fontsize=11, va="top")
        x = 3.1
        for side, sign, arrow in ((left, "\u00d7", "across"), (right, "=", "down"), (result, "", "")):
            _matrix(axes, x, middle, *side, arrow)
            axes.text(x + 3.55, middle, sign, ha="center", va="center", fontsize=18)
            x += 4.2
    axes.set(xlim=(0, 15.2), ylim=(-1.4, 10.8), aspect="equal")
    axes.axis("off")
    return picture


def _matrix(axes, x: float, middle: float, letter: str, rows: int, columns: int, tiles: str, arrow: str) -> None:
    """Draws a matrix with its tiles, one of them filled, and an arrow along what is summed."""
    bottom, top = middle - rows / 2, middle + rows / 2
    fill = SIDES[letter.rstrip("\u1d40")]
    axes.add_patch(Rectangle((x, bottom), columns, rows, facecolor=fill.colour, edgecolor=BLACK, linewidth=1.6))
    if tiles in TILED:
        tall, wide = TILED[tiles]
        for i in range(1, round(rows / tall)):
            axes.plot((x, x + columns), (bottom + i * tall,) * 2, color=DARK, linewidth=1.4 if tall == 1 else 0.7)
        for i in range(1, round(columns / wide)):
            axes.plot((x + i * wide,) * 2, (bottom, top), color=DARK, linewidth=1.4 if wide == 1 else 0.7)
        axes.add_patch(Rectangle((x, top - tall), wide, tall, facecolor=VERMILION, edgecolor=BLACK, linewidth=1.2))
    ends = {"across": ((x, top + 0.2), (x + columns, top + 0.2)), "down": ((x - 0.2, top), (x - 0.2, bottom))}
    if arrow:
        axes.annotate("", ends[arrow][1], ends[arrow][0], arrowprops=dict(arrowstyle="->", linewidth=1.6))
    axes.text(x, top + 0.36, letter, fontsize=13, weight="bold")
    axes.text(x, bottom - 0.12, f"E4M3, {tiles}" if tiles in TILED else tiles, fontsize=10.5, va="top")


# ---- errors ---------------------------------------------------------------------------------------------------------


@styled
def error_curves(panels: Mapping[str, tuple[str, Mapping[str, Sequence[tuple[float, float]]]]],
                 ylabel: str = "error, % of the numbers' size") -> Picture:
    """Errors against something: panel -> (label of x, {name: points (x, error in percent)}). Errors are on a
    logarithmic axis, and so is x if it spans more than a factor of 20."""
    names = list(dict.fromkeys(name for _, lines in panels.values() for name in lines))
    picture = Picture(2.2 + 3.6 * len(panels), 3.5, f"Errors in percent for {', '.join(names)}, in the panels "
                      f"{', '.join(panels)}. See which lines rise and which stay level.", FEW)
    looks = dict(zip(names, LOOKS))
    for axes, (title, (xlabel, lines)) in zip(picture.subplots(1, len(panels), sharey=True, squeeze=False)[0],
                                              panels.items()):
        for name, points in lines.items():
            colour, dashes, mark = looks[name]
            axes.plot(*zip(*points), color=colour, linestyle=dashes, marker=mark, markersize=6, linewidth=1.6,
                      label=name)
        across = [x for points in lines.values() for x, _ in points]
        axes.set(xscale="log" if max(across) > 20 * min(across) else "linear", yscale="log", xlabel=xlabel)
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(color=GREY, linewidth=0.4)
        _plain_ticks(axes.yaxis, [y for points in lines.values() for _, y in points])
    picture.axes[0].set_ylabel(ylabel)
    picture.tight_layout(rect=(0, 0, 1 - 1.75 / picture.get_figwidth(), 1))
    handles = {label: handle for axes in picture.axes for handle, label in zip(*axes.get_legend_handles_labels())}
    picture.legend(handles.values(), handles.keys(), loc="center right", frameon=False, handlelength=3)
    return picture


def _plain_ticks(axis, values: Sequence[float]) -> None:
    """Powers of ten as numbers that one reads: 0.01, 1, 100."""
    powers = range(math.floor(math.log10(min(values))), math.ceil(math.log10(max(values))) + 1)
    axis.set_major_locator(FixedLocator([10.0 ** n for n in powers]))
    axis.set_major_formatter(FixedFormatter([f"{10.0 ** n:g}" for n in powers]))
    axis.set_minor_locator(NullLocator())


# ---- what waits -----------------------------------------------------------------------------------------------------


@styled
def stacked_bytes(rows: Mapping[str, Mapping[str, float]], xlabel: str) -> Picture:
    """Bars of bytes, cut into parts that are named in or under the bar: row -> {part: bytes}. Rows share their parts'
    colours; the total stands at the end."""
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    fills = dict(zip(parts, (Fill(SKY), Fill(ORANGE, "/"), Fill(GREEN, "\\"), Fill(YELLOW, "-"), Fill(PURPLE, "."),
                             Fill(WHITE, "x"), Fill(GREY, "|"))))
    picture = Picture(10, 1.2 + 0.58 * len(rows), f"Bars of {xlabel} for {', '.join(rows)}, cut into "
                      f"{', '.join(parts)}. Compare the lengths.", FEW)
    axes = picture.subplots()
    most = max(sum(row.values()) for row in rows.values())
    for i, (name, row) in enumerate(rows.items()):
        left = 0.0
        for part, size in row.items():
            fill = fills[part]
            axes.barh(i, size, left=left, height=0.62, color=fill.colour, hatch=fill.mark * 2, edgecolor=BLACK,
                      linewidth=0.8, label=part)
            left += size
        axes.text(left + 0.01 * most, i, f"{left:,.0f}", va="center", weight="bold")
    axes.set(yticks=range(len(rows)), yticklabels=list(rows), xlim=(0, 1.12 * most), xlabel=xlabel,
             ylim=(len(rows) - 0.5, -0.5))
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    picture.tight_layout(rect=(0, 0, 1, 1 - 0.28 * -(-len(parts) // 4) / picture.get_figheight()))
    picture.legend(handles.values(), handles.keys(), loc="upper center", ncols=min(len(parts), 4), frameon=False,
                   handleheight=1.2)
    return picture
