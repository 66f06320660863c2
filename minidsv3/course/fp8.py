"""Chapter 04: numbers in eight bits, their scales, the three products of a linear layer, and promotion.

Formats and scales: report sections 3.3.1 and 3.3.2. What is cached in what: section 3.3.3. The answers are compared on
numbers that make everything but the question exact: whole numbers, and scales that are powers of two.
"""

import random
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..accumulate import accumulate, add_short
from ..formats import E4M3, decode, fake_quantize, round_to
from ..kernels import dequantize_blocks, quantize_columns, quantize_tiles
from ..kernels.quantize import FP8, TILE
from .exercise import Exercise, Mutants
from .kernels import (operands, product, scaled_after, with_one_scale_a_step, with_row_major_scales,
                      with_transposed_scales, without_nan)
from .mla import normal
from .predict import Option, Question


@dataclass(frozen=True, kw_only=True, repr=False)
class Codes(Exercise):
    """An exercise whose answers may be FP8 codes, and may be NaN: codes are compared as the numbers that they are."""

    def _results(self, function, seed):
        return {case: without_nan(widened(value)) for case, value in super()._results(function, seed).items()}


def widened(value):
    """Tensors of FP8 codes in FP32; a NaN as a tensor, in which it can be told from a number."""
    if isinstance(value, (tuple, list)):
        return [widened(part) for part in value]
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float64)
    return value.float() if isinstance(value, Tensor) and value.dtype == FP8 else value


# ---- 4.1 ------------------------------------------------------------------------------------------------------------


def decode_reference(code: int) -> float:
    return decode(torch.tensor(code), E4M3).item()


def decode_solution(code, bias=7, hidden=True, top=16):
    sign, field, mantissa = code >> 7, code >> 3 & 15, code & 7
    if field >= top:
        value = float("inf")
    elif field == 0 and hidden:
        value = mantissa / 8 * 2.0 ** (1 - bias)
    else:
        value = (1 + mantissa / 8) * 2.0 ** (field - bias)
    return -value if sign else value


decode_as_ieee = partial(decode_solution, top=15)
decode_with_bias_8 = partial(decode_solution, bias=8)
decode_subnormals_with_a_one = partial(decode_solution, hidden=False)


def decode_subnormals_with_field_0(code):
    value = decode_solution(code)
    return value if code >> 3 & 15 else value / 2


def decode_in_two_s_complement(code):
    return decode_solution(code) if code < 128 else -decode_solution(256 - code)


def bytes_to_read(source: random.Random) -> dict[str, tuple]:
    """Both signs of a number below the normal ones, of an ordinary one, and of one with the highest exponent."""
    fields = (0, source.randint(3, 11), 15)
    codes = [sign << 7 | field << 3 | source.randint(1, 6) for field in fields for sign in (0, 1)]
    return {f"the byte {code >> 7}_{code >> 3 & 15:04b}_{code & 7:03b}": (code,) for code in codes}


DECODE = Codes(
    id="4.1", title="What is a byte worth?", stars=1, minutes=15,
    why="a checkpoint of 671 billion of these bytes is read by whoever gets the exceptions right",
    statement="Return the value of one E4M3 byte, a whole number from 0 to 255: a sign bit, 4 bits of exponent field "
              "with bias 7, 3 bits of mantissa. (127 and 255, all bits set but for the sign, are NaN; you will not "
              "get them. Every other byte is a number.)",
    stub="""def value_of(code):
    \"\"\"code: 0 to 255, not 127 or 255. Returns a float.\"\"\"
    raise NotImplementedError
""",
    hints=("Cut the byte into three with `>>` and `&`. Two kinds of numbers: field 0, and all others.",
           "field > 0: (1 + m / 8) * 2 ** (field - 7), also for field 15. field 0: no leading 1, and the exponent of "
           "field 1: m / 8 * 2 ** -6."),
    reference=decode_reference, solution=decode_solution, cases=bytes_to_read,
    wrong={
        "as in IEEE": (decode_as_ieee,
            "The highest exponent is kept for infinity and NaN here, as IEEE formats do; the largest number would be "
            "240. E4M3 gives up infinity and goes to 448: only 127 and 255 are NaN."),
        "bias 8": (decode_with_bias_8, "Everything is half as large as it should be: the bias is 7, not 8."),
        "leading 1 below": (decode_subnormals_with_a_one,
            "Numbers with exponent field 0 have a leading 1 here. They have none: that is how zero becomes a number, "
            "and steps stay equal down to it."),
        "field 0 as exponent": (decode_subnormals_with_field_0,
            "Numbers with exponent field 0 are half as large as they should be. Their exponent is that of field 1, "
            "1 - 7, so that they go on where the normal ones end."),
        "two's complement": (decode_in_two_s_complement,
            "Bytes from 128 on are read as a two's complement here. Floating point has a sign bit: 128 + c is -c."),
    })


