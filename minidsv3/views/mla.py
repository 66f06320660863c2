"""Chapter 01's still pictures: two brackets, what a token leaves behind, rotation in the way, what was measured, YaRN.

Each takes plain numbers or a config, so that any shape and any stored run can be drawn.
"""

import math
from collections.abc import Sequence

from matplotlib.patches import Rectangle

from ..config import ModelConfig
from ..rope import inverse_frequencies, yarn_ramp
from .cache_calculator import BF16, SCHEMES, cached_numbers, in_flops, scheme_words
from .style import BLACK, BLUE, CACHE, DARK, GREY, ORANGE, SKY, VERMILION, WHITE, YELLOW, Picture, styled


@styled
def brackets(config: ModelConfig, keys: int = 4096) -> Picture:
    """q W^UK c^T of one head, bracketed left and right, with the FLOPs for one query and for as many as keys; beside
    it the bytes that four schemes keep of a token and layer."""
    picture = Picture(11, 5.6, "The product of a query, W^UK and the latents, bracketed from the left and from the "
                      "right, with FLOPs for one query and for many; beside it bytes a token and layer of four "
                      "schemes. For one query the left bracket is far cheaper, for many the right one.")
    axes = picture.add_axes((0.01, 0.02, 0.66, 0.96))
    axes.set(xlim=(0, 726), ylim=(0, 538))
    axes.axis("off")
    rank, width = config.kv_lora_rank, config.qk_nope_head_dim
    for top, title, first, made, one, many in (
            (510, "absorbed: (q W) c", 0, f"1 x {rank}", _left(config, 1, keys), _left(config, keys, keys)),
            (240, "expanded: q (W c)", 1, f"{width} x n", _right(config, 1, keys), _right(config, keys, keys))):
        axes.text(0, top, title, fontsize=14, weight="bold", va="center")
        axes.text(230, top, f"first makes {made}", fontsize=12, color=VERMILION, weight="bold", va="center")
        _three_factors(axes, config, top - 30, first)
        axes.text(500, top - 62, f"1 query, n = {keys:,}:", fontsize=11, va="center")
        axes.text(500, top - 84, in_flops(one), fontsize=14, weight="bold", va="center")
        axes.text(500, top - 124, f"{keys:,} queries:", fontsize=11, va="center")
        axes.text(500, top - 146, in_flops(many), fontsize=14, weight="bold", va="center")
    _token_bytes(picture.add_axes((0.73, 0.14, 0.26, 0.72)), config)
    return picture


def _left(config: ModelConfig, queries: int, keys: int) -> int:
    return 2 * queries * config.kv_lora_rank * (config.qk_nope_head_dim + keys)


def _right(config: ModelConfig, queries: int, keys: int) -> int:
    return 2 * keys * config.qk_nope_head_dim * (config.kv_lora_rank + queries)


def _three_factors(axes, config: ModelConfig, top: float, first: int) -> None:
    """Query, W^UK and latents to one scale (the latents cut at the right), with a frame round the product taken first:
    0 the left one, 1 the right one."""
    rank, width = config.kv_lora_rank, config.qk_nope_head_dim
    unit = 150 / rank
    middle, w, r = top - 78, width * unit, rank * unit
    left = (30, 64 + w, 98 + w + r)
    boxes = ((left[0], w, 5, YELLOW, "", f"q\n1 x {width}"),
             (left[1], r, w, GREY, "--", f"W$^{{UK}}$\n{width} x {rank}"),
             (left[2], 150, r, SKY, "||", f"c, n latents\n{rank} x n"))
    for x, across, high, colour, hatch, words in boxes:
        axes.add_patch(Rectangle((x, middle - high / 2), across, high, facecolor=colour, edgecolor=BLACK, hatch=hatch,
                                 linewidth=0.8))
        axes.text(x + across / 2, middle - high / 2 - 6, words, ha="center", va="top", fontsize=10)
    start, end = (left[0], left[1] + r) if first == 0 else (left[1], left[2] + 150)
    tall = (w if first == 0 else r) / 2
    axes.add_patch(Rectangle((start - 14, middle - tall - 44), end - start + 24, 2 * tall + 52, fill=False,
                             edgecolor=VERMILION, linewidth=2.2))


