"""Chapter 02's view: which experts every token of a text takes, what keeps them busy, and what a bias changes.

Built-in texts come from stored snapshots of the experiment's runs (integers, results/router_snapshots.json). A typed
text goes through the models that a notebook has kept while it trained. Everything between scores and choice is
computed by the package's `route`, in float64.
"""

import copy
import json
import math
from collections.abc import Callable
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import NamedTuple

import ipywidgets
import matplotlib
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from tokenizers import Tokenizer
from torch import Tensor

from ..balance import max_violation
from ..config import ModelConfig
from ..data import Batch, encode
from ..kernels import Routing, route
from ..model import Transformer
from .explore import View, choice, explore, log_slider, slider, text_field
from .style import BLACK, DARK, ORANGE, SKY, VERMILION, WHITE, Fill, Picture, ink, styled
from .svg import line, number, page, rectangle, text

NANO = ModelConfig.preset("nano")       # 16 experts in 4 groups: the geometry of all that is shown
EXPERTS, GROUPS, KEPT, TOP_K = (NANO.n_routed_experts, NANO.n_group, NANO.topk_group, NANO.num_experts_per_tok)
SIZE = EXPERTS // GROUPS
MOST_TOKENS = 20                        # columns that fit
TEXTS, METHODS = ("code", "prose", "comment"), ("none", "sequence", "bias")
WORDS = {"none": "no balancing", "sequence": "the sequence-wise loss", "bias": "the bias"}


class Reading(NamedTuple):
    """What the routers of one model make of one text."""

    tokens: tuple[str, ...]
    scores: Tensor          # [layers, tokens, experts] float64, after the sigmoid
    bias: Tensor            # [layers, experts] float64
    load: Tensor            # [layers, experts]: how many tokens of a held-out batch chose each
    load_tokens: int
    trained: str            # with which balancing, and how long


class Decision(NamedTuple):
    """One layer's routing of the text, with the moved bias."""

    scores: Tensor          # [tokens, experts]
    bias: Tensor            # [experts]
    routing: Routing
    kept: Tensor            # [tokens, groups] bool


# ---- where readings come from ---------------------------------------------------------------------------------------


def load_snapshots(path: str | Path) -> dict:
    """The stored snapshots. Raises ValueError for a file that lacks a method or a text."""
    stored = json.loads(Path(path).read_text(encoding="utf-8"))
    absent = [*({*METHODS} - {*stored.get("methods", ())}), *({*TEXTS} - {*stored.get("texts", ())})]
    if absent:
        raise ValueError(f"{path} holds no snapshots of {', '.join(sorted(absent))}; the explorer needs the methods "
                         f"{', '.join(METHODS)} and the texts {', '.join(TEXTS)}")
    return stored


def stored_reading(stored: dict, text: str, method: str, moment: int) -> Reading:
    """One of the built-in texts at one snapshot. Scores are known to a thousandth, and 0 and 1 are never reached."""
    step = str(stored["steps"][moment])
    scores = torch.tensor(stored["scores"][method][step][text], dtype=torch.float64)
    return Reading(tuple(stored["texts"][text][:MOST_TOKENS]), scores.clamp(0.5, 999.5)[:, :MOST_TOKENS] / 1000,
                   torch.tensor(stored["bias"][method][step], dtype=torch.float64) / 1000,
                   torch.tensor(stored["load"][method][step]), stored["load_tokens"],
                   f"trained with {WORDS[method]}, {step} steps")


