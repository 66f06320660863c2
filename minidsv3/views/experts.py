"""Chapter 06's still pictures: a token on its way, tables of rows, time on wires, loads of GPUs, and the mesh.

Each takes plain numbers: what is drawn was counted by `parallel.traffic` or `parallel.placement`, or by the reader.
"""

from collections.abc import Mapping, Sequence

import matplotlib
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from ..parallel.traffic import WAYS, Cluster, Rows
from .style import BLACK, BLUE, DARK, GREEN, GREY, ORANGE, PASSES, PURPLE, VERMILION, WHITE, Picture, ink, styled

FEW = 20                                # colours that are enough here, see `Picture`


# ---- one token ------------------------------------------------------------------------------------------------------


@styled
def token_on_its_way(token: str, home: int, experts: Sequence[int], of_a_gpu: int, cluster: Cluster) -> Picture:
    """Three panels, one for each way to send: every row of one token as an arrow, thick between nodes.

    `home` is the token's GPU; `experts` are those that it chose, `of_a_gpu` to a GPU in order.
    """
    gpus = [e // of_a_gpu for e in experts]
    counts = {name: traffic_of(name, home, gpus, cluster) for name in WAYS}
    said = "; ".join(f"{name} {int(rows.between.sum())} between and {int(rows.inside.sum())} inside"
                     for name, rows in counts.items())
    picture = Picture(9.2, 3.5, f"{cluster.nodes} nodes of {cluster.gpus} GPUs and the rows that one token sends to "
                      f"its experts. Rows: {said}.", FEW)
    for axes, (name, rows) in zip(picture.subplots(1, len(WAYS)), counts.items()):
        _cluster(axes, home, experts, of_a_gpu, cluster)
        for wire, width, colour in ((rows.inside, 1.4, BLUE), (rows.between, 4, PURPLE)):
            for sender, receiver in wire.nonzero().tolist():
                _arrow(axes, sender, receiver, int(wire[sender, receiver]), width, colour, cluster)
        axes.set_title(f"{name}: {int(rows.between.sum())} between, {int(rows.inside.sum())} inside", fontsize=10.5)
    picture.axes[0].text(-0.45, -0.95, f"\u25cf the token `{token}` sits here; orange: GPUs with its experts (their "
                         "numbers); thick: between nodes, a number: rows on one wire", fontsize=9.5)
    picture.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.12, wspace=0.04)
    return picture


def traffic_of(way: str, home: int, gpus: Sequence[int], cluster: Cluster) -> Rows:
    """The rows of a single token."""
    return WAYS[way](torch.tensor([home]), torch.tensor([list(gpus)]), cluster)


def _place(gpu: int, cluster: Cluster) -> tuple[float, float]:
    """Nodes are columns, their GPUs stand below each other."""
    node, number = divmod(gpu, cluster.gpus)
    return 2.0 * node, float(cluster.gpus - 1 - number)


def _cluster(axes, home: int, experts, of_a_gpu: int, cluster: Cluster) -> None:
    for node in range(cluster.nodes):
        axes.add_patch(Rectangle((2 * node - 0.55, -0.5), 1.1, cluster.gpus, fill=False, edgecolor=DARK,
                                 linestyle="--"))
        axes.text(2 * node, cluster.gpus - 0.35, f"node {node}", ha="center", fontsize=9.5, color=DARK)
    for gpu in range(cluster.size):
        x, y = _place(gpu, cluster)
        here = [str(e) for e in experts if e // of_a_gpu == gpu]
        axes.add_patch(Rectangle((x - 0.4, y - 0.32), 0.8, 0.64, facecolor=ORANGE if here else WHITE,
                                 edgecolor=BLACK, linewidth=2.4 if gpu == home else 0.9, zorder=2))
        words = ("\u25cf " if gpu == home else "") + f"GPU {gpu}" + ("\n" + ", ".join(here) if here else "")
        axes.text(x, y, words, ha="center", va="center", fontsize=9, zorder=5, weight="bold" if here else "normal")
    axes.set(xlim=(-0.7, 2 * cluster.nodes - 1.3), ylim=(-0.6, cluster.gpus))
    axes.axis("off")


def _arrow(axes, sender: int, receiver: int, rows: int, width: float, colour: str, cluster: Cluster) -> None:
    start, end = _place(sender, cluster), _place(receiver, cluster)
    if start[0] == end[0]:              # inside a node: round the side
        side = 0.4 if start[0] else -0.4
        start, end = (start[0] + side, start[1]), (end[0] + side, end[1])
        bend = f"arc3,rad={0.35 if (start[1] > end[1]) == (side < 0) else -0.35}"
    else:
        start, end, bend = (start[0] + 0.4, start[1]), (end[0] - 0.4, end[1]), "arc3"
    axes.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=colour, linewidth=width,
                                                  connectionstyle=bend, shrinkA=0, shrinkB=0), zorder=3)
    if rows > 1:
        axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, str(rows), ha="center", va="center", fontsize=10,
                  weight="bold", zorder=6, bbox=dict(facecolor=WHITE, edgecolor=colour, pad=2))


