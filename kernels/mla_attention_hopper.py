"""The kernels of `mla_attention` on Hopper, with warps that specialise.

The readable kernels in mla_attention.py make all warps of a program multiply together and then take exponentials
together, while the tensor cores wait. Here the warps of a program have parts of their own:

    producer     one warp: copies what the consumers need into shared memory (TMA), as fast as they make room
    consumers    two groups of four warps: each owns 64 of the program's 128 queries (`_backward_keys`: keys)

A consumer that takes exponentials leaves the tensor cores to the other. What all steps need (the 64 rows of both
consumers) is copied once; what they pass along goes through rings, with two barriers for every stage: one tells that
it is full, the other that both consumers are done with it. Keys are taken from the diagonal down and queries from the
diagonal up, so that only the first steps need the causal mask.
"""

from torch import Tensor

from .backend import gl, gluon, hopper, triton

mbarrier, tma = hopper.mbarrier, hopper.tma

START = 168              # registers of a thread before consumers take 240 and the producer keeps 24
SHARED = 230_000         # bytes of shared memory for tiles


@gluon.jit
def _barriers(STAGES: gl.constexpr, writers: gl.constexpr):
    """For every stage of a ring: it is full, once all writers say so; it is empty, once both consumers say so."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=writers)
        mbarrier.init(empty.index(stage), count=2)
    return full, empty


@gluon.jit
def _await(barriers, i, STAGES: gl.constexpr):
    """Waits until step i's stage is full, or empty again after so many steps."""
    mbarrier.wait(barriers.index(i % STAGES), i // STAGES & 1)


@gluon.jit
def _sequence(Offsets):
    """First row and length of this program's sequence."""
    first = gl.load(Offsets + gl.program_id(2)).to(gl.int32)
    return first, gl.load(Offsets + gl.program_id(2) + 1).to(gl.int32) - first


@gluon.jit
def _fetch(X, row, column, full, tiles):
    """Copies 64 rows for each consumer; the bytes were announced."""
    tma.async_copy_global_to_shared(X, [row, column], full, tiles.index(0))
    tma.async_copy_global_to_shared(X, [row + 64, column], full, tiles.index(1))


@gluon.jit
def _produce_keys(K, R, V, first, m, column, tiles, NOPE: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr,
                  KEYS: gl.constexpr, STAGES: gl.constexpr):
    """Blocks of keys and of values, from the last that a block of queries at m sees down to the first."""
    k_nope, k_rope, v, k_full, k_empty, v_full, v_empty = tiles
    for i in range((m + 128) // KEYS):
        stage = i % STAGES
        row = first + m + 128 - (i + 1) * KEYS
        _await(k_empty, i + STAGES, STAGES)
        mbarrier.expect(k_full.index(stage), KEYS * (NOPE + ROPE) * 2)
        tma.async_copy_global_to_shared(K, [row, column], k_full.index(stage), k_nope.index(stage))
        tma.async_copy_global_to_shared(R, [row, 0], k_full.index(stage), k_rope.index(stage))
        _await(v_empty, i + STAGES, STAGES)
        mbarrier.expect(v_full.index(stage), KEYS * VALUE * 2)
        tma.async_copy_global_to_shared(V, [row, column + NOPE], v_full.index(stage), v.index(stage))


@gluon.jit
def _logits(a_nope, a_rope, b_nope, b_rope, LAYOUT: gl.constexpr):
    """Asks the tensor cores for a b^T, the part without position plus the rotary part. The accumulator is new each
    time: an old one, although not used, would keep its registers, and ptxas would then let all products wait."""
    COLUMNS: gl.constexpr = b_nope.shape[0]
    s = gl.zeros((64, COLUMNS), gl.float32, LAYOUT)
    s = hopper.warpgroup_mma(a_nope, b_nope.permute((1, 0)), s, use_acc=False, is_async=True)
    return hopper.warpgroup_mma(a_rope, b_rope.permute((1, 0)), s, is_async=True)


@gluon.jit
def _store(X, values, first, row, length, width, column, LAYOUT: gl.constexpr):
    """Writes rows of this sequence into X [N, width], from `column` on."""
    row = gl.convert_layout(row, gl.SliceLayout(1, LAYOUT))[:, None]
    at = (first + row).to(gl.int64) * width + column
    at += gl.arange(0, values.shape[1], gl.SliceLayout(0, LAYOUT))[None, :]
    gl.store(X + at, values.to(X.dtype.element_ty), mask=row < length)


@gluon.jit
def _attend(part: gl.constexpr, queries, tiles, O, L, first, length, m, head, tokens, heads, scale,
            VALUE: gl.constexpr, STAGES: gl.constexpr):
    """The output of 64 queries. While a block's exponentials are taken, the last block's values are added up."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, VALUES, 2)
    q_nope, q_rope, q_full = queries
    k_nope, k_rope, v, k_full, k_empty, v_full, v_empty = tiles
    q_nope, q_rope = q_nope.index(part), q_rope.index(part)
    query = m + 64 * part + gl.arange(0, 64, gl.SliceLayout(1, LOGITS))
    mbarrier.wait(q_full.index(0), 0)
    _await(k_full, 0, STAGES)
    s = hopper.warpgroup_mma_wait(0, deps=(_logits(q_nope, q_rope, k_nope.index(0), k_rope.index(0), LOGITS),))
    mbarrier.arrive(k_empty.index(0), count=1)
    key = m + gl.arange(0, 128, gl.SliceLayout(0, LOGITS))
    s = gl.where(key[None, :] <= query[:, None], s, float("-inf"))
    highest = gl.max(s, 1) * scale
    p = gl.exp2(s * scale - highest[:, None])
    weight = gl.sum(p, 1)
    weights = gl.convert_layout(p.to(v.dtype), WEIGHTS)
    total = gl.zeros((64, VALUE), gl.float32, VALUES)
    last = m // 128
    if last > 0:
        _await(k_full, 1, STAGES)
    for i in range(1, last + 1):
        stage = i % STAGES
        before = (i - 1) % STAGES
        s = _logits(q_nope, q_rope, k_nope.index(stage), k_rope.index(stage), LOGITS)
        _await(v_full, i - 1, STAGES)
        total = hopper.warpgroup_mma(weights, v.index(before), total, is_async=True)
        s = hopper.warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(k_empty.index(stage), count=1)
        higher = gl.maximum(highest, gl.max(s, 1) * scale)
        p = gl.exp2(s * scale - higher[:, None])
        shrink = gl.exp2(highest - higher)
        weight = weight * shrink + gl.sum(p, 1)
        highest = higher
        if i < last:                           # ptxas moves no exponential across this; without it they would wait
            _await(k_full, i + 1, STAGES)      # for the sum of values
        total = hopper.warpgroup_mma_wait(0, deps=(total,))
        mbarrier.arrive(v_empty.index(before), count=1)
        total *= gl.convert_layout(shrink, gl.SliceLayout(1, VALUES))[:, None]
        weights = gl.convert_layout(p.to(v.dtype), WEIGHTS)
    _await(v_full, last, STAGES)
    total = hopper.warpgroup_mma(weights, v.index(last % STAGES), total, is_async=True)
    total = hopper.warpgroup_mma_wait(0, deps=(total,))
    gl.store(L + head.to(gl.int64) * tokens + first + query, highest + gl.log2(weight), mask=query < length)
    total *= gl.convert_layout(1 / weight, gl.SliceLayout(1, VALUES))[:, None]
    _store(O, total, first, query, length, heads * VALUE, head * VALUE, VALUES)


@gluon.jit
def _forward_part(part: gl.constexpr, NOPE: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr,
                  STAGES: gl.constexpr, Q, QR, K, R, V, O, L, Offsets, tokens, heads, scale,
                  queries, tiles):
    """The last block of queries, which sees most keys, starts first; behind a sequence's end there is nothing to do."""
    first, length = _sequence(Offsets)
    m = (gl.num_programs(0) - 1 - gl.program_id(0)) * 128
    head = gl.program_id(1)
    if m < length:
        if part == 2:
            q_nope, q_rope, q_full = queries
            mbarrier.expect(q_full.index(0), 128 * (NOPE + ROPE) * 2)
            _fetch(Q, first + m, head * (NOPE + ROPE), q_full.index(0), q_nope)
            _fetch(QR, first + m, head * (NOPE + ROPE) + NOPE, q_full.index(0), q_rope)
            _produce_keys(K, R, V, first, m, head * (NOPE + VALUE), tiles, NOPE, ROPE, VALUE, 128, STAGES)
        else:
            _attend(part, queries, tiles, O, L, first, length, m, head, tokens, heads, scale, VALUE, STAGES)


@gluon.jit
def _forward(Q, QR, K, R, V, O, L, Offsets, tokens, heads, scale, NOPE: gl.constexpr, ROPE: gl.constexpr,
             VALUE: gl.constexpr, STAGES: gl.constexpr):
    """A block of queries of one head."""
    q_nope = gl.allocate_shared_memory(Q.dtype, [2, 64, NOPE], Q.layout)
    q_rope = gl.allocate_shared_memory(Q.dtype, [2, 64, ROPE], QR.layout)
    k_nope = gl.allocate_shared_memory(Q.dtype, [STAGES, 128, NOPE], K.layout)
    k_rope = gl.allocate_shared_memory(Q.dtype, [STAGES, 128, ROPE], R.layout)
    v = gl.allocate_shared_memory(Q.dtype, [STAGES, 128, VALUE], V.layout)
    q_full, _ = _barriers(1, 1)
    inputs = (Q, QR, K, R, V, O, L, Offsets, tokens, heads, scale, (q_nope, q_rope, q_full),
              (k_nope, k_rope, v) + _barriers(STAGES, 1) + _barriers(STAGES, 1))
    gl.warp_specialize([(_forward_part, (part, NOPE, ROPE, VALUE, STAGES) + inputs) for part in (0, 1, 2)],
                       [4, 1], [240, 24])


@gluon.jit
def _dq_step(i, dq_nope, dq_rope, queries, tiles, lse, delta, query, m, scale, DIAGONAL: gl.constexpr,
             STAGES: gl.constexpr, LOGITS: gl.constexpr, SLOPES: gl.constexpr):
    """Adds what 64 keys give to dq."""
    q_nope, q_rope, do = queries
    k_nope, k_rope, v, k_full, k_empty, v_full, v_empty = tiles
    stage = i % STAGES
    _await(k_full, i, STAGES)
    s = _logits(q_nope, q_rope, k_nope.index(stage), k_rope.index(stage), LOGITS)
    _await(v_full, i, STAGES)
    dp = gl.zeros((64, 64), gl.float32, LOGITS)
    dp = hopper.warpgroup_mma(do, v.index(stage).permute((1, 0)), dp, use_acc=False, is_async=True)
    s = hopper.warpgroup_mma_wait(1, deps=(s,))
    p = gl.exp2(s * scale - lse[:, None])
    if DIAGONAL:
        key = m + 64 - i * 64 + gl.arange(0, 64, gl.SliceLayout(0, LOGITS))
        p = gl.where(key[None, :] <= query[:, None], p, 0.0)
    dp = hopper.warpgroup_mma_wait(0, deps=(dp,))
    mbarrier.arrive(v_empty.index(stage), count=1)
    ds = gl.convert_layout((p * (dp - delta[:, None])).to(v.dtype), SLOPES)
    dq_nope = hopper.warpgroup_mma(ds, k_nope.index(stage), dq_nope, is_async=True)
    dq_rope = hopper.warpgroup_mma(ds, k_rope.index(stage), dq_rope, is_async=True)
    dq_nope, dq_rope = hopper.warpgroup_mma_wait(0, deps=(dq_nope, dq_rope))
    mbarrier.arrive(k_empty.index(stage), count=1)
    return dq_nope, dq_rope


@gluon.jit
def _dq(part: gl.constexpr, queries, tiles, O, L, Delta, DQ, first, length, m, head, tokens, heads, scale, factor,
        NOPE: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, STAGES: gl.constexpr):
    """dq and delta of 64 queries."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    NOPES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NOPE, 16])
    ROPES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROPE, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE, 16])
    SLOPES: gl.constexpr = gl.DotOperandLayout(0, NOPES, 2)
    q_nope, q_rope, do, q_full = queries
    q_nope, q_rope, do = q_nope.index(part), q_rope.index(part), do.index(part)
    query = m + 64 * part + gl.arange(0, 64, gl.SliceLayout(1, LOGITS))
    row = gl.convert_layout(query, gl.SliceLayout(1, VALUES))[:, None]
    at = ((first + row).to(gl.int64) * heads + head) * VALUE + gl.arange(0, VALUE, gl.SliceLayout(0, VALUES))[None, :]
    o = gl.load(O + at, mask=row < length, other=0.0)
    mine = head.to(gl.int64) * tokens + first + query
    lse = gl.load(L + mine, mask=query < length, other=float("inf"))
    mbarrier.wait(q_full.index(0), 0)
    delta = gl.sum(o.to(gl.float32) * do.load(VALUES).to(gl.float32), 1)
    delta = gl.convert_layout(delta, gl.SliceLayout(1, LOGITS))
    gl.store(Delta + mine, delta, mask=query < length)
    dq_nope = gl.zeros((64, NOPE), gl.float32, NOPES)
    dq_rope = gl.zeros((64, ROPE), gl.float32, ROPES)
    for i in range(0, 2):
        dq_nope, dq_rope = _dq_step(i, dq_nope, dq_rope, (q_nope, q_rope, do), tiles, lse, delta, query, m, scale,
                                    True, STAGES, LOGITS, SLOPES)
    for i in range(2, m // 64 + 2):
        dq_nope, dq_rope = _dq_step(i, dq_nope, dq_rope, (q_nope, q_rope, do), tiles, lse, delta, query, m, scale,
                                    False, STAGES, LOGITS, SLOPES)
    column = head * (NOPE + ROPE)
    _store(DQ, dq_nope * factor, first, query, length, heads * (NOPE + ROPE), column, NOPES)
    _store(DQ, dq_rope * factor, first, query, length, heads * (NOPE + ROPE), column + NOPE, ROPES)


@gluon.jit
def _queries_part(part: gl.constexpr, NOPE: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, STAGES: gl.constexpr,
                  Q, QR, K, R, V, DO, O, L, Delta, DQ, Offsets, tokens, heads, scale, factor, queries, tiles):
    """As in `_forward_part`."""
    first, length = _sequence(Offsets)
    m = (gl.num_programs(0) - 1 - gl.program_id(0)) * 128
    head = gl.program_id(1)
    if m < length:
        if part == 2:
            q_nope, q_rope, do, q_full = queries
            mbarrier.expect(q_full.index(0), 128 * (NOPE + ROPE + VALUE) * 2)
            _fetch(Q, first + m, head * (NOPE + ROPE), q_full.index(0), q_nope)
            _fetch(QR, first + m, head * (NOPE + ROPE) + NOPE, q_full.index(0), q_rope)
            _fetch(DO, first + m, head * VALUE, q_full.index(0), do)
            _produce_keys(K, R, V, first, m, head * (NOPE + VALUE), tiles, NOPE, ROPE, VALUE, 64, STAGES)
        else:
            _dq(part, queries, tiles, O, L, Delta, DQ, first, length, m, head, tokens, heads, scale, factor,
                NOPE, ROPE, VALUE, STAGES)


@gluon.jit
def _backward_queries(Q, QR, K, R, V, DO, O, L, Delta, DQ, Offsets, tokens, heads, scale, factor, NOPE: gl.constexpr,
                      ROPE: gl.constexpr, VALUE: gl.constexpr, STAGES: gl.constexpr):
    """dq of a block of queries of one head, and delta for `_backward_keys`."""
    q_nope = gl.allocate_shared_memory(Q.dtype, [2, 64, NOPE], Q.layout)
    q_rope = gl.allocate_shared_memory(Q.dtype, [2, 64, ROPE], QR.layout)
    do = gl.allocate_shared_memory(Q.dtype, [2, 64, VALUE], DO.layout)
    k_nope = gl.allocate_shared_memory(Q.dtype, [STAGES, 64, NOPE], K.layout)
    k_rope = gl.allocate_shared_memory(Q.dtype, [STAGES, 64, ROPE], R.layout)
    v = gl.allocate_shared_memory(Q.dtype, [STAGES, 64, VALUE], V.layout)
    q_full, _ = _barriers(1, 1)
    inputs = (Q, QR, K, R, V, DO, O, L, Delta, DQ, Offsets, tokens, heads, scale, factor, (q_nope, q_rope, do, q_full),
              (k_nope, k_rope, v) + _barriers(STAGES, 1) + _barriers(STAGES, 1))
    gl.warp_specialize([(_queries_part, (part, NOPE, ROPE, VALUE, STAGES) + inputs) for part in (0, 1, 2)],
                       [4, 1], [240, 24])


@gluon.jit
def _dk_step(i, dk_nope, dk_rope, dv, keys, tiles, key, n, scale, DIAGONAL: gl.constexpr,
             QUERIES: gl.constexpr, STAGES: gl.constexpr, LOGITS: gl.constexpr, WEIGHTS: gl.constexpr,
             SLOPES: gl.constexpr):
    """Adds what a few queries give to dk and dv; logits stand here with keys as rows."""
    k_nope, k_rope, v = keys
    q_nope, q_rope, do, lse, delta, full, empty = tiles
    stage = i % STAGES
    ROW: gl.constexpr = gl.SliceLayout(0, LOGITS)
    _await(full, i, STAGES)
    s = _logits(k_nope, k_rope, q_nope.index(stage), q_rope.index(stage), LOGITS)
    dp = gl.zeros((64, QUERIES), gl.float32, LOGITS)
    dp = hopper.warpgroup_mma(v, do.index(stage).permute((1, 0)), dp, use_acc=False, is_async=True)
    s = hopper.warpgroup_mma_wait(1, deps=(s,))
    p = gl.exp2(s * scale - lse.index(stage).load(ROW)[None, :])
    if DIAGONAL:
        query = n + i * QUERIES + gl.arange(0, QUERIES, ROW)
        p = gl.where(key[:, None] <= query[None, :], p, 0.0)
    dv = hopper.warpgroup_mma(gl.convert_layout(p.to(do.dtype), WEIGHTS), do.index(stage), dv, is_async=True)
    dp = hopper.warpgroup_mma_wait(1, deps=(dp,))
    ds = gl.convert_layout((p * (dp - delta.index(stage).load(ROW)[None, :])).to(do.dtype), SLOPES)
    dk_nope = hopper.warpgroup_mma(ds, q_nope.index(stage), dk_nope, is_async=True)
    dk_rope = hopper.warpgroup_mma(ds, q_rope.index(stage), dk_rope, is_async=True)
    dk_nope, dk_rope, dv = hopper.warpgroup_mma_wait(0, deps=(dk_nope, dk_rope, dv))
    mbarrier.arrive(empty.index(stage), count=1)
    return dk_nope, dk_rope, dv


@gluon.jit
def _dk(part: gl.constexpr, keys, tiles, DKV, DR, first, length, n, head, heads, scale, factor,
        NOPE: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, QUERIES: gl.constexpr, STAGES: gl.constexpr):
    """dk and dv of 64 keys."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16])
    NOPES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NOPE, 16])
    ROPES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROPE, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, VALUE, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, VALUES, 2)
    SLOPES: gl.constexpr = gl.DotOperandLayout(0, NOPES, 2)
    k_nope, k_rope, v, k_full = keys
    keys = k_nope.index(part), k_rope.index(part), v.index(part)
    key = n + 64 * part + gl.arange(0, 64, gl.SliceLayout(1, LOGITS))
    dk_nope = gl.zeros((64, NOPE), gl.float32, NOPES)
    dk_rope = gl.zeros((64, ROPE), gl.float32, ROPES)
    dv = gl.zeros((64, VALUE), gl.float32, VALUES)
    mbarrier.wait(k_full.index(0), 0)
    steps = gl.cdiv(length - n, QUERIES)
    diagonal = gl.minimum(128 // QUERIES, steps)
    for i in range(0, diagonal):
        dk_nope, dk_rope, dv = _dk_step(i, dk_nope, dk_rope, dv, keys, tiles, key, n, scale,
                                        True, QUERIES, STAGES, LOGITS, WEIGHTS, SLOPES)
    for i in range(diagonal, steps):
        dk_nope, dk_rope, dv = _dk_step(i, dk_nope, dk_rope, dv, keys, tiles, key, n, scale,
                                        False, QUERIES, STAGES, LOGITS, WEIGHTS, SLOPES)
    column = head * (NOPE + VALUE)
    _store(DKV, dk_nope * factor, first, key, length, heads * (NOPE + VALUE), column, NOPES)
    _store(DKV, dv, first, key, length, heads * (NOPE + VALUE), column + NOPE, VALUES)
    _store(DR, dk_rope * factor, first, key, length, heads * ROPE, head * ROPE, ROPES)


@gluon.jit
def _produce_queries(Q, QR, DO, L, Delta, first, length, n, head, tiles, NOPE: gl.constexpr, ROPE: gl.constexpr,
                     VALUE: gl.constexpr, QUERIES: gl.constexpr, STAGES: gl.constexpr):
    """Queries and slopes of the output, from the first query that sees the key at n to the sequence's end."""
    q_nope, q_rope, do, lse, delta, full, empty = tiles
    for i in range(gl.cdiv(length - n, QUERIES)):
        stage = i % STAGES
        row = first + n + i * QUERIES
        _await(empty, i + STAGES, STAGES)
        mbarrier.expect(full.index(stage), QUERIES * (NOPE + ROPE + VALUE) * 2)
        tma.async_copy_global_to_shared(Q, [row, head * (NOPE + ROPE)], full.index(stage), q_nope.index(stage))
        tma.async_copy_global_to_shared(QR, [row, head * (NOPE + ROPE) + NOPE], full.index(stage), q_rope.index(stage))
        tma.async_copy_global_to_shared(DO, [row, head * VALUE], full.index(stage), do.index(stage))
        query = n + i * QUERIES + gl.arange(0, QUERIES, gl.BlockedLayout([1], [32], [1], [0]))
        lse.index(stage).store(gl.load(L + query, mask=query < length, other=float("inf")))
        delta.index(stage).store(gl.load(Delta + query, mask=query < length, other=0.0))
        mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _keys_part(part: gl.constexpr, NOPE: gl.constexpr, ROPE: gl.constexpr, VALUE: gl.constexpr, QUERIES: gl.constexpr,
               STAGES: gl.constexpr, Q, QR, K, R, V, DO, L, Delta, DKV, DR, Offsets, tokens, heads, scale, factor, keys,
               tiles):
    """The first block of keys, which most queries see, starts first."""
    first, length = _sequence(Offsets)
    n = gl.program_id(0) * 128
    head = gl.program_id(1)
    if n < length:
        if part == 2:
            mine = head.to(gl.int64) * tokens + first
            k_nope, k_rope, v, k_full = keys
            mbarrier.expect(k_full.index(0), 128 * (NOPE + ROPE + VALUE) * 2)
            _fetch(K, first + n, head * (NOPE + VALUE), k_full.index(0), k_nope)
            _fetch(R, first + n, 0, k_full.index(0), k_rope)
            _fetch(V, first + n, head * (NOPE + VALUE) + NOPE, k_full.index(0), v)
            _produce_queries(Q, QR, DO, L + mine, Delta + mine, first, length, n, head, tiles,
                             NOPE, ROPE, VALUE, QUERIES, STAGES)
        else:
            _dk(part, keys, tiles, DKV, DR, first, length, n, head, heads, scale, factor,
                NOPE, ROPE, VALUE, QUERIES, STAGES)


@gluon.jit
def _backward_keys(Q, QR, K, R, V, DO, L, Delta, DKV, DR, Offsets, tokens, heads, scale, factor, NOPE: gl.constexpr,
                   ROPE: gl.constexpr, VALUE: gl.constexpr, QUERIES: gl.constexpr, STAGES: gl.constexpr):
    """dk and dv of a block of keys of one head; this head's part of the rotary key's gradient goes to DR [N, H, dr]."""
    k_nope = gl.allocate_shared_memory(Q.dtype, [2, 64, NOPE], K.layout)
    k_rope = gl.allocate_shared_memory(Q.dtype, [2, 64, ROPE], R.layout)
    v = gl.allocate_shared_memory(Q.dtype, [2, 64, VALUE], V.layout)
    q_nope = gl.allocate_shared_memory(Q.dtype, [STAGES, QUERIES, NOPE], Q.layout)
    q_rope = gl.allocate_shared_memory(Q.dtype, [STAGES, QUERIES, ROPE], QR.layout)
    do = gl.allocate_shared_memory(Q.dtype, [STAGES, QUERIES, VALUE], DO.layout)
    lse = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    delta = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_full, _ = _barriers(1, 1)
    inputs = (Q, QR, K, R, V, DO, L, Delta, DKV, DR, Offsets, tokens, heads, scale, factor, (k_nope, k_rope, v, k_full),
              (q_nope, q_rope, do, lse, delta) + _barriers(STAGES, 2))
    gl.warp_specialize([(_keys_part, (part, NOPE, ROPE, VALUE, QUERIES, STAGES) + inputs) for part in (0, 1, 2)],
                       [4, 1], [240, 24])


def forward(query: Tensor, key_value: Tensor, rope_key: Tensor, offsets: Tensor, max_length: int, scale: float,
            out: Tensor, lse: Tensor) -> None:
    """Fills out and lse. Inputs are matrices of one row a token; scale goes with exp2."""
    tokens, heads, _ = out.shape
    nope, rope, value = widths = _widths(query, rope_key, out)
    _forward[_grid(max_length, out, offsets)](
        _box(query, 64, nope), _box(query, 64, rope), _box(key_value, 128, nope), _box(rope_key, 128, rope),
        _box(key_value, 128, value), out, lse, offsets, tokens, heads, scale, *widths,
        STAGES=_stages(nope + rope, 128, sum(widths)), num_warps=4, maxnreg=START)


def backward(query: Tensor, key_value: Tensor, rope_key: Tensor, offsets: Tensor, max_length: int, scale: float,
             factor: float, out: Tensor, lse: Tensor, slope: Tensor, delta: Tensor, d_query: Tensor,
             d_key_value: Tensor, d_rope_keys: Tensor) -> None:
    """Fills delta [H, N], d_query, d_key_value and, for each head, d_rope_keys [N, H, dr]."""
    tokens, heads, _ = out.shape
    nope, rope, value = widths = _widths(query, rope_key, out)
    grid, rest = _grid(max_length, out, offsets), (offsets, tokens, heads, scale, factor, *widths)
    keys = _box(key_value, 64, nope), _box(rope_key, 64, rope), _box(key_value, 64, value)
    _backward_queries[grid](
        _box(query, 64, nope), _box(query, 64, rope), *keys, _box(slope, 64, value), out, lse, delta, d_query, *rest,
        STAGES=_stages(sum(widths), 64, sum(widths)), num_warps=4, maxnreg=START)
    queries = 64 if sum(widths) <= 192 else 32       # registers: logits and their slopes stand beside dk and dv
    _backward_keys[grid](
        _box(query, queries, nope), _box(query, queries, rope), *keys, _box(slope, queries, value), lse, delta,
        d_key_value, d_rope_keys, *rest, queries, STAGES=_stages(sum(widths), queries, sum(widths)), num_warps=4,
        maxnreg=START)


def _widths(query: Tensor, rope_key: Tensor, out: Tensor) -> tuple[int, int, int]:
    """dk, dr and dv."""
    rope = rope_key.shape[1]
    return query.shape[1] // out.shape[1] - rope, rope, out.shape[2]


def _stages(fixed: int, rows: int, width: int) -> int:
    """Of a ring of so many rows a stage: what shared memory holds beside 128 rows of `fixed` channels, at most 4."""
    return min((SHARED // 2 - 128 * fixed) // (rows * width), 4)


def _grid(max_length: int, out: Tensor, offsets: Tensor) -> tuple[int, int, int]:
    return triton.cdiv(max_length, 128), out.shape[1], len(offsets) - 1


def _box(x: Tensor, rows: int, columns: int):
    """What TMA needs to copy blocks of x; its swizzle keeps rows of a tile out of each other's banks."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    layout = gl.NVMMASharedLayout(min(columns * x.itemsize, 128), 8 * x.itemsize, rank=2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns], layout)
