"""Buffers with guard bytes before and behind: a kernel that writes outside of one is caught, on a CPU too."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from unittest import mock

import torch
from torch import Tensor

GUARD, PATTERN = 256, 0x7B          # bytes on each side (a multiple of every alignment asked for), and what they hold


class Guards:
    """Allocates tensors between guard bytes and looks at those bytes at the end."""

    def __init__(self):
        self.buffers: list[Tensor] = []

    def around(self, values: Tensor) -> Tensor:
        """A guarded copy of `values` with the same strides."""
        last = sum((size - 1) * stride for size, stride in zip(values.shape, values.stride()))
        span = last + 1 if values.numel() else 0
        copy = self.flat(span, values.dtype, values.device).as_strided(values.shape, values.stride())
        with torch.no_grad():
            copy.copy_(values)
        return copy.requires_grad_(values.requires_grad)

    def flat(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`count` values, full of the pattern as the guards are: whoever reads what nobody wrote gets nonsense."""
        size = count * dtype.itemsize
        buffer = REAL_EMPTY(size + 2 * GUARD, dtype=torch.uint8, device=device).fill_(PATTERN)
        self.buffers.append(buffer)
        return buffer[GUARD:GUARD + size].view(dtype)

    def empty(self, *shape, dtype: torch.dtype | None = None, device: torch.device | str | None = None, **_) -> Tensor:
        """Stands in for `torch.empty`."""
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        where = torch.device(device or torch.get_default_device())
        return self.flat(prod(shape), dtype or torch.get_default_dtype(), where).view(*shape)

    def broken(self) -> int:
        """Guard bytes that were overwritten."""
        sides = (side for buffer in self.buffers for side in (buffer[:GUARD], buffer[-GUARD:]))
        return sum(int((side != PATTERN).sum()) for side in sides)


REAL_EMPTY = torch.empty


@contextmanager
def guarded() -> Iterator[Guards]:
    """Within, `torch.empty`, `empty_like`, `zeros` and `zeros_like` give guarded tensors; at the end all are looked
    at."""
    guards = Guards()

    def like(x: Tensor, dtype: torch.dtype | None = None, **_) -> Tensor:
        return guards.empty(x.shape, dtype=dtype or x.dtype, device=x.device)

    replacements = {"empty": guards.empty, "empty_like": like, "zeros": lambda *a, **k: guards.empty(*a, **k).zero_(),
                    "zeros_like": lambda *a, **k: like(*a, **k).zero_()}
    with mock.patch.multiple(torch, **replacements):
        yield guards
    assert guards.broken() == 0, f"{guards.broken()} bytes outside of the buffers were overwritten"
