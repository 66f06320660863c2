"""Rows on wires, counted token by token in plain Python, and the report's numbers at full size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minidsv3.parallel import traffic
from minidsv3.parallel.traffic import Cluster, Rows

H800 = Cluster(8, 8)


def sent(home, gpus, cluster, way):
    """Every row that leaves a GPU, one after the other: (sender, receiver)."""
    for token, chosen in zip(home.tolist(), gpus.tolist()):
        if way == "by_expert":
            yield from ((token, gpu) for gpu in chosen)
        elif way == "by_gpu":
            yield from ((token, gpu) for gpu in set(chosen))
        else:
            for node in {gpu // cluster.gpus for gpu in chosen}:
                entry = node * cluster.gpus + token % cluster.gpus
                yield token, entry
                yield from ((entry, gpu) for gpu in set(chosen) if gpu // cluster.gpus == node)


def counted(home, gpus, cluster, way) -> Rows:
    tables = {wire: torch.zeros(cluster.size, cluster.size, dtype=torch.int64) for wire in Rows._fields}
    for sender, receiver in sent(home, gpus, cluster, way):
        if sender != receiver:
            wire = "inside" if sender // cluster.gpus == receiver // cluster.gpus else "between"
            tables[wire][sender, receiver] += 1
    return Rows(**tables)


def random_tokens(cluster, tokens=50, chosen=5, seed=0):
    source = torch.Generator().manual_seed(seed)
    return (torch.randint(cluster.size, (tokens,), generator=source),
            torch.randint(cluster.size, (tokens, chosen), generator=source))


CLUSTERS = [Cluster(2, 4), Cluster(3, 2), Cluster(1, 4), Cluster(4, 1)]
WAYS = ("by_expert", "by_gpu", "by_node")


@pytest.mark.parametrize("cluster", CLUSTERS, ids=lambda c: f"{c.nodes}x{c.gpus}")
@pytest.mark.parametrize("way", WAYS)
def test_rows_are_those_of_every_single_step(cluster, way):
    for seed in range(5):
        home, gpus = random_tokens(cluster, seed=seed)
        got, want = getattr(traffic, way)(home, gpus, cluster), counted(home, gpus, cluster, way)
        assert torch.equal(got.between, want.between) and torch.equal(got.inside, want.inside)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 2**20))
def test_what_holds_for_every_exchange(nodes, gpus_of_node, chosen, seed):
    """A coarser merge never sends more between nodes, and the coarsest at most one row to each other node."""
    cluster = Cluster(nodes, gpus_of_node)
    home, gpus = random_tokens(cluster, 30, chosen, seed)
    expert, gpu, node = (getattr(traffic, way)(home, gpus, cluster) for way in WAYS)
    assert node.between.sum() <= gpu.between.sum() <= expert.between.sum()
    assert node.between.sum() <= 30 * min(chosen, nodes - 1)
    number, place = torch.arange(cluster.size) % gpus_of_node, torch.arange(cluster.size) // gpus_of_node
    assert not node.between[number[:, None] != number].any()        # between nodes, equal numbers talk
    together = place[:, None] == place
    for rows in (expert, gpu, node):
        assert not rows.between[together].any() and not rows.inside[~together].any()
        assert not rows.inside.diagonal().any()


def test_one_token_by_hand():
    """Two nodes of four: the token sits on GPU 1; its experts are on GPUs 1, 2, 5, 6 and once more 6."""
    cluster, home, gpus = Cluster(2, 4), torch.tensor([1]), torch.tensor([[1, 2, 5, 6, 6]])
    expert, gpu, node = (getattr(traffic, way)(home, gpus, cluster) for way in WAYS)
    assert [rows.between.sum() for rows in (expert, gpu, node)] == [3, 2, 1]
    assert gpu.between.nonzero().tolist() == [[1, 5], [1, 6]] and node.between.nonzero().tolist() == [[1, 5]]
    assert gpu.inside.nonzero().tolist() == [[1, 2]] and node.inside.nonzero().tolist() == [[1, 2], [5, 6]]


# ---- expected copies ------------------------------------------------------------------------------------------------


def test_copies_at_full_size():
    assert traffic.copies_by_expert(8, 8) == 7.0
    assert traffic.copies_by_node(256, 8, 8) == pytest.approx(4.63282, abs=1e-5)


def copies_of(limit, seed=0):
    chosen = traffic.choose(20_000, 256, 8, limit, 8, seed=seed)
    home, gpus = torch.arange(20_000) % 64, chosen // 4
    return [getattr(traffic, way)(home, gpus, H800).between.sum().item() / 20_000 for way in WAYS]


def test_counted_copies_meet_the_closed_forms():
    expert, gpu, node = copies_of(limit=8)
    assert expert == pytest.approx(7.0, abs=0.02) and node == pytest.approx(4.633, abs=0.02)
    assert gpu == pytest.approx(traffic.copies_by_node(256, 64, 8) * 56 / 63, abs=0.02)     # 56 GPUs on other nodes


def test_the_limit_bounds_rows_only_where_nodes_are_merged():
    expert, gpu, node = copies_of(limit=4)
    assert expert == pytest.approx(7.0, abs=0.02) and node == pytest.approx(3.47, abs=0.02)
    assert gpu > 6.2
    chosen = traffic.choose(2_000, 256, 8, 4, 8)
    assert traffic.visits(chosen // 32, 8).sum(1).max() == 4


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
    """By node, but a row between nodes for each choice."""
    entry = gpus // cluster.gpus * cluster.gpus + home[:, None] % cluster.gpus
    return Rows(traffic.by_expert(home, entry, cluster).between, RIGHT(home, gpus, cluster).inside)


def to_the_first_gpu(home, gpus, cluster):
    """By node, but to the lowest GPU of each node instead of the one with the sender's number."""
    return RIGHT(home // cluster.gpus * cluster.gpus, gpus, cluster)


def own_node_counted(hosts, members):
    return torch.ones(len(hosts), members, dtype=torch.bool)


RIGHT = traffic.by_node


@pytest.mark.parametrize("name, fault", [
    ("by_node", a_row_for_each_expert), ("by_node", to_the_first_gpu), ("by_node", traffic.by_gpu),
    ("by_gpu", traffic.by_expert), ("by_expert", traffic.by_gpu), ("visits", own_node_counted)])
def test_faults_are_seen(monkeypatch, name, fault):
    monkeypatch.setattr(traffic, name, fault)
    with pytest.raises(AssertionError):
        for way in WAYS:
            test_rows_are_those_of_every_single_step(Cluster(2, 4), way)
