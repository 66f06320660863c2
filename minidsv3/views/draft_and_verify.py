"""Chapter 03's view: plain and speculative decoding on one time axis, and what the drafts must pay for.

What it teaches: at full size 85 % acceptance gives 1.77 times the speed; on nano the first 36 % of acceptance only pay
for the module. A batch waits for its slowest row.
"""

from html import escape
from typing import NamedTuple

from .. import cost
from ..config import ModelConfig
from .explore import View, explore, slider
from .style import BLACK, BLUE, DARK, GREY, VERMILION, WHITE, Fill, Picture, ink, styled
from .svg import line, number, page, rectangle, text

TOKENS = 12                             # that each row writes
MAIN, MODULE, IDLE = Fill(BLUE), Fill(VERMILION, "/"), Fill(WHITE, "x")
SIZES = {"full": cost.draft_cost(ModelConfig.preset("full")), "nano": cost.draft_cost(ModelConfig.preset("nano"))}


def decode_state(**changes) -> dict:
    """The sliders' values: the published model at the report's acceptance, some of them changed. Raises ValueError."""
    state = {"step": 3, "acceptance": 85, "cost": 4, "depth": 1, "batch": 1}
    unknown = set(changes) - set(state)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))} is no slider of draft and verify; it has {', '.join(state)}")
    return state | changes


class Pass(NamedTuple):
    """What one pass brings to one row: which of its drafts were accepted, and the row's tokens behind it."""

    drafts: tuple[bool, ...]            # up to the first refusal, it included; () for a row that is done
    new: int
    written: int


def chance(row: int, number: int, draft: int) -> float:
    """What decides about a draft of pass `number`: it is accepted where this number in [0, 1) lies below p.

    Multiples of the golden ratio fill the interval evenly, so that few drafts already have about the share p.
    """
    return (0.4 + 0.618034 * number + 0.53 * draft + 0.21 * row) % 1


def decode(state: dict) -> list[list[Pass]]:
    """For each row of the batch its passes until all rows are done."""
    rows = [_row(row, state["acceptance"] / 100, state["depth"]) for row in range(state["batch"])]
    longest = max(map(len, rows))
    return [passes + [Pass((), 0, TOKENS)] * (longest - len(passes)) for passes in rows]


def _row(row: int, acceptance: float, depth: int) -> list[Pass]:
    passes, written = [], 0
    while written < TOKENS:
        drafts: list[bool] = []
        for draft in range(depth):
            drafts.append(chance(row, len(passes), draft) < acceptance)
            if not drafts[-1]:
                break
        new = min(1 + sum(drafts), TOKENS - written)
        written += new
        passes.append(Pass(tuple(drafts), new, written))
    return passes


def pass_time(state: dict) -> float:
    """How long a pass with its drafts takes, in passes without."""
    return 1 + state["depth"] * state["cost"] / 100


def decode_facts(state: dict) -> dict[str, int]:
    """Whole numbers behind the drawing. Speeds are in hundredths: 177 is 1.77 times as fast as plain decoding."""
    rows, p = decode(state), state["acceptance"] / 100
    drafts = [accepted for passes in rows for each in passes for accepted in each.drafts]
    speeds = {f"speed_{size}": round(100 * cost.speculative_speed(p, share, state["depth"]))
              for size, share in SIZES.items()}
    return {"passes": len(rows[0]), "plain_passes": TOKENS, "drafts": len(drafts), "accepted": sum(drafts),
            "written_at_step": tuple(passes[min(state["step"], len(passes)) - 1].written for passes in rows),
            "tokens_a_pass": round(100 * cost.tokens_per_pass(p, state["depth"])),
            "speed": round(100 * cost.speculative_speed(p, state["cost"] / 100, state["depth"])),
            "speed_drawn": round(100 * TOKENS / (len(rows[0]) * pass_time(state))), **speeds}


# ---- the drawing ----------------------------------------------------------------------------------------------------

LEFT, LENGTH, HEIGHT = 76, 800, 30      # where time begins, how long it is drawn, height of a row


def render_draft_and_verify(state: dict) -> str:
    """A sentence and an SVG for one state of the sliders. Pure: the same state gives the same string."""
    facts, rows = decode_facts(state), decode(state)
    sentence = _sentence(state, facts)
    unit = LENGTH / max(TOKENS, len(rows[0]) * pass_time(state))
    timelines = _timelines(state, rows, unit)
    top = 96 + 58 * len(rows)
    parts = [text(12, 22, "Time in passes of the main model, from left to right", 13, colour=DARK), *timelines,
             _legend(top), *_speeds(state, facts, top + 56)]
    return f"<p>{escape(sentence)}</p>" + page("Draft and verify: " + sentence, top + 306, parts)


