"""The kernel of `mla_decode` on Hopper, with warps that specialise.

In the readable kernel of mla_decode.py all warps of a program multiply together and then take exponentials together,
while the tensor cores wait; and its two groups of four warps, which share the 64 x 512 output out among them, hand
logits and weights to each other. Here the warps of a program have parts of their own:

    producer     copies blocks of 64 rows of the cache into shared memory (TMA), as fast as consumers make room
    consumers    two groups of four warps: each owns half of the output's channels, for all 64 rows

Both consumers take all logits of a block, which is half as much work again, and in exchange need nothing of each other:
while one takes exponentials, the tensor cores work for the other.
"""

from torch import Tensor

from .backend import gl, gluon, hopper, triton
from .mla_attention_hopper import START, _await, _barriers, _box

mbarrier, tma = hopper.mbarrier, hopper.tma
WIDTHS = 512, 576         # channels of the latent and of a row: the only ones that this kernel takes


@gluon.jit
def _share(Lengths, batch, split, splits):
    """As in mla_decode.py: a sequence's length, and where this share of its keys begins and ends."""
    length = gl.load(Lengths + batch).to(gl.int32)
    size = gl.cdiv(gl.cdiv(length, 64), splits) * 64
    return length, split * size, gl.minimum(split * size + size, length)


@gluon.jit
def _fetch(X, XR, row, full, tiles):
    """Copies 64 rows: the latent's halves and the rotary part."""
    left, right, rope = tiles
    mbarrier.expect(full, 64 * 576 * 2)
    tma.async_copy_global_to_shared(X, [row, 0], full, left)
    tma.async_copy_global_to_shared(X, [row, 256], full, right)
    tma.async_copy_global_to_shared(XR, [row, 512], full, rope)


