"""Chapter 06's view: a cluster, a router and a placement; who sends how much to whom, and which GPU is the fullest.

What it teaches: the limit on nodes saves rows only where rows are merged by node, and the fullest GPU is the time of a
step. All counts are those of `parallel.traffic` and `parallel.placement` for tokens that choose at random.
"""

from functools import lru_cache
from html import escape
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.colors import to_hex
from torch import Tensor

from ..config import ModelConfig
from ..parallel import traffic
from ..parallel.placement import Placement, from_slots, gpu_load, rebalance_experts
from ..parallel.traffic import WAYS, Cluster, Rows
from .explore import View, choice, doubling, explore, slider
from .style import BLACK, DARK, ORANGE, PASSES, VERMILION, WHITE, Fill, Picture, ink, styled
from .svg import line, page, rectangle, text

HIDDEN = ModelConfig.preset("full").hidden_size
TOKENS = 2048                           # drawn for a state, equally many on each GPU
PLACEMENTS = ("in order", "EPLB inside nodes", "EPLB anywhere")
SHADES = [to_hex(matplotlib.colormaps["cividis"](i / 20)) for i in range(21)]
WIRES = {"between": ("between nodes", PASSES["communication"]), "inside": ("inside nodes", Fill(WHITE, "|"))}


class Seen(NamedTuple):
    """What a state comes to."""

    cluster: Cluster
    limit: int                          # nodes that a token may use, after what the cluster allows
    top_k: int
    rows: dict[str, Rows]               # of each way
    load: Tensor                        # [GPUs]: choices that each GPU serves, float64
    largest: float                      # choices that the most wanted expert gets
    row_bytes: int

    def copies(self, way: str) -> float:
        """Rows that a token sends to other nodes, on average."""
        return self.rows[way].between.sum().item() / TOKENS

    def microseconds(self, way: str, wire: str) -> tuple[float, float]:
        """For each token of a GPU: what the average GPU's wire needs, and the busiest one's."""
        rows, micro = self.rows[way], 1e6 * self.cluster.size / TOKENS
        busiest = getattr(traffic.seconds(rows, self.row_bytes, self.cluster), wire)
        mean = getattr(rows, wire).sum().item() / self.cluster.size * self.row_bytes / getattr(self.cluster, wire)
        return micro * mean, micro * busiest

    @property
    def fullest(self) -> float:
        return (self.load.max() / self.load.mean()).item()


@lru_cache(maxsize=64)
def _choices(experts: int, nodes: int, limit: int, top_k: int, skew: int) -> Tensor:
    return traffic.choose(TOKENS, experts, nodes, limit, top_k, skew / 100)


