"""MLA's attention in its expanded form, for training and prefill: a key and a value a head, causal, packed sequences.

    s[t, j] = scale (q_nope[t] . k_nope[j] + q_rope[t] . k_rope[j])    j <= t in the same sequence
    o[t] = sum over j of softmax_j(s[t, j]) v[j]                       section 2.1.1, eqs. 7-10

Keys and values of all heads lie as `kv_b_proj` gives them, [k_nope, v] a head; the rotary key k_rope is one for all
heads and is read as such, never repeated in memory. No logit reaches memory either: blocks of them are made, used and
forgotten, with a running maximum m and sum l of each query ("online softmax"); log2(l) + m is kept for the gradient,
which makes the blocks once more. With p = softmax(s):

    dv[j] = sum_t p[t, j] do[t]        delta[t] = do[t] . o[t]        ds[t, j] = p[t, j] (do[t] . v[j] - delta[t])
    dq[t] = scale sum_j ds[t, j] k[j]              dk[j] = scale sum_t ds[t, j] q[t]      (k_rope: over heads as well)

One kernel goes along the keys of each query block and another along the queries of each key block, so that every sum
has one owner and one order. On Hopper mla_attention_hopper.py does the same with warps that specialise; the kernels
here are the ones to read.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from . import mla_attention_hopper
from .backend import tl, triton, uses_triton
from .precision import wide

LOG2_E = 1.4426950408889634     # exp(x) = exp2(x log2(e)): the GPU has an instruction for exp2


def mla_attention_reference(query: Tensor, key_value: Tensor, rope_key: Tensor, offsets: Tensor, max_length: int,
                            scale: float) -> Tensor:
    """The definition: one sequence after the other, all logits at once, in at least FP32.

    query [N, H, dk + dr] (its last dr channels rotated), key_value [N, H, dk + dv], rope_key [N, dr]; offsets
    [sequences + 1] int32 or int64: sequence i is rows offsets[i] to offsets[i + 1] (from 0 to N, some may be empty),
    none longer than `max_length`; returns [N, H, dv] in query's dtype.
    """
    heads, nope = query.shape[1], query.shape[2] - rope_key.shape[1]
    k_nope, value = wide(key_value).split([nope, key_value.shape[2] - nope], -1)
    key = torch.cat((k_nope, wide(rope_key).unsqueeze(1).expand(-1, heads, -1)), -1)
    out = []
    for first, end in pairwise(offsets.tolist()):
        q, k, v = (x[first:end].transpose(0, 1) for x in (wide(query), key, value))
        future = torch.ones(end - first, end - first, dtype=torch.bool, device=q.device).triu(1)
        out.append(((q @ k.mT * scale).masked_fill(future, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(out).to(query.dtype)


@triton.jit
def _product(nope, rope, other_nope, other_rope, PRECISION: tl.constexpr):
    """Products of queries with keys (or keys with queries): the part without position plus the rotary part."""
    return tl.dot(rope, other_rope.T, tl.dot(nope, other_nope.T, input_precision=PRECISION), input_precision=PRECISION)


@triton.jit
def _sequence(Offsets):
    """First row and length of this program's sequence."""
    first = tl.load(Offsets + tl.program_id(2)).to(tl.int32)
    return first, tl.load(Offsets + tl.program_id(2) + 1).to(tl.int32) - first


@triton.jit
def _attend(q_nope, q_rope, total, weight, highest, K, R, V, first, column, query, begin, end, scale,
            DIAGONAL: tl.constexpr, KEYS: tl.constexpr, NOPE: tl.constexpr, PRECISION: tl.constexpr):
    """Adds the keys from `begin` to `end` to each query's sum of values, sum of weights and highest logit."""
    for n in tl.range(begin, end, KEYS):
        s = _product(q_nope, q_rope, K.load([first + n, column]), R.load([first + n, 0]), PRECISION)
        if DIAGONAL:
            s = tl.where(n + tl.arange(0, KEYS)[None, :] <= query[:, None], s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - higher[:, None])
        shrink = tl.exp2(highest - higher)
        weight = weight * shrink + tl.sum(p, 1)
        v = V.load([first + n, column + NOPE])
        total = tl.dot(p.to(v.dtype), v, total * shrink[:, None], input_precision=PRECISION)
        highest = higher
    return total, weight, highest


