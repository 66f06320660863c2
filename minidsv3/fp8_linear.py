"""The linear layer in FP8: three products, and an input that waits for the third as one byte a value or not at all.

The weight gradient needs x in tiles along tokens (fp8_products.py). Where they come from:

    x is a norm's output       made again from the norm's input, which is in memory anyway (recompute.py)
    any other x                quantised along tokens in the forward pass, while x is at hand: one byte a value, and one
                               rounding in place of two

Master weights and their gradients are FP32. A weight is quantised once an optimiser's step, not once a micro-batch; its
codes, for Fprop and turned for Dgrad, are two bytes a parameter.
"""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from .fp8_products import Operand, Products, WeightOperands
from .kernels import rms_norm
from .layers import Linear
from .recompute import Normed
from .weight_gradients import Deferrable, added


class FP8Linear(Linear):
    """x W^T in FP8: x [.., in], any float tensor or a `Normed`, -> [.., out] in BF16. `fp8.to_fp8` makes one of a
    Linear, and sets `codes`."""

    codes: "WeightCodes"
    pow2: bool = False      # whether x has power-of-two scales

    def forward(self, x: Tensor | Normed) -> Tensor:
        return linears(x, self)[0]

    def matrix(self) -> Tensor:
        """What the weight's codes stand for, in FP32."""
        products = self.codes.products
        return products.weight_values(self.codes(self.weight).straight)[:self.out_features, :self.in_features]


class WeightCodes:
    """The operands of `weight` for Fprop and Dgrad, made anew when it has changed.

    A change in place counts up a tensor's version, and a fused optimiser's is counted here (`count_step`). FSDP puts
    other parameters into a module and refills them uncounted: those are quantised each time that they are asked for.
    """

    def __init__(self, products: Products, weight: Tensor):
        self.products, self._weight = products, weakref.ref(weight)
        self._state, self._operands = None, None

    def __call__(self, weight: Tensor) -> WeightOperands:
        if weight is not self._weight():
            return self.products.weight(weight)
        state = weight._version, weight.untyped_storage()._cdata        # the latter for `weight.data = other`
        if self._state != state:
            self._operands = None       # the old codes make room for the new ones
            self._state, self._operands = state, self.products.weight(weight)
        return self._operands


def count_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Counts an optimiser's step as a change: torch's fused kernels write to weights and leave their versions alone."""
    torch.autograd.graph.increment_version([weight for group in optimizer.param_groups for weight in group["params"]])


register_optimizer_step_post_hook(count_step)


def linears(x: Tensor | Normed, *matrices: FP8Linear) -> tuple[Tensor, ...]:
    """Several matrices behind one input, which is quantised once for all: x [.., in] -> [.., out] of each, in BF16."""
    value, normed = (x.value, x) if isinstance(x, Normed) else (x, None)
    if torch.is_grad_enabled():
        return _Linears.apply(value, normed, matrices, *(matrix.weight for matrix in matrices))
    return fprop(value, matrices)


def fprop(x: Tensor, matrices: tuple[FP8Linear, ...]) -> tuple[Tensor, ...]:
    """The forward products alone, without a graph."""
    products, flat = matrices[0].codes.products, x.flatten(0, -2)
    tiles = products.tiles(flat, matrices[0].pow2)
    outputs = (products.multiply(tiles, matrix.codes(matrix.weight).straight) for matrix in matrices)
    return tuple(y[:len(flat), :matrix.out_features].unflatten(0, x.shape[:-1]) for y, matrix in zip(outputs, matrices))


class _Linears(torch.autograd.Function):
    """`fprop` with its two gradients; of x waits what `remembered` says."""

    @staticmethod
    def forward(ctx, x: Tensor, normed: Normed | None, matrices: tuple[FP8Linear, ...], *weights: Tensor) -> tuple:
        products = matrices[0].codes.products
        ctx.matrices = matrices
        saved, ctx.again = remembered(x, normed, lambda x: products.columns(x.flatten(0, -2), matrices[0].pow2))
        ctx.save_for_backward(*saved)
        return fprop(x, matrices)

    @staticmethod
    def backward(ctx, *slopes: Tensor) -> tuple:
        products, columns, shape = ctx.matrices[0].codes.products, ctx.again(ctx.saved_tensors), slopes[0].shape[:-1]
        parts, gradients = [], []
        for matrix, slope in zip(ctx.matrices, slopes):
            tiles, slope_columns = products.slopes(slope.flatten(0, -2))
            parts.append(products.multiply(tiles, matrix.codes(matrix.weight).turned))
            gradients.append(weight_gradient(matrix, matrix.weight, products.weight_gradient, slope_columns, columns))
        dx = sum(parts[1:], start=parts[0])[:shape.numel(), :ctx.matrices[0].in_features]
        return dx.unflatten(0, shape), None, None, *gradients


def remembered(x: Tensor, normed: Normed | None, make: Callable[[Tensor], Operand]
               ) -> tuple[Iterable[Tensor], Callable[[Iterable[Tensor]], Operand]]:
    """What to save so that `make(x)` can be had in the backward pass, and the function that makes it of what was
    saved: the operand itself, or the input of the norm that x came from."""
    if normed is None:
        return make(x), Operand._make
    eps = normed.eps        # the closure must not hold on to the norm's output
    return (normed.source, normed.gain), lambda saved: make(rms_norm(*saved, eps))


def weight_gradient(module: Deferrable, weight: Tensor, multiply: Callable[..., Tensor], *operands) -> Tensor | None:
    """dW = multiply(*operands), in the weight's dtype; or None, if it waits in the module's store or is not wanted.

    The kernel adds to an FP32 gradient that is there already, unless the product is larger by padding.
    """
    def gradient(into: Tensor | None) -> Tensor:
        fits = not any(size % 16 for size in weight.shape[-2:])
        if into is not None and fits and into.dtype == torch.float32 and into.is_contiguous():
            return multiply(*operands, into=into)
        product = multiply(*operands)[..., :weight.shape[-2], :weight.shape[-1]]
        return added(product.contiguous(), into, weight)

    if not weight.requires_grad:
        return None
    if module.store is None:
        return gradient(None)
    module.store.put(weight, gradient)
