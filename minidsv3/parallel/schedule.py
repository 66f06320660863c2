"""Orders of a pipeline: which rank works on which micro-batch when (report section 3.2.1, figures 4 and 5, table 2).

A stage is a piece of the model, a chunk is one micro-batch in one stage. Work on a chunk has four kinds:

    F   forward                             I   backward for the input: the stage before waits for it
    B   the whole backward, I then W        W   backward for the weights: nobody waits, so it may fill a hole

and F&B is a forward and a backward of two different micro-batches computed as one block: each one's exchange between
experts hides behind the other's work. DualPipe is an order that has such blocks for most of a step. To have a
forward and a backward at hand it feeds the pipeline from both ends: rank r holds stage r for direction a (0 -> P-1)
and a copy of stage P-1-r for direction b (P-1 -> 0). DualPipeV folds one chain of 2P stages instead: rank r holds
stages r (descending, a) and 2P-1-r (ascending, b), and needs no copies.

Each function returns one list of actions a rank. An order says nothing about time: see `simulate`.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Action:
    """Work on one chunk: `kind` is F, I, W or B, `direction` a or b, `micro_batch` counts from 0 in each direction."""

    kind: str
    direction: str
    micro_batch: int
    stage: int

    def __str__(self) -> str:
        return f"{self.kind}{self.direction}{self.micro_batch}"

    @property
    def parts(self) -> tuple["Action", ...]:
        """The actions that this one consists of: itself."""
        return (self,)


@dataclass(frozen=True)
class Overlapped:
    """F&B: a forward of one micro-batch and the whole backward of another, as one block."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"{self.forward}&{self.backward}"

    @property
    def stage(self) -> tuple[int, int]:
        """The stages of the forward and of the backward: both live on the rank, and they differ."""
        return self.forward.stage, self.backward.stage

    @property
    def parts(self) -> tuple[Action, Action]:
        return self.forward, self.backward


Orders = list[list[Action | Overlapped]]


class Seat(NamedTuple):
    """One of the stages that a rank holds, and the direction in which micro-batches come to it."""

    direction: str
    stage: int


class _Order:
    """One rank's actions, added in turn: micro-batches are numbered as they come, and W is first in, first out."""

    def __init__(self):
        self.actions: list[Action | Overlapped] = []
        self._count = Counter()
        self._waiting: deque[Action] = deque()   # one queue for all stages of the rank

    def add(self, *pairs: tuple[str, Seat]) -> None:
        """Adds the next micro-batch of each (kind, seat), kinds F, I and B."""
        self.actions += [self._next(kind, seat) for kind, seat in pairs]

    def overlap(self, forward: Seat, backward: Seat) -> None:
        self.actions.append(Overlapped(self._next("F", forward), self._next("B", backward)))

    def add_weights(self, count: int = 1) -> None:
        """Adds the `count` oldest backwards for weights that wait."""
        self.actions += [self._waiting.popleft() for _ in range(count)]

    def _next(self, kind: str, seat: Seat) -> Action:
        way = (kind == "F", seat)            # forwards and backwards are counted apart
        action = Action(kind, seat.direction, self._count[way], seat.stage)
        self._count[way] += 1
        if kind == "I":
            self._waiting.append(Action("W", seat.direction, action.micro_batch, seat.stage))
        return action


def one_f_one_b(ranks: int, micro_batches: int) -> Orders:
    """1F1B: rank r runs P - r - 1 forwards ahead, then one forward and one backward in turn, then the backwards left.

    Raises ValueError unless both numbers are at least 1.
    """
    _demand_positive(ranks, micro_batches)
    return [_one_f_one_b(Seat("a", rank), min(ranks - rank - 1, micro_batches), micro_batches)
            for rank in range(ranks)]


def _one_f_one_b(seat: Seat, ahead: int, micro_batches: int) -> list:
    order = _Order()
    order.add(*[("F", seat)] * ahead)
    order.add(*[("F", seat), ("B", seat)] * (micro_batches - ahead))
    order.add(*[("B", seat)] * ahead)
    return order.actions


def zb1p(ranks: int, micro_batches: int) -> Orders:
    """ZB1P, the zero-bubble paper's H1: 1F1B whose backwards for weights wait until there is a hole to fill.

    Rank r lets r of them wait, so that all ranks hold at most P chunks, as many as rank 0 of 1F1B.
    Raises ValueError unless both numbers are at least 1.
    """
    _demand_positive(ranks, micro_batches)
    return [_zb1p(Seat("a", rank), min(ranks - rank - 1, micro_batches), min(rank, micro_batches), micro_batches)
            for rank in range(ranks)]


