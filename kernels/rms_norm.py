"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight.

Sits before every attention and FFN and on both latents (section 2.1). The gradient, with r = 1 / sqrt(mean(x^2) + eps)
and n = x r:

    dx = r (w dy - n mean(n w dy))          dw = sum over rows of n dy
"""

import torch
from torch import Tensor

from .backend import processors, tl, triton, uses_triton
from .precision import wide


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, computed in at least FP32.

    x [..., d] in any float dtype, weight [d]; returns x's shape and dtype.
    """
    y = wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * wide(weight)).to(x.dtype)


class _Definition(torch.autograd.Function):
    """The definition with the gradient above, in half the passes over memory that torch's own takes."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = wide(x)
        r = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, r)
        return (y * r * wide(weight)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable        # r is kept as a number, not as a function of x
    def backward(ctx, slope: Tensor) -> tuple:
        x, weight, r = ctx.saved_tensors
        n, slope = wide(x) * r, wide(slope)
        d_weight = (n * slope).view(-1, len(weight)).sum(0)
        slope = slope * wide(weight)
        dx = r * torch.addcmul(slope, n, (n * slope).mean(-1, keepdim=True), value=-1)
        return dx.to(x.dtype), d_weight.to(weight.dtype), None


@triton.jit
def _forward(X, W, Y, R, stride, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    x = tl.load(X + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(W + column, mask=inside, other=0.0).to(tl.float32)
    r = 1 / tl.sqrt(tl.sum(x * x) / D + eps)
    tl.store(R + row, r)
    tl.store(Y + row * D + column, (x * r * weight).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(X, W, R, DY, DX, DW, stride, rows, D: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Each program takes every n-th row and leaves its own sum of n dy: the order of all sums is the same in every
    run."""
    column = tl.arange(0, BLOCK)
    inside = column < D
    weight = tl.load(W + column, mask=inside, other=0.0).to(tl.float32)
    gain = tl.zeros((BLOCK,), tl.float32)
    for row in tl.range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0), num_stages=STAGES):
        x = tl.load(X + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * D + column, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(R + row)
        n = x * r
        gain += n * dy
        slope = weight * dy
        dx = r * (slope - n * (tl.sum(n * slope) / D))
        tl.store(DX + row * D + column, dx.to(DX.dtype.element_ty), mask=inside)
    tl.store(DW + tl.program_id(0) * D + column, gain, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_reference`; raises ValueError if weight is not one value for each of x's last dimension."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm got weight of shape {list(weight.shape)}; "
                         f"x of shape {list(x.shape)} needs [{x.shape[-1]}]")
    if uses_triton(x, weight):
        return _rms_norm(x.reshape(-1, x.shape[-1]), weight, eps)[0].view(x.shape)
    if torch.compiler.is_compiling():     # which fuses the definition itself
        return rms_norm_reference(x, weight, eps)
    return _Definition.apply(x, weight, eps)


@torch.library.custom_op("minidsv3::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [N, d], weight [d] -> y [N, d] and 1 / rms [N] in FP32, which the gradient needs."""
    x, weight = _rows(x), weight.contiguous()
    y, r = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(len(x), device=x.device)
    if len(x):
        _forward[(len(x),)](x, weight, y, r, x.stride(0), eps, **_block(x))
    return y, r


@torch.library.custom_op("minidsv3::rms_norm_backward", mutates_args=())
def _rms_norm_backward(x: Tensor, weight: Tensor, r: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """dx [N, d] and dw [d] from dy = `slope` [N, d]."""
    x, weight, slope = _rows(x), weight.contiguous(), slope.contiguous()
    block = _block(x)
    programs = min(len(x), 16 // block["num_warps"] * processors(x.device))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = torch.empty(programs, x.shape[1], device=x.device)
    if programs:
        _backward[(programs,)](x, weight, r, slope, dx, sums, x.stride(0), len(x), STAGES=3, **block)
    return dx, sums.sum(0).to(weight.dtype)


def _rows(x: Tensor) -> Tensor:
    """Rows may lie apart, as the latent's do inside [latent, rope key]; their values must be neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _block(x: Tensor) -> dict[str, int]:
    """A row in one block, 16 values a thread."""
    block = triton.next_power_of_2(x.shape[1])
    return {"D": x.shape[1], "BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


_rms_norm.register_fake(lambda x, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=torch.float32)))
_rms_norm_backward.register_fake(lambda x, weight, r, slope: (x.new_empty(x.shape), weight.new_empty(weight.shape)))


def _keep(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


_rms_norm.register_autograd(lambda ctx, slope, _: (*_rms_norm_backward(*ctx.saved_tensors, slope), None),
                            setup_context=_keep)
