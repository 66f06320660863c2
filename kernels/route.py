"""The router: which experts a token takes, and with what weight (section 2.1.2, eqs. 12-16, and node-limited routing).

    s = sigmoid(logits)                        affinities (15)
    select on s + b                            the bias balances the load and does nothing else (16)
    groups: score = sum of the two best s + b; keep the topk_group best groups, mask the others with -inf
    weights = s of the chosen / their sum * scaling_factor        (13), from s without b

Masking with 0 instead of -inf lets a forbidden expert win whenever s + b is negative. Ties go to the lower index; NaN
counts as the largest value, and makes its token's weights NaN. Biases are finite. The gradient, with S the sum of the
chosen s, f the factor and p = s / S:

    d logits = f / S (dw - sum of p dw) s (1 - s)    for the chosen, 0 elsewhere

The kernel compares the same FP32 sums as the definition, all 32 bits of them. Their sigmoids may differ in the last
bit, though, so two experts that close may change places between kernel and definition; equal ones never do.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import processors, tl, triton, uses_triton
from .contract import fused_by_compiler
from .precision import wide

_LOWEST = tl.constexpr(-2**31)   # below the order of every float


class Routing(NamedTuple):
    """One layer's decisions for N tokens: what the balance loss, the bias update and the views read."""

    logits: torch.Tensor     # [N, experts], at least FP32, with graph
    experts: torch.Tensor    # [N, k] int64, best first by s + b
    weights: torch.Tensor    # [N, k], at least FP32, with graph
    load: torch.Tensor       # [experts] float32: how many tokens chose each


def route_reference(logits: torch.Tensor, bias: torch.Tensor, *, n_group: int, topk_group: int, top_k: int,
                    normalise: bool = True, scaling_factor: float = 1.0) -> Routing:
    """The definition. logits [N, experts] and bias [experts] in at least FP32; returns a `Routing`."""
    scores = wide(logits).sigmoid()
    choice = (scores + bias).detach().unflatten(-1, (n_group, -1))          # [N, groups, experts of a group]
    if topk_group < n_group:
        group_score = choice.topk(2, dim=-1).values.sum(-1)
        kept = _best(group_score, topk_group)
        dropped = torch.ones_like(group_score, dtype=torch.bool).scatter(-1, kept, False)
        choice = choice.masked_fill(dropped[..., None], float("-inf"))
    experts = _best(choice.flatten(-2), top_k)
    weights = scores.gather(-1, experts)
    if normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    load = torch.zeros(logits.shape[-1], device=logits.device).scatter_add_(
        0, experts.flatten(), torch.ones(experts.numel(), device=logits.device))
    return Routing(logits, experts, weights * scaling_factor, load)


