"""What "in FP32" means here: at least FP32, so that a model in FP64 is FP64 throughout (report section 3.3.1)."""

import torch


def wide(x: torch.Tensor) -> torch.Tensor:
    """`x` in float32, or in float64 if it already is; the dtype in which norms, router and softmax compute."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
