"""The FP8 products of all experts: experts without rows, room behind the last, and one expert with everything."""

from functools import lru_cache

import torch
import torch.nn.functional as F

from ..fp8_gemm import blocks_of
from ..fp8_grouped_gemm import (fp8_grouped_gemm, fp8_grouped_gemm_reference, fp8_grouped_wgrad,
                                fp8_grouped_wgrad_reference)
from ..operation import Operation
from .fp8_gemm import TOLERANCE, codes, scales

GROUPS = ((4, 8192), (8, 4096), (32, 1024))             # experts, and tokens for each
LINEARS = ((4096, 7168), (7168, 2048))


def _ends(*ends: int) -> torch.Tensor:
    return torch.tensor(ends, dtype=torch.int32)


def _rows(ends: tuple[int, ...], M: int, N: int, K: int) -> tuple:
    """M rows, sorted by expert, and a weight for each expert."""
    return (codes(M, K), scales(blocks_of(K), M), codes(len(ends), N, K),
            scales(len(ends), blocks_of(N), blocks_of(K)), _ends(*ends))


def _tokens(ends: tuple[int, ...], T: int, M: int, N: int) -> tuple:
    """Both operands of the weight gradient, with T tokens along their rows."""
    return codes(M, T), scales(blocks_of(T), M), codes(N, T), scales(blocks_of(T), N), _ends(*ends)


def _case(build, *arguments):
    return lambda dtype: build(*arguments)


def _even(experts: int, tokens: int) -> tuple[int, ...]:
    return tuple(tokens * (expert + 1) for expert in range(experts))


def _shapes(build) -> dict:
    """For both linear layers of an expert."""
    return {f"{experts} x {tokens} x {N} x {K}": lambda e=experts, t=tokens, n=N, k=K: build(_even(e, t), e * t, n, k)
            for experts, tokens in GROUPS for N, K in LINEARS}


@lru_cache(2)
def _bf16(shape: torch.Size, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


def _grouped_mm(a, a_scales, b, b_scales, ends):
    """torch's grouped product in BF16, of as many numbers: what the layer does without FP8."""
    a, b = (_bf16(x.shape, x.device) for x in (a, b))
    return F.grouped_mm(a, b.transpose(-2, -1), offs=ends)


def _flops(a, a_scales, b, *rest) -> float:
    return 2 * a.numel() * b.shape[-2]


OPERATION = Operation(
    "fp8_grouped_gemm", fp8_grouped_gemm, fp8_grouped_gemm_reference, dtypes=(torch.bfloat16,), tolerance=TOLERANCE,
    cases={"idle experts, room": _case(_rows, (0, 128, 128, 384, 384), 560, 136, 144),
           "one for all": _case(_rows, (256, 256), 256, 8, 144), "nothing": _case(_rows, (0, 0, 0), 130, 24, 16),
           "no room": _case(_rows, (0, 0), 0, 8, 16)},
    shapes=_shapes(_rows), peers={"F.grouped_mm in BF16": _grouped_mm}, flops=_flops)

WGRAD = Operation(
    "fp8_grouped_wgrad", fp8_grouped_wgrad, fp8_grouped_wgrad_reference, dtypes=(torch.float32,), tolerance=TOLERANCE,
    cases={"idle experts, room": _case(_tokens, (0, 128, 128, 384), 560, 40, 24),
           "ragged tiles": _case(_tokens, (128, 256), 256, 130, 136),
           "many rows": _case(_tokens, (128, 128, 384), 384, 576, 136), "nothing": _case(_tokens, (0, 0), 16, 24, 8),
           "no token": _case(_tokens, (0, 0), 0, 24, 8)},
    shapes=_shapes(_tokens), peers={"F.grouped_mm in BF16": _grouped_mm}, flops=_flops)
