"""Chapter 05: kernels, from one block of a row to the FP8 product in tiles.

Tiles, scales and promotion: report section 3.3. The answers to 5.1 to 5.4 launch a Triton kernel of the reader's; what
lies round its output in memory is compared as well.
"""

import random
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..kernels import fp8_gemm_reference, quantize_tiles, rms_norm_reference
from ..kernels.backend import INTERPRETED, tl, triton
from ..kernels.quantize import FP8, TILE
from .exercise import Exercise, Mutants
from .mla import normal
from .predict import Option, Question

DEVICE = "cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda"
MARGIN = 4096           # numbers before and behind a buffer
NOBODY, UNWRITTEN = 1000.0, -77.0


def buffer(values: Tensor, gap: int = 0) -> Tensor:
    """`values` [.., width] amid memory that belongs to nobody; `gap` of its numbers lie between two rows."""
    rows = values.reshape(-1, values.shape[-1])
    stride = rows.shape[1] + gap
    memory = torch.full((2 * MARGIN + len(rows) * stride,), NOBODY, dtype=torch.float32).to(values.dtype)
    place = memory.as_strided(rows.shape, (stride, 1), MARGIN)
    place.copy_(rows)
    there = memory.to(DEVICE).as_strided(rows.shape, (stride, 1), MARGIN)
    return there if values.dim() > 1 else there[0]


def room(*shape: int) -> Tensor:
    """A buffer for an answer in FP32."""
    return buffer(torch.full(shape, UNWRITTEN))


def memory_round(out: Tensor) -> Tensor:
    """Everything in the memory of `out` that is not `out`."""
    memory = out.new_empty(0).set_(out.untyped_storage())
    outside = torch.ones(len(memory), dtype=torch.bool, device=out.device)
    outside.as_strided(out.shape, out.stride(), out.storage_offset()).fill_(False)
    return memory[outside]


@dataclass(frozen=True, kw_only=True, repr=False)
class Puzzle(Exercise):
    """An exercise whose answer writes to the last `outputs` of its arguments with a kernel, and returns them."""

    outputs: int = 1

    def _results(self, function, seed):
        results = {}
        for case, arguments in self.cases(random.Random(f"{self.id} {seed}")).items():
            with np.errstate(all="ignore"):     # where a GPU is silent, the interpreter's numpy would warn
                returned = function(*arguments)
            results[case] = {"result": without_nan(returned), "memory round the output":
                             [memory_round(out) for out in arguments[-self.outputs:]]}
        return results


def without_nan(value):
    """NaN agrees with nothing, not even with the listed answer that has it too; infinity does."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    return [without_nan(part) for part in value] if isinstance(value, (tuple, list)) else value


def puzzle_text(task: str, shapes: str, grid: str, program: str, definition: str) -> str:
    """The statement of a puzzle, always in the same four lines."""
    return (f"{task} Write a kernel and the function that launches it.\n\n"
            f"- **shapes:** {shapes}\n- **grid:** {grid}\n- **one program:** {program}\n"
            f"- **definition:** `{definition}`")


# ---- 5.1 ------------------------------------------------------------------------------------------------------------


def add_reference(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    return out.copy_(x + y)


def add_solution(x, y, out):
    @triton.jit
    def kernel(X, Y, OUT, n, BLOCK: tl.constexpr):
        offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = offset < n
        total = tl.load(X + offset, mask=inside) + tl.load(Y + offset, mask=inside)
        tl.store(OUT + offset, total, mask=inside)

    kernel[(triton.cdiv(len(x), 16),)](x, y, out, len(x), BLOCK=16)
    return out


@triton.jit
def _faulty_add(X, Y, OUT, n, BLOCK: tl.constexpr, STEP: tl.constexpr, MASKED: tl.constexpr):
    offset = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    inside = offset < n
    if not MASKED:
        inside = offset >= 0
    tl.store(OUT + offset, tl.load(X + offset, mask=inside) + tl.load(Y + offset, mask=inside), mask=inside)


def faulty_add(x, y, out, *, blocks=lambda n: -(-n // 16), step=16, masked=True):
    """Addition in blocks of 16 in which one step can be exchanged for a wrong one."""
    if programs := blocks(len(x)):
        _faulty_add[(programs,)](x, y, out, len(x), 16, step, masked)
    return out


def vectors(source: random.Random) -> dict[str, tuple]:
    """Lengths that fill their last block, fill a part of it, and fill not even one."""
    randn = normal(source)
    return {f"{n} numbers": (buffer(randn(n).float()), buffer(randn(n).float()), room(n))
            for n in (source.randint(3, 11), 32, source.randint(34, 46))}


ADD = Puzzle(
    id="5.1", title="Add with a mask", stars=1, minutes=15,
    why="every kernel begins with these three lines: which block is mine, which part of it exists, read, write",
    statement=puzzle_text(
        "Add two vectors, in blocks of 16.", "x, y and out are [n] in FP32; n is any number.",
        "1-D, one program for each block of 16 neighbours.", "reads its block of x and of y, writes its block of out.",
        "out = x + y"),
    stub="""def add(x, y, out):
    \"\"\"Launches your kernel, which writes x + y to out; returns out.\"\"\"
    raise NotImplementedError
