"""What experts received, along tokens, beyond the registry's cases: the three steps it stands for, padding, mutants."""

import pytest
import torch

from compare import assert_alike
from minidsv3.kernels import (Permutation, permute, permute_columns, quantize_columns, quantize_tiles, sort_by_expert,
                              use_kernels)
from minidsv3.kernels.backend import INTERPRETED
from minidsv3.kernels.fp8_gemm import dequantize_tiles
from minidsv3.kernels.quantize import TINY
from minidsv3.kernels.registry import OPERATIONS
from mutated import mutated

DEVICE = "cpu" if INTERPRETED else "cuda"
OPERATION = OPERATIONS["permute_columns"]
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@pytest.fixture(params=["triton", "torch"])
def kernels(request):
    with use_kernels(request.param):
        yield


def sorted_choices(tokens: int, experts: int, slots: int, used: int, align: int = 128):
    choices = torch.rand(tokens, used, device=DEVICE).argsort(-1)[:, :slots].contiguous()
    return sort_by_expert(choices, torch.bincount(choices.flatten(), minlength=experts).float(), align)


@pytest.mark.parametrize("tokens, width, slots", [(150, 272, 3), (150, 128, 1), (1, 144, 4), (300, 16, 2)])
@pytest.mark.parametrize("least", [1e-4, TINY])
def test_it_is_the_three_steps_bit_for_bit(kernels, tokens, width, slots, least):
    """As FP8 training takes them: power-of-two scales; two of six experts are chosen by nobody."""
    order = sorted_choices(tokens, 6, slots, used=4)
    x = torch.randn(tokens, width, device=DEVICE) * torch.exp2(torch.randint(-40, 4, (tokens, 1), device=DEVICE))
    tiles = quantize_tiles(x, True, least)
    values = dequantize_tiles(*tiles)
    assert torch.equal(values, values.bfloat16().float())
    assert_alike(list(permute_columns(*tiles, order, True, least)),
                 list(quantize_columns(permute(values.bfloat16(), order), True, least)), 0)


def test_by_hand(kernels):
    """Two tokens, 448 and 28, and one expert of three: it has the tokens, then zeros; nobody's tiles are zeros too."""
    codes = torch.tensor([[448.0], [448.0]], device=DEVICE).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0**-4]], device=DEVICE)
    order = sort_by_expert(torch.ones(2, 1, dtype=torch.int64, device=DEVICE),
                           torch.tensor([0.0, 2, 0], device=DEVICE), 128)
    found, found_scales = permute_columns(codes, scales, order, True)
    assert found.shape == (1, 256) and found.float()[0, :3].tolist() == [448, 28, 0] and not found.float()[0, 2:].any()
    assert found_scales.tolist() == [[1.0], [2.0**-22]]                     # 1e-4 / 448, up to a power of two


def test_codes_and_scales_may_be_part_of_larger_ones(kernels):
    """Tokens that were filled up to a multiple of 16 lose those rows again."""
    order = sorted_choices(20, 4, 2, used=4)
    codes, scales = quantize_tiles(torch.randn(32, 200, device=DEVICE), True)
    part = codes[:20], scales[:, :20]
    assert_alike(list(permute_columns(*part, order)), list(permute_columns(*(x.clone() for x in part), order)), 0)


@interpreted
@pytest.mark.parametrize("case, right, wrong", [
    ("300 x 272, aligned", "interleaved(row_tile, TILE, HELD)", "span(row_tile, TILE)"),
    ("300 x 272, aligned", "tl.where(source < 0, tokens, source // K)", "tl.maximum(source // K, 0)"),
    ("300 x 272, aligned", "source // K)", "source % K)"),
    ("300 x 272, aligned", "S + tile * tokens", "S"),
    ("one choice", "mask=row < rows, other=-1", "mask=row < rows, other=0"),
    ("scales of any size", "x.to(tl.bfloat16)", "x"),
    ("scales of any size", "& 0x7FFFFF, 0) > 0", "& 0x7FFFFF, 0) > 0x7FFFFF"),
    ("scales of any size", "divided(x, scale, 1 / scale)", "divided(x, scale, 1.001 / scale) * 1.01"),
    ("300 x 272, aligned", "(254 << 23)", "(253 << 23)"),
    ("odd", "tl.where(scale == scale, inverse, scale)", "tl.where(scale == scale, inverse, 1.0)"),
    ("odd", "[:, None], least", "[:, None], 1e-4"),
], ids=range(11))
def test_the_comparison_sees_a_wrong_kernel(case, right, wrong, tmp_path):
    mutant = mutated("permute_columns", right, wrong, tmp_path).permute_columns
    *inputs, pow2, least, rows, sources, ends = OPERATION.cases[case](torch.float32)
    order = Permutation(rows, sources, ends)
    with use_kernels("triton"), pytest.raises(AssertionError):
        assert_alike(list(mutant(*inputs, order, pow2, least)),
                     list(OPERATION.reference(*inputs, pow2, least, *order)), 0)


CODES, SCALES = torch.ones(5, 200).to(torch.float8_e4m3fn), torch.ones(2, 5)
ORDER = sort_by_expert(torch.zeros(5, 1, dtype=torch.int64), torch.tensor([5.0]))


@pytest.mark.parametrize("codes, scales, least, sentence", [
    (CODES.float(), SCALES, 1.0, r"codes \[5, 200\] torch.float32; they must be \[5, width\] in torch.float8_e4m3fn"),
    (CODES[:4], SCALES[:, :4], 1.0, r"codes \[4, 200\] .* must be \[5, width\]"),
    (CODES, SCALES.T, 1.0, r"scales \[5, 2\] torch.float32; codes of shape \[5, 200\] need \[2, 5\]"),
    (CODES, SCALES.half(), 1.0, r"scales \[2, 5\] torch.float16"),
    (CODES, SCALES, 0.0, "least 0.0; it must be at least"),
])
def test_refusals(codes, scales, least, sentence):
    with pytest.raises(ValueError, match=sentence):
        permute_columns(codes, scales, ORDER, least=least)
