"""SwiGLU: silu(gate) * up with silu(g) = g sigmoid(g), the activation of every FFN and expert.

Gate, up and down are w1, w3 and w2 in the released code. The gradient, with s = sigmoid(gate):

    d_up = dy silu(gate)          d_gate = dy up (s + silu(gate) (1 - s))
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import tl, triton, uses_triton
from .tiles import load_tile, span, store_tile


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The definition. gate and up [..., width] of one dtype; returns that shape and dtype."""
    return F.silu(gate) * up


@triton.jit
def _forward(G, U, Y, g_row, g_column, u_row, u_column, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = span(tl.program_id(0), ROWS), span(tl.program_id(1), COLUMNS)
    gate = load_tile(G, g_row, g_column, row, column, rows, width)
    up = load_tile(U, u_row, u_column, row, column, rows, width)
    store_tile(Y, gate * tl.sigmoid(gate) * up, row, column, rows, width)


@triton.jit
def silu_and_slopes(gate, up, slope):
    """silu(gate), d_gate and d_up."""
    s = tl.sigmoid(gate)
    silu = gate * s
    return silu, slope * up * (s + silu * (1 - s)), slope * silu


@triton.jit
def _backward(G, U, DY, DG, DU, g_row, g_column, u_row, u_column, dy_row, dy_column, rows, width,
              ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = span(tl.program_id(0), ROWS), span(tl.program_id(1), COLUMNS)
    gate = load_tile(G, g_row, g_column, row, column, rows, width)
    up = load_tile(U, u_row, u_column, row, column, rows, width)
    slope = load_tile(DY, dy_row, dy_column, row, column, rows, width)
    _, d_gate, d_up = silu_and_slopes(gate, up, slope)
    store_tile(DG, d_gate, row, column, rows, width)
    store_tile(DU, d_up, row, column, rows, width)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu_reference`; the kernel rounds once, at the end.

    Raises ValueError if gate and up differ in shape or dtype.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu got gate {list(gate.shape)} {gate.dtype} and up {list(up.shape)} {up.dtype}; "
                         "they must be alike")
    if uses_triton(gate, up):
        rows = (-1, gate.shape[-1])
        return _swiglu(gate.reshape(rows), up.reshape(rows)).view(gate.shape)
    return swiglu_reference(gate, up)


@torch.library.custom_op("minidsv3::swiglu", mutates_args=())
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        grid, options = _launch(y)
        _forward[grid](gate, up, y, *gate.stride(), *up.stride(), *y.shape, **options)
    return y


@torch.library.custom_op("minidsv3::swiglu_backward", mutates_args=())
def _swiglu_backward(gate: Tensor, up: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
    if slope.numel():
        grid, options = _launch(slope)
        _backward[grid](gate, up, slope, d_gate, d_up, *gate.stride(), *up.stride(), *slope.stride(), *slope.shape,
                        **options)
    return d_gate, d_up


def _launch(x: Tensor) -> tuple[tuple[int, int], dict]:
    """The grid, and the tile of about 2048 values that each program takes."""
    columns = min(triton.next_power_of_2(x.shape[1]), 2048)
    rows = 2048 // columns
    return (triton.cdiv(x.shape[0], rows), triton.cdiv(x.shape[1], columns)), {
        "ROWS": rows, "COLUMNS": columns, "num_warps": 8}


_swiglu.register_fake(lambda gate, up: gate.new_empty(gate.shape))
_swiglu_backward.register_fake(lambda gate, up, slope: (gate.new_empty(gate.shape), up.new_empty(up.shape)))
_swiglu.register_autograd(lambda ctx, slope: _swiglu_backward(*ctx.saved_tensors, slope),
                          setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