def _token_bytes(axes, config: ModelConfig) -> None:
    sizes = {name: BF16 * numbers for name, numbers in cached_numbers(config).items()}
    axes.bar(range(4), sizes.values(), color=[fill.colour for fill in SCHEMES.values()], edgecolor=BLACK,
             hatch=[fill.mark * 2 for fill in SCHEMES.values()])
    for x, size in enumerate(sizes.values()):
        axes.text(x, size * 1.12, f"{size:,}", ha="center", fontsize=10.5, weight="bold")
    labels = [f"{name}\n{words}".replace(" x (", " x\n").replace(" + ", "+").strip(")")
              for name, words in scheme_words(config).items()]
    axes.set(yscale="log", title="bytes a token and layer", xticks=range(4), ylim=(100, 3 * max(sizes.values())))
    axes.set_xticklabels(labels, fontsize=9.5)
    axes.minorticks_off()


@styled
def what_is_kept(tokens: Sequence[str], config: ModelConfig) -> Picture:
    """For each token, to scale, the numbers that a layer would keep as keys and values, and those that it does keep."""
    full, latent, rotary = cached_numbers(config)["MHA"], config.kv_lora_rank, config.qk_rope_head_dim
    picture = Picture(10, 0.42 * len(tokens) + 1.5, f"For each token two bars to scale: {full:,} numbers as keys and "
                      f"values of all heads, and {latent} + {rotary} as latent and rotary key. The second is "
                      f"{full / (latent + rotary):.0f} times shorter.")
    axes = picture.add_axes((0.13, 0.02, 0.85, 0.96))
    signs = str.maketrans({" ": "\u2423", "\n": "\u23ce", "\t": "\u21e5"})
    for row, token in enumerate(tokens):
        axes.text(-0.012 * full, row, token.translate(signs), ha="right", va="center", family="DejaVu Sans Mono")
        axes.barh(row - 0.18, full, 0.3, color=GREY, edgecolor=BLACK, linewidth=0.6)
        _latent_and_key(axes, row + 0.18, 0.3, 1, latent, rotary)
    axes.text(full, -0.7, f"grey: keys and values of all heads, {full:,} numbers a layer", ha="right", va="center")
    below, zoom = len(tokens) + 0.75, 0.86 * full / (latent + rotary)
    _latent_and_key(axes, below, 0.8, zoom, latent, rotary)
    axes.text(-0.012 * full, below, f"x {zoom:.0f}", ha="right", va="center", weight="bold")
    axes.text(latent / 2 * zoom, below, f"latent: {latent} numbers", ha="center", va="center",
              bbox=dict(facecolor=WHITE, edgecolor="none", pad=2))
    axes.text((latent + rotary) * zoom, below, f" rope key:\n {rotary} numbers", va="center")
    axes.set(xlim=(0, full * 1.01), ylim=(below + 0.6, -1))
    axes.axis("off")
    return picture


def _latent_and_key(axes, y: float, height: float, unit: float, latent: int, rotary: int) -> None:
    """One bar of two parts; where it is drawn to scale it is too thin for outlines."""
    for start, width, fill in ((0, latent, CACHE["latent"]), (latent, rotary, CACHE["rope key"])):
        axes.barh(y, width * unit, height, start * unit, color=fill.colour, edgecolor=BLACK,
                  hatch=fill.mark * 2 if unit > 1 else "", linewidth=0.8 if unit > 1 else 0)


@styled
def merged_by_distance(matrices: Sequence[Sequence[Sequence[float]]], distances: Sequence[int],
                       changes: Sequence[float]) -> Picture:
    """The matrix between a query's and a key's latent at several distances, as shades, and how far each is from the
    first: `changes` are fractions."""
    picture = Picture(10, 2.7, "The merged matrix of a rotated latent at several distances, as shades. " + "; ".join(
        f"distance {d}: {100 * change:.0f} % away" for d, change in zip(distances, changes)) + ".")
    top = max(abs(value) for matrix in matrices for row in matrix for value in row)
    for axes, matrix, distance, change in zip(picture.subplots(1, len(matrices)), matrices, distances, changes):
        axes.imshow(matrix, cmap="cividis", vmin=-top, vmax=top)
        axes.set(title=f"distance {distance}", xticks=(), yticks=(), xlabel=f"{100 * change:.0f} % away")
    picture.tight_layout()
    return picture