@triton.jit
def _forward(Q, QR, K, R, V, O, L, Offsets, tokens, heads, scale, NOPE: tl.constexpr, ROPE: tl.constexpr,
             VALUE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr):
    """A block of queries of one head. The longest work, the last block, starts first. Rows of the next sequence that a
    block holds are later than every query of ours: the causal mask hides them too."""
    head = tl.program_id(1)
    first, length = _sequence(Offsets)
    m = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    if m < length:
        query = m + tl.arange(0, QUERIES)
        q_nope = Q.load([first + m, head * (NOPE + ROPE)])
        q_rope = QR.load([first + m, head * (NOPE + ROPE) + NOPE])
        total = tl.zeros((QUERIES, VALUE), tl.float32)
        weight = tl.zeros((QUERIES,), tl.float32)
        highest = tl.full((QUERIES,), float("-inf"), tl.float32)
        column = head * (NOPE + VALUE)
        total, weight, highest = _attend(q_nope, q_rope, total, weight, highest, K, R, V, first, column, query, 0, m,
                                         scale, False, KEYS, NOPE, PRECISION)
        total, weight, highest = _attend(q_nope, q_rope, total, weight, highest, K, R, V, first, column, query, m,
                                         tl.minimum(m + QUERIES, length), scale, True, KEYS, NOPE, PRECISION)
        _store_rows(O, total / weight[:, None], first, query, length, heads * VALUE, head * VALUE)
        tl.store(L + head.to(tl.int64) * tokens + first + query, highest + tl.log2(weight), mask=query < length)


@triton.jit
def _store_rows(X, values, first, row, length, width, column):
    """Writes the block's rows of this sequence into X [N, width], from `column` on."""
    at = (first + row).to(tl.int64)[:, None] * width + column + tl.arange(0, values.shape[1])[None, :]
    tl.store(X + at, values.to(X.dtype.element_ty), mask=row[:, None] < length)


@triton.jit
def _dq(q_nope, q_rope, do, dq_nope, dq_rope, lse, delta, K, R, V, first, column, query, begin, end, scale,
        DIAGONAL: tl.constexpr, KEYS: tl.constexpr, NOPE: tl.constexpr, PRECISION: tl.constexpr):
    """Adds what the keys from `begin` to `end` give to dq."""
    for n in tl.range(begin, end, KEYS):
        k_nope, k_rope = K.load([first + n, column]), R.load([first + n, 0])
        s = _product(q_nope, q_rope, k_nope, k_rope, PRECISION)
        p = tl.exp2(s * scale - lse[:, None])
        if DIAGONAL:
            p = tl.where(n + tl.arange(0, KEYS)[None, :] <= query[:, None], p, 0.0)
        dp = tl.dot(do, V.load([first + n, column + NOPE]).T, input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(k_nope.dtype)
        dq_nope = tl.dot(ds, k_nope, dq_nope, input_precision=PRECISION)
        dq_rope = tl.dot(ds, k_rope, dq_rope, input_precision=PRECISION)
    return dq_nope, dq_rope


@triton.jit
def _backward_queries(Q, QR, K, R, V, O, DO, L, Delta, DQ, Offsets, tokens, heads, scale, factor, NOPE: tl.constexpr,
                      ROPE: tl.constexpr, VALUE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
                      PRECISION: tl.constexpr):
    """dq of a block of queries of one head, and delta for `_backward_keys`."""
    head = tl.program_id(1)
    first, length = _sequence(Offsets)
    m = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    if m < length:
        query = m + tl.arange(0, QUERIES)
        inside = query < length
        mine = head.to(tl.int64) * tokens + first + query
        do = DO.load([first + m, head * VALUE])
        delta = tl.sum(do.to(tl.float32) * O.load([first + m, head * VALUE]).to(tl.float32), 1)
        tl.store(Delta + mine, delta, mask=inside)
        lse = tl.load(L + mine, mask=inside, other=float("inf"))
        q_nope = Q.load([first + m, head * (NOPE + ROPE)])
        q_rope = QR.load([first + m, head * (NOPE + ROPE) + NOPE])
        dq_nope = tl.zeros((QUERIES, NOPE), tl.float32)
        dq_rope = tl.zeros((QUERIES, ROPE), tl.float32)
        column = head * (NOPE + VALUE)
        dq_nope, dq_rope = _dq(q_nope, q_rope, do, dq_nope, dq_rope, lse, delta, K, R, V, first, column, query,
                               0, m, scale, False, KEYS, NOPE, PRECISION)
        dq_nope, dq_rope = _dq(q_nope, q_rope, do, dq_nope, dq_rope, lse, delta, K, R, V, first, column, query,
                               m, tl.minimum(m + QUERIES, length), scale, True, KEYS, NOPE, PRECISION)
        width = heads * (NOPE + ROPE)
        _store_rows(DQ, dq_nope * factor, first, query, length, width, head * (NOPE + ROPE))
        _store_rows(DQ, dq_rope * factor, first, query, length, width, head * (NOPE + ROPE) + NOPE)


@triton.jit
def _dk(k_nope, k_rope, v, dk_nope, dk_rope, dv, Q, QR, DO, L, Delta, head, first, length, key, begin, end, scale,
        DIAGONAL: tl.constexpr, QUERIES: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
        PRECISION: tl.constexpr):
    """Adds what the queries from `begin` to `end` give to dk and dv; logits stand here with keys as rows."""
    for m in tl.range(begin, end, QUERIES):
        query = m + tl.arange(0, QUERIES)
        q_nope = Q.load([first + m, head * (NOPE + ROPE)])
        q_rope = QR.load([first + m, head * (NOPE + ROPE) + NOPE])
        s = _product(k_nope, k_rope, q_nope, q_rope, PRECISION)
        p = tl.exp2(s * scale - tl.load(L + query, mask=query < length, other=float("inf"))[None, :])
        if DIAGONAL:
            p = tl.where(key[:, None] <= query[None, :], p, 0.0)
        do = DO.load([first + m, head * VALUE])
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, do.T, input_precision=PRECISION)
        ds = (p * (dp - tl.load(Delta + query, mask=query < length, other=0.0)[None, :])).to(q_nope.dtype)
        dk_nope = tl.dot(ds, q_nope, dk_nope, input_precision=PRECISION)
        dk_rope = tl.dot(ds, q_rope, dk_rope, input_precision=PRECISION)
    return dk_nope, dk_rope, dv