# ---- 4.2 ------------------------------------------------------------------------------------------------------------


def quantize_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes as FP32 numbers, so that they can be compared."""
    codes, scales = quantize_tiles(x)
    return codes.float(), scales


def quantize_solution(x, size=lambda tile: tile.abs().amax(-1), floor=1e-4):
    codes, scales = torch.zeros(x.shape).to(FP8), []
    for start in range(0, x.shape[1], 128):
        tile = x[:, start:start + 128]
        scales.append(size(tile).clamp(min=floor) / 448)
        codes[:, start:start + 128] = (tile / scales[-1][:, None]).to(FP8)
    return codes, torch.stack(scales)


def quantize_with_inverted_scale(x):
    codes, scales = quantize_solution(x)
    return codes, 1 / scales


quantize_by_largest = partial(quantize_solution, size=lambda tile: tile.amax(-1))
quantize_without_floor = partial(quantize_solution, floor=0.0)
quantize_with_floor_of_scale = partial(quantize_solution, floor=448e-4)


def quantize_along_tokens(x):
    codes, scales = quantize_columns(x)
    return codes.T, scales


def quantize_whole_rows(x):
    scales = x.abs().amax(1).clamp(min=1e-4) / 448
    return (x / scales[:, None]).to(FP8), scales.expand(-(-x.shape[1] // TILE), -1)


def quantize_with_scales_by_row(x):
    codes, scales = quantize_solution(x)
    return codes, scales.T


def dyadic(source: random.Random, rows: int, columns: int) -> Tensor:
    """Rows of different size. Every tile's largest magnitude is 7 2^n and negative, so all scales are powers of two."""
    x = torch.tensor([[source.randint(-96, 96) / 16 for _ in range(columns)] for _ in range(rows)])
    x[:, ::64] = -7.0
    return x * torch.exp2(torch.tensor([[float(source.randint(-6, 6))] for _ in range(rows)]))


def activations(source: random.Random) -> dict[str, tuple]:
    """More columns than rows, a last tile that is narrower, a tile of zeros."""
    cases = {"3 x 256": (dyadic(source, 3, 256),)}
    ragged = dyadic(source, 5, 128 + source.randint(40, 100))
    ragged[2, :128] = 0
    cases[f"5 x {ragged.shape[1]} with a tile of zeros"] = (ragged,)
    return cases


