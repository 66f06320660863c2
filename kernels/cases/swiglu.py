"""The activation at the widths of dense layers and experts; gate and up as two tensors and as halves of one."""

import torch

from ..operation import Operation, compiled, leaf
from ..swiglu import swiglu, swiglu_reference


def _inputs(rows: int, width: int):
    return lambda dtype: (leaf(rows, width, dtype=dtype), leaf(rows, width, dtype=dtype))


def _halves(*shape: int):
    """Two views of one tensor [..., 2 width]."""
    def build(dtype: torch.dtype) -> tuple:
        gate, up = torch.randn(*shape, dtype=dtype).chunk(2, -1)
        return gate.requires_grad_(), up.requires_grad_()
    return build


def _transposed(dtype: torch.dtype) -> tuple:
    return torch.randn(24, 7, dtype=dtype).T.requires_grad_(), leaf(7, 24, dtype=dtype)


def _steep(dtype: torch.dtype) -> tuple:
    """Where exp(-gate) is 0 or as large as FP32 holds."""
    gate = torch.tensor([[-80.0, -20.0, -0.0, 0.0, 20.0, 80.0, 100.0]], dtype=dtype)
    return gate.requires_grad_(), leaf(1, 7, dtype=dtype)


OPERATION = Operation(
    "swiglu", swiglu, swiglu_reference,
    cases={"one row": _inputs(1, 8), "7 x 24": _inputs(7, 24), "33 x 40": _inputs(33, 40), "129 x 16": _inputs(129, 16),
           "halves": _halves(2, 5, 48), "wide": _halves(3, 2200), "transposed": _transposed, "steep": _steep,
           "no rows": _inputs(0, 8)},
    shapes={"32768 x 2048": lambda: _halves(32768, 4096)(torch.bfloat16)},
    peers={"compiled definition": compiled(swiglu_reference), "eager definition": swiglu_reference},
    times_backward=True)
