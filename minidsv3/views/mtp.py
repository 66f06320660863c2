"""Chapter 03's still pictures: the ladder of predictions, the shift, two rows of passes, and what was measured.

Each takes plain numbers or words, so that a toy, a run and a stored experiment are drawn alike.
"""

from collections.abc import Mapping, Sequence

from matplotlib.patches import FancyBboxPatch

from .draft_and_verify import MAIN, MODULE
from .style import BLACK, BLUE, DARK, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, WHITE, Picture, ink, styled

DRAFTERS = {                            # who drafts: colour and hatch
    "mtp": (VERMILION, "//"), "bigram": (SKY, "||"), "lookup": (ORANGE, ".."), "mtp_without_token": (WHITE, "xx")}
SIGNS = str.maketrans({" ": "\u2423", "\n": "\u23ce", "\t": "\u21e5"})
FEW = 32                                # colours that are enough here, see `Picture`


def visible(word: str) -> str:
    """A token with its blanks and line ends as signs."""
    return word.translate(SIGNS)


def _cell(axes, x: float, y: float, words: str, colour: str, width: float = 0.78, height: float = 0.56,
          hatch: str = "", size: float = 11, mono: bool = False) -> None:
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.02",
                                  facecolor=colour, edgecolor=BLACK, linewidth=0.9, hatch=hatch))
    axes.text(x, y, words, ha="center", va="center", fontsize=size, color=ink(colour),
              family="DejaVu Sans Mono" if mono else None)


# ---- what is predicted from what ------------------------------------------------------------------------------------


@styled
def ladder(inputs: int = 7) -> Picture:
    """The ladder: T inputs and one last target in a row, h_i above each input, an MTP position above each h_i that has
    a target, and hatched cells where none is left."""
    picture = Picture(9, 4.7, f"A row of {inputs + 1} tokens. Above them the main model, which predicts the next token "
                      "from each; above it the MTP module, which joins h with the next token's embedding and predicts "
                      f"one further, {inputs - 1} times. Its last cell has no target.", FEW)
    axes = picture.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set(xlim=(-0.6, inputs + 2.9), ylim=(-0.55, 4.45))
    axes.axis("off")
    arrow = dict(arrowstyle="-|>", linewidth=1.4, shrinkA=0, shrinkB=0)
    for i in range(inputs + 1):
        _cell(axes, i, 0, f"$t_{i + 1}$", SKY if i < inputs else WHITE, hatch="" if i < inputs else "//")
    for i in range(inputs):
        _cell(axes, i, 1.5, f"$h_{i + 1}$", BLUE)
        axes.annotate("", (i, 1.2), (i, 0.3), arrowprops=arrow | dict(color=BLUE))
        axes.annotate("", (i, 2.7), (i, 1.8), arrowprops=arrow | dict(color=DARK))
        if i < inputs - 1:
            _cell(axes, i, 3.0, "MTP", VERMILION, size=10)
            axes.annotate("", (i + 0.3, 2.7), (i + 0.86, 0.3), arrowprops=arrow | dict(color=VERMILION, linestyle="--"))
            axes.annotate("", (i, 3.78), (i, 3.3), arrowprops=arrow | dict(color=VERMILION))
            axes.text(i, 3.98, f"$t_{i + 3}$", ha="center", va="center", fontsize=12)
    _cell(axes, inputs - 1, 3.0, "", WHITE, hatch="..")
    axes.text(inputs - 1, 3.98, "none", ha="center", va="center", fontsize=10)
    notes = ((0, f"tokens: T = {inputs} inputs;\nthe last is only a target"),
             (1.5, f"main model: each h predicts\nthe next token; {inputs} predictions,\ndivided by {inputs}"),
             (2.28, "dashed: the embedding\nof the next token"),
             (3.0, f"MTP module, depth 1:\n{inputs - 1} predictions, and still\ndivided by {inputs}"),
             (3.98, "targets of the module"))
    for y, words in notes:
        axes.text(inputs + 0.5, y, words, va="center", fontsize=10)
    return picture


