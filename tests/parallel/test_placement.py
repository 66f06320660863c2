"""EPLB: its published example, what every placement must keep, and faults that these tests see."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidsv3.parallel import placement as eplb

# The example of EPLB's README: two layers, 12 experts in 4 groups, 16 slots on 8 GPUs of 2 nodes.
LOAD = torch.tensor([[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
                     [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]])
PUBLISHED = [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
             [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]]


def published_example():
    return eplb.rebalance_experts(LOAD, replicas=16, groups=4, nodes=2, gpus=8).phy2log.tolist()


def skewed(layers=3, experts=256, seed=0):
    """Loads from a Gamma distribution of shape 1: many experts are hardly wanted, a few four times the mean."""
    source = torch.Generator().manual_seed(seed)
    return -torch.rand(layers, experts, generator=source, dtype=torch.float64).log()


def test_the_published_example():
    assert published_example() == PUBLISHED


# ---- faults ---------------------------------------------------------------------------------------------------------


def replicate_by_load(weights, slots):
    """The largest load, however many copies share it."""
    largest = max(range(len(weights)), key=lambda e: weights[e])
    return [*range(len(weights)), *[largest] * (slots - len(weights))]


def _deal(weights, packs, order, room):
    """Items in `order`, each to the lightest pack with fewer than `room`."""
    loads, filled = [0.0] * packs, [[] for _ in range(packs)]
    for item in order:
        pack = min((p for p in range(packs) if len(filled[p]) < room), key=lambda p: loads[p])
        filled[pack].append(item)
        loads[pack] += weights[item]
    return filled


def from_the_heaviest(weights):
    return sorted(range(len(weights)), key=lambda item: -weights[item])


def pack_unsorted(weights, packs):
    """In the order of their numbers, not from the heaviest."""
    return _deal(weights, packs, range(len(weights)), len(weights) // packs)


def pack_unequal_counts(weights, packs):
    """The lightest pack, even if it is full."""
    return _deal(weights, packs, from_the_heaviest(weights), len(weights))


def pack_round_robin(weights, packs):
    """One item to each pack in turn, whatever the packs weigh."""
    return [from_the_heaviest(weights)[pack::packs] for pack in range(packs)]


def pack_ties_to_the_last(weights, packs):
    return RIGHT_PACKING(weights, packs)[::-1]


RIGHT_PACKING = eplb.balanced_packing


@pytest.mark.parametrize("name, fault", [
    ("replicate_experts", replicate_by_load),
    ("balanced_packing", pack_unsorted),
    ("balanced_packing", pack_round_robin),
    ("balanced_packing", pack_ties_to_the_last),
])
def test_the_example_shows_faults(monkeypatch, name, fault):
    monkeypatch.setattr(eplb, name, fault)
    assert published_example() != PUBLISHED


# ---- replicate_experts ----------------------------------------------------------------------------------------------


def largest_share(weights, slots):
    return max(weights[e] / slots.count(e) for e in slots)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.integers(0, 4))
def test_no_other_way_to_give_copies_leaves_less_on_the_fullest(weights, extra):
    """The greedy step is optimal for one layer: compared with every way to give the copies away."""
    slots = eplb.replicate_experts(weights, len(weights) + extra)
    assert slots[:len(weights)] == list(range(len(weights))) and len(slots) == len(weights) + extra
    ways = product(range(len(weights)), repeat=extra)
    assert largest_share(weights, slots) == min(largest_share(weights, [*range(len(weights)), *way]) for way in ways)


def test_one_copy_for_each_of_two_hot_experts():
    assert eplb.replicate_experts([10, 9, 1], 5) == [0, 1, 2, 0, 1]
    assert largest_share([10, 9, 1], replicate_by_load([10, 9, 1], 5)) == 9


def test_ties_go_to_the_lower_number():
    assert eplb.replicate_experts([1, 1, 1], 5) == [0, 1, 2, 0, 1]
    assert eplb.balanced_packing([1] * 6, 3) == [[0, 3], [1, 4], [2, 5]]


# ---- balanced_packing -----------------------------------------------------------------------------------------------


def assert_packing(weights, filled):
    """Every item once, equal counts, and each went to the lightest pack that had room when its turn came."""
    packs, room = len(filled), len(weights) // len(filled)
    assert sorted(sum(filled, [])) == list(range(len(weights)))
    assert {len(pack) for pack in filled} == {room}
    loads, counts = [0] * packs, [0] * packs
    for item in from_the_heaviest(weights):
        (pack,) = (p for p in range(packs) if item in filled[p])
        assert pack == min((p for p in range(packs) if counts[p] < room), key=lambda p: (loads[p], p))
        loads[pack] += weights[item]
        counts[pack] += 1


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.randoms(use_true_random=False))
def test_packing_is_its_definition(packs, room, source):
    weights = [source.randint(0, 9) for _ in range(packs * room)]
    assert_packing(weights, eplb.balanced_packing(weights, packs))


@pytest.mark.parametrize("fault", [pack_unsorted, pack_unequal_counts, pack_round_robin, pack_ties_to_the_last])
def test_the_definition_of_packing_sees_faults(fault):
    weights = [3, 20, 1, 1, 1, 2, 1, 8]
    assert_packing(weights, eplb.balanced_packing(weights, 2))
    with pytest.raises(AssertionError):
        assert_packing(weights, fault(weights, 2))


# ---- whole placements -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(0, 3),
       st.integers(0, 2**20))
def test_what_every_placement_keeps(nodes, gpus_of_node, groups_of_node, size, layers, more, seed):
    groups, gpus = nodes * groups_of_node, nodes * gpus_of_node
    experts = groups * size
    replicas = gpus * (-(-experts // gpus) + more)
    if groups_of_node * size > replicas // nodes:
        return
    load = torch.randint(0, 30, (layers, experts), generator=torch.Generator().manual_seed(seed))
    placed = eplb.rebalance_experts(load, replicas, groups, nodes, gpus)
    assert placed.phy2log.shape == (layers, replicas)
    assert placed.logcnt.sum(1).tolist() == [replicas] * layers and (placed.logcnt >= 1).all()
    assert placed.log2phy.shape == (layers, experts, placed.logcnt.max())
    assert_inverse(placed)
    assert_groups_stay_on_a_node(placed, experts // groups, nodes)
    torch.testing.assert_close(eplb.gpu_load(load, placed, gpus).sum(1), load.sum(1).double(), rtol=1e-12, atol=1e-12)


def assert_inverse(placed):
    for phy2log, log2phy, logcnt in zip(placed.phy2log.tolist(), placed.log2phy.tolist(), placed.logcnt.tolist()):
        for expert, slots in enumerate(log2phy):
            held = [slot for slot, e in enumerate(phy2log) if e == expert]
            assert slots == held + [-1] * (len(slots) - len(held)) and logcnt[expert] == len(held)


def assert_groups_stay_on_a_node(placed, size, nodes):
    on_nodes = placed.phy2log.unflatten(1, (nodes, -1)) // size
    for layer in on_nodes.tolist():
        for group in {g for node in layer for g in node}:
            assert sum(group in node for node in layer) == 1


def test_a_global_placement_tears_groups_apart():
    """3 nodes do not divide 4 groups. This also shows that the property above can fail."""
    placed = eplb.rebalance_experts(LOAD, replicas=18, groups=4, nodes=3, gpus=9)
    with pytest.raises(AssertionError):
        assert_groups_stay_on_a_node(placed, 3, 3)


def test_numbers_of_a_type_do_not_matter():
    load = LOAD * 2**10
    want = eplb.rebalance_experts(load, 16, 4, 2, 8)
    for dtype in (torch.int32, torch.float32, torch.float64):
        got = eplb.rebalance_experts(load.to(dtype), 16, 4, 2, 8)
        assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_copies_of_one_expert_can_meet_on_one_gpu():
    """Nothing forbids it: with one GPU there is no other place. Their two slots then do one expert's work."""
    placed = eplb.rebalance_experts(torch.tensor([[3.0, 1.0]]), replicas=3, groups=1, nodes=1, gpus=1)
    assert sorted(placed.phy2log[0].tolist()) == [0, 0, 1]


