"""Chapter 02's still pictures: one token's choice, loads and MaxVio over a run, the balance loss in its terms, who
works for which kind of text, and pairs of runs.

Each takes plain numbers, so that a toy, a run and a stored experiment are drawn alike.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import torch
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

from ..kernels import route
from .style import BLACK, BLUE, DARK, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, WHITE, Picture, ink, styled

LOOKS = ((BLUE, "-", "o"), (VERMILION, "--", "s"), (GREEN, "-.", "^"), (PURPLE, ":", "D"), (ORANGE, "-", "v"),
         (DARK, "--", "x"))             # colour, dashes and mark, so that no line hangs on its colour alone
FEW = 20                                # colours that are enough here, see `Picture`


# ---- one token ------------------------------------------------------------------------------------------------------


@styled
def one_token(scores: Sequence[float], bias: Sequence[float], n_group: int, topk_group: int, top_k: int,
              scale: float) -> Picture:
    """Five panels from affinities to weights for one token; who is chosen is the package's `route`.

    scores between 0 and 1, bias of any sign, both one an expert.
    """
    s, b = torch.tensor(scores, dtype=torch.float64), torch.tensor(bias, dtype=torch.float64)
    size = len(s) // n_group
    routing = route(s.logit()[None], b, n_group=n_group, topk_group=topk_group, top_k=top_k, scaling_factor=scale)
    chosen, choice = routing.experts[0].tolist(), (s + b)
    worth = choice.view(n_group, size).topk(2).values.sum(-1)
    kept = worth.topk(topk_group).indices.tolist()
    picture = Picture(8.4, 6.8, "One token and 16 experts in 4 groups, five panels: affinities, affinities plus bias, "
                      "the worth of the groups, the choice in the kept groups, and the weights. The bias changes who "
                      "is chosen; the weights come from the affinities alone.", FEW)
    panels = picture.subplots(5, 1, sharex=True)
    _bars(panels[0], s, "1. affinities s, in hundredths: a sigmoid for each expert", chosen=())
    _bars(panels[1], s, "2. s + b (outlined): the bias moves each bar up or down", chosen=(), hollow=choice)
    _group_worth(panels[2], choice, worth, kept, size)
    inside = [i for i in range(len(s)) if i // size in kept]
    _bars(panels[3], choice, f"4. the best {top_k} of the kept groups (\u25cf); the other groups (white) count as "
                             "-\u221e",
          chosen=chosen, barred=[i for i in range(len(s)) if i not in inside])
    weights = torch.zeros_like(s).scatter(0, routing.experts[0], routing.weights[0])
    _bars(panels[4], weights, f"5. weights, in hundredths: s of the chosen over their sum, times {scale}. No b in them",
          chosen=chosen)
    for panel in panels:
        for group in range(1, n_group):
            panel.axvline(group * size - 0.5, color=DARK, linewidth=1)
    panels[4].set(xlabel="expert", xticks=range(len(s)), xlim=(-0.6, len(s) - 0.4))
    picture.tight_layout()
    return picture


def _bars(axes, values, title: str, chosen, hollow=None, barred=()) -> None:
    """Bars with their numbers: the chosen have a dot and a bold number, what is barred is white."""
    top = max(values.tolist() + ([] if hollow is None else hollow.tolist()))
    for i, value in enumerate(values.tolist()):
        colour = WHITE if i in barred else ORANGE if i in chosen else SKY
        axes.bar(i, value, color=colour, edgecolor=BLACK, linewidth=0.7, width=0.72)
        height = value
        if hollow is not None:
            height = max(value, hollow[i].item())
            axes.bar(i, hollow[i].item(), color="none", edgecolor=VERMILION, linewidth=1.8, width=0.9)
        shown = value if hollow is None else hollow[i].item()
        if shown:
            dot, weight = ("\u25cf", "bold") if i in chosen else ("", "normal")
            axes.text(i, height + 0.03 * top, f"{dot}{100 * shown:.0f}", ha="center", fontsize=9, weight=weight)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set(ylim=(0, 1.24 * top), yticks=())


def _group_worth(axes, choice, worth, kept, size: int) -> None:
    for group, value in enumerate(worth.tolist()):
        left = group * size - 0.36
        axes.bar(group * size + (size - 1) / 2, value, width=size - 0.28, color=ORANGE if group in kept else WHITE,
                 edgecolor=BLACK, linewidth=0.7)
        first, second = choice.view(-1, size)[group].topk(2).values.tolist()
        axes.text(left + 0.1, value + 0.1, f"{100 * first:.0f} + {100 * second:.0f} = {100 * value:.0f}" + (
            ": kept" if group in kept else ""), fontsize=9, weight="bold" if group in kept else "normal")
    axes.set_title("3. a group is worth its two best s + b; two groups are kept", loc="left", fontsize=11)
    axes.set(ylim=(0, 1.3 * float(worth.max())), yticks=())


# ---- over a run -----------------------------------------------------------------------------------------------------


@styled
def over_steps(panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], steps: Sequence[int], floor: float,
               ylabel: str = "MaxVio") -> Picture:
    """Lines over steps above the floor of chance: panel -> {name: lines (seeds, layers) of len(steps)}.

    Every panel has the same names, which the legend on the right explains once.
    """
    names = list(next(iter(panels.values())))
    picture = Picture(8.8, 3.4, f"{ylabel} over steps for {', '.join(names)}, with the floor of pure chance. "
                      "See which lines come down to it, and how soon.", FEW)
    for axes, (title, curves) in zip(picture.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items()):
        for name, (colour, dashes, mark) in zip(names, LOOKS):
            for i, values in enumerate(curves[name]):
                axes.plot(steps, values, color=colour, linestyle=dashes, marker=mark, markersize=5, linewidth=1.3,
                          markevery=(len(steps) // 8, len(steps) // 4 or 1), label=None if i else name)
        axes.axhline(floor, color=BLACK, linewidth=1.6)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set(xlabel="step", xlim=(steps[0], steps[-1]), ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.plot([], [], color=BLACK, linewidth=1.6, label=f"chance: {floor:.2f}")
    picture.axes[0].set_ylabel(ylabel)
    picture.tight_layout(rect=(0, 0, 0.8, 1))
    picture.legend(*axes.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(0.79, 0.92), frameon=False,
                   handlelength=3)
    return picture


@styled
def bias_paths(panels: Mapping[str, tuple[Sequence[int], Sequence[Sequence[float]]]]) -> Picture:
    """The biases of all experts over steps, thin, and their mean, thick; a panel for each name -> (steps, biases)."""
    picture = Picture(8.8, 3, f"Biases of the experts over steps, and their mean, for {', '.join(panels)}. "
                      "See whether the mean stays at zero.", FEW)
    for axes, (name, (steps, biases)) in zip(picture.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        values = torch.tensor(biases, dtype=torch.float64)
        axes.plot(steps, values.tolist(), color=SKY, linewidth=1, antialiased=False)
        axes.plot(steps, values.mean(1).tolist(), color=BLACK, linewidth=2.6)
        axes.axhline(0, color=DARK, linewidth=1, linestyle="--")
        end = values[-1].mean().item()
        axes.text(steps[-1], end, f"mean {end:+.2f} ", ha="right", va="bottom", weight="bold",
                  bbox=dict(facecolor=WHITE, edgecolor="none", alpha=0.75, pad=1))
        axes.set(title=name, xlabel="step", xlim=(steps[0], steps[-1]))
    picture.axes[0].set_ylabel("bias b")
    picture.tight_layout()
    return picture


# ---- the balance loss -----------------------------------------------------------------------------------------------


@styled
def loss_terms(cases: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Picture:
    """Equation 17 term by term: for each case f (load, 1 is even), P (share of affinity) and their products.

    cases: name -> (f, P), one value an expert.
    """
    picture = Picture(8.8, 1.5 * len(cases) + 0.3,
                      f"Load f, share P and their product for each expert, for {', '.join(cases)}. "
                      "See that the sum of the products can be 1 though the load is not even.", FEW)
    grid = picture.subplots(len(cases), 3, squeeze=False)
    for row, (name, (f, p)) in zip(grid, cases.items()):
        product = [a * b for a, b in zip(f, p)]
        even = (1 / len(p), f"1/{len(p)}")
        titles = (f"{name}: load f", "share P of the affinities", f"f x P, sum {sum(product):.2f}")
        for axes, values, title, (level, words) in zip(row, (f, p, product), titles, ((1, "1"), even, even)):
            axes.bar(range(len(values)), values, color=GREEN if values is product else ORANGE, edgecolor=BLACK,
                     linewidth=0.6)
            axes.axhline(level, color=BLACK, linestyle="--", linewidth=1)
            axes.set_title(title, loc="left", fontsize=10.5)
            axes.set(xticks=range(0, len(values), 5), yticks=(level,), yticklabels=(words,),
                     ylim=(0, 1.15 * max(*values, level)))
    for axes in grid[-1]:
        axes.set_xlabel("expert")
    picture.tight_layout()
    return picture


# ---- loads as tables ------------------------------------------------------------------------------------------------


@styled
def load_tables(tables: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[str]) -> Picture:
    """Loads as multiples of the mean, printed in cells: name -> [row][expert] counts. 1.0 is an even load.

    Each row is divided by its own mean; `rows` names them (layers, kinds of text).
    """
    height = (0.27 * len(rows) + 0.5) * len(tables) + 0.3
    picture = Picture(8, height, f"Load of every expert as a multiple of its row's mean, for {', '.join(tables)}. "
                      "Compare how far the numbers leave 1.", FEW)
    shades = matplotlib.colormaps["cividis"]
    panels = picture.subplots(len(tables), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, table) in zip(panels, tables.items()):
        values = torch.tensor(table, dtype=torch.float64)
        values = values / values.mean(1, keepdim=True)
        axes.imshow(values.clamp(max=2).tolist(), cmap=shades, vmin=0, vmax=2, aspect="auto")
        for (row, column), value in zip(((r, c) for r in range(values.shape[0]) for c in range(values.shape[1])),
                                        values.flatten().tolist()):
            colour = to_hex(shades(min(value, 2) / 2))
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=9, color=ink(colour))
        axes.set_title(name, loc="left", fontsize=11)
        axes.set(yticks=range(len(rows)), yticklabels=rows, xticks=range(values.shape[1]))
        axes.tick_params(length=0)
    panels[-1].set_xlabel("expert")
    picture.tight_layout()
    return picture


# ---- pairs ----------------------------------------------------------------------------------------------------------


@styled
def slopes(panels: Mapping[str, Mapping[str, Sequence[float]]], ylabel: str, from_start: bool = False) -> Picture:
    """Pairs of equal seeds as lines: panel -> {method: value of each seed, in one order}, two methods a panel.

    Above each panel stand the median difference and how many lines fall; those are dashed. `from_start` draws what
    each seed gains or loses, so that the distance between seeds, which is no effect of the method, takes no room.
    """
    picture = Picture(0.8 + 2 * len(panels), 3.3,
                      f"Slope charts of {ylabel}: a line for each seed between two methods, in the panels "
                      f"{', '.join(panels)}. Look at the direction of the lines.", FEW)
    for axes, (name, methods) in zip(picture.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items()):
        (first, before), (second, after) = methods.items()
        changes = [b - a for a, b in zip(before, after, strict=True)]
        for a, change in zip(before, changes):
            low = 0 if from_start else a
            axes.plot([0, 1], [low, low + change], marker="o", markersize=5, linewidth=1.8,
                      color=BLUE if change < 0 else VERMILION, linestyle="--" if change < 0 else "-")
        middle = sorted(changes)[len(changes) // 2]
        axes.set_title(f"{name}\n{sum(change < 0 for change in changes)} of {len(changes)} fall,\nmedian "
                       f"{middle:+.3f}",
                       fontsize=10)
        axes.set(xlim=(-0.35, 1.35), xticks=(0, 1), xticklabels=(first, second))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="y", color=GREY, linewidth=0.5)
    picture.axes[0].set_ylabel(ylabel)
    picture.tight_layout()
    return picture
