"""Chapter 07's view: a pipeline's timeline from its schedule and its durations, with a cursor that stops the time.

Orders come from `parallel.schedule`, times from `parallel.simulate`. Overlap on means that the two exchanges of a block
hide behind its work as far as they can: the block takes max(F + B, twice the exchange).
"""

from html import escape
from typing import NamedTuple

import ipywidgets

from ..parallel.schedule import Orders, Overlapped, dualpipe, dualpipev, one_f_one_b, zb1p
from ..parallel.simulate import Span, Timeline, bubble, simulate
from .dualpipe import PASS, Piece, pieces
from .explore import LABEL, WIDE, View, choice, explore, slider
from .style import BLACK, DARK, PASSES, VERMILION
from .svg import line, number, page, rectangle, text

SCHEDULES = {"1F1B": one_f_one_b, "ZB1P": zb1p, "DualPipe": dualpipe, "DualPipeV": dualpipev}
START = {"schedule": "DualPipe", "ranks": 8, "micro_batches": 20, "forward": 10, "input": 10, "weight": 10,
         "exchange": 10, "overlap": True, "formula": False, "cursor": 40}


class Seen(NamedTuple):
    """All that is drawn and said about one state. Times are in units, durations those of `simulate`."""

    orders: Orders
    durations: dict
    timeline: Timeline
    now: float
    formula: float          # the makespan, if table 2's bubble were right on the innermost rank


def look(state: dict) -> Seen:
    """The timeline of a state. Raises ValueError for sizes that its schedule refuses."""
    orders = SCHEDULES[state["schedule"]](state["ranks"], state["micro_batches"])
    forward, inputs, weights, exchange = (state[name] / 10 for name in ("forward", "input", "weight", "exchange"))
    block = max(forward + inputs + weights, 2 * exchange) if state["overlap"] else None
    durations = dict(forward=forward, backward_input=inputs, backward_weight=weights, overlapped=block,
                     communication=exchange)
    timeline = simulate(orders, **durations)
    inmost = state["ranks"] // 2 if state["schedule"] == "DualPipe" else state["ranks"] - 1
    work = timeline.makespan - timeline.idle[inmost]
    waits = bubble(state["schedule"], state["ranks"], forward + exchange, inputs + exchange, weights, block)
    return Seen(orders, durations, timeline, timeline.makespan * state["cursor"] / 100, work + waits)


class Moment(NamedTuple):
    """What one rank does at the cursor."""

    action: str             # of the order, or "waits", or "has not begun", or "is done"
    held: int               # chunks in flight
    idle: float             # time without work so far


def moment(spans: list[Span], now: float) -> Moment:
    """A rank at a time; an action that ends at that very time has ended."""
    begun = [span for span in spans if span.start <= now]
    ended = [span for span in begun if span.end <= now]
    held = sum(part.kind == "F" for span in begun for part in span.action.parts) - sum(
        part.kind in "WB" for span in ended for part in span.action.parts)
    busy = sum(min(span.end, now) - span.start for span in begun)
    if len(begun) > len(ended):
        action = str(begun[-1].action)
    else:
        action = "is done" if len(ended) == len(spans) else "waits" if begun else "has not begun"
    return Moment(action, held, now - busy)


def facts_of(state: dict) -> dict:
    """Times in tenths of a unit; lists have one entry a rank. A refused size has its sentence alone."""
    try:
        seen = look(state)
    except ValueError as refused:
        return {"refused": str(refused)}
    timeline = seen.timeline
    moments = [moment(spans, seen.now) for spans in timeline.spans]
    return {"makespan": tenths(timeline.makespan), "idle": tuple(map(tenths, timeline.idle)),
            "unhidden exchange": tuple(map(tenths, timeline.exposed)), "most in flight": tuple(timeline.in_flight),
            "by formula": tenths(seen.formula), "now": tenths(seen.now),
            "actions": tuple(each.action for each in moments), "in flight": tuple(each.held for each in moments)}


def tenths(time: float) -> int:
    return round(10 * time)


# ---- drawing --------------------------------------------------------------------------------------------------------