class LiveRun:
    """Models that a notebook keeps while it trains, and what they make of any text."""

    def __init__(self):
        self._kept: list[tuple[int, Transformer, Tensor]] = []
        self._tokenizer: Tokenizer | None = None
        self.read = lru_cache(maxsize=64)(self._read)

    @torch.no_grad()
    def keep(self, step: int, model: Transformer, tokenizer: Tokenizer, batch: Batch) -> None:
        """Keeps a copy of the model, and the load that it gives a held-out batch."""
        record: list[Routing] = []
        model(batch.tokens[:, :-1], record=record)
        self._tokenizer, self._tokens = tokenizer, batch.tokens[:, :-1].numel()
        self._kept.append((step, copy.deepcopy(model), torch.stack([routing.load for routing in record]).int()))

    @torch.no_grad()
    def _read(self, typed: str, part: float) -> Reading | None:
        """The text as the model saw it after that part (0 to 1) of what was kept; None as long as nothing is kept."""
        if not self._kept:
            return None
        step, model, load = self._kept[round(part * (len(self._kept) - 1))]
        ids = encode(self._tokenizer, typed)[:MOST_TOKENS]
        record: list[Routing] = []
        model(torch.tensor([ids]), record=record)
        routers = [block.mlp.gate for block in model.blocks if hasattr(block.mlp, "gate")]
        return Reading(tuple(spelled(self._tokenizer, i) for i in ids),
                       torch.stack([routing.logits.double().sigmoid() for routing in record]),
                       torch.stack([router.e_score_correction_bias.double() for router in routers]),
                       load, self._tokens, f"trained in this notebook, {step} steps")


def spelled(tokenizer: Tokenizer, index: int) -> str:
    """A token as text; its bytes, as in \\u27e8E6\\u27e9, if they are only a part of a character."""
    words = tokenizer.decode([index], skip_special_tokens=False)
    if "\ufffd" not in words:
        return words
    return "".join(f"\u27e8{_BYTES[letter]:02X}\u27e9" for letter in tokenizer.id_to_token(index))


def _byte_letters() -> dict[str, int]:
    """Byte-level BPE's letters: a printable byte is itself, the n-th other one is the letter 256 + n."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTES = _byte_letters()
SIGNS = str.maketrans({" ": "\u2423", "\n": "\u23ce", "\t": "\u21e5", "\r": "\u240d"})


def shown(token: str, most: int = 9) -> str:
    """A token with signs for blanks, and cut if it is long."""
    visible = "".join(c if c.isprintable() else f"\u27e8{ord(c):X}\u27e9" for c in token.translate(SIGNS))
    return visible if len(visible) <= most else visible[:most - 1] + "\u2026"


# ---- one layer's decision -------------------------------------------------------------------------------------------

NUDGE = 1e-7    # a score less an index's nudge: equal thousandths go to the lower index on every machine


def decide(scores: Tensor, bias: Tensor) -> Decision:
    """The package's routing of tokens with these scores [tokens, experts] and biases, and the groups that it kept."""
    scores = scores - NUDGE * torch.arange(EXPERTS, dtype=torch.float64)
    routing = route(scores.logit(), bias, n_group=GROUPS, topk_group=KEPT, top_k=TOP_K,
                    scaling_factor=NANO.routed_scaling_factor)
    worth = (scores + bias).unflatten(-1, (GROUPS, SIZE)).topk(2).values.sum(-1)
    kept = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, worth.topk(KEPT).indices, True)
    return Decision(scores, bias, routing, kept)


def moved(scores: Tensor, bias: Tensor, state: dict) -> Tensor:
    """The bias after the reader's shift of one expert and some updates on the load of this text alone."""
    bias = bias.clone()
    bias[state["expert"]] += state["shift"] / 1000
    for _ in range(state["updates"]):
        load = decide(scores, bias).routing.load.double()
        bias += state["gamma"] * torch.sign(load.mean() - load)
    return bias


class Seen(NamedTuple):
    """All that is drawn and said about one state."""

    reading: Reading
    before: Decision        # with the model's own bias
    after: Decision         # with the moved one
    cursor: int
    load: Tensor            # [experts] of the held-out batch


def look(state: dict, stored: dict, live: LiveRun) -> Seen | None:
    """None if a text was typed and no model has been kept."""
    last = len(stored["steps"]) - 1
    reading = live.read(state["typed"], state["moment"] / last) if state["typed"] else stored_reading(
        stored, state["text"], state["method"], state["moment"])
    if reading is None:
        return None
    layer = min(state["layer"], len(reading.scores)) - 1
    scores, bias = reading.scores[layer], reading.bias[layer]
    return Seen(reading, decide(scores, bias), decide(scores, moved(scores, bias, state)),
                min(state["cursor"], len(reading.tokens) - 1), reading.load[layer])


def changed(seen: Seen) -> int:
    """How many tokens take another set of experts than before the bias was moved."""
    before, after = (decision.routing.experts.sort(-1).values for decision in (seen.before, seen.after))
    return int((before != after).any(-1).sum())


