"""How FP8 training takes a product: two operands in E4M3, scaled in tiles along the summed axis (report section 3.3.2).

    Fprop    y  = x W^T        x    1 x 128          W    128 x 128                 BF16
    Dgrad    dx = dy W         dy   1 x 128          W^T  the same codes, turned    BF16
    Wgrad    dW = dy^T x       dy^T 1 x 128          x^T  1 x 128                   FP32, added to the gradient

Wgrad sums over tokens, so its tiles lie along tokens: 128 x 1 of dy and of x. They cannot be made by turning the codes
of Fprop and Dgrad, whose scales change from token to token, within the sum.

`Products` is the report's way. Layers ask it for operands and products and know nothing of codes, so that an ablation
(`fp8_ablations.py`) takes its place. Sizes that are no multiple of 16, which kernels cannot take, are filled up with
zeros, and the results cropped; at full size there are none.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import (Permutation, dequantize_blocks, fp8_gemm, fp8_grouped_gemm, fp8_grouped_wgrad, permute_columns,
                      permute_tiles, quantize_blocks, quantize_columns, quantize_tiles, swiglu_quantize,
                      swiglu_quantize_backward)
from .kernels.fp8_gemm import dequantize_tiles
from .kernels.quantize import LEAST, TINY

ALIGN = 128     # an expert's rows are a multiple of it: no 128 x 1 tile has tokens of two experts


class Operand(NamedTuple):
    """One side of a product: codes [M, K] summed over K, with scales [ceil(K / 128), M] of 1 x 128 tiles; for weights
    codes [.., N, K] with scales [.., ceil(N / 128), ceil(K / 128)] of blocks. Values are codes * scales."""

    codes: Tensor
    scales: Tensor

    def rows(self, count: int) -> "Operand":
        """The first `count` rows, of 1 x 128 tiles."""
        return Operand(self.codes[:count], self.scales[:, :count])

    def values(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """What 1 x 128 tiles stand for, [M, K]; in BF16 exact where scales are powers of two."""
        return dequantize_tiles(self.codes, self.scales).to(dtype)


class WeightOperands(NamedTuple):
    """A weight for Fprop, summed over its inputs, and turned for Dgrad, summed over its outputs."""

    straight: Operand
    turned: Operand


class Products:
    """The report's choice: E4M3 for all, gradients too; scales in tiles; promotion after each 128 of the sum.

    Scales are exact, and powers of two where a tensor is quantised a second time along the other axis (what goes to and
    comes from experts, the input of the linear after attention), or everywhere with `pow2`.
    """

    def __init__(self, pow2: bool = False):
        self.pow2 = pow2

    # ---- operands ----

    def tiles(self, x: Tensor, pow2: bool = False, least: float = LEAST) -> Operand:
        """x [M, K] for a sum over K."""
        return Operand(*quantize_tiles(padded(x), pow2 or self.pow2, least))

    def columns(self, x: Tensor, pow2: bool = False, least: float = LEAST) -> Operand:
        """x [M, K] for a sum over M: the tiles of x^T."""
        return Operand(*quantize_columns(padded(x), pow2 or self.pow2, least))

    def slope_tiles(self, slope: Tensor, pow2: bool = False) -> Operand:
        """`tiles` of a gradient, however small it is: of a mean, the smaller the more tokens."""
        return self.tiles(slope, pow2, TINY)

    def slope_columns(self, slope: Tensor, pow2: bool = False) -> Operand:
        """`columns` of a gradient."""
        return self.columns(slope, pow2, TINY)

    def slopes(self, slope: Tensor) -> tuple[Operand, Operand]:
        """Both. One kernel that read a gradient once was no faster on an H200 than the two: 90 us against 93."""
        return self.slope_tiles(slope), self.slope_columns(slope)

    def weight(self, weight: Tensor) -> WeightOperands:
        """weight [.., N, K] quantised once for both, since a block is square."""
        codes, scales = quantize_blocks(padded(weight), self.pow2)
        return WeightOperands(Operand(codes, scales), Operand(codes.mT.contiguous(), scales.mT.contiguous()))

    def weight_values(self, operand: Operand) -> Tensor:
        """What the codes of a weight stand for, in FP32."""
        return dequantize_blocks(*operand)

    def dispatch(self, operand: Operand, order: Permutation) -> Operand:
        """The tiles of tokens on the rows of the experts that they chose: what travels is one byte a value."""
        return Operand(*permute_tiles(*operand, order))

    def dispatched_columns(self, operand: Operand, order: Permutation) -> Operand:
        """`columns` of what `dispatch` gives; scales are powers of two, and the operand's must be."""
        return Operand(*permute_columns(*operand, order, True))

    def dispatched_slope_columns(self, operand: Operand, order: Permutation) -> Operand:
        """The same of gradients, however small they are."""
        return Operand(*permute_columns(*operand, order, True, TINY))

    def weighted(self, operand: Operand, weights: Tensor) -> Operand:
        """Rows times `weights` [M]: the scales take the factor, and codes stay as they are."""
        return Operand(operand.codes, operand.scales * weights)

    # ---- products ----

    def multiply(self, a: Operand, b: Operand) -> Tensor:
        """a b^T, [M, N] in BF16."""
        with exact(a.codes):
            return fp8_gemm(*a, *b)

    def multiply_groups(self, a: Operand, b: Operand, ends: Tensor) -> Tensor:
        """Each expert's rows of a times its matrix of b, [M, N] in BF16."""
        with exact(a.codes):
            return fp8_grouped_gemm(*a, *b, ends)

    def weight_gradient(self, slope: Operand, x: Operand, into: Tensor | None = None) -> Tensor:
        """dy^T x in FP32, [N, K]; added to `into` by the kernel if it is given."""
        with exact(x.codes):
            return fp8_gemm(*slope, *x, torch.float32, into)

    def group_gradients(self, slope: Operand, x: Operand, ends: Tensor, into: Tensor | None = None) -> Tensor:
        """The same for every expert, [experts, N, K]."""
        with exact(x.codes):
            return fp8_grouped_wgrad(*slope, *x, ends, into)

    # ---- SwiGLU between two products ----

    def swiglu_tiles(self, gate: Tensor, up: Tensor) -> Operand:
        """`tiles` of silu(gate) * up [N, width]."""
        return Operand(*swiglu_quantize(padded(gate), padded(up), self.pow2))

    def swiglu_backward(self, gate: Operand, up: Operand, slope: Tensor, weights: Tensor | None = None
                        ) -> tuple[Tensor, Operand, Tensor | None]:
        """From cached gate and up: d_gate and d_up side by side [N, 2 width] in slope's dtype, `columns` of the
        product, times each row's `weights` [N] if there are any, and d_weights [N]."""
        d_gate_up, codes, scales, d_weights = swiglu_quantize_backward(gate.codes, up.codes, slope, self.pow2,
                                                                       gate.scales, up.scales, weights)
        return d_gate_up, Operand(codes, scales), d_weights


def cached(x: Tensor) -> Operand:
    """x [M, K] as it waits for the backward pass: 1 x 128, one byte a value."""
    return Operand(*quantize_tiles(padded(x)))


def padded(x: Tensor) -> Tensor:
    """x with zeros until its last two sizes are multiples of 16, which is what kernels need; x itself if they are."""
    rows, columns = -x.shape[-2] % 16, -x.shape[-1] % 16
    return F.pad(x.detach(), (0, columns, 0, rows)) if rows or columns else x.detach()


def exact(x: Tensor) -> torch.autocast:
    """No autocast: it would round the FP32 products of the definitions to BF16."""
    return torch.autocast(x.device.type, enabled=False)
