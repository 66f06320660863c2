"""The BF16 products of all experts: ends anywhere, idle experts, room behind the last."""

import torch
import torch.nn.functional as F

from ..grouped_gemm import grouped_gemm, grouped_gemm_reference
from ..operation import Operation, leaf
from .fp8_grouped_gemm import GROUPS, LINEARS, _ends, _even


def _case(ends: tuple[int, ...], M: int, N: int, K: int):
    return lambda dtype: (leaf(M, K, dtype=dtype), leaf(len(ends), N, K, dtype=dtype), _ends(*ends))


OPERATION = Operation(
    "grouped_gemm", grouped_gemm, grouped_gemm_reference, dtypes=(torch.float64, torch.bfloat16),
    cases={"idle experts, room": _case((0, 5, 5, 140, 140), 150, 24, 72),
           "whole tiles": _case((128, 256), 256, 264, 64),
           "one row": _case((0, 1, 1), 1, 8, 8), "nothing": _case((0, 0), 3, 8, 16), "no room": _case((0,), 0, 8, 16)},
    shapes={f"{experts} x {tokens} x {N} x {K}":
            lambda e=experts, t=tokens, n=N, k=K: _case(_even(e, t), e * t, n, k)(torch.bfloat16)
            for experts, tokens in GROUPS for N, K in LINEARS},
    peers={"F.grouped_mm": lambda x, weight, ends: F.grouped_mm(x, weight.transpose(1, 2), offs=ends)},
    flops=lambda x, weight, ends: 2 * x.numel() * weight.shape[1], times_backward=True)