def _zb1p(seat: Seat, ahead: int, waiting: int, micro_batches: int) -> list:
    order = _Order()
    order.add(*[("F", seat)] * ahead)
    for done in range(micro_batches):
        if done < micro_batches - ahead:
            order.add(("F", seat))
        order.add(("I", seat))
        if done >= waiting:
            order.add_weights()
    order.add_weights(waiting)
    return order.actions


def dualpipe(ranks: int, micro_batches: int) -> Orders:
    """DualPipe: two chains through the same ranks, one from each end (figure 5 is ranks 8, micro_batches 20).

    `micro_batches` is the total; each direction has half. Ranks r and P-1-r do the same with a and b exchanged.
    Raises ValueError unless both numbers are even and micro_batches >= 2 ranks. The report asks only that both be
    divisible by 2; the rest is the released code's: with few micro-batches step 4 would have a negative count outside.
    """
    _demand_positive(ranks, micro_batches)
    if ranks % 2:
        raise ValueError(f"DualPipe got {ranks} ranks; it needs an even number, because ranks r and P-1-r are partners")
    if micro_batches % 2:
        raise ValueError(f"DualPipe got {micro_batches} micro-batches; it needs an even number, "
                         "half for each direction")
    if micro_batches < 2 * ranks:
        raise ValueError(f"DualPipe got {micro_batches} micro-batches for {ranks} ranks; it needs at least {2 * ranks}")
    orders = []
    for rank in range(ranks):
        mirror = ranks - 1 - rank
        seats = Seat("a", rank), Seat("b", mirror)
        own, other = seats if rank < mirror else reversed(seats)
        orders.append(_eight_steps(min(rank, mirror), ranks // 2, micro_batches // 2, own, other))
    return orders


def dualpipev(ranks: int, micro_batches: int) -> Orders:
    """DualPipeV: one chain of 2 P stages, folded, so that rank 0 has its first and its last stage.

    It is the first half of a DualPipe of twice the ranks. Every micro-batch passes both halves, a then b.
    Raises ValueError unless ranks >= 1 and micro_batches >= 2 ranks.
    """
    _demand_positive(ranks, micro_batches)
    if micro_batches < 2 * ranks:
        raise ValueError(f"DualPipeV got {micro_batches} micro-batches for the {2 * ranks} stages of {ranks} ranks; "
                         f"it needs at least {2 * ranks}")
    return [_eight_steps(rank, ranks, micro_batches, Seat("a", rank), Seat("b", 2 * ranks - 1 - rank))
            for rank in range(ranks)]


ORDERS: dict[str, Callable[[int, int], Orders]] = {
    "1f1b": one_f_one_b, "zb1p": zb1p, "dualpipe": dualpipe, "dualpipev": dualpipev}     # by the name that options have


def _eight_steps(h: int, n: int, micro_batches: int, own: Seat, other: Seat) -> list:
    """One rank's order in the eight steps of the released code.

    h counts the ranks outside of this one, n the ranks from the outside to the middle; `micro_batches` come in each
    direction. Those of `own` enter near this rank, those of `other` reach it late and return soon.
    """
    order = _Order()
    inner = n - h - 1                             # ranks between this one and the middle
    for _ in range(2 * inner):                    # 1 warm-up: what comes from near
        order.add(("F", own))
    for _ in range(h + 1):                        # 2 warm-up: both directions
        order.add(("F", own), ("F", other))
    for _ in range(inner):                        # 3 the first backwards; W fills the wait for the next forward
        order.add(("I", other))
        order.add_weights()
        order.add(("F", other))
    for turn in range(micro_batches - 2 * n + h + 1):   # 4 the main part: blocks only
        if turn == 0 and inner == 0:              # in the middle the first B comes late if I > F, and this F need
            order.add(("F", own), ("B", other))   #   not wait for it
        else:
            order.overlap(own, other)
        order.overlap(other, own)
    for _ in range(inner):                        # 5 no new micro-batch enters
        order.add(("B", other))
        order.overlap(other, own)
    last = [("B", other), ("B", own)] * (h + 1)   # 6 backwards only; the second half of them leaves W for later,
    for turn, (_, seat) in enumerate(last):       #   because the ranks outside wait for I
        order.add(("B" if turn <= h else "I", seat))
    for _ in range(inner):                        # 7 the last backwards of what entered near
        order.add_weights()
        order.add(("I", own))
    order.add_weights(h + 1)                      # 8 the weights that still wait
    return order.actions


def _demand_positive(ranks: int, micro_batches: int) -> None:
    for name, value in (("ranks", ranks), ("micro_batches", micro_batches)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")
