"""FP8 products of experts: what is behind the last expert, refusals, adding in place, and faults that must be seen."""

import pytest
import torch

from compare import assert_alike
from minidsv3.kernels import (fp8_gemm_reference, fp8_grouped_gemm, fp8_grouped_gemm_reference, fp8_grouped_wgrad,
                              fp8_grouped_wgrad_reference, use_kernels)
from minidsv3.kernels.backend import INTERPRETED
from minidsv3.kernels.cases.fp8_gemm import TOLERANCE, codes, scales
from minidsv3.kernels.cases.fp8_grouped_gemm import _ends, _rows, _tokens
from test_operations import DEVICE

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
BF16, FP32 = torch.bfloat16, torch.float32
ENDS = (0, 128, 384, 384)


@pytest.fixture(autouse=True)
def on_the_device():
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


@pytest.fixture(params=["triton", "torch"])
def either(request):
    with use_kernels(request.param):
        yield


def test_each_row_meets_its_expert_and_none_behind_the_last(either):
    a, a_scales, b, b_scales, ends = _rows(ENDS, 560, 24, 144)
    out = fp8_grouped_gemm(a, a_scales, b, b_scales, ends)
    for row, expert in ((0, 1), (127, 1), (128, 2), (383, 2)):
        alone = fp8_gemm_reference(a[row:row + 1], a_scales[:, row:row + 1], b[expert], b_scales[expert])
        assert_alike([out[row:row + 1]], [alone], TOLERANCE[BF16])
    assert out.shape == (560, 24) and not out[384:].any()


def test_gradients_add_in_place_and_idle_experts_are_left_alone(either):
    inputs, start = _tokens(ENDS, 560, 40, 24), torch.randn(4, 40, 24)
    into = start.clone()
    assert fp8_grouped_wgrad(*inputs, into) is into
    products = fp8_grouped_wgrad_reference(*inputs)
    assert torch.equal(into[[0, 3]], start[[0, 3]]) and not products[[0, 3]].any()
    assert_alike([into], [start + products], TOLERANCE[FP32])
    with pytest.raises(AssertionError):
        assert_alike([into], [products], TOLERANCE[FP32])         # overwritten


def test_many_rows_add_in_place(either):
    inputs, start = _tokens((128, 128, 256), 256, 576, 24), torch.randn(3, 576, 24)
    into = fp8_grouped_wgrad(*inputs, start.clone())
    assert_alike([into], [start + fp8_grouped_wgrad_reference(*inputs)], TOLERANCE[FP32])


def test_adding_keeps_torch_library_s_rules():
    inputs = (*_tokens(ENDS, 384, 8, 8), torch.randn(4, 8, 8))
    torch.library.opcheck(torch.ops.minidsv3.fp8_grouped_wgrad_add, inputs,
                          test_utils=("test_autograd_registration", "test_faketensor"))


WRONG_ROWS = {
    "the neighbour's weights": lambda a, s, b, t, ends: (a, s, torch.cat((b[-1:], b[:-1])), t, ends),
    "the neighbour's scales": lambda a, s, b, t, ends: (a, s, b, t.roll(1, 0), ends),
    "ends as starts": lambda a, s, b, t, ends: (a, s, b, t, ends.roll(-1)),
    "an expert that ends early": lambda a, s, b, t, ends: (a, s, b, t, _ends(0, 128, 256, 384)),
}


@pytest.mark.parametrize("wrong", WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_the_comparison_sees_rows_of(wrong):
    inputs = _rows(ENDS, 384, 136, 144)
    with use_kernels("triton"):
        ours = fp8_grouped_gemm(*inputs)
    assert_alike([ours], [fp8_grouped_gemm_reference(*inputs)], TOLERANCE[BF16])
    with pytest.raises(AssertionError):
        assert_alike([ours], [fp8_grouped_gemm_reference(*wrong(*inputs))], TOLERANCE[BF16])


WRONG_TOKENS = {
    "scales of the next tokens": lambda a, s, b, t, ends: (a, s.roll(1, 0), b, t, ends),
    "scales of the neighbour's row": lambda a, s, b, t, ends: (a, s, b, t.roll(1, 1), ends),
    "an expert that ends early": lambda a, s, b, t, ends: (a, s, b, t, _ends(0, 128, 256, 384)),
}


@pytest.mark.parametrize("wrong", WRONG_TOKENS.values(), ids=WRONG_TOKENS)
def test_the_comparison_sees_tokens_of(wrong):
    inputs = _tokens(ENDS, 384, 40, 24)
    with use_kernels("triton"):
        ours = fp8_grouped_wgrad(*inputs)
    assert_alike([ours], [fp8_grouped_wgrad_reference(*inputs)], TOLERANCE[FP32])
    with pytest.raises(AssertionError):
        assert_alike([ours], [fp8_grouped_wgrad_reference(*wrong(*inputs))], TOLERANCE[FP32])


def test_rows_refuse(either):
    a, s, b, t, ends = _rows((128, 256), 256, 136, 144)
    for sentence, inputs in {
            r"b .* torch.bfloat16; it needs": (a, s, b.bfloat16(), t, ends),
            r"a \[256, 144\] and b \[136, 144\]; it needs \[M, K\] and \[experts, N, K\]": (a, s, b[0], t[0], ends),
            r"b \[2, 20, 144\]; .* N a multiple of 8": (a, s, codes(2, 20, 144), t, ends),
            r"b with strides": (a, s, codes(2, 200, 144)[:, :136], t, ends),
            r"b_scales \[2, 2, 2\] torch.float64": (a, s, b, t.double(), ends),
            r"b_scales \[1, 2, 2\]": (a, s, b, t[:1], ends),
            r"a_scales \[256, 2\]": (a, s.T.contiguous(), b, t, ends),
            r"ends \[1\] torch.int32; it needs \[2\]": (a, s, b, t, ends[:1]),
            r"ends \[2\] torch.int64": (a, s, b, t, ends.long()),
            "tensors on .*meta": (a, s, b, t, ends.to("meta"))}.items():
        with pytest.raises(ValueError, match=sentence):
            fp8_grouped_gemm(*inputs)


def test_tokens_refuse(either):
    a, s, b, t, ends = _tokens((128, 256), 256, 40, 24)
    for sentence, inputs in {
            r"a .* torch.float32; it needs": (a.float(), s, b, t, ends),
            r"b of shape \[24, 128\]; rows must all be equally long": (a, s, b[:, :128], t[:1], ends),
            r"and b \[20, 256\]; .* N a multiple of 8": (a, s, codes(20, 256), scales(2, 20), ends),
            r"b_scales \[1, 2\] .*; it needs \[2, 24\]": (a, s, b, scales(1, 2), ends),
            r"ends \[2, 1\]": (a, s, b, t, ends[:, None]),
            r"into \[2, 24, 40\] .*; it needs \[2, 40, 24\]": (a, s, b, t, ends, torch.zeros(2, 24, 40)),
            r"into \[2, 40, 24\] torch.bfloat16": (a, s, b, t, ends, torch.zeros(2, 40, 24, dtype=BF16))}.items():
        with pytest.raises(ValueError, match=sentence):
            fp8_grouped_wgrad(*inputs)
