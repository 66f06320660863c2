"""Number formats: every code of each, torch's own FP8 casts, and rounding against the nearest neighbour by hand."""

import pytest
import torch

from minidsv3 import formats
from minidsv3.formats import E4M3, E5M2, E5M6, INT8, Format, decode, encode, fake_quantize, octave, round_to, tile_scale
from minidsv3.kernels import dequantize_blocks, quantize_blocks, quantize_columns, quantize_tiles
from minidsv3.kernels.fp8_gemm import dequantize_tiles

FORMATS = pytest.mark.parametrize("format", [E4M3, E5M2, E5M6, INT8], ids=lambda format: format.name)
TORCH = pytest.mark.parametrize("format, dtype", [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)],
                                ids=["E4M3", "E5M2"])


def codes_of(format: Format) -> torch.Tensor:
    return torch.arange(2 ** format.bits)


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal numbers, signs of zero and places of NaN."""
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(
        *(torch.where(x.isnan(), 0.0, x).double().view(torch.int64) for x in (got, want)))


# ---- every code ---------------------------------------------------------------------------------------------------

@TORCH
def test_codes_are_worth_what_torch_says(format, dtype):
    codes = codes_of(format)
    assert same_bits(decode(codes, format), codes.to(torch.uint8).view(dtype).double())


def test_e5m6_is_the_first_12_bits_of_fp16():
    codes = codes_of(E5M6)
    assert same_bits(decode(codes, E5M6), (codes << 4).to(torch.int16).view(torch.float16).double())


def test_codes_by_hand():
    """Sign, exponent field, mantissa field."""
    def worth(format, *fields):
        return decode(torch.tensor([int("".join(fields), 2)]), format).item()
    assert worth(E4M3, "0", "0111", "000") == 1 and worth(E4M3, "1", "1000", "100") == -3
    assert worth(E4M3, "0", "1111", "110") == 448 and worth(E4M3, "0", "0000", "001") == 2 ** -9
    assert worth(E5M2, "0", "11110", "11") == 57344 and worth(E5M2, "1", "11111", "00") == float("-inf")
    assert worth(E5M6, "0", "11110", "111111") == 65024 and worth(E5M6, "0", "00000", "000001") == 2 ** -20
    assert worth(E5M6, "0", "01111", "000001") == 1 + 1 / 64 and worth(INT8, "1", "1111111") == -127


@FORMATS
def test_the_code_of_a_codes_value_is_the_code(format):
    codes = codes_of(format)
    values = decode(codes, format)
    numbers = ~values.isnan()
    assert torch.equal(encode(values, format)[numbers].long(), codes[numbers])
    assert decode(encode(values, format), format).isnan().equal(~numbers)
    assert same_bits(round_to(values, format), values)
    if format is not INT8:
        assert numbers.sum() == 2 ** format.bits - {"E4M3": 2, "E5M2": 6, "E5M6": 126}[format.name]


@FORMATS
def test_what_a_format_says_of_itself(format):
    values = decode(codes_of(format)[:2 ** (format.bits - 1)], format)
    numbers = values[values.isfinite()]
    assert numbers.max() == format.largest == numbers[-1] and format.largest_code == len(numbers) - 1
    assert numbers[1] == format.smallest
    assert format is INT8 or format.smallest_normal in numbers and (numbers < format.smallest_normal).sum() == (
        2 ** format.mantissa_bits)


# ---- rounding -----------------------------------------------------------------------------------------------------

def grid(format: Format) -> torch.Tensor:
    """Between all neighbours, up to the largest number: quarters, the middle, and the doubles on its sides."""
    numbers = decode(codes_of(format)[:format.largest_code + 1], format)
    low, high = numbers[:-1], numbers[1:]
    middle = (low + high) / 2
    inside = [low, low + (high - low) / 4, torch.nextafter(middle, low), middle, torch.nextafter(middle, high),
              low + (high - low) * 3 / 4, high]
    positive = torch.cat(inside)
    return torch.cat([positive, -positive])


def nearest_codes(x: torch.Tensor, format: Format) -> torch.Tensor:
    """By trying all numbers; of two that are equally near, the one whose last bit is 0."""
    codes = codes_of(format)[:format.largest_code + 1]
    numbers = decode(codes, format)
    found = []
    for part in x.abs().split(512):
        distance = (numbers - part[:, None]).abs()
        ties = distance == distance.amin(1, keepdim=True)
        found.append((ties * (4 - codes % 2)).argmax(1))     # an even code beats an odd one
    return torch.cat(found) + (x.signbit().long() << format.bits - 1)


@FORMATS
def test_rounding_is_to_nearest_even(format):
    x = grid(format)
    want = nearest_codes(x, format)
    assert torch.equal(encode(x, format).long(), want)
    assert same_bits(round_to(x, format), decode(want, format))


@FORMATS
def test_half_of_the_smallest_number_becomes_zero(format):
    half = torch.tensor([format.smallest / 2], dtype=torch.float64)
    x = torch.cat([half, torch.nextafter(half, 2 * half), -half, 3 * half])
    assert same_bits(round_to(x, format), torch.tensor([0, 1, -0.0, 2]).double() * format.smallest)


@TORCH
def test_rounding_is_torchs(format, dtype):
    x = torch.cat([torch.randn(20000) * torch.exp2(torch.randint(-20, 9, (20000,))), torch.randn(2000) * 1e-9])
    x = x.clamp(-format.largest, format.largest)
    want = x.to(dtype)
    assert torch.equal(encode(x, format).to(torch.uint8), want.view(torch.uint8))
    assert torch.equal(round_to(x, format), want.float())


def test_rounding_e5m6_is_that_of_fp16_cut_by_four_bits():
    """Adding half of the last kept bit, minus one bit where that is even, carries as rounding to nearest even does."""
    x = torch.arange(0x7BE0, dtype=torch.int32)            # every FP16 number that rounds to no more than 65024
    rounded = (x + 7 + (x >> 4 & 1)) >> 4
    assert torch.equal(encode(x.short().view(torch.float16), E5M6).int(), rounded)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_inputs_round_as_doubles_do(format, dtype):
    x = (torch.randn(5000) * torch.exp2(torch.randint(-16, 9, (5000,)))).to(dtype)
    want = round_to(x.double(), format)
    assert round_to(x, format).dtype == dtype
    assert torch.equal(round_to(x, format).double(), want)
    assert torch.equal(encode(x, format), encode(x.double(), format))


@FORMATS
def test_what_overflows_and_what_is_no_number(format):
    inf, nan, largest = float("inf"), float("nan"), format.largest
    x = torch.tensor([1.01 * largest, -3e38, inf, -inf, nan])
    kept = (inf, -inf) if format.top == "ieee" else (nan, nan)
    assert same_bits(round_to(x, format), torch.tensor([largest, -largest, *kept, nan]).float())
    if format.top != "numbers":
        assert same_bits(decode(encode(x, format), format), torch.tensor([largest, -largest, *kept, nan]).float())


def test_octaves_are_exact():
    x = torch.tensor([1.0, 1.999, 2.0, -3.0, 0.0, 1e-30, float("inf")])
    assert octave(x).tolist() == [1, 1, 2, 2, 0, 2.0 ** -100, float("inf")]
    assert octave(torch.nextafter(torch.tensor(8.0).double(), torch.tensor(0.0).double())) == 4


def test_strides_and_gradients():
    x = torch.randn(6, 8, requires_grad=True)
    assert torch.equal(round_to(x.T, E4M3), round_to(x.T.contiguous(), E4M3))
    assert not any(y.requires_grad for y in (round_to(x, E4M3), encode(x, E4M3), fake_quantize(x, E4M3)))


@pytest.mark.parametrize("wrong", ["bias", "mantissa", "floor"])
def test_these_tests_see_a_wrong_format(wrong, monkeypatch):
    if wrong == "floor":
        monkeypatch.setattr(torch.Tensor, "round", torch.Tensor.trunc)
        format = E4M3
    else:
        format = Format("E4M3", 4, 3, 8, "fn") if wrong == "bias" else Format("E4M3", 3, 4, 7, "fn")
    codes = codes_of(E4M3)
    with pytest.raises(AssertionError):
        assert same_bits(decode(codes, format), codes.to(torch.uint8).view(torch.float8_e4m3fn).double())
        assert same_bits(round_to(grid(E4M3), E4M3), decode(nearest_codes(grid(E4M3), E4M3), E4M3))


# ---- scales -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pow2", [False, True])
def test_tiles_are_those_of_the_kernels(pow2):
    x = torch.randn(200, 330) * torch.exp2(torch.randint(-9, 9, (200, 1)))
    x[3, 128:256] = 0
    codes, scales = quantize_tiles(x, pow2)
    assert torch.equal(fake_quantize(x, E4M3, (1, 128), pow2), dequantize_tiles(codes, scales))
    codes, scales = quantize_columns(x, pow2)
    assert torch.equal(fake_quantize(x, E4M3, (128, 1), pow2), dequantize_tiles(codes, scales).T)
    codes, scales = quantize_blocks(x, pow2)
    assert torch.equal(fake_quantize(x, E4M3, (128, 128), pow2), dequantize_blocks(codes, scales))


def test_one_scale_for_a_row_and_for_a_matrix():
    x = torch.tensor([[448.0, 3.3, 1.0], [4480.0, 33.0, 10.0]])
    assert fake_quantize(x, E4M3, (1, None)).tolist() == [[448, 3.25, 1], [4480, 32.5, 10]]
    assert fake_quantize(x, E4M3, (None, None)).tolist() == [[440, 3.4375, 1.015625], [4480, 32.5, 10]]
    experts = torch.stack([x, 10 * x])
    assert torch.equal(fake_quantize(experts, E4M3, (None, None))[1], fake_quantize(10 * x, E4M3, (None, None)))
    for empty in (x[:0], x[:, :0]):
        assert all(fake_quantize(empty, E4M3, tile).shape == empty.shape for tile in ((1, 128), (128, 1), (None, 1)))


@FORMATS
def test_scales_fill_the_format(format):
    amax = torch.tensor([format.largest, 2 * format.largest, 1.5 * format.largest, 0.0, float("inf"), float("nan")])
    least = torch.tensor(1e-4) / format.largest
    scales = tile_scale(amax, format)
    assert scales[:3].tolist() == [1, 2, 1.5] and scales[3] == least and scales[4:].isnan().all()
    rounded = tile_scale(amax, format, pow2=True)
    assert rounded[:3].tolist() == [1, 2, 2] and least <= rounded[3] < 2 * least and rounded[4:].isnan().all()
    assert torch.equal(octave(rounded[:4]), rounded[:4])


def test_a_tile_with_inf_comes_back_as_nan_and_the_others_do_not():
    x = torch.ones(2, 256)
    x[1, 200] = float("inf")
    back = fake_quantize(x, E5M2)
    assert back[1, 128:].isnan().all() and torch.equal(back[:, :128], x[:, :128]) and torch.equal(back[0], x[0])


@pytest.mark.parametrize("wrong", ["axis", "inverted"])
def test_these_tests_see_wrong_scales(wrong, monkeypatch):
    right = formats.tile_scale
    if wrong == "inverted":
        monkeypatch.setattr(formats, "tile_scale", lambda *arguments: 1 / right(*arguments))
    tile = (128, 1) if wrong == "axis" else (1, 128)
    x = torch.randn(200, 330)
    assert not torch.equal(fake_quantize(x, E4M3, tile), dequantize_tiles(*quantize_tiles(x)))
