"""Chapter 05's still pictures: programs and their blocks, and what a tile's size buys.

Each takes plain numbers, so that any length and any machine can be drawn.
"""

from collections.abc import Sequence

from matplotlib.patches import Rectangle

from .style import BLACK, BLUE, DARK, GREY, PURPLE, SKY, VERMILION, WHITE, YELLOW, Fill, Picture, styled

PROGRAMS = (Fill(SKY, "|"), Fill(YELLOW, "/"), Fill(GREY, "-"))     # in turn
OUTSIDE = Fill(WHITE, "x")


@styled
def blocks(owners: Sequence[int], block: int) -> Picture:
    """`owners[i]`: which program wrote number i. Below each block, its program; lanes behind the end are crossed."""
    n, programs = len(owners), max(owners) + 1
    lanes = programs * block
    picture = Picture(10, 1.9, f"{n} numbers in a row, cut into {programs} blocks of {block}, one for each program. "
                      f"The last block reaches {lanes - n} places past the end; these are masked.")
    axes = picture.add_axes((0.01, 0.02, 0.98, 0.96))
    for i in range(lanes):
        fill = PROGRAMS[owners[i] % 3] if i < n else OUTSIDE
        axes.add_patch(Rectangle((i, 0), 1, 1, facecolor=fill.colour, edgecolor=BLACK, hatch=fill.mark * 2,
                                 linewidth=0.7))
        axes.text(i + 0.5, 0.5, str(i), ha="center", va="center", fontsize=9.5,
                  bbox=dict(facecolor=WHITE, edgecolor="none", pad=0.8))
    for program in range(programs):
        left = program * block
        axes.plot([left + 0.1, left + block - 0.1], [-0.2, -0.2], color=BLACK, linewidth=1.5)
        axes.text(left + block / 2, -0.35, f"program {program}", ha="center", va="top", fontsize=11, weight="bold")
    axes.text((n + lanes) / 2, 1.15, "masked", ha="center", va="bottom", fontsize=10)
    axes.plot([n, n], [-0.1, 1.15], color=VERMILION, linewidth=2.5)
    axes.text(n - 0.2, 1.15, f"n = {n}", ha="right", va="bottom", fontsize=10, color=VERMILION, weight="bold")
    axes.set(xlim=(-0.2, lanes + 0.2), ylim=(-1.05, 1.75))
    axes.axis("off")
    return picture


@styled
def tile_work(edges: Sequence[int], bytes_a_number: dict[str, int], ridges: dict[str, float], largest: int) -> Picture:
    """FLOP for each byte that a program reads in a step, over the edge of its square tile. `ridges`: FLOP a byte that a
    machine needs to be busy; `largest`: the edge whose sums fill all registers of a multiprocessor."""
    picture = Picture(8, 3.9, "FLOP a byte over the edge of a square tile, on log axes: straight lines, for one and "
                      "two bytes a number. See that no tile that fits into registers reaches the ridge by itself.")
    axes = picture.add_axes((0.11, 0.15, 0.86, 0.82))
    for (name, size), colour, dashes, marker in zip(bytes_a_number.items(), (BLUE, DARK), ("-", "--"), "os"):
        axes.plot(edges, [edge / size for edge in edges], color=colour, linestyle=dashes, marker=marker,
                  markeredgecolor=BLACK, linewidth=2, label=f"{name}: edge / {size}" if size > 1 else f"{name}: the "
                                                                                                      f"edge")
    for name, ridge in ridges.items():
        axes.axhline(ridge, color=VERMILION, linestyle=":", linewidth=1.6)
        axes.text(edges[0], ridge * 1.08, f"{name}: {ridge:,.0f} FLOP for each byte from memory", fontsize=10)
    axes.axvspan(largest, edges[-1] * 1.4, facecolor=GREY, alpha=0.45, hatch="xx", edgecolor=DARK, linewidth=0)
    axes.text(largest * 0.94, 0.7, f"sums of {largest} x {largest}\nfill all registers", ha="right", va="bottom",
              fontsize=10)
    axes.set(xscale="log", yscale="log", xlabel="edge of a square tile (numbers)", ylabel="FLOP a byte read",
             xlim=(edges[0] * 0.8, edges[-1] * 1.4))
    axes.set_xticks(edges, [str(edge) for edge in edges])
    axes.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(0.0, 0.62))
    return picture


COPY, MULTIPLY = Fill(PURPLE, "."), Fill(BLUE)


@styled
def pipelines(schedules: dict[int, Sequence[tuple[float, float, float, float]]]) -> Picture:
    """For each number of stages, when tiles are copied and multiplied: (copy begins, ends, product begins, ends) of
    each step. A lane for each place in shared memory, and one for the tensor cores, whose idle time is crossed."""
    lanes = sum(stages + 1 for stages in schedules) + 1.1 * len(schedules)
    ends = {stages: steps[-1][3] for stages, steps in schedules.items()}
    picture = Picture(10, 0.29 * lanes + 0.7, "Copies and products over time for several numbers of stages: bars in one"
                      " lane for each place in shared memory, and one lane for the tensor cores. "
                      + "; ".join(f"{stages} stages: {end:g} units" for stages, end in ends.items()) + ".")
    axes = picture.add_axes((0.17, 0.55 / (0.29 * lanes + 0.7), 0.81, 1 - 0.6 / (0.29 * lanes + 0.7)))
    y, ticks = 0.0, {}
    for stages, steps in schedules.items():
        axes.text(0, y - 0.52, f"{stages} stage{'s' * (stages > 1)}: {ends[stages]:g} units for {len(steps)} steps",
                  fontsize=11, weight="bold", va="bottom")
        for place in range(stages):
            ticks[y + place] = f"place {place}: copy"
        ticks[y + stages] = "tensor cores"
        axes.barh(y + stages, ends[stages], 0.8, color=WHITE, edgecolor=DARK, hatch="xx", linewidth=0.5)
        for i, (begin, arrived, start, end) in enumerate(steps):
            axes.barh(y + i % stages, arrived - begin, 0.8, begin, color=COPY.colour, edgecolor=BLACK, hatch="..")
            axes.barh(y + stages, end - start, 0.8, start, color=MULTIPLY.colour, edgecolor=BLACK)
            axes.text((begin + arrived) / 2, y + i % stages, str(i), ha="center", va="center", fontsize=9,
                      bbox=dict(facecolor=WHITE, edgecolor="none", pad=0.8))
            axes.text((start + end) / 2, y + stages, str(i), ha="center", va="center", fontsize=9, color=WHITE)
        y += stages + 2.1
    axes.set(ylim=(y - 1.4, -1.3), xlim=(0, max(ends.values()) + 0.2), xlabel="time, in products of one step")
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=9.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return picture