@styled
def shift(words: Sequence[str]) -> Picture:
    """The same line of tokens in columns: what a position has read, what it is joined with, what it must predict; and
    below the two shifts that are usually got wrong. At most 9 tokens."""
    if not 4 <= len(words) <= 9:
        raise ValueError(f"there are {len(words)} tokens; the picture shows 4 to 9")
    words = [visible(word) for word in words]
    last = len(words) - 1
    rows = [("$h_i$ has read up to", 0, SKY, ""), ("joined with $t_{i+1}$", 1, ORANGE, ""),
            ("\u2713 target $t_{i+2}$", 2, GREEN, ""),
            ("\u2717 target $t_{i+1}$:\ncopies its input", 1, WHITE, "xx"),
            ("\u2717 joined with $t_i$:\nlearns nothing new", 0, WHITE, "xx")]
    picture = Picture(9, 3.9, "A table of the example line by position: the last token read, the next one joined, the "
                      "one after it as target. Two crossed rows below show the usual wrong shifts.", FEW)
    axes = picture.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set(xlim=(-2.3, last + 0.6), ylim=(-4.75, 1.0))
    axes.axis("off")
    for i in range(last + 1):
        axes.text(i, 0.65, f"i = {i + 1}", ha="center", fontsize=10, color=DARK)
    for row, (title, offset, colour, cross) in enumerate(rows):
        y = -row - 0.35 * (row > 2)
        axes.text(-2.25, y, title, va="center", fontsize=10.5)
        for i in range(last + 1):
            if i + offset <= last and not (row == 3 and i + 2 > last + 1):
                _cell(axes, i, y, words[i + offset], colour, width=0.86, size=10 if len(words[i + offset]) < 7 else 8.7,
                      mono=True)
                if cross:
                    axes.plot([i - 0.4, i + 0.4], [y - 0.26, y + 0.26], color=VERMILION, linewidth=1.6)
            else:
                _cell(axes, i, y, "", WHITE, width=0.86, hatch="..")
    axes.axhline(-2.68, color=GREY, linewidth=1)
    return picture


# ---- decoding -------------------------------------------------------------------------------------------------------


@styled
def two_rows(words: Sequence[str], refused: Sequence[int], draft_cost: float) -> Picture:
    """Plain and speculative decoding of the same words on one time axis. words[0] is the prompt's last token; the
    drafts of the words at the indices `refused` were wrong."""
    words = [visible(word) for word in words]
    picture = Picture(9, 3.5, f"Two rows of passes that write the same {len(words) - 1} tokens. Above, a pass a token; "
                      "below, each pass also verifies a draft, and accepted drafts save passes.", FEW)
    axes = picture.add_axes((0.02, 0.13, 0.96, 0.85))
    for i, word in enumerate(words[1:]):
        axes.barh(0, 1, 0.42, i, color=MAIN.colour, edgecolor=BLACK)
        axes.text(i + 0.5, 0, f"reads {words[i]}", ha="center", va="center", color=WHITE, fontsize=8.8)
        axes.text(i + 0.5, -0.38, f"+ {word}", ha="center", va="center", fontsize=10, weight="bold")
    at, start = 0, 0.0
    while at < len(words) - 1:
        drafting = at + 1 < len(words) - 1
        accepted = drafting and at + 1 not in refused
        draft = f"draft {words[at + 1]}" if accepted else "a wrong draft" if drafting else "no draft"
        new = words[at + 1:at + 3] if accepted else words[at + 1:at + 2]
        mark = "\u2713" if accepted else "\u2717"
        axes.barh(1.5, 1, 0.42, start, color=MAIN.colour, edgecolor=BLACK)
        axes.barh(1.5, draft_cost, 0.42, start + 1, color=MODULE.colour, hatch="///", edgecolor=BLACK)
        axes.text(start + 0.5, 1.5, f"reads {words[at]}\n{draft}", ha="center", va="center", color=WHITE,
                  fontsize=8.8)
        if drafting:
            axes.text(start + 0.5, 1.88, mark + (" accepted" if accepted else " refused"), ha="center", va="center",
                      fontsize=9.5)
        axes.text(start + 0.5, 1.12, "+ " + "  ".join(new), ha="center", va="center", fontsize=10, weight="bold")
        at, start = at + len(new), start + 1 + draft_cost
    for x, y in ((len(words) - 1, 0), (start, 1.5)):
        axes.plot([x, x], [y - 0.3, y + 0.3], color=BLACK, linewidth=3)
    axes.text(len(words) - 1 + 0.1, 0, "done", va="center", fontsize=10.5)
    axes.text(start + 0.1, 1.5, f"done: {(len(words) - 1) / start:.2f} times as fast", va="center", fontsize=10.5)
    axes.set(xlim=(0, len(words) - 1 + 0.65), ylim=(2.15, -0.65), yticks=(), xlabel="time, in passes of the main model")
    axes.spines["left"].set_visible(False)
    return picture


# ---- curves and bars ------------------------------------------------------------------------------------------------

LINES = ((BLUE, "-"), (VERMILION, "--"), (BLACK, ":"), (GREEN, "-."), (PURPLE, (0, (1, 1))))


@styled
def loss_curves(curves: Mapping[str, Sequence[float]], floors: Mapping[str, float], every: int) -> Picture:
    """Losses over steps, one point every `every` steps, and horizontal lines at what can be known."""
    picture = Picture(9, 4.0, "Losses over training steps: " + ", ".join(curves) + ". Horizontal lines show "
                      "what can be known: " + ", ".join(floors) + ".", FEW)
    axes = picture.add_axes((0.08, 0.13, 0.72, 0.84))
    end = every * max(map(len, curves.values()))
    for (name, values), (colour, dashes) in zip(curves.items(), LINES):
        axes.plot([every * (i + 1) for i in range(len(values))], values, color=colour, linestyle=dashes, linewidth=2,
                  label=name)
    for name, value in floors.items():
        axes.axhline(value, color=GREY, linewidth=1)
        axes.text(1.01 * end, value, f"{name}:\n{value:.2f} nats", va="center", fontsize=9.5, color=DARK)
    axes.set(xlabel="steps", ylabel="nats a prediction", xlim=(0, end), ylim=(0, None))
    axes.legend(loc="upper right", frameon=False)
    return picture


