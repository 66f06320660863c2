"""The activation at the widths of dense layers and experts."""

import torch

from ..operation import Operation, compiled, leaf
from ..swiglu import swiglu, swiglu_reference


def _inputs(rows: int, width: int):
    return lambda dtype: (leaf(rows, width, dtype=dtype), leaf(rows, width, dtype=dtype))


OPERATION = Operation(
    "swiglu", swiglu, swiglu_reference,
    cases={"one row": _inputs(1, 8), "7 x 24": _inputs(7, 24), "33 x 40": _inputs(33, 40), "129 x 16": _inputs(129, 16)},
    shapes={"32768 x 2048": lambda: _inputs(32768, 2048)(torch.bfloat16)},
    peers={"compiled definition": compiled(swiglu_reference)}, times_backward=True, has_kernel=False)
