"""RMSNorm: y = x / sqrt(mean(x^2) + eps) * weight.

Sits before every attention and FFN and on both latents (section 2.1).
"""

import torch

from .precision import wide


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition, computed in at least FP32.

    x [..., d] in any float dtype, weight [d]; returns x's shape and dtype.
    """
    y = wide(x)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * wide(weight)).to(x.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm_reference`; raises ValueError if weight is not one value for each of x's last dimension."""
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm got weight of shape {list(weight.shape)}; "
                         f"x of shape {list(x.shape)} needs [{x.shape[-1]}]")
    return rms_norm_reference(x, weight, eps)
