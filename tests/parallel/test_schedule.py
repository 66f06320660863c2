"""The orders are complete, can be run, and are the published ones: step by step, figure 5 rank by rank, torch's too."""

import inspect
import re
from collections import Counter, deque
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules

from minidsv3.parallel import schedule
from minidsv3.parallel.schedule import Action, Overlapped, dualpipe, dualpipev, one_f_one_b, zb1p

ALL = (one_f_one_b, zb1p, dualpipe, dualpipev)


def sizes(make, step: int = 1) -> list[tuple[int, int]]:
    """Sizes that `make` accepts, up to 16 ranks and 64 micro-batches: all of them, or every `step`-th."""
    if make is dualpipe:
        return [(p, m) for p in range(2, 17, 2) for m in range(2 * p, 65, 2)][::step]
    if make is dualpipev:
        return [(p, m) for p in range(1, 17) for m in range(2 * p, 65)][::step]
    return [(p, m) for p in range(1, 17) for m in range(1, 65)][::step]


def parts(order) -> list:
    return [part for action in order for part in action.parts]


# ---- every order is complete and can be run -------------------------------------------------------------------------


def places(make, ranks: int) -> list[set]:
    """The (direction, stage)s of each rank, said again without the module under test."""
    second = {dualpipe: lambda r: {("b", ranks - 1 - r)}, dualpipev: lambda r: {("b", 2 * ranks - 1 - r)}}
    return [{("a", r)} | second.get(make, lambda r: set())(r) for r in range(ranks)]