def runner_up(seen: Seen) -> tuple[int, float]:
    """The best expert of a kept group that the cursor's token does not take, and by how much it lost."""
    decision, chosen = seen.after, seen.after.routing.experts[seen.cursor]
    value = (decision.scores + decision.bias)[seen.cursor]
    open_to = decision.kept[seen.cursor].repeat_interleave(SIZE).scatter(0, chosen, False)
    best = int(value.masked_fill(~open_to, -math.inf).argmax())
    return best, float(value[chosen[-1]] - value[best])


def facts_of(state: dict, stored: dict, live: LiveRun) -> dict:
    """Whole numbers: the cursor's experts and groups, its weights in thousandths, loads, tokens that changed."""
    seen = look(state, stored, live)
    if seen is None:
        return {"tokens": 0}
    routing = seen.after.routing
    return {"tokens": len(seen.reading.tokens), "chosen": tuple(routing.experts[seen.cursor].tolist()),
            "weights": tuple((1000 * routing.weights[seen.cursor]).round().int().tolist()),
            "groups kept": tuple(seen.after.kept[seen.cursor].nonzero()[:, 0].tolist()),
            "runner-up": runner_up(seen)[0], "lost by": round(1000 * runner_up(seen)[1]),
            "tokens changed": changed(seen), "fullest here": int(routing.load.max()),
            "emptiest here": int(routing.load.min()), "fullest in the batch": int(seen.load.max()),
            "emptiest in the batch": int(seen.load.min())}


# ---- drawing --------------------------------------------------------------------------------------------------------

LEFT, TOP, WIDE, HIGH, GAP = 148, 100, 22, 20, 8
BARS = {"this text": 598, "held-out batch": 756}        # left ends of the two columns of bars
LENGTH = 82                                             # of the longest bar
SHADES = [to_hex(matplotlib.colormaps["cividis"](i / 9)) for i in range(10)]
DROPPED = "#5A5A5A"
LEGEND = ("number: s in hundredths; shaded: the token's group is kept; outlined, bold: expert taken; band: pure "
          "chance, 2 sd; \u25b2 \u25bc outside it")


def render(state: dict, stored: dict, live: LiveRun) -> str:
    """A sentence and an SVG for one state. Pure, but for the models that `live` keeps."""
    seen = look(state, stored, live)
    if seen is None:
        sentence = "No model is trained in this kernel yet: run the cell that trains one, or empty the text field."
        return f"<p>{sentence}</p>" + page(sentence, 60, [text(20, 36, sentence, 15)])
    sentence = describe(seen, state)
    parts = [*_strip(seen), *_rows(seen, state), *_cells(seen), _frame(seen), *_loads(seen),
             *_detail(seen), text(4, 618, LEGEND, 12)]
    return f"<p>{escape(sentence)}</p>" + page("Routing explorer: " + sentence, 628, parts)


def describe(seen: Seen, state: dict) -> str:
    """What the cursor's token does, in words."""
    routing, cursor = seen.after.routing, seen.cursor
    second, distance = runner_up(seen)
    kept = " and ".join(str(g) for g in seen.after.kept[cursor].nonzero()[:, 0].tolist())
    values = (seen.after.scores + seen.after.bias)[cursor]
    better = [e for e in range(EXPERTS) if not seen.after.kept[cursor, e // SIZE]
              and values[e] > values[routing.experts[cursor, -1]]]
    barred = f" Expert {better[0]} has more, but its group was dropped." if better else ""
    return (f"Layer {state['layer']}, {seen.reading.trained}: token {cursor} "
            f"\u201c{shown(seen.reading.tokens[cursor])}\u201d goes to experts "
            f"{', '.join(map(str, sorted(routing.experts[cursor].tolist())))} (groups {kept} kept); expert {second} "
            f"lost it by {distance:.3f}.{barred} Fullest expert here: {int(routing.load.max())} tokens, mean "
            f"{routing.load.mean():.1f}; MaxVio of the held-out batch: {max_violation(seen.load.double()):.2f}. "
            f"Expert {state['expert']} moved by {signed(state['shift'] / 1000)}, then {state['updates']} updates at "
            f"gamma {state['gamma']:g}: {changed(seen)} tokens go elsewhere.")


def signed(value: float) -> str:
    """Three digits with a sign, and nothing below zero that rounds to it."""
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "\u2212")


