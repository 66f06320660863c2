"""Moving tokens to the GPUs of their experts and back (report section 3.2.2).

Experts live on many GPUs, so tokens travel. The same three steps do it at every scale; a *member* is whatever hosts
experts there: a node, a GPU, or an expert itself.

    fan out     one copy of a token for each member that hosts any of its experts; copies sorted by member
    exchange    every member gets its copies: an all-to-all with uneven shares
    fan in      once the copies are back, those of one token are added up

Flat dispatch is one such hop over all GPUs. Node-limited routing takes two, and a token crosses to a node only once:

        node 0              node 1
    GPU 0     GPU 1     GPU 2     GPU 3     hop 1   0 -> 2           between nodes (InfiniBand): one copy a node, to
      x ------------------> x                                        the GPU with the sender's number in its node
                            x ------> x     hop 2   2 -> 2, 2 -> 3   inside the node (NVLink): one copy a GPU

The way back adds first inside the node, so that one row returns: with the report's limit of M = 4 nodes at most four
copies cross where eight experts were chosen. Whatever carries gradients has a backward that is the other way: fan out's
is fan in, dispatch's is combine, and the reverse. The router's weights travel with the tokens, because sums are taken
where the experts are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..kernels import Permutation, permute, quantize_tiles, sort_by_expert, unpermute
from ..kernels.fp8_gemm import dequantize_tiles
from ..kernels.quantize import TINY

PAYLOADS = (None, "fp8")


class Tokens(NamedTuple):
    """N tokens, or copies of them, that want experts. Experts count from 0 inside the member that holds the tokens."""

    x: Tensor          # [N, hidden]
    experts: Tensor    # [N, k] int64; -1: this choice is served elsewhere
    weights: Tensor    # [N, k], at least FP32; 0 there


class Hop(NamedTuple):
    """One exchange: among which ranks, and which of them (numbers in the group) stand in this rank's node."""

    group: dist.ProcessGroup
    node: range


class Shares(NamedTuple):
    """Of one exchange: how many rows go to each member of the group, and how many come from each."""

    group: dist.ProcessGroup
    sent: list[int]
    received: list[int]

    @property
    def back(self) -> "Shares":
        return Shares(self.group, self.received, self.sent)


class Traffic(NamedTuple):
    """Rows that left one rank in a dispatch, all hops together. The way back carries as many."""

    copies: int      # to any other GPU
    crossing: int    # of them to another node


class Leg(NamedTuple):
    """One hop as it was travelled: what the way back needs to know."""

    order: Permutation    # of the copies that were made
    shares: Shares
    payload: str | None
    traffic: Traffic


# ---- which way --------------------------------------------------------------------------------------------------

def flat_hops(group: dist.ProcessGroup, gpus_per_node: int | None = None) -> list[Hop]:
    """All GPUs at once. `gpus_per_node` (None: the group is one node) only decides what counts as crossing."""
    gpus = gpus_per_node or group.size()
    first = group.rank() // gpus * gpus
    return [Hop(group, range(first, first + gpus))]


def two_hops(mesh: DeviceMesh) -> list[Hop]:
    """Node by node, then GPU by GPU, on a mesh ("node", "gpu") whose first rank holds the first experts."""
    node, gpu = mesh.get_group("node"), mesh.get_group("gpu")
    return [Hop(node, range(node.rank(), node.rank() + 1)), Hop(gpu, range(gpu.size()))]


# ---- there and back ---------------------------------------------------------------------------------------------

def dispatch(tokens: Tokens, experts: int, hops: Sequence[Hop], payload: str | None = None
             ) -> tuple[Tokens, list[Leg]]:
    """Brings tokens to the ranks of their experts; returns what arrives here, and the trail that `combine` goes back.

    `experts` counts all of them; each rank of the hops hosts an equal run, in order. All ranks must call it together.
    `payload` "fp8" sends 1 x 128 tiles of E4M3 with power-of-two scales towards experts, tokens forward and gradients
    of outputs backward, and BF16 on both ways back (section 3.3.2). A value's error is at most 1/16 of it, or 2^-10 of
    its tile's scale if it is tiny; gradients pass the rounding straight through. None sends x as it is.
    """
    if payload not in PAYLOADS:
        raise ValueError(f"payload is {payload!r}; it must be 'fp8', or None for the tokens' own dtype")
    trail = []
    for hop in hops:
        experts //= hop.group.size()
        tokens, leg = travel(tokens, experts, hop, payload)
        trail.append(leg)
    return tokens, trail


def combine(rows: Tensor, trail: Sequence[Leg]) -> Tensor:
    """The way back: rows [R, hidden], one for each token that arrived -> [N, hidden], summed at each hop."""
    for leg in reversed(trail):
        there = "bf16" if leg.payload else None
        rows = fan_in(Exchange.apply(rows, leg.shares.back, there, leg.payload), leg.order)
    return rows