""",
    hints=("A program knows one number: `tl.program_id(0)`. Which 16 offsets follow from it, and which of them exist?",
           "offset = program * 16 + tl.arange(0, 16); a mask offset < n on both loads and on the store; "
           "triton.cdiv(n, 16) programs."),
    reference=add_reference, solution=add_solution, cases=vectors,
    wrong={
        "no mask": (partial(faulty_add, masked=False), "The last block goes past the end, and you wrote there: to "
                    "memory that belongs to somebody else. On a GPU nobody tells you."),
        "a multiple assumed": (partial(faulty_add, blocks=lambda n: n // 16), "The number of programs is rounded down: "
                               "what does not fill a block is never added. Round up, and mask."),
        "program for block": (partial(faulty_add, step=1), "Your blocks begin at program_id, so they overlap and do "
                              "not reach the end. Block p begins at p * 16."),
        "one program": (partial(faulty_add, blocks=lambda n: 1), "Only one program runs. The grid must have one for "
                        "each block."),
    })


# ---- 5.2 ------------------------------------------------------------------------------------------------------------


def norm_reference(x: Tensor, gain: Tensor, eps: float, out: Tensor) -> Tensor:
    return out.copy_(rms_norm_reference(x, gain, eps))


def norm_solution(x, gain, eps, out):
    @triton.jit
    def kernel(X, GAIN, OUT, stride, eps, N: tl.constexpr, BLOCK: tl.constexpr):
        row, column = tl.program_id(0), tl.arange(0, BLOCK)
        inside = column < N
        x = tl.load(X + row * stride + column, mask=inside, other=0.0)
        gain = tl.load(GAIN + column, mask=inside, other=0.0)
        r = 1 / tl.sqrt(tl.sum(x * x) / N + eps)
        tl.store(OUT + row * N + column, x * r * gain, mask=inside)

    rows, n = x.shape
    kernel[(rows,)](x, gain, out, x.stride(0), eps, N=n, BLOCK=triton.next_power_of_2(n))
    return out


@triton.jit
def _faulty_norm(X, GAIN, OUT, stride, eps, N: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
                 READ: tl.constexpr, INSIDE: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + column, mask=column < READ, other=0.0)
    gain = tl.load(GAIN + column, mask=column < N, other=0.0)
    mean = tl.sum(x * x) / COUNT
    r = 1 / tl.sqrt(mean + eps)
    if not INSIDE:
        r = 1 / (tl.sqrt(mean) + eps)
    tl.store(OUT + row * N + column, x * r * gain, mask=column < N)


def faulty_norm(x, gain, eps, out, *, over_block=False, read_block=False, eps_inside=True, contiguous=False):
    """RMSNorm of rows in which one step can be exchanged for a wrong one."""
    rows, n = x.shape
    block = triton.next_power_of_2(n)
    _faulty_norm[(rows,)](x, gain, out, n if contiguous else x.stride(0), eps, n, block, block if over_block else n,
                          block if read_block else n, eps_inside)
    return out


def norm_rows(source: random.Random) -> dict[str, tuple]:
    """Widths that fill no block, rows with a gap between them, an eps that shows."""
    randn, cases = normal(source), {}
    for rows, n in ((1, source.randint(5, 7)), (4, source.randint(18, 30))):
        gap = source.randint(2, 9)
        cases[f"{rows} x {n}, rows {n + gap} apart"] = (
            buffer(0.3 * randn(rows, n).float(), gap), buffer(1 + 0.3 * randn(n).float()), 0.05, room(rows, n))
    return cases


NORM = Puzzle(
    id="5.2", title="RMSNorm of a row", stars=2, minutes=25,
    why="a row in one program, one read, one write: nine tenths of the traffic of the eager version are gone",
    statement=puzzle_text(
        "Normalise rows. They may lie further apart than they are long: `x.stride(0)` numbers from one to the next.",
        "x [rows, n] in FP32, its rows `x.stride(0)` apart; gain [n]; out [rows, n], contiguous; eps is a float.",
        "1-D, one program for each row.", "reads its row of x once and all of gain, writes its row of out.",
        "out = x / sqrt(mean(x^2) + eps) * gain"),
    stub="""def norm(x, gain, eps, out):
    \"\"\"Launches your kernel, which writes the normed rows of x to out; returns out.\"\"\"
    raise NotImplementedError
