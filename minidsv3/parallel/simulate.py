"""What an order costs: start and end of every action on every rank, from the durations of F, I, W and F&B.

A chunk can start when its rank is free and what it needs is there: a forward needs the forward of the stage before,
a backward that of the stage after and its own forward, a W its own I. A rank keeps its order even if it could do
something else meanwhile. An F&B block starts when both of its halves can, and hands over both results at its end.

How communication is modelled: `communication` is the time of one exchange between experts (dispatch and combine of one
chunk). Every F and every I has one, W has none. A lone action's exchange is exposed: the rank waits for it. In an F&B
block the exchanges hide behind the work as far as `overlapped`, the length of the whole block, leaves them room.

Where the model ends: handing activations to the next rank takes no time, all stages are equally long unless `stages`
says otherwise, an exchange takes no processors away from the work, and there is no optimiser step. A real cluster
waits longer than this.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .schedule import Action, Orders, Overlapped


class Span(NamedTuple):
    """An action with its start and end, in the units of the durations."""

    start: float
    end: float
    action: Action | Overlapped


@dataclass(frozen=True)
class Timeline:
    """What `simulate` returns; the lists have one entry a rank."""

    makespan: float              # from the first start to the last end
    idle: list[float]            # makespan minus the rank's own work
    spans: list[list[Span]]      # in order, to draw
    in_flight: list[int]         # the most chunks at once between the start of their F and the end of their W
    exposed: list[float]         # time the rank spends in exchanges that hide behind nothing


def simulate(orders: Orders, forward: float = 1, backward_input: float = 1, backward_weight: float = 1,
             overlapped: float | None = None, communication: float = 0, stages: Sequence[float] = ()) -> Timeline:
    """Runs `orders` as early as the dependencies allow.

    The durations are those of one chunk's F, I and W without exchange, in any unit; B takes I + W. `overlapped` is the
    length of one F&B block with its two exchanges; None overlaps nothing: F and then B, each with its exchange.
    `stages` multiplies the work of each stage's chunks, and blocks in proportion; all are equal without it.
    Raises ValueError if a duration is negative or not finite, `stages` leaves one out, or the orders wait for each
    other for ever.
    """
    last = max(part.stage for order in orders for action in order for part in action.parts)
    if stages and len(stages) <= last:
        raise ValueError(f"stages has {len(stages)} entries; the orders work on {last + 1} stages")
    costs = _Costs(forward, backward_input, backward_weight, overlapped, communication, tuple(stages))
    spans = _run(orders, costs)
    makespan = max(span.end for rank in spans for span in rank)
    return Timeline(makespan, [makespan - sum(span.end - span.start for span in rank) for rank in spans], spans,
                    [_most_in_flight(order) for order in orders],
                    [sum(costs.exposed(action) for action in order) for order in orders])


@dataclass(frozen=True)
class _Costs:
    forward: float
    backward_input: float
    backward_weight: float
    overlapped: float | None
    communication: float
    stages: tuple[float, ...]

    def __post_init__(self):
        for name in ("forward", "backward_input", "backward_weight", "overlapped", "communication"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value}; a duration is a finite number of at least 0")
        if min(self.stages, default=0) < 0:
            raise ValueError(f"stages has {min(self.stages)}; work is multiplied by at least 0")

    def work(self, action: Action | Overlapped, equal: bool = False) -> float:
        kinds = {"F": self.forward, "I": self.backward_input, "W": self.backward_weight,
                 "B": self.backward_input + self.backward_weight}
        return sum(kinds[part.kind] * (1 if equal or not self.stages else self.stages[part.stage])
                   for part in action.parts)

    def length(self, action: Action | Overlapped) -> float:
        if not self._overlaps(action):
            return self.work(action) + self.exposed(action)
        equal = self.work(action, equal=True)
        return self.overlapped * (self.work(action) / equal if equal else 1)

    def exposed(self, action: Action | Overlapped) -> float:
        exchanges = self.communication * sum(part.kind != "W" for part in action.parts)
        return min(max(self.length(action) - self.work(action), 0), exchanges) if self._overlaps(action) else exchanges

    def _overlaps(self, action: Action | Overlapped) -> bool:
        return isinstance(action, Overlapped) and self.overlapped is not None


def _run(orders: Orders, costs: _Costs) -> list[list[Span]]:
    """Walks over the ranks, and on each as far as its order goes, until all orders are done."""
    before, after = _neighbours(orders)
    ends: dict[tuple, float] = {}                 # (what is done: F, I or W; chunk) -> when
    spans: list[list[Span]] = [[] for _ in orders]
    moved = True
    while moved:
        moved = False
        for order, done in zip(orders, spans):
            while len(done) < len(order):
                action = order[len(done)]
                needed = [need for part in action.parts for need in _needs(part, before, after)]
                if any(need not in ends for need in needed):
                    break
                start = max([ends[need] for need in needed] + [span.end for span in done[-1:]], default=0)
                end = start + costs.length(action)
                done.append(Span(start, end, action))
                ends |= {(kind, _chunk(part)): end for part in action.parts for kind in _does(part)}
                moved = True
    stuck = [f"rank {rank} at {order[len(done)]}" for rank, (order, done) in enumerate(zip(orders, spans))
             if len(done) < len(order)]
    if stuck:
        raise ValueError(f"these orders wait for each other for ever: {', '.join(stuck)}; "
                         "each action needs one that stands behind it, or that nobody does")
    return spans


def _neighbours(orders: Orders) -> tuple[dict, dict]:
    """The place (direction, stage) before and after each place, where there is one.

    Both directions of DualPipe have a stage 0: two chains. In DualPipeV the first stage of b follows the last of a.
    """
    places = {(part.direction, part.stage) for order in orders for action in order for part in action.parts}
    before = {}
    for direction, stage in places:
        for place in (("a", stage - 1), (direction, stage - 1)):   # its own direction wins
            if place in places:
                before[direction, stage] = place
    return before, {place: follower for follower, place in before.items()}


def _chunk(part: Action) -> tuple:
    return part.direction, part.stage, part.micro_batch


def _needs(part: Action, before: dict, after: dict) -> list[tuple]:
    """What must have ended before `part` can start, besides what its rank does before."""
    place = part.direction, part.stage
    if part.kind == "F":
        return [("F", (*before[place], part.micro_batch))] if place in before else []
    if part.kind == "W":
        return [("I", _chunk(part))]
    return [("F", _chunk(part))] + ([("I", (*after[place], part.micro_batch))] if place in after else [])


def _does(part: Action) -> str:
    return "IW" if part.kind == "B" else part.kind


def longest_path(orders: Orders, timeline: Timeline) -> list[tuple[int, Span]]:
    """Why the step is as long as it is: (rank, span)s from time 0 to the end, each starting when the one before ends.

    `timeline` is that of `orders`. What is on the path and not among a rank's own actions is that rank's bubble.
    """
    before, after = _neighbours(orders)
    made = {(kind, _chunk(part)): (rank, index) for rank, spans in enumerate(timeline.spans)
            for index, span in enumerate(spans) for part in span.action.parts for kind in _does(part)}
    rank, index = max(((rank, len(spans) - 1) for rank, spans in enumerate(timeline.spans)),
                      key=lambda place: timeline.spans[place[0]][place[1]].end)
    path = [(rank, timeline.spans[rank][index])]
    while path[-1][1].start > 0:
        earlier = [(rank, index - 1)] if index else []
        earlier += [made[need] for part in path[-1][1].action.parts for need in _needs(part, before, after)]
        rank, index = max(earlier, key=lambda place: timeline.spans[place[0]][place[1]].end)
        path.append((rank, timeline.spans[rank][index]))
    return path[::-1]


def _most_in_flight(order: list[Action | Overlapped]) -> int:
    """A block's forward begins before its backward has freed anything."""
    most = held = 0
    for action in order:
        held += sum(part.kind == "F" for part in action.parts)
        most = max(most, held)
        held -= sum("W" in _does(part) for part in action.parts)
    return most