FORMS = {"none": ("no cache", GREY, "^", ":"), "expanded": ("latents, expanded again", BLACK, "s", "--"),
         "full": ("full keys and values", ORANGE, "D", "-."), "absorbed": ("latents, absorbed", BLUE, "o", "-")}


@styled
def decode_times(found: dict, shapes: dict[str, str]) -> Picture:
    """Milliseconds of one decoded token over the context, four ways, for each measured geometry."""
    picture = Picture(10, 4.3, "Time of one decoded token in one layer over the context, four ways, for two sizes. See "
                      "which lines stay low as the context grows, and where the two lowest cross.")
    for column, (axes, (name, words)) in enumerate(zip(picture.subplots(1, len(shapes)), shapes.items())):
        times = found[name]["decode_ms"]
        contexts = [int(context) for context in times]
        for form, (label, colour, marker, dashes) in FORMS.items():
            axes.plot(contexts, [each[form] for each in times.values()], color=colour, marker=marker, linestyle=dashes,
                      linewidth=2, markeredgecolor=BLACK, label=label)
        axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", title=f"{name}: {words.split(', ')[1]}")
        axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        if column == 0:
            axes.set_ylabel("milliseconds (log)")
            axes.legend(frameon=False, loc="upper left")
    picture.tight_layout()
    return picture


@styled
def losses_by_attention(runs: Sequence[dict], cached: dict[str, int]) -> Picture:
    """Held-out loss of every run, a line a seed through the methods; below each method the numbers that it caches."""
    picture = Picture(8, 3.8, "Held-out loss of attentions with equal parameters, a line for each seed. See whether "
                      "all lines go the same way, and how large a step is beside the distance of the lines.")
    axes = picture.add_axes((0.11, 0.18, 0.86, 0.78))
    names = list(cached)
    for seed, marker in zip(sorted({run["seed"] for run in runs}), "osD^vPX*"):
        losses = {run["method"]: run["held_out"] for run in runs if run["seed"] == seed}
        axes.plot(range(len(names)), [losses[name] for name in names], marker=marker, color=BLUE, linewidth=1.5,
                  markeredgecolor=BLACK, label=f"seed {seed}")
    axes.set(xticks=range(len(names)), ylabel="held-out loss (nats)", xlim=(-0.3, len(names) - 0.3))
    axes.set_xticklabels([f"{name.upper()}\ncaches {numbers} numbers a layer" for name, numbers in cached.items()])
    axes.legend(frameon=False, loc="upper right")
    return picture


@styled
def yarn_wavelengths(config: ModelConfig) -> Picture:
    """Positions in which each rotary pair turns once, without and with YaRN, and the ramp between the two."""
    plain, stretched = (inverse_frequencies(c).tolist() for c in (config.replace(rope_scaling=None), config))
    low, high = yarn_ramp(config)
    yarn, pairs = config.rope_scaling, range(len(plain))
    original = yarn.original_max_position_embeddings
    picture = Picture(9, 4.2, "Wavelength of each rotary pair, without and with YaRN. Fast pairs stay as they are, "
                      f"slow ones are stretched {yarn.factor:g} times, and pairs {low} to {high} lie between.")
    axes = picture.add_axes((0.1, 0.14, 0.88, 0.8))
    axes.axvspan(low, high, color=SKY, alpha=0.3, label=f"ramp: pairs {low} to {high}")
    for frequencies, label, style in ((plain, "RoPE", dict(color=BLACK, linestyle="--", marker="s")),
                                      (stretched, "YaRN", dict(color=BLUE, marker="o"))):
        axes.plot(pairs, [2 * math.pi / frequency for frequency in frequencies], markersize=5, label=label, **style)
    for length, words in ((original, "pre-training"), (original * yarn.factor, "stretched")):
        axes.axhline(length, color=DARK, linestyle=":", linewidth=1.2)
        axes.text(0, length * 1.15, f"{words}: {length:,.0f} positions", fontsize=10)
    axes.set(yscale="log", xlabel="rotary pair", ylabel="positions a turn (log)")
    axes.legend(frameon=False, loc="lower right")
    axes.minorticks_off()
    return picture
