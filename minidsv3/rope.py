"""Rotary angles, with YaRN's stretch of the context (report sections 2.1.1 and 4.3).

A pair of channels i turns by `position * theta^(-2i/d)`. YaRN leaves fast pairs alone (many turns within the original
context), slows the slow ones down by `factor`, and blends linearly between. All of it in float64, cast once: in bf16
neighbouring positions would get the same angle.
"""

import math

import torch

from .config import ModelConfig, YarnScaling


def inverse_frequencies(config: ModelConfig, device: torch.device | str = "cpu") -> torch.Tensor:
    """Radians a position for each of the qk_rope_head_dim / 2 pairs, fastest first, in float64."""
    d = config.qk_rope_head_dim
    pair = torch.arange(d // 2, dtype=torch.float64, device=device)
    plain = config.rope_theta ** (-2 * pair / d)
    if config.rope_scaling is None:
        return plain
    low, high = yarn_ramp(config)
    slowed = ((pair - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain * (1 - slowed) + plain / config.rope_scaling.factor * slowed


def yarn_ramp(config: ModelConfig) -> tuple[int, int]:
    """First and last pair of YaRN's ramp: those that turn beta_fast and beta_slow times in the original context.

    At full size (10, 23): pairs up to 10 keep their frequency, from 23 on it is divided by the factor.
    """
    d, yarn = config.qk_rope_head_dim, config.rope_scaling

    def pair(turns: float) -> float:
        positions_per_radian = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return d * math.log(positions_per_radian) / (2 * math.log(config.rope_theta))

    return max(math.floor(pair(yarn.beta_fast)), 0), min(math.ceil(pair(yarn.beta_slow)), d - 1)


def temperature(factor: float, mscale: float) -> float:
    """YaRN's sqrt(1/t) = 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """The factor of the whole attention logit: 1/sqrt(d_h + d_h^R) (eq. 10), under YaRN times the temperature squared.

    The report speaks of the rotary key alone; the released code scales both parts (0.1352337789 at full size).
    """
    scale, yarn = config.qk_head_dim ** -0.5, config.rope_scaling
    return scale * temperature(yarn.factor, yarn.mscale_all_dim) ** 2 if yarn and yarn.mscale_all_dim else scale


def rotary_amplitude(yarn: YarnScaling | None) -> float:
    """The factor of cos and sin: 1, unless a config's two mscales differ or one is missing (the hub's rule)."""
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return temperature(yarn.factor, yarn.mscale) / temperature(yarn.factor, yarn.mscale_all_dim)
    return temperature(yarn.factor, 1.0)


def rope_table(config: ModelConfig, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [*positions.shape, qk_rope_head_dim / 2] in at least float32, for integer positions [B, T]."""
    angles = positions[..., None] * inverse_frequencies(config, positions.device)
    amplitude, dtype = rotary_amplitude(config.rope_scaling), torch.promote_types(dtype, torch.float32)
    return (angles.cos() * amplitude).to(dtype), (angles.sin() * amplitude).to(dtype)
