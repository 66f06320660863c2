"""The FP8 products of `fp8_gemm` and `fp8_grouped_gemm` on Hopper, with warps that specialise (section 3.3.2).

    out[m, n] = sum over blocks k of 128:  (sum over 128 j: a[m, j] b[n, j]) * a_scales[k, m] * b_scales[.., k]

The inner sum runs in the tensor cores, which keep about 14 bits of it; after every block it is scaled and added to an
FP32 accumulator ("promotion to CUDA cores"). The readable version in fp8_gemm.py leaves the tensor cores idle while all
warps promote together. Here the warps of a program have parts of their own:

    producer     one warp: copies tiles of a and b, with their scales, into a ring of shared memory (TMA)
    consumers    groups of four warps, each with 64 or 128 rows of the tile: multiply (wgmma) and promote

A consumer that promotes leaves the tensor cores to the others, and the producer runs ahead, even into the next tile.
Two barriers for every stage of the ring tell when it is full and when all consumers are done with it. A program stays
on its multiprocessor and takes every n-th tile, so that loads of the next tile run under the stores of this one. And a
launch may begin while the kernel before it ends; it waits for that one's results when its own barriers are laid out.

Called by the functions of fp8_gemm.py and fp8_grouped_gemm.py, which check their arguments:

    gemm             a [M, K]    b [N, K]       out [M, N]
    grouped_gemm     a [M, K]    b [E, N, K]    out [M, N]       expert e has rows ends[e-1] to ends[e] of a and out
    grouped_wgrad    a [M, T]    b [N, T]       out [E, M, N]    expert e sums over columns ends[e-1] to ends[e]

a and b are E4M3, out is BF16 or FP32, and N is a multiple of 8. a_scales is [ceil(K / 128), M] in FP32. b_scales is
[ceil(N / 128), ceil(K / 128)] (blocks), one such matrix for every expert, or like a_scales [ceil(K / 128), N] (tiles,
as always in grouped_wgrad). `accumulate` adds to an FP32 out. ends [E] is int32, holds multiples of 128 and stays on
the device; rows of out after the last end are left as they are. M is a multiple of 64 in grouped_wgrad. Rows lie where
TMA finds them: their values are neighbours, and they start at multiples of 16 bytes.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from .backend import gl, gluon, hopper, processors, tl, triton

mbarrier, tma = hopper.mbarrier, hopper.tma
SHARED = 232_448 - 2048    # bytes of shared memory of a multiprocessor, less what barriers and the like take
# columns, consumers, waves:
TILES = ((16, 1, 1), (32, 1, 1), (64, 1, 1), (128, 1, 1), (32, 2, 1), (64, 2, 1), (128, 2, 1), (128, 3, 1), (128, 2, 2))


@dataclass(frozen=True)
class Plan:
    """All that is decided before a launch. A consumer computes `waves` times 64 rows, one after the other."""

    columns: int        # of a tile of out
    consumers: int
    waves: int
    item: int           # bytes of one value of out
    tiles: bool         # b has scales of 1 x 128 tiles, not of 128 x 128 blocks
    groups: str         # what `ends` divides among experts: nothing, "rows" of a and out, or "depth", the sum over K
    accumulate: bool
    band: int = 8       # rows of tiles that are walked together, so that they share tiles of b in L2

    @property
    def chunks(self) -> int:
        """Of 64 rows, in a tile."""
        return self.consumers * self.waves

    @property
    def rows(self) -> int:
        return 64 * self.chunks

    @property
    def bytes(self) -> int:
        """What one stage of the ring receives: tiles of a and b, and their scales."""
        return (self.rows + self.columns) * 128 + 4 * self.rows + 4 * self.columns * self.tiles

    @property
    def stages(self) -> int:
        """As many as fit beside the tile of out."""
        return min(16, (SHARED - self.rows * self.columns * self.item) // self.bytes)

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread when the program starts, when all must have as many, and of a consumer's thread afterwards."""
        return {1: (255, 255), 2: (168, 240), 3: (128, 160)}[self.consumers]


@gluon.jit
def _tile(t, rows, columns, BAND: gl.constexpr):
    """Row and column of tile `t`, both counted in tiles."""
    band = t // (BAND * columns)
    height = gl.minimum(rows - band * BAND, BAND)
    inside = t % (BAND * columns)
    return band * BAND + inside % height, inside // height