QUANTIZE = Codes(
    id="4.2", title="Quantise in 1 x 128 tiles", stars=2, minutes=20,
    why="it runs before every product, on every activation; a wrong one still trains, only worse",
    statement="Return codes `[M, K]` in `torch.float8_e4m3fn` and FP32 scales `[ceil(K / 128), M]`. Each token has a "
              "scale for each 128 of its channels (the last tile may be narrower): the largest magnitude, at least "
              "1e-4, over 448. The scale is what the codes are **multiplied** with to give x back.",
    stub="""def quantize(x):
    \"\"\"x [M, K] in FP32. Returns codes [M, K] and scales [ceil(K / 128), M].\"\"\"
    raise NotImplementedError
""",
    hints=("What does a tile of zeros do without the 1e-4? And a tile whose largest magnitude is negative?",
           "For each slice of 128 columns: `x[:, part].abs().amax(1).clamp(min=1e-4) / 448`, then "
           "`(x[:, part] / scale[:, None]).to(torch.float8_e4m3fn)`. Stack the scales: tiles first, tokens second."),
    reference=quantize_reference, solution=quantize_solution, cases=activations, tol=1e-12,
    wrong={
        "scale inverted": (quantize_with_inverted_scale,
            "This returns 448 / max, by which x was multiplied. The scale that is stored is the multiplier that "
            "brings x back, whatever `weight_scale_inv` is called."),
        "max for |max|": (quantize_by_largest,
            "The scale comes from the largest number, not from the largest magnitude. A large negative number then "
            "passes 448."),
        "along tokens": (quantize_along_tokens,
            "Your tiles run along tokens: 128 x 1. Activations go into the forward product in 1 x 128 tiles, along "
            "the channels that are summed."),
        "no floor": (quantize_without_floor,
            "A tile of zeros gets scale 0, and 0 / 0 is NaN. That is what the 1e-4 is for; the first public kernel "
            "had none."),
        "floor of the scale": (quantize_with_floor_of_scale,
            "Here the scale is at least 1e-4. The largest magnitude should be, before it is divided by 448."),
        "whole rows": (quantize_whole_rows, "Each token has one scale here. It needs one for each 128 channels."),
        "scales by row": (quantize_with_scales_by_row,
            "The scales are [M, K / 128] here. A product reads those of one step of K for many tokens side by side: "
            "[K / 128, M]."),
    })


# ---- 4.3 ------------------------------------------------------------------------------------------------------------


def product_solution(a, a_scales, b, b_scales):
    total = torch.zeros(len(a), len(b))
    for k in range(len(a_scales)):
        part = slice(128 * k, 128 * (k + 1))
        sums = a[:, part].float() @ b[:, part].float().T
        total += sums * a_scales[k][:, None] * b_scales[:, k].repeat_interleave(128)[:len(b)]
    return total


def product_without_scales_of_b(a, a_scales, b, b_scales):
    return product(a, a_scales, b, torch.ones_like(b_scales))


def scaled_codes(source: random.Random) -> dict[str, tuple]:
    """Several blocks of the weight both ways, and a last block of K that is narrower."""
    cases = {}
    for rows, columns, depth in ((6, source.randint(130, 170), 256 + 16 * source.randint(1, 6)), (9, 300, 384)):
        cases[f"{rows} x {columns} x {depth}"] = operands(source, rows, columns, depth, gap=0)
    return cases


PRODUCT = Exercise(
    id="4.3", title="A product of codes and scales", stars=2, minutes=25,
    why="the scales change along K, so they cannot wait for the end: this is why FP8 needed new kernels",
    statement="Return a b^T, `[M, N]` in FP32. `a` holds codes of activations `[M, K]` with scales `[ceil(K / 128), "
              "M]`, `b` codes of a weight `[N, K]` with scales `[ceil(N / 128), ceil(K / 128)]`. Multiply codes "
              "(`.float()` widens them), block by block of K. (Dequantising first gives the same numbers, and no "
              "product in FP8.)",
    stub="""def product(a, a_scales, b, b_scales):
    \"\"\"a [M, K] and b [N, K] in torch.float8_e4m3fn. Returns [M, N].\"\"\"
    raise NotImplementedError
""",
    hints=("How far along K may you add codes before the next scale begins?",
           "For block k: `sums = a[:, part].float() @ b[:, part].float().T`; times `a_scales[k][:, None]`; times the "
           "scales of b's rows, `b_scales[:, k].repeat_interleave(128)[:N]`; add to an FP32 total."),
    reference=product, solution=product_solution, cases=scaled_codes,
    wrong={
        "scale after the sum": (scaled_after,
            "One scale is applied to the whole sum. Each 128 of K has its own, so each partial sum must be scaled "
            "before it is added."),
        "scales of b transposed": (with_transposed_scales,
            "b_scales is read as [K / 128, N / 128]. Its rows belong to 128 rows of the weight."),
        "one scale a step": (with_one_scale_a_step, "All rows of b get the scale of the first 128 of them."),
        "scales of a by row": (with_row_major_scales, "a_scales is read as [M, K / 128]. It is [K / 128, M]."),
        "without the weight's": (product_without_scales_of_b, "The weight's scales are missing."),
    })


