"""The map that opens and closes every chapter: the whole model, where you are in it, and what you have built.

The layout never changes by a pixel, so that the eye finds its place; the chapter only adds a thick outline, an arrow
and ticks. Numbers come from `cost` (report section 2 and the tables of its section 4.2).
"""

from typing import NamedTuple

from matplotlib.patches import FancyBboxPatch, Rectangle

from .. import cost
from ..config import ModelConfig
from .style import BLACK, DARK, GREEN, GREY, PARTS, SKY, VERMILION, WHITE, Picture, human, styled

WIDTH, HEIGHT = 1200, 640               # pixels, and the units of every position below


class Box(NamedTuple):
    """A part of the model: its place (left, bottom, width, height), colour and lines of text."""

    place: tuple[int, int, int, int]
    colour: str
    lines: tuple[str, ...]


PLACES = {
    "tokens": (14, 300, 82, 110), "embedding": (112, 300, 126, 110),
    "norm 1": (274, 300, 44, 110), "mla": (332, 300, 166, 110), "norm 2": (512, 300, 44, 110),
    "router": (570, 326, 116, 84), "experts": (700, 326, 176, 84), "dense": (570, 258, 306, 54),
    "norm": (912, 300, 44, 110), "head": (970, 300, 126, 110), "next token": (1112, 300, 76, 110),
    "mtp": (700, 470, 396, 92),
    "cache": (14, 150, 1174, 42), "bits": (14, 102, 1174, 42), "ranks": (14, 54, 1174, 42),
}
FRAME = (256, 244, 638, 200)            # one layer
STRIP = (("embedding", 112), ("mla", 332), ("experts", 570), ("head", 970))     # where its columns begin


def boxes(config: ModelConfig) -> dict[str, Box]:
    """Every box of the map by name, with its stored and active parameters and shape."""
    all_of, used = cost.parameters(config), cost.active_parameters(config)
    d, rows, experts = config.hidden_size, config.vocab_size, config.n_routed_experts
    routed, embedding = PARTS["routed experts"].colour, PARTS["embedding + head"].colour

    def amounts(stored: int, active: int) -> tuple[str, str]:
        return f"stored {human(stored)}", f"active {human(active)}"

    texts = {
        "tokens": (WHITE, ("tokens", "[B, T]")),
        "embedding": (embedding, ("embedding", f"{rows:,} x {d:,}", *amounts(all_of.embedding, used.embedding))),
        "norm 1": (WHITE, ("norm",)),
        "mla": (SKY, ("attention (MLA)", f"{config.num_attention_heads} heads, latent {config.kv_lora_rank}",
                      *amounts(all_of.attention, used.attention))),
        "norm 2": (WHITE, ("norm",)),
        "router": (GREY, ("router", f"{experts} x {d:,}", *amounts(all_of.router, used.router))),
        "experts": (routed, (f"{config.num_experts_per_tok} of {experts} experts + {config.n_shared_experts}",
                             f"3 x {d:,} x {config.moe_intermediate_size:,}",
                             *amounts(all_of.routed + all_of.shared, used.routed + used.shared))),
        "dense": (PARTS["dense FFN"].colour, (f"dense FFN instead: 3 x {d:,} x {config.intermediate_size:,}",
                                              ", ".join(amounts(all_of.dense, used.dense)))),
        "norm": (WHITE, ("norm",)),
        "head": (embedding, ("head", f"{rows:,} x {d:,}", *amounts(all_of.head, used.head))),
        "next token": (WHITE, ("next", "token", "[B, T, V]")),
        "mtp": (WHITE, (f"MTP module x {config.num_nextn_predict_layers}: predicts one token further",
                        "joins h and the next token's embedding in a layer",
                        ", ".join(amounts(all_of.mtp, used.mtp)))),
    }
    return {name: Box(PLACES[name], colour, lines) for name, (colour, lines) in texts.items()}