""",
    hints=("A block's length is a power of two, a row's is not. What do the lanes behind the row hold, and what do "
           "they do to the sum?",
           "BLOCK = triton.next_power_of_2(n), loads with mask=column < n and other=0.0; tl.sum(x * x) / n, not / "
           "BLOCK; eps under the root; rows begin at row * stride for x and at row * n for out."),
    reference=norm_reference, solution=norm_solution, cases=norm_rows, tol=1e-5,
    wrong={
        "mean over the block": (partial(faulty_norm, over_block=True), "The sum is divided by the length of the block. "
                                "The mean is over the n numbers of the row; the rest of the block is padding."),
        "eps outside": (partial(faulty_norm, eps_inside=False), "eps is added to the root here. It belongs under it."),
        "no mask": (partial(faulty_norm, read_block=True), "The load has no mask, so the sum has the squares of what "
                    "lies behind the row in memory."),
        "stride": (partial(faulty_norm, contiguous=True), "Row r is read at r * n, as if rows touched each other. They "
                   "are `x.stride(0)` apart."),
    })


# ---- 5.3 ------------------------------------------------------------------------------------------------------------


def scale_reference(x: Tensor, out: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    found = quantize_tiles(x)[1]
    spread = found.repeat_interleave(TILE, 0)[:x.shape[1]].T
    return out.copy_(x / spread), scales.copy_(found)


def scale_solution(x, out, scales):
    @triton.jit
    def kernel(X, OUT, SCALES, rows, width, TILE: tl.constexpr):
        row, tile = tl.program_id(0), tl.program_id(1)
        column = tile * TILE + tl.arange(0, TILE)
        inside = column < width
        x = tl.load(X + row * width + column, mask=inside, other=0.0)
        scale = tl.maximum(tl.max(tl.abs(x)), 1e-4) / 448
        tl.store(OUT + row * width + column, x / scale, mask=inside)
        tl.store(SCALES + tile * rows + row, scale)

    kernel[(len(x), len(scales))](x, out, scales, *x.shape, TILE=128)
    return out, scales


@triton.jit
def _faulty_scale(X, OUT, SCALES, rows, width, TILE: tl.constexpr, FLOOR: tl.constexpr, MAGNITUDE: tl.constexpr,
                  INVERTED: tl.constexpr, BY_ROW: tl.constexpr):
    row, tile = tl.program_id(0), tl.program_id(1)
    column = tile * TILE + tl.arange(0, TILE)
    inside = column < width
    x = tl.load(X + row * width + column, mask=inside, other=0.0)
    size = x
    if MAGNITUDE:
        size = tl.abs(x)
    scale = tl.maximum(tl.max(size), FLOOR) / 448
    tl.store(OUT + row * width + column, x / scale, mask=inside)
    if INVERTED:
        scale = 1 / scale
    at = tile * rows + row
    if BY_ROW:
        at = row * tl.num_programs(1) + tile
    tl.store(SCALES + at, scale)


def faulty_scale(x, out, scales, *, floor=1e-4, magnitude=True, inverted=False, by_row=False):
    """Scaling of 1 x 128 tiles in which one step can be exchanged for a wrong one."""
    _faulty_scale[(len(x), len(scales))](x, out, scales, *x.shape, TILE, floor, magnitude, inverted, by_row)
    return out, scales


def tiled_rows(source: random.Random) -> dict[str, tuple]:
    """A last tile that is narrower, rows of different size with the largest number negative, and a tile of zeros."""
    randn, cases = normal(source), {}
    for name, rows, width in (("uneven rows", 3, 128 + source.randint(1, 100)), ("a tile of zeros", 2, 384)):
        x = torch.exp2(torch.arange(-3.0, rows - 3))[:, None] * randn(rows, width).float()
        x[:, ::7] = -3 * x[:, ::7].abs()
        if name == "a tile of zeros":
            x[1, 128:256] = 0
        cases[f"{name}, {rows} x {width}"] = buffer(x), room(rows, width), room(-(-width // TILE), rows)
    return cases


SCALE = Puzzle(
    id="5.3", title="Scale tiles, up to the cast", stars=2, minutes=30, outputs=2,
    why="each of the three products of an FP8 linear starts with this; a scale in the wrong place is a wrong model",
    statement=puzzle_text(
        "Scale each 1 x 128 tile so that its largest magnitude becomes 448, the largest E4M3 value. (The cast itself "
        "is left out, so that the comparison stays simple.) A tile of zeros must stay zeros.",
        "x [M, K] in FP32, contiguous; K is any number; out [M, K]; scales [ceil(K / 128), M], **not** [M, K / 128].",
        "2-D, (M, ceil(K / 128)): one program for each tile.",
        "reads up to 128 numbers of one row, writes as many to out, and one scale.",
        "scale = max(max |x| of the tile, 1e-4) / 448;  out = x / scale"),
    stub="""def scale_tiles(x, out, scales):
    \"\"\"Launches your kernel, which fills out and scales; returns both.\"\"\"
    raise NotImplementedError
