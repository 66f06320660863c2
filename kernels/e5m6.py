"""Activations in 12 bits: E5M6 in tiles of 1 x 128, two numbers in three bytes (report section 3.3.3).

The input of the linear after attention waits for the backward pass, where it has two uses. One is the gradient of
attention, for which FP8 would be too coarse; BF16 would take a third more.

    scale = 2^ceil(log2(max(max |x| over the tile, 1e-4) / 65024))        65024 is E5M6's largest number
    code  = x / scale, rounded to nearest even: the first 12 bits of an FP16 number
    bytes   hgfedcba 9876HGFE DCBA9876         the codes hgfedcba9876 and HGFEDCBA9876, one after another

The scales are powers of two because the weight gradient wants tiles of 128 x 1: dividing by another power of two
rounds nothing, so the change of tiles adds no errors. A tile that holds an inf or a NaN gets scale NaN and codes NaN.
The last tile of a row may be narrower. No gradient passes through.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import FLOATS, tl, triton, uses_triton
from .quantize import LEAST, TILE
from .tiles import span

LARGEST = 65024                     # 2^15 (1 + 63 / 64)
SMALLEST_NORMAL = 2.0 ** -14        # below, steps are as wide as in the octave above
NAN = 0x7E0                         # of the codes that are NaNs, the one that is used


def quantize_e5m6_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition. x [M, K] -> bytes [M, 3 ceil(K / 2)], scales [ceil(K / 128), M]: the layout of
    `quantize_tiles`. An odd last code is followed by the code of what fills the tile up."""
    tiles = F.pad(x.float(), (0, -x.shape[1] % TILE)).unflatten(1, (-1, TILE))
    amax = tiles.abs().amax(-1)
    scales = amax.clamp(min=LEAST) / torch.full_like(amax, LARGEST)     # CUDA would multiply by the inverse of a number
    scales = _octave(scales).where(_octave(scales) == scales, 2 * _octave(scales)).where(amax.isfinite(), float("nan"))
    codes = encode(tiles / scales[..., None]).flatten(1)[:, :x.shape[1] + x.shape[1] % 2]
    return pack(codes), scales.T.contiguous()


def dequantize_e5m6_reference(packed: Tensor, scales: Tensor, width: int, dtype: torch.dtype = torch.bfloat16
                              ) -> Tensor:
    """The inverse: codes * scales, rounded once to `dtype`. A code with four zeros behind it is an FP16 number."""
    values = (unpack(packed)[:, :width] << 4).view(torch.float16)
    return (values.float() * scales.T.repeat_interleave(TILE, 1)[:, :width]).to(dtype)


def encode(x: Tensor) -> Tensor:
    """The codes of FP32 numbers up to 65024: integers from 0 to 4095, int32. The rounded number is one of FP16, so that
    its conversion rounds nothing more."""
    step = _octave(x).clamp(min=SMALLEST_NORMAL) * 2.0 ** -6
    half = ((x / step).round() * step).half().view(torch.int16)
    return (half.int() >> 4 & 0xFFF).where(x.isfinite(), NAN)


