"""Makes Triton's CPU interpreter round as a GPU does.

The stock interpreter (3.6 to 3.9) casts narrow floats wrongly: FP32 -> E4M3 loses a carry out of the mantissa
(125.3 becomes 64) and does not saturate, FP32 -> BF16 truncates, BF16 arithmetic works on the raw bits. Here every
cast goes through torch, rounds to nearest even and saturates, as the instruction `cvt.rn.satfinite` does; BF16
operands are computed in FP32 and rounded; `tl.fma` rounds once. `tests/kernels/test_interpreter.py` compares all
codes and a fine grid.
"""

import numpy as np
import torch
from torch import Tensor


def install() -> None:
    """Replaces the interpreter's casts, BF16 arithmetic, narrow products and fma, once for the process."""
    import triton.language as tl
    import triton.runtime.interpreter as stock

    if stock._convert_float.__module__ == __name__:
        return
    torch_type = {tl.float64: torch.float64, tl.float32: torch.float32, tl.float16: torch.float16,
                  tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    narrow = (tl.bfloat16, tl.float8e4nv, tl.float8e5)
    builder, handle, numpy_type = stock.InterpreterBuilder, stock.TensorHandle, stock._get_np_dtype
    stock_float, stock_cast = stock._convert_float, builder.cast_impl
    stock_binary, stock_unary, stock_dot = builder.binary_op, builder.unary_op, builder.create_dot

    def convert(values: np.ndarray, source, target, rounding=None) -> np.ndarray:
        """The bits of `values` in `target`, as unsigned integers, as the interpreter holds them."""
        if source not in torch_type or target not in torch_type:
            return stock_float(values, source, target, rounding)
        rounded = round_to(from_bits(values, torch_type[source]), torch_type[target])
        return to_bits(rounded).view(f"uint{target.primitive_bitwidth}")

    def float32(value) -> np.ndarray:
        return convert(value.data, value.dtype.scalar, tl.float32).view(np.float32)

    def narrowed(values: np.ndarray, target):
        return handle(convert(values.astype(np.float32), tl.float32, target).view(numpy_type(target)), target)

    def cast_impl(self, value, target):
        source, target = value.dtype.scalar, target.scalar
        if source in torch_type and target in torch_type and source != target:
            return handle(convert(value.data, source, target).view(numpy_type(target)), target)
        if source == tl.bfloat16 and not target.is_floating():
            return handle(float32(value).astype(numpy_type(target)), target)
        if target == tl.bfloat16 and not source.is_floating():
            return narrowed(value.data, target)
        return stock_cast(self, value, target)

    def binary_op(self, left, right, function):
        if left.dtype.scalar != tl.bfloat16 or function in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
            return stock_binary(self, left, right, function)
        result = function(float32(left), float32(right))
        return handle(result, tl.int1) if result.dtype == np.bool_ else narrowed(result, tl.bfloat16)

    def unary_op(self, value, function):
        if value.dtype.scalar != tl.bfloat16:
            return stock_unary(self, value, function)
        return narrowed(function(float32(value)), tl.bfloat16)

    def create_dot(self, left, right, total, *precision):
        if left.dtype.scalar not in narrow and right.dtype.scalar not in narrow:
            return stock_dot(self, left, right, total, *precision)
        product = np.matmul(float32(left), float32(right))
        return handle((product + total.data).astype(total.data.dtype), total.dtype.scalar)

    def create_fma(self, x, y, z):
        """Rounds once, as the instruction does: the product of two FP32 values is exact in FP64."""
        total = x.data.astype(np.float64) * y.data + z.data
        return handle(total.astype(z.data.dtype), z.dtype.scalar)

    stock._convert_float = convert
    builder.cast_impl, builder.binary_op = cast_impl, binary_op
    builder.unary_op, builder.create_dot, builder.create_fma = unary_op, create_dot, create_fma


def round_to(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in `dtype`, rounded to nearest even; FP8 saturates at its largest finite value and keeps NaN."""
    if dtype.itemsize == 1 and values.dtype.itemsize > 1:
        largest, values = torch.finfo(dtype).max, values.float()
        values = torch.where(values.isnan(), values, values.clamp(-largest, largest))
    return values.to(dtype)


def from_bits(bits: np.ndarray, dtype: torch.dtype) -> Tensor:
    raw = np.ascontiguousarray(bits).reshape(-1).view(np.uint8)
    return torch.from_numpy(raw.copy()).view(dtype).reshape(bits.shape)


def to_bits(values: Tensor) -> np.ndarray:
    raw = values.contiguous().view(-1).view(torch.uint8).numpy()
    return raw.view(f"uint{8 * values.dtype.itemsize}").reshape(tuple(values.shape))