def traffic(trail: Sequence[Leg]) -> Traffic:
    """What all hops of a dispatch sent."""
    return Traffic(sum(leg.traffic.copies for leg in trail), sum(leg.traffic.crossing for leg in trail))


def travel(tokens: Tokens, experts: int, hop: Hop, payload: str | None) -> tuple[Tokens, Leg]:
    """One hop, to members of `experts` experts each."""
    copies, order = fan_out(tokens, hop.group.size(), experts)
    sent = order.ends[:-1].diff(prepend=order.ends.new_zeros(1))
    shares = agree(sent, hop.group)
    arrived = Tokens(Exchange.apply(copies.x, shares, payload, "bf16" if payload else None),
                     all_to_all(copies.experts, shares), Exchange.apply(copies.weights, shares, None, None))
    leave = [rows for member, rows in enumerate(shares.sent) if member != hop.group.rank()]
    cross = [rows for member, rows in enumerate(shares.sent) if member not in hop.node]
    return arrived, Leg(order, shares, payload, Traffic(sum(leave), sum(cross)))


# ---- copies -----------------------------------------------------------------------------------------------------

def fan_out(tokens: Tokens, members: int, experts: int) -> tuple[Tokens, Permutation]:
    """One copy of each token for every member that hosts any of its experts, sorted by member, then by token.

    Member m hosts experts m * `experts` and on; a copy keeps the choices that are its member's. The permutation has one
    member more, `nowhere`, which fills up the lines of tokens with fewer copies; its rows stay behind.
    """
    nowhere, device = members, tokens.x.device
    home = torch.where(tokens.experts < 0, nowhere, tokens.experts // experts)                             # [N, k]
    visits = torch.zeros(len(home), members + 1, dtype=torch.bool, device=device).scatter_(1, home, True)[:, :members]
    slots = int(F.pad(visits.sum(1), (0, 1), value=1).max())                       # the most copies that a token has
    # [N, slots]: the members that a token goes to, ascending, then `nowhere`
    goals = torch.where(visits, torch.arange(members, device=device), nowhere).sort(1).values[:, :slots]
    order = sort_by_expert(goals, torch.bincount(goals.flatten(), minlength=members + 1))
    sources = order.sources[:int(order.ends[-2])]
    token, member = sources // slots, goals.flatten()[sources].unsqueeze(1)
    own = home[token] == member
    return Tokens(permute(tokens.x, order)[:len(sources)],
                  torch.where(own, tokens.experts[token] - member * experts, -1),
                  torch.where(own, tokens.weights[token], 0)), order


def fan_in(rows: Tensor, order: Permutation) -> Tensor:
    """Adds up the copies of each token: rows [copies, hidden] in the order of `fan_out` -> [N, hidden]."""
    nowhere = len(order.sources) - len(rows)
    return unpermute(F.pad(rows, (0, 0, 0, nowhere)), order)


# ---- exchange ---------------------------------------------------------------------------------------------------

def agree(sent: Tensor, group: dist.ProcessGroup) -> Shares:
    """Everybody tells every member how many rows to expect. sent [members], counted on the device."""
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent.contiguous(), group=group)
    return Shares(group, *torch.stack((sent, received)).tolist())      # split sizes live on the host: this waits


class Exchange(torch.autograd.Function):
    """Rows [R, ..] sorted by member -> rows sorted by who sent them. Gradients take the way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, shares: Shares, forward: str | None, backward: str | None) -> Tensor:
        ctx.shares, ctx.payload = shares, backward
        return send(rows, shares, forward)

    @staticmethod
    def backward(ctx, slopes: Tensor) -> tuple:
        return send(slopes, ctx.shares.back, ctx.payload), None, None, None


def send(rows: Tensor, shares: Shares, payload: str | None) -> Tensor:
    """`all_to_all` of rows [R, hidden] in a smaller format; what arrives is in the rows' dtype again."""
    if payload == "bf16":
        return all_to_all(rows.bfloat16(), shares).to(rows.dtype)
    if payload == "fp8":
        codes, scales = quantize_tiles(rows, pow2=True, least=TINY)              # gradients may be tiny
        codes = all_to_all(codes.view(torch.uint8), shares).view(codes.dtype)    # not every backend knows FP8
        return dequantize_tiles(codes, all_to_all(scales.T, shares).T).to(rows.dtype)
    return all_to_all(rows, shares)


def all_to_all(rows: Tensor, shares: Shares) -> Tensor:
    """rows [sum of sent, ..] -> [sum of received, ..], without gradient."""
    arrived = rows.new_empty(sum(shares.received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), shares.received, shares.sent, group=shares.group)
    return arrived