LEFT, TOP, LONG, HIGH, GAP = 52, 64, 530, 30, 6         # of the lanes
COLUMNS = {"now": 606, "in flight": 718, "idle so far": 792}        # left ends of the words beside the lanes
SEEN_MARK = 6.0                                         # pixels that a piece needs for its mark to be seen


def render(state: dict) -> str:
    """A sentence and an SVG for one state."""
    try:
        seen = look(state)
    except ValueError as refused:
        sentence = f"{refused}."
        return f"<p>{escape(sentence)}</p>" + page(sentence, 60, [text(20, 36, sentence, 15)])
    bottom = TOP + len(seen.orders) * (HIGH + GAP)
    drawn = [*_lanes(seen), *_words(seen), *_cursor(seen, bottom), *_legend(bottom + 44)]
    if state["formula"]:
        drawn += _formula(seen, bottom)
    sentence = describe(seen, state)
    return f"<p>{escape(sentence)}</p>" + page("Schedule explorer: " + sentence, bottom + 80, drawn)


def describe(seen: Seen, state: dict) -> str:
    """The totals, and what every rank does at the cursor, in words."""
    timeline = seen.timeline
    ranks = "; ".join(f"rank {rank} {moment(spans, seen.now).action}" for rank, spans in enumerate(timeline.spans))
    said = f" The formula says {seen.formula:.1f}." if state["formula"] else ""
    return (f"{state['schedule']} with {len(seen.orders)} ranks and {state['micro_batches']} micro-batches takes "
            f"{timeline.makespan:.1f}. A rank idles for {span_of(timeline.idle)}, and waits for "
            f"{span_of(timeline.exposed)} in exchanges that nothing hides.{said} At {seen.now:.1f}: {ranks}.")


def span_of(times: list[float]) -> str:
    """The least and the largest of them."""
    low, high = f"{min(times):.1f}", f"{max(times):.1f}"
    return low if low == high else f"{low} to {high}"


def _x(seen: Seen, time: float) -> float:
    return LEFT + LONG * time / max(seen.timeline.makespan, seen.formula)


def _y(rank: int) -> float:
    return TOP + rank * (HIGH + GAP)


def _lanes(seen: Seen) -> list[str]:
    """One path for all pieces of a kind and height, then their marks, crosses in idle time, frames of blocks."""
    strokes: dict[tuple[str, float], list[str]] = {}
    marks: list[str] = []
    frames: list[str] = []
    for rank, spans in enumerate(seen.timeline.spans):
        for span in spans:
            for piece in pieces(span, **seen.durations):
                x, height = _x(seen, piece.start), HIGH * (piece.top - piece.bottom)
                y, width = _y(rank) + HIGH * (1 - piece.top) + height / 2, _x(seen, piece.end) - x
                strokes.setdefault((piece.kind, height), []).append(f"M{_short(x)} {_short(y)}h{_short(width - 0.6)}")
                if width >= SEEN_MARK:
                    marks.append(_mark(piece.kind, x, y, width, height))
            if isinstance(span.action, Overlapped):
                x = _x(seen, span.start)
                width = _short(_x(seen, span.end) - x)
                frames.append(f"M{_short(x)} {_y(rank)}h{width}v{HIGH}h-{width}z")
    drawn = [_path(path, PASSES[PASS[kind]].colour, height) for (kind, height), path in strokes.items()]
    return [*drawn, _path(marks, BLACK, 0.7), _path(_crosses(seen), "#999999", 0.7), _path(frames, BLACK, 1.2)]


def _crosses(seen: Seen) -> list[str]:
    """Where a rank is idle: a row of crosses, each at most 18 wide."""
    drawn = []
    for rank, spans in enumerate(seen.timeline.spans):
        ends, starts = [0, *(span.end for span in spans)], [*(span.start for span in spans), seen.timeline.makespan]
        for end, start in zip(ends, starts):
            x, width = _x(seen, end), _x(seen, start) - _x(seen, end)
            count = int(width / 18) + 1
            each = _short(width / count)
            if width >= 1:
                drawn.append(f"M{_short(x)} {_y(rank)}" + count * f"l{each} {HIGH}m-{each} 0l{each}-{HIGH}")
    return drawn


