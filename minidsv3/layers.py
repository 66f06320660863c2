"""The two small modules that every part of the model uses: a matrix without bias, and RMSNorm."""

import torch
from torch import Tensor, nn

from .kernels import linear, rms_norm
from .weight_gradients import Deferrable, DeferredLinear


class Linear(Deferrable, nn.Linear):
    """x W^T with weight [out, in]; nothing in this model has a bias. See `kernels/contract.py`."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight) if self.store is None else DeferredLinear.apply(x, self.weight, self.store)

    def matrix(self) -> Tensor:
        """What multiplies, [out, in], for who takes the product in another order."""
        return self.weight


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension; see `kernels/rms_norm.py`."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
