"""The simulator gives the published totals; the formulas hold exactly where `bubble` says, and nowhere else."""

import random
from collections import Counter

import pytest

from minidsv3.parallel import simulate as module
from minidsv3.parallel.schedule import Action, Overlapped, dualpipe, dualpipev, one_f_one_b, zb1p
from minidsv3.parallel.simulate import bubble, longest_path, simulate

ALL = (one_f_one_b, zb1p, dualpipe, dualpipev)


def near(value):
    return pytest.approx(value, abs=1e-9)


# ---- published numbers ----------------------------------------------------------------------------------------------


def test_8_ranks_20_micro_batches():
    assert [simulate(make(8, 20)).makespan for make in ALL[:3]] == [81, 67, 66]
    assert simulate(dualpipe(8, 20)).idle == [6] * 8


def test_with_one_exchange_in_every_forward_and_backward_for_the_input():
    assert [simulate(make(8, 20), communication=1).makespan for make in ALL[:3]] == [135, 121, 115]
    hidden = simulate(dualpipe(8, 20), overlapped=3, communication=1)
    assert hidden.makespan == 87
    # what is left: 40 exchanges a rank, two of them in each of its 9 to 11 blocks
    assert hidden.exposed == [40 - 2 * blocks for blocks in (9, 10, 11, 11, 11, 11, 10, 9)]
    assert simulate(dualpipe(8, 20), communication=1).exposed == [40] * 8


@pytest.mark.parametrize("ranks, micro_batches, makespan, idle", [
    (8, 20, 66, 6), (4, 8, 26, 2), (4, 10, 32, 2), (4, 20, 62, 2), (8, 16, 54, 6), (16, 60, 194, 14)])
def test_dualpipe_in_the_units_of_figure_5(ranks, micro_batches, makespan, idle):
    got = simulate(dualpipe(ranks, micro_batches))
    assert got.makespan == makespan and got.idle == [idle] * ranks


def test_chunks_in_flight():
    for micro_batches in (16, 20, 40):
        assert simulate(one_f_one_b(8, micro_batches)).in_flight == [8, 7, 6, 5, 4, 3, 2, 1]
        assert simulate(zb1p(8, micro_batches)).in_flight == [8] * 8
        assert simulate(dualpipe(8, micro_batches)).in_flight == [9] * 8
        assert simulate(dualpipev(8, micro_batches)).in_flight == [17] * 8


# ---- where table 2 is exact -----------------------------------------------------------------------------------------

METHODS = {"1F1B": one_f_one_b, "ZB1P": zb1p, "DualPipe": dualpipe, "DualPipeV": dualpipev}


def draws(method: str, count: int = 60):
    """Random (ranks, micro-batches, F, I, W); as many stages for DualPipeV as for the others."""
    draw = random.Random(0)
    for _ in range(count):
        ranks = draw.choice([2, 4, 6, 8, 12, 16]) // (2 if method == "DualPipeV" else 1)
        yield ranks, draw.randrange(max(2 * ranks, 4), 48, 2), *(draw.uniform(0.2, 2) for _ in range(3))


def idle(method: str, ranks: int, micro_batches: int, *durations: float) -> list[float]:
    return simulate(METHODS[method](ranks, micro_batches), *durations).idle


def test_1f1b_is_a_law():
    for ranks, micro_batches, *durations in draws("1F1B"):
        assert idle("1F1B", ranks, micro_batches, *durations) == near([bubble("1F1B", ranks, *durations)] * ranks)


@pytest.mark.parametrize("method", METHODS)
def test_table_2_is_exact_for_equal_f_and_i_and_w_not_longer(method):
    for ranks, micro_batches, forward, _, weights in draws(method):
        times = forward, forward, min(weights, forward)
        assert idle(method, ranks, micro_batches, *times) == near([bubble(method, ranks, *times)] * ranks)


@pytest.mark.parametrize("method, innermost", [("DualPipe", 4), ("DualPipeV", 2)])
def test_shorter_blocks_leave_the_formula_to_the_innermost_ranks(method, innermost):
    """Outer ranks have fewer blocks, so less of their time is saved, and they idle less."""
    for ranks, micro_batches, forward, share, weights in draws(method):
        weights = min(weights, forward)
        block = forward + weights + forward * share / 2           # between B and F + B = B + F
        times = forward, forward, weights, block
        got, formula = idle(method, ranks, micro_batches, *times), bubble(method, ranks, *times)
        assert max(got) == near(formula)
        assert sum(value == near(formula) for value in got) == min(ranks, innermost)


