"""Twelve bits in memory: what is packed comes back bit for bit, in a byte and a half a value."""

import pytest
import torch

from minidsv3 import formats
from minidsv3.formats import E5M6, fake_quantize, octave, tile_scale
from minidsv3.kernels import e5m6, use_kernels
from minidsv3.kernels.backend import INTERPRETED
from minidsv3.kernels.e5m6 import dequantize_e5m6, encode, pack, quantize_e5m6, unpack

DEVICE = "cpu" if INTERPRETED else "cuda"
BOTH = pytest.mark.parametrize("kernels", ["torch", "triton"] if INTERPRETED else [
    "torch", pytest.param("triton", marks=pytest.mark.gpu)])


def all_numbers() -> torch.Tensor:
    """Every number of E5M6 that is not negative, every middle between two, and its neighbours in FP32; a row."""
    numbers = formats.decode(torch.arange(E5M6.largest_code + 1), E5M6).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    below, above = (torch.nextafter(middles, torch.tensor(side)) for side in (0.0, float("inf")))
    return torch.cat([numbers, middles, below, above, torch.tensor([1e-30, 2.0 ** -149])])


def test_every_code_in_both_places_comes_back():
    codes = torch.stack([torch.arange(4096), torch.arange(4096).roll(1)])
    assert torch.equal(unpack(pack(codes)).long(), codes)


def test_bytes_by_hand():
    assert pack(torch.tensor([0xABC, 0x123])).tolist() == [0xAB, 0xC1, 0x23]
    assert pack(torch.tensor([[0xABC, 0x123, 0xFFF, 0]])).tolist() == [[0xAB, 0xC1, 0x23, 0xFF, 0xF0, 0]]


def test_the_codes_are_those_of_the_format():
    """`formats` says what any format is; here E5M6 is written as FP16's first 12 bits."""
    assert (e5m6.LARGEST, e5m6.SMALLEST_NORMAL) == (E5M6.largest, E5M6.smallest_normal)
    x = torch.cat([all_numbers(), torch.tensor([float("nan")])])
    x = torch.cat([x, -x[:-1]])
    assert torch.equal(encode(x), formats.encode(x, E5M6).int() & 0xFFF)


@BOTH
def test_the_scales_are_those_of_the_format(kernels):
    """Where the scale doubles and beside it, in all octaves; all BF16 mantissas; what is too small or not finite."""
    turns = 65024 * torch.exp2(torch.arange(-32.0, 112))
    amax = torch.cat([turns, torch.nextafter(turns, 0 * turns), torch.nextafter(turns, 2 * turns),
                      1 + torch.arange(128) / 128, torch.tensor([0, 1e-4, float("inf"), float("nan")])])
    x = torch.zeros(len(amax), 128)
    x[:, 77] = -amax
    with use_kernels(kernels):
        scales = quantize_e5m6(x.view(1, -1).to(DEVICE))[1][:, 0].cpu()
    assert torch.equal(scales.nan_to_num(0), tile_scale(amax, E5M6, pow2=True).nan_to_num(0))


@BOTH
def test_every_rounding_is_that_of_the_format(kernels):
    """With amax 65024 the scale is 1; the kernel rounds by adding and taking away a large number."""
    x = torch.nn.functional.pad(all_numbers(), (0, -len(all_numbers()) % 127)).unflatten(0, (-1, 127))
    x = torch.cat([x, torch.full_like(x[:, :1], 65024.0)], 1)
    x = torch.cat([x, -x])
    with use_kernels(kernels):
        packed, scales = quantize_e5m6(x.to(DEVICE))
    assert torch.equal(unpack(packed.cpu()).int() & 0xFFF, formats.encode(x, E5M6).int() & 0xFFF)
    assert torch.equal(scales.cpu(), torch.ones(1, len(x)))


