"""MLA's expanded attention and its gradient as two functions, for who recomputes the inputs and keeps the output.

Besides the output o, one number a query is enough to make the probabilities again: L = log sum_j exp(s_tj).

    s = scale q k^T (causal)       p = exp(s - L)            o = p v
    dv = p^T do                    delta = sum(do o)         ds = p (do v^T - delta)        dq, dk = scale ds k, ds^T q

Here are the definitions; on a GPU the operators of `kernels/mla_attention.py`, whose L counts in powers of two.
"""

import torch
from torch import Tensor

from .kernels import uses_triton
from .kernels.precision import wide


def attend(query: Tensor, key_value: Tensor, rope_key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of query [B, T, H, dk + dr] with key_value [B, T, H, dk + dv] and rope_key [B, T, dr], which the
    heads share: the output [B, T, H, dv] in query's dtype, and L [B, H, T] (on a GPU [H, B T]) in FP32."""
    if takes_kernel(query, key_value, rope_key):
        out, log_sum = torch.ops.minidsv3.mla_attention(*packed(query, key_value, rope_key), scale)
        return out.unflatten(0, query.shape[:2]), log_sum
    with torch.autocast(query.device.type, enabled=False):
        logits, value = _logits(query, key_value, rope_key, scale)[0], _split(key_value, query, rope_key)[1]
        log_sum = logits.logsumexp(-1)
        return torch.einsum("bhts,bshv->bthv", (logits - log_sum[..., None]).exp(), value).to(query.dtype), log_sum


def attend_backward(query: Tensor, key_value: Tensor, rope_key: Tensor, scale: float, out: Tensor, log_sum: Tensor,
                    slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key_value and rope_key, from `slope` [B, T, H, dv] and what `attend` returned."""
    if takes_kernel(query, key_value, rope_key):
        given = *packed(query, key_value, rope_key), scale, out.flatten(0, 1), log_sum, slope.flatten(0, 1)
        gradients = torch.ops.minidsv3.mla_attention_backward(*given)
        return tuple(x.unflatten(0, query.shape[:2]) for x in gradients)
    with torch.autocast(query.device.type, enabled=False):
        logits, key = _logits(query, key_value, rope_key, scale)
        value, slope_wide = _split(key_value, query, rope_key)[1], wide(slope)
        p = (logits - log_sum[..., None]).exp()
        delta = (slope_wide * wide(out)).sum(-1).transpose(1, 2)[..., None]
        d_logits = p * (torch.einsum("bthv,bshv->bhts", slope_wide, value) - delta) * scale
        d_query = torch.einsum("bhts,bshc->bthc", d_logits, key)
        d_key = torch.einsum("bhts,bthc->bshc", d_logits, wide(query))
        d_value = torch.einsum("bhts,bthv->bshv", p, slope_wide)
    d_nope, d_rope = d_key.split([key.shape[-1] - rope_key.shape[-1], rope_key.shape[-1]], -1)
    d_key_value = torch.cat((d_nope, d_value), -1)
    return d_query.to(query.dtype), d_key_value.to(key_value.dtype), d_rope.sum(2).to(rope_key.dtype)


def takes_kernel(query: Tensor, key_value: Tensor, rope_key: Tensor) -> bool:
    """Whether the kernel computes: it wants every part of a head to be a power of two wide, and at least 16."""
    rope = rope_key.shape[-1]
    nope = query.shape[-1] - rope
    widths = nope, rope, key_value.shape[-1] - nope
    return uses_triton(query, key_value, rope_key) and all(width.bit_count() == 1 and width >= 16 for width in widths)


def packed(query: Tensor, key_value: Tensor, rope_key: Tensor) -> tuple:
    """The batch's rows one behind the other, where each begins, and how long they are."""
    batch, length = query.shape[:2]
    offsets = torch.arange(0, batch * length + 1, length, device=query.device)
    return *(x.flatten(0, 1) for x in (query, key_value, rope_key)), offsets, length


def _split(key_value: Tensor, query: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor]:
    """Keys without position and values of all heads, in at least FP32."""
    nope = query.shape[-1] - rope_key.shape[-1]
    return wide(key_value).split([nope, key_value.shape[-1] - nope], -1)


def _logits(query: Tensor, key_value: Tensor, rope_key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal logits [B, H, T, T] and whole keys [B, T, H, dk + dr], in at least FP32."""
    nope = _split(key_value, query, rope_key)[0]
    key = torch.cat((nope, wide(rope_key).unsqueeze(2).expand(-1, -1, nope.shape[2], -1)), -1)
    logits = torch.einsum("bthc,bshc->bhts", wide(query), key) * scale
    future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
    return logits.masked_fill(future, float("-inf")), key