@triton.jit
def _backward_keys(Q, QR, K, R, V, DO, L, Delta, DKV, DR, Offsets, tokens, heads, scale, factor, NOPE: tl.constexpr,
                   ROPE: tl.constexpr, VALUE: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
                   PRECISION: tl.constexpr):
    """dk and dv of a block of keys of one head; this head's part of the rotary key's gradient goes to DR [N, H, dr]."""
    head = tl.program_id(1)
    first, length = _sequence(Offsets)
    n = tl.program_id(0) * KEYS
    if n < length:
        key = n + tl.arange(0, KEYS)
        column = head * (NOPE + VALUE)
        k_nope, k_rope = K.load([first + n, column]), R.load([first + n, 0])
        v = V.load([first + n, column + NOPE])
        dk_nope = tl.zeros((KEYS, NOPE), tl.float32)
        dk_rope = tl.zeros((KEYS, ROPE), tl.float32)
        dv = tl.zeros((KEYS, VALUE), tl.float32)
        L += head.to(tl.int64) * tokens + first
        Delta += head.to(tl.int64) * tokens + first
        dk_nope, dk_rope, dv = _dk(k_nope, k_rope, v, dk_nope, dk_rope, dv, Q, QR, DO, L, Delta, head, first, length,
                                   key, n, tl.minimum(n + KEYS, length), scale, True, QUERIES, NOPE, ROPE, VALUE,
                                   PRECISION)
        dk_nope, dk_rope, dv = _dk(k_nope, k_rope, v, dk_nope, dk_rope, dv, Q, QR, DO, L, Delta, head, first, length,
                                   key, n + KEYS, length, scale, False, QUERIES, NOPE, ROPE, VALUE, PRECISION)
        _store_rows(DKV, dk_nope * factor, first, key, length, heads * (NOPE + VALUE), column)
        _store_rows(DKV, dv, first, key, length, heads * (NOPE + VALUE), column + NOPE)
        _store_rows(DR, dk_rope * factor, first, key, length, heads * ROPE, head * ROPE)


