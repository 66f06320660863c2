"""Number formats of 8 and 12 bits, in plain torch (report section 3.3): what a code is worth, and the code of a value.

A code is sign, exponent field e, mantissa field m, from the highest bit down; with M bits of mantissa it is worth

    e > 0:  (1 + m / 2^M) 2^(e - bias)            normal numbers: equally many codes in each octave
    e = 0:  (m / 2^M) 2^(1 - bias)                below them: steps stay as they are, down to zero

    E4M3    bias 7    up to 448      steps of 1/8 of an octave     every FP8 tensor of V3, gradients too
    E5M2    bias 15   up to 57344    steps of 1/4                  what others take for gradients
    E5M6    bias 15   up to 65024    steps of 1/64                 the cached input of the linear after attention
    INT8              up to 127      steps of 1                    no exponent at all: for comparison

The report names E5M6 and says no more. Here it is the first 12 bits of FP16, as E5M2 is the first 8: FP16's bias,
numbers below the normal ones, infinities and NaNs. The other choice, to spend the top exponent on numbers, would double
the largest number, and scales make that useless.

Rounding is to nearest, ties to even. A finite value beyond the largest number becomes the largest number;
inf stays inf, or becomes NaN in a format without it, so that it cannot come back as finite nonsense. No gradient passes
through any of these functions.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.precision import wide
from .kernels.quantize import LEAST, TILE


@dataclass(frozen=True)
class Format:
    """A sign bit, `exponent_bits` and `mantissa_bits`.

    `top` says what the highest exponent field is for: "ieee" inf and NaNs, "fn" numbers but for one NaN, all bits set,
    "numbers" numbers alone.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    top: Literal["ieee", "fn", "numbers"]

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def largest_code(self) -> int:
        """The code of the largest number: what lies above it, up to the sign bit, is inf or NaN."""
        return 2 ** (self.bits - 1) - 1 - {"ieee": 2 ** self.mantissa_bits, "fn": 1, "numbers": 0}[self.top]

    @property
    def largest(self) -> float:
        """The largest number."""
        field, mantissa = divmod(self.largest_code, 2 ** self.mantissa_bits)
        units = mantissa + (2 ** self.mantissa_bits if field else 0)
        return units * 2.0 ** (max(field, 1) - self.bias - self.mantissa_bits)

    @property
    def smallest_normal(self) -> float:
        """Where the octaves end; below, steps are as wide as in the octave above."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest(self) -> float:
        """The smallest number above zero; half of it and less is rounded to zero."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)


E4M3 = Format("E4M3", 4, 3, 7, "fn")
E5M2 = Format("E5M2", 5, 2, 15, "ieee")
E5M6 = Format("E5M6", 5, 6, 15, "ieee")
INT8 = Format("INT8", 0, 7, -6, "numbers")      # sign and magnitude; a two's complement has -128 besides


def decode(codes: Tensor, format: Format) -> Tensor:
    """What codes, integers from 0 to 2^bits - 1, are worth: float64, exact."""
    codes = codes.long()
    field = codes >> format.mantissa_bits & (1 << format.exponent_bits) - 1
    mantissa = codes & (1 << format.mantissa_bits) - 1
    units = mantissa + ((field > 0).long() << format.mantissa_bits)
    exponent = field.clamp(min=1) - format.bias - format.mantissa_bits
    values = units * (exponent + 1023 << 52).view(torch.float64)        # 2^exponent, from its bits
    beyond = (codes & (1 << format.bits - 1) - 1) - format.largest_code
    values = values.where(beyond <= 0, float("nan"))
    if format.top == "ieee":
        values = values.where(beyond != 1, float("inf"))
    return torch.where(codes >> format.bits - 1 == 1, -values, values)


@torch.no_grad()
def encode(x: Tensor, format: Format) -> Tensor:
    """The codes of x, which has any float dtype: int16, rounded to nearest even."""
    within, step = _within(x, format)
    units = (within.abs() / step).round()
    octaves = torch.frexp(step / format.smallest)[1] - 1        # above the lowest
    codes = (octaves << format.mantissa_bits) + units.nan_to_num().int()        # a unit too many carries into octaves
    if format.top != "numbers":
        codes = codes.where(x.isfinite(), format.largest_code + 1)
    if format.top == "ieee":
        codes = codes.where(~x.isnan(), format.largest_code + 2 ** (format.mantissa_bits - 1) + 1)
    return (codes + (x.signbit().int() << format.bits - 1)).short()


@torch.no_grad()
def round_to(x: Tensor, format: Format) -> Tensor:
    """`decode(encode(x))` in x's shape and dtype, without codes: fast enough for every tensor of a training step."""
    within, step = _within(x, format)
    kept = x if format.top == "ieee" else float("nan")
    return torch.where(x.isfinite(), (within / step).round() * step, kept).to(x.dtype)


def octave(x: Tensor) -> Tensor:
    """2^floor(log2 |x|), exactly, since it is x without sign and mantissa bits. x in FP32 or FP64; 0 for 0 and for
    numbers below the normal ones, inf for inf and NaN."""
    if x.dtype == torch.float64:
        return (x.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def _within(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """x in at least FP32, no larger than the format's largest number, and the distance of the neighbours round it."""
    within = wide(x).clamp(-format.largest, format.largest)
    return within, octave(within).clamp(min=format.smallest_normal) * 2.0 ** -format.mantissa_bits


def tile_scale(amax: Tensor, format: Format, pow2: bool = False, least: float = LEAST) -> Tensor:
    """What divides a tile so that its largest magnitude `amax` becomes the format's largest number; the same rule as in
    `kernels/quantize.py`: at least `least` / largest, NaN for a tile that is not finite, `pow2` rounds it up to 2^n."""
    scale = amax.clamp(min=least) / torch.full_like(amax, format.largest)
    if pow2:
        power = octave(scale)
        scale = power.where(power == scale, 2 * power)
    return scale.where(amax.isfinite(), float("nan"))


Tile = tuple[int | None, int | None]    # rows and columns that share a scale; None is the whole axis


@torch.no_grad()
def scale_of_each(x: Tensor, format: Format, tile: Tile = (1, TILE), pow2: bool = False, least: float = LEAST
                  ) -> Tensor:
    """The scale that each value of x [.., M, K] shares with its tile, in x's shape and at least FP32.

    (1, 128) is for activations, (128, 1) for what is summed over tokens, (128, 128) for weights; (None, None) is one
    scale for all of a matrix.
    """
    height, width = x.shape[-2:]
    rows, columns = tile[0] or max(height, 1), tile[1] or max(width, 1)
    tiles = F.pad(wide(x), (0, -width % columns, 0, -height % rows))
    amax = tiles.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).abs().amax((-3, -1))
    scales = tile_scale(amax, format, pow2, least).repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return scales[..., :height, :width]


@torch.no_grad()
def fake_quantize(x: Tensor, format: Format, tile: Tile = (1, TILE), pow2: bool = False) -> Tensor:
    """x [.., M, K] as it comes back from `format`: divided by its tile's scale, rounded, multiplied again. Computed
    in at least FP32; returns x's shape and dtype."""
    scales = scale_of_each(x, format, tile, pow2)
    return (round_to(wide(x) / scales, format) * scales).to(x.dtype)
