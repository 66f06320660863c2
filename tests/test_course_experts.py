"""Exercises of chapter 06: references against the package, autograd and counting, and typical tests that spare
mutants."""

import random
from math import comb

import pytest
import torch

from minidsv3.course import experts as chapter
from minidsv3.course.many_ranks import small_layer, tokens_of
from minidsv3.parallel import placement, traffic

SEEDS = range(20)


def cases(task, seed):
    return list(task.cases(random.Random(f"{seed}")).values())


# ---- numbers that sentences and questions claim ---------------------------------------------------------------------


def test_most_experts_of_the_report():
    """Section 3.2.2: at most 13 experts (4 nodes x 3.2) at the communication cost of 8."""
    assert chapter.most_reference(4, 50e9, 160e9) == pytest.approx(12.8) and round(12.8) == 13


def test_the_limit_alone_leaves_seven_rows():
    chosen = traffic.choose(20_000, 256, 8, 4, 8)
    home = torch.arange(20_000) % 64
    rows = traffic.by_expert(home, chosen // 4, traffic.Cluster(8, 8)).between.sum() / 20_000
    assert rows == pytest.approx(6.99, abs=0.02)


def test_bytes_of_a_token_rise_with_the_ranks():
    """Distinct GPUs elsewhere that host one of 8 of 256 experts: from none to nearly 8."""
    copies = [traffic.copies_by_node(256, ranks, 8) for ranks in (1, 2, 4, 8, 16, 64, 256)]
    assert copies == sorted(copies) and copies[0] == 0 and copies[-1] > 7.9
    assert copies[-1] == pytest.approx(255 * (1 - comb(255, 8) / comb(256, 8)))


def test_one_expert_with_a_sixth_of_the_load_needs_copies():
    load = 1 / torch.arange(1, 257, dtype=torch.float64)[None]
    assert (load[0, 0] / load.sum()).item() == pytest.approx(0.163, abs=1e-3)
    alone = placement.rebalance_experts(load, 256, 1, 1, 64)
    copied = placement.rebalance_experts(load, 256 + 64, 1, 1, 64)
    assert placement.imbalance(load, alone, 64).item() > 0.163 * 64 > 10
    assert placement.imbalance(load, copied, 64).item() < 1.1


def test_decoding_as_published_elsewhere():
    """61 layers, two exchanges of 32 tokens to 9 experts, 1 + 2 bytes of 7,000 numbers, 50 GB/s; two micro-batches."""
    layer = (1 + 2) * 32 * 9 * 7000 / 50e9
    assert layer == pytest.approx(120.96e-6) and 61 * 2 * layer == pytest.approx(14.76e-3, abs=5e-6)


# ---- references -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("replicas, ranks", [(2, 4), (3, 2), (1, 3)])
def test_gradient_of_the_mean_loss_by_autograd(replicas, ranks):
    """Experts as vectors, a loss for each rank over all of them; a backward pass on each replica's sum of losses."""
    torch.manual_seed(0)
    here, d = 2, 3
    experts = torch.randn(ranks * here, d, dtype=torch.float64, requires_grad=True)
    mixes = torch.randn(replicas, ranks, ranks * here, d, dtype=torch.float64)
    losses = (experts * mixes).sum(-1).sin().sum(-1)                               # [replicas, ranks]
    want = torch.autograd.grad(losses.mean(), experts, retain_graph=True)[0]
    left = [torch.autograd.grad(replica.sum(), experts, retain_graph=True)[0] for replica in losses]
    grads = torch.stack(left).view(replicas, ranks, here, d)
    torch.testing.assert_close(chapter.gradient_reference(grads), want)
    factor = chapter.gradient_over_replicas(grads) / want
    torch.testing.assert_close(factor, torch.full_like(factor, ranks))


@pytest.mark.parametrize("seed", SEEDS)
def test_one_rank_gets_nothing_and_the_own_one_something(seed):
    for experts, rank, ranks, total in cases(chapter.SIZES, seed):
        sizes = chapter.sizes_reference(experts, rank, ranks, total)
        assert sizes.count(0) == 1 and sizes[rank] > 0 and len(sizes) == ranks
        assert sum(sizes) < experts.numel()                  # some token has two experts on a rank


def test_the_exchange_is_the_package_s_layer():
    """`weighted_sum`, against which exercises are judged, is the loop of minidsv3.moe."""
    layer, x = small_layer(), tokens_of(0)
    routing = layer.gate(x)

    def expert(e, rows):
        gate, up = (rows @ layer.experts.gate_up_proj[e].T).chunk(2, -1)
        return (torch.nn.functional.silu(gate) * up) @ layer.experts.down_proj[e].T

    torch.testing.assert_close(chapter.weighted_sum(x, routing.experts, routing.weights, expert),
                               layer.experts.loop(x, routing), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_placements_have_no_ties(seed):
    """Shares that tie would make right answers differ: whoever sorts otherwise must not be told that he is wrong."""
    for load, slots, gpus in cases(chapter.PLACE, seed):
        copies = chapter.replicate(load, slots, lambda weight, count: weight / count)
        shares = [weight / count for weight, count in zip(load, copies)]
        assert len(set(shares)) == len(shares) and max(copies) > 2


# ---- mutants --------------------------------------------------------------------------------------------------------


def typical_test(counts, chosen, here=4, popular=False, scale=0.0):
    """A test that compares with the reference on random tokens, with weights around 1."""
    def test(candidate):
        source = random.Random(0)
        total = here * len(counts)
        experts = [chapter.choices(source, count, total, chosen) for count in counts]
        x = [chapter.normal(source, count, 4) for count in counts]
        weights = [1 + scale * chapter.normal(source, count, chosen) for count in counts]
        expert = chapter.Matrices(chapter.normal(source, total, 4, 4))
        want = chapter.exchange_reference(x, experts, weights, here, expert)
        for got, right in zip(candidate(x, experts, weights, here, expert), want, strict=True):
            assert torch.allclose(got, right, rtol=0, atol=1e-10)
    return test


@pytest.mark.parametrize("test, alive", [
    (typical_test((1, 1), 1), {"weighed twice", "order lost", "one choice a rank", "counted again", "equal counts"}),
    (typical_test((8, 8, 8), 1), {"weighed twice", "one choice a rank", "counted again", "equal counts"}),
    (typical_test((8, 8, 8), 4, scale=0.3), {"capacity", "equal counts"}),
], ids=["one token", "one expert a token", "equal ranks"])
def test_typical_tests_spare_some(test, alive):
    def survives(function) -> bool:
        try:
            test(function)
        except AssertionError:
            return False
        return True
    assert {name for name, (function, _) in chapter.EXCHANGES.wrong.items() if survives(function)} == alive
    assert not chapter.EXCHANGES.judge(test, 0).solved


def test_there_are_seven_exchanges():
    assert len(chapter.EXCHANGES.wrong) == 7