def incomplete(make, ranks: int, micro_batches: int, orders: list) -> list[int]:
    """Ranks whose order has not every F, I and W of each of its chunks exactly once."""
    each = range(micro_batches // 2 if make is dualpipe else micro_batches)
    found = [Counter((kind, part.direction, part.stage, part.micro_batch) for part in parts(order)
                     for kind in ("IW" if part.kind == "B" else part.kind)) for order in orders]
    wanted = [Counter((kind, *place, m) for kind in "FIW" for place in held for m in each)
              for held in places(make, ranks)]
    return [rank for rank in range(ranks) if found[rank] != wanted[rank]]


def stuck(make, ranks: int, orders: list) -> list[str]:
    """Actions that ranks wait before for ever, when each runs its order as far as the others' results allow."""
    last = (2 * ranks if make is dualpipev else ranks) - 1
    queues, done = [deque(order) for order in orders], set()

    def key(kind: str, part: Action, stage: int) -> tuple:
        return kind, "a" if make is dualpipev else part.direction, part.micro_batch, stage

    def ready(part: Action) -> bool:
        if part.kind == "F":
            return part.stage == 0 or key("F", part, part.stage - 1) in done
        if part.kind == "W":
            return key("I", part, part.stage) in done
        return key("F", part, part.stage) in done and (part.stage == last or key("I", part, part.stage + 1) in done)

    moved = True
    while moved:
        moved = False
        for queue in queues:
            while queue and all(map(ready, queue[0].parts)):
                done |= {key(part.kind.replace("B", "I"), part, part.stage) for part in queue.popleft().parts}
                moved = True
    return [str(queue[0]) for queue in queues if queue]


@pytest.mark.parametrize("make", ALL)
def test_every_chunk_is_computed_once_and_nobody_waits_for_ever(make):
    for ranks, micro_batches in sizes(make, step=3):
        orders = make(ranks, micro_batches)
        assert len(orders) == ranks
        assert incomplete(make, ranks, micro_batches, orders) == []
        assert stuck(make, ranks, orders) == []


@pytest.mark.parametrize("make", ALL)
def test_the_checks_see_a_lost_weight_a_repeated_chunk_and_a_swap(make):
    orders = make(4, 8)
    weight = next(i for i, action in enumerate(orders[1]) if action.parts[0].kind in "WB")
    for spoilt in (orders[1][:weight] + orders[1][weight + 1:], [*orders[1], orders[1][weight]]):
        assert incomplete(make, 4, 8, [orders[0], spoilt, *orders[2:]]) == [1]
    first = next(i for i, action in enumerate(orders[1]) if action.parts[0].kind in "IB")
    backward_first = [orders[1][first], *orders[1][:first], *orders[1][first + 1:]]
    assert stuck(make, 4, [orders[0], backward_first, *orders[2:]])


# ---- the eight steps ------------------------------------------------------------------------------------------------


def letters(order, own: str) -> str:
    """Without micro-batches and with 0 for the rank's own direction, 1 for the other, as the released code has it."""
    other = "b" if own == "a" else "a"
    return "".join(f"[{action}]" if isinstance(action, Overlapped) else str(action)
                   for action in order).translate({ord(own): "0,", ord(other): "1,"})


def published(h: int, n: int, micro_batches: int) -> str:
    """The released code's steps as a pattern: counts by its own formulas, I instead of B in step 6 by its own rule."""
    def op(name: str) -> str:
        return "".join(rf"{kind}{side},\d+" for kind, side in re.findall(r"([FIWB])(\d)", name))

    def block(name: str) -> str:
        forward, backward = re.findall(r"[FB]\d", name)
        return rf"\[{op(forward)}&{op(backward)}\]"

    def repeat(count: int, body: str) -> str:
        return f"(?:{body}){{{count}}}"

    main = micro_batches - 2 * n + h + 1
    first = op("F0B1") if h == n - 1 else block("F0B1")
    mixed, late = "", False
    for turn in range(h + 1):
        late |= turn == (h + 1) // 2 and h % 2 == 1
        mixed += op("I1" if late else "B1")
        late |= turn == (h + 1) // 2 and h % 2 == 0
        mixed += op("I0" if late else "B0")
    weight = r"W[01],\d+"
    return (repeat(2 * (n - h - 1), op("F0")) + repeat(h + 1, op("F0F1")) + repeat(n - h - 1, op("I1W1F1"))
            + first + block("F1B0") + repeat(main - 1, block("F0B1") + block("F1B0"))
            + repeat(n - h - 1, op("B1") + block("F1B0")) + mixed
            + repeat(n - h - 1, weight + op("I0")) + repeat(h + 1, weight))


def departs_from_the_published_steps(ranks: int, micro_batches: int) -> list[int]:
    wrong = []
    for rank, order in enumerate(schedule.dualpipe(ranks, micro_batches)):
        h, own = min(rank, ranks - 1 - rank), "a" if rank < ranks // 2 else "b"
        if not re.fullmatch(published(h, ranks // 2, micro_batches // 2), letters(order, own)):
            wrong.append(rank)
    return wrong


def test_dualpipe_has_the_published_steps():
    for size in sizes(dualpipe):
        assert departs_from_the_published_steps(*size) == []


@pytest.mark.parametrize("line, other", [
    ("2 * inner", "2 * inner + 1"), ("turn <= h", "turn < h"), ("turn == 0 and inner == 0", "False"),
    ("turn == 0 and inner == 0", "turn == 0"), ("order.overlap(other, own)", "order.overlap(own, other)"),
    ("- 2 * n + h + 1", "- 2 * n + h"),
])
def test_the_published_steps_catch(monkeypatch, line, other):
    source = inspect.getsource(schedule._eight_steps)
    assert line in source
    scope = dict(vars(schedule))
    exec(source.replace(line, other), scope)
    monkeypatch.setattr(schedule, "_eight_steps", scope["_eight_steps"])
    try:
        assert departs_from_the_published_steps(8, 20)
    except IndexError:                            # no weights wait where the mutant wants some: caught, too
        assert other == "turn < h"


def waits_in_turn(order) -> bool:
    """Whether weights come in the order of their backwards for the input, over both stages of the rank."""
    done = {kind: [(part.direction, part.micro_batch) for part in parts(order) if part.kind == kind] for kind in "IW"}
    return done["I"] == done["W"] != []


def test_weights_wait_in_one_queue():
    for make in (zb1p, dualpipe, dualpipev):
        assert all(map(waits_in_turn, make(8, 20)))


def test_a_stack_of_weights_is_caught(monkeypatch):
    monkeypatch.setattr(schedule, "deque", lambda: SimpleNamespace(**{
        "append": (stack := []).append, "popleft": stack.pop}))
    for make in (zb1p, dualpipe, dualpipev):
        assert not all(map(waits_in_turn, make(8, 20)))


# ---- figure 5: 8 ranks, 20 micro-batches ----------------------------------------------------------------------------


def blocks(order) -> int:
    return sum(isinstance(action, Overlapped) for action in order)


def test_figure_5_rank_by_rank():
    """Blocks a rank, and the rows of the outermost and an innermost device as they are drawn."""
    orders = dualpipe(8, 20)
    assert [blocks(order) for order in orders] == [9, 10, 11, 11, 11, 11, 10, 9]
    alone = [{kind: sum(str(action)[0] == kind for action in order if not isinstance(action, Overlapped))
              for kind in "FBIW"} for order in orders]
    assert alone[:4] == [{"F": 11, "B": 4, "I": 7, "W": 7}, {"F": 10, "B": 4, "I": 6, "W": 6},
                         {"F": 9, "B": 4, "I": 5, "W": 5}, {"F": 9, "B": 5, "I": 4, "W": 4}]
    assert alone[4:] == alone[3::-1]
    assert " ".join(map(str, orders[0])) == (
        "Fa0 Fa1 Fa2 Fa3 Fa4 Fa5 Fa6 Fb0 Ib0 Wb0 Fb1 Ib1 Wb1 Fb2 Ib2 Wb2 Fb3 Fa7&Bb3 Fb4&Ba0 Fa8&Bb4 Fb5&Ba1 Fa9&Bb5 "
        "Fb6&Ba2 Bb6 Fb7&Ba3 Bb7 Fb8&Ba4 Bb8 Fb9&Ba5 Bb9 Ia6 Wa6 Ia7 Wa7 Ia8 Wa8 Ia9 Wa9")
    assert " ".join(map(str, orders[3])) == (
        "Fa0 Fb0 Fa1 Fb1 Fa2 Fb2 Fa3 Fb3 Fa4 Bb0 Fb4&Ba0 Fa5&Bb1 Fb5&Ba1 Fa6&Bb2 Fb6&Ba2 Fa7&Bb3 Fb7&Ba3 Fa8&Bb4 "
        "Fb8&Ba4 Fa9&Bb5 Fb9&Ba5 Bb6 Ba6 Bb7 Ba7 Ib8 Ia8 Ib9 Ia9 Wb8 Wa8 Wb9 Wa9")


def test_mirrored_ranks_do_the_same_with_directions_exchanged():
    for ranks, micro_batches in sizes(dualpipe, step=5):
        orders = dualpipe(ranks, micro_batches)
        for order, mirrored in zip(orders, orders[::-1]):
            assert [str(action).translate({97: "b", 98: "a"}) for action in order] == list(map(str, mirrored))
            assert [part.stage for part in parts(order)] == [part.stage for part in parts(mirrored)]


def test_dualpipev_is_the_first_half_of_a_dualpipe_of_twice_the_ranks():
    for ranks, micro_batches in sizes(dualpipev, step=7):
        half = dualpipe(2 * ranks, 2 * micro_batches)[:ranks]
        assert [list(map(str, order)) for order in dualpipev(ranks, micro_batches)] == [
            list(map(str, order)) for order in half]


def test_actions_say_what_they_are():
    first, block = dualpipe(8, 20)[5][0], dualpipe(8, 20)[5][-20]
    assert first == Action("F", "b", 0, 2) and str(first) == "Fb0" and first.parts == (first,)
    assert str(block) == "Fa5&Bb1" and block.stage == (5, 2) and block.parts == (block.forward, block.backward)


# ---- torch's own orders ---------------------------------------------------------------------------------------------


def torchs(name: str, ranks: int, micro_batches: int) -> list[list[tuple]]:
    """Each rank's actions, asked of the schedule's own method: it reads nothing of the object but these attributes."""
    cls = getattr(schedules, name)
    self = SimpleNamespace(pp_group_size=ranks, _num_stages=ranks, _n_microbatches=micro_batches, n_local_stages=1,
                           microbatches_per_round=micro_batches // (micro_batches // ranks))
    if name == "Schedule1F1B":
        orders = cls._get_pipeline_order(self).values()
    else:
        orders = [cls._calculate_single_rank_operations(self, rank) for rank in range(ranks)]
    ours = (schedules.F, schedules.I, schedules.W, schedules.B, schedules.OVERLAP_F_B)
    return [[tuple((part.computation_type.value, part.stage_index, part.microbatch_index)
                   for part in action.sub_actions or (action,))
             for action in order if action is not None and action.computation_type in ours] for order in orders]


def as_torch_has_it(orders) -> list[list[tuple]]:
    return [[tuple((part.kind, part.stage, part.micro_batch) for part in action.parts) for action in order]
            for order in orders]


@pytest.mark.parametrize("make, name", [
    (dualpipev, "ScheduleDualPipeV"), (zb1p, "ScheduleInterleavedZeroBubble"), (one_f_one_b, "Schedule1F1B"),
])
def test_torch_has_the_same_order(make, name):
    compared = 0
    for ranks, micro_batches in sizes(make):
        if micro_batches < ranks or micro_batches % (micro_batches // ranks):
            continue                              # torch's zero-bubble order wants whole rounds
        got, want = as_torch_has_it(make(ranks, micro_batches)), torchs(name, ranks, micro_batches)
        if make is one_f_one_b:                   # this list of torch's numbers the last rank's forwards from 1
            got[-1], want[-1] = ([action[0][0] for action in order] for order in (got[-1], want[-1]))
        assert got == want
        compared += 1
    assert compared > 50


# ---- sizes that no order exists for ---------------------------------------------------------------------------------


@pytest.mark.parametrize("make, ranks, micro_batches, sentence", [
    (dualpipe, 5, 20, "5 ranks; it needs an even number"),
    (dualpipe, 8, 21, "21 micro-batches; it needs an even number"),
    (dualpipe, 8, 10, "10 micro-batches for 8 ranks; it needs at least 16"),
    (dualpipe, 16, 24, "at least 32"),            # the first batch of the report's ramp: 3072 sequences, 128 pipelines
    (dualpipev, 4, 7, "7 micro-batches for the 8 stages of 4 ranks; it needs at least 8"),
    (one_f_one_b, 0, 4, "ranks is 0; it must be a whole number of at least 1"),
    (zb1p, 4, 0, "micro_batches is 0"), (dualpipe, 4.0, 8, "ranks is 4.0"),
])
def test_refused(make, ranks, micro_batches, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make(ranks, micro_batches)


def test_one_rank_needs_no_pipeline():
    assert [" ".join(map(str, make(1, 2)[0])) for make in (one_f_one_b, zb1p, dualpipev)] == [
        "Fa0 Ba0 Fa1 Ba1", "Fa0 Ia0 Wa0 Fa1 Ia1 Wa1", "Fa0 Fb0 Fa1 Bb0 Fb1&Ba0 Bb1 Ia1 Wa1"]
