"""Keeping experts busy without a loss that fights the model (report section 2.1.2).

Auxiliary-loss-free: after each optimiser step every expert's bias moves by gamma, down if it was overloaded on the
whole batch, up if underloaded. A tiny sequence-wise loss (eqs. 17-20) only keeps single sequences from extremes.
"""

import torch
from torch import Tensor

from .moe import Router


def routers(model: torch.nn.Module) -> list[Router]:
    """The routers in the order in which a forward pass records them: main layers, then MTP modules."""
    return [module for module in model.modules() if isinstance(module, Router)]


@torch.no_grad()
def update_biases(model: torch.nn.Module, load: Tensor, gamma: float) -> None:
    """b_i -= gamma if expert i got more than the mean load, += gamma if less, unchanged if exactly the mean.

    `load` [MoE layers, experts] counts the tokens of the whole step: all micro-batches, all data ranks, once an
    optimiser step. The report neither scales the step with the violation nor centres it.
    Raises ValueError for another shape.
    """
    found = routers(model)
    if load.shape[0] != len(found):
        raise ValueError(f"load has {load.shape[0]} rows; the model has {len(found)} MoE layers (MTP's included)")
    for router, counts in zip(found, load):
        counts = counts.double()
        bias = router.e_score_correction_bias
        bias += (gamma * torch.sign(counts.mean() - counts)).to(bias.dtype)


def sequence_balance_loss(logits: Tensor, top_k: int) -> Tensor:
    """The sequence-wise balance loss without its alpha, mean over sequences; 1 when the load is even (eqs. 17-20).

    logits [B, T, experts]. f_i counts the top-k of the affinities alone, without bias and without groups (18), and
    carries no gradient; P_i is the mean share of expert i among all affinities (19, 20) and does.
    """
    scores = logits.sigmoid()
    chosen = scores.detach().topk(top_k, dim=-1).indices
    frequency = torch.zeros_like(scores).scatter_(-1, chosen, 1.0).mean(1) * (scores.shape[-1] / top_k)
    share = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return (frequency * share).sum(-1).mean()


def max_violation(load: Tensor) -> Tensor:
    """MaxVio = (max load - mean load) / mean load of each row of [..., experts]; 0 is perfect balance."""
    mean = load.mean(-1)
    return (load.amax(-1) - mean) / mean
