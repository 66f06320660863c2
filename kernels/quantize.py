"""Quantising to FP8 in tiles (report section 3.3.2): codes = round(x / scale) in E4M3, one FP32 scale a tile.

    scale = max(max |x| over the tile, least) / 448           448 is E4M3's largest value; least is 1e-4
    pow2:   2^ceil(log2 scale): dividing by it is exact, and x may be quantised again along the other axis

    quantize_tiles     1 x 128     activations, for the forward and the input gradient
    quantize_columns   128 x 1     what the weight gradient sums over tokens; written transposed
    quantize_blocks    128 x 128   weights

The scale is the multiplier, x ~ codes * scale, as `weight_scale_inv` of the released checkpoints. Nothing saturates:
|x / scale| passes 448 by one rounding at most. A tile that holds an inf or a NaN gets scale NaN and codes NaN, so that
it cannot come back as finite nonsense. The last tile of a row or column may be narrower. No gradient passes through.
Gradients of a mean over a batch's tokens are below 1e-4, the more tokens the smaller: for them `least` is `TINY`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import FLOATS, tl, triton, uses_triton
from .tiles import load_tile, span, store_tile

TILE = 128              # values that share a scale along the axis of a product's sum (the report's N_C)
FP8 = torch.float8_e4m3fn
LEAST = 1e-4            # no tile's largest magnitude counts for less
TINY = 2.0 ** -80       # the smallest `least`: scales and their inverses are normal floats, and the remainders of the
#                         kernels' divisions, down to 2^-57 of a scale, are floats at all


def quantize_tiles_reference(x: Tensor, pow2: bool = False, least: float = LEAST) -> tuple[Tensor, Tensor]:
    """The definition for 1 x 128. x [M, K] -> codes [M, K], scales [ceil(K / 128), M]: a product that takes many rows
    at once reads their scales as neighbours."""
    codes, scales = _quantize(x, 1, TILE, pow2, least)
    return codes, scales.T.contiguous()


def quantize_columns_reference(x: Tensor, pow2: bool = False, least: float = LEAST) -> tuple[Tensor, Tensor]:
    """The definition for 128 x 1. x [M, K] -> codes [K, M], scales [ceil(M / 128), K]: the 1 x 128 tiles of x^T."""
    return quantize_tiles_reference(x.T, pow2, least)


def quantize_blocks_reference(weight: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """The definition for 128 x 128. weight [..., M, K] -> codes [..., M, K], scales [..., ceil(M/128), ceil(K/128)]."""
    return _quantize(weight, TILE, TILE, pow2, LEAST)


def dequantize_blocks_reference(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The inverse of `quantize_blocks_reference`: codes * scales, rounded once to `dtype`."""
    rows, columns = codes.shape[-2:]
    spread = scales.repeat_interleave(TILE, -2)[..., :rows, :].repeat_interleave(TILE, -1)[..., :columns]
    wide = torch.promote_types(dtype, torch.float32)
    return (codes.to(wide) * spread.to(wide)).to(dtype)


