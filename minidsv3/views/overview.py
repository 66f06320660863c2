"""Chapter 00's still pictures: where the parameters are, how training goes, whom the router sends tokens to.

Each takes plain numbers, so that any run can be drawn: a notebook's, the command line's, a stored one.
"""

import math
from collections.abc import Sequence

from .. import cost
from ..config import ModelConfig
from .price_dial import shares
from .style import BLACK, BLUE, DARK, GREY, ORANGE, PARTS, SKY, VERMILION, Picture, human, styled


@styled
def stored_and_active(config: ModelConfig) -> Picture:
    """Two bars of equal height, stored and used by one token, cut by part, with ribbons between equal parts."""
    stored, active = cost.parameters(config), cost.active_parameters(config)
    left, right = shares(stored), shares(active)
    picture = Picture(9, 5.2, f"Two bars cut by part: {human(stored.learned)} parameters stored and "
                      f"{human(active.learned)} used by one token. Routed experts shrink from "
                      f"{left['routed experts']:.1%} to {right['routed experts']:.1%}, attention grows from "
                      f"{left['attention']:.1%} to {right['attention']:.1%}.")
    axes = picture.add_axes((0.02, 0.1, 0.96, 0.86))
    low, high = 0.0, 0.0
    for name, fill in PARTS.items():
        for x, bottom, share in ((0, low, left[name]), (1.6, high, right[name])):
            axes.bar(x, share, 0.6, bottom, color=fill.colour, hatch=fill.mark * 2, edgecolor=BLACK, linewidth=0.8)
        top = (low + left[name], high + right[name])
        axes.fill_between([0.3, 1.3], [low, high], top, color=fill.colour, alpha=0.25)
        low, high = top
    _name_parts(axes, -0.36, "right", left)
    _name_parts(axes, 1.96, "left", right)
    axes.set(xlim=(-1.5, 3.1), ylim=(0, 1), xticks=(0, 1.6), yticks=(), xticklabels=(
        f"stored: {human(stored.learned)}", f"used by one token: {human(active.learned)}"))
    axes.tick_params(axis="x", labelsize=12, length=0)
    axes.spines[:].set_visible(False)
    return picture


def _name_parts(axes, x: float, side: str, fractions: dict[str, float]) -> None:
    """Labels at the height of their piece, moved apart where pieces are thin, with a line to the piece."""
    bottom, wanted = 0.0, []
    for share in fractions.values():
        wanted.append(bottom + share / 2)
        bottom += share
    heights = list(wanted)
    heights[-1] = min(heights[-1], 0.975)
    for i in range(len(heights) - 2, -1, -1):
        heights[i] = min(heights[i], heights[i + 1] - 0.052)
    edge = x + 0.06 if side == "right" else x - 0.06
    for (name, share), height, middle in zip(fractions.items(), heights, wanted):
        axes.plot([x, edge], [height, middle], color=DARK, linewidth=0.7, clip_on=False)
        axes.text(x, height, f" {name} {share:.1%} ", ha=side, va="center", fontsize=11)


@styled
def loss_curve(tokens: Sequence[float], losses: Sequence[float], unigram: float, vocabulary: int,
               held_out: float | None = None) -> Picture:
    """Training loss in nats a token over tokens seen, between the two losses that need no model.

    tokens and losses of equal length; `unigram` is the cross-entropy of word frequencies, `held_out` the final loss on
    text that was not trained on.
    """
    if len(tokens) != len(losses):
        raise ValueError(f"there are {len(tokens)} token counts for {len(losses)} losses; each loss needs one")
    picture = Picture(9, 4.2, "Training loss over tokens seen, with lines at the loss of guessing uniformly and of "
                      "knowing only how often each token occurs. See where the curve crosses the second line.")
    axes = picture.add_axes((0.08, 0.14, 0.9, 0.8))
    axes.plot(tokens, losses, color=BLUE, linewidth=1.6, label="training loss")
    end, chance = tokens[-1], math.log(vocabulary)
    for value, words in ((chance, f"every token alike: ln {vocabulary:,} = {chance:.2f}"),
                         (unigram, f"frequencies alone (unigram): {unigram:.2f}")):
        axes.axhline(value, color=DARK, linewidth=1, linestyle="--")
        axes.text(end, value + 0.06, words, ha="right")
    if held_out is not None:
        axes.plot(end, held_out, "D", color=VERMILION, markeredgecolor=BLACK, markersize=9, linestyle="none",
                  label=f"held-out text, at the end: {held_out:.2f}")
    axes.legend(loc="lower left", frameon=False)
    lowest, highest = min(*losses, unigram, held_out or math.inf), max(*losses, chance)
    axes.set(xlabel="tokens seen (thousands)", ylabel="nats a token", xlim=(0, end * 1.02),
             ylim=(lowest - 0.6, highest + 0.4))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f}")
    return picture


