"""RMSNorm over the model's width and over the latents, which lie inside wider rows."""

import torch
import torch.nn.functional as F

from ..operation import Operation, compiled, leaf
from ..rms_norm import rms_norm, rms_norm_reference


def _inputs(rows: int, width: int):
    return lambda dtype: (leaf(rows, width, dtype=dtype), leaf(width, dtype=dtype))


def _latent(dtype: torch.dtype) -> tuple:
    """[batch, tokens, latent] cut out of [latent, rope key]."""
    return torch.randn(2, 5, 40, dtype=dtype)[..., :24].requires_grad_(), leaf(24, dtype=dtype)


OPERATION = Operation(
    "rms_norm", rms_norm, rms_norm_reference, options={"eps": 1e-6},
    cases={"one row": _inputs(1, 8), "7 x 24": _inputs(7, 24), "33 x 40": _inputs(33, 40), "129 x 16": _inputs(129, 16),
           "latent": _latent},
    shapes={"8192 x 7168": lambda: _inputs(8192, 7168)(torch.bfloat16)},
    peers={"F.rms_norm": lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps),
           "compiled definition": compiled(rms_norm_reference)},
    times_backward=True)
