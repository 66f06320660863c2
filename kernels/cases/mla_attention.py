"""Latent attention with keys and values a head, over packed sequences of very different lengths."""

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..mla_attention import mla_attention, mla_attention_reference
from ..operation import Operation, leaf


def _inputs(lengths: list[int], heads: int, nope: int, rope: int, value: int, size: float = 1.0):
    """`size` scales the logits."""
    def build(dtype: torch.dtype) -> tuple:
        tokens = sum(lengths)
        query = (torch.randn(tokens, heads, nope + rope, dtype=dtype) * size).requires_grad_()
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return (query, leaf(tokens, heads, nope + value, dtype=dtype), leaf(tokens, rope, dtype=dtype), offsets,
                max(lengths))
    return build


def _large_logits(dtype: torch.dtype) -> tuple:
    """Whole numbers, so that logits of several hundred are exact; exp of them would overflow."""
    query, key_value, rope_key, offsets, longest = _inputs([9, 30], 2, 16, 16, 16)(dtype)
    return (*((x.detach() * 4).round().requires_grad_() for x in (query, key_value, rope_key)), offsets, longest)


def _strided(dtype: torch.dtype) -> tuple:
    """The rotary key lies behind the latent, the queries of two batches apart, and offsets are int64."""
    rope_key = torch.randn(21, 48, dtype=dtype)[:, 32:].requires_grad_()
    query = torch.randn(21, 3, 2, 32, dtype=dtype)[:, 1].requires_grad_()
    key_value = torch.randn(2, 21, 32, dtype=dtype).transpose(0, 1).requires_grad_()
    return query, key_value, rope_key, torch.tensor([0, 4, 21]), 17


def _equal(query: Tensor, key_value: Tensor, rope_key: Tensor, offsets: Tensor, max_length: int) -> tuple:
    """q, k and v [B, H, T, width] of sequences of one length, as torch's attention takes them; k is put together."""
    shape = len(offsets) - 1, max_length
    if shape[0] * shape[1] != len(query):
        raise ValueError("torch's attention takes sequences of equal lengths only")
    k_nope, value = key_value.split([query.shape[-1] - rope_key.shape[-1],
                                     key_value.shape[-1] - query.shape[-1] + rope_key.shape[-1]], -1)
    key = torch.cat((k_nope, rope_key.unsqueeze(1).expand(-1, query.shape[1], -1)), -1)
    return tuple(x.unflatten(0, shape).transpose(1, 2) for x in (query, key, value))


def cudnn(*inputs, scale: float) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = F.scaled_dot_product_attention(*_equal(*inputs), is_causal=True, scale=scale)
    return out.transpose(1, 2).flatten(0, 1)


def flash_padded(*inputs, scale: float) -> Tensor:
    """Flash attention wants values as wide as keys."""
    query, key, value = _equal(*inputs)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(query, key, F.pad(value, (0, key.shape[-1] - value.shape[-1])),
                                             is_causal=True, scale=scale)
    return out[..., :value.shape[-1]].transpose(1, 2).flatten(0, 1)


def _flops(query: Tensor, key_value: Tensor, rope_key: Tensor, offsets: Tensor, max_length: int) -> float:
    """Of sequences of equal lengths: two products for every pair of a query and a key not later than it."""
    pairs = len(query) * (max_length + 1) / 2
    return 2 * pairs * query.shape[1] * (key_value.shape[-1] + rope_key.shape[-1])


OPERATION = Operation(
    "mla_attention", mla_attention, mla_attention_reference, options={"scale": 0.14},
    cases={"5, 70, 3": _inputs([5, 70, 3], 3, 16, 16, 16), "one token, then nine": _inputs([1, 9], 1, 16, 16, 16),
           "130": _inputs([130], 1, 32, 16, 32), "empty in the middle": _inputs([6, 0, 33], 2, 32, 16, 32),
           "no token": _inputs([0], 2, 16, 16, 16), "large logits": _large_logits, "strided": _strided,
           "odd widths": _inputs([20, 3], 2, 12, 8, 24)},
    shapes={"4096, 128 heads": lambda: _inputs([4096], 128, 128, 64, 128)(torch.bfloat16),
            "4 x 1024, 128 heads": lambda: _inputs([1024] * 4, 128, 128, 64, 128)(torch.bfloat16),
            "8 x 2048, 16 heads": lambda: _inputs([2048] * 8, 16, 64, 64, 64)(torch.bfloat16)},
    peers={"cuDNN, key put together": cudnn, "flash, values padded": flash_padded},
    flops=_flops, backward_flops=2.5, times_backward=True)   # five products for two: the logits once more
