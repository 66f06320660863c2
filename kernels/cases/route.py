"""Choices among experts, with biases of both signs and exact ties."""

import torch

from ..operation import Operation, compiled
from ..route import route, route_reference


def _inputs(tokens: int, experts: int):
    """A pair of exact ties in every row."""
    def build(dtype: torch.dtype) -> tuple:
        wider = torch.promote_types(dtype, torch.float32)
        logits = torch.randn(tokens, experts, dtype=wider)
        logits[:, 1] = logits[:, 0]
        bias = torch.randn(experts, dtype=wider)
        bias[1] = bias[0]
        return logits.requires_grad_(), bias
    return build


OPERATION = Operation(
    "route", route, route_reference, options={"n_group": 8, "topk_group": 4, "top_k": 8, "scaling_factor": 2.5},
    cases={"one token": _inputs(1, 32), "7 x 64": _inputs(7, 64), "33 x 24": _inputs(33, 24),
           "3 x 256": _inputs(3, 256), "5 x 40": _inputs(5, 40), "no token": _inputs(0, 32)},
    shapes={"65536 x 256": lambda: _inputs(65536, 256)(torch.float32),
            "16384 x 64": lambda: _inputs(16384, 64)(torch.float32)},
    peers={"compiled definition": compiled(route_reference)}, times_backward=True)
