"""The FP8 product of a linear layer, forward and backward, and of its weight gradient."""

import torch
import torch.nn.functional as F

from ..fp8_gemm import blocks_of, fp8_gemm, fp8_gemm_reference
from ..operation import Operation

LINEARS = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))    # of DeepSeek-V3
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-3}    # a tensor core keeps 14 bits of 128 products


def codes(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(torch.float8_e4m3fn)


def scales(*shape: int) -> torch.Tensor:
    """They differ by powers of two, up to 32, from block to block and row to row."""
    return torch.exp2(torch.randint(-3, 3, shape).float()) * (0.5 + torch.rand(shape))


def operands(M: int, N: int, K: int, tiles: bool = False) -> tuple[torch.Tensor, ...]:
    """a with scales, and b with scales of its blocks or tiles."""
    return (codes(M, K), scales(blocks_of(K), M), codes(N, K),
            scales(blocks_of(K), N) if tiles else scales(blocks_of(N), blocks_of(K)))


def _case(*size: int, **more):
    return lambda dtype: (*operands(*size, **more), dtype)


def _views(dtype: torch.dtype) -> tuple:
    """Rows that lie apart: codes cut out of wider ones, scales out of longer lines."""
    return codes(70, 160)[3:, 16:64], scales(1, 80)[:, 5:72], codes(24, 48), scales(1, 1), dtype


def _cublas(a, a_scales, b, b_scales, out_dtype):
    """cuBLASLt; it wants scales [M, K / 128] of tiles and [K / 128, N / 128] of blocks, in this memory order."""
    tiles, blocks = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    return F.scaled_mm(a, b.t(), a_scales.t(), tiles, b_scales.t(), tiles if b_scales.shape[1] == len(b) else blocks,
                       output_dtype=out_dtype)


def _shape(*size: int, tiles: bool = False) -> tuple:
    dtype = torch.float32 if tiles else torch.bfloat16
    return " x ".join(map(str, size)), lambda: (*operands(*size, tiles=tiles), dtype)


def _flops(a, a_scales, b, *rest) -> float:
    return 2 * a.shape[0] * b.shape[0] * a.shape[1]


OPERATION = Operation(
    "fp8_gemm", fp8_gemm, fp8_gemm_reference, dtypes=tuple(TOLERANCE), tolerance=TOLERANCE,
    cases={"33 x 40 x 48": _case(33, 40, 48), "one row": _case(1, 8, 16), "70 x 136 x 576": _case(70, 136, 576),
           "long rows": _case(5, 72, 1296), "two blocks of rows": _case(130, 264, 272), "views": _views,
           "many rows": _case(515, 136, 272), "no row": _case(0, 8, 16)},
    shapes=dict(_shape(M, N, K) for M in (64, 128, 4096) for N, K in LINEARS),
    peers={"cuBLASLt": _cublas}, flops=_flops)

WGRAD = Operation(
    "fp8_wgrad", fp8_gemm, fp8_gemm_reference, dtypes=tuple(TOLERANCE), tolerance=TOLERANCE,
    cases={"40 x 24 x 48": _case(40, 24, 48, tiles=True), "130 x 136 x 272": _case(130, 136, 272, tiles=True),
           "long rows": _case(8, 8, 1040, tiles=True), "many rows": _case(515, 136, 272, tiles=True)},
    shapes=dict(_shape(M, N, 4096, tiles=True) for M, N in ((7168, 2048), (4096, 7168), (2112, 7168), (7168, 16384))),
    peers={"cuBLASLt": _cublas}, flops=_flops)
