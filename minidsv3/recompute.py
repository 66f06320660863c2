"""RMSNorms whose outputs are not kept: who needs one in the backward pass makes it again (report section 3.2.3).

A norm costs next to nothing to compute and as much as its input to remember, once for every matrix behind it. So the
norms before attention and FFN hand on what their output is made of:

    Normed(value, source, gain, eps)        value = rms_norm(source, gain, eps)

and the linears behind them save `source`, the residual stream, which is in memory anyway. This is no `checkpoint()`: a
pipeline that splits the backward pass in two would run a checkpointed forward pass twice.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import fp32_product
from .kernels import rms_norm
from .layers import RMSNorm
from .moe import Router


class Normed(NamedTuple):
    """A norm's output [.., d] and what it is made of. Gradients go to `value`; the rest is there to be saved."""

    value: Tensor
    source: Tensor      # [.., d], the norm's input
    gain: Tensor        # [d]
    eps: float

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    def flatten(self, first: int, last: int) -> "Normed":
        """As a tensor's."""
        return self._replace(value=self.value.flatten(first, last), source=self.source.flatten(first, last))


class RecomputedNorm(RMSNorm):
    """RMSNorm that returns a `Normed`. It keeps its input, and 1 / rms of each row."""

    def forward(self, x: Tensor) -> Normed:
        return Normed(super().forward(x), x.detach(), self.weight.detach(), self.eps)


class RecomputedRouter(Router):
    """The router behind a `RecomputedNorm`: its logits, in at least FP32, without keeping what they are made of."""

    def logits(self, x: Normed) -> Tensor:
        return _RouterLogits.apply(x.value, x.source, x.gain, x.eps, self.weight)


class _RouterLogits(torch.autograd.Function):
    """u . e_i of eq. 15 for u = rms_norm(source), [N, experts] in at least FP32."""

    @staticmethod
    def forward(ctx, u: Tensor, source: Tensor, gain: Tensor, eps: float, weight: Tensor) -> Tensor:
        ctx.save_for_backward(source, gain, weight)
        ctx.eps = eps
        return fp32_product.logits(u, weight)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple:
        source, gain, weight = ctx.saved_tensors
        u = rms_norm(source, gain, ctx.eps)
        gradient = fp32_product.weight_gradient(slope, u)
        return fp32_product.input_gradient(slope, weight, u.dtype), None, None, None, gradient.to(weight.dtype)
