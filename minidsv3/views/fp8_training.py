"""Chapter 04's pictures of training: a run in FP8 beside the same run in BF16, and beside what rounding alone does.

A distance is how far a run's smoothed loss lies above BF16's, in percent of it (report, appendix B). Lines go over
steps 1, 2, .. of equally many tokens; one that is shorter than the others belongs to a run that diverged.
"""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, MaxNLocator

from .style import BLACK, BLUE, DARK, VERMILION, Picture, styled

Line = Sequence[float]
LOOKS = {"BF16": (BLACK, ":"), "control": (VERMILION, "--"), "FP8": (BLUE, "-")}
FEW = 8                                 # colours that are enough here, see `Picture`
POINTS = 150                            # of a line that are drawn: it is smoothed, so neighbours are alike
FARTHEST = 8                            # bounds that the axis of distances shows at most


@styled
def beside_bf16(losses: Mapping[str, Line], apart: Mapping[str, Line], bound: float, step_tokens: int) -> Picture:
    """Above the losses in nats of "BF16", "control" and "FP8"; below the distances of the latter two in percent."""
    picture = Picture(9.2, 4.4, "Above, smoothed loss over tokens for BF16, FP8 and the control; below, the distance "
                      "of FP8 and of the control from BF16 in percent. See which of them stays between the lines at "
                      f"+-{bound:g} percent, which stand where it counts, over the last half.", FEW)
    above, below = picture.subplots(2, 1, sharex=True, height_ratios=(1, 1.4))
    for axes, lines in ((above, losses), (below, apart)):
        for name, line in lines.items():
            _draw(axes, line, step_tokens, name, name)
    above.set_ylabel("loss, nats")
    above.legend(frameon=False, loc="upper right", ncols=len(losses))
    below.set_ylabel("above BF16's, %")
    _frame({below: [*apart.values()]}, bound, step_tokens)
    picture.tight_layout()
    return picture


@styled
def one_by_one(apart: Mapping[str, Sequence[Line]], control: Sequence[Line], bound: float, step_tokens: int) -> Picture:
    """A panel for each way of FP8, with a line for each seed: its distance from BF16 in percent over the control's."""
    columns = min(3, len(apart))
    rows = -(-len(apart) // columns)
    picture = Picture(9.2, 0.9 + 1.6 * rows, f"Distance from BF16 in percent over tokens, a panel each for "
                      f"{'; '.join(apart)}. Compare the solid lines with the dashed ones, the control, and with the "
                      f"bounds of +-{bound:g} percent over the last half.", FEW)
    panels = picture.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(apart):]:
        axes.axis("off")
    for axes, (name, lines) in zip(panels.flat, apart.items()):
        for look, each in (("control", control), ("FP8", lines)):
            for i, line in enumerate(each):
                _draw(axes, line, step_tokens, look, None if i else look)
        axes.set_title(name, loc="left", fontsize=11)
    _frame(dict(zip(panels.flat, ([*control, *lines] for lines in apart.values()))), bound, step_tokens, columns)
    picture.supylabel("loss above BF16's, %", fontsize=11)
    panels[0, 0].legend(frameon=False, loc="upper left", ncols=2, borderpad=0)
    picture.tight_layout()
    return picture


def _draw(axes: Axes, line: Line, step_tokens: int, look: str, label: str | None) -> None:
    colour, dashes = LOOKS[look]
    shown = range(0, len(line), max(len(line) // POINTS, 1))
    axes.plot([step_tokens * (step + 1) for step in shown], [line[step] for step in shown], color=colour,
              linestyle=dashes, linewidth=1.3, label=label)


def _frame(panels: Mapping[Axes, Sequence[Line]], bound: float, step_tokens: int, columns: int = 1) -> None:
    """Axes of tokens and of distances, with the bounds over the last half of the steps; a cross where a run diverged.

    Distances are shown up to the largest after the first quarter, and up to FARTHEST bounds, so that neither the first
    steps nor a run that diverges makes all others flat.
    """
    steps = max(len(line) for lines in panels.values() for line in lines)
    settled = max(abs(distance) for lines in panels.values() for line in lines for distance in line[steps // 4:] or [0])
    most = min(max(1.1 * settled, 1.5 * bound), FARTHEST * bound)
    half, end = step_tokens * steps / 2, step_tokens * steps
    for i, (axes, lines) in enumerate(panels.items()):
        axes.axhline(0, color=DARK, linewidth=0.8, zorder=0)
        axes.hlines((-bound, bound), half, end, color=BLACK, linewidth=1.6)
        for line in lines:
            if len(line) < steps:
                there = step_tokens * len(line)
                axes.plot(there, -0.85 * most, "X", color=BLACK, markersize=9)
                axes.text(there, -0.85 * most, "  diverged  ", va="center", ha="right" if there > half else "left")
        axes.set(ylim=(-most, most), xlim=(step_tokens, end))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(5 if len(panels) > 1 else 8))
        if i + columns >= len(panels):              # nothing stands below
            axes.set_xlabel("tokens")
            axes.tick_params(labelbottom=True)
        if (i + 1) % columns == 0:                  # nothing beside
            for level, words in ((bound, f"+{bound:g} %"), (-bound, f"\u2212{bound:g} %")):
                axes.text(1.01, level, words, transform=axes.get_yaxis_transform(), va="center", fontsize=10)