def look(state: dict) -> Seen:
    """Everything about a state. Choices that the cluster does not have are cut: nodes, and experts on them."""
    cluster, experts = Cluster(state["nodes"], state["gpus"]), state["experts"]
    limit = min(state["limit"], cluster.nodes)
    top_k = min(state["top_k"], limit * experts // cluster.nodes)
    chosen = _choices(experts, cluster.nodes, limit, top_k, state["skew"])
    load = chosen.flatten().bincount(minlength=experts)[None].double()
    placed = place(load, state, cluster)
    gpus = serving(chosen, placed) // (placed.phy2log.shape[1] // cluster.size)
    home = torch.arange(TOKENS) % cluster.size
    return Seen(cluster, limit, top_k, {name: way(home, gpus, cluster) for name, way in WAYS.items()},
                gpu_load(load, placed, cluster.size)[0], load.max().item(),
                traffic.row_bytes(HIDDEN, state["payload"]))


def place(load: Tensor, state: dict, cluster: Cluster) -> Placement:
    """Experts in order have no copies; EPLB gets one more slot a GPU for each step of `spare`, and knows the load."""
    experts = load.shape[1]
    if state["placement"] == "in order":
        return from_slots(torch.arange(experts)[None], experts)
    nodes = cluster.nodes if state["placement"] == "EPLB inside nodes" else 1
    return rebalance_experts(load, experts + state["spare"] * cluster.size, nodes, nodes, cluster.size)


def serving(chosen: Tensor, placed: Placement) -> Tensor:
    """The slot that serves each choice [N, k]: an expert's copies take turns."""
    flat = chosen.flatten()
    order = flat.argsort(stable=True)                       # choices of one expert stand behind each other
    turn = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    return placed.log2phy[0][flat, turn % placed.logcnt[0][flat]].view(chosen.shape)


def facts_of(state: dict) -> dict[str, int]:
    """Whole numbers behind the drawing."""
    seen = look(state)
    return {"nodes a token may use": seen.limit, "experts a token takes": seen.top_k,
            **{f"rows to other nodes, 100 tokens, {way}": round(100 * seen.copies(way)) for way in WAYS},
            **{f"ns a token {words}, {way}": round(1000 * seen.microseconds(way, wire)[0])
               for way in WAYS for wire, (words, _) in WIRES.items()},
            "fullest GPU, % of the mean": round(100 * seen.fullest),
            "largest expert, % of a GPU's mean": round(100 * seen.largest / seen.load.mean().item())}


# ---- the drawing ----------------------------------------------------------------------------------------------------


def render(state: dict) -> str:
    """A sentence and an SVG for one state of the controls. Pure: the same state gives the same string."""
    seen = look(state)
    sentence = describe(state, seen)
    parts = [*_matrix(state, seen), *_times(state, seen), *_loads(state, seen)]
    return f"<p>{escape(sentence)}</p>" + page("Dispatch explorer: " + sentence, 600, parts)


def describe(state: dict, seen: Seen) -> str:
    cut = [f"{name} cut to {have}" for name, wanted, have in (
        ("nodes a token may use", state["limit"], seen.limit), ("experts a token takes", state["top_k"], seen.top_k))
        if have < wanted]
    placed = "experts in order" if state["placement"] == "in order" else (
        f"{state['placement']}, {state['spare']} redundant on each")
    return (f"Sent {state['way']}, a token crosses to other nodes {seen.copies(state['way']):.2f} times "
            f"(by expert {seen.copies('by expert'):.2f}) with {seen.row_bytes:,} bytes each. The fullest of "
            f"{seen.cluster.size} GPUs has {seen.fullest:.2f} times the mean load ({placed})"
            f"{'; ' if cut else ''}{', '.join(cut)}.")


def _matrix(state: dict, seen: Seen) -> list[str]:
    """Rows from node to node for each 100 tokens of the sender; the diagonal is what wires inside carry."""
    nodes, size, left, top = seen.cluster.nodes, 43, 90, 74
    rows = seen.rows[state["way"]]
    def by_node(table: Tensor) -> Tensor:
        return table.view(nodes, seen.cluster.gpus, nodes, seen.cluster.gpus).sum((1, 3)) * 100 * nodes / TOKENS
    between, inside = by_node(rows.between), by_node(rows.inside)
    most = max(float(between.max()), 1e-9)
    drawn = [text(4, 20, f"Rows for each 100 tokens, sent {state['way']}", 15, bold=True),
             text(4, 40, "from node (down) to node (across); inside nodes on the diagonal", 12)]
    for a in range(nodes):
        drawn += [text(left - 8, top + size * a + 27, f"node {a}", 12, "end"),
                  text(left + size * (a + 0.5), top - 8, str(a), 12, "middle")]
        for b in range(nodes):
            shade = WHITE if a == b else SHADES[round(20 * float(between[a, b]) / most)]
            count = inside[a, b] if a == b else between[a, b]
            x, y = left + size * b, top + size * a
            drawn += [rectangle(x, y, size, size, Fill(shade), DARK),
                      text(x + size / 2, y + 27, f"{count:.0f}", 12, "middle", ink(shade), bold=a == b)]
    return drawn


def _times(state: dict, seen: Seen) -> list[str]:
    """Microseconds for each token of a GPU, a bar for the average GPU and a mark for the busiest."""
    times = {wire: {way: seen.microseconds(way, wire) for way in WAYS} for wire in WIRES}
    left, longest = 570, max(busiest for of_wire in times.values() for _, busiest in of_wire.values())
    unit, y = 150 / max(longest, 1e-9), 74
    drawn = [text(470, 20, "Time of the wires, microseconds a token", 15, bold=True),
             text(470, 40, "bar: average GPU; line and second number: busiest GPU", 12)]
    for wire, (words, fill) in WIRES.items():
        drawn.append(text(470, y, words, 13, bold=True))
        for way, (mean, busiest) in times[wire].items():
            y += 28
            drawn += [text(560, y + 5, way, 13, "end", bold=way == state["way"]),
                      rectangle(left, y - 8, unit * mean, 18, fill),
                      line(left + unit * busiest, y - 12, left + unit * busiest, y + 14, 2.5, colour=BLACK),
                      text(left + unit * longest + 10, y + 5, f"{mean:.2f}, {busiest:.2f}", 13,
                           bold=way == state["way"])]
        y += 42
    return drawn


def _loads(state: dict, seen: Seen) -> list[str]:
    """A bar for each GPU, in order, with the mean; the fullest has its number."""
    left, width, base, height = 4, 880, 568, 96
    step, mean = width / seen.cluster.size, seen.load.mean().item()
    unit = height / seen.load.max().item()
    fullest = int(seen.load.argmax())
    drawn = [text(4, 450, f"Load of each GPU: fullest {seen.fullest:.2f} times the mean (dashed)", 15, bold=True)]
    for gpu, load in enumerate(seen.load.tolist()):
        fill = Fill(VERMILION) if gpu == fullest else Fill(ORANGE)
        drawn.append(rectangle(left + step * gpu + 1, base - unit * load, step - 2, unit * load, fill))
    for node in range(seen.cluster.nodes):
        x = left + step * seen.cluster.gpus * node
        drawn += [line(x, base - height - 6, x, base + 6, 1), text(x + 4, base + 18, f"node {node}", 12)]
    drawn.append(line(left, base - unit * mean, left + width, base - unit * mean, 1.6, "5 4", BLACK))
    return drawn


# ---- the view -------------------------------------------------------------------------------------------------------


def start_state(**changes) -> dict:
    """How the view opens, some controls moved: V3's layer on 8 nodes, some experts wanted more than others."""
    return {"nodes": 8, "gpus": 8, "experts": 256, "top_k": 8, "limit": 4, "skew": 50, "way": "by node",
            "payload": "fp8", "placement": "EPLB inside nodes", "spare": 0} | changes


def dispatch_explorer() -> View:
    """The view: a cluster, a router, a payload, a way to send and a placement."""
    state = start_state()
    return explore(
        render, facts_of,
        nodes=doubling("nodes", state["nodes"], 2, 8),
        gpus=doubling("GPUs in a node", state["gpus"], 2, 8),
        experts=doubling("experts", state["experts"], 64, 512),
        top_k=slider("experts a token takes (top-k)", state["top_k"], 1, 16),
        limit=slider("nodes a token may use", state["limit"], 1, 8),
        skew=slider("skew in hundredths", state["skew"], 0, 100, 5),
        way=choice("a row is sent", state["way"], list(WAYS)),
        payload=choice("payload of a row", state["payload"], ["fp8", "bf16"]),
        placement=choice("experts are placed", state["placement"], list(PLACEMENTS)),
        spare=slider("redundant copies (slots a GPU)", state["spare"], 0, 4))


@styled
def dispatch_states(states: dict[str, dict]) -> Picture:
    """Loads of the GPUs, sorted, for several states side by side, with rows and times: for pages without widgets."""
    shown = {name: look(start_state(**state)) for name, state in states.items()}
    fullest = "; ".join(f"{' '.join(name.split())} {seen.fullest:.2f}" for name, seen in shown.items())
    picture = Picture(9.2, 3.1, "Load of each GPU over the mean, sorted, for several states of the explorer. "
                      f"Fullest GPU over the mean: {fullest}.", 20)
    tallest = max(seen.fullest for seen in shown.values())
    for axes, (name, seen) in zip(picture.subplots(1, len(states), sharey=True), shown.items()):
        way = start_state(**states[name])["way"]
        loads = (seen.load / seen.load.mean()).sort(descending=True).values.tolist()
        axes.bar(range(len(loads)), loads, width=1, color=[VERMILION] + [ORANGE] * (len(loads) - 1))
        axes.axhline(1, color=BLACK, linestyle="--", linewidth=1)
        axes.text(len(loads) - 1, tallest * 1.02, f"fullest: {seen.fullest:.2f}\n{way}: {seen.copies(way):.2f} rows\n"
                  f"{seen.microseconds(way, 'between')[0]:.2f} us between", ha="right", va="top", fontsize=10)
        axes.set_title(name, fontsize=10)
        axes.set(xticks=(), xlabel=f"{len(loads)} GPUs, sorted", ylim=(0, 1.06 * tallest))
    picture.axes[0].set_ylabel("load over the mean")
    picture.tight_layout()
    return picture