# ---- what it is worth -----------------------------------------------------------------------------------------------


def in_order(load):
    return eplb.from_slots(torch.arange(load.shape[1]).expand(*load.shape), load.shape[1])


def test_load_of_the_gpus():
    load = torch.tensor([[8.0, 2.0, 1.0, 1.0]])
    assert eplb.gpu_load(load, in_order(load), 2).tolist() == [[10, 2]]
    assert eplb.imbalance(load, in_order(load), 2).tolist() == [10 / 6]
    placed = eplb.rebalance_experts(load, replicas=6, groups=1, nodes=1, gpus=2)        # three copies of expert 0
    assert placed.logcnt.tolist() == [[3, 1, 1, 1]]
    torch.testing.assert_close(eplb.gpu_load(load, placed, 2).sort().values,
                               torch.tensor([[17 / 3, 19 / 3]], dtype=torch.float64))


def test_rearranging_alone_repairs_most():
    load = skewed(layers=20)
    none, arranged = in_order(load), eplb.rebalance_experts(load, replicas=256, groups=8, nodes=4, gpus=32)
    before, after, copies = (eplb.imbalance(load, placed, 32).mean().item()
                             for placed in (none, arranged, eplb.prefill(load)))
    assert before > 1.8 and after < 1.1
    assert copies < after and before - after > 10 * (after - copies)


