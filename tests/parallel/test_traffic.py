"""Rows on wires, counted token by token in plain Python, and the report's numbers at full size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidsv3.parallel import traffic
from minidsv3.parallel.traffic import Cluster, Rows

H800 = Cluster(8, 8)


def sent(home, gpus, cluster, two_hops):
    """Every row that leaves a GPU, one after the other: (between or inside, sender, receiver)."""
    for token, chosen in zip(home.tolist(), gpus.tolist()):
        entered = {}
        for gpu in chosen:
            node = gpu // cluster.gpus
            sender = token
            if two_hops and node != token // cluster.gpus:
                sender = node * cluster.gpus + token % cluster.gpus
                if node not in entered:
                    yield "between", token, sender
                entered[node] = True
            if sender != gpu:
                yield "between" if sender // cluster.gpus != node else "inside", sender, gpu


def counted(home, gpus, cluster, two_hops) -> Rows:
    tables = {wire: torch.zeros(cluster.size, cluster.size, dtype=torch.int64) for wire in Rows._fields}
    for wire, sender, receiver in sent(home, gpus, cluster, two_hops):
        tables[wire][sender, receiver] += 1
    return Rows(**tables)


def random_tokens(cluster, tokens=50, chosen=5, seed=0):
    source = torch.Generator().manual_seed(seed)
    return (torch.randint(cluster.size, (tokens,), generator=source),
            torch.randint(cluster.size, (tokens, chosen), generator=source))


CLUSTERS = [Cluster(2, 4), Cluster(3, 2), Cluster(1, 4), Cluster(4, 1)]
WAYS = {"flat": (traffic.flat, False), "two hops": (traffic.two_hops, True)}


@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda c: f"{c.nodes}x{c.gpus}")
@pytest.mark.parametrize("way", WAYS)
def test_rows_are_those_of_every_single_step(cluster, way):
    function, hops = WAYS[way]
    for seed in range(5):
        home, gpus = random_tokens(cluster, seed=seed)
        got, want = function(home, gpus, cluster), counted(home, gpus, cluster, hops)
        assert torch.equal(got.between, want.between) and torch.equal(got.inside, want.inside)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**20))
def test_what_holds_for_every_exchange(nodes, gpus_of_node, chosen, seed):
    cluster = Cluster(nodes, gpus_of_node)
    home, gpus = random_tokens(cluster, 30, chosen, seed)
    flat, hops = traffic.flat(home, gpus, cluster), traffic.two_hops(home, gpus, cluster)
    assert hops.between.sum() <= flat.between.sum()
    assert hops.between.sum() == traffic.node_copies(home, gpus, cluster).sum()
    assert traffic.node_copies(home, gpus, cluster).max() <= min(chosen, nodes - 1)
    same_number = torch.arange(cluster.size) % gpus_of_node
    assert not hops.between[same_number[:, None] != same_number].any()      # wires between nodes join equal numbers
    for rows in (flat, hops):
        together = torch.arange(cluster.size)[:, None] // gpus_of_node == torch.arange(cluster.size) // gpus_of_node
        assert not rows.between[together].any() and not rows.inside[~together].any()
        assert not rows.inside.diagonal().any()


def test_one_token_by_hand():
    """Two nodes of four: the token sits on GPU 1; its experts are on GPUs 1, 2, 5, 6 and once more 6."""
    cluster, home, gpus = Cluster(2, 4), torch.tensor([1]), torch.tensor([[1, 2, 5, 6, 6]])
    flat, hops = traffic.flat(home, gpus, cluster), traffic.two_hops(home, gpus, cluster)
    assert flat.between.nonzero().tolist() == [[1, 5], [1, 6]] and flat.between[1].sum() == 3
    assert hops.between.nonzero().tolist() == [[1, 5]] and hops.between.sum() == 1
    assert hops.inside.nonzero().tolist() == [[1, 2], [5, 6]] and hops.inside[5, 6] == 2


# ---- expected copies ------------------------------------------------------------------------------------------------


def test_copies_at_full_size():
    assert traffic.copies_by_expert(8, 8) == 7.0
    assert traffic.copies_by_node(256, 8, 8) == pytest.approx(4.63282, abs=1e-5)


def copies_of(limit, seed=0):
    chosen = traffic.choose(20_000, 256, 8, limit, 8, seed=seed)
    home, gpus = torch.arange(20_000) % 64, chosen // 4
    flat, hops = traffic.flat(home, gpus, H800), traffic.two_hops(home, gpus, H800)
    return flat.between.sum().item() / 20_000, hops.between.sum().item() / 20_000


def test_counted_copies_meet_the_closed_forms():
    flat, hops = copies_of(limit=8)
    assert flat == pytest.approx(7.0, abs=0.02) and hops == pytest.approx(4.633, abs=0.02)


def test_the_limit_alone_saves_nothing_and_with_two_hops_a_quarter_more():
    flat, hops = copies_of(limit=4)
    assert flat == pytest.approx(7.0, abs=0.02) and hops == pytest.approx(3.47, abs=0.02)
    chosen = traffic.choose(2_000, 256, 8, 4, 8)
    assert traffic.node_copies(torch.zeros(2_000, dtype=torch.int64), chosen // 4, H800).max() == 4


def test_skew_makes_some_experts_wanted():
    even, skewed = (traffic.choose(4_000, 64, 4, 4, 4, skew).flatten().bincount(minlength=64) for skew in (0.0, 1.0))
    assert even.max() < 1.3 * even.double().mean() and skewed.max() > 6 * skewed.double().mean()
    first = traffic.choose(4_000, 64, 1, 1, 1, 1.0).flatten().bincount(minlength=64).sort(descending=True).values
    want = 4_000 / torch.arange(1, 65) / (1 / torch.arange(1, 65)).sum()          # 1 / i, if a token takes one expert
    assert (first[:8].double() / want[:8]).sub(1).abs().max() < 0.15


# ---- time -----------------------------------------------------------------------------------------------------------


def test_a_row_at_full_size():
    assert traffic.row_bytes(7168) == 7_392 and traffic.row_bytes(7168, "bf16") == 14_336
    assert traffic.row_bytes(130) == 138
    with pytest.raises(ValueError, match="payload is 'fp32'; it must be 'fp8' or 'bf16'"):
        traffic.row_bytes(7168, "fp32")


def test_the_busiest_gpu_is_the_time():
    between, inside = torch.zeros(2, 4, 4, dtype=torch.int64)
    between[0, 2], between[1, 2], inside[0, 1] = 30, 20, 7        # GPU 2 receives 50, more than any sends
    got = traffic.seconds(Rows(between, inside), 1000, Cluster(2, 2, between=1e6, inside=7e6))
    assert got == (0.05, 0.001)


# ---- the tests can fail ---------------------------------------------------------------------------------------------


def a_row_for_each_expert(home, gpus, cluster):
    """Two hops that forget to merge: a row between nodes for each choice."""
    entry = gpus // cluster.gpus * cluster.gpus + home[:, None] % cluster.gpus
    first, second = traffic.flat(home, entry, cluster), traffic._split(entry, gpus, cluster)
    return Rows(first.between, second.inside)


def own_node_counted(home, gpus, cluster):
    return traffic._visited(gpus, cluster).sum(1)


def straight_to_the_expert(home, gpus, cluster):
    """Merged, but to the GPU of the first expert instead of the one with the sender's number."""
    rows = traffic.flat(home, gpus[:, :1], cluster)
    return Rows(rows.between, traffic._split(gpus[:, :1].expand_as(gpus), gpus, cluster).inside)


@pytest.mark.parametrize("name, fault", [("two_hops", a_row_for_each_expert), ("two_hops", straight_to_the_expert),
                                         ("two_hops", traffic.flat), ("node_copies", own_node_counted)])
def test_faults_are_seen(monkeypatch, name, fault):
    monkeypatch.setattr(traffic, name, fault)
    with pytest.raises(AssertionError):
        test_what_holds_for_every_exchange()
    if name == "two_hops":
        monkeypatch.setitem(WAYS, "two hops", (fault, True))
        with pytest.raises(AssertionError):
            test_rows_are_those_of_every_single_step(Cluster(2, 4), "two hops")
