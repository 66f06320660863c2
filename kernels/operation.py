"""What is known of an operation beside its code: inputs to try it on, sizes to time it at, and who else computes it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, wraps

import torch

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}    # of the largest value


@dataclass(frozen=True)
class Operation:
    """One entry of the registry. Builders of inputs make tensors on torch's default device, so that tests on a CPU and
    on a GPU and the benchmark share them; floats that `requires_grad` take part in the comparison of gradients."""

    name: str
    function: Callable                                   # what the model calls
    reference: Callable                                  # the definition
    cases: dict[str, Callable[[torch.dtype], tuple]]     # small and odd inputs: what tests compare on
    options: dict = field(default_factory=dict)          # keyword arguments of both
    dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCE)   # the definition's; a kernel takes those up to 32 bits
    tolerance: dict[torch.dtype, float] = field(default_factory=lambda: TOLERANCE)
    shapes: dict[str, Callable[[], tuple]] = field(default_factory=dict)   # sizes of the full model: what is timed
    peers: dict[str, Callable] = field(default_factory=dict)               # who else computes it, of the same inputs
    flops: Callable[..., float] | None = None            # of inputs; None: bytes bound it
    backward_flops: float = 2.0                          # times the forward's: each product has two gradients
    times_backward: bool = False                         # forward and backward are timed together as well


def leaf(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal random numbers that take part in the comparison of gradients."""
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def compiled(function: Callable) -> Callable:
    """`function` through torch.compile, as a peer; the compiler is imported with the first call."""
    program = lru_cache(lambda: torch.compile(function))
    return wraps(function)(lambda *inputs, **options: program()(*inputs, **options))
