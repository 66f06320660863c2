"""What experts received, quantised along tokens for their weight gradients, straight from the tokens' codes.

A token goes to its experts in 1 x 128 tiles, one byte a value; the gradient of an expert's matrix sums over its tokens
and wants 128 x 1 tiles of the sorted rows, transposed (report section 3.3.2; dispatch in FP8, section 3.3.3):

    quantize_columns(permute(codes * scales, permutation))

In these three steps the values pass through memory in 16 bits and more, for all of a token's k experts. Here a program
reads the codes that it needs where the tokens have them, and writes codes: one byte a value either way.

The values are rounded to BF16 on the way, as those of `permute` are. With scales that are powers of two nothing is
rounded: a code has four binary digits, BF16 eight. (Below 2^-124 BF16 has fewer; there `least` makes every code zero.)
So a program rounds only if it meets another scale.
"""

import torch
from torch import Tensor

from .backend import tl, triton, uses_triton
from .fp8_gemm import dequantize_tiles, has_tiles
from .permute import Permutation, permute_reference
from .quantize import (FP8, LEAST, TILE, TINY, divided, interleaved, quantize_columns_reference, rows_held,
                       side_by_side, tile_scale)
from .tiles import load_tile, span, store_tile


def permute_columns_reference(codes: Tensor, scales: Tensor, permutation: Permutation, pow2: bool = False,
                              least: float = LEAST) -> tuple[Tensor, Tensor]:
    """The definition. Rows of padding are zeros, and count in the scales of their tiles as zeros do."""
    values = dequantize_tiles(codes, scales).bfloat16()
    return quantize_columns_reference(permute_reference(values, permutation), pow2, least)


@triton.jit
def _permute_columns(Q, S, SOURCES, Q_T, S_T, tokens, rows, width, least,
                     K: tl.constexpr, POW2: tl.constexpr, TILE: tl.constexpr, HELD: tl.constexpr):
    """Each program: one block of the sorted rows, and of each row one tile of its token. Programs that run together
    take the same columns: these are few bytes of all tokens (2 MB of 16,384), and each is read k times."""
    row_tile, tile = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, column = interleaved(row_tile, TILE, HELD), span(tile, TILE)
    source = tl.load(SOURCES + row, mask=row < rows, other=-1)
    token = tl.where(source < 0, tokens, source // K).to(tl.int64)      # padding: behind the last token, read as zeros
    scale = tl.load(S + tile * tokens + token, mask=token < tokens, other=0.0)
    x = load_tile(Q, width, 1, token, column, tokens, width) * scale[:, None]
    if tl.max(scale.to(tl.int32, bitcast=True) & 0x7FFFFF, 0) > 0:      # a scale that is no power of two
        tl.debug_barrier()                                              # or all would be rounded, and some chosen after
        x = x.to(tl.bfloat16).to(tl.float32)
    x = side_by_side(x.reshape(HELD, TILE // HELD, TILE).permute(2, 1, 0))      # [column, tile / HELD, HELD]
    scale = tile_scale(largest(x)[:, None], least, 1, POW2)
    codes = quotient(x, scale[:, None, None], POW2).to(tl.float8e4nv).reshape(TILE, TILE)
    store_tile(Q_T, codes, column, span(row_tile, TILE), width, rows)
    tl.store(S_T + row_tile * width + column, scale, mask=column < width)


@triton.jit
def largest(x):
    """The largest magnitude of each column of x [column, .., even], NaN before all others. One instruction takes the
    larger of two magnitudes; those, which have no sign, are compared as integers."""
    left, right = tl.split(tl.abs(x).reshape(x.shape[0], x.shape[1] * x.shape[2] // 2, 2))
    larger = tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL)
    return tl.max(larger.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)


@triton.jit
def quotient(x, scale, POW2: tl.constexpr):
    """x / scale to the last bit that a code depends on. The inverse of a power of two is one too: 127 less its exponent
    stands in place of 127 more, and x times that is exact."""
    if POW2:
        inverse = ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        return x * tl.where(scale == scale, inverse, scale)
    return divided(x, scale, 1 / scale)


def permute_columns(codes: Tensor, scales: Tensor, permutation: Permutation, pow2: bool = False,
                    least: float = LEAST) -> tuple[Tensor, Tensor]:
    """Codes [N, width] and FP32 scales [ceil(width / 128), N] of `quantize_tiles` -> codes [width, R] in E4M3, FP32
    scales [ceil(R / 128), width], as of `quantize_columns`, of the permutation's rows. No gradient passes through.

    If each expert's rows are a multiple of 128, no tile has rows of two. Raises ValueError for codes and scales that
    do not fit the permutation or each other, and if `least` is below `TINY`.
    """
    if codes.dtype != FP8 or codes.dim() != 2 or len(codes) != len(permutation.rows):
        raise ValueError(f"permute_columns got codes {list(codes.shape)} {codes.dtype}; "
                         f"they must be [{len(permutation.rows)}, width] in {FP8}, a row for each token")
    if scales.dtype != torch.float32 or not has_tiles(codes, scales):
        raise ValueError(f"permute_columns got scales {list(scales.shape)} {scales.dtype}; codes of shape "
                         f"{list(codes.shape)} need [{-(-codes.shape[1] // TILE)}, {len(codes)}] in torch.float32")
    if not least >= TINY:
        raise ValueError(f"permute_columns got least {least}; it must be at least {TINY}")
    if uses_triton(codes, scales):
        return _columns_of(codes, scales, permutation.sources, permutation.rows.shape[1], pow2, least)
    return permute_columns_reference(codes, scales, permutation, pow2, least)


WARPS = 4       # each computes the scales of all columns anew, so few warps with many rows each


@torch.library.custom_op("minidsv3::permute_columns", mutates_args=())
def _columns_of(codes: Tensor, scales: Tensor, sources: Tensor, chosen: int, pow2: bool, least: float
                ) -> tuple[Tensor, Tensor]:
    codes, scales, (tokens, width), rows = codes.contiguous(), scales.contiguous(), codes.shape, len(sources)
    out = _empty(codes, sources)
    if rows and width:
        grid = (triton.cdiv(rows, TILE), triton.cdiv(width, TILE))
        _permute_columns[grid](codes, scales, sources, *out, tokens, rows, width, least, chosen, pow2, TILE,
                               rows_held(TILE, WARPS, codes.element_size()), num_warps=WARPS)
    return out


def _empty(codes: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the codes and scales."""
    width, rows = codes.shape[1], len(sources)
    return (torch.empty(width, rows, dtype=FP8, device=codes.device),
            torch.empty(-(-rows // TILE), width, dtype=torch.float32, device=codes.device))


_columns_of.register_fake(lambda codes, scales, sources, chosen, pow2, least: _empty(codes, sources))
