"""One list of all operations: the tests compare values and gradients from it, a benchmark and the course read it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cross_entropy import cross_entropy, cross_entropy_reference, linear_cross_entropy, linear_cross_entropy_reference
from .rms_norm import rms_norm, rms_norm_reference
from .rope import rope, rope_reference
from .route import route, route_reference
from .swiglu import swiglu, swiglu_reference


@dataclass(frozen=True)
class Operation:
    """An operation with its definition, inputs to try it on, and what it costs at the least."""

    name: str
    function: Callable                   # what the model calls
    reference: Callable                  # the definition
    inputs: Callable[..., tuple]         # (rows, width, dtype) -> positional arguments; float inputs carry gradients
    bytes_moved: Callable[..., int]      # (rows, width, bytes a value) -> read + written, forward, nothing twice
    options: dict                        # keyword arguments


def _leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def _rope_inputs(rows: int, width: int, dtype: torch.dtype) -> tuple:
    angles = torch.randn(1, rows, width // 2, dtype=torch.promote_types(dtype, torch.float32))
    return _leaf(2, rows, 3, width, dtype=dtype), angles.cos(), angles.sin()


def _route_inputs(rows: int, width: int, dtype: torch.dtype) -> tuple:
    """`width` experts in 4 groups, biases of both signs and a pair of exact ties in every row."""
    wider = torch.promote_types(dtype, torch.float32)
    logits = torch.randn(rows, width, dtype=wider)
    logits[:, 1] = logits[:, 0]
    bias = torch.randn(width, dtype=wider)
    bias[1] = bias[0]
    return logits.requires_grad_(), bias


OPERATIONS = {operation.name: operation for operation in (
    Operation("rms_norm", rms_norm, rms_norm_reference,
              lambda n, d, dtype: (_leaf(n, d, dtype=dtype), _leaf(d, dtype=dtype)),
              lambda n, d, size: size * (2 * n * d + d), {"eps": 1e-6}),
    Operation("rope", rope, rope_reference, _rope_inputs, lambda n, d, size: size * 12 * n * d + 4 * n * d, {}),
    Operation("swiglu", swiglu, swiglu_reference,
              lambda n, d, dtype: (_leaf(n, d, dtype=dtype), _leaf(n, d, dtype=dtype)),
              lambda n, d, size: size * 3 * n * d, {}),
    Operation("route", route, route_reference, _route_inputs, lambda n, d, size: 4 * n * d + 12 * n * 4,
              {"n_group": 4, "topk_group": 2, "top_k": 4, "scaling_factor": 2.5}),
    Operation("cross_entropy", cross_entropy, cross_entropy_reference,
              lambda n, v, dtype: (_leaf(n, v, dtype=dtype), torch.randint(0, v, (n,))),
              lambda n, v, size: size * n * v + 12 * n, {}),
    Operation("linear_cross_entropy", linear_cross_entropy, linear_cross_entropy_reference,
              lambda n, v, dtype: (_leaf(n, 24, dtype=dtype), _leaf(v, 24, dtype=dtype),
                                   torch.randint(0, v, (n,)), torch.rand(n)),
              lambda n, v, size: size * 24 * (n + v) + 12 * n, {}),
)}
