"""The quantisers, beside what the registry's tests say of them: the equation by hand, exact divisions, ragged edges."""

import pytest
import torch
import torch.nn.functional as F

from compare import assert_alike
from minidsv3.kernels import (dequantize_blocks, quantize_blocks, quantize_blocks_reference, quantize_columns,
                              quantize_columns_reference, quantize_tiles, quantize_tiles_reference, use_kernels)
from minidsv3.kernels.backend import INTERPRETED, tl, triton
from minidsv3.kernels.fp8_gemm import dequantize_tiles
from minidsv3.kernels.quantize import LEAST, TINY, divided
from mutated import mutated

CHOICES = ["torch", pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter"))]
E4M3 = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()      # all values from 0 to 448


@pytest.fixture(params=CHOICES)
def kernels(request):
    with use_kernels(request.param):
        yield request.param


def nearest(x: float, scale: float) -> float:
    """The E4M3 value nearest to x / scale, by trying all of them; among two the one whose last bit is 0."""
    exact = torch.tensor(abs(x), dtype=torch.float64) / torch.tensor(scale, dtype=torch.float64)
    distance = (E4M3.double() - exact).abs()
    best = (distance == distance.min()).nonzero().flatten().tolist()
    return float(E4M3[min(best, key=lambda code: code % 2)]) * (-1 if x < 0 else 1)


def test_tiles_are_their_equation(kernels):
    x = torch.randn(3, 200)
    codes, scales = quantize_tiles(x)
    assert codes.shape == (3, 200) and scales.shape == (2, 3)
    for row in range(3):
        for tile, columns in enumerate((slice(0, 128), slice(128, 200))):
            values = x[row, columns]
            scale = float(values.abs().max() / 448)
            assert float(scales[tile, row]) == scale
            assert codes[row, columns].tolist() == [nearest(value, scale) for value in values.tolist()]


def test_columns_are_the_tiles_of_the_transpose(kernels):
    x = torch.randn(130, 40)
    codes, scales = quantize_columns(x)
    assert codes.shape == (40, 130) and scales.shape == (2, 40) and codes.is_contiguous()
    assert_alike([codes, scales], list(quantize_tiles(x.T)), 0)


def test_one_scale_a_block_and_none_spans_two_experts(kernels):
    weight = torch.ones(2, 130, 140)
    weight[0, 0, 0], weight[0, 0, 139], weight[0, 129, 0], weight[1, 0, 0] = 4, 8, 16, 32
    codes, scales = quantize_blocks(weight)
    assert (scales * 448).tolist() == [[[4, 8], [16, 1]], [[32, 1], [1, 1]]]
    assert codes[0, 1, 1] == 112 and codes[1, 1, 1] == 14 and codes[1, 129, 139] == 448


def test_dequantising_gives_back_within_half_a_step(kernels):
    """Normal codes have three bits of mantissa: half a step is 2^-4 of the value; below 2^-6 it is 2^-10."""
    weight = torch.randn(576, 200)
    codes, scales = quantize_blocks(weight)
    back = dequantize_blocks(codes, scales)
    step = scales.repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)[:, :200]
    assert ((back - weight).abs() <= torch.maximum(weight.abs() / 16, step / 1024) * (1 + 1e-6)).all()
    assert torch.equal(dequantize_blocks(codes, scales, torch.bfloat16), back.bfloat16())
    assert torch.equal(back, (codes.double() * step.double()).float())


def test_the_latent_projection_has_five_rows_of_blocks(kernels):
    """576 rows of kv_a_proj_with_mqa: four blocks of 128, and 64 that have a scale of their own."""
    weight = torch.ones(576, 130)
    weight[512:] = 7.0
    codes, scales = quantize_blocks(weight)
    assert scales.shape == (5, 2) and (codes == 448).all()
    assert (scales * 448).tolist() == [[1, 1]] * 4 + [[7, 7]]


# ---- the scale ----------------------------------------------------------------------------------------------------

def test_a_tile_of_zeros_keeps_the_least_scale(kernels):
    for quantize in (quantize_tiles, quantize_columns, quantize_blocks):
        codes, scales = quantize(torch.zeros(130, 130))
        assert (codes == 0).all() and (scales == torch.tensor(1e-4) / 448).all()
    assert float(quantize_tiles(torch.full((1, 128), 9e-5))[1]) == float(torch.tensor(1e-4) / 448)


@pytest.mark.parametrize("pow2", [False, True])
def test_gradients_keep_three_bits_of_mantissa_however_small(kernels, pow2, least=TINY):
    """Those that are no more than 2^13 below the largest of their tile: half a step is 2^-4 of the value."""
    for size in (1e-12, 2.0 ** -78):
        x = size * torch.rand(130, 40).add(2.0 ** -12)
        for back in (dequantize_tiles(*quantize_tiles(x, pow2, least)),
                     dequantize_tiles(*quantize_columns(x, pow2, least)).T):
            assert ((back - x).abs() <= x / 16 * (1 + 1e-6)).all()