@gluon.jit
def _expert(expert, ends, M, K, PLAN: gl.constexpr):
    """First row and number of rows, first block of K and number of blocks."""
    if PLAN.groups == "rows":
        start = gl.load(ends + expert - 1, mask=expert > 0, other=0)
        return start, gl.load(ends + expert) - start, 0, gl.cdiv(K, 128)
    elif PLAN.groups == "depth":
        start = gl.load(ends + expert - 1, mask=expert > 0, other=0)
        return 0, M, start // 128, (gl.load(ends + expert) - start) // 128
    else:
        return 0, M, 0, gl.cdiv(K, 128)


@gluon.jit
def _turns(done, tiles):
    """This program's first tile of an expert and how many it gets: every n-th of all tiles, after `done` earlier ones.

    The tiles are counted from 0, and not from the first: a value that is carried through a loop only to bound a loop
    within is taken for unused by Triton 3.6 and 3.7, and never changes.
    """
    programs = gl.num_programs(0)
    first = (gl.program_id(0) + programs - done % programs) % programs
    return first, gl.cdiv(tiles - first, programs)


@gluon.jit
def _produce(a, a_scales, b, b_scales, out, ends, experts, ring, PLAN: gl.constexpr):
    """Fills the ring: for every tile of out, for every block of K, what the consumers need."""
    CHUNKS: gl.constexpr = PLAN.chunks
    a_ring, as_ring, b_ring, bs_ring, full, empty = ring
    N = out.shape[1]
    columns = gl.cdiv(N, PLAN.columns)
    step = 0
    done = 0
    for expert in range(experts):
        start, M, first, blocks = _expert(expert, ends, a.shape[0], a.shape[1], PLAN)
        rows = gl.cdiv(M, PLAN.rows)
        mine, turns = _turns(done, rows * columns)
        for turn in range(turns):
            i, j = _tile(mine + turn * gl.num_programs(0), rows, columns, PLAN.band)
            m = start + i * PLAN.rows
            n = j * PLAN.columns
            if PLAN.groups == "rows":
                n += expert * N
            for k in range(first, first + blocks):
                stage = step % PLAN.stages
                mbarrier.wait(empty.index(stage), (step // PLAN.stages & 1) ^ 1)
                arrived = full.index(stage)
                mbarrier.expect(arrived, PLAN.bytes)
                for c in gl.static_range(CHUNKS):
                    chunk = stage * PLAN.chunks + c
                    tma.async_copy_global_to_shared(a, [m + 64 * c, k * 128], arrived, a_ring.index(chunk))
                    tma.async_copy_global_to_shared(a_scales, [k, m + 64 * c], arrived, as_ring.index(chunk))
                tma.async_copy_global_to_shared(b, [n, k * 128], arrived, b_ring.index(stage))
                if PLAN.tiles:
                    tma.async_copy_global_to_shared(b_scales, [k, n], arrived, bs_ring.index(stage))
                step += 1
        done += rows * columns


@gluon.jit
def _consume(consumer: gl.constexpr, a, a_scales, b, b_scales, out, ends, experts, ring, out_tiles, fetched,
             PLAN: gl.constexpr):
    """Multiplies what is in the ring and promotes it: 64 rows, or twice 64 through the registers of one product."""
    COLUMNS: gl.constexpr = PLAN.columns
    WAVES: gl.constexpr = PLAN.waves
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    a_ring, as_ring, b_ring, bs_ring, full, empty = ring
    fetched = fetched.index(consumer)
    N = out.shape[1]
    columns = gl.cdiv(N, COLUMNS)
    product = gl.zeros((64, COLUMNS), gl.float32, MMA)
    step = 0
    done = 0
    tiles = 0
    for expert in range(experts):
        start, M, first, blocks = _expert(expert, ends, a.shape[0], a.shape[1], PLAN)
        above = expert * M if PLAN.groups == "depth" else start
        rows = gl.cdiv(M, PLAN.rows)
        mine, turns = _turns(done, rows * columns)
        for turn in range(turns):
            i, j = _tile(mine + turn * gl.num_programs(0), rows, columns, PLAN.band)
            m = (i * PLAN.consumers + consumer) * WAVES * 64
            n = j * COLUMNS
            if PLAN.accumulate:
                tma.store_wait(0)
                mbarrier.expect(fetched, WAVES * 64 * COLUMNS * 4)
                for wave in gl.static_range(WAVES):
                    tma.async_copy_global_to_shared(out, [above + m + 64 * wave, n], fetched,
                                                    out_tiles.index(consumer * WAVES + wave))
            if not PLAN.tiles:
                b_line = b_scales + (expert * gl.cdiv(N, 128) + n // 128) * gl.cdiv(a.shape[1], 128)
            sum0 = gl.zeros((64, COLUMNS), gl.float32, MMA)
            sum1 = gl.zeros((64, COLUMNS), gl.float32, MMA)
            for block in range(blocks):
                stage = step % PLAN.stages
                if not PLAN.tiles:
                    b_scale = gl.load(b_line + first + block)
                mbarrier.wait(full.index(stage), step // PLAN.stages & 1)
                for wave in gl.static_range(WAVES):
                    chunk = stage * PLAN.chunks + consumer * WAVES + wave
                    product = hopper.warpgroup_mma(a_ring.index(chunk), b_ring.index(stage).permute((1, 0)), product,
                                                   use_acc=False, is_async=True)
                    a_scale = as_ring.index(chunk).reshape([64]).load(gl.SliceLayout(1, MMA))
                    if PLAN.tiles:
                        b_scale = bs_ring.index(stage).reshape([COLUMNS]).load(gl.SliceLayout(0, MMA))
                    product = hopper.warpgroup_mma_wait(0, deps=(product,))
                    if wave == WAVES - 1:
                        mbarrier.arrive(empty.index(stage), count=1)
                    if PLAN.tiles:
                        promoted = product * a_scale[:, None] * b_scale[None, :]
                    else:
                        promoted = product * (a_scale * b_scale)[:, None]
                    if wave == 0:
                        sum0 += promoted
                    else:
                        sum1 += promoted
                step += 1
            if PLAN.accumulate:
                mbarrier.wait(fetched, tiles & 1)
            else:
                tma.store_wait(0)
            for wave in gl.static_range(WAVES):
                out_tile = out_tiles.index(consumer * WAVES + wave)
                total = sum0 if wave == 0 else sum1
                if PLAN.accumulate:
                    total += out_tile.load(MMA)
                out_tile.store(total.to(out.dtype))
                hopper.fence_async_shared()
                if m + 64 * wave < M:
                    tma.async_copy_shared_to_global(out, [above + m + 64 * wave, n], out_tile)
            tiles += 1
        done += rows * columns
    tma.store_wait(0)


@gluon.jit
def _part(part: gl.constexpr, PLAN: gl.constexpr, a, a_scales, b, b_scales, out, ends, experts, ring, out_tiles,
          fetched):
    """The last part of a program's warps produces; those before consume."""
    if part == PLAN.consumers:
        _produce(a, a_scales, b, b_scales, out, ends, experts, ring, PLAN)
    else:
        _consume(part, a, a_scales, b, b_scales, out, ends, experts, ring, out_tiles, fetched, PLAN)


@gluon.jit
def _multiply(a, a_scales, b, b_scales, out, ends, experts, PLAN: gl.constexpr):
    """Lays out the shared memory, waits for the kernel before, and gives every part its warps."""
    STAGES: gl.constexpr = PLAN.stages
    CONSUMERS: gl.constexpr = PLAN.consumers
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    a_ring = gl.allocate_shared_memory(a.dtype, [PLAN.stages * PLAN.chunks, 64, 128], a.layout)
    as_ring = gl.allocate_shared_memory(gl.float32, [PLAN.stages * PLAN.chunks, 1, 64], a_scales.layout)
    b_ring = gl.allocate_shared_memory(b.dtype, [PLAN.stages, PLAN.columns, 128], b.layout)
    bs_ring = gl.allocate_shared_memory(gl.float32, [PLAN.stages, 1, PLAN.columns], a_scales.layout)
    out_tiles = gl.allocate_shared_memory(out.dtype, [PLAN.chunks, 64, PLAN.columns], out.layout)
    full = gl.allocate_shared_memory(gl.int64, [PLAN.stages, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [PLAN.stages, 1], BARRIER)
    fetched = gl.allocate_shared_memory(gl.int64, [PLAN.consumers, 1], BARRIER)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=PLAN.consumers)
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(fetched.index(consumer), count=1)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    ring = (a_ring, as_ring, b_ring, bs_ring, full, empty)
    memory = (a, a_scales, b, b_scales, out, ends, experts, ring, out_tiles, fetched)
    gl.warp_specialize([(_part, (part, PLAN) + memory) for part in (0, 1, 2, 3)[:PLAN.consumers + 1]],
                       [4] * (PLAN.consumers - 1) + [1], [PLAN.registers[1]] * (PLAN.consumers - 1) + [24])


def gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out: Tensor, accumulate: bool = False,
         tile: tuple[int, int, int] | None = None) -> None:
    """Fills out, or adds to it. `tile` is one of `possible`, in place of the fastest."""
    (M, K), N = a.shape, len(b)
    tiles = b_scales.shape == (triton.cdiv(K, 128), N)
    tile = tile or _fastest(M, N, K, 1, tiles, out.itemsize, processors(a.device))
    _launch(a, a_scales, b, b_scales, out, a_scales, 1, Plan(*tile, out.itemsize, tiles, "nothing", accumulate))


def grouped_gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor, out: Tensor,
                 tile: tuple[int, int, int] | None = None) -> None:
    """Fills the rows of out that belong to an expert."""
    E, N, K = b.shape
    tokens = max(len(a) // E - 127, 1)      # of an expert on average: what a has room for, less most of the padding
    tile = tile or _fastest(tokens, N, K, E, False, out.itemsize, processors(a.device), uneven=True)
    _launch(a, a_scales, b.view(E * N, K), b_scales, out, ends, E, Plan(*tile, out.itemsize, False, "rows", False))


def grouped_wgrad(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor, out: Tensor,
                  accumulate: bool = True, tile: tuple[int, int, int] | None = None) -> None:
    """Fills out, or adds to it."""
    E, M, N = out.shape
    tile = tile or _fastest(M, N, triton.cdiv(a.shape[1], E), E, True, out.itemsize, processors(a.device))
    _launch(a, a_scales, b, b_scales, out.view(E * M, N), ends, E,
            Plan(*tile, out.itemsize, True, "depth", accumulate))


@lru_cache
def _fastest(M: int, N: int, K: int, experts: int, tiles: bool, item: int, programs: int, uneven: bool = False
             ) -> tuple[int, int, int]:
    """The possible tile that takes the program with most of them the least time, by a model fitted to measurements.
    `uneven`: M is a mean over experts, whose last tiles are half full on average."""
    def time(tile: tuple[int, int, int]) -> int:
        columns, consumers, waves = tile
        rows = 64 * consumers * waves
        down = M / rows + 0.5 if uneven else triton.cdiv(M, rows)
        turns = math.ceil(experts * down * triton.cdiv(N, columns) / programs)
        loads = rows + columns                                        # lines of 128 bytes
        block = max(rows * columns, 52 * loads) + 8 * loads           # loading hides under multiplying, or it does not
        return turns * (triton.cdiv(K, 128) * block + 460 * columns * waves)    # a consumer's waves leave in turn

    return min(possible(tiles, item), key=time)


def possible(tiles: bool, item: int) -> list[tuple[int, int, int]]:
    """TILES without those of more than 128 rows, where scales of every column of b take registers or FP32 results take
    shared memory; and without those of 16 columns, where their scales would not start at multiples of 128 bytes."""
    rows = 128 if tiles or item == 4 else 256
    return [tile for tile in TILES if 64 * tile[1] * tile[2] <= rows and (tile[0] >= 32 or not tiles)]


def _launch(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out: Tensor, ends: Tensor, experts: int,
            plan: Plan) -> None:
    _multiply[(processors(a.device),)](
        _described(a, 64, 128), _described(a_scales, 1, 64), _described(b, plan.columns, 128),
        _described(b_scales, 1, plan.columns) if plan.tiles else b_scales, _described(out, 64, plan.columns), ends,
        experts, plan, num_warps=4, maxnreg=plan.registers[0], launch_pdl=True)


def _described(x: Tensor, rows: int, columns: int) -> "TensorDescriptor":
    """What TMA needs to copy boxes of x."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], _layout(rows, columns, x.itemsize))


@lru_cache
def _layout(rows: int, columns: int, item: int) -> "gl.NVMMASharedLayout":
    """A box in shared memory: swizzled, so that rows of a tile do not meet in the same banks."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(columns * item, 128) if rows >= 8 else 0,
                                element_bitwidth=8 * item, rank=2)
