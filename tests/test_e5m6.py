"""Twelve bits in memory: what is packed comes back bit for bit, in a byte and a half a value."""

import pytest
import torch

from minidsv3 import e5m6
from minidsv3.e5m6 import dequantize_e5m6, pack, quantize_e5m6, unpack
from minidsv3.formats import E5M6, encode, fake_quantize, octave


@pytest.mark.parametrize("shift", [0, 1])
def test_every_code_in_both_places_comes_back(shift):
    codes = torch.arange(4096).roll(shift)
    assert torch.equal(unpack(pack(codes), 4096).long(), codes)


def test_bytes_by_hand():
    assert pack(torch.tensor([0xABC, 0x123])).tolist() == [0xAB, 0xC1, 0x23]
    assert pack(torch.tensor([[0xABC, 0x123, 0xFFF]])).tolist() == [[0xAB, 0xC1, 0x23, 0xFF, 0xF0, 0]]


@pytest.mark.parametrize("width", [1, 2, 7, 127, 128, 129, 256, 333])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_comes_back_is_e5m6_with_power_of_two_tiles(width, dtype):
    x = (torch.randn(5, width) * torch.exp2(torch.randint(-30, 30, (5, 1)))).to(dtype)
    packed, scales = quantize_e5m6(x)
    assert packed.dtype == torch.uint8 and packed.shape == (5, 3 * -(-width // 2))
    assert scales.shape == (-(-width // 128), 5) and torch.equal(octave(scales), scales)
    want = fake_quantize(x.float(), E5M6, pow2=True)
    assert torch.equal(dequantize_e5m6(packed, scales, width, torch.float32), want)
    assert torch.equal(dequantize_e5m6(packed, scales, width).float(), want), "BF16 holds E5M6 exactly"
    again = quantize_e5m6(dequantize_e5m6(packed, scales, width, torch.float32))
    assert torch.equal(dequantize_e5m6(*again, width, torch.float32), want)


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


def test_zeros_and_what_is_not_finite():
    x = torch.zeros(2, 256)
    x[1, 3] = float("inf")
    back = dequantize_e5m6(*quantize_e5m6(x), 256)
    assert back[1, :128].isnan().all() and (back[0] == 0).all() and (back[1, 128:] == 0).all()


def test_refusals():
    with pytest.raises(ValueError, match=r"quantize_e5m6 got \[4\]; it takes \[M, K\]"):
        quantize_e5m6(torch.ones(4))
    with pytest.raises(ValueError, match="5 codes of 12 bits are 9 bytes"):
        unpack(torch.zeros(6, dtype=torch.uint8), 5)
    with pytest.raises(ValueError, match="torch.int16"):
        unpack(torch.zeros(9, dtype=torch.int16), 5)


@pytest.mark.parametrize("wrong", ["swapped", "truncated", "exact scales"])
def test_these_tests_see_a_wrong_packing(wrong, monkeypatch):
    mutants = {
        "swapped": ("pack", lambda codes: pack(codes.unflatten(-1, (-1, 2)).flip(-1).flatten(-2))),
        "truncated": ("encode", lambda x, format: encode(torch.nextafter(x, 0 * x), format)),
        "exact scales": ("tile_scale", lambda amax, format, pow2: amax / format.largest),
    }
    monkeypatch.setattr(e5m6, *mutants[wrong])
    x = torch.randn(5, 256) / 3
    x[:, ::3] = 1 + 1 / 128                 # halfway between two codes: the even one is below
    x[:, 1::3] = 1 + 3 / 128                # the even one is above
    back = dequantize_e5m6(*quantize_e5m6(x), 256, torch.float32)
    assert not torch.equal(back, fake_quantize(x, E5M6, pow2=True))