""",
    hints=("The scale multiplies codes to give numbers back. What happens to a tile of zeros without the 1e-4?",
           "row = tl.program_id(0), tile = tl.program_id(1); tl.max(tl.abs(x)) over the masked tile; the scale of this "
           "tile goes to tile * M + row: scales of one k-step lie side by side for all rows."),
    reference=scale_reference, solution=scale_solution, cases=tiled_rows, tol=1e-5,
    wrong={
        "no floor": (partial(faulty_scale, floor=0.0), "A tile of zeros has scale 0 here, and 0 / 0 is no number. The "
                     "floor of 1e-4 is there for it; the first public kernel did not have it."),
        "scales by row": (partial(faulty_scale, by_row=True), "The scales are written as [M, K / 128]. A product that "
                          "takes many rows at one k-step reads them as [K / 128, M], neighbours side by side."),
        "max for |max|": (partial(faulty_scale, magnitude=False), "This takes the largest number. The largest "
                          "*magnitude* may be a negative one, which then leaves the range."),
        "scale inverted": (partial(faulty_scale, inverted=True), "This stores 448 / max, the factor that was applied. "
                           "The stored scale is the multiplier that brings numbers back, although the checkpoint calls "
                           "it `weight_scale_inv`."),
    })


# ---- 5.4 ------------------------------------------------------------------------------------------------------------


product = partial(fp8_gemm_reference, out_dtype=torch.float32)


def gemm_reference(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out: Tensor) -> Tensor:
    return out.copy_(product(a, a_scales, b, b_scales))


def gemm_solution(a, a_scales, b, b_scales, out):
    @triton.jit
    def kernel(A, AS, B, BS, OUT, M, N, K, a_row, b_row, TILE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
        m = tl.program_id(0) * BM + tl.arange(0, BM)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        blocks = tl.cdiv(K, TILE)
        total = tl.zeros((BM, BN), tl.float32)
        for block in range(blocks):
            k = block * TILE + tl.arange(0, TILE)
            a = tl.load(A + m[:, None] * a_row + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
            b = tl.load(B + n[:, None] * b_row + k[None, :], mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
            a_scale = tl.load(AS + block * M + m, mask=m < M, other=0.0)
            b_scale = tl.load(BS + n // TILE * blocks + block, mask=n < N, other=0.0)
            total += tl.dot(a, b.T) * a_scale[:, None] * b_scale[None, :]
        tl.store(OUT + m[:, None] * N + n[None, :], total, mask=(m < M)[:, None] & (n < N)[None, :])

    (rows, depth), columns = a.shape, len(b)
    grid = triton.cdiv(rows, 16), triton.cdiv(columns, 64)
    kernel[grid](a, a_scales, b, b_scales, out, rows, columns, depth, a.stride(0), b.stride(0), TILE=128, BM=16, BN=64)
    return out


def _blockwise(a, a_scales, b, b_scales, *, blocks=None, a_scale=None, b_scale=None):
    """The product block by block of K; a_scale(k) [M] and b_scale(k) [N] say which scales are applied."""
    codes = [x.double() for x in (a, b)]
    columns = torch.arange(len(b), device=b.device) // TILE
    total = 0
    for k in range(len(a_scales) if blocks is None else blocks):
        part = slice(k * TILE, (k + 1) * TILE)
        left = a_scale(k) if a_scale else a_scales[k]
        right = b_scale(k) if b_scale else b_scales[columns, k]
        total = total + (codes[0][:, part] @ codes[1][:, part].T) * left[:, None].double() * right.double()
    return total.float()


def scaled_after(a, a_scales, b, b_scales, block=0):
    columns = torch.arange(len(b), device=b.device) // TILE
    return _blockwise(a, a_scales, b, b_scales, a_scale=lambda k: a_scales[block],
                      b_scale=lambda k: b_scales[columns, block])


def with_transposed_scales(a, a_scales, b, b_scales):
    columns = torch.arange(len(b), device=b.device) // TILE
    as_written = b_scales.flatten().view(b_scales.T.shape)
    return _blockwise(a, a_scales, b, b_scales, b_scale=lambda k: as_written[k, columns])


def with_row_major_scales(a, a_scales, b, b_scales):
    as_written = a_scales.flatten().view(a_scales.T.shape)
    return _blockwise(a, a_scales, b, b_scales, a_scale=lambda k: as_written[:, k])


def with_one_scale_a_step(a, a_scales, b, b_scales):
    return _blockwise(a, a_scales, b, b_scales, b_scale=lambda k: b_scales[0, k].expand(len(b)))


def without_last_block(a, a_scales, b, b_scales):
    return _blockwise(a, a_scales, b, b_scales, blocks=a.shape[1] // TILE)


def as_if_contiguous(a, a_scales, b, b_scales):
    close = a.as_strided(a.shape, (a.shape[1], 1), a.storage_offset())
    return product(close, a_scales, b, b_scales)


def without_last_rows(a, a_scales, b, b_scales, rest=0.0):
    whole = product(a, a_scales, b, b_scales)
    whole[len(a) // 16 * 16:] = rest
    return whole


def _written(function, **options):
    """A function that returns a product as one that writes it to `out`."""
    def write(a, a_scales, b, b_scales, out):
        return out.copy_(function(a, a_scales, b, b_scales, **options))
    return write


def operands(source: random.Random, rows: int, columns: int, depth: int, gap: int) -> tuple[Tensor, ...]:
    """Codes that are small whole numbers and scales that are powers of two: sums are exact in any order."""
    whole = lambda *shape: torch.tensor([source.randint(-3, 3) for _ in range(shape[0] * shape[1])]).view(shape)
    blocks = -(-depth // TILE)
    power = lambda *shape: torch.exp2(torch.tensor([source.randint(-2, 2) for _ in range(shape[0] * shape[1])])
                                      .view(shape).float())
    return (buffer(whole(rows, depth).float().to(FP8), gap), buffer(power(blocks, rows)),
            buffer(whole(columns, depth).float().to(FP8), gap), buffer(power(-(-columns // TILE), blocks)))


def products(source: random.Random) -> dict[str, tuple]:
    """Sizes that are multiples of nothing, rows with a gap, several blocks of weights both ways."""
    cases = {}
    for rows, columns, depth in ((source.randint(17, 31), source.randint(130, 170), 256 + 16 * source.randint(1, 6)),
                                 (16 * source.randint(1, 2), 64, 128)):
        gap = 16 * source.randint(1, 3)
        cases[f"{rows} x {columns} x {depth}, rows {depth + gap} apart"] = (
            *operands(source, rows, columns, depth, gap), room(rows, columns))
    return cases


GEMM = Puzzle(
    id="5.4", title="The blocked product with scales", stars=3, minutes=45,
    why="this loop does most of the arithmetic of DeepSeek-V3; each of its wrong twins runs without an error",
    statement=puzzle_text(
        "Multiply FP8 codes with their scales, block by block of K.",
        "a [M, K] and b [N, K] in E4M3, rows `stride(0)` apart; a_scales [ceil(K / 128), M]; b_scales [ceil(N / 128), "
        "ceil(K / 128)]; both contiguous in FP32; out [M, N] in FP32. M, N and K are any numbers.",
        "2-D, one program for each tile of out; its size is yours (16 x 64 is quick).",
        "walks along K in steps of 128: reads a tile of a, one of b, their scales; writes one tile of out at the end.",
        "out[m, n] = sum over k-blocks of (sum of a[m, j] b[n, j] over the block) * a_scales[k, m] * b_scales[n // "
        "128, k]"),
    stub="""def fp8_product(a, a_scales, b, b_scales, out):
    \"\"\"Launches your kernel, which writes the product to out; returns out.\"\"\"
    raise NotImplementedError
