"""Which GPU holds which experts: DeepSeek's expert-parallel load balancer, EPLB (report sections 3.4.1 and 3.4.2).

A step of expert parallelism waits for its fullest GPU. Experts are not equally wanted, but their loads change slowly:
the serving units count them, and every ten minutes or so place the experts anew. Two means are used, each greedy:

    replicate    give one more copy to the expert whose copies carry most, until all slots are taken
    pack         deal items out from the heaviest to the lightest, each to the lightest pack that still has room

Hierarchical, if nodes divide the groups of node-limited routing: pack groups onto nodes, replicate inside each node,
pack copies onto its GPUs. A group stays on one node, and a token still crosses to at most M of them. Otherwise global:
the same with all experts as one group on one node. Names are EPLB's: a logical expert has one or more physical slots.
All ties go to the lower number, so that every rank computes the same placement for itself.
"""

import heapq
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Placement(NamedTuple):
    """Slots and experts of L layers. GPU g of G holds the slots g S / G up to (g + 1) S / G of all S."""

    phy2log: Tensor     # [L, S] int64: the expert in each slot
    log2phy: Tensor     # [L, E, most copies] int64: the slots of each expert, ascending, then -1
    logcnt: Tensor      # [L, E] int64: copies of each expert


def from_slots(phy2log: Tensor, experts: int) -> Placement:
    """The `Placement` that puts expert phy2log[l, s] into slot s of layer l. Raises ValueError if an expert has none.

    `from_slots(torch.arange(experts)[None], experts)` is what one has without a balancer: experts in order, no copies.
    """
    logcnt = torch.stack([row.bincount(minlength=experts) for row in phy2log])
    if logcnt.shape[1] != experts or not logcnt.all():
        raise ValueError(f"phy2log must name each of {experts} experts at least once and no other; its rows hold "
                         f"{[len(row.unique()) for row in phy2log]} different ones, up to {int(phy2log.max())}")
    log2phy = torch.full((*logcnt.shape, int(logcnt.max())), -1)
    for layer, row in enumerate(phy2log.tolist()):
        seen = Counter()
        for slot, expert in enumerate(row):
            log2phy[layer, expert, seen[expert]] = slot
            seen[expert] += 1
    return Placement(phy2log, log2phy, logcnt)


# ---- the two greedy steps -------------------------------------------------------------------------------------------


def balanced_packing(weights: Sequence[float], packs: int) -> list[list[int]]:
    """Deals the items out so that every pack gets equally many and the heaviest pack is light: the items of each pack.

    Raises ValueError if packs do not divide the items.
    """
    if packs < 1 or len(weights) % packs:
        raise ValueError(f"{len(weights)} items cannot be dealt out to {packs} packs; packs must divide them")
    room = len(weights) // packs
    filled = [[] for _ in range(packs)]
    lightest = [(0.0, pack) for pack in range(packs)]               # a heap of those that have room
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        weight, pack = heapq.heappop(lightest)
        filled[pack].append(item)
        if len(filled[pack]) < room:
            heapq.heappush(lightest, (weight + weights[item], pack))
    return filled


def replicate_experts(weights: Sequence[float], slots: int) -> list[int]:
    """The expert in each slot: one slot for every expert in order, then the copies in the order they were given.

    A copy goes to the largest weight for each copy that an expert has, not to the largest weight.
    Raises ValueError for fewer slots than experts.
    """
    if slots < len(weights):
        raise ValueError(f"{slots} slots cannot hold {len(weights)} experts; each needs at least one")
    copies = [1] * len(weights)
    heaviest = [(-weight, expert) for expert, weight in enumerate(weights)]
    heapq.heapify(heaviest)
    extra = []
    for _ in range(slots - len(weights)):
        _, expert = heapq.heappop(heaviest)
        extra.append(expert)
        copies[expert] += 1
        heapq.heappush(heaviest, (-weights[expert] / copies[expert], expert))
    return [*range(len(weights)), *extra]


# ---- a whole placement ----------------------------------------------------------------------------------------------


