"""Rotary position embedding on adjacent pairs: (x_2i, x_2i+1) turns by the angle position * theta_i (section 2.1.1).

    y_2i = x_2i cos - x_2i+1 sin        y_2i+1 = x_2i sin + x_2i+1 cos        the gradient turns back by the same angle

The released weights lay pairs out side by side ("interleaved"). Reading them as two halves runs and is silently wrong.
A query has channels without position in front of the rotary ones: they pass through, so that it is written once.
"""

import torch
from torch import Tensor

from .backend import tl, triton, uses_triton
from .precision import wide


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, nope: int = 0) -> Tensor:
    """The definition. x [B, T, heads, nope + d] with d even, cos and sin [B or 1, T, d/2]; returns x's shape and dtype.

    The first `nope` channels of each head stay as they are.
    """
    still, turning = x[..., :nope], wide(x[..., nope:])
    even, odd = turning[..., 0::2], turning[..., 1::2]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)
    return torch.cat((still, turned), -1) if nope else turned


def _complex_product(x: Tensor, cos: Tensor, sin: Tensor, nope: int) -> Tensor:
    """The definition in complex numbers, (x_2i + i x_2i+1) (cos + i sin): one pass where strided pairs take many."""
    still, turning = x.split([nope, x.shape[-1] - nope], -1)
    pairs = wide(turning).unflatten(-1, (-1, 2)).clone(memory_format=torch.contiguous_format)   # at an even address
    turned = torch.view_as_complex(pairs) * torch.complex(wide(cos), wide(sin)).unsqueeze(-2)
    turned = torch.view_as_real(turned).flatten(-2).to(x.dtype)
    return torch.cat((still, turned), -1) if nope else turned


@triton.jit
def _turn(X, COS, SIN, Y, tokens, heads, batch_stride, token_stride, head_stride, table_stride, sign,
          NOPE: tl.constexpr, ROPE: tl.constexpr, PNOPE: tl.constexpr, PROPE: tl.constexpr, HEADS: tl.constexpr):
    """A few heads of one token; P... are widths rounded up to powers of two, `sign` is -1 to turn back."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    source = X + batch * batch_stride + token * token_stride + head * head_stride
    target = Y + (row * heads + head) * (NOPE + ROPE)
    if NOPE > 0:
        channel = tl.arange(0, PNOPE)[None, :]
        inside = (head < heads) & (channel < NOPE)
        tl.store(target + channel, tl.load(source + channel, mask=inside), mask=inside)
    pair = tl.arange(0, PROPE // 2)
    at = batch * table_stride + token * (ROPE // 2) + pair
    cos = tl.load(COS + at, mask=pair < ROPE // 2, other=0.0)[None, :]
    sin = tl.load(SIN + at, mask=pair < ROPE // 2, other=0.0)[None, :] * sign
    channel = tl.arange(0, PROPE)[None, :]
    inside = (head < heads) & (channel < ROPE)
    x = tl.load(source + NOPE + channel, mask=inside, other=0.0).to(tl.float32)
    even, odd = tl.split(x.reshape(HEADS, PROPE // 2, 2))
    y = tl.join(even * cos - odd * sin, even * sin + odd * cos).reshape(HEADS, PROPE)
    tl.store(target + NOPE + channel, y.to(Y.dtype.element_ty), mask=inside)


def rope(x: Tensor, cos: Tensor, sin: Tensor, nope: int = 0) -> Tensor:
    """`rope_reference`; raises ValueError if the tables are not [B or 1, T, d/2] for x [B, T, heads, nope + d]."""
    if (x.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape or len(cos) not in (1, len(x)) or nope < 0
            or (cos.shape[1], nope + 2 * cos.shape[2]) != (x.shape[1], x.shape[3])):
        raise ValueError(f"rope got x {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)} and nope {nope}; "
                         "x must be [B, T, heads, nope + d] and the tables [B or 1, T, d/2]")
    if uses_triton(x, cos, sin):
        return _rope(x, cos, sin, nope, 1.0)
    if torch.compiler.is_compiling():     # which fuses real numbers only
        return rope_reference(x, cos, sin, nope)
    return _complex_product(x, cos, sin, nope)


@torch.library.custom_op("minidsv3::rope", mutates_args=())
def _rope(x: Tensor, cos: Tensor, sin: Tensor, nope: int, sign: float) -> Tensor:
    """x [B, T, heads, nope + d], wherever its heads lie, turned by the tables' angles, or back if `sign` is -1."""
    x, cos, sin = x if x.stride(-1) == 1 else x.contiguous(), cos.contiguous(), sin.contiguous()
    batch, tokens, heads, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        pnope, prope = triton.next_power_of_2(max(nope, 1)), triton.next_power_of_2(width - nope)
        width_of_block = triton.next_power_of_2(pnope + prope)
        block = min(triton.next_power_of_2(heads), max(4096 // width_of_block, 1))
        _turn[(batch * tokens, triton.cdiv(heads, block))](
            x, cos, sin, y, tokens, heads, *x.stride()[:3], cos.stride(0) if len(cos) > 1 else 0, sign,
            nope, width - nope, pnope, prope, block, num_warps=4 if block * width_of_block > 1024 else 1)
    return y


def _keep(ctx, inputs, output) -> None:
    _, cos, sin, ctx.nope, ctx.sign = inputs
    ctx.save_for_backward(cos, sin)


_rope.register_fake(lambda x, cos, sin, nope, sign: x.new_empty(x.shape))
_rope.register_autograd(lambda ctx, slope: (_rope(slope, *ctx.saved_tensors, ctx.nope, -ctx.sign), *[None] * 4),
                        setup_context=_keep)