def test_moves_are_counted_by_gpu():
    """Their order inside a GPU is free."""
    old = eplb.from_slots(torch.tensor([[0, 1, 2, 3]]), 4)
    assert eplb.moved(old, eplb.from_slots(torch.tensor([[1, 0, 3, 2]]), 4), gpus=2) == 0
    assert eplb.moved(old, eplb.from_slots(torch.tensor([[2, 1, 0, 3]]), 4), gpus=2) == 2
    assert eplb.moved(old, eplb.from_slots(torch.tensor([[2, 3, 0, 1]]), 4), gpus=2) == 4


# ---- the report's units ---------------------------------------------------------------------------------------------


def test_prefilling_unit():
    load = skewed()
    placed = eplb.prefill(load)
    assert placed.phy2log.shape == (3, 32 * 9)
    assert_groups_stay_on_a_node(placed, 32, 4)
    assert (eplb.imbalance(load, placed, 32) < 1.1).all()


def test_decoding_unit():
    load = eplb.with_shared(skewed())
    placed = eplb.decode(load)
    assert placed.phy2log.shape == (3, 320) and load.shape == (3, 257)
    assert ((placed.logcnt[:, :256] - 1).sum(1) + placed.logcnt[:, 256]).tolist() == [64] * 3


def test_shared_expert_needs_32_copies_where_routed_ones_are_even():
    """Every token takes it, and only 8 of 256 take a routed one: 256 / 8 = 32 times the load."""
    load = eplb.with_shared(torch.full((1, 256), 100.0))
    assert load[0, 256] == 3200
    placed = eplb.decode(load)
    assert placed.logcnt[0, 256] >= 32 and eplb.gpu_load(load, placed, 320).max() == 100


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, words", [
    (dict(load=torch.ones(12)), "must be .layers, experts."),
    (dict(load=torch.ones(0, 12)), "must be .layers, experts."),
    (dict(load=LOAD - 100), "finite and at least 0"),
    (dict(load=LOAD / 0.0 * 0), "finite and at least 0"),
    (dict(groups=5), "groups is 5; groups must divide the 12 experts"),
    (dict(groups=0), "groups is 0"),
    (dict(nodes=3), "nodes is 3; nodes must divide the 8 GPUs"),
    (dict(nodes=0), "nodes is 0"),
    (dict(gpus=0), "replicas is 16"),
    (dict(replicas=15), "replicas is 15; each of 8 GPUs must hold equally many"),
    (dict(replicas=8), "cannot hold"),
])
def test_refused(change, words):
    with pytest.raises(ValueError, match=words):
        eplb.rebalance_experts(**{**dict(load=LOAD, replicas=16, groups=4, nodes=2, gpus=8), **change})


def test_refused_packs_and_slots():
    with pytest.raises(ValueError, match="5 items cannot be dealt out to 2 packs"):
        eplb.balanced_packing([1, 2, 3, 4, 5], 2)
    with pytest.raises(ValueError, match="each of 4 experts at least once"):
        eplb.from_slots(torch.tensor([[0, 1, 3, 3]]), 4)
    with pytest.raises(ValueError, match="and no other"):
        eplb.from_slots(torch.tensor([[0, 1, 2, 3, 4]]), 4)
