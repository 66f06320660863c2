"""Activations in 12 bits: E5M6 with 1 x 128 tiles, two values in three bytes (report section 3.3.3).

The input of the linear after attention is kept for two uses in the backward pass: the gradient of attention needs it
too, so FP8 would be too coarse, and BF16 would take a third more. Its scales are powers of two. The weight gradient
wants it in 128 x 1 tiles, and dividing by another power of two rounds nothing: the change of tiles adds no errors.

    codes   a = hgfedcba9876   b = HGFEDCBA9876     (12 bits each)
    bytes   first 8 of a | last 4 of a, first 4 of b | last 8 of b
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import E5M6, encode, tile_scale
from .kernels.precision import wide
from .kernels.quantize import TILE


def pack(codes: Tensor) -> Tensor:
    """Integer codes [.., n] from 0 to 4095 -> bytes [.., 3 ceil(n / 2)] uint8; an odd last code is paired with 0."""
    a, b = F.pad(codes.int(), (0, codes.shape[-1] % 2)).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, width: int) -> Tensor:
    """The inverse: bytes [.., 3 ceil(width / 2)] -> codes [.., width] int16. Raises ValueError for another length."""
    if packed.dtype != torch.uint8 or packed.shape[-1] != 3 * -(-width // 2):
        raise ValueError(f"unpack got {list(packed.shape)} {packed.dtype}; "
                         f"{width} codes of 12 bits are {3 * -(-width // 2)} bytes of torch.uint8")
    first, middle, last = packed.short().unflatten(-1, (-1, 3)).unbind(-1)
    return torch.stack([first << 4 | middle >> 4, (middle & 15) << 8 | last], -1).flatten(-2)[..., :width]


@torch.no_grad()
def quantize_e5m6(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K], any float dtype -> bytes [M, 3 ceil(K / 2)] uint8 and power-of-two scales [ceil(K / 128), M] in FP32,
    in the layout of `quantize_tiles`. Raises ValueError for another number of axes."""
    if x.dim() != 2:
        raise ValueError(f"quantize_e5m6 got {list(x.shape)}; it takes [M, K]")
    tiles = F.pad(x.float(), (0, -x.shape[1] % TILE)).unflatten(1, (-1, TILE))
    scales = tile_scale(tiles.abs().amax(-1), E5M6, pow2=True)
    codes = encode(tiles / scales[..., None], E5M6).flatten(1)[:, :x.shape[1]]
    return pack(codes), scales.T.contiguous()


@torch.no_grad()
def dequantize_e5m6(packed: Tensor, scales: Tensor, width: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The inverse: [M, width] in `dtype`; exact in BF16 too, which has one bit of mantissa more. A code with four zeros
    behind it is an FP16 number."""
    values = (unpack(packed, width) << 4).view(torch.float16)
    return (wide(values) * scales.T.repeat_interleave(TILE, 1)[:, :width]).to(dtype)
