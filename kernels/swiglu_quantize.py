"""SwiGLU and its quantisation in one pass: the product, of twice the bytes of its codes, never reaches memory.

The down projection takes silu(gate) * up in FP8 (report section 3.3.2). Its backward pass needs the product again,
quantised along tokens for the weight gradient; instead of keeping it, training keeps gate and up in FP8 and recomputes
it (section 3.3.3). So the backward function starts from gate and up, as floats or as codes with their scales, and from
dy, the slope of what down_proj takes: of h = silu(gate) * up, or in experts of w h, w being the router's weight of a
row:

    d_gate, d_up      w times what swiglu.py has       for the gradients of gate_proj and up_proj
    codes, scales     of w h, 128 x 1                  for the gradient of down_proj
    d_w               <h, dy>                          for the router
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import tl, triton, uses_triton
from .quantize import (FP8, LEAST, TILE, empty_tiles, interleaved, quantize_columns_reference,
                       quantize_tiles_reference, rows_held, store_columns, store_tiles)
from .swiglu import silu_and_slopes
from .tiles import load_tile, span, store_tile


def swiglu_quantize_reference(gate: Tensor, up: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """The definition: `quantize_tiles_reference` of the product in FP32, which is not rounded on the way."""
    return quantize_tiles_reference(F.silu(gate.float()) * up.float(), pow2)


def swiglu_quantize_backward_reference(gate: Tensor, up: Tensor, slope: Tensor, pow2: bool = False,
                                       gate_scales: Tensor | None = None, up_scales: Tensor | None = None,
                                       weights: Tensor | None = None
                                       ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The definition: all in FP32, d_gate and d_up rounded once, and `quantize_columns_reference` of w h."""
    gate, up, dy = _decoded(gate, gate_scales), _decoded(up, up_scales), slope.float()
    s = gate.sigmoid()
    silu = gate * s
    d_gate_up, h = torch.cat((dy * up * (s + silu * (1 - s)), dy * silu), 1), silu * up
    if weights is None:
        return d_gate_up.to(slope.dtype), *quantize_columns_reference(h, pow2), None
    w = weights[:, None]
    return (w * d_gate_up).to(slope.dtype), *quantize_columns_reference(w * h, pow2), (h * dy).sum(1)


def _decoded(x: Tensor, scales: Tensor | None) -> Tensor:
    """The values that floats, or the codes of `quantize_tiles`, stand for."""
    return x.float() if scales is None else x.float() * scales.T.repeat_interleave(TILE, 1)[:, :x.shape[1]]


