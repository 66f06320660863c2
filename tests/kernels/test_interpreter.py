"""The repaired interpreter rounds as torch does: all codes, a fine grid, and BF16 arithmetic."""

import pytest
import torch

from minidsv3.kernels.backend import INTERPRETED, tl, triton

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="a GPU is here: kernels are not interpreted")
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16)


@triton.jit
def _cast(X, Y, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + at, tl.load(X + at, mask=at < N).to(Y.dtype.element_ty), mask=at < N)


@triton.jit
def _arithmetic(X, Y, OUT, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, y = tl.load(X + at), tl.load(Y + at)
    tl.store(OUT + at, tl.where(x < y, x + y, x * y))


@triton.jit
def _product(X, Y, OUT, N: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(OUT + at, tl.dot(tl.load(X + at), tl.load(Y + at)))


@triton.jit
def _remainder(X, Y, Q, OUT, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.fma(-tl.load(Q + at), tl.load(Y + at), tl.load(X + at)))


def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(values.shape, dtype=dtype)
    _cast[(triton.cdiv(len(values), 65536),)](values, out, len(values), 65536)
    return out


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(ours.float().nan_to_num(1e30), theirs.float().nan_to_num(1e30))


def saturated(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    largest = torch.finfo(dtype).max
    return torch.where(values.isnan(), values, values.clamp(-largest, largest)).to(dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_all_codes_widen_as_in_torch(dtype):
    codes = torch.arange(256 ** dtype.itemsize, dtype=torch.int32)
    values = codes.to(torch.uint8 if dtype.itemsize == 1 else torch.uint16).view(dtype)
    assert same(cast(values, torch.float32), values.float())


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", NARROW[:2], ids=str)
def test_a_fine_grid_rounds_to_nearest_even_and_saturates(dtype, source):
    magnitudes = torch.cat((torch.logspace(-30, 17, 30_000, base=2), torch.arange(1, 4097) / 1024, torch.arange(600.0)))
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 125.3, 31.9, 448, 464, 480, 500])
    values = torch.cat((magnitudes, -magnitudes, special)).to(source)
    assert same(cast(values, dtype), saturated(values.float(), dtype))


def test_float32_rounds_to_the_nearest_bfloat16():
    values = torch.cat((torch.randn(50_000) * 50, torch.tensor([float("inf"), float("nan"), 1.00390625, 1.01171875])))
    assert same(cast(values, torch.bfloat16), values.bfloat16())


def test_bfloat16_is_computed_in_float32_and_rounded():
    x, y = torch.randn(2, 256).bfloat16()
    out = torch.empty_like(x)
    _arithmetic[(1,)](x, y, out, 256)
    assert torch.equal(out, torch.where(x < y, x + y, x * y))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_narrow_products_are_those_of_the_values(dtype):
    x, y = torch.randn(2, 16, 16).to(dtype)
    out = torch.empty(16, 16)
    _product[(1,)](x, y, out, 16)
    assert torch.allclose(out, x.float() @ y.float(), atol=1e-4)


def test_a_fused_product_and_sum_rounds_once():
    """What a division leaves over is far smaller than the rounding of q y alone would be."""
    x, y = torch.rand(2, 256) + 0.5
    q, out = x / y, torch.empty(256)
    _remainder[(1,)](x, y, q, out, 256)
    assert torch.equal(out.double(), x.double() - q.double() * y.double())