""",
    hints=("The scales change from block to block. Until when can a sum of codes wait for its scale?",
           "total = tl.zeros((BM, BN), tl.float32). In the loop: two masked tiles (other=0.0), `tl.dot(a, b.T)`, times "
           "a_scale[:, None] and b_scale[None, :], added to total. The scale of column n is at n // 128 * blocks + "
           "block."),
    reference=gemm_reference, solution=gemm_solution, cases=products,
    wrong={
        "scale after the loop": (_written(scaled_after), "One scale is applied to the whole sum. Blocks of K have "
                                 "scales of their own, so each partial sum must be scaled before it is added."),
        "scale after, the last": (_written(scaled_after, block=-1), "The scales of the last block are applied to the "
                                  "whole sum. Each partial sum has its own."),
        "scales of b transposed": (_written(with_transposed_scales), "b_scales is read as [K / 128, N / 128]. A row of "
                                   "it belongs to 128 rows of b."),
        "one scale a step": (_written(with_one_scale_a_step), "All columns get the scale of the first 128 rows of b: "
                             "n // 128 is missing."),
        "scales of a by row": (_written(with_row_major_scales), "a_scales is read as [M, K / 128]. It is "
                               "[K / 128, M]."),
        "strides": (_written(as_if_contiguous), "Row m of a is read at m * K, as if rows touched each other. They are "
                    "`a.stride(0)` apart."),
        "ragged K": (_written(without_last_block), "The last block of K is missing: the number of steps is rounded "
                     "down."),
        "ragged M": (_written(without_last_rows, rest=UNWRITTEN), "The last rows are not written: the number of "
                     "programs is rounded down."),
    })


# ---- 5.5 ------------------------------------------------------------------------------------------------------------


def time_reference(M: int, N: int, K: int, gb_s: float, tflops: float) -> float:
    moved, work = (M + N) * K + 2 * M * N, 2 * M * N * K
    return max(moved / gb_s / 1e3, work / tflops / 1e6)


def time_solution(M, N, K, gb_s, tflops):
    bytes_moved = M * K + N * K + 2 * M * N                     # one byte a code, two a result in BF16
    waiting_for_memory = bytes_moved / (gb_s * 1e9)
    computing = 2 * M * N * K / (tflops * 1e12)
    return 1e6 * max(waiting_for_memory, computing)


def time_of_flops(M, N, K, gb_s, tflops):
    return 2 * M * N * K / tflops / 1e6


def time_without_weights(M, N, K, gb_s, tflops):
    return max((M * K + 2 * M * N) / gb_s / 1e3, time_of_flops(M, N, K, gb_s, tflops))


def time_as_sum(M, N, K, gb_s, tflops):
    return ((M + N) * K + 2 * M * N) / gb_s / 1e3 + time_of_flops(M, N, K, gb_s, tflops)


def time_in_bf16(M, N, K, gb_s, tflops):
    return max(2 * ((M + N) * K + M * N) / gb_s / 1e3, time_of_flops(M, N, K, gb_s, tflops))


def time_of_multiplications(M, N, K, gb_s, tflops):
    return max(((M + N) * K + 2 * M * N) / gb_s / 1e3, time_of_flops(M, N, K, gb_s, tflops) / 2)


def gemm_sizes(source: random.Random) -> dict[str, tuple]:
    """Few tokens and many, a short sum whose results are most of the bytes; GPUs of different balance."""
    return {f"{M} x {N} x {K} at {gb_s:,} GB/s and {tflops:,} TFLOPS": (M, N, K, gb_s, tflops)
            for M, N, K, gb_s, tflops in (
                (64, 7168, 16384, 4800, 1979), (source.randint(20, 60), 32768, 512, 2000, source.randint(1500, 1900)),
                (4096, 7168, 16384, 4800, 1979), (source.randint(3000, 6000), 4096, 7168, 3350, 1200))}


TIME = Exercise(
    id="5.5", title="How long must a product take?", stars=1, minutes=15,
    why="a kernel is fast or slow only against this number; without it a measurement says nothing",
    statement="An FP8 product reads a [M, K] and b [N, K] once, one byte a code, and writes [M, N] in BF16. A GPU "
              "moves `gb_s` GB/s (10^9 bytes) and does `tflops` TFLOPS (10^12), both at the same time. Return the "
              "**microseconds** below which no kernel can get. Leave the scales out: they are 3 % of the codes.",
    stub="""def least_microseconds(M, N, K, gb_s, tflops):
    \"\"\"The floor of one FP8 product on such a GPU, in microseconds.\"\"\"
    raise NotImplementedError