def _row(expert: int) -> float:
    return TOP + HIGH * expert + GAP * (expert // SIZE)


def _strip(seen: Seen) -> list[str]:
    """Tokens, slanted above their columns; the cursor's is bold."""
    drawn = []
    for i, token in enumerate(seen.reading.tokens):
        x, y, here = LEFT + WIDE * i + WIDE / 2, TOP - 18, i == seen.cursor
        words = text(x, y, shown(token), 13, bold=here, colour=VERMILION_DARK if here else BLACK)
        drawn.append(words.replace("<text ", f'<text transform="rotate(-50 {number(x)} {number(y)})" ', 1))
    return drawn


def _frame(seen: Seen) -> str:
    """Around the cursor's column, drawn over its cells."""
    x, height = LEFT + WIDE * seen.cursor, _row(EXPERTS - 1) + HIGH - TOP + 15
    return (f'<rect x="{number(x - 1)}" y="{number(TOP - 12)}" width="{WIDE + 2}" height="{number(height)}" '
            f'fill="none" stroke="{VERMILION}" stroke-width="2.5" stroke-dasharray="6 3"/>')


VERMILION_DARK = "#9A4300"              # the same hue, dark enough for text


def _rows(seen: Seen, state: dict) -> list[str]:
    """Names of groups and experts, their biases, and which groups the cursor's token keeps."""
    drawn = [text(LEFT - 8, TOP - 8, "bias", 12, "end"), text(LEFT - 62, TOP - 8, "expert", 12, "end")]
    for group in range(GROUPS):
        y, kept = _row(group * SIZE), bool(seen.after.kept[seen.cursor, group])
        drawn += [text(4, y + 14, f"group {group}", 12),
                  text(4, y + 32, "\u2713 kept" if kept else "\u2717 out", 12, bold=kept)]
    for expert in range(EXPERTS):
        y, here = _row(expert) + 14, expert == state["expert"]
        drawn += [text(LEFT - 62, y, f"\u25b6 {expert}" if here else str(expert), 12, "end", bold=here),
                  text(LEFT - 8, y, signed(float(seen.after.bias[expert])), 12, "end",
                       bold=here)]
    return drawn


def _cells(seen: Seen) -> list[str]:
    """Each cell has s in hundredths; shaded if its group is kept for that token, outlined if the expert is taken."""
    scores, low, high = seen.after.scores, float(seen.after.scores.min()), float(seen.after.scores.max())
    boxes: dict[str, list[str]] = {}
    words: dict[tuple[str, bool], list[str]] = {}
    outlines = []
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, seen.after.routing.experts, True).tolist()
    kept, values = seen.after.kept.tolist(), scores.tolist()
    for i, row in enumerate(values):
        x = LEFT + WIDE * i
        for expert, value in enumerate(row):
            y, in_kept = _row(expert), kept[i][expert // SIZE]
            shade = SHADES[min(int(10 * (value - low) / (high - low + 1e-9)), 9)] if in_kept else WHITE
            box = f"M{number(x)} {number(y)}h{WIDE}v{HIGH}h-{WIDE}z"
            boxes.setdefault(shade, []).append(box)
            taken = chosen[i][expert]
            if taken:
                outlines.append(f"M{number(x + 1.5)} {number(y + 1.5)}h{WIDE - 3}v{HIGH - 3}h-{WIDE - 3}z")
            key = (ink(shade) if in_kept else DROPPED, taken)
            words.setdefault(key, []).append(f'<tspan x="{number(x + WIDE / 2)}" y="{number(y + 14)}">'
                                             f"{int(100 * value):02d}</tspan>")
    drawn = [f'<path d="{"".join(part)}" fill="{shade}" stroke="#DDDDDD" stroke-width="0.6"/>'
             for shade, part in boxes.items()]
    drawn.append(f'<path d="{"".join(outlines)}" fill="none" stroke="{WHITE}" stroke-width="4"/>'
                 f'<path d="{"".join(outlines)}" fill="none" stroke="{BLACK}" stroke-width="2.4"/>')
    drawn += [f'<text font-size="12" text-anchor="middle" fill="{colour}" font-weight="{"bold" if bold else "normal"}">'
              f'{"".join(part)}</text>' for (colour, bold), part in words.items()]
    for group in range(GROUPS):
        drawn.append(f'<rect x="{LEFT}" y="{number(_row(group * SIZE))}" width="{WIDE * len(values)}" '
                     f'height="{SIZE * HIGH}" fill="none" stroke="{DARK}" stroke-width="1"/>')
    return drawn


def _loads(seen: Seen) -> list[str]:
    """Bars at the experts' rows: tokens of this text, and of the held-out batch, with the mean and chance's band."""
    drawn = []
    counts = {"this text": seen.after.routing.load, "held-out batch": seen.load}
    for (name, load), tokens in zip(counts.items(), (len(seen.reading.tokens), seen.reading.load_tokens)):
        left, mean = BARS[name], tokens * TOP_K / EXPERTS
        spread = 2 * math.sqrt(mean * (1 - TOP_K / EXPERTS))
        unit = LENGTH / max(float(load.max()), mean + spread)
        low, high = left + unit * max(mean - spread, 0), left + unit * (mean + spread)
        bottom = _row(EXPERTS - 1) + HIGH
        drawn += [text(left, TOP - 24, name, 13, bold=True), text(left, TOP - 8, f"{tokens:,} tokens", 12),
                  rectangle(low, TOP, high - low, bottom - TOP, Fill("#CFE8F8"), outline=SKY)]
        for expert, count in enumerate(load.tolist()):
            y, sign = _row(expert), " \u25b2" if count > mean + spread else " \u25bc" if count < mean - spread else ""
            drawn += [rectangle(left, y + 4, unit * count, HIGH - 8, Fill(ORANGE)),
                      text(left + LENGTH + 6, y + 14, f"{int(count):,}{sign}", 12)]
        drawn.append(line(left + unit * mean, TOP - 4, left + unit * mean, bottom + 4, 1.6, "5 4", BLACK))
    return drawn


def _detail(seen: Seen) -> list[str]:
    """The cursor's token: s as bars, s + b as hollow ones, and the weights of the chosen."""
    base, height, step = 576, 96, WIDE * MOST_TOKENS / EXPERTS
    scores, bias, routing = seen.after.scores[seen.cursor], seen.after.bias, seen.after.routing
    values = scores + bias
    low, high = min(float(scores.min()), float(values.min())) - 0.02, max(float(scores.max()), float(values.max()))
    unit = height / (high - low)
    chosen = routing.experts[seen.cursor].tolist()
    drawn = [text(4, base - 82, "s: filled", 12), text(4, base - 66, "s + b: hollow", 12),
             text(4, base - 50, "taken: thick, bold", 12), text(4, base - 34, "bars start at", 12),
             text(4, base - 20, f"{low:.2f}", 12), line(LEFT, base, LEFT + WIDE * MOST_TOKENS, base)]
    for expert in range(EXPERTS):
        x, s, value = LEFT + step * expert + 3, float(scores[expert]), float(values[expert])
        kept = bool(seen.after.kept[seen.cursor, expert // SIZE])
        drawn.append(rectangle(x + 3, base - unit * (s - low), step - 12, unit * (s - low),
                               Fill(SKY if kept else WHITE), outline=DARK))
        drawn.append(f'<rect x="{number(x)}" y="{number(base - unit * (value - low))}" width="{number(step - 6)}" '
                     f'height="{number(unit * (value - low))}" fill="none" stroke="{BLACK}" '
                     f'stroke-width="{2.4 if expert in chosen else 1}"/>')
        drawn.append(text(x + step / 2 - 3, base + 15, str(expert), 12, "middle", bold=expert in chosen))
    second, distance = runner_up(seen)
    lines = [f"expert {e}: s + b {float(values[e]):.3f}, s {float(scores[e]):.3f}, weight {float(w):.2f}"
             for e, w in zip(chosen, routing.weights[seen.cursor])]
    lines.append(f"next: expert {second}, s + b {float(values[second]):.3f}, by {distance:.3f}")
    drawn.append(text(BARS["this text"], base - 92, "weights, adding up to 2.5", 13, bold=True))
    return drawn + [text(BARS["this text"], base - 72 + 18 * i, words, 12) for i, words in enumerate(lines)]


# ---- the view -------------------------------------------------------------------------------------------------------

def start_state(stored: dict, **changes) -> dict:
    """How the view opens, some controls moved: the code, at the end of a training with the bias."""
    return {"text": "code", "typed": "", "method": "bias", "moment": len(stored["steps"]) - 1, "layer": 3, "cursor": 9,
            "expert": 5, "shift": 0, "gamma": 0.01, "updates": 0} | changes


def routing_explorer(stored: dict, live: LiveRun) -> View:
    """The view. `stored` from `load_snapshots`; `live` keeps the notebook's own models."""
    state = start_state(stored)
    controls: dict[str, ipywidgets.Widget] = {
        "text": choice("built-in text", state["text"], list(TEXTS)),
        "typed": text_field("or type your own (empty: built-in)", state["typed"]),
        "method": choice("trained with (built-in texts)", state["method"], list(METHODS)),
        "moment": slider(f"snapshot (0 start, {state['moment']} end)", state["moment"], 0, state["moment"]),
        "layer": slider("layer with experts", state["layer"], 1, NANO.num_hidden_layers - NANO.first_k_dense_replace),
        "cursor": slider("cursor: token", state["cursor"], 0, MOST_TOKENS - 1),
        "expert": slider("expert whose bias you move", state["expert"], 0, EXPERTS - 1),
        "shift": slider("its bias moved by (thousandths)", state["shift"], -300, 300, 5),
        "gamma": log_slider("gamma of the updates below", state["gamma"], -4, -1),
        "updates": slider("updates on this text's load", state["updates"], 0, 60)}
    return explore(lambda values: render(values, stored, live), lambda values: facts_of(values, stored, live),
                   **controls)


@styled
def explorer_states(states: dict[str, dict], stored: dict) -> Picture:
    """Several states side by side: who takes what, and the load of the text, for pages without widgets."""
    shown_states = {name: look(start_state(stored, **state), stored, LiveRun()) for name, state in states.items()}
    fullest = "; ".join(f"{name}: fullest expert {int(seen.after.routing.load.max())} tokens"
                        for name, seen in shown_states.items())
    picture = Picture(8.6, 4.2, "Tokens against experts for several states of the explorer, chosen experts dark, "
                      f"kept groups shaded. {fullest}.", 20)
    for column, (axes, (name, seen)) in enumerate(zip(picture.subplots(1, len(states), sharey=True),
                                                       shown_states.items())):
        _state_panel(axes, seen)
        axes.set_title(name, fontsize=10)
        axes.set_ylabel("expert") if column == 0 else axes.set_xticklabels([])
    picture.tight_layout()
    return picture


def _state_panel(axes, seen: Seen) -> None:
    tokens, routing = seen.reading.tokens, seen.after.routing
    for i in range(len(tokens)):
        for group in range(GROUPS):
            if seen.after.kept[i, group]:
                axes.add_patch(Rectangle((i - 0.5, group * SIZE - 0.5), 1, SIZE, facecolor="#CFE8F8", linewidth=0))
        for expert in routing.experts[i].tolist():
            axes.add_patch(Rectangle((i - 0.3, expert - 0.3), 0.6, 0.6, facecolor=BLACK, linewidth=0))
    for expert, count in enumerate(routing.load.int().tolist()):
        axes.text(len(tokens) + 0.1, expert, str(count), va="center", fontsize=9,
                  weight="bold" if count == int(routing.load.max()) else "normal")
    for group in range(1, GROUPS):
        axes.axhline(group * SIZE - 0.5, color=DARK, linewidth=0.8)
    axes.set(xlim=(-0.5, len(tokens) + 1.8), ylim=(EXPERTS - 0.5, -0.5), yticks=range(EXPERTS))
    axes.set_xticks(range(len(tokens)), [shown(token, 6).replace("$", r"\$") for token in tokens], rotation=90,
                    fontsize=9, family="DejaVu Sans Mono")
    axes.text(len(tokens) + 0.6, -0.75, "load", ha="center", fontsize=9, clip_on=False)