@BOTH
@pytest.mark.parametrize("width", [1, 2, 7, 127, 128, 129, 256, 333, 5001])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_comes_back_is_e5m6_with_power_of_two_tiles(kernels, width, dtype):
    x = torch.randn(5, width) * torch.exp2(torch.randint(-30, 30, (5, 1)))
    x = (x / (2 ** 20 if dtype == torch.float16 else 1)).to(dtype)
    with use_kernels(kernels):
        packed, scales = quantize_e5m6(x.to(DEVICE))
        back, narrow = (dequantize_e5m6(packed, scales, width, to) for to in (torch.float32, torch.bfloat16))
        again = dequantize_e5m6(*quantize_e5m6(back), width, torch.float32)
    assert packed.dtype == torch.uint8 and packed.shape == (5, 3 * -(-width // 2))
    assert scales.shape == (-(-width // 128), 5) and torch.equal(octave(scales), scales)
    want = fake_quantize(x.float(), E5M6, pow2=True)
    assert torch.equal(back.cpu(), want) and torch.equal(again.cpu(), want)
    assert torch.equal(narrow.cpu().float(), want), "BF16 holds E5M6 exactly"


@BOTH
def test_bytes_that_do_not_begin_at_a_word(kernels):
    """Rows cut out of other memory, so that the kernel cannot read words, and columns of it."""
    packed, scales = quantize_e5m6(torch.randn(3, 256))
    want = dequantize_e5m6(packed, scales, 256)
    shifted = torch.cat([packed.new_zeros(1), packed.flatten()])[1:].view_as(packed)
    wider = torch.cat([packed, packed], 1)[:, :packed.shape[1]]
    with use_kernels(kernels):
        for same in (shifted, wider):
            assert torch.equal(dequantize_e5m6(same.to(DEVICE), scales.to(DEVICE), 256).cpu(), want)


def test_the_error_is_half_a_step_of_six_bits():
    x = torch.randn(64, 384)
    back = dequantize_e5m6(*quantize_e5m6(x), 384, torch.float32)
    assert ((back - x).abs() <= x.abs() * 2.0 ** -7 + 4 * 2.0 ** -36).all()     # |x| < 8, so scales are at most 2^-13


def test_a_value_takes_a_byte_and_a_half():
    packed, scales = quantize_e5m6(torch.randn(256, 16384, dtype=torch.bfloat16))
    assert (packed.nbytes, scales.nbytes) == (256 * 16384 * 3 // 2, 256 * 16384 // 32)


def test_the_other_axis_of_tiles_rounds_nothing_more():
    """Section 3.3.3: 1 x 128 tiles become 128 x 1 tiles in the backward pass. With powers of two as scales every value
    that is not below the new tile's normal numbers stays as it is; with exact scales most do not."""
    x = torch.rand(256, 128) + 0.5
    back = dequantize_e5m6(*quantize_e5m6(x), 128, torch.float32)
    assert torch.equal(fake_quantize(back, E5M6, (128, 1), pow2=True), back)
    exact = fake_quantize(x, E5M6)
    assert (fake_quantize(exact, E5M6, (128, 1)) != exact).float().mean() > 0.5


@BOTH
def test_zeros_and_what_is_not_finite(kernels):
    x = torch.zeros(3, 256)
    x[1, 3], x[2, 255] = float("inf"), float("-nan")
    with use_kernels(kernels):
        packed, scales = quantize_e5m6(x.to(DEVICE))
        back = dequantize_e5m6(packed, scales, 256).cpu()
    assert back[1, :128].isnan().all() and (back[0] == 0).all() and (back[1, 128:] == 0).all()
    assert (unpack(packed.cpu())[1, :128] == 0x7E0).all() and (unpack(packed.cpu())[2, 128:] == 0x7E0).all()


def test_refusals():
    packed, scales = quantize_e5m6(torch.ones(4, 5))
    with pytest.raises(ValueError, match=r"quantize_e5m6 got \[4\] torch.float32; it takes \[M, K\]"):
        quantize_e5m6(torch.ones(4))
    with pytest.raises(ValueError, match="torch.int32; it takes"):
        quantize_e5m6(torch.ones(4, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"7 codes of 12 bits are \[M, 12\]"):
        dequantize_e5m6(packed, scales, 7)
    with pytest.raises(ValueError, match="torch.int16"):
        dequantize_e5m6(packed.short(), scales, 5)
    with pytest.raises(ValueError, match=r"need \[1, 4\] in torch.float32"):
        dequantize_e5m6(packed, scales.T, 5)


@pytest.mark.parametrize("wrong", ["swapped", "truncated", "exact octaves"])
def test_these_tests_see_a_wrong_packing(wrong, monkeypatch):
    mutants = {
        "swapped": ("pack", lambda codes: pack(codes.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))),
        "truncated": ("encode", lambda x: encode(torch.nextafter(x, 0 * x))),
        "exact octaves": ("_octave", lambda x: x.abs()),
    }
    monkeypatch.setattr(e5m6, *mutants[wrong])
    x = torch.randn(5, 256) / 3
    x[:, ::3] = 1 + 1 / 128                 # halfway between two codes: the even one is below
    x[:, 1::3] = 1 + 3 / 128                # the even one is above
    back = dequantize_e5m6(*quantize_e5m6(x), 256, torch.float32)
    assert not torch.equal(back, fake_quantize(x, E5M6, pow2=True))
