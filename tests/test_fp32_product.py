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
    monkeypatch.setattr(fp32_product, "splits", lambda u, *others: u.dtype == torch.bfloat16)
    u, weight, slope = (torch.randn(size, device=DEVICE) * torch.randn(size[0], 1, device=DEVICE).exp()
                        for size in ((40, 96), (16, 96), (40, 16)))
    return u.bfloat16(), weight, slope


def worst(found: torch.Tensor, right: torch.Tensor, scale: torch.Tensor) -> float:
    """The largest error, in units of the sum of magnitudes that a sum is made of."""
    return ((found.double() - right).abs() / scale).max().item()


def errors(u, weight, slope) -> list[float]:
    u64, w64, s64 = u.double(), weight.double(), slope.double()
    found = logits(u, weight), weight_gradient(slope, u), input_gradient(slope, weight, torch.bfloat16)
    right = (u64, w64.T), (s64.T, u64), (s64, w64)
    return [worst(got, a @ b, a.abs() @ b.abs()) for got, (a, b) in zip(found, right)]


def test_products_are_as_exact_as_fp32(operands):
    of_logits, of_weight, of_input = errors(*operands)
    assert of_logits < 2**-21 and of_weight < 2**-21
    assert of_input < 2**-8 + 2**-20, "rounded to BF16, once"


def test_a_missing_third_is_seen(monkeypatch, operands):
    monkeypatch.setattr(fp32_product, "thirds", lambda x: [*thirds(x)[:2], torch.zeros_like(x).bfloat16()])
    assert max(errors(*operands)[:2]) > 2**-21


def test_other_dtypes_are_plain_products():
    u, weight, slope = (torch.randn(size, dtype=torch.float64, device=DEVICE) for size in ((5, 8), (3, 8), (5, 3)))
    assert torch.equal(logits(u, weight), u @ weight.T)
    assert torch.equal(weight_gradient(slope, u), slope.T @ u)
    assert torch.equal(input_gradient(slope, weight, torch.float64), slope @ weight)
