"""The router: which experts a token takes, and with what weight (section 2.1.2, eqs. 12-16, and node-limited routing).

    s = sigmoid(logits)                        affinities (15)
    select on s + b                            the bias balances the load and does nothing else (16)
    groups: score = sum of the two best s + b; keep the topk_group best groups, mask the others with -inf
    weights = s of the chosen / their sum * scaling_factor        (13), from s without b

Masking with 0 instead of -inf lets a forbidden expert win whenever s + b is negative. Ties go to the lower index.
"""

from typing import NamedTuple

import torch

from .contract import fused_by_compiler
from .precision import wide


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


def route(logits: torch.Tensor, bias: torch.Tensor, *, n_group: int, topk_group: int, top_k: int,
          normalise: bool = True, scaling_factor: float = 1.0) -> Routing:
    """`route_reference`; raises ValueError for shapes that do not fit or groups that cannot hold top_k experts."""
    if logits.dim() != 2 or bias.shape != logits.shape[1:]:
        raise ValueError(f"route got logits {list(logits.shape)} and bias {list(bias.shape)}; "
                         "they must be [N, experts] and [experts]")
    experts = logits.shape[1]
    if experts % n_group or experts // n_group * topk_group < top_k or topk_group > n_group:
        raise ValueError(f"route cannot take the best {top_k} of {experts} experts "
                         f"from {topk_group} of {n_group} groups")
    return route_reference(logits, bias, n_group=n_group, topk_group=topk_group, top_k=top_k,
                           normalise=normalise, scaling_factor=scaling_factor)