""",
    hints=("Two things must be done, and they can overlap. Which of them is waited for?",
           "Bytes: M K + N K + 2 M N. FLOPs: 2 M N K, a multiplication and an addition each. The larger of the two "
           "times."),
    reference=time_reference, solution=time_solution, cases=gemm_sizes, tol=1e-9,
    wrong={
        "FLOPs alone": (time_of_flops, "This is FLOPs over the peak. With 64 tokens the GPU waits for the weights and "
                        "reaches a fraction of that."),
        "weights forgotten": (time_without_weights, "The bytes of b are missing: with few tokens they are almost all "
                              "there is to read."),
        "sum of both": (time_as_sum, "This adds the two times. The GPU loads the next tile while it multiplies this "
                        "one: the floor is the larger one."),
        "two bytes a code": (time_in_bf16, "This reads two bytes a number. E4M3 codes are one byte each."),
        "half the FLOPs": (time_of_multiplications, "This counts multiplications alone. By convention each addition "
                           "counts too: 2 M N K."),
    })


# ---- 5.6 ------------------------------------------------------------------------------------------------------------


def starts_reference(experts: Tensor, n: int) -> Tensor:
    return torch.searchsorted(experts.sort().values, torch.arange(n))


def starts_solution(experts, n):
    counts = torch.bincount(experts, minlength=n)
    return counts.cumsum(0) - counts


def starts_inclusive(experts, n):
    return torch.bincount(experts, minlength=n).cumsum(0)


def starts_without_minlength(experts, n):
    counts = torch.bincount(experts)
    return counts.cumsum(0) - counts


def starts_of_those_that_work(experts, n):
    counts = experts.unique(return_counts=True)[1]
    return counts.cumsum(0) - counts


def starts_of_equal_shares(experts, n):
    return torch.arange(n) * len(experts) // n


def choices(source: random.Random) -> dict[str, tuple]:
    """An empty expert in the middle, and one at the end."""
    cases = {}
    for name, empty, n in (("an empty expert in the middle", 2, 5), ("an empty last expert", 6, 7)):
        working = [e for e in range(n) if e != empty]
        chosen = working + [source.choice(working) for _ in range(source.randint(8, 20))]
        source.shuffle(chosen)
        cases[name] = torch.tensor(chosen), n
    return cases


STARTS = Exercise(
    id="5.6", title="Where do an expert's rows begin?", stars=2, minutes=20,
    why="a grouped product is one kernel over all experts; a wrong start gives one expert's tokens to another",
    statement="Rows are sorted by their expert and multiplied in one launch. `experts` [rows] int64 names each row's "
              "expert, before the sort; there are `n` experts, and some get no row. Return [n] int64: at which row of "
              "the sorted order each expert begins. (An empty expert begins where the next one does.)",
    stub="""def starts(experts, n):
    \"\"\"[n]: the first row of each expert after rows are sorted by expert.\"\"\"
    raise NotImplementedError
