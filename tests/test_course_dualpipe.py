"""Exercises of chapter 07: published counts, cases that show what they should, and typical tests that spare mutants."""

import random

import pytest

from minidsv3.course import dualpipe
from minidsv3.course.compare import difference
from minidsv3.optim import Recipe
from minidsv3.parallel import schedule
from minidsv3.parallel.simulate import simulate

SEEDS = range(20)


def cases(task, seed):
    return list(task.cases(random.Random(f"{seed}")).values())


# ---- numbers of the report ------------------------------------------------------------------------------------------

def test_counts_of_figure_5():
    counts = [dualpipe.counts_reference(rank, 8, 20) for rank in range(8)]
    assert [blocks for _, blocks in counts] == [9, 10, 11, 11, 11, 11, 10, 9]
    assert [alone for alone, _ in counts] == [6, 4, 2, 0, 0, 2, 4, 6]


def test_the_first_batch_of_v3_s_ramp_is_refused():
    recipe = Recipe.preset("full")
    ramp = [recipe.first_batch, recipe.first_batch + 1024, recipe.last_batch]
    assert dualpipe.refused_reference(ramp, 128, 16) == [3072] and 3072 // 128 == 24 < 2 * 16
    assert dualpipe.refused_by_the_report(ramp, 128, 16) == []


def test_numbers_of_the_questions():
    """67 against 66, 121 against 87; 9 by the formula, 12 by the timeline."""
    orders = schedule.zb1p(8, 20), schedule.dualpipe(8, 20)
    assert [simulate(order).makespan for order in orders] == [67, 66]
    assert [simulate(order, overlapped=3, communication=1).makespan for order in orders] == [121, 87]
    assert max(simulate(schedule.dualpipe(8, 20), 2, 1, 1).idle) == 12


@pytest.mark.parametrize("order", [dualpipe.order_all_forwards_first, dualpipe.order_one_ahead_more])
def test_more_forwards_ahead_buy_no_time(order):
    """What 7.2 says to who writes GPipe, or P - r for P - r - 1."""
    last = [max(map(max, dualpipe.starts_reference([make(rank, 5, 8) for rank in range(5)], 1, 2)))
            for make in (order, dualpipe.order_reference)]
    assert last[0] == last[1]


# ---- the cases show what they should --------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", SEEDS)
def test_ramps_have_odd_small_and_good_batches(seed):
    for batches, pipelines, ranks in cases(dualpipe.REFUSED, seed):
        refused = dualpipe.refused_reference(batches, pipelines, ranks)
        assert 0 < len(refused) < len(batches)
        assert any(batch // pipelines % 2 for batch in refused) and any(b // pipelines < 2 * ranks for b in refused)


@pytest.mark.parametrize("seed", SEEDS)
def test_copies_agree_after_the_right_step_alone(seed):
    for arguments in cases(dualpipe.COPIES, seed):
        first, last = dualpipe.copies_solution(*arguments)
        assert difference(first, last, 1e-12) is None
        first, last = dualpipe.copies_apart(*arguments)
        assert difference(first, last, 1e-3)


@pytest.mark.parametrize("seed", SEEDS)
def test_last_in_first_out_has_the_right_sum(seed):
    """What its sentence says: wrong on the way, right at the end."""
    for arguments in cases(dualpipe.DEFERRED, seed):
        wrong, right = dualpipe.deferred_last_in_first_out(*arguments), dualpipe.deferred_reference(*arguments)
        assert difference(wrong[-1], right[-1], 1e-12) is None and difference(wrong[0], right[0], 1e-3)


# ---- mutants --------------------------------------------------------------------------------------------------------

def counts_chunks(make):
    """A test that looks for everything exactly once, as one writes first."""
    for order in make(8, 20):
        parts = [part for action in order for part in action.split("&")]
        did = sorted(kind + part[1:] for part in parts for kind in part[0].replace("B", "IW"))
        assert did == sorted(f"{kind}{way}{m}" for kind in "FIW" for way in "ab" for m in range(10))


def looks_at_the_clock(make):
    assert simulate(dualpipe.actions(make(8, 20))).makespan == 66


def looks_at_rank_0(make):
    """The first row of figure 5."""
    assert make(8, 20)[0] == dualpipe.dualpipe_reference(8, 20)[0]


@pytest.mark.parametrize("test, alive", [
    (counts_chunks, {"newest weights first", "nothing overlapped", "weights at once", "the middle overlaps all",
                     "one backward late", "no mirror"}),
    (looks_at_the_clock, {"a weight missing", "newest weights first", "the middle overlaps all"}),
    (looks_at_rank_0, {"newest weights first", "the middle overlaps all", "no mirror"}),
], ids=lambda value: getattr(value, "__name__", None))
def test_typical_tests_spare_some(test, alive):
    def survives(function) -> bool:
        try:
            test(function)
        except (AssertionError, ValueError):
            return False
        return True
    assert {name for name, (function, _) in dualpipe.ORDERS.wrong.items() if survives(function)} == alive
    assert not dualpipe.ORDERS.judge(test, 0).solved


def test_actions_are_the_package_s():
    assert dualpipe.actions(dualpipe.dualpipe_reference(4, 10)) == schedule.dualpipe(4, 10)


def test_the_stub_names_seven_mutants():
    assert len(dualpipe.ORDERS.wrong) == 7 and "seven" in dualpipe.ORDERS.title + dualpipe.ORDERS.statement
