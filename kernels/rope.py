"""Rotary position embedding on adjacent pairs: (x_2i, x_2i+1) turns by the angle position * theta_i (section 2.1.1).

The released weights lay pairs out side by side ("interleaved"). Reading them as two halves runs and is silently wrong.
"""

import torch

from .precision import wide


def rope_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The definition. x [B, T, heads, d] with d even, cos and sin [B or 1, T, d/2]; returns x's shape and dtype."""
    even, odd = wide(x)[..., 0::2], wide(x)[..., 1::2]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`rope_reference`; raises ValueError if the tables are not [B or 1, T, d/2] for x [B, T, heads, d]."""
    if x.dim() != 4 or cos.shape != sin.shape or cos.shape[1:] != (x.shape[1], x.shape[3] // 2):
        raise ValueError(f"rope got x {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}; "
                         "x must be [B, T, heads, d] and the tables [B or 1, T, d/2]")
    return rope_reference(x, cos, sin)