def _mark(kind: str, x: float, y: float, width: float, height: float) -> str:
    """A line through a piece that says its kind without colour: I rises, W falls, an exchange is level."""
    rise = {"F": 0, "I": -height, "W": height, "X": 0}[kind]
    return "" if kind == "F" else f"M{_short(x)} {_short(y - rise / 2)}l{_short(width)} {_short(rise)}"


def _path(parts: list[str], colour: str, width: float) -> str:
    return f'<path d="{"".join(parts)}" fill="none" stroke="{colour}" stroke-width="{width:g}"/>'


def _short(value: float) -> str:
    """A coordinate at one digit, without a zero behind the point: there are thousands of them."""
    return number(value).removesuffix(".0")


def _words(seen: Seen) -> list[str]:
    """Names of the ranks, and beside each lane what it does at the cursor."""
    drawn = [text(x, TOP - 10, name, 13, bold=True) for name, x in COLUMNS.items()]
    for rank, spans in enumerate(seen.timeline.spans):
        at, y = moment(spans, seen.now), _y(rank) + HIGH / 2 + 5
        drawn += [text(LEFT - 8, y, f"rank {rank}", 12, "end"), text(COLUMNS["now"], y, at.action, 13, bold=True),
                  text(COLUMNS["in flight"], y, f"{at.held} of {seen.timeline.in_flight[rank]}", 12),
                  text(COLUMNS["idle so far"], y, f"{at.idle:.1f} of {seen.timeline.idle[rank]:.1f}", 12)]
    return drawn


def _cursor(seen: Seen, bottom: float) -> list[str]:
    x, total = _x(seen, seen.now), _x(seen, seen.timeline.makespan)
    return [line(x, TOP - 6, x, bottom + 4, 2.2, colour=VERMILION),
            text(LEFT, bottom + 20, f"at the line: {seen.now:.1f}", 13, colour="#9A4300", bold=True),
            text(total, bottom + 20, f"in all {seen.timeline.makespan:.1f}", 14, "end", bold=True)]


def _formula(seen: Seen, bottom: float) -> list[str]:
    x = _x(seen, seen.formula)
    return [line(x, TOP - 20, x, bottom + 4, 2, "6 4", BLACK),
            text(x, TOP - 26, f"formula {seen.formula:.1f}", 13, "end", bold=True)]


def _legend(y: float) -> list[str]:
    words = {"forward": "F", "backward for inputs": "I", "backward for weights": "W",
             "communication": "exchange that nothing hides", "idle": "idle"}
    drawn, x = [], float(LEFT)
    for name, said in words.items():
        drawn += [rectangle(x, y - 12, 24, 15, PASSES[name], outline=DARK), text(x + 30, y, said, 12)]
        x += 62 + 7.4 * len(said)
    return [*drawn, text(LEFT, y + 24, "frame: a block F&B; its forward is above its backward if they overlap", 12)]


# ---- the view -------------------------------------------------------------------------------------------------------


def check_box(description: str, value: bool) -> ipywidgets.Checkbox:
    return ipywidgets.Checkbox(value, description=description, style=LABEL, layout=WIDE)


def schedule_explorer() -> View:
    """The view: it opens on figure 5, with an exchange in every forward and every backward."""
    return explore(
        render, facts_of,
        schedule=choice("schedule", START["schedule"], list(SCHEDULES)),
        ranks=slider("ranks P", START["ranks"], 2, 8, 2),
        micro_batches=slider("micro-batches M", START["micro_batches"], 4, 20, 2),
        forward=slider("forward F (tenths of a unit)", START["forward"], 2, 30),
        input=slider("backward for input I (tenths)", START["input"], 2, 30),
        weight=slider("backward for weights W (tenths)", START["weight"], 2, 30),
        exchange=slider("exchange in each F and I (tenths)", START["exchange"], 0, 30),
        overlap=check_box("blocks overlap", START["overlap"]),
        formula=check_box("line of the formula", START["formula"]),
        cursor=slider("cursor (% of the step)", START["cursor"], 0, 100))
