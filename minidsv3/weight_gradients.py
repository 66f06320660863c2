"""Weight gradients that can wait (section 3.2.1: the backward pass split into "for input" and "for weights").

The backward pass of y = x W^T is two products, and only one of them is urgent:

    dx = dy W          the layer below waits for it
    dW = dy^T x        nobody does, until the optimiser's step

A pipeline fills its bubbles with the second. `defer_weight_gradients(stage)` gives every matrix of `stage` a store;
then a backward pass computes dx alone and leaves dW as a closure:

    loss.backward()            # input gradients; each dW becomes an entry of the store
    later = store.take()       # the entries since the last `take`, oldest first
    later()                    # adds them to weight.grad

`take` is what torch's `PipelineStage(dw_builder=store.take)` wants. Splitting the graph from outside instead, as torch
does without a builder, runs the backward of a custom `autograd.Function` twice, once for dx and once for dW.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels.grouped_gemm import grouped_gemm_reference, grouped_gemm_wgrad_reference

Gradient = Callable[[Tensor | None], Tensor]   # dW, added to what it is given (None: nothing yet)


class WeightGradStore:
    """Closures that each add one weight's gradient, in the order of the backward pass."""

    def __init__(self):
        self._waiting: list[tuple[Tensor, Gradient]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, weight: Tensor, gradient: Gradient) -> None:
        """Leaves `weight.grad += gradient` for later. What the closure holds stays in memory until then."""
        self._waiting.append((weight, gradient))

    def take(self) -> Callable[[], None]:
        """Empties the store into one function that adds all its gradients; call it once."""
        taken, self._waiting = self._waiting, []

        @torch.no_grad()      # x is part of a graph: dy^T x would be one more, and hold every activation in weight.grad
        def run() -> None:
            while taken:
                weight, gradient = taken.pop(0)
                weight.grad = gradient(weight.grad)
        return run


class Deferrable(nn.Module):
    """A module with matrices whose gradients may wait: in `store`, if it has one."""

    store: WeightGradStore | None = None


def defer_weight_gradients(module: nn.Module) -> WeightGradStore:
    """Gives every matrix inside of `module` the same new store and returns it. Norms, routers, the embedding and the
    head keep their gradients in the backward pass: they are small or fused with the loss."""
    store = WeightGradStore()
    for part in module.modules():
        if isinstance(part, Deferrable):
            part.store = store
    return store


def added(gradient: Tensor, into: Tensor | None, weight: Tensor) -> Tensor:
    """`gradient` in the weight's dtype, added in place to what is there."""
    return gradient.to(weight.dtype) if into is None else into.add_(gradient)


class DeferredLinear(torch.autograd.Function):
    """x W^T whose backward gives dx and leaves dW in the store."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, store: WeightGradStore) -> Tensor:
        x = _autocast(x)
        ctx.save_for_backward(x)
        ctx.weight, ctx.store = weight, store
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple:
        (x,), weight = ctx.saved_tensors, ctx.weight
        ctx.store.put(weight, lambda into: added(slope.flatten(0, -2).T @ x.flatten(0, -2), into, weight))
        return slope @ weight.to(slope.dtype) if ctx.needs_input_grad[0] else None, None, None


class DeferredGrouped(torch.autograd.Function):
    """Each expert's rows [R, in] times its own matrix of weight [experts, out, in]; `ends` [experts] int32 says where
    each expert's rows end. Backward gives drows and leaves dW in the store."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, ends: Tensor, store: WeightGradStore) -> Tensor:
        ctx.save_for_backward(rows, ends)
        ctx.weight, ctx.store = weight, store
        return grouped_mm(rows, weight.to(rows.dtype).mT, ends)

    @staticmethod
    def backward(ctx, slope: Tensor) -> tuple:
        (rows, ends), weight = ctx.saved_tensors, ctx.weight
        ctx.store.put(weight, lambda into: added(grouped_mm(slope.mT, rows, ends), into, weight))
        drows = grouped_mm(slope, weight.to(slope.dtype), ends) if ctx.needs_input_grad[0] else None
        return drows, None, None, None


def grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """`F.grouped_mm`, and its definition where torch has none (float64): a [R, in] with b [experts, in, out], or
    a [out, R] with b [R, in] for [experts, out, in]."""
    if has_grouped_mm(a):
        return F.grouped_mm(a, b, offs=ends)
    return grouped_gemm_reference(a, b.mT, ends) if b.dim() == 3 else grouped_gemm_wgrad_reference(a.mT, b, ends)


def has_grouped_mm(x: Tensor) -> bool:
    """Whether torch has a grouped matmul for x's dtype and device: on CPUs not in float64, on GPUs only in bfloat16."""
    return x.dtype in (torch.float32, torch.bfloat16) if x.device.type == "cpu" else x.dtype is torch.bfloat16


def _autocast(x: Tensor) -> Tensor:
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