def bubble(method: str, ranks: int, forward: float = 1, backward_input: float = 1, backward_weight: float = 1,
           overlapped: float | None = None) -> float:
    """Table 2's idle time of a rank, with PP = `ranks`, or 2 `ranks` for DualPipeV, whose table counts stages.

        1F1B        (PP - 1) (F + B)
        ZB1P        (PP - 1) (F + B - 2W)
        DualPipe    (PP/2 - 1) (F&B + B - 3W)        DualPipeV the same

    B is the full backward. `overlapped` None stands for F + B. With communication, pass F and I with their exchange.
    The first is a law. ZB1P's holds for F = I >= W and at least PP micro-batches, DualPipe's for F = I >= W and
    max(F, B) <= F&B <= F + B: it is the idle time of the four innermost ranks, and of the others too if F&B = F + B;
    with F&B < F + B they have fewer blocks and idle less. For F = I < W DualPipe's law is (PP/2 - 1) (F&B + I - W -
    min(W, I)). For F != I simulate: the formulas fail in both directions.
    Raises ValueError for another method.
    """
    full = backward_input + backward_weight
    block = forward + full if overlapped is None else overlapped
    dual = block + full - 3 * backward_weight
    formulas = {"1F1B": (ranks - 1) * (forward + full), "ZB1P": (ranks - 1) * (forward + full - 2 * backward_weight),
                "DualPipe": (ranks / 2 - 1) * dual, "DualPipeV": (ranks - 1) * dual}
    if method not in formulas:
        raise ValueError(f"bubble knows no method {method!r}; table 2 has {', '.join(formulas)}")
    return formulas[method]