def test_outer_ranks_idle_less_16_ranks():
    got = idle("DualPipe", 16, 60, 1, 1, 0.8, 2.2)
    assert got[:8] == near([7.6, 8.2, 8.8, 9.4, 10.0, 10.6, 11.2, 11.2]) and got[8:] == near(got[7::-1])
    assert bubble("DualPipe", 16, 1, 1, 0.8, 2.2) == near(11.2)


@pytest.mark.parametrize("method", ["DualPipe", "DualPipeV"])
def test_longer_w_follows_another_law(method):
    for ranks, micro_batches, forward, share, weights in draws(method):
        weights += forward                                        # W > I = F
        block = forward + weights + forward * share / 2
        times = forward, forward, weights, block
        pairs = ranks / 2 - 1 if method == "DualPipe" else ranks - 1
        law = pairs * (block + forward - weights - min(weights, forward))
        assert max(idle(method, ranks, micro_batches, *times)) == near(law)
        assert pairs == 0 or bubble(method, ranks, *times) < law - 1e-9


def test_zb1p_with_longer_w_idles_as_long_as_a_forward_a_rank():
    for ranks, micro_batches, forward, _, weights in draws("ZB1P"):
        times = forward, forward, forward + weights
        assert max(idle("ZB1P", ranks, micro_batches, *times)) == near((ranks - 1) * forward)
        assert ranks == 1 or bubble("ZB1P", ranks, *times) < (ranks - 1) * forward


def apart(orders):
    """The same orders with each block as a forward and then a backward."""
    return [[part for action in order for part in action.parts] for order in orders]


def test_blocks_lengthen_the_bubble_and_hide_the_exchange():
    """A block hands its forward over at its end. Taken apart, DualPipe idles half as long as ZB1P a rank."""
    assert simulate(apart(dualpipe(8, 20))).makespan == 63
    assert simulate(apart(dualpipe(8, 20)), communication=1).makespan == 109
    for ranks, micro_batches, forward, _, weights in draws("DualPipe"):
        times = forward, forward, min(weights, forward)
        law = (ranks / 2 - 1) * (2 * forward - times[2])
        assert simulate(apart(dualpipe(ranks, micro_batches)), *times).idle == near([law] * ranks)


def test_the_middle_s_first_pair_apart_pays_if_i_is_longer_than_f():
    """Joined into a block it costs time for I > F, and none for F = I."""
    orders = dualpipe(8, 20)
    for rank in (3, 4):
        at = next(i for i, action in enumerate(orders[rank]) if str(action)[0] == "B")
        orders[rank][at - 1:at + 1] = [Overlapped(*orders[rank][at - 1:at + 1])]
    assert simulate(orders, 1, 2, 1).makespan > simulate(dualpipe(8, 20), 1, 2, 1).makespan
    assert simulate(orders).makespan == 66


@pytest.mark.parametrize("durations, simulated, formula", [
    ((0.5, 1, 1), 4.0, 4.5), ((1, 1.3, 0.7), 7.8, 8.7), ((1.25, 1, 1), 7.5, 6.75), ((2, 1, 1), 12, 9)])
def test_unequal_f_and_i_break_the_formula_in_both_directions(durations, simulated, formula):
    assert max(idle("DualPipe", 8, 20, *durations)) == near(simulated)
    assert bubble("DualPipe", 8, *durations) == near(formula)


def test_table_2_in_the_figures_units():
    assert [bubble(method, 8) for method in METHODS] == [21, 7, 6, 14]   # the V's 8 ranks hold 16 stages
    assert bubble("DualPipe", 8, 2, 2, 1) == 15 and bubble("DualPipe", 8, 2, 2, 1, 3) == 9
    with pytest.raises(ValueError, match="no method 'GPipe'; table 2 has 1F1B, ZB1P"):
        bubble("GPipe", 8)


# ---- the simulator itself -------------------------------------------------------------------------------------------


