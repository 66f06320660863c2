"""Rotation of queries (many heads) and of the shared key (one head)."""

import torch

from ..operation import Operation, compiled, leaf
from ..rope import rope, rope_reference


def _inputs(batch: int, tokens: int, heads: int, width: int, tables: int = 1, nope: int = 0):
    def build(dtype: torch.dtype) -> tuple:
        angles = torch.randn(tables, tokens, width // 2, dtype=torch.promote_types(dtype, torch.float32))
        return leaf(batch, tokens, heads, nope + width, dtype=dtype), angles.cos(), angles.sin(), nope
    return build


def _key_behind_the_latent(dtype: torch.dtype) -> tuple:
    x, cos, sin, nope = _inputs(2, 5, 1, 8)(dtype)
    return torch.randn(2, 5, 1, 24, dtype=dtype)[..., 16:].requires_grad_(), cos, sin, nope


OPERATION = Operation(
    "rope", rope, rope_reference,
    cases={"one token": _inputs(2, 1, 3, 8), "7 tokens": _inputs(2, 7, 3, 24), "33 tokens": _inputs(2, 33, 3, 40),
           "one head": _inputs(3, 5, 1, 16), "channels without position": _inputs(2, 5, 3, 8, nope=12),
           "behind the latent": _key_behind_the_latent, "positions of their own": _inputs(2, 5, 3, 8, tables=2)},
    shapes={"4096 x 128 x 64": lambda: _inputs(1, 4096, 128, 64)(torch.bfloat16),
            "4096 x 128 x (128 + 64)": lambda: _inputs(1, 4096, 128, 64, nope=128)(torch.bfloat16)},
    peers={"compiled definition": compiled(rope_reference)}, times_backward=True)