@triton.jit
def _sum_heads(DR, Out, tokens, width, ROPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The rotary key's gradient [N, dr] from that of all heads, DR [N, width]: sums of every n-th head, then those."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for begin in range(0, width, COLUMNS):
        inside = (row < tokens) & (begin + column < width)
        total += tl.load(DR + row * width + begin + column, mask=inside, other=0.0)
    total = tl.sum(tl.reshape(total, (ROWS, COLUMNS // ROPE, ROPE)), 1)
    tl.store(Out + row * ROPE + tl.arange(0, ROPE)[None, :], total.to(Out.dtype.element_ty), mask=row < tokens)


def mla_attention(query: Tensor, key_value: Tensor, rope_key: Tensor, offsets: Tensor, max_length: int,
                  scale: float) -> Tensor:
    """`mla_attention_reference`; the kernel rounds probabilities to the inputs' dtype before it multiplies them.

    Nothing is copied where widths are powers of two of at least 16 (others are padded with zeros) and where rows are
    without gaps and start at multiples of 16 bytes. What offsets and `max_length` say is not checked: that would wait
    for the GPU.
    Raises ValueError for shapes or dtypes that do not fit together and for a scale that is not positive.
    """
    nope = query.shape[-1] - rope_key.shape[-1]
    if not (query.dim() == key_value.dim() == 3 and rope_key.dim() == 2 and query.shape[:2] == key_value.shape[:2]
            and len(query) == len(rope_key) and 0 < nope < key_value.shape[-1]):
        raise ValueError(f"mla_attention got query {list(query.shape)}, key_value {list(key_value.shape)} and rope_key "
                         f"{list(rope_key.shape)}; they must be [N, H, dk + dr], [N, H, dk + dv] and [N, dr]")
    if not query.dtype == key_value.dtype == rope_key.dtype:
        raise ValueError(f"mla_attention got query {query.dtype}, key_value {key_value.dtype} and rope_key "
                         f"{rope_key.dtype}; the three must have one dtype")
    if offsets.dim() != 1 or len(offsets) < 2 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"mla_attention got offsets {list(offsets.shape)} {offsets.dtype}; "
                         "they must be int32 or int64 [sequences + 1]")
    if scale <= 0:
        raise ValueError(f"mla_attention got scale {scale}; it must be positive")
    if not uses_triton(query, key_value, rope_key, offsets):
        return mla_attention_reference(query, key_value, rope_key, offsets, max_length, scale)
    value = key_value.shape[-1] - nope
    query, key_value, rope_key = _padded(query, nope), _padded(key_value, nope), _padded(rope_key, rope_key.shape[-1])
    return _mla_attention(query, key_value, rope_key, offsets, max_length, scale)[0][..., :value]


def _padded(x: Tensor, first: int) -> Tensor:
    """x with its first `first` channels and the others each widened with zeros to a width that tensor cores take."""
    parts = [part for part in x.split([first, x.shape[-1] - first], -1) if part.shape[-1]]
    missing = [max(triton.next_power_of_2(part.shape[-1]), 16) - part.shape[-1] for part in parts]
    return torch.cat([F.pad(part, (0, more)) for part, more in zip(parts, missing)], -1) if any(missing) else x


@torch.library.custom_op("minidsv3::mla_attention", mutates_args=())
def _mla_attention(query: Tensor, key_value: Tensor, rope_key: Tensor, offsets: Tensor, max_length: int,
                   scale: float) -> tuple[Tensor, Tensor]:
    """The output [N, H, dv] and log2 of each query's sum of exp(logits) [H, N] in FP32, which the gradient needs."""
    widths = _widths(query, key_value, rope_key)
    tokens, heads, value = *query.shape[:2], widths["VALUE"]
    out = torch.empty(tokens, heads, value, dtype=query.dtype, device=query.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
    if out.numel():
        inputs = *(_rows(x) for x in (query, key_value, rope_key)), offsets, max_length
        if specialises(query, widths):
            mla_attention_hopper.forward(*inputs, scale * LOG2_E, out, lse)
        else:
            _forward_readably(*inputs, scale, out, lse, widths)
    return out, lse


@torch.library.custom_op("minidsv3::mla_attention_backward", mutates_args=())
def _mla_attention_backward(query: Tensor, key_value: Tensor, rope_key: Tensor, offsets: Tensor, max_length: int,
                            scale: float, out: Tensor, lse: Tensor, slope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key_value and rope_key, from `slope` [N, H, dv]."""
    widths, (tokens, heads), rope = _widths(query, key_value, rope_key), query.shape[:2], rope_key.shape[1]
    d_query, d_key_value, d_rope_key = (torch.empty(x.shape, dtype=x.dtype, device=x.device)
                                        for x in (query, key_value, rope_key))
    if out.numel():
        delta = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
        d_rope_keys = torch.empty(tokens, heads, rope, dtype=torch.float32, device=query.device)
        inputs = *(_rows(x) for x in (query, key_value, rope_key)), offsets, max_length
        results = out, lse, _rows(slope), delta, d_query, d_key_value, d_rope_keys
        if specialises(query, widths):
            mla_attention_hopper.backward(*inputs, scale * LOG2_E, scale, *results)
        else:
            _backward_readably(*inputs, scale, *results, widths)
        _sum_heads[(triton.cdiv(tokens, 4),)](d_rope_keys, d_rope_key, tokens, heads * rope, rope, 4, 8 * rope)
    return d_query, d_key_value, d_rope_key


def _widths(query: Tensor, key_value: Tensor, rope_key: Tensor) -> dict[str, int]:
    rope = rope_key.shape[1]
    nope = query.shape[2] - rope
    return {"NOPE": nope, "ROPE": rope, "VALUE": key_value.shape[2] - nope}


def _rows(x: Tensor) -> Tensor:
    """x as a matrix of one row a token that TMA can copy blocks of; a copy where it cannot."""
    x = x.flatten(1)
    return x if x.stride(1) == 1 and not (x.stride(0) * x.itemsize % 16 or x.data_ptr() % 16) else x.contiguous()


def specialises(x: Tensor, widths: dict[str, int]) -> bool:
    """Whether the kernels of mla_attention_hopper.py take such inputs. Triton's interpreter has no Gluon."""
    hopper = x.device.type != "cuda" or torch.cuda.get_device_capability(x.device)[0] == 9
    fits = widths["NOPE"] <= 128 and widths["ROPE"] <= 64 and widths["VALUE"] <= 128
    return hopper and fits and x.itemsize == 2 and not triton.knobs.runtime.interpret


def _forward_readably(query, key_value, rope_key, offsets, max_length, scale, out, lse, widths) -> None:
    """Fills out and lse with the kernel of this file."""
    tokens, heads, _ = out.shape
    tiles = _tiles("forward", out.dtype)
    _forward[_grid(max_length, tiles["QUERIES"], out, offsets)](
        *_boxes(query, key_value, rope_key, tiles, widths), out, lse, offsets, tokens, heads, scale * LOG2_E,
        **widths, **tiles)


def _backward_readably(query, key_value, rope_key, offsets, max_length, scale, out, lse, slope, delta, d_query,
                       d_key_value, d_rope_keys, widths) -> None:
    """Fills delta and the gradients with the kernels of this file; delta first, which dk needs."""
    tokens, heads, value = out.shape
    rest = offsets, tokens, heads, scale * LOG2_E, scale
    tiles = _tiles("queries", out.dtype)
    outs, slopes = (_box(x, tiles["QUERIES"], value) for x in (out.flatten(1), slope))
    _backward_queries[_grid(max_length, tiles["QUERIES"], out, offsets)](
        *_boxes(query, key_value, rope_key, tiles, widths), outs, slopes, lse, delta, d_query, *rest, **widths, **tiles)
    tiles = _tiles("keys", out.dtype)
    _backward_keys[_grid(max_length, tiles["KEYS"], out, offsets)](
        *_boxes(query, key_value, rope_key, tiles, widths), _box(slope, tiles["QUERIES"], value), lse, delta,
        d_key_value, d_rope_keys, *rest, **widths, **tiles)


def _tiles(kernel: str, dtype: torch.dtype) -> dict:
    """64 rows that a program owns, 32 of the others a step: at full size in BF16 84 KB of shared memory, which every
    GPU since Ampere has. FP32 is multiplied in full precision, without tensor cores."""
    queries, keys = (32, 64) if kernel == "keys" else (64, 32)
    return {"QUERIES": queries, "KEYS": keys, "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
            "num_warps": 4, "num_stages": 2}


def _grid(max_length: int, block: int, out: Tensor, offsets: Tensor) -> tuple[int, int, int]:
    """Blocks of the longest sequence, heads, sequences: neighbours share a head's keys in L2."""
    return triton.cdiv(max_length, block), out.shape[1], len(offsets) - 1


def _boxes(query: Tensor, key_value: Tensor, rope_key: Tensor, tiles: dict, widths: dict[str, int]) -> tuple:
    """Descriptors of q_nope, q_rope, k_nope, k_rope and v, whose blocks the tensor memory accelerator copies."""
    return (_box(query, tiles["QUERIES"], widths["NOPE"]), _box(query, tiles["QUERIES"], widths["ROPE"]),
            _box(key_value, tiles["KEYS"], widths["NOPE"]), _box(rope_key, tiles["KEYS"], widths["ROPE"]),
            _box(key_value, tiles["KEYS"], widths["VALUE"]))


def _box(x: Tensor, rows: int, columns: int):
    from triton.tools.tensor_descriptor import TensorDescriptor
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


_mla_attention.register_fake(lambda query, key_value, rope_key, offsets, max_length, scale: (
    query.new_empty(*query.shape[:2], _widths(query, key_value, rope_key)["VALUE"]),
    query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)))
_mla_attention_backward.register_fake(lambda query, key_value, rope_key, *rest: tuple(
    x.new_empty(x.shape) for x in (query, key_value, rope_key)))


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.max_length, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, slope: Tensor, _) -> tuple:
    *inputs, out, lse = ctx.saved_tensors
    return *_mla_attention_backward(*inputs, ctx.max_length, ctx.scale, out, lse, slope), None, None, None


_mla_attention.register_autograd(_gradients, setup_context=_keep)
