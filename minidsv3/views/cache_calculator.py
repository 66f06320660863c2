"""Chapter 01's view: what a context costs to keep, and which of the two brackets of one product costs less.

What it teaches: heads do not move the latent's bytes; the number of tokens asked at once moves the winner.
"""

import math
import re
from collections.abc import Callable
from html import escape

from ..config import ModelConfig
from .explore import View, choice, doubling, explore, slider
from .style import BLACK, BLUE, DARK, GREY, SKY, WHITE, YELLOW, Fill, Picture, styled
from .svg import line, page, rectangle, text

PRESETS = ("full", "mini", "nano")
LONGEST, MOST_QUERIES = 131_072, 4096
GROUPS = 8                              # of grouped-query attention, as LLaMA and Qwen have them
BF16 = 2                                # bytes
SCHEMES = {"MHA": Fill(GREY, "-"), "GQA": Fill(YELLOW, "/"), "MLA": Fill(SKY, "|"), "MQA": Fill(WHITE)}


def calculator_state(preset: str, **changes) -> dict:
    """The controls' values for a preset, some of them changed: one conversation, one new token.

    Raises ValueError for an unknown preset or control.
    """
    config = ModelConfig.preset(preset)
    state = {"preset": preset, "layers": config.num_hidden_layers, "heads": config.num_attention_heads,
             "rank": config.kv_lora_rank, "rope": config.qk_rope_head_dim,
             "context": min(config.max_position_embeddings, LONGEST), "batch": 1, "queries": 1}
    unknown = set(changes) - set(state)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} is no control of the calculator; it has {', '.join(state)}")
    return state | changes


def calculator_config(state: dict) -> ModelConfig:
    """The model a state describes: widths of the heads are the preset's."""
    base = ModelConfig.preset(state["preset"])
    return base.replace(
        num_hidden_layers=state["layers"], first_k_dense_replace=min(base.first_k_dense_replace, state["layers"]),
        num_attention_heads=state["heads"], kv_lora_rank=state["rank"], qk_rope_head_dim=state["rope"])


def cached_numbers(config: ModelConfig) -> dict[str, int]:
    """Numbers that one layer keeps of a token: MLA, its heads expanded (MHA), and shared keys and values."""
    nope, rotary, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    heads = config.num_attention_heads
    return {"MHA": heads * (nope + rotary + value), "GQA": min(GROUPS, heads) * (nope + value),
            "MLA": config.kv_lora_rank + rotary, "MQA": nope + value}


def bracket_flops(config: ModelConfig, queries: int, keys: int) -> dict[str, int]:
    """FLOPs of one head in one layer for `queries` tokens that each look at `keys`, new ones included, in both forms.

    Counted are the up-projections W^UK and W^UV and the products with keys and values; the rest is the same in both.
    """
    rank, rotary = config.kv_lora_rank, config.qk_rope_head_dim
    both = config.qk_nope_head_dim + config.v_head_dim
    return {"expanded": 2 * keys * rank * both + 2 * queries * keys * (both + rotary),
            "absorbed": 2 * queries * rank * both + 2 * queries * keys * (2 * rank + rotary)}


def crossing(config: ModelConfig, keys: int) -> float:
    """T*: up to so many tokens at once absorbing is cheaper; `keys`, the most there can be, if it always is."""
    rank, both = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    expand = 2 * rank * both
    return keys * expand / (expand + 2 * keys * max(2 * rank - both, 0))


def cache_calculator_facts(state: dict) -> dict[str, float]:
    """The numbers behind the drawing: bytes of four caches, FLOPs of a pass in both forms, T*, FLOP a cached byte.

    The pass brings `queries` tokens (at most `context`) in each row of the batch, through all layers and heads.
    """
    config, context = calculator_config(state), state["context"]
    queries = min(state["queries"], context)
    numbers = cached_numbers(config)
    flops = {form: each * state["layers"] * state["heads"] * state["batch"]
             for form, each in bracket_flops(config, queries, context).items()}
    return {**{f"{name} bytes": each * BF16 * state["layers"] * context * state["batch"]
               for name, each in numbers.items()},
            **{f"{form} FLOPs": each for form, each in flops.items()},
            "crossing": round(crossing(config, context), 1),
            **{f"{name} FLOP a byte": round(each) for name, each in intensity(config).items()}}


