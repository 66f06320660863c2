"""SwiGLU: silu(gate) * up, the activation of every FFN and expert.

Gate, up and down are w1, w3 and w2 in the released code.
"""

import torch
import torch.nn.functional as F


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The definition. gate and up [..., width] of one dtype; returns that shape and dtype."""
    return F.silu(gate) * up


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`swiglu_reference`; raises ValueError if gate and up differ in shape or dtype."""
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"swiglu got gate {list(gate.shape)} {gate.dtype} and up {list(up.shape)} {up.dtype}; "
                         "they must be alike")
    return swiglu_reference(gate, up)
