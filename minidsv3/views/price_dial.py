"""Chapter 00's view: five sliders, and what a model of that shape stores, uses a token, computes, and costs to train.

What it teaches: doubling the experts doubles storage and leaves the bill; doubling top-k does the reverse.
"""

from html import escape

from .. import cost
from ..config import ModelConfig
from .explore import View, choice, explore, log_slider, slider
from .style import DARK, ORANGE, PARTS, WHITE, Fill, Picture, human, styled
from .svg import line, page, polygon, rectangle, text

PRESETS = ("full", "mini", "nano")
REPORT_BILLION_TOKENS = 14_800.0        # section 4.2; every preset starts there, so that shapes are compared


def dial_state(preset: str, **changes) -> dict:
    """The sliders' values for a preset, some of them changed. Raises ValueError for an unknown preset or slider."""
    config = ModelConfig.preset(preset)
    state = {"preset": preset, "experts": config.n_routed_experts, "top_k": config.num_experts_per_tok,
             "layers": config.num_hidden_layers, "width": config.moe_intermediate_size,
             "billion_tokens": REPORT_BILLION_TOKENS}
    unknown = set(changes) - set(state)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} is no slider of the price dial; it has {', '.join(state)}")
    return state | changes


def dial_config(state: dict) -> ModelConfig:
    """The model a state describes. One group: groups decide who is chosen, never how much is stored or computed."""
    base = ModelConfig.preset(state["preset"])
    return base.replace(
        n_routed_experts=state["experts"], num_experts_per_tok=state["top_k"], num_hidden_layers=state["layers"],
        first_k_dense_replace=min(base.first_k_dense_replace, state["layers"]),
        moe_intermediate_size=state["width"], n_group=1, topk_group=1)


def price_dial_facts(state: dict) -> dict[str, int]:
    """Whole numbers behind the dial: parameters by part, FLOPs of a training token, H800 hours and dollars.

    Pre-training of the main model only, at `cost.REPORT_MFU` of the peak, which a small model would not reach.
    """
    config = dial_config(state)
    flops = cost.training_flops(config).main
    hours = cost.hours(flops, state["billion_tokens"] * 1e9)
    return {"stored": cost.parameters(config).learned, "active": cost.active_parameters(config).learned,
            "flops_per_token": flops, "hours": round(hours), "dollars": round(cost.dollars(hours))}


def shares(parts: cost.Parameters) -> dict[str, float]:
    """The fraction of the main model's parameters in each part of `PARTS`; they add up to 1."""
    counts = (parts.routed, parts.shared, parts.attention, parts.dense, parts.embedding + parts.head,
              parts.router + parts.norms)
    return {name: count / parts.learned for name, count in zip(PARTS, counts)}


def render_price_dial(state: dict) -> str:
    """A sentence and an SVG for one state of the sliders. Pure: the same state gives the same string."""
    config, facts = dial_config(state), price_dial_facts(state)
    reference = price_dial_facts(dial_state(state["preset"]))
    sentence = (f"One token uses {human(facts['active'])} of {human(facts['stored'])} parameters and costs "
                f"{readable('flops_per_token', facts)} to train on; {human(state['billion_tokens'] * 1e9)} tokens take "
                f"{human(facts['hours'])} H800 hours at {100 * cost.REPORT_MFU:.0f} % of their peak, "
                f"{readable('dollars', facts)}.")
    stored, active = shares(cost.parameters(config)), shares(cost.active_parameters(config))
    parts = [_bar(60, stored, f"Stored: {human(facts['stored'])} parameters"),
             _ribbons(100, 160, stored, active),
             _bar(160, active, f"Used by one token: {human(facts['active'])} parameters"),
             _legend(225), *_dials(facts, reference, state["preset"])]
    return f"<p>{escape(sentence)}</p>" + page("Price dial: " + sentence, 430, parts)


def readable(key: str, facts: dict) -> str:
    """One of the facts with its unit."""
    if key == "flops_per_token":
        return f"{facts[key] / 1e9:.3g} GFLOP"
    return "$" * (key == "dollars") + human(facts[key])


LEFT, LENGTH = 20, 860


def _edges(fractions: dict[str, float]) -> list[tuple[str, float, float]]:
    """Each part with the left and right end of its piece of a bar."""
    edges, left = [], float(LEFT)
    for name, fraction in fractions.items():
        edges.append((name, left, left + LENGTH * fraction))
        left += LENGTH * fraction
    return edges


def _bar(top: float, fractions: dict[str, float], title: str) -> str:
    drawn = [text(LEFT, top - 12, title, 15, bold=True)]
    for name, left, right in _edges(fractions):
        drawn.append(rectangle(left, top, right - left, 40, PARTS[name]))
        if right - left > 58:
            drawn.append(_plate((left + right) / 2, top + 25, f"{100 * fractions[name]:.1f} %"))
    return "".join(drawn)