""",
    hints=("How many rows come before those of expert e?",
           "Count the rows of each expert, also of those that have none (`minlength`), and take the sum over the "
           "experts before: cumsum minus the own count."),
    reference=starts_reference, solution=starts_solution, cases=choices,
    wrong={
        "inclusive sum": (starts_inclusive, "This is where each expert *ends*: cumsum counts its own rows too."),
        "no minlength": (starts_without_minlength, "`bincount` stops at the largest expert that is named. With empty "
                         "experts at the end the result is too short, and the next layer reads beyond it."),
        "working experts only": (starts_of_those_that_work, "Empty experts are left out, so every start after them "
                                 "belongs to another expert."),
        "equal shares": (starts_of_equal_shares, "This gives all experts equally many rows. The router does not."),
    })


# ---- 5.7 ------------------------------------------------------------------------------------------------------------


def product_test(product):
    source = random.Random(7)
    for rows, columns, depth, gap in ((23, 150, 300, 5), (16, 130, 256, 0)):
        whole = [[[source.randint(-3, 3) for _ in range(depth + gap)] for _ in range(n)] for n in (rows, columns)]
        a, b = (torch.tensor(codes).float().to(FP8)[:, :depth] for codes in whole)
        blocks, wide = -(-depth // TILE), -(-columns // TILE)
        a_scales, b_scales = (torch.exp2(torch.tensor([[float(source.randint(-3, 3)) for _ in range(across)]
                                                       for _ in range(down)]))
                              for down, across in ((blocks, rows), (wide, blocks)))
        got = product(a, a_scales, b, b_scales)
        want = torch.zeros(rows, columns, dtype=torch.float64)
        for j in range(depth):
            left = a[:, j].double() * a_scales[j // TILE].double()
            right = b[:, j].double() * b_scales[:, j // TILE].double().repeat_interleave(TILE)[:columns]
            want += left[:, None] * right
        assert got.shape == want.shape and torch.equal(got.double(), want)


def operand_cases(source: random.Random) -> dict[str, tuple]:
    return {name: arguments[:4] for name, arguments in products(source).items()}


PRODUCTS = Mutants(
    id="5.7", title="Kill the mutants: seven products", stars=2, minutes=20,
    why="a kernel passes the test that its author thought of; these seven pass the one that most authors think of",
    statement="Write a test for `product(a, a_scales, b, b_scales)`, which returns [M, N] in FP32 as in 5.4. It is run "
              "against the right product, which it must spare, and against seven wrong ones, which it should kill. "
              "Small whole numbers as codes and powers of two as scales make every sum exact: then you may demand "
              "equality.",
    stub="""def product_test(product):
    \"\"\"Asserts that product(a, a_scales, b, b_scales) is right. a [M, K] and b [N, K] are torch.float8_e4m3fn.\"\"\"
    raise NotImplementedError