def broken(orders, durations, overlapped, communication) -> list[str]:
    """Actions that do not start at the very moment when their rank is free and what they need is there."""
    timeline = simulate(orders, *durations, overlapped, communication)
    placed = [(part, span) for rank in timeline.spans for span in rank for part in span.action.parts]
    last = max(part.stage for part, _ in placed)
    # in the V a micro-batch keeps its number through both halves; in DualPipe a and b have chains of their own
    two_chains = any(part.direction == "b" and part.stage == 0 for part, _ in placed)
    end = {}
    for part, span in placed:
        for kind in "IW" if part.kind == "B" else part.kind:
            end[kind, part.direction if two_chains else "a", part.stage, part.micro_batch] = span.end

    def ready(part) -> float:
        way, m = part.direction if two_chains else "a", part.micro_batch
        if part.kind == "F":
            return end["F", way, part.stage - 1, m] if part.stage else 0
        if part.kind == "W":
            return end["I", way, part.stage, m]
        return max(end["F", way, part.stage, m], end["I", way, part.stage + 1, m] if part.stage < last else 0)

    faults = []
    for spans in timeline.spans:
        free = 0
        for span in spans:
            if abs(span.start - max(free, *map(ready, span.action.parts))) > 1e-9:
                faults.append(f"{span.action} starts at {span.start}")
            free = span.end
    return faults


@pytest.mark.parametrize("make", ALL)
def test_every_action_starts_as_soon_as_it_can(make):
    draw = random.Random(1)
    for ranks, micro_batches in ((2, 4), (4, 10), (6, 20)):
        durations = [draw.uniform(0.5, 2) for _ in range(3)]
        for overlapped, communication in ((None, 0), (3.5, 0.3)):
            assert broken(make(ranks, micro_batches), durations, overlapped, communication) == []


@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("forgotten", ["F", "I"])
def test_a_forgotten_dependency_is_seen(monkeypatch, make, forgotten):
    true = module._needs
    monkeypatch.setattr(module, "_needs", lambda part, *places: [
        need for need in true(part, *places) if need[0] != forgotten or part.kind == "W"])
    assert broken(make(4, 10), (1, 1.5, 0.5), None, 0)


@pytest.mark.parametrize("make", ALL)
def test_the_longest_path_is_the_makespan(make):
    for options in ({}, {"forward": 1.25, "communication": 0.5}, {"backward_weight": 0.5, "overlapped": 2.125}):
        orders = make(4, 12)
        timeline = simulate(orders, **options)
        path = [span for _, span in longest_path(orders, timeline)]
        assert path[0].start == 0 and path[-1].end == timeline.makespan
        assert all(one.end == other.start for one, other in zip(path, path[1:]))
        assert all(span in timeline.spans[rank] for rank, span in longest_path(orders, timeline))


def test_1f1b_s_longest_path_is_p_minus_1_more_of_both():
    orders = one_f_one_b(5, 9)
    path = longest_path(orders, simulate(orders, 1, 2, 1))
    assert Counter(span.action.kind for _, span in path) == {"F": 9 + 4, "B": 9 + 4}


def test_lengths_of_actions():
    order = [[Action("F", "a", 0, 0), Action("F", "a", 1, 0), Action("I", "a", 0, 0), Action("W", "a", 0, 0),
              Overlapped(Action("F", "a", 2, 0), Action("B", "a", 1, 0)), Action("B", "a", 2, 0)]]

    def lengths(**options) -> list[float]:
        return [span.end - span.start for span in simulate(order, 1, 2, 4, **options).spans[0]]

    assert lengths() == [1, 1, 2, 4, 7, 6]
    assert lengths(communication=10) == [11, 11, 12, 4, 27, 16]                    # none in W, two in the block
    assert lengths(communication=10, overlapped=9) == [11, 11, 12, 4, 9, 16]


@pytest.mark.parametrize("overlapped, exposed", [(None, 20), (6, 0), (7, 0), (9, 2), (27, 20), (40, 20)])
def test_a_block_exposes_what_it_does_not_hide(overlapped, exposed):
    order = [Action("F", "a", 0, 0), Overlapped(Action("F", "a", 1, 0), Action("B", "a", 0, 0)), Action("B", "a", 1, 0)]
    assert simulate([order], 1, 2, 4, overlapped, 10).exposed == [exposed + 20]


def test_orders_that_wait_for_ever_are_refused():
    orders = one_f_one_b(2, 2)
    with pytest.raises(ValueError, match="for ever: rank 0 at Ba0, rank 1 at Ba0"):
        simulate([orders[0], orders[1][1:]])


@pytest.mark.parametrize("name", ["forward", "backward_input", "backward_weight", "overlapped", "communication"])
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_durations_without_meaning_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; a duration is a finite number of at least 0"):
        simulate(dualpipe(2, 4), **{name: value})
