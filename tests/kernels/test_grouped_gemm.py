"""BF16 products of experts: nothing of a neighbour is used, faults are seen, and what is refused."""

import pytest
import torch

from compare import assert_alike
from minidsv3.kernels import grouped_gemm, grouped_gemm_reference, use_kernels
from minidsv3.kernels.backend import INTERPRETED
from minidsv3.kernels.cases.fp8_grouped_gemm import _ends
from minidsv3.kernels.operation import TOLERANCE
from test_operations import DEVICE

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
BF16 = torch.bfloat16
ENDS = (5, 5, 140)


@pytest.fixture(autouse=True)
def on_the_device():
    torch.manual_seed(0)
    with torch.device(DEVICE), use_kernels("triton"):
        yield


def inputs(dtype: torch.dtype = BF16) -> tuple:
    return torch.randn(150, 72, dtype=dtype), torch.randn(3, 24, 72, dtype=dtype), _ends(*ENDS)


def gradients(function, x, weight, ends, slope) -> list[torch.Tensor]:
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = function(x, weight, ends)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), slope)]


def test_a_neighbour_s_nan_stays_with_the_neighbour():
    """Tiles reach into the next expert's rows, and TMA reads them."""
    x, weight, ends = inputs()
    x[:5], weight[:2], slope = float("nan"), float("nan"), torch.randn(150, 24, dtype=BF16)
    slope[:5], slope[140:], x[140:] = float("nan"), float("nan"), float("nan")
    y, dx, dw = gradients(grouped_gemm, x, weight, ends, slope)
    assert y[5:].isfinite().all() and dx[5:].isfinite().all() and dw[1:].isfinite().all()
    assert y[:5].isnan().all() and dx[:5].isnan().all() and dw[0].isnan().all()
    assert not y[140:].any() and not dx[140:].any() and not dw[1].any()


WRONG = {
    "the neighbour's weights": lambda x, w, ends: grouped_gemm_reference(x, w.roll(1, 0), ends),
    "an expert that starts late": lambda x, w, ends: grouped_gemm_reference(x, w, _ends(6, 6, 140)),
    "an expert that ends early": lambda x, w, ends: grouped_gemm_reference(x, w, _ends(5, 5, 139)),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_the_comparison_sees(wrong):
    case, slope = inputs(), torch.randn(150, 24, dtype=BF16)
    ours = gradients(grouped_gemm, *case, slope)
    for mine, right, off in zip(ours, gradients(grouped_gemm_reference, *case, slope), gradients(wrong, *case, slope)):
        assert_alike([mine], [right], TOLERANCE[BF16])
        with pytest.raises(AssertionError):
            assert_alike([mine], [off], TOLERANCE[BF16])


def test_only_what_is_asked_for_is_computed():
    x, weight, ends = inputs()
    y = grouped_gemm(x, weight.requires_grad_(), ends)
    y.sum().backward()
    assert x.grad is None and weight.grad.shape == weight.shape


def test_other_dtypes_are_left_to_the_definition():
    case = inputs(torch.float32)
    assert torch.equal(grouped_gemm(*case), grouped_gemm_reference(*case))


@pytest.mark.parametrize("sentence, change", [
    (r"x \[150, 64\] .*; it needs", lambda x, w, ends: (x[:, :64], w, ends)),
    (r"weight .* torch.float32; it needs", lambda x, w, ends: (x, w.float(), ends)),
    (r"weight \[24, 72\]", lambda x, w, ends: (x, w[0], ends)),
    (r"ends \[2\] torch.int32; it needs \[3\]", lambda x, w, ends: (x, w, ends[:2])),
    (r"ends \[3\] torch.int64", lambda x, w, ends: (x, w, ends.long())),
    (r"weight \[3, 20, 72\]; rows and columns must be multiples of 8", lambda x, w, ends: (x, w[:, :20], ends)),
])
def test_refuses(sentence, change):
    with pytest.raises(ValueError, match=sentence):
        grouped_gemm(*change(*inputs()))
