"""The router's products in FP32, on tensor cores that multiply BF16.

A GPU multiplies FP32 without tensor cores, at a fifteenth of their speed. But FP32 has 24 bits of mantissa, three times
BF16's 8, so a number of FP32 is the sum of three of BF16, and nothing is rounded:

    x = x1 + x2 + x3          x1 = bf16(x), x2 = bf16(x - x1), x3 = bf16(x - x1 - x2)

Products of BF16 numbers are exact in FP32, in which tensor cores add them up. The router's input u is a norm's output
and in BF16 already; its weight W and the slope of its logits, ds, are in FP32 (section 3.3.1):

    logits   u W^T = u W1^T + u W2^T + u W3^T                              FP32
    dW       ds^T u = ds1^T u + ds2^T u + ds3^T u                          FP32
    du       ds W, of nine products the six that FP32 has room for         BF16, as u

On a CPU, and in other dtypes, they are plain products in at least FP32.
"""

import torch
from torch import Tensor

from .kernels.precision import wide


def logits(u: Tensor, weight: Tensor) -> Tensor:
    """u [N, d] times weight [experts, d]: [N, experts] in at least FP32."""
    if splits(u.dtype, weight):
        return product(u, torch.cat(thirds(weight)).T).unflatten(1, (3, -1)).sum(1)
    return wide(u) @ wide(weight).T


def weight_gradient(slope: Tensor, u: Tensor) -> Tensor:
    """The gradient of weight from `slope` [N, experts], that of the logits: [experts, d] in at least FP32."""
    if splits(u.dtype, slope):
        return product(torch.cat(thirds(slope), 1).T, u).unflatten(0, (3, -1)).sum(0)
    return slope.T @ wide(u)


def input_gradient(slope: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of u, [N, d] in `dtype`: one long sum over all pairs of thirds, i + j <= 4."""
    if splits(dtype, slope, weight):
        s, w = thirds(slope), thirds(weight)
        pairs = [(i, j) for i in range(3) for j in range(3 - i)]
        return product(torch.cat([s[i] for i, _ in pairs], 1), torch.cat([w[j] for _, j in pairs]), dtype)
    return (slope @ wide(weight)).to(dtype)


def splits(dtype: torch.dtype, *others: Tensor) -> bool:
    """Whether u, or its gradient, is in BF16 and the others in FP32, on a GPU."""
    return dtype == torch.bfloat16 and all(x.is_cuda and x.dtype == torch.float32 for x in others)


def thirds(x: Tensor) -> list[Tensor]:
    """Three tensors in BF16 whose sum is x in FP32; exactly, unless a third is below BF16's smallest number."""
    parts = []
    for _ in range(3):
        parts.append(x.bfloat16())
        x = x - parts[-1].float()
    return parts


def product(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """a b of BF16 matrices, summed in FP32 and rounded to `dtype` once."""
    if not a.is_cuda:
        return (wide(a) @ wide(b)).to(dtype)
    return a @ b if dtype == torch.bfloat16 else torch.mm(a, b, out_dtype=dtype)
