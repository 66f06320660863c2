"""Chapter 07's still pictures: timelines of orders, the order inside one F&B block, the formula's limits, and memory.

A timeline has a lane for each rank. Forward is blue, backward for the input orange, for the weights green; an exchange
that nothing hides is purple, idle time hatched. A block has its forward above and its backward below, with a frame.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.patches import Rectangle

from ..parallel.schedule import Orders, Overlapped
from ..parallel.simulate import Span, Timeline, longest_path, simulate
from .style import BLACK, GREY, PASSES, SKY, VERMILION, WHITE, Picture, ink, styled

FEW = 20                                # colours that are enough here, see `Picture`
LETTER = 0.0115                         # of the time axis, as wide as a letter
PASS = {"F": "forward", "I": "backward for inputs", "W": "backward for weights", "X": "communication"}
LETTERS = {"F": "F: forward", "I": "I: backward for the input", "W": "W: backward for the weights",
           "X": "exchange that nothing hides"}


class Piece(NamedTuple):
    """A part of a lane: kind F, I, W or X (exchange), when, what is written in it, and its part of the height."""

    kind: str
    start: float
    end: float
    label: str = ""
    bottom: float = 0.0
    top: float = 1.0


def pieces(span: Span, forward: float = 1, backward_input: float = 1, backward_weight: float = 1,
           overlapped: float | None = None, communication: float = 0) -> list[Piece]:
    """What a span is drawn as; the durations are those that `simulate` was given.

    A block that overlaps has the forward above the backward, both as long as the block but for what it cannot hide.
    """
    if isinstance(span.action, Overlapped) and overlapped is not None:
        above, below = (f"{part.direction}{part.micro_batch}" for part in span.action.parts)
        too_long = overlapped - (forward + backward_input + backward_weight)
        end = span.end - min(max(too_long, 0), 2 * communication)
        middle = span.start + (end - span.start) * backward_input / (backward_input + backward_weight)
        drawn = [Piece("F", span.start, end, above, bottom=0.5), Piece("I", span.start, middle, below, top=0.5),
                 Piece("W", middle, end, top=0.5)]
        return drawn + [Piece("X", end, span.end)] * (end < span.end)
    lengths = {"F": forward, "I": backward_input, "W": backward_weight, "X": communication}
    drawn, at = [], span.start
    for part in span.action.parts:
        label = f"{part.direction}{part.micro_batch}"
        for kind in {"F": "FX", "I": "IX", "W": "W", "B": "IXW"}[part.kind]:
            if lengths[kind]:
                drawn.append(Piece(kind, at, at + lengths[kind], label))
                at, label = at + lengths[kind], ""
    return drawn


# ---- timelines ------------------------------------------------------------------------------------------------------


@styled
def timelines(rows: Mapping[str, tuple[Orders, dict]], columns: Mapping[str, dict], numbers: bool = False,
              path: bool = False) -> Picture:
    """A grid of timelines on one time axis; the total stands at the right of each.

    rows: name -> (orders, durations of its own), columns: name -> durations, both for `simulate`. `numbers` writes
    each micro-batch into its action, `path` outlines the longest path.
    """
    cells = {(row, column): simulate(orders, **shared, **own)
             for row, (orders, own) in rows.items() for column, shared in columns.items()}
    longest = max(timeline.makespan for timeline in cells.values())
    totals = "; ".join(f"{' '.join(name).strip()} {timeline.makespan:g}" for name, timeline in cells.items())
    lanes = [len(orders) for orders, _ in rows.values()]
    picture = Picture(9, 0.75 + sum(0.5 + (0.22 if numbers or path else 0.13) * n for n in lanes),
                      f"Timelines of pipelines, a lane for each rank; units of time: {totals}. "
                      "See how much of the lanes is hatched, which is idle.", FEW)
    grid = picture.subplots(len(rows), len(columns), sharex=True, squeeze=False, height_ratios=[n + 2 for n in lanes])
    for line, (row, (orders, own)) in zip(grid, rows.items()):
        for axes, (column, shared) in zip(line, columns.items()):
            timeline = cells[row, column]
            _lanes(axes, timeline, shared | own, longest if numbers else None)
            if path:
                _outline(axes, longest_path(orders, timeline))
            axes.text(timeline.makespan + longest * 0.015, len(orders) / 2, f"{timeline.makespan:g}", fontsize=14,
                      weight="bold", va="center")
        line[0].set_title(row, loc="left", fontsize=10.5)
    for axes, column in zip(grid[0], columns):
        axes.set_title(column, loc="right", fontsize=10.5, weight="normal")
    for axes in grid[-1]:
        axes.set_xlabel("time")
    grid[0, 0].set_xlim(0, longest * 1.13)
    picture.tight_layout(rect=(0, 0.3 / picture.get_figheight(), 1, 1))
    _legend(picture, exchange=any("communication" in shared for shared in columns.values()))
    return picture


def _lanes(axes, timeline: Timeline, durations: dict, axis: float | None) -> None:
    """Idle time hatched below, pieces above, and a frame around each block. With `axis`, the length of the time axis,
    every action has a frame, and its number if that fits."""
    ranks = len(timeline.spans)
    axes.add_patch(_idle(0, 0, timeline.makespan, ranks))
    for rank, spans in enumerate(timeline.spans):
        for span in spans:
            for piece in pieces(span, **durations):
                _draw_piece(axes, piece, rank, axis)
            if axis or isinstance(span.action, Overlapped):
                axes.add_patch(Rectangle((span.start, rank), span.end - span.start, 1, fill=False, edgecolor=BLACK,
                                         linewidth=1.2 if axis else 0.5))
    for rank in range(ranks + 1):
        axes.axhline(rank, color=WHITE, linewidth=1.5)
    axes.set(ylim=(ranks, 0), yticks=(0.5, ranks - 0.5), yticklabels=(0, ranks - 1), ylabel="rank")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=9)


def _draw_piece(axes, piece: Piece, rank: int, axis: float | None) -> None:
    """Rank 0 is above, so the bottom of a lane is at rank + 1."""
    fill = PASSES[PASS[piece.kind]]
    width, height = piece.end - piece.start, piece.top - piece.bottom
    axes.add_patch(Rectangle((piece.start, rank + 1 - piece.top), width, height, facecolor=fill.colour,
                             linewidth=0.3 if axis else 0, edgecolor=BLACK))
    if axis and width / axis > LETTER * len(piece.label):
        axes.text(piece.start + width / 2, rank + 1 - (piece.top + piece.bottom) / 2, piece.label, ha="center",
                  va="center", fontsize=9 if height == 1 else 7, color=ink(fill.colour))


def _idle(x: float, y: float, width: float, height: float, **options) -> Rectangle:
    return Rectangle((x, y), width, height, facecolor=WHITE, edgecolor="#999999", linewidth=0,
                     hatch=3 * PASSES["idle"].mark, **options)


def _outline(axes, path: list[tuple[int, Span]]) -> None:
    for colour, width in ((WHITE, 4.5), (BLACK, 2.2)):
        for rank, span in path:
            axes.add_patch(Rectangle((span.start, rank + 0.1), span.end - span.start, 0.8, fill=False,
                                     edgecolor=colour, linewidth=width))


def _legend(picture: Picture, exchange: bool) -> None:
    handles = [Rectangle((0, 0), 1, 1, facecolor=PASSES[PASS[kind]].colour, edgecolor=BLACK, label=words)
               for kind, words in LETTERS.items() if kind != "X" or exchange]
    picture.legend(handles=[*handles, _idle(0, 0, 1, 1, label="idle")], loc="lower center", ncols=len(handles) + 1,
                   frameon=False, fontsize=9, columnspacing=1.4)


# ---- one block ------------------------------------------------------------------------------------------------------

TRACE = "public trace deepseek-ai/profile-data, train.json: H800, 4 layers with experts, 4096 tokens"
COMPUTE = (("attn F", "F", 17.5), ("MLP I", "I", 21.2), ("MLP W", "W", 25.5), ("MLP F", "F", 18.4),
           ("attn I", "I", 37.4), ("attn W", "W", 9.6))               # ms, in the trace's order; sums over the 4 layers
EXCHANGES = (("combine\nof B", 0, 1), ("dispatch\nof F", 1, 2), ("dispatch\nof B", 2, 4), ("combine\nof F", 4, 6))
SPAN, BUSY, EXCHANGED, HIDDEN = 129.0, 124.3, 113.4, 109.25           # ms of the block, its compute, its exchanges


@styled
def block_order() -> Picture:
    """Above: the order inside one F&B block of the public trace. Below: its sums, one after the other and as measured.

    The lengths of the compute pieces are the trace's; each exchange is drawn beside the pieces that run meanwhile, its
    own length is not published apart from the others'.
    """
    picture = Picture(9, 3.6, "The order inside one F&B block of DeepSeek's public trace, compute above and exchange "
                      f"below, and its sums: {BUSY + EXCHANGED:.1f} milliseconds of work in {SPAN:.1f}. Beside "
                      "each exchange of one direction the other one computes.", 32)
    order, sums = picture.subplots(2, 1, height_ratios=(1.15, 1))
    edges = [0.0]
    for name, kind, length in COMPUTE:
        _bar(order, edges[-1], length, 1.1, PASSES[PASS[kind]].colour, name.replace(" ", "\n") + f"\n{length:g}")
        edges.append(edges[-1] + length)
    exchange = PASSES["communication"].colour
    for name, first, last in EXCHANGES:
        _bar(order, edges[first] + 0.5, edges[last] - edges[first] - 1, 0, exchange, name)
    order.set(xlim=(0, edges[-1] * 1.003), ylim=(-0.1, 2.2), xticks=(), yticks=(0.5, 1.6),
              yticklabels=("exchange", "compute"))
    order.set_title("the order: compute to scale, in ms; exchanges beside what runs meanwhile", loc="left",
                    fontsize=10.5)
    _bar(sums, 0, BUSY, 1.1, GREY, f"compute {BUSY:.1f}")
    _bar(sums, BUSY, EXCHANGED, 1.1, exchange, f"exchange {EXCHANGED:.1f}")
    _bar(sums, 0, SPAN, 0, WHITE, f"the block as measured: {SPAN:.1f}")
    sums.text(SPAN + 3, 0.5, f"{100 * HIDDEN / EXCHANGED:.1f} % of the exchange hides", va="center", fontsize=10.5,
              weight="bold")
    sums.set(xlim=(0, (BUSY + EXCHANGED) * 1.003), ylim=(-0.1, 2.2), yticks=(0.5, 1.6),
             yticklabels=("block", "one by one"))
    sums.set_xlabel(f"ms; {TRACE}", fontsize=9)
    for axes in (order, sums):
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    picture.tight_layout()
    return picture


def _bar(axes, start: float, length: float, bottom: float, colour: str, words: str) -> None:
    axes.add_patch(Rectangle((start, bottom), length, 1, facecolor=colour, edgecolor=BLACK, linewidth=0.8))
    axes.text(start + length / 2, bottom + 0.5, words, ha="center", va="center", fontsize=9, color=ink(colour),
              linespacing=1.15)


# ---- the formula, and memory ----------------------------------------------------------------------------------------


@styled
def law_and_timeline(panels: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]) -> Picture:
    """Idle time by formula (dashed) and by timeline (solid): a panel for each name -> (x, formula, timeline).

    The name is what x is.
    """
    picture = Picture(8.8, 3.1, f"Idle time by the formula and by the timeline, over {' and '.join(panels)}. "
                      "See where the two lines part.", FEW)
    for axes, (name, (x, formula, timeline)) in zip(
            picture.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items()):
        axes.plot(x, timeline, color=BLACK, linewidth=2.4, marker="o", markersize=5, label="timeline")
        axes.plot(x, formula, color=VERMILION, linewidth=1.8, linestyle="--", label="formula")
        axes.set(xlabel=name, ylim=(0, None))
        axes.grid(axis="y", color=GREY, linewidth=0.5)
    picture.axes[0].set_ylabel("idle time of a rank")
    picture.axes[0].legend(frameon=False)
    picture.tight_layout()
    return picture


@styled
def chunks_in_flight(methods: Mapping[str, Sequence[int]]) -> Picture:
    """The most chunks that each rank holds at once, printed in a table of bars: name -> one number a rank."""
    picture = Picture(8.8, 2.9, "The most chunks in flight on every rank, for "
                      + "; ".join(f"{name}: {', '.join(map(str, most))}" for name, most in methods.items())
                      + ". See which are level.", FEW)
    most = max(map(max, methods.values()))
    for axes, (name, chunks) in zip(picture.subplots(1, len(methods), sharey=True, squeeze=False)[0], methods.items()):
        axes.bar(range(len(chunks)), chunks, color=SKY, edgecolor=BLACK, linewidth=0.7)
        for rank, number in enumerate(chunks):
            axes.text(rank, number + 0.02 * most, str(number), ha="center", fontsize=9)
        axes.set(xlabel="rank", xticks=range(len(chunks)), ylim=(0, 1.12 * most), yticks=())
        axes.set_title(name, loc="left", fontsize=10.5)
    picture.axes[0].set_ylabel("chunks in flight")
    picture.tight_layout()
    return picture
