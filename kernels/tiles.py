"""Tiles of a matrix, as the kernels read and write them: any strides on the way in, ragged edges both ways."""

from .backend import tl, triton


@triton.jit
def span(tile, SIZE: tl.constexpr):
    """The indices of a tile along one axis; in 64 bits, since rows * width can pass 2^31."""
    return tile.to(tl.int64) * SIZE + tl.arange(0, SIZE)


@triton.jit
def load_tile(X, x_row, x_column, row, column, rows, width):
    """X at `row` x `column` in FP32, with zeros outside of [rows, width]."""
    inside = (row < rows)[:, None] & (column < width)[None, :]
    return tl.load(X + row[:, None] * x_row + column[None, :] * x_column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store_tile(Y, y, row, column, rows, width):
    """y into the contiguous Y [rows, width], rounded to its dtype."""
    inside = (row < rows)[:, None] & (column < width)[None, :]
    tl.store(Y + row[:, None] * width + column[None, :], y.to(Y.dtype.element_ty), mask=inside)
