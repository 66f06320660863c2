"""FP32 products out of BF16 ones: what is split adds up again, and the sums are as exact as FP32's own."""

import pytest
import torch

from minidsv3 import fp32_product
from minidsv3.fp32_product import input_gradient, logits, thirds, weight_gradient

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_three_numbers_of_bf16_are_one_of_fp32():
    x = torch.randn(4096) * torch.exp2(torch.randint(-60, 60, (4096,)))
    x[:3] = torch.tensor([1 + 2.0**-23, 0.0, -(2.0 - 2.0**-23)])
    a, b, c = thirds(x)
    assert a.dtype == b.dtype == c.dtype == torch.bfloat16
    assert torch.equal(a.double() + b.double() + c.double(), x.double())
    assert not torch.equal(a.double() + b.double(), x.double())


@pytest.fixture
def operands(monkeypatch) -> tuple[torch.Tensor, ...]:
    """u, weight and slope of unlike rows, split on a CPU too."""
    monkeypatch.setattr(fp32_product, "splits", lambda dtype, *others: True)
    u, weight, slope = (torch.randn(size, device=DEVICE) * torch.randn(size[0], 1, device=DEVICE).exp()
                        for size in ((40, 96), (16, 96), (40, 16)))
    return u.bfloat16(), weight, slope


def worst(found: torch.Tensor, right: torch.Tensor, scale: torch.Tensor) -> float:
    """The largest error, in units of the sum of magnitudes that a sum is made of."""
    return ((found.double() - right).abs() / scale).max().item()


def errors(u, weight, slope, dtype: torch.dtype = torch.float32) -> list[float]:
    """Of logits, of the weight's gradient and of u's, this one in `dtype`."""
    u64, w64, s64 = u.double(), weight.double(), slope.double()
    found = logits(u, weight), weight_gradient(slope, u), input_gradient(slope, weight, dtype)
    right = (u64, w64.T), (s64.T, u64), (s64, w64)
    return [worst(got, a @ b, a.abs() @ b.abs()) for got, (a, b) in zip(found, right)]


BOUNDS = 2**-21, 2**-21, 2**-19         # the last sum is six times as long


def test_products_are_as_exact_as_fp32(operands):
    assert all(error < bound for error, bound in zip(errors(*operands), BOUNDS))


def test_the_input_s_gradient_is_rounded_to_bf16_once(operands):
    assert 2**-10 < errors(*operands, torch.bfloat16)[2] < 2**-8 + BOUNDS[2]


def test_a_missing_third_is_seen(monkeypatch, operands):
    monkeypatch.setattr(fp32_product, "thirds", lambda x: [*thirds(x)[:2], torch.zeros_like(x).bfloat16()])
    assert all(error > bound for error, bound in zip(errors(*operands), BOUNDS))


def test_other_dtypes_are_plain_products():
    u, weight, slope = (torch.randn(size, dtype=torch.float64, device=DEVICE) for size in ((5, 8), (3, 8), (5, 3)))
    assert torch.equal(logits(u, weight), u @ weight.T)
    assert torch.equal(weight_gradient(slope, u), slope.T @ u)
    assert torch.equal(input_gradient(slope, weight, torch.float64), slope @ weight)
