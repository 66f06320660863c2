"""FP8 products that the report advises against: coarser scales, E5M2 gradients, no promotion (3.3.2, appendix B).

    Ablated       gradients of activations in blocks of 128 x 128 (B.2), or in E5M2, as others take them
    OneScale      one scale for a whole tensor; for weights, one a matrix
    Unpromoted    the same, and sums stay in the tensor cores' own precision

Only who shares a scale differs. Written out as scales of 1 x 128 tiles and 128 x 128 blocks, coarser ones make operands
like any others (`fp8_products.py`): the same kernels multiply them, and all around the products stays. Products with an
operand in E5M2, which those kernels do not take, are their definitions: right and slow.

A sum can do without promotion only where one scale serves all of it. On a CPU it is what a model of tensor cores gives
(`accumulate.py`). On a GPU the tensor cores themselves add, in kernels that come with torch; these return BF16, so
weight gradients are rounded to it before they are added in FP32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .accumulate import accumulate
from .formats import E4M3, E5M2, Format, Tile, tile_scale
from .fp8_products import Operand, Products, WeightOperands, exact, padded
from .kernels import Permutation, permute
from .kernels.backend import uses_triton
from .kernels.fp8_gemm import blocks_of, fp8_gemm_reference
from .kernels.fp8_grouped_gemm import clear_behind, fp8_grouped_gemm_reference, fp8_grouped_wgrad_reference, spans
from .kernels.quantize import LEAST, TINY

DTYPES = {E4M3: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
WHOLE = (None, None)        # the tile that is a matrix


class Ablated(Products):
    """Gradients of activations in another format than E4M3, or other tiles than 1 x 128."""

    def __init__(self, pow2: bool, gradient: Format, tile: Tile):
        super().__init__(pow2)
        self.gradient, self.tile = gradient, tile

    def slope_tiles(self, slope: Tensor, pow2: bool = False) -> Operand:
        return quantize_rows(padded(slope), self.gradient, self.tile, pow2 or self.pow2, TINY)

    def slope_columns(self, slope: Tensor, pow2: bool = False) -> Operand:
        return quantize_rows(padded(slope).T, self.gradient, self.tile, pow2 or self.pow2, TINY)

    def dispatched_slope_columns(self, operand: Operand, order: Permutation) -> Operand:
        return self.slope_columns(permute(operand.values(), order), pow2=True)

    def multiply(self, a: Operand, b: Operand) -> Tensor:
        return super().multiply(a, b) if is_e4m3(a) else defined(fp8_gemm_reference, *a, *b)

    def multiply_groups(self, a: Operand, b: Operand, ends: Tensor) -> Tensor:
        return super().multiply_groups(a, b, ends) if is_e4m3(a) else defined(fp8_grouped_gemm_reference, *a, *b, ends)

    def weight_gradient(self, slope: Operand, x: Operand, into: Tensor | None = None) -> Tensor:
        if is_e4m3(slope):
            return super().weight_gradient(slope, x, into)
        return defined(fp8_gemm_reference, *slope, *x, torch.float32, into)

    def group_gradients(self, slope: Operand, x: Operand, ends: Tensor, into: Tensor | None = None) -> Tensor:
        if is_e4m3(slope):
            return super().group_gradients(slope, x, ends, into)
        return defined(fp8_grouped_wgrad_reference, *slope, *x, ends, into)


class OneScale(Ablated):
    """One scale for a whole tensor; for weights, one a matrix."""

    def __init__(self, pow2: bool, gradient: Format):
        super().__init__(pow2, gradient, WHOLE)

    def tiles(self, x: Tensor, pow2: bool = False, least: float = LEAST) -> Operand:
        return quantize_rows(padded(x), E4M3, WHOLE, pow2 or self.pow2, least)

    def columns(self, x: Tensor, pow2: bool = False, least: float = LEAST) -> Operand:
        return quantize_rows(padded(x).T, E4M3, WHOLE, pow2 or self.pow2, least)

    def dispatched_columns(self, operand: Operand, order: Permutation) -> Operand:
        return self.columns(permute(operand.values(), order), pow2=True)

    def weight(self, weight: Tensor) -> WeightOperands:
        codes, scales = quantize(padded(weight), E4M3, WHOLE, self.pow2)
        scales = scales.expand(*scales.shape[:-2], *map(blocks_of, codes.shape[-2:])).contiguous()
        return WeightOperands(Operand(codes, scales), Operand(codes.mT.contiguous(), scales.mT.contiguous()))

    def swiglu_tiles(self, gate: Tensor, up: Tensor) -> Operand:
        return self.tiles(F.silu(gate.float()) * up.float())

    def swiglu_backward(self, gate: Operand, up: Operand, slope: Tensor, weights: Tensor | None = None
                        ) -> tuple[Tensor, Operand, Tensor | None]:
        d_gate_up, _, d_weights = super().swiglu_backward(gate, up, slope, weights)
        hidden = F.silu(gate.values(torch.float32)) * up.values(torch.float32)
        return d_gate_up, self.columns(hidden if weights is None else weights[:, None] * hidden), d_weights


class Unpromoted(OneScale):
    """One scale a tensor, and no sum outside of the tensor cores."""

    def __init__(self, pow2: bool):
        super().__init__(pow2, E4M3)

    def multiply(self, a: Operand, b: Operand) -> Tensor:
        return unpromoted(a.codes, row_scales(a), b.codes, matrix_scales(b)).bfloat16()

    def multiply_groups(self, a: Operand, b: Operand, ends: Tensor) -> Tensor:
        return unpromoted(a.codes, row_scales(a), b.codes, matrix_scales(b), ends).bfloat16()

    def weight_gradient(self, slope: Operand, x: Operand, into: Tensor | None = None) -> Tensor:
        product = unpromoted(slope.codes, row_scales(slope), x.codes, row_scales(x)).float()
        return product if into is None else into.add_(product)

    def group_gradients(self, slope: Operand, x: Operand, ends: Tensor, into: Tensor | None = None) -> Tensor:
        product = unpromoted(slope.codes, row_scales(slope), x.codes, row_scales(x), ends).float()
        return product if into is None else into.add_(product)


# ---- operands -------------------------------------------------------------------------------------------------------

def quantize(x: Tensor, format: Format, tile: Tile, pow2: bool, least: float = LEAST) -> tuple[Tensor, Tensor]:
    """Codes of x [.., M, K], contiguous, and one FP32 scale for each tile: [.., tiles along M, tiles along K]."""
    height, width = x.shape[-2:]
    rows, columns = tile[0] or max(height, 1), tile[1] or max(width, 1)
    if height % rows or width % columns:
        x = F.pad(x, (0, -width % columns, 0, -height % rows))
    tiles = x.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    scales = tile_scale(torch.linalg.vector_norm(tiles, torch.inf, (-3, -1), dtype=torch.float32), format, pow2, least)
    codes = (tiles / scales[..., :, None, :, None]).to(DTYPES[format]).flatten(-2).flatten(-3, -2)
    return codes[..., :height, :width].contiguous(), scales


def quantize_rows(x: Tensor, format: Format, tile: Tile, pow2: bool, least: float = LEAST) -> Operand:
    """x [M, K] with the scale of its tile for each 1 x 128 of it; a tile is at most 128 wide, or all of x."""
    codes, scales = quantize(x, format, tile, pow2, least)
    height, width = codes.shape
    spread = scales.repeat_interleave(tile[0] or max(height, 1), 0)[:height]
    return Operand(codes, spread.expand(height, blocks_of(width)).T.contiguous())


def is_e4m3(operand: Operand) -> bool:
    """Whether the kernels take it."""
    return operand.codes.dtype == DTYPES[E4M3]


def defined(product: Callable[..., Tensor], codes: Tensor, *rest) -> Tensor:
    """What the definition of a product computes."""
    with exact(codes):
        return product(codes, *rest)


# ---- sums without promotion -----------------------------------------------------------------------------------------

def row_scales(operand: Operand) -> Tensor:
    """The scale of each row of 1 x 128 tiles, [M], where all tiles of a row have the same; 0 if there is none."""
    return operand.scales[:1].sum(0)


def matrix_scales(weight: Operand) -> Tensor:
    """The scale of each row of a weight in 128 x 128 blocks, [.., N], where all blocks of a matrix have the same."""
    return weight.scales[..., :1, 0].expand(weight.codes.shape[:-1]).contiguous()


def unpromoted(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor | None = None) -> Tensor:
    """a b^T, added as tensor cores add and scaled once at the end, in FP32 or, by a GPU, in BF16.

    a codes [M, K] and b codes [N, K], with one scale a row: [M, N]. With `ends` [experts], as in
    kernels/fp8_grouped_gemm.py, either b is [experts, N, K] and `ends` divides a's rows: [M, N], zeros behind the last;
    or it divides the sum over K: [experts, M, N].
    """
    if uses_triton(a, b) and a.is_cuda:
        return on_tensor_cores(a, a_scales, b, b_scales, ends)
    with exact(a):
        if ends is None:
            return accumulate(a.float(), b.float(), promote_every=None) * a_scales[:, None] * b_scales
        if b.dim() == 2:
            return torch.stack([unpromoted(a[:, start:end], a_scales, b[:, start:end], b_scales)
                                for start, end in spans(ends)])
        out = a_scales.new_zeros(len(a), b.shape[1])
        for expert, (start, end) in enumerate(spans(ends)):
            out[start:end] = unpromoted(a[start:end], a_scales[start:end], b[expert], b_scales[expert])
        return out


def on_tensor_cores(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor | None) -> Tensor:
    """`unpromoted` by what torch brings, in BF16, with nothing asked of the host. Sizes are multiples of 16."""
    if not a.numel() or not b.numel():
        experts = [len(ends)] if ends is not None and b.dim() == 2 else []
        return a_scales.new_zeros(*experts, len(a), b.shape[-2])
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    if ends is None:
        return torch._scaled_mm(a, b.mT, a_scales[:, None], b_scales[None], **options)
    if b.dim() == 3:
        out = torch._scaled_grouped_mm(a, b.mT, a_scales, b_scales, ends, **options)
        clear_behind(out, ends)                     # torch leaves these rows as it found them
        return out
    experts, empty = len(ends), ends.diff(prepend=ends.new_zeros(1)) == 0
    out = torch._scaled_grouped_mm(a, b.mT, a_scales.repeat(experts), b_scales.repeat(experts), ends, **options)
    return out.masked_fill(empty[:, None, None], 0)     # a sum over no tokens is not sure to be written either
