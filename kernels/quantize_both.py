"""Quantising to FP8 along both axes of one matrix, which is read once (report section 3.3.2).

A gradient takes part in two products: dy W sums over its columns, dy^T x over its rows, and each wants tiles along what
it sums over. So `quantize_tiles` and `quantize_columns` would read every gradient twice; here one block of 128 x 128
holds 128 whole tiles of either kind. 2 bytes a value are read and 2 written, instead of 4 and 2.
"""

import torch
from torch import Tensor

from .backend import tl, triton, uses_triton
from .quantize import (LEAST, TILE, check_matrix, empty_tiles, interleaved, load_narrow, quantize_columns_reference,
                       quantize_tiles_reference, rows_held, store_columns, store_tiles)
from .tiles import span


def quantize_both_reference(x: Tensor, pow2: bool = False, least: float = LEAST
                            ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The definition: one after the other."""
    return *quantize_tiles_reference(x, pow2, least), *quantize_columns_reference(x, pow2, least)


@triton.jit
def _both(X, Q, S, Q_T, S_T, x_row, x_column, rows, width, least,
          POW2: tl.constexpr, TILE: tl.constexpr, HELD: tl.constexpr):
    """Each program: one block, whose rows are in the order that suits the transpose."""
    row, column = interleaved(tl.program_id(1), TILE, HELD), span(tl.program_id(0), TILE)
    x = load_narrow(X, x_row, x_column, row, column, rows, width)
    store_tiles(Q, S, x, row, column, tl.program_id(0), rows, width, least, POW2)
    store_columns(Q_T, S_T, x, tl.program_id(1), column, rows, width, least, POW2, TILE, TILE, HELD)


def quantize_both(x: Tensor, pow2: bool = False, least: float = LEAST) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [M, K] in any float dtype and layout -> codes [M, K] in E4M3 and FP32 scales [ceil(K / 128), M] as of
    `quantize_tiles`, codes [K, M] and scales [ceil(M / 128), K] as of `quantize_columns`. Raises ValueError as they do.
    """
    check_matrix(x, "quantize_both", least)
    return (_quantize_both if uses_triton(x) else quantize_both_reference)(x.detach(), pow2, least)


WARPS = 8


@torch.library.custom_op("minidsv3::quantize_both", mutates_args=())
def _quantize_both(x: Tensor, pow2: bool, least: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = empty_both(x)
    if x.numel():
        grid = (triton.cdiv(x.shape[1], TILE), triton.cdiv(x.shape[0], TILE))
        _both[grid](x, *out, *x.stride(), *x.shape, least, pow2, TILE, rows_held(TILE, WARPS, x.element_size()),
                    num_warps=WARPS)
    return out


def empty_both(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the codes and scales of x's tiles along either axis."""
    return *empty_tiles(x), *empty_tiles(x.T)


_quantize_both.register_fake(lambda x, pow2, least: empty_both(x))