# ---- 4.4 ------------------------------------------------------------------------------------------------------------


def wgrad_reference(x: Tensor, dy: Tensor, sizes: list[int], tile=(TILE, 1)) -> Tensor:
    rounded = [(fake_quantize(expert, E4M3, tile), fake_quantize(slope, E4M3, tile))
               for expert, slope in zip(x.split(sizes), dy.split(sizes))]
    return torch.stack([slope.T @ expert for expert, slope in rounded])


def wgrad_solution(x, dy, sizes):
    gradients = torch.zeros(len(sizes), dy.shape[1], x.shape[1])
    end = 0
    for expert, size in enumerate(sizes):
        for start in range(end, end + size, 128):                   # 128 tokens of this expert, or what is left
            part = slice(start, min(start + 128, end + size))
            left, right = (fake_quantize(each[part], E4M3, (None, 1)) for each in (dy, x))
            gradients[expert] += left.T @ right
        end += size
    return gradients


wgrad_with_transposed_tiles = partial(wgrad_reference, tile=(1, TILE))
wgrad_with_a_scale_a_channel = partial(wgrad_reference, tile=(None, 1))
wgrad_with_blocks = partial(wgrad_reference, tile=(TILE, TILE))


def wgrad_across_experts(x, dy, sizes):
    x, dy = (fake_quantize(each, E4M3, (TILE, 1)) for each in (x, dy))
    return torch.stack([slope.T @ expert for expert, slope in zip(x.split(sizes), dy.split(sizes))])


def wgrad_of_x_alone(x, dy, sizes):
    rounded = [fake_quantize(expert, E4M3, (TILE, 1)) for expert in x.split(sizes)]
    return torch.stack([slope.T @ expert for expert, slope in zip(rounded, dy.split(sizes))]).mT


def routed_tokens(source: random.Random) -> dict[str, tuple]:
    """Experts with a hundred tokens, with two hundred, and with none; tokens of different size."""
    cases = {}
    for name, sizes in (("2 experts", [100 + source.randint(1, 20), 200 + source.randint(1, 40)]),
                        ("3 experts, one without tokens", [60 + source.randint(1, 9), 0, 150])):
        randn, tokens = normal(source), sum(sizes)
        spread = torch.exp2(3 * randn(tokens, 1)).float()
        cases[f"{name}, {sizes} tokens"] = randn(tokens, 24).float() * spread, randn(tokens, 16).float() / spread, sizes
    return cases


WGRAD = Exercise(
    id="4.4", title="Along which axis for the weight's gradient?", stars=3, minutes=30,
    why="the codes of the forward pass lie the wrong way here; reusing them runs, and is another gradient",
    statement="Return each expert's weight gradient dy^T x, `[experts, N, K]`, with both operands in E4M3. Rows are "
              "sorted by expert: the first `sizes[0]` belong to expert 0, and so on; an expert may have none. The "
              "scales must be 128 x 1: one for each channel and 128 **tokens of the same expert** (fewer at its end). "
              "`fake_quantize(x, E4M3, (rows, columns))` of `minidsv3.formats` returns x as it comes back from E4M3 "
              "with a scale for each tile.",
    stub="""def weight_gradients(x, dy, sizes):
    \"\"\"x [tokens, K] and dy [tokens, N] in FP32, sizes: tokens of each expert. Returns [experts, N, K].\"\"\"
    raise NotImplementedError
""",
    hints=("What is summed here, and where does one sum end? A scale can leave a sum only if it is the same for all "
           "its terms.",
           "Split x and dy by `sizes` first. Then `fake_quantize(.., E4M3, (128, 1))` of each piece starts a new tile "
           "with each expert, as padding to 128 does on a GPU. Then dy^T x, and stack."),
    reference=wgrad_reference, solution=wgrad_solution, cases=routed_tokens, tol=1e-5,
    wrong={
        "1 x 128 reused": (wgrad_with_transposed_tiles,
            "These are the tiles of the forward pass, 1 x 128, transposed. Their scale differs from token to token, "
            "and tokens are what is summed: no product of codes could apply it."),
        "tiles across experts": (wgrad_across_experts,
            "Tiles run across the border between two experts, so that one expert's numbers set another's scale. "
            "Every expert starts a tile of its own: its tokens are padded to the next 128."),
        "a scale a channel": (wgrad_with_a_scale_a_channel,
            "One scale a channel serves all tokens of an expert. It must begin anew every 128 tokens."),
        "128 x 128": (wgrad_with_blocks,
            "128 x 128 blocks are for weights. The report tried them for gradients of activations, and that run "
            "diverged (appendix B.2)."),
        "x alone": (wgrad_of_x_alone, "Only x was quantised, and the result is [experts, K, N]."),
    })


