"""The forward pass of `mla_attention` on Hopper, with warps that specialise.

The readable kernel in mla_attention.py makes all warps of a program multiply together and then take exponentials
together, while the tensor cores wait. Here they have parts of their own:

    producer     one warp: copies queries once, then keys and values into rings of shared memory (TMA)
    consumers    two groups of four warps, with 64 queries each

A consumer asks for the logits of the next block of keys and for the sum of values of the last one, and takes the
exponentials between: the tensor cores have work in the meantime, from the other consumer as well. Blocks of keys are
taken from the diagonal down, so that only the first needs the causal mask.
"""

from torch import Tensor

from .backend import triton

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:
    gluon = gl = triton   # whatever stands there for a missing Triton

BLOCK = 128              # queries, and keys, of a program's step
REGISTERS = 168, 240     # of a thread at the start, when all have the same number, and of a consumer's later


@gluon.jit
def _produce(Q, QR, K, R, V, first, m, head, buffers, NOPE: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr,
             STAGES: gl.constexpr, LATE: gl.constexpr):
    """Queries, then blocks of keys and of values from the diagonal down, as fast as the rings become empty."""
    q_nope, q_rope, k_nope, k_rope, v, q_full, k_full, k_empty, v_full, v_empty = buffers
    mbarrier.expect(q_full, 128 * (NOPE + ROPE) * 2)
    for part in gl.static_range(2):
        row = first + m + 64 * part
        tma.async_copy_global_to_shared(Q, [row, head * (NOPE + ROPE)], q_full, q_nope.index(part))
        tma.async_copy_global_to_shared(QR, [row, head * (NOPE + ROPE) + NOPE], q_full, q_rope.index(part))
    column = head * (NOPE + VALUE)
    for i in range(m // 128 + 1):
        stage = i % STAGES
        free = (i // STAGES & 1) ^ 1
        row = first + m - i * 128
        mbarrier.wait(k_empty.index(stage), free)
        mbarrier.expect(k_full.index(stage), 128 * (NOPE + ROPE) * 2)
        tma.async_copy_global_to_shared(K, [row, column], k_full.index(stage), k_nope.index(stage))
        tma.async_copy_global_to_shared(R, [row, 0], k_full.index(stage), k_rope.index(stage))
        mbarrier.wait(v_empty.index(stage), free)
        mbarrier.expect(v_full.index(stage), 128 * VALUE * 2)
        tma.async_copy_global_to_shared(V, [row, column + NOPE], v_full.index(stage), v.index(stage))


@gluon.jit
def _logits(q_nope, q_rope, k_nope, k_rope, LAYOUT: gl.constexpr):
    """Asks the tensor cores for a block of logits, without their scale. Old logits as the accumulator, although not
    used, would keep their registers, and ptxas would serialise the products."""
    s = gl.zeros((64, 128), gl.float32, LAYOUT)
    s = warpgroup_mma(q_nope, k_nope.permute((1, 0)), s, use_acc=False, is_async=True)
    return warpgroup_mma(q_rope, k_rope.permute((1, 0)), s, is_async=True)


@gluon.jit
def _consume(part: gl.constexpr, O, L, first, length, m, head, tokens, heads, scale, buffers, VALUE: gl.constexpr,
             STAGES: gl.constexpr, LATE: gl.constexpr):
    """The output of 64 queries."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, VALUES, 2)
    q_nope, q_rope, k_nope, k_rope, v, q_full, k_full, k_empty, v_full, v_empty = buffers
    q_nope, q_rope = q_nope.index(part), q_rope.index(part)
    query = m + 64 * part + gl.arange(0, 64, gl.SliceLayout(1, LOGITS))
    total = gl.zeros((64, VALUE), gl.float32, VALUES)
    mbarrier.wait(q_full, 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma_wait(0, deps=(_logits(q_nope, q_rope, k_nope.index(0), k_rope.index(0), LOGITS),))
    mbarrier.arrive(k_empty.index(0), count=1)
    key = m + gl.arange(0, 128, gl.SliceLayout(0, LOGITS))
    s = gl.where(key[None, :] <= query[:, None], s, float("-inf"))
    highest = gl.max(s, 1) * scale
    p = gl.exp2(s * scale - highest[:, None])
    weight = gl.sum(p, 1)
    weights = gl.convert_layout(p.to(v.dtype), WEIGHTS)
    for i in range(1, m // 128 + 1):
        stage, phase = i % STAGES, i // STAGES & 1
        before, phase_before = (i - 1) % STAGES, (i - 1) // STAGES & 1
        mbarrier.wait(k_full.index(stage), phase)
        s = _logits(q_nope, q_rope, k_nope.index(stage), k_rope.index(stage), LOGITS)
        mbarrier.wait(v_full.index(before), phase_before)
        total = warpgroup_mma(weights, v.index(before), total, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        higher = gl.maximum(highest, gl.max(s, 1) * scale)
        p = gl.exp2(s * scale - higher[:, None])
        shrink = gl.exp2(highest - higher)
        weight = weight * shrink + gl.sum(p, 1)
        highest = higher
        if LATE:
            mbarrier.wait(k_full.index((i + 1) % STAGES), (i + 1) // STAGES & 1, pred=i < m // 128)
        total, p = warpgroup_mma_wait(0, deps=(total, p))
        mbarrier.arrive(v_empty.index(before), count=1)
        total *= gl.convert_layout(shrink, gl.SliceLayout(1, VALUES))[:, None]
        weights = gl.convert_layout(p.to(v.dtype), WEIGHTS)
    last = m // 128
    mbarrier.wait(v_full.index(last % STAGES), last // STAGES & 1)
    total = warpgroup_mma_wait(0, deps=(warpgroup_mma(weights, v.index(last % STAGES), total, is_async=True),))
    gl.store(L + head.to(gl.int64) * tokens + first + query, highest + gl.log2(weight), mask=query < length)
    total *= gl.convert_layout(1 / weight, gl.SliceLayout(1, VALUES))[:, None]
    row = m + 64 * part + gl.arange(0, 64, gl.SliceLayout(1, VALUES))
    at = (first + row).to(gl.int64)[:, None] * heads * VALUE + head * VALUE
    at += gl.arange(0, VALUE, gl.SliceLayout(0, VALUES))[None, :]
    gl.store(O + at, total.to(v.dtype), mask=row[:, None] < length)


@gluon.jit
def _part(part: gl.constexpr, NOPE: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, STAGES: gl.constexpr, LATE: gl.constexpr,
          Q, QR, K, R, V, O, L, first, length, m, head, tokens, heads, scale, buffers):
    """Two consumers and the producer; a block behind the end of its sequence has nothing to do."""
    if m < length:
        if part == 2:
            _produce(Q, QR, K, R, V, first, m, head, buffers, NOPE, ROPE, VALUE, STAGES, LATE)
        else:
            _consume(part, O, L, first, length, m, head, tokens, heads, scale, buffers, VALUE, STAGES, LATE)


@gluon.jit
def _forward(Q, QR, K, R, V, O, L, Offsets, tokens, heads, scale, NOPE: gl.constexpr, ROPE: gl.constexpr,
             VALUE: gl.constexpr, STAGES: gl.constexpr, LATE: gl.constexpr):
    """A block of queries of one head; the last one, with the most keys, starts first."""
    q_nope = gl.allocate_shared_memory(Q.dtype, [2, 64, NOPE], Q.layout)
    q_rope = gl.allocate_shared_memory(Q.dtype, [2, 64, ROPE], QR.layout)
    k_nope = gl.allocate_shared_memory(Q.dtype, [STAGES, 128, NOPE], K.layout)
    k_rope = gl.allocate_shared_memory(Q.dtype, [STAGES, 128, ROPE], R.layout)
    v = gl.allocate_shared_memory(Q.dtype, [STAGES, 128, VALUE], V.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    buffers = q_nope, q_rope, k_nope, k_rope, v, q_full, k_full, k_empty, v_full, v_empty
    sequence = gl.program_id(2)
    first = gl.load(Offsets + sequence).to(gl.int32)
    length = gl.load(Offsets + sequence + 1).to(gl.int32) - first
    m = (gl.num_programs(0) - 1 - gl.program_id(0)) * 128
    inputs = Q, QR, K, R, V, O, L, first, length, m, gl.program_id(1), tokens, heads, scale, buffers
    gl.warp_specialize([(_part, (part, NOPE, ROPE, VALUE, STAGES, LATE) + inputs) for part in (0, 1, 2)],
                       [4, 1], [240, 24])


def forward(query: Tensor, key_value: Tensor, rope_key: Tensor, offsets: Tensor, max_length: int, scale: float,
            out: Tensor, lse: Tensor, stages: int = 2, late: bool = True) -> None:
    """Fills out [N, H, dv] and lse [H, N]; scale goes with exp2. query and key_value are [N, H * width] here."""
    tokens, heads, value = out.shape
    rope = rope_key.shape[1]
    nope = query.shape[1] // heads - rope
    _forward[(triton.cdiv(max_length, BLOCK), heads, len(offsets) - 1)](
        _box(query, 64, nope), _box(query, 64, rope), _box(key_value, BLOCK, nope), _box(rope_key, BLOCK, rope),
        _box(key_value, BLOCK, value), out, lse, offsets, tokens, heads, scale, nope, rope, value, stages, late,
        num_warps=4, maxnreg=REGISTERS[0])


def _box(x: Tensor, rows: int, columns: int) -> "TensorDescriptor":
    """What TMA needs to copy blocks of x; its swizzle keeps rows of a tile out of each other's banks."""
    swizzle = min(columns * x.itemsize, 128)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=8 * x.itemsize, rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)
