"""Exercises of chapter 04: numbers in their sentences, cases that show what they should, tests that spare mutants."""

import random

import pytest
import torch

from minidsv3.accumulate import accumulate
from minidsv3.course import fp8
from minidsv3.course.compare import difference
from minidsv3.formats import E4M3, E5M2, fake_quantize, round_to
from minidsv3.kernels import quantize_columns, quantize_tiles
from minidsv3.kernels.fp8_gemm import dequantize_tiles, fp8_gemm_reference

SEEDS = range(20)


def cases(task, seed):
    return list(task.cases(random.Random(f"{seed}")).values())


def error(back, x) -> float:
    return ((back - x).norm() / x.norm()).item()


# ---- numbers in sentences and questions -----------------------------------------------------------------------------

def test_the_largest_number_of_each_reading():
    codes = [code for code in range(128) if code != 127]
    assert max(map(fp8.decode_solution, codes)) == 448
    assert max(value for value in map(fp8.decode_as_ieee, codes) if value < float("inf")) == 240
    assert fp8.decode_with_bias_8(0b0_0111_000) == 0.5 and fp8.decode_subnormals_with_a_one(0) == 2 ** -7
    assert fp8.decode_in_two_s_complement(0b1_1001_000) == -1 and fp8.decode_solution(0b1_1001_000) == -4


def test_octaves_of_the_questions():
    """1,000 is ten octaves and E4M3 has almost 15; E5M2 has seven more above and eight more below."""
    assert 2 ** 14 < E4M3.largest / E4M3.smallest_normal < 2 ** 15
    assert E5M2.largest / E4M3.largest == 2 ** 7 and E4M3.smallest_normal / E5M2.smallest_normal == 2 ** 8


def test_errors_of_the_questions():
    x = torch.randn(4096, 128, dtype=torch.float64)
    for scale in (1, 0.5):
        assert 0.0255 < error(round_to(x * scale, E4M3) / scale, x) < 0.0275
    assert 0.051 < error(fake_quantize(x, E5M2), x) < 0.055 and 0.025 < error(fake_quantize(x, E4M3), x) < 0.028


def test_requantising_the_other_way():
    """Question 04.transpose: nearly all values change, and with powers of two next to none."""
    x = torch.randn(512, 512)
    for pow2, low, high in ((False, 0.9, 1.0), (True, 0.0, 0.01)):
        forward = fake_quantize(x, E4M3, (1, 128), pow2)
        changed = (fake_quantize(forward, E4M3, (128, 1), pow2) != forward).float().mean()
        assert low <= changed <= high


# ---- the cases show what they should --------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", SEEDS)
def test_scales_of_the_cases_are_powers_of_two(seed):
    for (x,) in cases(fp8.QUANTIZE, seed):
        codes, scales = quantize_tiles(x)
        used = scales[scales > 1e-6]
        assert torch.equal(torch.frexp(used)[0], torch.full_like(used, 0.5)) and x.shape[0] != x.shape[1]
        assert (quantize_tiles(-x)[0].float() == -codes.float()).all() and codes.float().abs().max() == 448


@pytest.mark.parametrize("seed", SEEDS)
def test_the_reference_of_the_weight_gradient_is_the_kernels(seed):
    """Column tiles of each expert, multiplied as the package does."""
    for x, dy, sizes in cases(fp8.WGRAD, seed):
        for got, expert, slope in zip(fp8.wgrad_reference(x, dy, sizes), x.split(sizes), dy.split(sizes)):
            if len(expert):
                left, right = quantize_columns(slope), quantize_columns(expert)
                want = fp8_gemm_reference(*left, *right, torch.float32)
                assert torch.allclose(got, want, rtol=0, atol=1e-5 * want.abs().max().item())
            else:
                assert not got.any()


@pytest.mark.parametrize("seed", SEEDS)
def test_promotion_shows_in_the_cases(seed):
    for products, every in cases(fp8.PROMOTE, seed):
        assert products.shape[1] % every and products.shape[1] > every
        wrong = [fp8.promote_at_the_end(products, every), fp8.promote_in_fp32(products, every),
                 fp8.promote_into_a_short_sum(products, every), fp8.promote_without_the_rest(products, every)]
        right = fp8.promote_reference(products, every)
        assert all(difference(each, right, 0.0) for each in wrong)
        assert torch.equal(right, accumulate(products, torch.ones(3, products.shape[1]), every)[:, 2])


def test_a_height_of_192_hides_its_mistake():
    """What 4.6 says: rows / rows of scales is a whole number there, and 96 rows get a scale that is not theirs."""
    codes, scales = torch.ones(192, 128).to(torch.float8_e4m3fn), torch.tensor([[1.0], [2.0]])
    got, right = fp8.rows_in_equal_shares(codes, scales), fp8.rows_reference(codes, scales)
    assert (got != right).any(1).sum() == 32 and (right[:, 0] == 1).sum() == 128


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_have_a_scale_of_their_own_for_the_last_rows(seed):
    for codes, scales in cases(fp8.ROWS, seed):
        assert codes.shape[0] % 128 and len(scales.unique()) == scales.numel()


def test_an_infinity_is_lost_by_one_mutant_alone():
    x = torch.ones(1, 128)
    x[0, 3] = float("inf")
    lost = fp8.QUANTIZERS.wrong["infinity lost"][0](x)
    assert lost[0].isfinite().all() and lost[1].isfinite().all() and lost[0][0, 3] == 448
    assert fp8.quantize_reference(x)[0].isnan().all()


# ---- mutants --------------------------------------------------------------------------------------------------------

def typical_test(quantize):
    """A test that compares what comes back with x, on random numbers of one size."""
    x = torch.randn(8, 256)
    codes, scales = quantize(x)
    assert codes.shape == (8, 256)
    if scales.shape == (2, 8):
        assert ((dequantize_tiles(codes, scales) - x).abs() <= x.abs() / 16 + 1e-4).all()


def test_a_typical_test_spares_some():
    def survives(function) -> bool:
        try:
            typical_test(function)
        except AssertionError:
            return False
        return True
    torch.manual_seed(0)
    alive = {name for name, (function, _) in fp8.QUANTIZERS.wrong.items() if survives(function)}
    assert {"no floor", "infinity lost", "whole rows", "scales by row"} <= alive and "towards zero" not in alive
    assert not fp8.QUANTIZERS.judge(typical_test, 0).solved


def test_there_are_seven_quantisers():
    assert len(fp8.QUANTIZERS.wrong) == 7
