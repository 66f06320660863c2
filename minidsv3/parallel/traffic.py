"""Rows that cross each kind of wire when tokens visit their experts, and the time they take (report 2.1.2 and 3.2).

A cluster has two kinds of wires: between nodes (InfiniBand, one port for each GPU) and inside a node (NVLink, 3.2 times
as fast on the H800). A token's vector is a row. Three ways to send it:

    by expert   a row for each chosen expert, straight to the expert's GPU
    by GPU      a row for each GPU that hosts a chosen expert (`dispatch.flat_hops`)
    by node     a row for each node that hosts a chosen expert, to the GPU with the sender's own number there; from that
                GPU a row for each GPU of the node, over the wires inside (`dispatch.two_hops`)

Node-limited routing bounds the nodes that a token chooses. Only the third way turns that into a bound on rows. Results
come back over the same wires, so the counts hold for combine as well. Nothing is sent here: `dispatch.py` does that.
"""

from math import comb
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import route
from ..kernels.quantize import TILE


class Cluster(NamedTuple):
    """`nodes` x `gpus` GPUs, numbered node by node, and bytes a second that one GPU sends over each kind of wire."""

    nodes: int
    gpus: int                           # of a node
    between: float = 50e9               # InfiniBand (report section 3.2.2)
    inside: float = 160e9               # NVLink of the H800

    @property
    def size(self) -> int:
        return self.nodes * self.gpus


class Rows(NamedTuple):
    """Rows that GPUs send each other, [sender, receiver] int64. A row that stays on its GPU is in neither."""

    between: Tensor
    inside: Tensor


class Seconds(NamedTuple):
    """How long each kind of wire is busy, if all GPUs send at once and each sends and receives at full speed."""

    between: float
    inside: float


def by_expert(home: Tensor, gpus: Tensor, cluster: Cluster) -> Rows:
    """A row for each choice. home [N]: the GPU of each token; gpus [N, k]: the GPUs of its chosen experts."""
    return _rows(home[:, None].expand_as(gpus), gpus, cluster)


def by_gpu(home: Tensor, gpus: Tensor, cluster: Cluster) -> Rows:
    """A row for each GPU of each token. Arguments as `by_expert`'s."""
    token, gpu = visits(gpus, cluster.size).nonzero(as_tuple=True)
    return _rows(home[token], gpu, cluster)


def by_node(home: Tensor, gpus: Tensor, cluster: Cluster) -> Rows:
    """A row for each node of each token, and there a row for each of its GPUs. Arguments as `by_expert`'s."""
    def entry(token: Tensor, node: Tensor) -> Tensor:
        return node * cluster.gpus + home[token] % cluster.gpus

    token, node = visits(gpus // cluster.gpus, cluster.nodes).nonzero(as_tuple=True)
    first = _rows(home[token], entry(token, node), cluster)
    token, gpu = visits(gpus, cluster.size).nonzero(as_tuple=True)
    second = _rows(entry(token, gpu // cluster.gpus), gpu, cluster)
    return Rows(first.between, second.inside)


WAYS = {"by expert": by_expert, "by GPU": by_gpu, "by node": by_node}


def visits(hosts: Tensor, members: int) -> Tensor:
    """Which of `members` nodes or GPUs host a chosen expert: hosts [N, k] -> [N, members] bool."""
    return torch.zeros(len(hosts), members, dtype=torch.bool).scatter(1, hosts, True)


def _rows(senders: Tensor, receivers: Tensor, cluster: Cluster) -> Rows:
    """One row for each pair, counted by the wire that it takes."""
    pairs = (senders * cluster.size + receivers).flatten()
    rows = pairs.bincount(minlength=cluster.size ** 2).view(cluster.size, cluster.size)
    node = torch.arange(cluster.size) // cluster.gpus
    together = node[:, None] == node
    return Rows(rows * ~together, rows * together * ~torch.eye(cluster.size, dtype=torch.bool))


def seconds(rows: Rows, row_bytes: int, cluster: Cluster) -> Seconds:
    """The time of the busiest GPU: the larger of what it sends and what it receives, over the speed of the wire."""
    def busiest(table: Tensor) -> int:
        return int(torch.maximum(table.sum(0), table.sum(1)).max())

    return Seconds(busiest(rows.between) * row_bytes / cluster.between,
                   busiest(rows.inside) * row_bytes / cluster.inside)


def row_bytes(hidden: int, payload: str = "fp8") -> int:
    """Bytes of a row: dispatch sends FP8 codes and an FP32 scale for each 128 of them, combine returns BF16.

    7,392 and 14,336 at full size (report section 3.3.3). Raises ValueError for another payload.
    """
    if payload not in ("fp8", "bf16"):
        raise ValueError(f"payload is {payload!r}; it must be 'fp8' or 'bf16'")
    return 2 * hidden if payload == "bf16" else hidden + 4 * -(-hidden // TILE)


# ---- how many copies to expect --------------------------------------------------------------------------------------


def copies_by_expert(nodes: int, top_k: int) -> float:
    """Expected rows of a token to other nodes if each expert gets its own: 7.00 at full size."""
    return top_k * (nodes - 1) / nodes


def copies_by_node(experts: int, nodes: int, top_k: int) -> float:
    """Expected other nodes with at least one of top_k different experts, chosen at random: 4.63 at full size.

    With a limit on nodes the scores decide which are kept, and there is no short formula: `choose` and count.
    """
    missed = comb(experts - experts // nodes, top_k) / comb(experts, top_k)
    return (nodes - 1) * (1 - missed)


def choose(tokens: int, experts: int, nodes: int, limit: int, top_k: int, skew: float = 0.0, seed: int = 0) -> Tensor:
    """Choices of random tokens, [tokens, top_k], by the package's router with a group of experts for each node.

    With `skew` some experts are wanted more: the i-th of a random order about i^-skew times as often as the first.
    """
    source = torch.Generator().manual_seed(seed)
    uniform = torch.rand(tokens, experts, generator=source, dtype=torch.float64)
    wanted = torch.arange(1, experts + 1, dtype=torch.float64)[torch.randperm(experts, generator=source)]
    # The largest of log(weight) + Gumbel noise are a sample without replacement by weight; a quarter of it, so that
    # the sigmoids of large ones stay apart.
    logits = (-(-uniform.log()).log() - skew * wanted.log()) / 4
    return route(logits, torch.zeros(experts, dtype=torch.float64), n_group=nodes, topk_group=limit,
                 top_k=top_k).experts