@styled
def expert_load(before: Sequence[float], after: Sequence[float], top_k: int,
                titles: tuple[str, str] = ("before", "after")) -> Picture:
    """Tokens that chose each expert, twice, with the mean and the band that pure chance would leave.

    before and after: counts an expert. The band is two standard deviations of a binomial: n tokens that each draw top_k
    of the experts at random.
    """
    picture = Picture(9, 3.6, f"Bars of tokens per expert, {titles[0]} and {titles[1]}, with the mean as a line and "
                      "the band of pure chance. See how far the bars leave the band in each panel.")
    top = 1.18 * max(*before, *after)
    for axes, load, title in zip(picture.subplots(1, 2, sharey=True), (before, after), titles):
        mean = sum(load) / len(load)
        chance = 2 * math.sqrt(mean * (1 - top_k / len(load)))
        axes.axhspan(mean - chance, mean + chance, color=SKY, alpha=0.35, label="pure chance (2 sd)")
        bars = axes.bar(range(len(load)), load, color=ORANGE, edgecolor=BLACK, linewidth=0.7)
        for bar, count in zip(bars, load):
            if count > mean + chance:
                bar.set_hatch("//")
        axes.axhline(mean, color=BLACK, linestyle="--", linewidth=1.2, label=f"mean {mean:,.0f}")
        axes.set(title=f"{title}: fullest is {max(load) / mean:.2f} x mean", xlabel="expert", ylim=(0, top))
        axes.set_xticks(range(0, len(load), 4))
        axes.legend(loc="upper right", ncols=2, frameon=False)
        axes.set_ylabel("tokens") if title == titles[0] else None
    picture.tight_layout()
    return picture


@styled
def what_is_predicted(tokens: Sequence[str]) -> Picture:
    """A line of tokens with what is predicted from each: the next token, and by MTP the one after it.

    Blanks, line ends and tabs are drawn as signs. At most 12 tokens fit.
    """
    if not 3 <= len(tokens) <= 12:
        raise ValueError(f"there are {len(tokens)} tokens; the picture shows 3 to 12")
    picture = Picture(9, 2.6, "The running example's tokens in a row. Arrows above lead from each token to the next, "
                      "dashed arrows below to the one after it; the last tokens have no target.")
    axes = picture.add_axes((0.01, 0.02, 0.98, 0.96))
    axes.set(xlim=(-0.6, len(tokens) - 0.4), ylim=(-1.35, 1.35))
    axes.axis("off")
    signs = str.maketrans({" ": "\u2423", "\n": "\u23ce", "\t": "\u21e5"})
    for i, token in enumerate(tokens):
        axes.text(i, 0, token.translate(signs), ha="center", va="center", family="DejaVu Sans Mono", fontsize=12,
                  bbox=dict(boxstyle="round,pad=0.4", facecolor=SKY, edgecolor=BLACK))
    arrow = dict(arrowstyle="-|>", linewidth=1.5)
    for i in range(len(tokens) - 1):
        axes.annotate("", (i + 0.95, 0.28), (i + 0.05, 0.28), arrowprops=arrow | dict(
            color=BLUE, connectionstyle="arc3,rad=-0.5"))
    for i in range(len(tokens) - 2):
        axes.annotate("", (i + 1.95, -0.28), (i + 0.05, -0.28), arrowprops=arrow | dict(
            color=VERMILION, linestyle="--", connectionstyle="arc3,rad=0.35"))
    axes.text(-0.5, 1.1, "main model: the next token", fontsize=11)
    axes.text(-0.5, -1.25, "MTP module: one further, seen through the next one", fontsize=11)
    return picture


@styled
def written_sample(prompt: str, text: str, width: int = 88) -> Picture:
    """What a model wrote, as a picture: the prompt on grey, the rest below. Text is cut to lines of `width` letters."""
    def printable(words: str) -> str:
        return "".join(c if c.isascii() and (c.isprintable() or c == "\n") else "?" for c in words)

    def lines(words: str) -> list[str]:
        return [line[:width] for line in printable(words).split("\n")]

    above, below = lines(prompt), lines(text)
    rows = len(above) + len(below)
    picture = Picture(9, 0.24 * rows + 0.5, "A prompt on grey and, below, the text that a model wrote after it. "
                      "Compare its shape with its sense.")
    axes = picture.add_axes((0.01, 0.02, 0.98, 0.96))
    axes.set(xlim=(0, 1), ylim=(rows + 0.6, -0.6))
    axes.axis("off")
    axes.axhspan(-0.5, len(above) - 0.35, color=GREY, alpha=0.5)
    for row, words in enumerate(above + below):
        axes.text(0.01, row + 0.1, words.replace("$", r"\$"), family="DejaVu Sans Mono", fontsize=10, va="center",
                  weight="bold" if row < len(above) else "normal")
    return picture