@pytest.mark.parametrize("pow2", [False, True])
def test_with_the_floor_of_activations_they_do_not(kernels, pow2):
    with pytest.raises(AssertionError):
        test_gradients_keep_three_bits_of_mantissa_however_small(kernels, pow2, LEAST)


@pytest.mark.parametrize("exponent", [-13, 0, 30])
def test_powers_of_two_are_rounded_up_exactly(kernels, exponent):
    """amax / 448 = 2^e stays; the float above it needs 2^(e + 1), the float below it still 2^e."""
    amax = torch.tensor(448 * 2.0 ** exponent)
    x = torch.zeros(3, 128)
    x[:, 5] = torch.stack([amax, torch.nextafter(amax, 2 * amax), torch.nextafter(amax, 0 * amax)])
    codes, scales = quantize_tiles(x, pow2=True)
    assert scales.tolist() == [[2.0 ** exponent, 2.0 ** (exponent + 1), 2.0 ** exponent]]
    assert codes[:, 5].tolist() == [448, 224, 448]
    assert float(quantize_tiles(0 * x, pow2=True)[1][0, 0]) == 2.0 ** -22       # 1e-4 / 448 is 2.2e-7, 2^-22 2.4e-7


def test_with_powers_of_two_tiles_are_quantised_again_without_loss(kernels):
    """What the report asks of scales that move from 1 x 128 to 128 x 1: values that the new tile can hold keep all
    their bits."""
    codes, scales = quantize_tiles(torch.rand(128, 128) + 0.5, pow2=True)
    x = codes.float() * scales.T
    again, rescaled = quantize_columns(x, pow2=True)
    assert torch.equal(again.T.float() * rescaled, x)


def test_a_tile_that_is_not_finite_comes_back_as_nan(kernels):
    for bad in (float("inf"), float("-inf"), float("nan")):
        for pow2 in (False, True):
            x = torch.randn(130, 200)
            x[1, 3] = bad
            codes, scales = quantize_blocks(x, pow2)
            spoilt = dequantize_blocks(codes, scales).isnan()
            assert spoilt[:128, :128].all() and spoilt.sum() == 128 * 128
            assert (quantize_tiles(x, pow2)[1].isnan().nonzero() == torch.tensor([[0, 1]])).all()
            assert (quantize_columns(x, pow2)[0].float().isnan().sum(1) == torch.eye(200)[3] * 128).all()


def test_the_largest_floats_do_not_overflow(kernels):
    largest = torch.finfo(torch.float32).max
    codes, scales = quantize_tiles(torch.tensor([[largest, -largest, largest / 2, 1.0]]))
    assert codes.tolist() == [[448, -448, 224, 0]] and scales.isfinite().all()


# ---- the kernel's division ----------------------------------------------------------------------------------------

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")

def close_to_the_middles(rows: int, exponents: float = 20) -> torch.Tensor:
    """Values whose quotient is the middle between two codes, or the next float to it, for scales of random sizes: there
    the last bit of the division decides on the code."""
    middles = (E4M3[1:] + E4M3[:-1]) / 2
    amax = torch.exp2((torch.rand(rows, 1) - 0.5) * exponents)
    x = middles[torch.randint(len(middles), (rows, 128))] * (amax / 448)
    x[:, 40:80] = torch.nextafter(x, 2 * x)[:, 40:80]
    x[:, 80:] = torch.nextafter(x, 0 * x)[:, 80:]
    x[:, 0] = amax[:, 0]
    return x


@interpreted
@pytest.mark.parametrize("pow2", [False, True])
def test_codes_next_to_the_middles_are_those_of_an_exact_division(pow2):
    x = close_to_the_middles(256)
    with use_kernels("triton"):
        assert_alike(list(quantize_tiles(x, pow2)), list(quantize_tiles_reference(x, pow2)), 0)
        assert_alike(list(quantize_columns(x.T, pow2)), list(quantize_columns_reference(x.T, pow2)), 0)
        assert_alike(list(quantize_blocks(x, pow2)), list(quantize_blocks_reference(x, pow2)), 0)