def intensity(config: ModelConfig) -> dict[str, float]:
    """FLOPs of one new token (absorbed in MLA) for each byte of cache that it reads."""
    nope, rotary, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    numbers = cached_numbers(config)
    products = {"MHA": nope + rotary + value, "GQA": nope + value, "MLA": 2 * config.kv_lora_rank + rotary,
                "MQA": nope + value}
    return {name: 2 * config.num_attention_heads * each / (BF16 * numbers[name]) for name, each in products.items()}


def in_bytes(number: float) -> str:
    """70272 is '70.3 KB': decimal prefixes, as the report counts."""
    return _with_unit(number, "B")


def in_flops(number: float) -> str:
    return _with_unit(number, "FLOP")


def _with_unit(number: float, unit: str) -> str:
    power = min(max(int(math.log10(number) + 1e-9), 0) // 3, 6)
    scaled = number / 1000 ** power
    return f"{scaled:,.{max(2 - int(math.log10(scaled) + 1e-9), 0)}f} {' KMGTPE'[power].strip()}{unit}"


def _power(number: int, unit: Callable[[float], str]) -> str:
    """A power of ten as a mark of an axis: '10 GB'."""
    return re.sub(r"\.0+", "", unit(number))


def render_cache_calculator(state: dict) -> str:
    """A sentence and an SVG for one state of the controls. Pure: the same state gives the same string."""
    facts, config = cache_calculator_facts(state), calculator_config(state)
    queries = min(state["queries"], state["context"])
    forms = sorted(("absorbed", "expanded"), key=lambda form: facts[f"{form} FLOPs"])
    cheap, dear = (facts[f"{form} FLOPs"] for form in forms)
    share = facts["MHA bytes"] / facts["MLA bytes"]
    rows = f" in each of {state['batch']:,} rows" if state["batch"] > 1 else ""
    sentence = (f"{state['batch']:,} x {state['context']:,} tokens take {in_bytes(facts['MLA bytes'])} as latents, "
                f"{share:.1f} times less than {in_bytes(facts['MHA bytes'])} as keys and values of all heads. A pass "
                f"of {queries:,} new token{'s' * (queries > 1)}{rows} is cheaper {forms[0]}: {in_flops(cheap)} "
                f"against {in_flops(dear)}.")
    parts = [*_caches(facts, config), *_brackets(state, config, facts)]
    return f"<p>{escape(sentence)}</p>" + page("Cache and bracket calculator: " + sentence, 620, parts)


# ---- the upper half: bytes ------------------------------------------------------------------------------------------

ZERO, END, ROW = 290, 640, 36           # where the byte axis lies, and the height of a row


def scheme_words(config: ModelConfig) -> dict[str, str]:
    """What each scheme keeps of a token in a layer, in a few words."""
    key, value = config.qk_nope_head_dim, config.v_head_dim
    heads, groups = config.num_attention_heads, min(GROUPS, config.num_attention_heads)
    return {"MHA": f"{heads} x ({key + config.qk_rope_head_dim} + {value})", "GQA": f"{groups} x ({key} + {value})",
            "MLA": f"{config.kv_lora_rank} + {config.qk_rope_head_dim}", "MQA": f"{key} + {value}"}


def _caches(facts: dict, config: ModelConfig) -> list[str]:
    sizes = [facts[f"{name} bytes"] for name in SCHEMES]
    low, high = math.floor(math.log10(min(sizes))), math.ceil(math.log10(max(sizes)))
    unit = (END - ZERO) / max(high - low, 1)
    drawn = [text(20, 24, "Cache of the whole model (log scale)", 15, bold=True),
             text(20, 50, "numbers a token and layer", 13, colour=DARK),
             text(880, 50, "FLOP a cached byte, T = 1", 13, "end", colour=DARK)]
    for power in range(low, high + 1):
        x = ZERO + unit * (power - low)
        drawn += [line(x, 58, x, 62 + 4 * ROW, 0.6, "2 4"),
                  text(x, 80 + 4 * ROW, _power(10 ** power, in_bytes), 12, "middle")]
    for row, ((name, fill), words) in enumerate(zip(SCHEMES.items(), scheme_words(config).values())):
        y, size = 66 + ROW * row, facts[f"{name} bytes"]
        length = max(unit * (math.log10(size) - low), 2)
        drawn += [text(20, y + 17, name, 15, bold=True), text(70, y + 17, words, 13),
                  rectangle(ZERO, y, length, 24, fill),
                  _plate(ZERO + length + 6, y + 2, in_bytes(size)),
                  text(880, y + 17, f"{facts[f'{name} FLOP a byte']:,}", 15, "end", bold=True)]
    return drawn


def _plate(x: float, y: float, words: str) -> str:
    """Words on white, readable across the lines of an axis."""
    ground = rectangle(x, y, 9 * len(words) + 6, 20, Fill(WHITE), outline=WHITE)
    return ground + text(x + 3, y + 15, words, 15, bold=True)


# ---- the lower half: FLOPs ------------------------------------------------------------------------------------------

LEFT, RIGHT, TOP, BOTTOM = 110, 700, 290, 560
FORMS = {"absorbed": (BLUE, ""), "expanded": (BLACK, "7 4")}        # a colour and dashes


def curves(state: dict, config: ModelConfig) -> tuple[list[int], dict[str, list[int]]]:
    """Tokens at once, 1, 2, 4 .., and the FLOPs of a pass over so many in both forms."""
    most = min(MOST_QUERIES, state["context"])
    queries = [1 << i for i in range(most.bit_length())]
    times = state["layers"] * state["heads"] * state["batch"]
    passes = [bracket_flops(config, each, state["context"]) for each in queries]
    return queries, {form: [times * flops[form] for flops in passes] for form in FORMS}


def _brackets(state: dict, config: ModelConfig, facts: dict) -> list[str]:
    queries, flops = curves(state, config)
    everything = flops["absorbed"] + flops["expanded"]
    low, high = math.floor(math.log10(min(everything))), math.ceil(math.log10(max(everything)))

    def x(tokens: float) -> float:
        return LEFT + (RIGHT - LEFT) * math.log(tokens) / math.log(queries[-1])

    def y(value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (math.log10(value) - low) / (high - low)

    drawn = [text(20, TOP - 22, "Work of a pass, all layers and heads (log scales)", 15, bold=True),
             line(LEFT, BOTTOM, RIGHT, BOTTOM), line(LEFT, TOP, LEFT, BOTTOM),
             text((LEFT + RIGHT) / 2, BOTTOM + 46, "tokens asked at once (T)", 14, "middle")]
    for power in range(low, high + 1):
        drawn += [line(LEFT, y(10 ** power), RIGHT, y(10 ** power), 0.6, "2 4"),
                  text(LEFT - 8, y(10 ** power) + 5, _power(10 ** power, in_flops), 12, "end")]
    drawn += [text(x(each), BOTTOM + 20, f"{each:,}", 12, "middle") for each in queries[::2]]
    ends = {form: values[-1] for form, values in flops.items()}
    upper = max(ends, key=ends.get)
    for form, (colour, dashes) in FORMS.items():
        points = [(x(each), y(value)) for each, value in zip(queries, flops[form])]
        drawn += [line(*before, *after, 2.5, dashes, colour) for before, after in zip(points, points[1:])]
        drawn.append(text(RIGHT + 10, points[-1][1] + (0 if form == upper else 14), form, 14, colour=colour, bold=True))
    return drawn + _marks(min(state["queries"], queries[-1]), facts, x, y)


def _marks(queries: int, facts: dict, x, y) -> list[str]:
    """The crossing as a dotted line; the chosen T as a line with a square on each curve."""
    drawn, at = [], facts["crossing"]
    if x(at) < RIGHT:
        drawn += [line(x(at), TOP, x(at), BOTTOM, 1.5, "2 3"),
                  text(x(at), TOP - 4, f"T* = {at:,.1f}", 14, "middle", bold=True)]
    drawn.append(line(x(queries), TOP + 12, x(queries), BOTTOM, 1.5))
    for form, (colour, _) in FORMS.items():
        drawn.append(rectangle(x(queries) - 5, y(facts[f"{form} FLOPs"]) - 5, 10, 10, Fill(colour)))
    rows = [(f"T = {queries:,}", BLACK)]
    rows += [(f"{form}: {in_flops(facts[f'{form} FLOPs'])}", colour) for form, (colour, _) in FORMS.items()]
    drawn += [text(RIGHT + 10, BOTTOM - 60 + 22 * i, words, 13, colour=colour, bold=True)
              for i, (words, colour) in enumerate(rows)]
    return drawn


# ---- without widgets ------------------------------------------------------------------------------------------------

@styled
def cache_calculator_states(states: dict[str, dict]) -> Picture:
    """Bytes and FLOPs of several states side by side: for pages without widgets."""
    facts = {name: cache_calculator_facts(state) for name, state in states.items()}
    picture = Picture(11, 5.6, "Above, bytes of four caches on a log axis; below, FLOPs of the two forms over the "
                      "tokens asked at once, for several states. " + "; ".join(
                          f"{name}: MLA {in_bytes(each['MLA bytes'])}, T* = {each['crossing']:,.1f}"
                          for name, each in facts.items()) + ".")
    grid = picture.subplots(2, len(states), sharey="row")
    for column, (name, state) in enumerate(states.items()):
        bars, plot = grid[0][column], grid[1][column]
        sizes = [facts[name][f"{scheme} bytes"] for scheme in SCHEMES]
        bars.barh(range(4), sizes, color=[fill.colour for fill in SCHEMES.values()], edgecolor=BLACK, height=0.62,
                  hatch=[fill.mark * 2 for fill in SCHEMES.values()])
        for row, size in enumerate(sizes):
            bars.text(size * 1.5, row, in_bytes(size), va="center", fontsize=9)
        bars.set(title=name, xscale="log", yticks=range(4), yticklabels=SCHEMES, xlim=(1e4, 1e16))
        bars.set_xticks([1e6, 1e9, 1e12], ["1 MB", "1 GB", "1 TB"])
        queries, flops = curves(state, calculator_config(state))
        for form, (colour, dashes) in FORMS.items():
            plot.plot(queries, flops[form], color=colour, linestyle="--" if dashes else "-", linewidth=2, label=form)
        plot.axvline(facts[name]["crossing"], color=DARK, linestyle=":", linewidth=1.2)
        plot.plot([state["queries"]] * 2, [facts[name][f"{form} FLOPs"] for form in FORMS], "s", color=BLACK,
                  markersize=6)
        plot.set(xscale="log", yscale="log", xlabel=f"tokens at once, T* = {facts[name]['crossing']:,.1f}")
        plot.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1,000"])
        plot.minorticks_off()
    for axes in grid[0]:
        axes.minorticks_off()
        axes.invert_yaxis() if axes is grid[0][0] else None
    grid[1][0].set_ylabel("FLOPs of a pass")
    grid[1][0].legend(frameon=False, loc="lower right")
    picture.tight_layout()
    return picture


def cache_calculator(preset: str = "full") -> View:
    """The view: a dropdown of presets that moves the controls, and sliders for shape, context and tokens at once."""
    state = calculator_state(preset)
    view = explore(
        render_cache_calculator, cache_calculator_facts,
        preset=choice("start from the preset", preset, list(PRESETS)),
        layers=slider("layers", state["layers"], 1, 128),
        heads=doubling("heads", state["heads"], 1, 256),
        rank=slider("rank of the latent (numbers)", state["rank"], 64, 1024, 64),
        rope=slider("shared rope key (numbers)", state["rope"], 16, 128, 16),
        context=doubling("context, n (tokens)", state["context"], 128, LONGEST),
        batch=doubling("batch (conversations)", state["batch"], 1, 1024),
        queries=doubling("tokens asked at once, T", state["queries"], 1, MOST_QUERIES))
    view.controls["preset"].observe(lambda change: view.set(**calculator_state(change["new"])), names="value")
    return view