def _sentence(state: dict, facts: dict) -> str:
    step, written = min(state["step"], facts["passes"]), facts["written_at_step"]
    plain = min(int(step * pass_time(state) + 1e-9), TOKENS)
    return (f"After pass {step} of {facts['passes']}, {' and '.join(map(str, written))} tokens are written; plain "
            f"decoding has {plain} by then. "
            f"Expected: {facts['tokens_a_pass'] / 100:.2f} tokens a pass, {facts['speed'] / 100:.2f} times as fast. "
            f"Drawn, until every row is done: {facts['speed_drawn'] / 100:.2f}.")


def _timelines(state: dict, rows: list[list[Pass]], unit: float) -> list[str]:
    drawn = [text(12, 58, "plain", 14, bold=True)]
    for i in range(TOKENS):
        drawn.append(_box(LEFT + unit * i, 38, unit, MAIN, "+1"))
    length, drafting = unit * pass_time(state), unit * (pass_time(state) - 1)
    for row, passes in enumerate(rows):
        y = 96 + 58 * row
        drawn.append(text(12, y + 20, f"row {row + 1}", 14, bold=True))
        for i, each in enumerate(passes):
            x = LEFT + length * i
            if each.new:
                drawn += [_box(x, y, unit, MAIN, f"+{each.new}"), rectangle(x + unit, y, drafting, HEIGHT, MODULE)]
                drawn += [_mark(x + 8 + 14 * j, y - 9, accepted) for j, accepted in enumerate(each.drafts)]
            else:
                drawn.append(rectangle(x, y, length, HEIGHT, IDLE))
    cursor = LEFT + length * min(state["step"], len(rows[0]))
    bottom = 96 + 58 * len(rows) - 22
    return [*drawn, line(cursor, 30, cursor, bottom, 2.5, "6 4", BLACK)]


def _box(x: float, y: float, width: float, fill: Fill, words: str) -> str:
    return rectangle(x, y, width, HEIGHT, fill) + text(x + width / 2, y + 20, words, 13, "middle", ink(fill.colour))


def _mark(x: float, y: float, accepted: bool) -> str:
    """A tick or a cross, drawn, so that no font is needed."""
    ends = [(-5, 0, -1, 4), (-1, 4, 5, -6)] if accepted else [(-4, -5, 4, 4), (-4, 4, 4, -5)]
    return "".join(line(x + a, y + b, x + c, y + d, 2.2, colour=BLACK) for a, b, c, d in ends)


def _legend(top: float) -> str:
    items = [(MAIN, "pass of the main model, + new tokens"), (MODULE, "drafting by the module"),
             (IDLE, "done, waiting for the batch")]
    drawn, x = "", LEFT
    for fill, words in items:
        drawn += rectangle(x, top - 14, 18, 14, fill) + text(x + 24, top - 2, words, 13)
        x += 44 + 6.9 * len(words)
    return drawn + _mark(LEFT + 6, top + 14, True) + text(LEFT + 24, top + 18, "draft accepted", 13) + \
        _mark(LEFT + 146, top + 14, False) + text(LEFT + 160, top + 18, "draft refused, the rest dropped", 13)


PLOT, PLOT_WIDTH, PLOT_HEIGHT = 76, 480, 190     # left edge, width and height of the lower drawing