""",
    hints=("Which inputs hide a fault? All scales alike, M = N = K = 128, contiguous rows, a single block of K.",
           "M that is no multiple of 16, N above 128, K above 256 and no multiple of 128, a cut out of something wider "
           "(`wide[:, :K]`), scales that differ everywhere. Compute what is right column by column of K, in float64."),
    reference=product, solution=product_test, cases=operand_cases,
    wrong={
        "scale after the loop": (scaled_after, "It scales the whole sum with the first block's scales: needs two "
                                 "blocks of K whose scales differ."),
        "scales of b transposed": (with_transposed_scales, "It reads b_scales as [K / 128, N / 128]: needs more than "
                                   "one block in one of the two, and scales that differ."),
        "one scale a step": (with_one_scale_a_step, "It uses the scale of the first 128 rows of b for all: needs N "
                             "above 128."),
        "scales of a by row": (with_row_major_scales, "It reads a_scales as [M, K / 128]: needs more than one block of "
                               "K."),
        "strides": (as_if_contiguous, "It takes rows of a as contiguous: needs an a that was cut out of something "
                    "wider."),
        "ragged K": (without_last_block, "It drops the last, incomplete block of K: needs a K that is no multiple of "
                     "128."),
        "ragged M": (without_last_rows, "It leaves the last rows at zero: needs an M that is no multiple of its tile."),
    })


EXERCISES = (ADD, NORM, SCALE, GEMM, TIME, STARTS, PRODUCTS)


# ---- questions ------------------------------------------------------------------------------------------------------


QUESTIONS = {
    "05.program": Question(
        "A kernel is launched over a grid of 100 programs. What is one Triton program?",
        (Option("a thread: it computes one number", "a program owns a whole block; section 2 stores who owned what. "
                "The compiler shares its block out among 128 or more threads."),
         Option("one of 100 runs of the same code, each with a block of its own", "all that tells them apart is "
                "`program_id`."),
         Option("a processor: program 7 runs on multiprocessor 7", "there may be thousands of programs; they are "
                "handed to whichever multiprocessor is free, in about the order of their number.")), 1),
    "05.proof": Question(
        "Your kernel gives the right result in the interpreter on all cases. What is proved?",
        (Option("that it is right", "programs ran one after the other there, on one thread: section 4 shows a kernel "
                "with a race that is right in the interpreter."),
         Option("its addresses, masks and arithmetic, on these cases", "races, layouts, rounding inside tensor cores "
                "and speed are for the GPU."),
         Option("that it will be fast", "the interpreter says nothing about speed.")), 1),
    "05.half": Question(
        "FP8 tensor cores are twice as fast as BF16's. You multiply 16 tokens with a weight of 7168 x 16384. How much "
        "faster is FP8?",
        (Option("twice, because of the tensor cores", "they wait: with 16 tokens the time is that of reading the "
                "weights. The right number, for the wrong reason."),
         Option("twice, because of the bytes", "a weight is one byte instead of two. With a thousand tokens the reason "
                "becomes the other one."),
         Option("not at all", "the weights are half as many bytes, and reading them is what takes the time.")), 1),
    "05.sum": Question(
        "`tl.dot` of two E4M3 tiles returns FP32. How precise is the sum inside, on Hopper?",
        (Option("FP32: that is the type of the result", "the register is FP32; the tensor core keeps about 14 bits "
                "while it adds."),
         Option("about 14 bits", "so the sum of each 128 products is added to an FP32 accumulator outside: promotion."),
         Option("E4M3, like its inputs", "three bits would leave nothing of a sum of 128.")), 1),
    "05.scale": Question(
        "Why can a row's scale not be multiplied in once, after the loop over K?",
        (Option("it could: multiplication distributes over a sum", "it does for a factor that is the same in all "
                "terms; each 128 numbers along K have another scale."),
         Option("each 128 numbers along K have a scale of their own", "the partial sum must get it before it is added "
                "to sums with other scales."),
         Option("FP32 would overflow", "448 x 448 x 16,384 is far below the largest FP32 number.")), 1),
    "05.order": Question(
        "The same product, the same tiles, but programs are numbered in groups of rows of tiles. What changes?",
        (Option("nothing: each program does the same", "each does; but those that run at the same time share more of "
                "what they read."),
         Option("the result, slightly", "each tile of the result is summed by one program in the same order."),
         Option("fewer bytes come from memory", "programs that run together then cover a square of the result, not a "
                "stripe, and need fewer different tiles.")), 2),
    "05.fused": Question(
        "Joining two kernels into one saves writing and reading what lies between. Is it always faster?",
        (Option("yes: fewer bytes, less time", "only where bytes are what takes the time, and where the joined kernel "
                "keeps its tiles and its parallel work."),
         Option("no", "where arithmetic is waited for, fewer bytes buy nothing; and in section 13 a kernel by hand "
                "loses to what the compiler joins."),
         Option("only in FP8", "the argument is about bytes between kernels, in any format.")), 1),
}