def _quantize(x: Tensor, rows: int, columns: int, pow2: bool, least: float) -> tuple[Tensor, Tensor]:
    """Tiles of `rows` x `columns` of x's last two dimensions; zeros fill the last tiles up and are cut off again."""
    height, width = x.shape[-2:]
    tiles = F.pad(x.float(), (0, -width % columns, 0, -height % rows))
    tiles = tiles.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))       # [..., tile, rows, tile, columns]
    amax = tiles.abs().amax((-3, -1))
    scales = amax.clamp(min=least) / torch.full_like(amax, 448)   # CUDA would multiply by the inverse of a number
    if pow2:   # adding all ones below the exponent carries into it, unless the scale is a power of two already
        scales = ((scales.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    scales = scales.where(amax.isfinite(), float("nan"))
    codes = (tiles / scales[..., :, None, :, None]).flatten(-2).flatten(-3, -2)[..., :height, :width]
    return codes.to(FP8, memory_format=torch.contiguous_format), scales


@triton.jit
def divided(x, y, inverse):
    """x / y from an approximate 1 / y: x is multiplied by it and by what it lacks, and the sum is off by 2^-43 before
    it is rounded. For x of 16 bits that gives the codes of an exact division, and amax / 448 is exact: the tests try
    all there are. A GPU's own exact division computes the inverse anew for every x, and its `/` is not exact."""
    rest = inverse * tl.fma(inverse, -y, 1.0)
    return tl.fma(x, inverse, x * rest)


@triton.jit
def divided_exactly(x, y, inverse):
    """x / y as IEEE division rounds it: two steps of Markstein's correction, which need 1 / y to the last bit. (His
    theorem leaves out one mantissa of y, all ones.)"""
    quotient = x * inverse
    quotient = tl.fma(tl.fma(quotient, -y, x), inverse, quotient)
    return tl.fma(tl.fma(quotient, -y, x), inverse, quotient)


@triton.jit
def largest(x, AXIS: tl.constexpr):
    """The largest magnitude along AXIS, in FP32. It is taken of the bits: as integers they order like the magnitudes,
    inf and NaN, the largest of all, are not lost, and one instruction compares two of 16 bits."""
    if x.dtype == tl.float32:
        bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS)
    else:
        bits = tl.max(x.to(tl.int16, bitcast=True) & 0x7FFF, AXIS).to(tl.int16)
    return bits.to(x.dtype, bitcast=True).to(tl.float32)


@triton.jit
def tile_scale(x, least, AXIS: tl.constexpr, POW2: tl.constexpr):
    """The scales of tiles that lie along AXIS."""
    amax = largest(x, AXIS)
    finite = amax < float("inf")
    scale = divided(tl.maximum(tl.where(finite, amax, 0.0), least), 448.0, 1 / 448)
    if POW2:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(finite, scale, float("nan"))


@triton.jit
def encode(x, scale):
    """The codes of x, rounded to nearest even."""
    inverse = 1 / scale
    if x.dtype == tl.float32:
        quotient = divided_exactly(x, scale, divided_exactly(1.0, scale, inverse))
    else:
        quotient = divided(x.to(tl.float32), scale, inverse)
    return quotient.to(tl.float8e4nv)


@triton.jit
def load_narrow(X, x_row, x_column, row, column, rows, width):
    """`load_tile` in X's own dtype: 16 bits of a value take half a register until they are divided."""
    return load_tile(X, x_row, x_column, row, column, rows, width).to(X.dtype.element_ty)


@triton.jit
def _tiles(X, Q, S, x_row, x_column, rows, width, least,
           POW2: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr):
    """Each program: one tile of each of ROWS rows. Programs that run together take the same rows."""
    row_tile, tile = tl.program_id(0) // tl.cdiv(width, TILE), tl.program_id(0) % tl.cdiv(width, TILE)
    row, column = span(row_tile, ROWS), span(tile, TILE)
    x = load_narrow(X, x_row, x_column, row, column, rows, width)
    store_tiles(Q, S, x, row, column, tile, rows, width, least, POW2)


@triton.jit
def store_tiles(Q, S, x, row, column, tile, rows, width, least, POW2: tl.constexpr):
    """Codes and scales of x [row, column], whose columns are one tile."""
    scale = tile_scale(x, least, 1, POW2)
    store_tile(Q, encode(x, scale[:, None]), row, column, rows, width)
    tl.store(S + tile * rows + row, scale, mask=row < rows)


@triton.jit
def _columns(X, Q, S, x_row, x_column, rows, width, least,
             POW2: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr):
    """Each program: one tile of each of COLUMNS columns. Reads along rows and writes along columns."""
    tile, column = tl.program_id(0), span(tl.program_id(1), COLUMNS)
    x = load_narrow(X, x_row, x_column, interleaved(tile, TILE, HELD), column, rows, width)
    store_columns(Q, S, x, tile, column, rows, width, least, POW2, TILE, COLUMNS, HELD)


@triton.jit
def interleaved(tile, TILE: tl.constexpr, HELD: tl.constexpr):
    """A tile's rows in such an order that the HELD rows of which a thread holds values, the same columns of each, are
    neighbours: with 4, the order 0, 4, 8, .. 1, 5, 9, .. Four codes of the transpose then move as one word."""
    at = tl.arange(0, TILE)
    return tile.to(tl.int64) * TILE + at % (TILE // HELD) * HELD + at // (TILE // HELD)


@triton.jit
def store_columns(Q, S, x, tile, column, rows, width, least,
                  POW2: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, HELD: tl.constexpr):
    """Codes and scales of x [interleaved, column] into the transposed Q [width, rows] and S [tiles, width]."""
    scale = tile_scale(x, least, 0, POW2)
    x = x.reshape(HELD, TILE // HELD, COLUMNS).permute(2, 1, 0)                 # [COLUMNS, tile / HELD, HELD]
    codes = encode(side_by_side(x), scale[:, None, None]).reshape(COLUMNS, TILE)
    store_tile(Q, codes, column, span(tile, TILE), width, rows)
    tl.store(S + tile * width + column, scale, mask=column < width)


@triton.jit
def side_by_side(x):
    """x itself, but neighbours along its last axis lie in neighbouring registers of a thread: what rounds them packs
    them into one word, and no byte has to be moved after."""
    if x.shape[2] > 1:
        left, right = tl.split(x.reshape(x.shape[0], x.shape[1], x.shape[2] // 2, 2))
        x = tl.join(left, right).reshape(x.shape)
    return x


@triton.jit
def _blocks(X, Q, S, x_matrix, x_row, x_column, rows, width, least, POW2: tl.constexpr, TILE: tl.constexpr):
    """Each program: one block of one matrix. Programs that run together take the same rows."""
    matrix, row, column = tl.program_id(2).to(tl.int64), span(tl.program_id(1), TILE), span(tl.program_id(0), TILE)
    x = load_narrow(X + matrix * x_matrix, x_row, x_column, row, column, rows, width)
    scale = tile_scale(x.reshape(TILE * TILE), least, 0, POW2)
    store_tile(Q + matrix * rows * width, encode(x, scale), row, column, rows, width)
    block = (matrix * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(S + block, scale)


@triton.jit
def _dequantize(Q, S, Y, rows, width, TILE: tl.constexpr):
    """Each program: one block of one matrix."""
    matrix, row, column = tl.program_id(2).to(tl.int64), span(tl.program_id(1), TILE), span(tl.program_id(0), TILE)
    block = (matrix * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    codes = load_tile(Q + matrix * rows * width, width, 1, row, column, rows, width)
    store_tile(Y + matrix * rows * width, codes * tl.load(S + block), row, column, rows, width)


def quantize_tiles(x: Tensor, pow2: bool = False, least: float = LEAST) -> tuple[Tensor, Tensor]:
    """1 x 128: x [M, K] in any float dtype and layout -> codes [M, K] in E4M3, scales [ceil(K / 128), M] in FP32.

    Raises ValueError if x is not a matrix of floats of 16 bits or more, or if `least` is below `TINY`.
    """
    check_matrix(x, "quantize_tiles", least)
    return (_quantize_tiles if uses_triton(x) else quantize_tiles_reference)(x.detach(), pow2, least)


def quantize_columns(x: Tensor, pow2: bool = False, least: float = LEAST) -> tuple[Tensor, Tensor]:
    """128 x 1: x [M, K] -> codes [K, M] in E4M3, scales [ceil(M / 128), K] in FP32.

    The codes are x's transpose, contiguous: the weight gradient sums over tokens, and Hopper's tensor cores take FP8
    only with the summed axis innermost. So this is `quantize_tiles(x.T)` in one pass. Raises ValueError as it does.
    """
    check_matrix(x, "quantize_columns", least)
    return (_quantize_columns if uses_triton(x) else quantize_columns_reference)(x.detach(), pow2, least)


def quantize_blocks(weight: Tensor, pow2: bool = False) -> tuple[Tensor, Tensor]:
    """128 x 128: weight [M, K] or [experts, M, K] -> E4M3 codes of that shape, FP32 scales [.., M / 128, K / 128],
    both rounded up; no block spans two experts. Raises ValueError for another shape or dtype.
    """
    _check(weight, "quantize_blocks", weight.dim() in (2, 3), "[M, K] or [experts, M, K]")
    return (_quantize_blocks if uses_triton(weight) else quantize_blocks_reference)(weight.detach(), pow2)


def dequantize_blocks(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """codes * scales of `quantize_blocks`, or of a checkpoint (`weight_scale_inv`), in `dtype`; float64 is left to the
    definition. Raises ValueError if the codes are not E4M3 or the scales not one FP32 value a block.
    """
    blocks = [*codes.shape[:-2], *(-(-size // TILE) for size in codes.shape[-2:])]
    if codes.dtype != FP8 or codes.dim() not in (2, 3):
        raise ValueError(f"dequantize_blocks got codes {list(codes.shape)} {codes.dtype}; "
                         f"they must be [M, K] or [experts, M, K] in {FP8}")
    if scales.dtype != torch.float32 or list(scales.shape) != blocks:
        raise ValueError(f"dequantize_blocks got scales {list(scales.shape)} {scales.dtype}; "
                         f"codes of shape {list(codes.shape)} need {blocks} in torch.float32")
    if dtype != torch.float64 and uses_triton(codes, scales):
        return _dequantize_blocks(codes, scales, dtype)
    return dequantize_blocks_reference(codes, scales, dtype)


def check_matrix(x: Tensor, name: str, least: float) -> None:
    """Raises ValueError if `name` cannot take x or `least`."""
    _check(x, name, x.dim() == 2, "[M, K]")
    if not least >= TINY:
        raise ValueError(f"{name} got least {least}; it must be at least {TINY}, or scales are not normal floats")


def _check(x: Tensor, name: str, right: bool, shape: str) -> None:
    if not right or x.dtype not in (*FLOATS[:3], torch.float64):
        raise ValueError(f"{name} got {list(x.shape)} {x.dtype}; "
                         f"it takes {shape} in float32, bfloat16, float16 or float64")


ROWS = 32                      # rows of 1 x 128 tiles that one program takes
COLUMNS, COLUMN_WARPS = 64, 4   # columns of 128 x 1 tiles that one program takes, and its warps


@torch.library.custom_op("minidsv3::quantize_tiles", mutates_args=())
def _quantize_tiles(x: Tensor, pow2: bool, least: float) -> tuple[Tensor, Tensor]:
    codes, scales = empty_tiles(x)
    if x.numel():
        grid = (triton.cdiv(x.shape[0], ROWS) * len(scales),)
        _tiles[grid](x, codes, scales, *x.stride(), *x.shape, least, pow2, TILE, ROWS, num_warps=4)
    return codes, scales


@torch.library.custom_op("minidsv3::quantize_columns", mutates_args=())
def _quantize_columns(x: Tensor, pow2: bool, least: float) -> tuple[Tensor, Tensor]:
    codes, scales = empty_tiles(x.T)
    if x.numel():
        grid = (len(scales), triton.cdiv(x.shape[1], COLUMNS))
        _columns[grid](x, codes, scales, *x.stride(), *x.shape, least, pow2, TILE, COLUMNS,
                       rows_held(COLUMNS, COLUMN_WARPS, x.element_size()), num_warps=COLUMN_WARPS)
    return codes, scales


def rows_held(columns: int, warps: int, size: int) -> int:
    """Of how many of a tile's rows a thread holds values of `size` bytes, if it reads 16 bytes at once."""
    return max(TILE * columns // (16 // size) // (32 * warps), 1)


@torch.library.custom_op("minidsv3::quantize_blocks", mutates_args=())
def _quantize_blocks(weight: Tensor, pow2: bool) -> tuple[Tensor, Tensor]:
    codes, scales = _empty_blocks(weight)
    if weight.numel():
        matrices = weight if weight.dim() == 3 else weight[None]
        _blocks[_one_a_block(scales)](matrices, codes, scales, *matrices.stride(), *weight.shape[-2:], LEAST,
                                      pow2, TILE, num_warps=8)
    return codes, scales


@torch.library.custom_op("minidsv3::dequantize_blocks", mutates_args=())
def _dequantize_blocks(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    codes, scales = codes.contiguous(), scales.contiguous()
    y = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if codes.numel():
        _dequantize[_one_a_block(scales)](codes, scales, y, *codes.shape[-2:], TILE, num_warps=8)
    return y


def _one_a_block(scales: Tensor) -> tuple[int, int, int]:
    """The grid of one program a block: columns, rows, matrices."""
    return scales.shape[-1], scales.shape[-2], scales[..., 0, 0].numel()


def empty_tiles(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the codes and scales of x's 1 x 128 tiles."""
    rows, width = x.shape
    return (torch.empty(rows, width, dtype=FP8, device=x.device),
            torch.empty(-(-width // TILE), rows, dtype=torch.float32, device=x.device))


def _empty_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    blocks = (-(-size // TILE) for size in weight.shape[-2:])
    return (torch.empty(weight.shape, dtype=FP8, device=weight.device),
            torch.empty(*weight.shape[:-2], *blocks, dtype=torch.float32, device=weight.device))


_quantize_tiles.register_fake(lambda x, pow2, least: empty_tiles(x))
_quantize_columns.register_fake(lambda x, pow2, least: empty_tiles(x.T))
_quantize_blocks.register_fake(lambda weight, pow2: _empty_blocks(weight))
_dequantize_blocks.register_fake(lambda codes, scales, dtype: codes.new_empty(codes.shape, dtype=dtype))
