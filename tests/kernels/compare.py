"""How an operation is compared with its definition: values and gradients, of tensors, tuples and routings alike."""

import torch
from torch import Tensor

from minidsv3.kernels.operation import Operation


def outputs(result) -> list[Tensor]:
    """The tensors of a result."""
    return [result] if isinstance(result, Tensor) else [part for part in result if part is not None]


def inputs_on(operation: Operation, case: str, dtype: torch.dtype, device: str) -> tuple:
    with torch.device(device):
        return operation.cases[case](dtype)


def fresh(inputs: tuple) -> tuple:
    """Copies with the same strides: an operation may use up its inputs in backward."""
    return tuple(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x.detach())
                 .requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs)


def values_and_gradients(operation: Operation, function, inputs: tuple) -> list[Tensor]:
    """Results, then the gradients of all inputs that require one, against one fixed random cotangent."""
    results = outputs(function(*inputs, **operation.options))
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    through = [y for y in results if y.requires_grad]
    if not (leaves and through):
        return [y.detach() for y in results]
    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randn(y.shape, generator=generator).to(y) for y in through]
    gradients = torch.autograd.grad(through, leaves, slopes)
    return [*(y.detach() for y in results), *gradients]


def assert_alike(ours: list[Tensor], theirs: list[Tensor], tolerance: float) -> None:
    """Floats within `tolerance` of the largest value; integers and FP8 codes exactly; NaN where NaN is."""
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        if not mine.dtype.is_floating_point or mine.dtype.itemsize == 1:
            assert torch.equal(mine.to(torch.float64).nan_to_num(1e9), other.to(torch.float64).nan_to_num(1e9))
        elif mine.numel():
            assert torch.equal(mine.isnan(), other.isnan())
            mine, other = mine.double().nan_to_num(), other.double().nan_to_num()
            assert (mine - other).abs().max() <= tolerance * other.abs().max()