def _octave(x: Tensor) -> Tensor:
    """2^floor(log2 |x|) of normal FP32 numbers: x without sign and mantissa bits."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def pack(codes: Tensor) -> Tensor:
    """Integer codes [.., n] from 0 to 4095, n even -> bytes [.., 3 n / 2] uint8."""
    a, b = codes.int().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor) -> Tensor:
    """The inverse: bytes [.., 3 n / 2] uint8 -> codes [.., n] int16."""
    first, middle, last = packed.short().unflatten(-1, (-1, 3)).unbind(-1)
    return torch.stack([first << 4 | middle >> 4, (middle & 15) << 8 | last], -1).flatten(-2)


def _bytes(width: int) -> int:
    """What `width` codes take."""
    return 3 * -(-width // 2)


@triton.jit
def tile_scale(x, LEAST: tl.constexpr):
    """The scales of rows that are one tile each, and their inverses. 65024 is 2^15 with six ones behind the point: the
    scale is amax's octave / 2^15, and twice that if amax has any bit behind the sixth one and six ones before. The
    maximum is taken of the bits: as integers they order like the magnitudes, inf and NaN are the largest of all."""
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    finite = bits < 0x7F800000
    amax = tl.maximum(tl.where(finite, bits, 0).to(tl.float32, bitcast=True), LEAST)
    scale = ((amax.to(tl.int32, bitcast=True) + 0x1FFFF) & 0x7F800000) - (15 << 23)
    inverse = (254 << 23) - scale
    nan = tl.full(scale.shape, float("nan"), tl.float32)
    return (tl.where(finite, scale.to(tl.float32, bitcast=True), nan),
            tl.where(finite, inverse.to(tl.float32, bitcast=True), nan))


@triton.jit
def half_of(x):
    """The bits of x, up to 65024, as an FP16 number of E5M6, in uint32. Adding 1.5 * 2^17 octaves leaves a sum whose
    last bit is worth 2^-6 octaves, and taking them away again is exact; only the sign of a zero is lost."""
    bits = x.to(tl.int32, bitcast=True)
    octave = tl.maximum((bits & 0x7F800000).to(tl.float32, bitcast=True), 2.0 ** -14)
    rounded = (x + octave * (1.5 * 2 ** 17)) - octave * (1.5 * 2 ** 17)
    rounded = (rounded.to(tl.int32, bitcast=True) | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    return rounded.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def _quantize(X, P, S, x_row, x_column, rows, width, pitch,
              LEAST: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Each program: COLUMNS of one row."""
    row, part = place(width, COLUMNS)
    column, tile = span(part, COLUMNS), span(part, COLUMNS // TILE)
    x = tl.load(X + row * x_row + column * x_column, mask=column < width, other=0.0).to(tl.float32)
    x = x.reshape(COLUMNS // TILE, TILE)
    scale, inverse = tile_scale(x, LEAST)
    tl.store(S + tile * rows + row, scale, mask=tile * TILE < width)
    half = tl.where((scale == scale)[:, None], half_of(x * inverse[:, None]), 0x7E00)
    a, b = half.reshape(COLUMNS // 2, 2).split()
    store_words(P, words_of(a << 16 | b << 4, COLUMNS), row, part, pitch, COLUMNS)


@triton.jit
def _dequantize(P, S, Y, rows, width, pitch, TILE: tl.constexpr, COLUMNS: tl.constexpr):
    """Each program: COLUMNS of one row."""
    row, part = place(width, COLUMNS)
    column, tile = span(part, COLUMNS), span(part, COLUMNS // TILE)
    pairs = pairs_of(load_words(P, row, part, pitch, COLUMNS), COLUMNS)
    half = tl.join(pairs >> 16, pairs >> 4).reshape(COLUMNS // TILE, TILE) & 0xFFF0
    scale = tl.load(S + tile * rows + row, mask=tile * TILE < width, other=0.0)
    y = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * scale[:, None]
    tl.store(Y + row * width + column, y.reshape(COLUMNS).to(Y.dtype.element_ty), mask=column < width)


@triton.jit
def place(width, COLUMNS: tl.constexpr):
    """This program's row and its part of the row. Programs that run together take the same rows."""
    parts = tl.cdiv(width, COLUMNS)
    return (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts


@triton.jit
def words_of(pairs, COLUMNS: tl.constexpr):
    """Pairs of codes, in the upper 24 bits of a word each -> words without gaps, three and an empty one for four pairs.
    The first code is in the highest bits."""
    even, odd = pairs.reshape(COLUMNS // 8, 2, 2).split()
    p0, p2 = even.split()
    p1, p3 = odd.split()
    words = tl.join(tl.join(p0 | p1 >> 24, p2 << 16 | p3 >> 8), tl.join(p1 << 8 | p2 >> 16, p0 & 0))
    return words.reshape(COLUMNS // 2)


@triton.jit
def pairs_of(words, COLUMNS: tl.constexpr):
    """The inverse; the lower 8 bits of a pair's word are what they are."""
    even, odd = words.reshape(COLUMNS // 8, 2, 2).split()
    w0, w2 = even.split()
    w1, _ = odd.split()
    pairs = tl.join(tl.join(w0, w1 << 16 | w2 >> 16), tl.join(w0 << 24 | w1 >> 8, w2 << 8))
    return pairs.reshape(COLUMNS // 2)


@triton.jit
def places(P, row, part, pitch, PARTS: tl.constexpr, COLUMNS: tl.constexpr):
    """The words of a part of a row: where they begin in P, PARTS elements a word, where each is from there, in words,
    and which are in the row and not empty."""
    first = part.to(tl.int64) * (COLUMNS * 3 // 8 * PARTS)
    index = tl.arange(0, COLUMNS // 2)
    at = index // 4 * 3 + index % 4
    left = tl.minimum(pitch - first, COLUMNS * 3 // 8 * PARTS).to(tl.int32)
    return P + row * pitch + first, at * PARTS, tl.where(index % 4 < 3, left, 0)


@triton.jit
def swapped(word):
    """The bytes of a word in the other order: in memory the lowest comes first."""
    return word << 24 | (word & 0xFF00) << 8 | (word >> 8) & 0xFF00 | word >> 24


@triton.jit
def store_words(P, words, row, part, pitch, COLUMNS: tl.constexpr):
    """Words into rows of `pitch` words or, where rows do not consist of whole words, bytes."""
    if P.dtype.element_ty == tl.int32:
        base, at, end = places(P, row, part, pitch, 1, COLUMNS)
        tl.store(base + at, swapped(words).to(tl.int32, bitcast=True), mask=at < end)
    else:
        base, at, end = places(P, row, part, pitch, 4, COLUMNS)
        for byte in tl.static_range(4):
            tl.store(base + at + byte, (words >> 24 - 8 * byte).to(tl.uint8), mask=at + byte < end)


@triton.jit
def load_words(P, row, part, pitch, COLUMNS: tl.constexpr):
    """What `store_words` stored."""
    if P.dtype.element_ty == tl.int32:
        base, at, end = places(P, row, part, pitch, 1, COLUMNS)
        words = swapped(tl.load(base + at, mask=at < end, other=0).to(tl.uint32, bitcast=True))
    else:
        base, at, end = places(P, row, part, pitch, 4, COLUMNS)
        words = tl.zeros(at.shape, tl.uint32)
        for byte in tl.static_range(4):
            words = words << 8 | tl.load(base + at + byte, mask=at + byte < end, other=0).to(tl.uint32)
    return words


def quantize_e5m6(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] in any float dtype and layout -> bytes [M, 3 ceil(K / 2)] uint8, scales [ceil(K / 128), M] in FP32.

    Raises ValueError if x is not a matrix of floats of 16 bits or more.
    """
    if x.dim() != 2 or x.dtype not in (*FLOATS[:3], torch.float64):
        raise ValueError(f"quantize_e5m6 got {list(x.shape)} {x.dtype}; "
                         f"it takes [M, K] in float32, bfloat16, float16 or float64")
    return (_quantize_e5m6 if uses_triton(x) else quantize_e5m6_reference)(x.detach())


def dequantize_e5m6(packed: Tensor, scales: Tensor, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """What `quantize_e5m6` returned for a matrix of `width` columns -> [M, width] in `dtype`. BF16, which has one bit
    of mantissa more, holds E5M6 exactly; float64 is left to the definition.

    Raises ValueError if bytes or scales are not what a matrix of `width` columns has.
    """
    if packed.dim() != 2 or packed.dtype != torch.uint8 or packed.shape[1] != _bytes(width):
        raise ValueError(f"dequantize_e5m6 got bytes {list(packed.shape)} {packed.dtype}; "
                         f"{width} codes of 12 bits are [M, {_bytes(width)}] in torch.uint8")
    tiles = [-(-width // TILE), len(packed)]
    if scales.dtype != torch.float32 or list(scales.shape) != tiles:
        raise ValueError(f"dequantize_e5m6 got scales {list(scales.shape)} {scales.dtype}; "
                         f"bytes of shape {list(packed.shape)} need {tiles} in torch.float32")
    if dtype != torch.float64 and uses_triton(scales):
        return _dequantize_e5m6(packed, scales, width, dtype)
    return dequantize_e5m6_reference(packed, scales, width, dtype)


COLUMNS, WARPS = 4096, 4        # how much of a row one program takes at most, and its warps


@torch.library.custom_op("minidsv3::quantize_e5m6", mutates_args=())
def _quantize_e5m6(x: Tensor) -> tuple[Tensor, Tensor]:
    packed, scales = _empty(x)
    if x.numel():
        words, columns = _words(packed), _columns(x.shape[1])
        grid = (x.shape[0] * triton.cdiv(x.shape[1], columns),)
        _quantize[grid](x, words, scales, *x.stride(), *x.shape, words.shape[1], LEAST, TILE, columns,
                        num_warps=WARPS)
    return packed, scales


@torch.library.custom_op("minidsv3::dequantize_e5m6", mutates_args=())
def _dequantize_e5m6(packed: Tensor, scales: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    y = torch.empty(len(packed), width, dtype=dtype, device=packed.device)
    if y.numel():
        words, scales, columns = _words(packed.contiguous()), scales.contiguous(), _columns(width)
        grid = (len(y) * triton.cdiv(width, columns),)
        _dequantize[grid](words, scales, y, *y.shape, words.shape[1], TILE, columns, num_warps=WARPS)
    return y


def _empty(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the bytes and scales of x."""
    rows, width = x.shape
    return (torch.empty(rows, _bytes(width), dtype=torch.uint8, device=x.device),
            torch.empty(-(-width // TILE), rows, dtype=torch.float32, device=x.device))


def _words(packed: Tensor) -> Tensor:
    """The same memory in words of 32 bits, if its rows are whole words."""
    whole = packed.shape[1] % 12 == 0 and packed.storage_offset() % 4 == 0
    return packed.view(torch.int32) if whole else packed


def _columns(width: int) -> int:
    """How many columns a program takes: whole tiles, and a power of two."""
    return min(COLUMNS, max(TILE, triton.next_power_of_2(width)))


_quantize_e5m6.register_fake(_empty)
_dequantize_e5m6.register_fake(lambda packed, scales, width, dtype: packed.new_empty(len(packed), width, dtype=dtype))