@triton.jit
def _forward(G, U, Q, S, g_row, g_column, u_row, u_column, rows, width, least,
             POW2: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    """Each program: one tile of each of ROWS rows."""
    row, tile = span(tl.program_id(0), ROWS), tl.program_id(1)
    column = span(tile, TILE)
    gate = load_tile(G, g_row, g_column, row, column, rows, width)
    up = load_tile(U, u_row, u_column, row, column, rows, width)
    store_tiles(Q, S, gate * tl.sigmoid(gate) * up, row, column, tile, rows, width, least, POW2)


@triton.jit
def _decode(X, S, x_row, x_column, row, column, tile, rows, width):
    """A tile of floats, or of codes times their scales where there are any."""
    x = load_tile(X, x_row, x_column, row, column, rows, width)
    if S is not None:
        x *= tl.load(S + tile * rows + row, mask=row < rows, other=0.0)[:, None]
    return x


@triton.jit
def _backward(G, U, DY, GS, US, W, DX, DW, Q, S, g_row, g_column, u_row, u_column, dy_row, dy_column, rows, width,
              least, POW2: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr):
    """Each program: one tile of each of COLUMNS columns; these never span two tiles of the inputs' scales."""
    row, column = interleaved(tl.program_id(0), TILE, HELD), span(tl.program_id(1), COLUMNS)
    input_tile = tl.program_id(1) * COLUMNS // TILE
    gate = _decode(G, GS, g_row, g_column, row, column, input_tile, rows, width)
    up = _decode(U, US, u_row, u_column, row, column, input_tile, rows, width)
    slope = load_tile(DY, dy_row, dy_column, row, column, rows, width)
    silu, d_gate, d_up = silu_and_slopes(gate, up, slope)
    h = silu * up
    if W is not None:
        weight = tl.load(W + row, mask=row < rows, other=0.0)[:, None]
        tl.store(DW + tl.program_id(1) * rows + row, tl.sum(d_up * up, 1), mask=row < rows)    # summed by torch
        d_gate, d_up, h = weight * d_gate, weight * d_up, weight * h
    store_tile(DX, d_gate, 2 * row, column, 2 * rows, width)            # [N, 2 width] as [2 N, width]
    store_tile(DX, d_up, 2 * row + 1, column, 2 * rows, width)
    store_columns(Q, S, h, tl.program_id(0), column, rows, width, least, POW2, TILE, COLUMNS, HELD)


def swiglu_quantize(gate: Tensor, up: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """gate and up [N, width] in one float dtype, in any layout -> codes [N, width] in E4M3, FP32 scales
    [ceil(width / 128), N], as of `quantize_tiles`. No gradient passes through: see `swiglu_quantize_backward`.
    A weight for each row, as the router's, may be multiplied into the scales; the codes stay.

    Raises ValueError if gate and up differ in shape or dtype or are not matrices of floats of 16 bits or more.
    """
    _check(gate, up, gate, None, None)
    run = _swiglu_quantize if uses_triton(gate, up) else swiglu_quantize_reference
    return run(gate.detach(), up.detach(), pow2)


def swiglu_quantize_backward(gate: Tensor, up: Tensor, slope: Tensor, pow2: bool = False,
                             gate_scales: Tensor | None = None, up_scales: Tensor | None = None,
                             weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the backward pass needs of the product of gate and up, recomputed, times each row's `weights` [N] in FP32
    if there are any, and of the `slope` [N, width] of that.

    gate and up are floats [N, width], or the codes of `quantize_tiles` with their scales [ceil(width / 128), N].
    Returns d_gate and d_up side by side, [N, 2 width] in slope's dtype, rounded once; the codes [width, N] and scales
    [ceil(N / 128), width] of the weighted product as of `quantize_columns`; and d_weights [N] in FP32, or None.
    Raises ValueError for other shapes or dtypes, or missing scales.
    """
    _check(gate, up, slope, gate_scales, up_scales)
    if weights is not None and (weights.shape != gate.shape[:1] or weights.dtype != torch.float32):
        raise ValueError(f"weights must be one FP32 value for each of {len(gate)} rows; got {list(weights.shape)} "
                         f"{weights.dtype}")
    given = [x for x in (gate, up, slope, gate_scales, up_scales, weights) if x is not None]
    run = _swiglu_quantize_backward if uses_triton(*given) else swiglu_quantize_backward_reference
    weights = None if weights is None else weights.detach()
    *results, d_weights = run(gate.detach(), up.detach(), slope.detach(), pow2, gate_scales, up_scales, weights)
    return *results, None if weights is None else d_weights


def _check(gate: Tensor, up: Tensor, slope: Tensor, gate_scales: Tensor | None, up_scales: Tensor | None) -> None:
    if gate.dim() != 2 or gate.shape != up.shape or gate.dtype != up.dtype or slope.shape != gate.shape:
        given = ", ".join(f"{list(x.shape)} {x.dtype}" for x in (gate, up, slope))
        raise ValueError(f"gate, up and slope must be [N, width], gate and up of one dtype; got {given}")
    if slope.dtype == FP8 or not slope.is_floating_point():
        raise ValueError(f"the product's slope, and gate and up without scales, must be floats of 16 bits or more; "
                         f"got {slope.dtype}")
    tiles = [-(-gate.shape[1] // TILE), len(gate)] if gate.dtype == FP8 else None
    for scales in (gate_scales, up_scales):
        shape = None if scales is None else list(scales.shape)
        if shape != tiles:
            raise ValueError(f"gate and up in {gate.dtype} need scales of shape {tiles}; got {shape}")


ROWS = 32                  # rows of 1 x 128 tiles that one program takes
COLUMNS = 64               # columns of 128 x 1 tiles that one program takes backward


@torch.library.custom_op("minidsv3::swiglu_quantize", mutates_args=())
def _swiglu_quantize(gate: Tensor, up: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    codes, scales = empty_tiles(gate)
    if gate.numel():
        grid = (triton.cdiv(len(gate), ROWS), len(scales))
        _forward[grid](gate, up, codes, scales, *gate.stride(), *up.stride(), *gate.shape, LEAST, pow2, TILE,
                       ROWS, num_warps=4)
    return codes, scales


@torch.library.custom_op("minidsv3::swiglu_quantize_backward", mutates_args=())
def _swiglu_quantize_backward(gate: Tensor, up: Tensor, slope: Tensor, pow2: bool, gate_scales: Tensor | None,
                              up_scales: Tensor | None, weights: Tensor | None
                              ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Without weights d_weights is empty: an operator of torch's cannot return None."""
    d_gate_up, codes, scales, parts = _empty_backward(gate, slope, weights)
    if gate.numel():
        grid = (len(scales), triton.cdiv(gate.shape[1], COLUMNS))
        warps = 8 if gate.dtype == FP8 else 16      # a thread reads 32 bytes of codes or of 16-bit floats
        of_rows = (x if x is None else x.contiguous() for x in (gate_scales, up_scales, weights))
        _backward[grid](gate, up, slope, *of_rows, d_gate_up, parts, codes, scales,
                        *gate.stride(), *up.stride(), *slope.stride(), *gate.shape, LEAST, pow2, TILE, COLUMNS,
                        rows_held(COLUMNS, warps, gate.element_size()), num_warps=warps)
    return d_gate_up, codes, scales, parts.sum(0)


def _empty_backward(gate: Tensor, slope: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the results; of d_weights for the sum over each program's columns."""
    rows, width = gate.shape
    parts = (0, 0) if weights is None else (-(-width // COLUMNS), rows)
    return (torch.empty(rows, 2 * width, dtype=slope.dtype, device=slope.device), *empty_tiles(gate.T),
            torch.empty(parts, dtype=torch.float32, device=gate.device))


def _fake_backward(gate: Tensor, up: Tensor, slope: Tensor, pow2: bool, gate_scales: Tensor | None,
                   up_scales: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *results, parts = _empty_backward(gate, slope, weights)
    return *results, parts.sum(0)


_swiglu_quantize.register_fake(lambda gate, up, pow2: empty_tiles(gate))
_swiglu_quantize_backward.register_fake(_fake_backward)