def all_quotients(dtype: torch.dtype) -> torch.Tensor:
    """[128, tiles of 128]: each row has another largest magnitude; its tiles hold every mantissa of `dtype` at all
    exponents that are not rounded to 0. In BF16 these are all quotients that there are, and rows have all mantissas."""
    bits = {torch.bfloat16: 7, torch.float16: 10}[dtype]
    mantissas = torch.arange(2 ** bits, 2 ** (bits + 1)) / 2 ** bits
    x = (mantissas * torch.exp2(-torch.arange(19)[:, None])).flatten()[None]
    amax = mantissas[::2 ** bits // 128, None] * (1 + 2.0 ** -bits * (bits > 7))
    x = F.pad(torch.minimum(x.expand(128, -1), amax), (0, -x.shape[1] % 127)).unflatten(1, (-1, 127))
    return torch.cat([x, amax[:, None].expand(-1, x.shape[1], 1)], 2).flatten(1).to(dtype)


def exact_for_all_quotients(quantize, dtype: torch.dtype, factor: float = 1.0, least: float = LEAST) -> bool:
    x = all_quotients(dtype) * factor
    with use_kernels("triton"):
        pairs = zip(quantize(x, False, least), quantize_tiles_reference(x, False, least))
        return all(torch.equal(ours.float(), theirs.float()) for ours, theirs in pairs)


@interpreted
@pytest.mark.parametrize("dtype, factor, least", [
    (torch.bfloat16, 1.0, LEAST), (torch.float16, 1.0, LEAST),
    (torch.bfloat16, 2.0 ** -14, LEAST), (torch.bfloat16, 2.0 ** -81, TINY),        # some, or all, on the floor
    (torch.bfloat16, 2.0 ** 127, LEAST)])                                       # what the inverse lacks is subnormal
def test_two_instructions_divide_every_value_of_16_bits(dtype, factor, least):
    assert exact_for_all_quotients(quantize_tiles, dtype, factor, least)


@interpreted
@pytest.mark.parametrize("right, wrong, exact", [
    ("inverse = 1 / scale\n", "inverse = 1 / scale * (1 + 2.0 ** -22)\n", True),     # as near as a GPU's inverse
    ("inverse = 1 / scale\n", "inverse = 1 / scale * (1 - 2.0 ** -22)\n", True),
    ("divided(x.to(tl.float32), scale, inverse)", "(x.to(tl.float32) * inverse)", False)])
def test_they_need_no_exact_inverse_but_one_is_too_few(right, wrong, exact, tmp_path):
    assert exact_for_all_quotients(mutated("quantize", right, wrong, tmp_path).quantize_tiles, torch.bfloat16) == exact


@triton.jit
def _over_448(X, Y, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(Y + at, divided(tl.load(X + at), 448.0, 1 / 448))


@interpreted
def test_they_divide_every_magnitude_by_448():
    x = torch.arange(0x3F800000, 0x40000000, dtype=torch.int32).view(torch.float32)      # [1, 2), all 2^23 of them
    y = torch.empty_like(x)
    _over_448[(8,)](x, y, 2 ** 20)
    assert torch.equal(y, x / torch.tensor(448.0)) and not torch.equal(x * torch.tensor(1 / 448), y)


@interpreted
@pytest.mark.parametrize("right, wrong", [
    ("divided_exactly(x, scale, divided_exactly(1.0, scale, inverse))", "(x * inverse)"),
    ("0.0), least), 448.0", "0.0), 1e-5), 448.0"), ("bitcast=True) + 0x7FFFFF", "bitcast=True)"),
    ("448.0, 1 / 448)\n", "240.0, 1 / 240)\n"), ("tl.where(finite, scale", "tl.where(True, scale"),
    ("x.to(tl.int32, bitcast=True) & 0x7FFFFFFF", "x.to(tl.int32, bitcast=True)"),
])
def test_these_tests_see_a_wrong_kernel(right, wrong, tmp_path):
    mutant = mutated("quantize", right, wrong, tmp_path)
    x = torch.cat([close_to_the_middles(256), torch.tensor([[9e-5], [-3.0], [float("nan")]]) * torch.eye(1, 128)])
    with use_kernels("triton"), pytest.raises(AssertionError):
        for pow2 in (False, True):
            assert_alike(list(mutant.quantize_tiles(x, pow2)), list(quantize_tiles_reference(x, pow2)), 0)


# ---- refusals -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, sentence", [
    (lambda: quantize_tiles(torch.ones(4)), r"quantize_tiles got \[4\] torch.float32; it takes \[M, K\]"),
    (lambda: quantize_columns(torch.ones(2, 3, 4)), r"quantize_columns got \[2, 3, 4\]"),
    (lambda: quantize_blocks(torch.ones(4)), r"it takes \[M, K\] or \[experts, M, K\] in float32"),
    (lambda: quantize_tiles(torch.ones(2, 4).to(torch.float8_e4m3fn)), "got .* torch.float8_e4m3fn"),
    (lambda: quantize_tiles(torch.ones(2, 4, dtype=torch.int32)), "got .* torch.int32"),
    (lambda: quantize_tiles(torch.ones(2, 4), False, 0.0), "quantize_tiles got least 0.0; it must be at least 8.27"),
    (lambda: quantize_columns(torch.ones(2, 4), least=float("nan")), "quantize_columns got least nan"),
    (lambda: dequantize_blocks(torch.ones(2, 4), torch.ones(1, 1)), "codes .* torch.float32; they must be"),
    (lambda: dequantize_blocks(torch.ones(130, 4).to(torch.float8_e4m3fn), torch.ones(1, 1)), r"need \[2, 1\]"),
    (lambda: dequantize_blocks(torch.ones(2, 4).to(torch.float8_e4m3fn), torch.ones(1, 1).half()), "torch.float16"),
])
def test_refusals(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_no_gradient_passes_and_half_precision_is_taken(kernels):
    x = torch.randn(3, 130, requires_grad=True)
    assert not any(y.requires_grad for y in (*quantize_tiles(x), *quantize_columns(x), *quantize_blocks(x)))
    assert_alike(list(quantize_tiles(x.half())), list(quantize_tiles_reference(x.half().float())), 0)
    with use_kernels("torch"):
        assert_alike(list(quantize_blocks(x.double())), list(quantize_blocks_reference(x)), 0)