def _best(values: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k largest, largest first; among equals the lower index (`topk` promises no order of ties)."""
    if fused_by_compiler(values, values.shape[:-1]):   # comparisons fuse with their neighbours, a sort does not
        place = torch.arange(values.shape[-1], device=values.device)
        one, other = values[..., :, None], values[..., None, :]
        ahead = (other > one) | (other == one) & (place < place[:, None])
        rank = ahead.sum(-1)
        return (place * (rank[..., None, :] == place[:k, None])).sum(-1)
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :k]


@triton.jit
def _sigmoid(x):
    """With the exponential that the hardware has."""
    return 1 / (1 + tl.exp2(-1.4426950408889634 * x.to(tl.float32)))


@triton.jit
def _order(x):
    """FP32 as integers of the same order: -0 equals 0, and NaN comes last. A warp compares integers at once."""
    magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def _value(order):
    """The float whose `_order` this is."""
    return tl.where(order < 0, -order | _LOWEST, order).to(tl.float32, bitcast=True)


@triton.jit
def _choice(L, BIAS, row, expert, inside):
    """The order of s + b of the experts of each row; `_LOWEST` outside."""
    s = _sigmoid(tl.load(L + row + expert, mask=inside, other=0.0))
    return tl.where(inside, _order(s + tl.load(BIAS + expert, mask=inside, other=0.0).to(tl.float32)), _LOWEST)


@triton.jit
def _two_best(a, b, c, d):
    """The two largest of a >= b and c >= d."""
    return tl.maximum(a, c), tl.maximum(tl.minimum(a, c), tl.maximum(b, d))


@triton.jit
def _best_groups(choice, GROUPS: tl.constexpr, KEPT: tl.constexpr):
    """Indices of the best groups [tokens, KEPT]: a group's place is how many others are ahead of it."""
    first, second = tl.reduce((choice, tl.full(choice.shape, _LOWEST, tl.int32)), 2, _two_best)
    score = _order(_value(first) + _value(second))
    score = tl.where(second == _LOWEST, _LOWEST, score)     # the last groups may be none
    group, place = tl.arange(0, GROUPS), tl.arange(0, KEPT)
    one, other = score[:, :, None], score[:, None, :]
    ahead = (other > one) | (other == one) & (group[None, None, :] < group[None, :, None])
    rank = tl.sum(ahead.to(tl.int32), 2)
    return tl.sum(tl.where(rank[:, None, :] == place[None, :, None], group[None, None, :], 0), 2)


@triton.jit
def _forward(L, BIAS, EXPERTS, WEIGHTS, LOAD, tokens, factor, E: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr,
             TOP_K: tl.constexpr, NORMALISE: tl.constexpr, BLOCK: tl.constexpr, PG: tl.constexpr, PKEPT: tl.constexpr,
             PSIZE: tl.constexpr, PK: tl.constexpr, PE: tl.constexpr):
    """Each program takes every n-th block of tokens; P... are the sizes rounded up to powers of two.

    Only the experts of the groups that are kept are read again, and out of them the best is taken TOP_K times.
    """
    SIZE: tl.constexpr = E // GROUPS
    member, slot = tl.arange(0, PSIZE)[None, None, :], tl.arange(0, PK)[None, :]
    any_expert, counts = tl.arange(0, PE), tl.zeros((PE,), tl.int32)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(tokens, BLOCK), tl.num_programs(0)):
        token = tl.arange(0, BLOCK)
        there = token < tokens - block * BLOCK
        logits, row = L + block * BLOCK * E, (token * E)[:, None, None]
        inside = there[:, None, None] & (member < SIZE)
        kept = tl.arange(0, PKEPT)[None, :, None]
        expert = kept * SIZE + member
        if KEPT < GROUPS:
            group = tl.arange(0, PG)[None, :, None]
            choice = _choice(logits, BIAS, row, group * SIZE + member, inside & (group < GROUPS))
            expert = _best_groups(choice, PG, PKEPT)[:, :, None] * SIZE + member
        choice = _choice(logits, BIAS, row, expert, inside & (kept < KEPT)).reshape(BLOCK, PKEPT * PSIZE)
        expert = tl.broadcast_to(expert, (BLOCK, PKEPT, PSIZE)).reshape(BLOCK, PKEPT * PSIZE)
        best = tl.zeros((BLOCK, PK), tl.int32)
        for k in tl.static_range(TOP_K):
            largest = tl.max(choice, 1)[:, None]
            index = tl.min(tl.where(choice == largest, expert, E), 1)[:, None]
            choice = tl.where(expert == index, _LOWEST, choice)
            best = tl.where(slot == k, index, best)
        chosen = there[:, None] & (slot < TOP_K)
        s = _sigmoid(tl.load(logits + token[:, None] * E + best, mask=chosen, other=0.0))
        weight = tl.where(chosen, s, 0.0)
        if NORMALISE:
            weight = weight / tl.where(there, tl.sum(weight, 1), 1.0)[:, None]
        at = (block * BLOCK + token[:, None]) * TOP_K + slot
        tl.store(EXPERTS + at, best.to(tl.int64), mask=chosen)
        tl.store(WEIGHTS + at, weight * factor, mask=chosen)
        # Slots of no use are counted for expert 0 and taken off again: a mask may lie otherwise than what it masks.
        idle = BLOCK * PK - TOP_K * tl.minimum(tokens - block * BLOCK, BLOCK).to(tl.int32)
        counts += tl.histogram(tl.where(chosen, best, 0).reshape(BLOCK * PK), PE) - tl.where(any_expert == 0, idle, 0)
    # Whole numbers add up to the same in any order.
    tl.atomic_add(LOAD + any_expert, counts.to(tl.float32), mask=any_expert < E, sem="relaxed")


@triton.jit
def _backward(L, EXPERTS, SLOPE, DL, tokens, factor, E: tl.constexpr, TOP_K: tl.constexpr, NORMALISE: tl.constexpr,
              BLOCK: tl.constexpr, PK: tl.constexpr, PE: tl.constexpr):
    """Each program writes zeros over all of a few tokens' gradients, and then the chosen ones."""
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    slot, expert = tl.arange(0, PK)[None, :], tl.arange(0, PE)[None, :]
    there = token < tokens
    tl.store(DL + token * E + expert, tl.zeros((BLOCK, PE), DL.dtype.element_ty), mask=there & (expert < E))
    chosen = there & (slot < TOP_K)
    best = tl.load(EXPERTS + token * TOP_K + slot, mask=chosen, other=0).to(tl.int32)
    slope = tl.load(SLOPE + token * TOP_K + slot, mask=chosen, other=0.0)
    s = tl.where(chosen, _sigmoid(tl.load(L + token * E + best, mask=chosen, other=0.0)), 0.0)
    if NORMALISE:
        total = tl.where(there, tl.sum(s, 1)[:, None], 1.0)
        slope = (slope - tl.sum(slope * s, 1)[:, None] / total) / total
    slope = factor * slope * s * (1 - s)
    tl.debug_barrier()   # other threads of this program wrote the zeros
    tl.store(DL + token * E + best, slope.to(DL.dtype.element_ty), mask=chosen)


