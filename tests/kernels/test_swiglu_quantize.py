"""SwiGLU's kernels, beside what the registry's tests say of them: halves where they lie, one rounding, FP8 caches."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from compare import assert_alike, outputs
from minidsv3.kernels import (quantize_columns, quantize_tiles, swiglu, swiglu_quantize,
                              swiglu_quantize_backward, swiglu_reference, use_kernels)
from minidsv3.kernels.backend import INTERPRETED
from minidsv3.kernels.cases.swiglu_quantize import BACKWARD, OPERATION
from mutated import mutated

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
CHOICES = ["torch", pytest.param("triton", marks=interpreted)]


@pytest.fixture(params=CHOICES)
def kernels(request):
    with use_kernels(request.param):
        yield request.param


def decoded(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The values of 1 x 128 codes."""
    return codes.float() * scales.T.repeat_interleave(128, 1)[:, :codes.shape[1]]


# ---- swiglu -------------------------------------------------------------------------------------------------------

class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.names.append(operator.name())
        return operator(*arguments, **(options or {}))


@interpreted
def test_halves_of_one_tensor_are_not_copied():
    gate, up = torch.randn(2, 5, 48).chunk(2, -1)
    with use_kernels("triton"), Operators() as seen:
        y = swiglu(gate, up)
    assert seen.names.count("minidsv3::swiglu") == 1
    assert not {"aten::clone", "aten::copy_", "aten::_to_copy"} & set(seen.names), seen.names
    assert_alike([y], [swiglu_reference(gate, up)], 1e-6)


@interpreted
def test_the_kernel_rounds_once():
    gate, up = torch.randn(2, 33, 40).bfloat16()
    exact = swiglu_reference(gate.double(), up.double())
    with use_kernels("triton"):
        ours = (swiglu(gate, up).double() - exact).abs()
    assert (ours <= exact.abs() * 2**-8 * (1 + 1e-5)).all()
    assert not ((swiglu_reference(gate, up).double() - exact).abs() <= exact.abs() * 2**-8 * (1 + 1e-5)).all()


# ---- forward ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pow2", [False, True])
def test_codes_and_scales_are_those_of_the_product(kernels, pow2):
    gate, up = OPERATION.cases["halves"](torch.float32)
    product = torch.nn.functional.silu(gate) * up
    codes, scales = swiglu_quantize(gate, up, pow2)
    expected_codes, expected_scales = quantize_tiles(product, pow2)
    assert_alike([scales], [expected_scales], 1e-6)
    step = scales.T.repeat_interleave(128, 1)[:, :product.shape[1]] / 1024
    assert ((decoded(codes, scales) - product).abs() <= torch.maximum(product.abs() / 16, step) * (1 + 1e-5)).all()
    if not pow2:        # the cases keep away from the middles of exact scales
        assert_alike([codes], [expected_codes], 0)


def test_the_product_is_not_rounded_to_bfloat16_on_the_way(kernels):
    gate, up = OPERATION.cases["halves"](torch.bfloat16)
    codes, scales = swiglu_quantize(gate, up)
    rounded, _ = quantize_tiles(swiglu_reference(gate, up))
    assert_alike([codes], [swiglu_quantize(gate.float(), up.float())[0]], 0)
    assert not torch.equal(codes.float(), rounded.float())


# ---- backward -----------------------------------------------------------------------------------------------------

def test_backward_is_the_gradient_and_the_product_along_tokens(kernels):
    gate, up = (x.requires_grad_() for x in OPERATION.cases["halves"](torch.float32))
    slope = torch.randn_like(gate)
    exact = swiglu_reference(gate.double(), up.double())
    gradients = torch.autograd.grad(exact, (gate, up), slope.double())
    d_gate_up, codes, scales, d_weights = swiglu_quantize_backward(gate, up, slope)
    assert d_gate_up.is_contiguous() and d_weights is None
    assert_alike(list(d_gate_up.chunk(2, -1)), list(gradients), 1e-6)
    assert codes.shape == (136, 70) and scales.shape == (1, 136)
    assert_alike([codes, scales], list(quantize_columns(exact.detach().float())), 1e-6)


def test_with_weights_it_is_the_gradient_of_the_weighted_product(kernels):
    gate, up, slope, pow2, *_, weights = BACKWARD.cases["weighted"](torch.float32)
    leaves = [x.double().requires_grad_() for x in (gate, up, weights)]
    exact = swiglu_reference(*leaves[:2]) * leaves[2][:, None]
    gradients = torch.autograd.grad(exact, leaves, slope.double())
    d_gate_up, codes, scales, d_weights = swiglu_quantize_backward(gate, up, slope, pow2, weights=weights)
    assert_alike([*d_gate_up.chunk(2, -1), d_weights], [x.float() for x in gradients], 1e-6)
    assert_alike([codes, scales], list(quantize_columns(exact.detach().float(), pow2)), 1e-6)


