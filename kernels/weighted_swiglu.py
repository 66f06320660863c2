"""An expert's activation: silu(gate) * up, times the router's weight of each row (section 2.1.2, eq. 12).

The report weighs an expert's output. Its last product, `down_proj`, is linear, so weighing that product's input gives
the same and costs less: 2048 values a row in place of 7168. Gate and up lie side by side, as one product with both
matrices leaves them, and so does their gradient. With a = silu(gate) up:

    d weight = <dy, a>        d gate and d up as in swiglu.py, of weight * dy
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import tl, triton, uses_triton
from .swiglu import silu_and_slopes, swiglu_reference
from .tiles import load_tile, span, store_tile


def weighted_swiglu_reference(gate_up: Tensor, weights: Tensor) -> Tensor:
    """The definition. gate_up [N, 2 * width], weights [N] in at least FP32; returns [N, width] in gate_up's dtype."""
    return swiglu_reference(*gate_up.chunk(2, -1)) * weights.to(gate_up.dtype).unsqueeze(-1)


class _Definition(torch.autograd.Function):
    """The definition with the gradient above. torch's own keeps two more tensors for it, and copies the halves of its
    result together."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        return weighted_swiglu_reference(gate_up, weights)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope: Tensor) -> tuple:
        gate_up, weights = ctx.saved_tensors
        gradient = torch.empty_like(gate_up)
        (gate, up), (d_gate, d_up) = gate_up.chunk(2, -1), gradient.chunk(2, -1)
        silu, weighted = F.silu(gate), slope * weights.to(slope.dtype).unsqueeze(-1)
        torch.mul(weighted, silu, out=d_up)
        torch.ops.aten.silu_backward.grad_input(weighted.mul_(up), gate, grad_input=d_gate)
        return gradient, silu.mul_(up).mul_(slope).sum(-1).to(weights.dtype)


@triton.jit
def _forward(X, W, Y, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = span(tl.program_id(0), ROWS), tl.arange(0, COLUMNS)
    gate = load_tile(X, 2 * width, 1, row, column, rows, width)
    up = load_tile(X + width, 2 * width, 1, row, column, rows, width)
    weight = tl.load(W + row, mask=row < rows, other=0.0).to(tl.float32)
    store_tile(Y, gate * tl.sigmoid(gate) * up * weight[:, None], row, column, rows, width)


@triton.jit
def _backward(X, W, DY, DX, DW, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = span(tl.program_id(0), ROWS), tl.arange(0, COLUMNS)
    gate = load_tile(X, 2 * width, 1, row, column, rows, width)
    up = load_tile(X + width, 2 * width, 1, row, column, rows, width)
    slope = load_tile(DY, width, 1, row, column, rows, width)
    weight = tl.load(W + row, mask=row < rows, other=0.0).to(tl.float32)
    silu, d_gate, d_up = silu_and_slopes(gate, up, slope * weight[:, None])
    tl.store(DW + row, tl.sum(slope * silu * up, 1).to(DW.dtype.element_ty), mask=row < rows)
    at = row[:, None] * (2 * width) + column[None, :]
    inside = (row < rows)[:, None] & (column < width)[None, :]
    tl.store(DX + at, d_gate.to(DX.dtype.element_ty), mask=inside)
    tl.store(DX + width + at, d_up.to(DX.dtype.element_ty), mask=inside)


def weighted_swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    """`weighted_swiglu_reference`; the kernel rounds once, at the end.

    Raises ValueError unless gate_up is [N, 2 * width] and weights [N].
    """
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or weights.shape != gate_up.shape[:1]:
        raise ValueError(f"weighted_swiglu got gate_up {list(gate_up.shape)} and weights {list(weights.shape)}; "
                         "they must be [N, 2 * width] and [N]")
    if uses_triton(gate_up, weights):
        return _weighted_swiglu(gate_up, weights)
    if torch.compiler.is_compiling():     # which fuses the definition itself
        return weighted_swiglu_reference(gate_up, weights)
    return _Definition.apply(gate_up, weights)


@torch.library.custom_op("minidsv3::weighted_swiglu", mutates_args=())
def _weighted_swiglu(gate_up: Tensor, weights: Tensor) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if y.numel():
        grid, options = _launch(y)
        _forward[grid](gate_up.contiguous(), weights.contiguous(), y, rows, width, **options)
    return y


@torch.library.custom_op("minidsv3::weighted_swiglu_backward", mutates_args=())
def _weighted_swiglu_backward(gate_up: Tensor, weights: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    d_gate_up, d_weights = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate_up, weights))
    if slope.numel():
        grid, options = _launch(slope)
        _backward[grid](gate_up.contiguous(), weights.contiguous(), slope.contiguous(), d_gate_up, d_weights,
                        *slope.shape, **options)
    return d_gate_up, d_weights


def _launch(y: Tensor) -> tuple[tuple[int], dict]:
    """Whole rows of about 2048 values: a row's weight has one gradient."""
    columns = triton.next_power_of_2(y.shape[1])
    rows = max(2048 // columns, 1)
    return (triton.cdiv(y.shape[0], rows),), {"ROWS": rows, "COLUMNS": columns, "num_warps": 8}


_weighted_swiglu.register_fake(lambda gate_up, weights: gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2))
_weighted_swiglu_backward.register_fake(
    lambda gate_up, weights, slope: (gate_up.new_empty(gate_up.shape), weights.new_empty(weights.shape)))
_weighted_swiglu.register_autograd(lambda ctx, slope: _weighted_swiglu_backward(*ctx.saved_tensors, slope),
                                   setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
