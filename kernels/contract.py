"""Products of tokens with weights, in a form that a compiler can fuse when there is one token.

A decoding step multiplies every weight with one vector, so it takes as long as reading the weights does. On two CPU
cores BLAS reads a matrix for one vector at a third of the speed at which a compiled loop reads it for a sum of
products; and that loop fuses with its neighbours, the choice of an expert among them, so that nothing is copied.
A compiled pass over one token is therefore given sums, and everything else BLAS.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T: x [..., in] and weight [out, in] -> [..., out]."""
    if not fused_by_compiler(x, x.shape[:-1]):
        return F.linear(x, weight)
    return (x.unsqueeze(-2) * weight).sum(-1)


def contract(equation: str, x: Tensor, weight: Tensor) -> Tensor:
    """`torch.einsum(equation, x, weight)`, and refused as there. The letters b, t and n of x count tokens, as in
    `bthd,hdr->bthr`; every letter that is summed stands in x.
    """
    inputs, out = equation.split("->")
    left, right = inputs.split(",")
    if not fused_by_compiler(x, (size for letter, size in zip(left, x.shape) if letter in "btn")):
        return torch.einsum(equation, x, weight)
    order = out + "".join(letter for letter in left if letter not in out)
    return (_spread(x, left, order) * _spread(weight, right, order)).sum(tuple(range(len(out), len(order))))


def fused_by_compiler(x: Tensor, token_sizes: Iterable[int]) -> bool:
    """Whether products should be sums: in a compiled pass on a CPU over one token (all of `token_sizes` are 1)."""
    return torch.compiler.is_compiling() and x.device.type == "cpu" and all(size == 1 for size in token_sizes)


def _spread(x: Tensor, letters: str, order: str) -> Tensor:
    """x with its axes in `order`, and an axis of length 1 for every letter that it lacks."""
    x = x.permute([letters.index(letter) for letter in order if letter in letters])
    return x[tuple(slice(None) if letter in letters else None for letter in order)]