def _plate(x: float, y: float, words: str) -> str:
    """Words on a white plate, readable on any hatch."""
    return rectangle(x - 26, y - 14, 52, 18, Fill(WHITE), outline=WHITE) + text(x, y, words, 13, "middle")


def _ribbons(top: float, bottom: float, above: dict[str, float], below: dict[str, float]) -> str:
    return "".join(polygon([(a, top), (b, top), (d, bottom), (c, bottom)], PARTS[name].colour, 0.25)
                   for (name, a, b), (_, c, d) in zip(_edges(above), _edges(below)))


def _legend(top: float) -> str:
    """Names of the parts, in the order of the bars, each with room for eight pixels a letter: wide fonts need them."""
    drawn, left = [], LEFT
    for name, fill in PARTS.items():
        drawn.append(rectangle(left, top, 16, 14, fill) + text(left + 21, top + 12, name, 13))
        left += 41 + 8 * len(name)
    return "".join(drawn)


DIALS = {"stored": "parameters stored", "flops_per_token": "work of a training token", "hours": "H800 hours",
         "dollars": "rent"}
LONGEST = 3.4                           # times the preset: longer bars are cut, their number is not


def _dials(facts: dict, reference: dict, preset: str) -> list[str]:
    """One row a quantity: its value, and a bar as long as it is times the preset's."""
    zero, unit, top = 470, 100, 282
    drawn = [text(zero + unit, top - 12, f"1 = {preset}", 13, "middle"),
             line(zero + unit, top - 6, zero + unit, top + 140, dashes="5 4")]
    for row, (key, name) in enumerate(DIALS.items()):
        ratio, y = facts[key] / max(reference[key], 1), top + 35 * row
        length = unit * min(ratio, LONGEST)
        drawn += [text(LEFT, y + 18, name, 15), text(zero - 14, y + 18, readable(key, facts), 16, "end", bold=True),
                  rectangle(zero, y + 2, length, 22, Fill(ORANGE)),
                  text(zero + length + 8, y + 18, f"x {_times(ratio)}", 14)]
    return drawn


def _times(ratio: float) -> str:
    """1.06, 16,873 or 0.0002: two decimals, no more than can be read, no fewer than say something."""
    if ratio >= 100:
        return f"{ratio:,.0f}"
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.1g}"


@styled
def price_dial_states(states: dict[str, dict]) -> Picture:
    """The dial's lower half for several states side by side, each against the first: for pages without widgets."""
    facts = {name: price_dial_facts(state) for name, state in states.items()}
    reference = next(iter(facts.values()))
    picture = Picture(10, 2.9, "Bars of storage, work, hours and rent, times the first panel's. " + "; ".join(
        f"{name}: stored x {facts[name]['stored'] / reference['stored']:.2f}, "
        f"rent x {facts[name]['dollars'] / reference['dollars']:.2f}" for name in states) + ".")
    for column, (axes, name) in enumerate(zip(picture.subplots(1, len(states), sharey=True), states)):
        ratios = [facts[name][key] / reference[key] for key in DIALS]
        axes.barh(range(4), ratios, color=ORANGE, edgecolor="black", height=0.62)
        axes.axvline(1, color=DARK, linestyle="--", linewidth=1)
        for row, (key, ratio) in enumerate(zip(DIALS, ratios)):
            axes.text(ratio + 0.06, row, f"x {ratio:.2f}\n{readable(key, facts[name])}", va="center", fontsize=9)
        axes.set(title=name, xlim=(0, 3.2), yticks=range(4), yticklabels=DIALS.values(), xlabel="times the first")
        axes.xaxis.set_ticks([0, 1, 2])
        axes.invert_yaxis() if column == 0 else None
    picture.tight_layout()
    return picture


def price_dial(preset: str = "full") -> View:
    """The view: a dropdown of presets that moves all sliders, and sliders for shape and training tokens."""
    state = dial_state(preset)
    view = explore(
        render_price_dial, price_dial_facts,
        preset=choice("start from the preset", preset, list(PRESETS)),
        experts=slider("routed experts in a layer", state["experts"], 16, 512, 16),
        top_k=slider("experts a token takes (top-k)", state["top_k"], 1, 16),
        layers=slider("layers", state["layers"], 3, 128),
        width=slider("width of an expert (numbers)", state["width"], 128, 4096, 128),
        billion_tokens=log_slider("training tokens (billions)", state["billion_tokens"], 1.5, 4.5))
    view.controls["preset"].observe(lambda change: view.set(**dial_state(change["new"])), names="value")
    return view