@gluon.jit
def _produce(C, CR, Pages, batch, begin, end, sequence_pages, page, page_rows, tiles, PAGED: gl.constexpr):
    """Blocks of this share's keys."""
    left, right, rope, full, empty = tiles
    for i in range(gl.cdiv(end - begin, 64)):
        n = begin + i * 64
        if PAGED:
            at = gl.load(Pages + batch * sequence_pages + n // page).to(gl.int32) * page_rows + n % page
        else:
            at = batch * page_rows + n
        stage = i % 2
        _await(empty, i + 2, 2)
        _fetch(C, CR, at, full.index(stage), (left.index(stage), right.index(stage), rope.index(stage)))


@gluon.jit
def _consume(part: gl.constexpr, queries, tiles, O, L, seen, row, rows, begin, end, first, scale, SPLIT: gl.constexpr):
    """Half of the channels of 64 rows."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    q_left, q_right, q_rope, q_full = queries
    left, right, rope, full, empty = tiles
    total = gl.zeros((64, 256), gl.float32, VALUES)
    weight = gl.zeros((64,), gl.float32, gl.SliceLayout(1, LOGITS))
    highest = gl.full((64,), -1e30, gl.float32, gl.SliceLayout(1, LOGITS))
    mbarrier.wait(q_full.index(0), 0)
    for i in range(gl.cdiv(end - begin, 64)):
        stage = i % 2
        _await(full, i, 2)
        s = gl.zeros((64, 64), gl.float32, LOGITS)
        s = hopper.warpgroup_mma(q_left, left.index(stage).permute((1, 0)), s, use_acc=False, is_async=True)
        s = hopper.warpgroup_mma(q_right, right.index(stage).permute((1, 0)), s, is_async=True)
        s = hopper.warpgroup_mma(q_rope, rope.index(stage).permute((1, 0)), s, is_async=True)
        s = hopper.warpgroup_mma_wait(0, deps=(s,))
        key = begin + i * 64 + gl.arange(0, 64, gl.SliceLayout(0, LOGITS))
        s = gl.where(key[None, :] < seen[:, None], s, float("-inf"))
        higher = gl.maximum(highest, gl.max(s, 1) * scale)
        p = gl.exp2(s * scale - higher[:, None])
        shrink = gl.exp2(highest - higher)
        weight = weight * shrink + gl.sum(p, 1)
        highest = higher
        total *= gl.convert_layout(shrink, gl.SliceLayout(1, VALUES))[:, None]
        weights = gl.convert_layout(p.to(left.dtype), gl.DotOperandLayout(0, VALUES, 2))
        if part == 0:
            total = hopper.warpgroup_mma(weights, left.index(stage), total, is_async=True)
        else:
            total = hopper.warpgroup_mma(weights, right.index(stage), total, is_async=True)
        total = hopper.warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(empty.index(stage), count=1)
    weight = gl.where(weight > 0, weight, 1.0)
    if SPLIT and part == 0:
        gl.store(L + first + row, highest + gl.log2(weight), mask=row < rows)
    total *= gl.convert_layout(1 / weight, gl.SliceLayout(1, VALUES))[:, None]
    row = gl.convert_layout(row, gl.SliceLayout(1, VALUES))[:, None]
    at = row * 512 + 256 * part + gl.arange(0, 256, gl.SliceLayout(0, VALUES))[None, :]
    gl.store(O + first * 512 + at, total.to(O.dtype.element_ty), mask=row < rows)


@gluon.jit
def _part(part: gl.constexpr, PAGED: gl.constexpr, SPLIT: gl.constexpr, Q, QR, C, CR, O, L, Lengths, Pages, new,
          heads, sequence_pages, page, page_rows, splits, scale, queries, tiles):
    """What one group of warps does. A share without keys leaves nothing, but for the only one, which leaves zeros."""
    batch = gl.program_id(1)
    split = gl.program_id(2)
    rows = new * heads
    length, begin, end = _share(Lengths, batch, split, splits)
    if begin < end or not SPLIT:
        if part == 2:
            q_left, q_right, q_rope, q_full = queries
            _fetch(Q, QR, batch * rows + gl.program_id(0) * 64, q_full.index(0),
                   (q_left, q_right, q_rope))
            _produce(C, CR, Pages, batch, begin, end, sequence_pages, page, page_rows, tiles, PAGED)
        else:
            ROW: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
            row = gl.program_id(0) * 64 + gl.arange(0, 64, ROW)
            seen = gl.minimum(length - new + 1 + row // heads, end)
            first = (gl.num_programs(1) * split + batch).to(gl.int64) * rows
            _consume(part, queries, tiles, O, L, seen, row, rows, begin, end, first, scale, SPLIT)


@gluon.jit
def _attend(Q, QR, C, CR, O, L, Lengths, Pages, new, heads, sequence_pages, page, page_rows, splits, scale,
            PAGED: gl.constexpr, SPLIT: gl.constexpr):
    """The output of a tile of rows from one share of the keys; of several shares also its log-sum-exp. The warps that
    start the program produce: those of a consumer would keep its arguments in registers that it has not."""
    q_left = gl.allocate_shared_memory(Q.dtype, [64, 256], Q.layout)
    q_right = gl.allocate_shared_memory(Q.dtype, [64, 256], Q.layout)
    q_rope = gl.allocate_shared_memory(Q.dtype, [64, 64], QR.layout)
    left = gl.allocate_shared_memory(Q.dtype, [2, 64, 256], C.layout)
    right = gl.allocate_shared_memory(Q.dtype, [2, 64, 256], C.layout)
    rope = gl.allocate_shared_memory(Q.dtype, [2, 64, 64], CR.layout)
    q_full, _ = _barriers(1, 1)
    inputs = (Q, QR, C, CR, O, L, Lengths, Pages, new, heads, sequence_pages, page, page_rows, splits, scale,
              (q_left, q_right, q_rope, q_full), (left, right, rope) + _barriers(2, 1))
    gl.warp_specialize([(_part, (part, PAGED, SPLIT) + inputs) for part in (2, 0, 1)], [4, 4], [240, 240])


def attend(query: Tensor, cache: Tensor, parts: Tensor, lse: Tensor | None, lengths: Tensor, pages: Tensor | None,
           new: int, heads: int, sequence_pages: int, page: int, page_rows: int, splits: int, scale: float) -> None:
    """Fills parts and, of several shares, lse. query and cache are matrices of 576 columns; scale goes with exp2."""
    boxes = _box(query, 64, 256), _box(query, 64, 64), _box(cache, 64, 256), _box(cache, 64, 64)
    _attend[triton.cdiv(new * heads, 64), len(lengths), splits](
        *boxes, parts, lengths if lse is None else lse, lengths, lengths if pages is None else pages, new, heads,
        sequence_pages, page, page_rows, splits, scale, PAGED=pages is not None, SPLIT=splits > 1, num_warps=4,
        maxnreg=START)         # partitions of warps are given tensors, no None: `lengths` stands for what is not read