# ---- tables ---------------------------------------------------------------------------------------------------------


@styled
def number_tables(about: str, tables: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[str],
                  columns: Sequence[str], across: str, form: str = "{:g}") -> Picture:
    """Tables of numbers side by side, lighter for larger ones: title -> [row][column].

    `about` says in a few words what the numbers are; `rows` and `columns` name the lines, `across` the columns' kind.
    """
    width, height = 1.3 + len(tables) * (0.7 * len(columns) + 0.5), 0.95 + 0.36 * len(rows)
    picture = Picture(width, height, f"{about}: {' and '.join(tables)}, a line for each of {', '.join(rows)}. "
                      "Compare the lines with each other.", FEW)
    shades = matplotlib.colormaps["cividis"]
    most = max(value for table in tables.values() for row in table for value in row)
    for i, (axes, (name, table)) in enumerate(zip(picture.subplots(1, len(tables), squeeze=False)[0], tables.items())):
        for r, row in enumerate(table):
            for c, value in enumerate(row):
                colour = to_hex(shades(0.25 + 0.75 * value / most))
                axes.add_patch(Rectangle((c - 0.5, r - 0.5), 1, 1, facecolor=colour, edgecolor=DARK, linewidth=0.6))
                axes.text(c, r, form.format(value), ha="center", va="center", fontsize=10, color=ink(colour))
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5), xticks=range(len(columns)),
                 xticklabels=columns, yticks=range(len(rows)), yticklabels=rows if i == 0 else (), xlabel=across)
        axes.set_title(name, loc="left", fontsize=11)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    picture.tight_layout()
    return picture


# ---- time -----------------------------------------------------------------------------------------------------------


@styled
def time_of_wires(cases: Mapping[str, tuple[float, float]]) -> Picture:
    """Microseconds that a token keeps both kinds of wires busy: name -> (between nodes, inside nodes)."""
    picture = Picture(8.6, 0.62 * len(cases) + 0.75, "Time that a token keeps wires busy, between nodes and inside, "
                      f"for {', '.join(cases)}. The longer of the two bars is what a layer waits for.", FEW)
    axes = picture.subplots()
    longest = max(max(pair) for pair in cases.values())
    wires = (("between nodes", PASSES["communication"].colour, ".."), ("inside nodes", WHITE, "||"))
    for y, (name, pair) in enumerate(cases.items()):
        for k, (value, (words, colour, hatch)) in enumerate(zip(pair, wires)):
            at = y + (k - 0.5) * 0.38
            axes.barh(at, value, height=0.36, color=colour, edgecolor=BLACK, hatch=hatch, linewidth=0.8,
                      label=words if y == 0 else None)
            axes.text(value + 0.01 * longest, at, f"{value:.2f}", va="center", fontsize=10,
                      weight="bold" if value == max(pair) else "normal")
    axes.set(yticks=range(len(cases)), yticklabels=cases, xlabel="microseconds for each token of a GPU",
             xlim=(0, 1.1 * longest))
    axes.invert_yaxis()
    axes.legend(loc="lower right", frameon=False)
    picture.tight_layout()
    return picture


# ---- loads ----------------------------------------------------------------------------------------------------------


@styled
def loads(panels: Mapping[str, Sequence[float]]) -> Picture:
    """Load of each GPU over the mean, a panel for each placement; the fullest GPU has its number.

    panels: name -> the load of each GPU, in order.
    """
    shares = {name: [value * len(values) / sum(values) for value in values] for name, values in panels.items()}
    said = "; ".join(f"{name} {max(values):.2f}" for name, values in shares.items())
    picture = Picture(9.2, 2.6, f"Load of each GPU over the mean for several placements. Fullest GPU: {said}.", FEW)
    tallest = max(max(values) for values in shares.values())
    for axes, (name, values) in zip(picture.subplots(1, len(shares), sharey=True, squeeze=False)[0], shares.items()):
        top = max(range(len(values)), key=lambda gpu: values[gpu])
        axes.bar(range(len(values)), values, color=[VERMILION if gpu == top else ORANGE for gpu in range(len(values))],
                 edgecolor=BLACK, linewidth=0.5 if len(values) <= 32 else 0, width=0.86)
        axes.axhline(1, color=BLACK, linestyle="--", linewidth=1)
        axes.text(top, values[top] + 0.02 * tallest, f"{values[top]:.2f}", va="bottom", fontsize=10, weight="bold",
                  ha="left" if top < len(values) / 3 else "right" if top > 2 * len(values) / 3 else "center")
        axes.set_title(name, fontsize=10)
        axes.set(xlabel="GPU", ylim=(0, 1.16 * tallest), xticks=(0, len(values) - 1))
    picture.axes[0].set_ylabel("load over the mean")
    picture.tight_layout()
    return picture


# ---- the mesh -------------------------------------------------------------------------------------------------------