def route(logits: torch.Tensor, bias: torch.Tensor, *, n_group: int, topk_group: int, top_k: int,
          normalise: bool = True, scaling_factor: float = 1.0) -> Routing:
    """`route_reference`; raises ValueError for shapes that do not fit or groups that cannot hold top_k experts."""
    if logits.dim() != 2 or bias.shape != logits.shape[1:]:
        raise ValueError(f"route got logits {list(logits.shape)} and bias {list(bias.shape)}; "
                         "they must be [N, experts] and [experts]")
    experts, size = logits.shape[1], logits.shape[1] // n_group
    if (experts % n_group or topk_group > n_group or size * topk_group < top_k
            or topk_group < n_group and size < 2):     # a group's score takes two experts
        raise ValueError(f"route cannot take the best {top_k} of {experts} experts "
                         f"from {topk_group} of {n_group} groups")
    if uses_triton(logits, bias):
        return Routing(logits, *_route(logits, bias, n_group, topk_group, top_k, normalise, scaling_factor))
    return route_reference(logits, bias, n_group=n_group, topk_group=topk_group, top_k=top_k,
                           normalise=normalise, scaling_factor=scaling_factor)


@torch.library.custom_op("minidsv3::route", mutates_args=())
def _route(logits: Tensor, bias: Tensor, n_group: int, topk_group: int, top_k: int, normalise: bool,
           scaling_factor: float) -> tuple[Tensor, Tensor, Tensor]:
    """experts [N, k] int64, weights [N, k] and load [experts] in FP32."""
    logits, bias = logits.contiguous(), bias.contiguous()
    (tokens, experts), device = logits.shape, logits.device
    chosen = torch.empty(tokens, top_k, dtype=torch.int64, device=device)
    weights, load = torch.empty(tokens, top_k, device=device), torch.zeros(experts, device=device)
    if topk_group == n_group:   # no limit: all experts are one group
        n_group = topk_group = 1
    sizes = {"PG": n_group, "PKEPT": topk_group, "PSIZE": experts // n_group, "PK": top_k, "PE": experts}
    if tokens:
        block = 16 if experts > 128 else 32
        grid = min(triton.cdiv(tokens, block), 16 * processors(device))
        _forward[(grid,)](logits, bias, chosen, weights, load, tokens, scaling_factor, experts, n_group, topk_group,
                          top_k, normalise, block, num_warps=4,
                          **{name: triton.next_power_of_2(size) for name, size in sizes.items()})
    return chosen, weights, load


@torch.library.custom_op("minidsv3::route_backward", mutates_args=())
def _route_backward(logits: Tensor, chosen: Tensor, slope: Tensor, normalise: bool, scaling_factor: float) -> Tensor:
    """d logits [N, experts] from d weights = `slope` [N, k]."""
    logits, slope, (tokens, experts), top_k = logits.contiguous(), slope.contiguous(), logits.shape, chosen.shape[1]
    gradient = torch.empty(tokens, experts, dtype=logits.dtype, device=logits.device)
    if tokens:
        block = 8
        _backward[(triton.cdiv(tokens, block),)](
            logits, chosen, slope, gradient, tokens, scaling_factor, experts, top_k, normalise, block,
            triton.next_power_of_2(top_k), triton.next_power_of_2(experts))
    return gradient


@_route.register_fake
def _(logits, bias, n_group, topk_group, top_k, normalise, scaling_factor):
    shape = logits.shape[0], top_k
    return (logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape, dtype=torch.float32),
            logits.new_empty(logits.shape[1], dtype=torch.float32))


_route_backward.register_fake(lambda logits, chosen, slope, normalise, scaling_factor: logits.new_empty(logits.shape))


def _keep(ctx, inputs, output) -> None:
    logits, _, _, _, _, *ctx.options = inputs
    ctx.save_for_backward(logits, output[0])


_route.register_autograd(lambda ctx, _, slope, __: (_route_backward(*ctx.saved_tensors, slope, *ctx.options),
                                                    *[None] * 6), setup_context=_keep)