# ---- 4.5 ------------------------------------------------------------------------------------------------------------


def promote_reference(products: Tensor, every: int) -> Tensor:
    return accumulate(products, torch.ones(1, products.shape[1]), every)[:, 0]


def promote_solution(products, every, emptied=True, wide=True):
    total = short = torch.zeros(len(products))
    for start in range(0, products.shape[1], 32):
        short = add_short(short, products[:, start:start + 32])
        if (start + 32) % every == 0:
            total = total + short if wide else add_short(total, short[:, None])
            short = torch.zeros_like(short) if emptied else short
    return total + short


def promote_at_the_end(products, every):
    return promote_solution(products, products.shape[1] + 32)


promote_without_emptying = partial(promote_solution, emptied=False)
promote_into_a_short_sum = partial(promote_solution, wide=False)


def promote_without_the_rest(products, every):
    return promote_solution(products[:, :products.shape[1] // every * every], every)


def promote_in_fp32(products, every):
    return products.sum(1)


def long_sums(source: random.Random) -> dict[str, tuple]:
    """Products of two E4M3 numbers, all positive: sums grow, and what is added last finds no bits left."""
    cases = {}
    for every, length in ((128, 1024 + source.randint(40, 100)), (64, 640 + source.randint(33, 60))):
        a, b = (round_to(normal(source)(4, length).abs().float(), E4M3) for _ in range(2))
        cases[f"{length} products, promotion each {every}"] = a * b, every
    return cases


PROMOTE = Exercise(
    id="4.5", title="Promotion", stars=2, minutes=20,
    why="one line of a kernel decides whether a long sum keeps 14 bits or 24",
    statement="Return the sum of each row of `products`, as a tensor core with promotion adds it. The core takes 32 "
              "products at a time: `add_short(short, products)` of `minidsv3.accumulate` adds them to the short "
              "accumulator `short` and keeps 14 bits. After every `every` products the accumulator is added to a sum "
              "in FP32 (an ordinary `+`) and begins again at zero. What is left at the end is added as well.",
    stub="""def promoted(products, every):
    \"\"\"products [rows, K] in FP32, every: a multiple of 32. Returns [rows].\"\"\"
    raise NotImplementedError
""",
    hints=("Two sums live side by side, a short one and a wide one. What must happen to the short one when it is added "
           "to the wide one?",
           "For each 32: `short = add_short(short, products[:, start:start + 32])`. If `(start + 32) % every == 0`: "
           "`total = total + short`, `short = zeros`. Return `total + short`."),
    reference=promote_reference, solution=promote_solution, cases=long_sums,
    wrong={
        "not emptied": (promote_without_emptying,
            "The short accumulator goes on after it was added to the wide one, so everything is counted again and "
            "again. Empty it."),
        "at the end": (promote_at_the_end,
            "The accumulator is promoted once, at the end. By then it has lost what it had no bits for."),
        "into a short sum": (promote_into_a_short_sum,
            "The second sum is cut to 14 bits as well. It must be an ordinary FP32 sum."),
        "rest lost": (promote_without_the_rest,
            "What comes after the last promotion is lost: K need not be a multiple of `every`."),
        "FP32 throughout": (promote_in_fp32, "This adds everything in FP32. The tensor core does not."),
    })


# ---- 4.6 ------------------------------------------------------------------------------------------------------------


def rows_reference(codes: Tensor, scales: Tensor) -> Tensor:
    return dequantize_blocks(codes, scales)


def rows_solution(codes, scales, height=128):
    row, column = torch.arange(codes.shape[0]) // height, torch.arange(codes.shape[1]) // 128
    return codes.float() * scales[row][:, column]


def rows_in_equal_shares(codes, scales):
    return rows_solution(codes, scales, height=-(-codes.shape[0] // len(scales)))


def rows_in_whole_blocks(codes, scales):
    whole = codes.shape[0] // TILE
    row = (torch.arange(codes.shape[0]) // TILE).clamp(max=whole - 1)
    return codes.float() * scales[row][:, torch.arange(codes.shape[1]) // TILE]


def rows_divided(codes, scales):
    return rows_solution(codes, 1 / scales)


def rows_with_transposed_scales(codes, scales):
    return rows_solution(codes, scales.flatten().view(scales.T.shape).T)


def weights(source: random.Random) -> dict[str, tuple]:
    """The latent projection's 576 rows, and two blocks of which the second is half."""
    cases = {}
    for rows, columns in ((576, 200), (128 + source.choice((32, 64)), 128 + source.randint(10, 90))):
        codes, blocks = dyadic(source, rows, columns).clamp(-448, 448).to(FP8), (-(-rows // TILE), -(-columns // TILE))
        exponents = torch.tensor(source.sample(range(-6, 6), blocks[0] * blocks[1]))
        cases[f"{rows} x {columns}, scales {blocks[0]} x {blocks[1]}"] = codes, torch.exp2(exponents.view(blocks))
    return cases


ROWS = Exercise(
    id="4.6", title="The scales of 576 rows", stars=1, minutes=10,
    why="576 is the only height in the checkpoint that is no multiple of 128, and public loaders fell over it",
    statement="Return the weight in FP32: codes times their block's scale. Blocks are 128 x 128 from the upper left "
              "corner; those at the right and at the bottom may be smaller. `kv_a_proj_with_mqa` has 576 rows and 5 "
              "rows of scales.",
    stub="""def weight_of(codes, scales):
    \"\"\"codes [M, K] in torch.float8_e4m3fn, scales [ceil(M / 128), ceil(K / 128)].\"\"\"
    raise NotImplementedError
""",
    hints=("Which scale belongs to row 575?", "Row r belongs to block r // 128, column c to block c // 128: "
           "`codes.float() * scales[rows // 128][:, columns // 128]` with rows and columns from `torch.arange`."),
    reference=rows_reference, solution=rows_solution, cases=weights,
    wrong={
        "equal shares": (rows_in_equal_shares,
            "The height of a block is taken as rows / rows of scales: 576 / 5. It is 128, and the last block has the "
            "64 rows that are left. With 192 rows this mistake raises no error at all."),
        "four blocks": (rows_in_whole_blocks,
            "The rows after the last whole block get the scale before theirs. They have one of their own: 5, not 4."),
        "divided": (rows_divided, "The codes are divided by the scale. It is a multiplier, although its name in the "
                    "checkpoint is `weight_scale_inv`."),
        "scales transposed": (rows_with_transposed_scales, "The scales are read as [K / 128, M / 128]."),
    })


# ---- 4.7 ------------------------------------------------------------------------------------------------------------


def faulty_quantizer(x, *, size=lambda tile: tile.abs().amax(-1), floor=1e-4, cast=lambda x: x.to(FP8), width=TILE):
    """The quantiser in which one step can be exchanged for a wrong one."""
    codes, scales = torch.zeros(x.shape), []
    for start in range(0, x.shape[1], width):
        tile = x[:, start:start + width]
        scale = size(tile).clamp(min=floor) / 448
        scales.append(scale.where(tile.isfinite().all(1) | (size is finite_size), float("nan")))
        codes[:, start:start + width] = cast(tile / scales[-1][:, None]).float()
    return codes, torch.stack(scales)


def finite_size(tile: Tensor) -> Tensor:
    return tile.abs().where(tile.isfinite(), 0.0).amax(-1)


def cast_down(x: Tensor) -> Tensor:
    """Towards zero: the cast of a number a hair smaller than half a step less."""
    nearest = x.to(FP8).float()
    return torch.where(nearest.abs() > x.abs(), (x * 15 / 16).to(FP8).float(), nearest)


def by_row(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = faulty_quantizer(x)
    return codes, scales.T


def of_whole_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    codes, scales = faulty_quantizer(x, width=x.shape[1])
    return codes, scales.expand(-(-x.shape[1] // TILE), -1)


def quantizer_inputs(source: random.Random) -> dict[str, tuple]:
    """One input on which no two quantisers agree."""
    x = dyadic(source, 4, 300) * 1.01
    x[1, 128:256], x[3, 5] = 0, float("inf")
    return {"4 x 300, a tile of zeros, an infinity": (x,)}


def quantizer_test(quantize):
    torch.manual_seed(3)
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).float()            # all from 0 to 448
    x = torch.randn(5, 300) * torch.tensor([1, 10, 0.1, 3, 1])[:, None]
    x[:, ::50] = -4 * x[:, ::50].abs()
    x[2, 128:256], x[4, 7] = 0, float("inf")
    codes, scales = quantize(x)
    assert codes.shape == x.shape and scales.shape == (3, 5)
    for row in range(5):
        for tile in range(3):
            part = slice(128 * tile, 128 * (tile + 1))
            if not x[row, part].isfinite().all():
                assert codes[row, part].isnan().all() and scales[tile, row].isnan()
                continue
            scale = max(x[row, part].abs().max().item(), 1e-4) / 448
            assert abs(scales[tile, row].item() / scale - 1) < 1e-6
            exact = x[row, part] / scales[tile, row]
            distance = (numbers - exact.abs()[:, None]).abs()
            got = (codes[row, part] - exact).abs()
            assert (got <= distance.amin(1) * (1 + 1e-6)).all()


QUANTIZERS = Mutants(
    id="4.7", title="Kill the mutants: seven quantisers", stars=2, minutes=20,
    why="each of them trains a small model to a loss that looks right",
    statement="Write a test for `quantize(x)`, which returns codes as FP32 numbers `[M, K]` and scales "
              "`[ceil(K / 128), M]`, as in 4.2. A tile with an infinity or a NaN must come back as NaN, codes and "
              "scale, so that nobody takes it for numbers. The test runs against the package's quantiser, which it "
              "must spare, and against seven wrong ones, which it should kill.",
    stub="""def quantizer_test(quantize):
    \"\"\"Asserts that quantize(x) returns the right codes (in FP32) and scales.\"\"\"
    raise NotImplementedError
""",
    hints=("Which inputs hide a fault? Square ones, one tile a row, rows of equal size, a largest number that is "
           "positive, no zeros, no infinity.",
           "A few rows of different size and more than two tiles, the last one narrower; a negative maximum; a tile of "
           "zeros; an infinity. No code may be further from x / scale than the nearest number of the format: compare "
           "with all 127 of them."),
    reference=quantize_reference, solution=quantizer_test, cases=quantizer_inputs,
    wrong={
        "max for |max|": (partial(faulty_quantizer, size=lambda tile: tile.amax(-1)),
            "It takes the largest number of a tile: needs a tile whose largest magnitude is negative."),
        "no floor": (partial(faulty_quantizer, floor=0.0), "It divides 0 by 0: needs a tile of zeros."),
        "infinity lost": (partial(faulty_quantizer, size=finite_size),
            "It leaves infinity out of the maximum, and the cast makes 448 of it: needs an infinity."),
        "towards zero": (partial(faulty_quantizer, cast=cast_down),
            "It rounds towards zero: compare each code with its neighbours."),
        "whole rows": (of_whole_rows, "It has one scale for a row: needs tiles of different size in a row."),
        "tiles of 64": (lambda x: (faulty_quantizer(x, width=64)[0], faulty_quantizer(x, width=64)[1][::2]),
            "Its tiles are 64 wide: needs a tile whose halves have different maxima."),
        "scales by row": (by_row, "Its scales are [M, K / 128]: look at their shape."),
    })


EXERCISES = (DECODE, QUANTIZE, PRODUCT, WGRAD, PROMOTE, ROWS, QUANTIZERS)


# ---- questions ------------------------------------------------------------------------------------------------------


QUESTIONS = {
    "04.scale": Question(
        "A tensor of Gaussian numbers is stored in E4M3 with one scale. Somebody halves the scale. What happens to the "
        "relative error?",
        (Option("it halves: the steps are half as wide", "that is so for int8. In floating point the steps move with "
                "the numbers: three bits of mantissa before, three bits after."),
         Option("nearly nothing, until numbers leave the range", "scaling slides the numbers along the line of codes, "
                "and each octave has eight codes."),
         Option("it doubles", "the scale decides where on the line the numbers lie, and the line looks alike in every "
                "octave.")), 1),
    "04.outlier": Question(
        "One activation of a tensor is 1,000 times as large as the others. The tensor has one scale. What happens to "
        "the error of the **others**?",
        (Option("in int8 all is lost; in E4M3 nothing happens", "1,000 is 10 octaves, and E4M3 has 15 down to its "
                "smallest normal number. Section 4 measures it."),
         Option("all is lost in both formats", "that is the usual story of outliers, and it is int8's."),
         Option("nothing happens in either", "in int8 the others have a few steps left, or none.")), 0),
    "04.e5m2": Question(
        "Gradients have a wide range. Do they need E5M2, with its seven more octaves up and eight more down?",
        (Option("yes: range counts for gradients, and precision does not", "a scale for each small tile takes care of "
                "range. Then E5M2 only has half of the precision: 5.1 % error for 2.6 %."),
         Option("no, if every tile has a scale", "V3 takes E4M3 for all tensors (section 3.3.2)."),
         Option("yes, E4M3 would overflow", "a scale from the tile's own maximum cannot overflow.")), 1),
    "04.k": Question(
        "A product sums over K numbers in E4M3. What grows with K?",
        (Option("the relative error that comes from rounding the inputs", "errors are independent: the error and the "
                "sum both grow like the root of K."),
         Option("the error of an accumulator with 14 bits", "the longer the sum, the fewer of its bits are left for "
                "what is added. That is what promotion is for."),
         Option("both", "one of the two stays where it is: section 7 measures them apart.")), 1),
    "04.transpose": Question(
        "The forward pass has codes of x in 1 x 128 tiles. The weight's gradient needs x in 128 x 1 tiles. May one "
        "dequantise the codes and quantise them again?",
        (Option("yes, the second rounding finds numbers that are already rounded", "with another scale they lie "
                "between the codes again: nearly all of them change."),
         Option("no, never", "there is a kind of scale with which next to nothing changes."),
         Option("yes, if scales are powers of two", "dividing by another power of two moves a number by whole octaves, "
                "and its three bits stay. That is why the report rounds these scales.")), 2),
    "04.eight": Question(
        "\"DeepSeek-V3 was trained in 8 bits.\" How many bytes a parameter does training keep for weights, gradients "
        "and optimiser?",
        (Option("about 4: one byte for each of four things", "only the products read one byte. What is summed over "
                "thousands of steps cannot live in eight bits."),
         Option("about 13", "master weight 4, gradient 4, two moments of 2 in BF16, and the FP8 copy 1."),
         Option("about 16, as always: FP8 changes nothing", "16 is FP32 for all four; moments in BF16 save 4, and the "
                "copy for products costs 1 in FP8, where BF16's costs 2.")), 1),
}