def rebalance_experts(load: Tensor, replicas: int, groups: int, nodes: int, gpus: int) -> Placement:
    """EPLB: hierarchical if `nodes` divide `groups`, otherwise global.

    load [L, E]: tokens (or any weight) of each expert in the last minutes. `replicas` slots over all GPUs.
    Raises ValueError for a load that is not finite and at least 0, and for sizes that do not divide.
    """
    _check_load(load)
    if groups < 1 or load.shape[1] % groups:
        raise ValueError(f"groups is {groups}; groups must divide the {load.shape[1]} experts")
    if nodes < 1 or gpus % nodes:
        raise ValueError(f"nodes is {nodes}; nodes must divide the {gpus} GPUs")
    if gpus < 1 or replicas % gpus:
        raise ValueError(f"replicas is {replicas}; each of {gpus} GPUs must hold equally many")
    if groups % nodes:
        groups = nodes = 1
    rows = [_place_layer(row, replicas, groups, nodes, gpus) for row in load.double().tolist()]
    return from_slots(torch.tensor(rows), load.shape[1])


def _place_layer(load: list[float], replicas: int, groups: int, nodes: int, gpus: int) -> list[int]:
    """The expert in each slot of one layer, node by node and GPU by GPU."""
    size = len(load) // groups
    members = [range(group * size, (group + 1) * size) for group in range(groups)]
    slots = []
    for node in balanced_packing([math.fsum(load[e] for e in group) for group in members], nodes):
        experts = [e for group in node for e in members[group]]
        held = [experts[i] for i in replicate_experts([load[e] for e in experts], replicas // nodes)]
        copies = Counter(held)
        for gpu in balanced_packing([load[e] / copies[e] for e in held], gpus // nodes):
            slots += [held[i] for i in gpu]
    return slots


def _check_load(load: Tensor) -> None:
    if load.dim() != 2 or not load.numel():
        raise ValueError(f"load has shape {list(load.shape)}; it must be [layers, experts]")
    if not (load.isfinite() & (load >= 0)).all():
        raise ValueError(f"load holds {load.min():g} to {load.max():g}; loads must be finite and at least 0")


# ---- what it is worth -----------------------------------------------------------------------------------------------


def gpu_load(load: Tensor, placed: Placement, gpus: int) -> Tensor:
    """What each GPU gets when an expert's copies share its load evenly: load [L, E] -> [L, gpus] in float64."""
    share = load.double() / placed.logcnt
    return share.gather(1, placed.phy2log).unflatten(1, (gpus, -1)).sum(-1)


def imbalance(load: Tensor, placed: Placement, gpus: int) -> Tensor:
    """Largest over mean load of the GPUs, [L]: how many times longer experts take than with perfect balance."""
    loads = gpu_load(load, placed, gpus)
    return loads.amax(-1) / loads.mean(-1)


def moved(old: Placement, new: Placement, gpus: int) -> int:
    """Slots, over all layers, whose expert their GPU did not hold before: what EPLB does not try to keep small."""
    per_gpu = ([row.tolist() for row in placed.phy2log.unflatten(1, (gpus, -1)).flatten(0, 1)] for placed in (old, new))
    return sum((Counter(after) - Counter(before)).total() for before, after in zip(*per_gpu, strict=True))


# ---- the report's two units -----------------------------------------------------------------------------------------


def prefill(load: Tensor) -> Placement:
    """The prefilling unit (section 3.4.1): 4 nodes, 32 GPUs, 32 redundant experts, so 9 routed ones on each GPU.

    load [L, 256]. Hierarchical: the 8 groups go two to a node.
    """
    return rebalance_experts(load, replicas=load.shape[1] + 32, groups=8, nodes=4, gpus=32)


def decode(load: Tensor) -> Placement:
    """The decoding unit (section 3.4.2): 40 nodes, 320 GPUs with one expert each, and the shared expert among them.

    load [L, 257]: see `with_shared`. 64 GPUs are for redundant experts and the shared one; how many copies the shared
    one gets the report does not say, here the greedy step decides. Global: 40 nodes do not divide 8 groups.
    """
    return rebalance_experts(load, replicas=load.shape[1] - 1 + 64, groups=1, nodes=1, gpus=320)


def with_shared(load: Tensor, top_k: int = 8) -> Tensor:
    """Adds the shared expert as one more routed one, which every token takes: load [L, E] -> [L, E + 1] in float64."""
    return torch.cat([load.double(), load.double().sum(1, keepdim=True) / top_k], 1)