@styled
def mesh(pp: int, edp: int, nodes: int, gpus: int, experts: int) -> Picture:
    """All ranks of a layout as dots: pp x edp blocks of nodes x gpus, one block enlarged, and what travels along which
    axis. `experts` of a layer are shared out over the GPUs of a block."""
    ep, total = nodes * gpus, pp * edp * nodes * gpus
    picture = Picture(9.2, 4.3, f"{total:,} GPUs as {pp} pipeline stages x {edp} copies of the experts x {ep} GPUs "
                      f"that share them. One block is enlarged: {nodes} nodes of {gpus} GPUs, {experts // ep} experts "
                      "of a layer on each.", FEW)
    axes = picture.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 920), ylim=(0, 430))
    axes.axis("off")
    axes.text(14, 404, f"{total:,} GPUs: {pp} stages (pp) x {edp} copies of the experts (edp) x {ep} ranks (ep)",
              fontsize=12.5, weight="bold")
    side, gap = min(46, 640 / pp - 8), 8
    left, top = 66, 372
    for copy in range(edp):
        y = top - (copy + 1) * (side + gap)
        axes.text(left - 8, y + side / 2, f"copy {copy}", ha="right", va="center", fontsize=9.5)
        for stage in range(pp):
            _block(axes, left + stage * (side + gap), y, side, nodes, gpus, marked=(stage, copy) == (pp // 2, 0))
    for stage in range(pp):
        axes.text(left + stage * (side + gap) + side / 2, top + 4, str(stage), ha="center", fontsize=9)
    below, right = top - edp * (side + gap), left + pp * (side + gap)
    _axis(axes, (left, below - 6), (right - gap, below - 6), VERMILION)
    axes.text(left + 4, below - 22, "pp: activations to the next stage", fontsize=9.5, va="center", zorder=3,
              bbox=dict(facecolor=WHITE, edgecolor="none", pad=1))
    _axis(axes, (right + 4, top), (right + 4, below + gap), GREEN)
    axes.text(right + 16, (top + below + gap) / 2, "edp: gradients\nof experts", fontsize=9.5, va="center")
    _enlarged(axes, (left + pp // 2 * (side + gap), top - side - gap), side, below - 40, nodes, gpus, experts // ep)
    return picture


def _block(axes, x: float, y: float, side: float, nodes: int, gpus: int, marked: bool) -> None:
    axes.add_patch(Rectangle((x, y), side, side, facecolor=WHITE, edgecolor=VERMILION if marked else DARK,
                             linewidth=3 if marked else 0.9))
    dots = [(x + side * (g + 0.5) / gpus, y + side * (n + 0.5) / nodes) for n in range(nodes) for g in range(gpus)]
    axes.plot(*zip(*dots), "s", color=GREY if not marked else BLACK, markersize=2, linestyle="none")


def _axis(axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.annotate("", end, start, arrowprops=dict(arrowstyle="<|-|>", color=colour, linewidth=2.4))


def _enlarged(axes, corner, side: float, top: float, nodes: int, gpus: int, of_a_gpu: int) -> None:
    """The marked block: a row for each node, and the two ways that tokens take in it."""
    x0, cell_w, cell_h = 226, 62, (top - 46) / nodes
    for mark, edge in ((corner[0], x0), (corner[0] + side, x0 + gpus * cell_w)):
        axes.plot([mark, edge], [corner[1], top], color=VERMILION, linewidth=1, linestyle="--")
    for node in range(nodes):
        y = top - (node + 1) * cell_h
        axes.text(x0 - 8, y + cell_h / 2, f"node {node}", ha="right", va="center", fontsize=9)
        for gpu in range(gpus):
            first = (node * gpus + gpu) * of_a_gpu
            axes.add_patch(Rectangle((x0 + gpu * cell_w + 1, y + 1), cell_w - 2, cell_h - 2, facecolor=ORANGE,
                                     edgecolor=BLACK, linewidth=0.6))
            axes.text(x0 + (gpu + 0.5) * cell_w, y + cell_h / 2, f"{first}-{first + of_a_gpu - 1}", ha="center",
                      va="center", fontsize=8.7)
    bottom, right = top - nodes * cell_h, x0 + gpus * cell_w
    _axis(axes, (x0, bottom - 8), (right, bottom - 8), BLUE)
    axes.text((x0 + right) / 2, bottom - 24, "inside a node: second hop (NVLink)", ha="center", va="center",
              fontsize=9.5)
    _axis(axes, (right + 10, bottom), (right + 10, top), PURPLE)
    for i, words in enumerate(("between nodes,", "same number:", "first hop", "(InfiniBand)")):
        axes.text(right + 22, (top + bottom) / 2 + 24 - 16 * i, words, va="center", fontsize=9.5)
    for i, words in enumerate(("In each GPU: the", "experts of a layer", "that it hosts. All", "else is copied on",
                               "all GPUs of a stage;", "its gradients go", "over edp and ep.")):
        axes.text(14, top - 14 - 16 * i, words, va="center", fontsize=9.5)