def _speeds(state: dict, facts: dict, top: float) -> list[str]:
    """Speed over acceptance for the sliders' c and for both presets, each with a mark at the sliders' p."""
    depth, most = state["depth"], state["depth"] + 1.1
    base = top + PLOT_HEIGHT

    def place(p: float, speed: float) -> tuple[float, float]:
        return PLOT + PLOT_WIDTH * p, base - PLOT_HEIGHT * speed / most

    drawn = [text(PLOT - 64, top - 8, "times as fast as plain decoding", 13, bold=True)]
    for speed in range(depth + 2):
        _, y = place(0, speed)
        drawn += [line(PLOT, y, PLOT + PLOT_WIDTH, y, 1.6 if speed == 1 else 0.6, "5 4" if speed == 1 else ""),
                  text(PLOT - 10, y + 4, str(speed), 13, "end")]
    for percent in (0, 25, 50, 75, 100):
        drawn.append(text(PLOT + PLOT_WIDTH * percent / 100, base + 18, f"{percent} %", 13, "middle"))
    drawn.append(text(PLOT + PLOT_WIDTH / 2, base + 38, "acceptance p", 13, "middle"))
    p = state["acceptance"] / 100
    curves = [("yours", state["cost"] / 100, VERMILION, "", 3, facts["speed"]),
              ("full size", SIZES["full"], BLUE, "9 4", 1.8, facts["speed_full"]),
              ("nano", SIZES["nano"], BLACK, "2 4", 1.8, facts["speed_nano"])]
    for i, (name, share, colour, dashes, width, speed) in enumerate(curves):
        points = [place(step / 10, cost.speculative_speed(step / 10, share, depth)) for step in range(11)]
        drawn += [line(*a, *b, width, dashes, colour) for a, b in zip(points, points[1:])]
        x, y = place(p, speed / 100)
        drawn.append(_dot(x, y, colour, name[0].upper()))
        key = top + 34 + 46 * i
        drawn += [line(PLOT + PLOT_WIDTH + 34, key, PLOT + PLOT_WIDTH + 84, key, width, dashes, colour),
                  _dot(PLOT + PLOT_WIDTH + 59, key, colour, name[0].upper()),
                  text(PLOT + PLOT_WIDTH + 94, key + 5, f"{name}, c = {share:.3f}: {speed / 100:.2f} times", 14,
                       bold=i == 0)]
    return drawn


def _dot(x: float, y: float, colour: str, letter: str) -> str:
    return (f'<circle cx="{number(x)}" cy="{number(y)}" r="8.5" fill="{WHITE}" stroke="{colour}" stroke-width="2.5"/>'
            + text(x, y + 4.5, letter, 12, "middle", bold=True))


def draft_and_verify() -> View:
    """The view: sliders for pass, acceptance, the module's cost, depth and batch."""
    state = decode_state()
    return explore(
        render_draft_and_verify, decode_facts,
        step=slider("step: after which pass", state["step"], 1, TOKENS),
        acceptance=slider("acceptance p (%)", state["acceptance"], 0, 100),
        cost=slider("cost of the module c (% of a pass)", state["cost"], 0, 50),
        depth=slider("drafts a pass (depth D)", state["depth"], 1, 3),
        batch=slider("rows in the batch", state["batch"], 1, 3))


# ---- the same on paper ----------------------------------------------------------------------------------------------


@styled
def draft_and_verify_states(states: dict[str, dict]) -> Picture:
    """Timelines of several states, one under the other on one time axis: for pages without widgets."""
    facts = {name: decode_facts(state) for name, state in states.items()}
    picture = Picture(9, 1.0 + 0.86 * (1 + len(states)), "Timelines of plain decoding and of speculative decoding in "
                      "several settings. " + "; ".join(f"{name}: {each['speed_drawn'] / 100:.2f} times as fast"
                                                       for name, each in facts.items()) + ".")
    axes = picture.add_axes((0.25, 0.1, 0.73, 0.88))
    longest = max(TOKENS, *(facts[name]["passes"] * pass_time(state) for name, state in states.items()))
    for i in range(TOKENS):
        axes.barh(0, 1, 0.5, i, color=MAIN.colour, edgecolor=BLACK)
    for row, (name, state) in enumerate(states.items(), start=1):
        for i, each in enumerate(decode(state)[0]):
            start = i * pass_time(state)
            axes.barh(row, 1, 0.5, start, color=MAIN.colour, edgecolor=BLACK)
            axes.text(start + 0.5, row, f"+{each.new}", ha="center", va="center", color=WHITE, fontsize=10)
            axes.barh(row, pass_time(state) - 1, 0.5, start + 1, color=MODULE.colour, hatch="///", edgecolor=BLACK)
            axes.text(start + 0.5, row - 0.38, " ".join("\u2713" if accepted else "\u2717" for accepted in each.drafts),
                      ha="center", va="center", fontsize=10)
    axes.axvline(TOKENS, color=GREY, linestyle="--", linewidth=1)
    axes.set(xlim=(0, longest * 1.01), xlabel="time, in passes of the main model", yticks=range(len(states) + 1),
             ylim=(len(states) + 0.6, -0.6))
    axes.set_yticklabels([f"plain: {TOKENS} tokens", *(f"{name}\n{each['speed_drawn'] / 100:.2f} times as fast"
                                                       for name, each in facts.items())])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    return picture