def test_gradients_are_rounded_once(kernels):
    """Within half a step of BF16 of float64's, weight included; the router's is not rounded to BF16 at all."""
    gate, up, slope, *_, weights = BACKWARD.cases["weighted"](torch.bfloat16)
    leaves = [x.double().requires_grad_() for x in (gate, up, weights)]
    *gradients, router = torch.autograd.grad(swiglu_reference(*leaves[:2]) * leaves[2][:, None], leaves, slope.double())
    exact = torch.cat(gradients, -1)
    half_step = 2.0 ** (exact.abs().log2().floor() - 8)
    once, *_, d_weights = swiglu_quantize_backward(gate, up, slope, weights=weights)
    twice = (swiglu_quantize_backward(gate, up, slope)[0] * weights[:, None]).bfloat16()
    assert [bool(((x.double() - exact).abs() <= half_step + 1e-6).all()) for x in (once, twice)] == [True, False]
    assert_alike([d_weights], [router.float()], 1e-6)


def test_padding_has_no_gradient_and_no_codes_whatever_its_weight(kernels):
    inputs = BACKWARD.cases["weighted codes"](torch.bfloat16)
    d_gate_up, codes, _, d_weights = swiglu_quantize_backward(*inputs)
    assert d_gate_up[:65].any() and not d_gate_up[65:].any() and not d_weights[65:].any()
    assert codes[:, :65].float().any() and not codes[:, 65:].float().any()


def test_from_fp8_it_is_the_gradient_at_the_decoded_values(kernels):
    gate, up, slope, _, gate_scales, up_scales = BACKWARD.cases["codes"](torch.float32)
    ours = swiglu_quantize_backward(gate, up, slope, gate_scales=gate_scales, up_scales=up_scales)
    theirs = swiglu_quantize_backward(decoded(gate, gate_scales), decoded(up, up_scales), slope)
    assert_alike(outputs(ours), outputs(theirs), 1e-6)


@interpreted
@pytest.mark.parametrize("operation, case, right, wrong", [
    (OPERATION, "halves", "gate * tl.sigmoid(gate) * up", "gate * up"),
    (BACKWARD, "halves", "h = silu * up", "h = silu.to(tl.bfloat16) * up"),
    (BACKWARD, "codes", "tl.program_id(1) * COLUMNS // TILE", "0"),
    (BACKWARD, "codes", "_decode(U, US", "_decode(U, GS"),
    (BACKWARD, "halves", "interleaved(tl.program_id(0), TILE, HELD)", "span(tl.program_id(0), TILE)"),
    (BACKWARD, "halves", "d_up, 2 * row + 1", "d_up, 2 * row"),
    (BACKWARD, "weighted", "weight * d_up, weight", "d_up, weight"),
    (BACKWARD, "weighted", "tl.sum(d_up * up, 1)", "tl.sum(d_gate * gate, 1)"),
    (BACKWARD, "weighted", "parts.sum(0)", "parts[0].clone()"),
    (BACKWARD, "weighted", "x if x is None else x.contiguous()", "x"),
], ids=range(10))
def test_the_comparison_sees_a_wrong_kernel(operation, case, right, wrong, tmp_path):
    mutant = getattr(mutated("swiglu_quantize", right, wrong, tmp_path), operation.name)
    inputs = operation.cases[case](torch.float32)
    with use_kernels("triton"), pytest.raises(AssertionError):
        assert_alike(outputs(mutant(*inputs)), outputs(operation.reference(*inputs)), 1e-5)


# ---- refusals -----------------------------------------------------------------------------------------------------

ONES = torch.ones(3, 200)
CODES, SCALES = ONES.to(torch.float8_e4m3fn), torch.ones(2, 3)


@pytest.mark.parametrize("call, sentence", [
    (lambda: swiglu_quantize(ONES, ONES[:2]), r"gate and up of one dtype; got \[3, 200\] torch.float32, \[2, 200\]"),
    (lambda: swiglu_quantize(ONES, ONES.half()), "of one dtype"),
    (lambda: swiglu_quantize(ONES[0], ONES[0]), r"must be \[N, width\]"),
    (lambda: swiglu_quantize(CODES, CODES), "16 bits or more; got torch.float8_e4m3fn"),
    (lambda: swiglu_quantize(ONES.int(), ONES.int()), "16 bits or more; got torch.int32"),
    (lambda: swiglu_quantize_backward(ONES, ONES, ONES[:2]), r"got .* \[2, 200\]"),
    (lambda: swiglu_quantize_backward(ONES, ONES, CODES), "16 bits or more"),
    (lambda: swiglu_quantize_backward(CODES, CODES, ONES), r"need scales of shape \[2, 3\]; got None"),
    (lambda: swiglu_quantize_backward(CODES, CODES, ONES, False, SCALES, SCALES.T), r"got \[3, 2\]"),
    (lambda: swiglu_quantize_backward(ONES, ONES, ONES, False, SCALES, SCALES), r"scales of shape None; got \[2, 3\]"),
    (lambda: swiglu_quantize_backward(ONES, ONES, ONES, weights=ONES), r"each of 3 rows; got \[3, 200\]"),
    (lambda: swiglu_quantize_backward(ONES, ONES, ONES, weights=ONES[:, 0].half()), "FP32 value .* torch.float16"),
])
def test_refusals(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