def strip(config: ModelConfig) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The three lower rows: a title, and a text under embedding, attention, FFN and head."""
    return {
        "cache": ("cached\na token", ("nothing", f"latent {config.kv_lora_rank} + rope key {config.qk_rope_head_dim}",
                                      "nothing", "nothing")),
        "bits": ("computed\nin", ("BF16", "linears FP8, scores BF16", "experts FP8, router not FP8", "BF16")),
        "ranks": ("lives on", ("first pipeline rank", "one of 16 pipeline ranks", "64 ranks, experts shared out",
                               "the first, too")),
    }


@styled
def model_map(config: ModelConfig, mark: str | None = None, built: tuple[str, ...] = ()) -> Picture:
    """The map of `config`. `mark` names a box or row of `PLACES` ("mla", "router", "mtp", "cache", "bits" ...), which
    gets a thick outline and an arrow "you are here"; `built` ticks those that the reader has made.

    The rows "computed in" and "lives on" are those of the report's training run (sections 3.2, 3.3), whatever the size.
    Raises ValueError for a name that is not on the map.
    """
    for name in (*built, *([mark] if mark else [])):
        if name not in PLACES:
            raise ValueError(f"{name!r} is not on the map; its boxes are {', '.join(PLACES)}")
    picture = Picture(WIDTH / 100, HEIGHT / 100, _alt(config, mark, built), colours=20)
    axes = picture.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    _draw_frame(axes, config)
    for box in boxes(config).values():
        _draw_box(axes, box)
    _draw_strip(axes, strip(config))
    _draw_arrows(axes)
    for name in built:
        _draw_tick(axes, PLACES[name])
    if mark:
        _draw_mark(axes, mark)
    return picture


def _alt(config: ModelConfig, mark: str | None, built: tuple[str, ...]) -> str:
    total = human(cost.parameters(config).learned)
    where = f" You are at: {mark}." if mark else ""
    done = f" You have built: {', '.join(built)}." if built else ""
    return (f"Map of the model, {total} parameters: tokens, embedding, {config.num_hidden_layers} layers of attention "
            f"and experts, norm, head, and the MTP module above.{where}{done} Almost all parameters are stored in "
            "experts; few of them are active.")


def _draw_frame(axes, config: ModelConfig) -> None:
    left, bottom, width, height = FRAME
    axes.add_patch(Rectangle((left, bottom), width, height, fill=False, edgecolor=DARK, linewidth=1.2,
                             linestyle="--"))
    dense, layers = config.first_k_dense_replace, config.num_hidden_layers
    axes.text(left + 8, bottom + height - 8, f"one layer, x {layers}: {dense} dense, {layers - dense} with experts",
              va="top", fontsize=10.5, weight="bold")
    learned, active = cost.parameters(config).learned, cost.active_parameters(config).learned
    axes.text(14, 610, f"DeepSeek-V3 with {human(learned)} parameters: a token uses {human(active)}", fontsize=14,
              weight="bold")


def _draw_box(axes, box: Box) -> None:
    left, bottom, width, height = box.place
    axes.add_patch(FancyBboxPatch((left + 4, bottom + 4), width - 8, height - 8, boxstyle="round,pad=4",
                                  facecolor=box.colour, edgecolor=BLACK, linewidth=1))
    upright = width < 60
    middle, step = bottom + height / 2, 18
    for i, words in enumerate(box.lines):
        axes.text(left + width / 2, middle + step * ((len(box.lines) - 1) / 2 - i), words, ha="center", va="center",
                  fontsize=9.5, weight="bold" if i == 0 else "normal", rotation=90 if upright else 0)


def _draw_strip(axes, rows: dict[str, tuple[str, tuple[str, ...]]]) -> None:
    for name, (title, cells) in rows.items():
        left, bottom, width, height = PLACES[name]
        axes.add_patch(Rectangle((left, bottom), width, height, facecolor=WHITE, edgecolor=GREY))
        axes.text(left + 8, bottom + height / 2, title, va="center", fontsize=9.5, weight="bold")
        for (_, start), words in zip(STRIP, cells):
            axes.text(start + 4, bottom + height / 2, words, va="center", fontsize=9.5)
    axes.text(14, 34, "Lower two rows: the report's training run (sections 3.2 and 3.3).", va="center", fontsize=9.5,
              color=DARK)


def _draw_arrows(axes) -> None:
    arrow = dict(arrowstyle="->", color=BLACK, linewidth=1.2)
    path = ("tokens", "embedding", "norm 1", "mla", "norm 2", "router", "experts", "norm", "head", "next token")
    for before, after in zip(path, path[1:]):
        axes.annotate("", (PLACES[after][0], 355), (PLACES[before][0] + PLACES[before][2], 355), arrowprops=arrow)
    axes.annotate("", (934, 470), (934, 410), arrowprops=arrow)
    axes.text(942, 442, "h", va="center", fontsize=10)
    axes.plot([175, 175, 690], [410, 516, 516], color=BLACK, linewidth=1.2, linestyle="--")
    axes.annotate("", (700, 516), (680, 516), arrowprops=arrow)
    axes.text(190, 526, "embedding of the next token (shared table)", fontsize=9.5)
    axes.annotate("", (1060, 410), (1060, 470), arrowprops=arrow | dict(linestyle="--"))
    axes.text(1068, 442, "shared head", va="center", fontsize=9.5)


def _draw_tick(axes, place: tuple[int, int, int, int]) -> None:
    left, bottom, width, height = place
    x, y = min(left + width + 1, WIDTH - 14), bottom + height + 3       # off the words inside
    axes.plot(x, y, "o", markersize=17, markerfacecolor=WHITE, markeredgecolor=GREEN, markeredgewidth=2, zorder=5)
    axes.plot([x - 5, x - 1, x + 6], [y, y - 4, y + 5], color=GREEN, linewidth=2.4, zorder=6)


def _draw_mark(axes, name: str) -> None:
    left, bottom, width, height = PLACES[name]
    axes.add_patch(Rectangle((left - 3, bottom - 3), width + 6, height + 6, fill=False, edgecolor=VERMILION,
                             linewidth=4, zorder=4))
    middle = left + width / 2
    if name in ("cache", "bits", "ranks"):
        tip, label = (left + width - 130, bottom + height / 2), (left + width - 60, bottom + height / 2)
    elif name in ("router", "experts", "mtp"):          # what is free: above these, below all others
        tip, label = (middle, bottom + height + 3), (middle, bottom + height + 48)
    else:
        tip, label = (middle, bottom - 3), (middle, 220)
    axes.annotate("you are here", tip, label, ha="center", va="center", fontsize=11, weight="bold", zorder=7,
                  bbox=dict(boxstyle="round", facecolor=WHITE, edgecolor=VERMILION),
                  arrowprops=dict(arrowstyle="-|>", color=VERMILION, linewidth=3))
