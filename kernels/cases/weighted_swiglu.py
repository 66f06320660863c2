"""The experts' activation over rows sorted by expert."""

import torch

from ..operation import Operation, compiled, leaf
from ..weighted_swiglu import weighted_swiglu, weighted_swiglu_reference


def _inputs(rows: int, width: int):
    return lambda dtype: (leaf(rows, 2 * width, dtype=dtype),
                          torch.rand(rows, dtype=torch.promote_types(dtype, torch.float32)).requires_grad_())


OPERATION = Operation(
    "weighted_swiglu", weighted_swiglu, weighted_swiglu_reference,
    cases={"one row": _inputs(1, 8), "7 x 24": _inputs(7, 24), "33 x 40": _inputs(33, 40), "no row": _inputs(0, 8),
           "129 x 16": _inputs(129, 16)},
    shapes={"32768 x 2048": lambda: _inputs(32768, 2048)(torch.bfloat16),
            "131072 x 512": lambda: _inputs(131072, 512)(torch.bfloat16)},
    peers={"compiled definition": compiled(weighted_swiglu_reference)}, times_backward=True)
