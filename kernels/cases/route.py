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
    "route", route, route_reference,
    options={"n_group": 4, "topk_group": 2, "top_k": 4, "scaling_factor": 2.5},
    cases={"one token": _inputs(1, 8), "7 x 24": _inputs(7, 24), "33 x 40": _inputs(33, 40), "129 x 16": _inputs(129, 16)},
    shapes={"65536 x 256": lambda: _inputs(65536, 256)(torch.float32)},
    peers={"compiled definition": compiled(route_reference)})