@styled
def readings(losses: Mapping[str, float], floor: float) -> Picture:
    """The same weights read in several ways: one bar of loss each, and the loss of guessing."""
    picture = Picture(9, 2.3, "Bars of the MTP loss of one trained module read in several ways. Only the first bar, "
                      "which reads the weights as they were trained, is short.", FEW)
    axes = picture.add_axes((0.36, 0.22, 0.6, 0.74))
    for row, (name, value) in enumerate(losses.items()):
        axes.barh(row, value, 0.6, color=GREEN if row == 0 else GREY, hatch="" if row == 0 else "//", edgecolor=BLACK)
        axes.text(value + 0.04, row, f"{value:.2f}", va="center", fontsize=10.5)
    axes.axvline(floor, color=BLACK, linestyle="--", linewidth=1.2)
    axes.text(floor + 0.04, len(losses) - 0.42, "guessing", fontsize=9.5)
    axes.set(yticks=range(len(losses)), yticklabels=losses, xlabel="nats a prediction",
             xlim=(0, 1.12 * max(floor, *losses.values())), ylim=(len(losses) - 0.35, -0.5))
    return picture


@styled
def drafters(shares: Mapping[str, Mapping[str, Sequence[float]]], names: Mapping[str, str], xlabel: str) -> Picture:
    """Bars of how often each drafter is right: kind of text -> drafter -> one share for each seed. The bar is the mean,
    dots are the seeds, the number stands at the end."""
    picture = Picture(9, 0.9 + 0.3 * sum(len(each) + 0.7 for each in shares.values()),
                      f"Bars of {xlabel} for " + ", ".join(shares) + ", with a dot for each seed. Compare the module "
                      "with the two drafters that need no model.", FEW)
    height = picture.get_figheight()
    axes = picture.add_axes((0.3, 0.55 / height, 0.66, 1 - 0.65 / height))
    y, labels = 0.0, []
    for kind, each in shares.items():
        axes.text(-0.02, y - 0.72, kind, ha="right", va="center", fontsize=11, weight="bold",
                  transform=axes.get_yaxis_transform())
        for drafter, values in each.items():
            mean, (colour, hatch) = sum(values) / len(values), DRAFTERS[drafter]
            axes.barh(y, 100 * mean, 0.8, color=colour, hatch=hatch, edgecolor=BLACK, linewidth=0.9)
            axes.plot([100 * value for value in values], [y] * len(values), "o", color=BLACK, markersize=3.5)
            axes.text(max(100 * value for value in values) + 1.5, y, f"{100 * mean:.0f} %", va="center", fontsize=10.5,
                      bbox=dict(facecolor=WHITE, edgecolor="none", pad=1))
            labels.append((y, names[drafter]))
            y += 1
        y += 0.9
    axes.set(yticks=[place for place, _ in labels], yticklabels=[name for _, name in labels], xlim=(0, 108),
             ylim=(y - 1.2, -1.1), xlabel=f"{xlabel} (%)")
    axes.tick_params(axis="y", length=0)
    return picture


@styled
def expected_and_measured(rows: Mapping[str, Mapping[str, float]]) -> Picture:
    """Speed-ups by batch: what formulas expect, hatched, and what was measured, plain, each with its number."""
    looks = ((WHITE, "//"), (GREY, ".."), (SKY, "||"), (GREEN, ""))
    names = list(next(iter(rows.values())))
    picture = Picture(9, 3.6, "Bars of the speed-up of speculative decoding for several batches: expected by formulas "
                      "(hatched) and measured. See where the formulas stop being right.", FEW)
    axes = picture.add_axes((0.08, 0.12, 0.9, 0.72))
    width = 0.8 / len(names)
    for column, each in enumerate(rows.values()):
        for i, name in enumerate(names):
            x = column + width * (i - (len(names) - 1) / 2)
            colour, hatch = looks[i]
            axes.bar(x, each[name], 0.92 * width, color=colour, hatch=hatch, edgecolor=BLACK, linewidth=0.9,
                     label=name if column == 0 else None)
            axes.text(x, each[name] + 0.02, f"{each[name]:.2f}", ha="center", fontsize=9.5,
                      bbox=dict(facecolor=WHITE, edgecolor="none", pad=0.6))
    axes.axhline(1, color=BLACK, linestyle="--", linewidth=1.2, zorder=0.5)
    axes.set(xticks=range(len(rows)), xticklabels=rows, ylabel="times as fast as plain",
             ylim=(0, 1.25 * max(max(each.values()) for each in rows.values())))
    axes.legend(loc="upper center", ncols=2, frameon=False, bbox_to_anchor=(0.5, 1.24))
    return picture
