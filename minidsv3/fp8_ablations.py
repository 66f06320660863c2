"""FP8 products that the report advises against, emulated: without tiles, with E5M2 gradients, without promotion.

Operands are codes and scales as in `fp8_products.py`, and only who shares a scale differs; so everything around the
products stays, what is cached included. Products are FP32 products of the values, one expert after the other: what
promoted FP8 products compute, slowly. Where promotion is left out they are what a short accumulator makes of the codes:
on a CPU its model (`accumulate.py`), on a GPU the tensor cores themselves, through cuBLAS and `use_fast_accum`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .accumulate import accumulate
from .formats import E4M3, E5M2, Format, Tile, scale_of_each
from .fp8_products import Operand, Products, WeightOperands, exact, padded
from .kernels.fp8_grouped_gemm import spans
from .kernels.quantize import LEAST, TILE, TINY

DTYPES = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
# Rows and columns that share a scale, of activations and of weights; None is all of them, and columns are summed over.
SHARED = {"tiles": ((1, TILE), (TILE, TILE)), "rows": ((1, None), (1, None)), "tensor": ((None, None), (None, None))}


class Ablated(Products):
    """Products with the choices of `fp8.FP8Recipe`."""

    def __init__(self, pow2: bool, gradient: str, gradient_blocks: bool, scales: str, promote: bool):
        super().__init__(pow2)
        self.activation, self.block = SHARED[scales]
        self.slope = (TILE, TILE) if gradient_blocks else self.activation
        self.gradient, self.promote = {"e4m3": E4M3, "e5m2": E5M2}[gradient], promote

    def tiles(self, x: Tensor, pow2: bool = False) -> Operand:
        return quantize(padded(x), E4M3, self.activation, pow2 or self.pow2)

    def columns(self, x: Tensor, pow2: bool = False) -> Operand:
        return quantize(padded(x).T, E4M3, self.activation, pow2 or self.pow2)

    def slope_tiles(self, slope: Tensor, pow2: bool = False) -> Operand:
        return quantize(padded(slope), self.gradient, self.slope, pow2 or self.pow2, TINY)

    def slope_columns(self, slope: Tensor, pow2: bool = False) -> Operand:
        return quantize(padded(slope).T, self.gradient, self.slope, pow2 or self.pow2, TINY)

    def weight(self, weight: Tensor) -> WeightOperands:
        """Scales [.., ceil(K / 128), N] here, as of tiles."""
        return WeightOperands(*(quantize(x, E4M3, self.block, self.pow2) for x in (padded(weight), padded(weight).mT)))

    def weight_values(self, operand: Operand) -> Tensor:
        return operand.values(torch.float32)

    def swiglu_tiles(self, gate: Tensor, up: Tensor) -> Operand:
        return self.tiles(F.silu(gate.float()) * up.float())

    def swiglu_backward(self, gate: Operand, up: Operand, slope: Tensor) -> tuple[Tensor, Tensor, Operand]:
        d_gate, d_up, _ = super().swiglu_backward(gate, up, slope)
        gate, up = gate.values(torch.float32), up.values(torch.float32)
        return d_gate, d_up, self.columns(gate * gate.sigmoid() * up)

    def multiply(self, a: Operand, b: Operand) -> Tensor:
        return self.product(a, b).bfloat16()

    def multiply_groups(self, a: Operand, b: Operand, ends: Tensor) -> Tensor:
        out = torch.zeros(len(a.codes), b.codes.shape[1], dtype=torch.bfloat16, device=a.codes.device)
        for expert, (start, end) in enumerate(spans(ends)):
            rows = Operand(a.codes[start:end], a.scales[:, start:end])
            out[start:end] = self.product(rows, Operand(b.codes[expert], b.scales[expert]))
        return out

    def weight_gradient(self, slope: Operand, x: Operand, into: Tensor | None = None) -> Tensor:
        product = self.product(slope, x)
        return product if into is None else into.add_(product)

    def group_gradients(self, slope: Operand, x: Operand, ends: Tensor, into: Tensor | None = None) -> Tensor:
        product = torch.stack([self.product(*(Operand(side.codes[:, start:end], side.scales[start // TILE:end // TILE])
                                              for side in (slope, x))) for start, end in spans(ends)])
        return product if into is None else into.add_(product)

    def product(self, a: Operand, b: Operand) -> Tensor:
        """a b^T of 1 x 128 tiles in FP32, [M, N]."""
        with exact(a.codes):
            if self.promote:
                return a.values(torch.float32) @ b.values(torch.float32).T
            return unpromoted(a, b)


def quantize(x: Tensor, format: Format, shared: Tile, pow2: bool, least: float = LEAST) -> Operand:
    """x [.., M, K] with one scale for each `shared` rows and columns; the scales are written as those of 1 x 128 tiles,
    [.., ceil(K / 128), M]."""
    spread = scale_of_each(x.float(), format, shared, pow2, least)
    return Operand((x.float() / spread).to(DTYPES[format]).contiguous(), spread[..., ::TILE].mT.contiguous())


def unpromoted(a: Operand, b: Operand) -> Tensor:
    """a b^T, added up as tensor cores do and scaled once at the end: every row has one scale."""
    if not a.codes.shape[1]:        # an expert without tokens
        return a.scales.new_zeros(len(a.codes), len(b.codes))
    a_scales, b_scales = a.scales[0], b.scales[0]
    if a.codes.device.type == "cpu":
        product = accumulate(a.codes.float(), b.codes.float(), promote_every=None)
        return product * a_scales[:, None] * b_scales
    return torch._scaled_mm(a.codes.contiguous(), b.codes.contiguous().T, scale_a=a_scales[:, None].contiguous(),
                            scale_b=b_scales[None], out_dtype=torch.bfloat16, use_fast_accum=True).float()
