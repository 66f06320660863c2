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


@triton.jit
def _forward(X, W, Y, R, stride, rows, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """Each program takes every n-th row and keeps the gain in registers."""
    column = tl.arange(0, BLOCK)
    inside = column < D
    weight = tl.load(W + column, mask=inside, other=0.0).to(tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        x = tl.load(X + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        r = 1 / tl.sqrt(tl.sum(x * x) / D + eps)
        tl.store(R + row, r)
        y = x * r * weight
        tl.store(Y + row * D + column, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(X, W, R, DY, DX, DW, stride, rows, D: tl.constexpr, BLOCK: tl.constexpr):
    """Each program leaves its own sum of n dy: adding them up afterwards gives the same bits in every run."""
    column = tl.arange(0, BLOCK)
    inside = column < D
    weight = tl.load(W + column, mask=inside, other=0.0).to(tl.float32)
    gain = tl.zeros((BLOCK,), tl.float32)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
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
    return rms_norm_reference(x, weight, eps)


@torch.library.custom_op("minidsv3::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [N, d], weight [d] -> y [N, d] and 1 / rms [N] in FP32, which the gradient needs."""
    x, weight = _rows(x), weight.contiguous()
    y, r = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(len(x), device=x.device)
    options = _launch(x)
    if len(x):
        _forward[options.pop("grid")](x, weight, y, r, x.stride(0), len(x), eps, **options)
    return y, r


@torch.library.custom_op("minidsv3::rms_norm_backward", mutates_args=())
def _rms_norm_backward(x: Tensor, weight: Tensor, r: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """dx [N, d] and dw [d] from dy = `slope` [N, d]."""
    x, weight, slope = _rows(x), weight.contiguous(), slope.contiguous()
    options = _launch(x)
    grid = options.pop("grid")
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums = torch.empty(*grid, x.shape[1], device=x.device)
    if not len(x):
        return dx, torch.zeros_like(weight)
    _backward[grid](x, weight, r, slope, dx, sums, x.stride(0), len(x), **options)
    return dx, sums.sum(0).to(weight.dtype)


def _rows(x: Tensor) -> Tensor:
    """Rows may lie apart, as the latent's do inside [latent, rope key]; their values must be neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _launch(x: Tensor) -> dict:
    block = triton.next_power_of_2(x.shape[1])
    warps = min(max(block // 512, 1), 16)
    return {"grid": (min(len(x), 32 // warps * processors(x.device)),), "D": x.shape[1], "BLOCK": block,
            "num_warps": warps}


_rms_norm.register_fake(lambda x, weight, eps: (x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=torch.float32)))
_rms_norm_backward.register_fake(lambda x, weight, r, slope: (x.new_empty(x.shape), weight.new_empty(weight.shape)))


def _keep(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


_rms_norm.register_autograd(lambda ctx, slope, _: (*_rms_norm_backward(*ctx.saved_tensors, slope), None),
                            setup_context=_keep)
