"""MLA's attention in its absorbed form, for decoding: few queries, a long cache, and all heads read the same rows.

    s[j] = scale ((q_nope W^UK) . c[j] + q_rope . k_rope[j])        section 2.1.1: W^UK has moved to the query's side,
    o = sum over j of softmax_j(s[j]) c[j]                           and W^UV, afterwards, to the output's

A row of the cache is the latent c (512 channels at full size) and then the rotary key (64). A block of latents, once
in shared memory, serves as keys and as values. A tile is up to 64 rows: pairs of a query and a head of one sequence, so
that 128 heads are two tiles that read the cache at the same time (L2 holds it for the second), and 16 heads with two
queries share one tile. Softmax goes block by block, with a running maximum m and sum l of each row.

Where sequences are too few to fill the GPU, the keys of each are split into shares of whole blocks. A share leaves its
own output o_i and log2 of its sum of exponentials L_i, in FP32, and a second kernel combines them:

    o = sum_i 2^(L_i - M) o_i / sum_i 2^(L_i - M),    M = max_i L_i

How many shares depends on shapes only; how long they are, on a sequence's length, which the host never reads. On
Hopper mla_decode_hopper.py takes tiles of 64 rows at the widths of the full model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import mla_decode_hopper
from .backend import processors, tl, triton, uses_triton
from .precision import wide

LOG2_E = 1.4426950408889634     # exp(x) = exp2(x log2(e)): the GPU has an instruction for exp2
PAGE = 64                       # pages hold multiples of so many tokens: no block of keys crosses from one to another
MOST_SPLITS = 32


def mla_decode_reference(query: Tensor, cache: Tensor, lengths: Tensor, rank: int, scale: float,
                         pages: Tensor | None = None) -> Tensor:
    """The definition: all logits at once, in at least FP32.

    query [B, T, H, rank + dr]: q_nope W^UK, then q_rope, of the last T tokens. lengths [B] int32 or int64 counts those
    too: query t sees the first lengths - T + t + 1 tokens (causal among the T), and gives 0 where that is none.
    cache [B, S, rank + dr]: the latents, then the rotary keys. Or, with `pages` [B, pages of a sequence] int32 or
    int64, cache [P, page, rank + dr]: token j of sequence b lies at [pages[b, j // page], j % page].
    Returns [B, T, H, rank] in query's dtype: W^UV is still to come.
    """
    key = wide(cache if pages is None else cache[pages].flatten(1, 2))
    new = query.shape[1]
    end = lengths[:, None] - new + 1 + torch.arange(new, device=query.device)
    unseen = (torch.arange(key.shape[1], device=query.device) >= end[..., None]).unsqueeze(2)
    s = torch.einsum("bthc,bsc->bths", wide(query), key) * scale
    p = s.masked_fill(unseen, float("-inf")).softmax(-1).masked_fill(unseen, 0.0)
    return torch.einsum("bths,bsr->bthr", p, key[..., :rank]).to(query.dtype)


@triton.jit
def _share(Lengths, batch, split, splits, KEYS: tl.constexpr):
    """A sequence's length, and where this share of its keys begins and ends: whole blocks, but for the last one."""
    length = tl.load(Lengths + batch).to(tl.int32)
    size = tl.cdiv(tl.cdiv(length, KEYS), splits) * KEYS
    return length, split * size, tl.minimum(split * size + size, length)


@triton.jit
def _attend(Q, QR, C, CR, O, L, Lengths, Pages, queries, heads, sequence_pages, page, page_rows, splits,
            scale, RANK: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
            PAGED: tl.constexpr, TURNED: tl.constexpr, PRECISION: tl.constexpr):
    """The output of a tile of rows from one share of the keys; of several shares also its log-sum-exp.

    Logits stand as [rows, keys] and the output as [rows, latent], or turned: [keys, rows] and [latent, rows]. The
    tensor cores multiply 64 rows of the left factor at a time: turned, those are keys and channels.
    """
    AXIS: tl.constexpr = 0 if TURNED else 1                  # the logits' axis of keys
    batch, split = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = queries * heads
    length, begin, end = _share(Lengths, batch, split, splits, KEYS)
    if begin < end or splits == 1:
        seen = tl.expand_dims(tl.minimum(length - queries + 1 + row // heads, end), AXIS)
        q = Q.load([batch * rows + tl.program_id(0) * ROWS, 0])
        q_rope = QR.load([batch * rows + tl.program_id(0) * ROWS, RANK])
        total = tl.zeros((LATENT, ROWS) if TURNED else (ROWS, LATENT), tl.float32)
        weight = tl.zeros((ROWS,), tl.float32)
        highest = tl.full((ROWS,), -1e30, tl.float32)        # -inf would give NaN to a row that sees nothing
        for n in tl.range(begin, end, KEYS):
            if PAGED:
                at = tl.load(Pages + batch * sequence_pages + n // page).to(tl.int32) * page_rows + n % page
            else:
                at = batch * page_rows + n
            c, c_rope = C.load([at, 0]), CR.load([at, RANK])
            if TURNED:
                s = tl.dot(c_rope, q_rope.T, tl.dot(c, q.T, input_precision=PRECISION), input_precision=PRECISION)
            else:
                s = tl.dot(q_rope, c_rope.T, tl.dot(q, c.T, input_precision=PRECISION), input_precision=PRECISION)
            key = tl.expand_dims(n + tl.arange(0, KEYS), 1 - AXIS)
            s = tl.where(key < seen, s, float("-inf"))
            higher = tl.maximum(highest, tl.max(s, AXIS) * scale)
            p = tl.exp2(s * scale - tl.expand_dims(higher, AXIS))
            shrink = tl.exp2(highest - higher)
            weight = weight * shrink + tl.sum(p, AXIS)
            total *= tl.expand_dims(shrink, AXIS)
            if TURNED:
                total = tl.dot(c.T, p.to(c.dtype), total, input_precision=PRECISION)
            else:
                total = tl.dot(p.to(c.dtype), c, total, input_precision=PRECISION)
            highest = higher
        weight = tl.where(weight > 0, weight, 1.0)           # a row that sees nothing: total is 0
        out = (tl.num_programs(1) * split + batch).to(tl.int64) * rows + row
        column = tl.expand_dims(tl.arange(0, LATENT), 1 - AXIS)
        tl.store(O + tl.expand_dims(out, AXIS) * RANK + column,
                 (total / tl.expand_dims(weight, AXIS)).to(O.dtype.element_ty),
                 mask=tl.expand_dims(row < rows, AXIS) & (column < RANK))
        if splits > 1:
            tl.store(L + out, highest + tl.log2(weight), mask=row < rows)


@triton.jit
def _combine(Parts, L, O, Lengths, rows, splits, RANK: tl.constexpr, LATENT: tl.constexpr, KEYS: tl.constexpr):
    """One row of the output from those of its shares; a share without keys has written nothing and is not read."""
    row, batch = tl.program_id(0), tl.program_id(1)
    length, size, _ = _share(Lengths, batch, 1, splits, KEYS)
    column = tl.arange(0, LATENT)
    total = tl.zeros((LATENT,), tl.float32)
    weight = 0.0
    highest = -1e30
    for split in range(tl.cdiv(length, tl.maximum(size, 1))):
        at = (tl.num_programs(1) * split + batch).to(tl.int64) * rows + row
        lse = tl.load(L + at)
        higher = tl.maximum(highest, lse)
        shrink, grow = tl.exp2(highest - higher), tl.exp2(lse - higher)
        total = total * shrink + grow * tl.load(Parts + at * RANK + column, mask=column < RANK, other=0.0)
        weight = weight * shrink + grow
        highest = higher
    out = (batch.to(tl.int64) * rows + row) * RANK + column
    tl.store(O + out, (total / tl.where(weight > 0, weight, 1.0)).to(O.dtype.element_ty), mask=column < RANK)


def mla_decode(query: Tensor, cache: Tensor, lengths: Tensor, rank: int, scale: float,
               pages: Tensor | None = None) -> Tensor:
    """`mla_decode_reference` without a gradient; the kernel rounds probabilities to the cache's dtype before it
    multiplies them.

    What lies behind a sequence's tokens, up to a multiple of 64, is read with them and multiplied by 0: it must be
    finite. Entries of `pages` behind its tokens are not read by the kernel. What `lengths` and `pages` say is not
    checked: that would wait for the GPU. The cache is copied only where its rows start at no multiple of 16 bytes, or
    pages at no whole row.
    Raises ValueError for shapes or dtypes that do not fit together, for pages of other than a multiple of 64 tokens and
    for a scale that is not positive.
    """
    if not (query.dim() == 4 and cache.dim() == 3 and query.shape[-1] == cache.shape[-1] and 0 < rank < cache.shape[-1]
            and query.shape[:1] == lengths.shape and (pages is not None or len(cache) == len(query))):
        raise ValueError(f"mla_decode got query {list(query.shape)}, cache {list(cache.shape)}, lengths "
                         f"{list(lengths.shape)} and rank {rank}; they must be [B, T, H, rank + dr], [B, S, rank + dr] "
                         "(or, with pages, [P, page, rank + dr]), [B] and less than rank + dr")
    if query.dtype != cache.dtype:
        raise ValueError(f"mla_decode got query {query.dtype} and cache {cache.dtype}; both must have one dtype")
    if any(x.dtype not in (torch.int32, torch.int64) for x in (lengths, *([] if pages is None else [pages]))):
        raise ValueError(f"mla_decode got lengths {lengths.dtype} and pages {pages if pages is None else pages.dtype}; "
                         "they must be int32 or int64")
    if pages is not None and (pages.dim() != 2 or len(pages) != len(query) or cache.shape[1] % PAGE):
        raise ValueError(f"mla_decode got pages {list(pages.shape)} of {cache.shape[1]} tokens for {len(query)} "
                         f"sequences; they must be [B, pages of a sequence], of a multiple of {PAGE} tokens")
    if scale <= 0:
        raise ValueError(f"mla_decode got scale {scale}; it must be positive")
    if not uses_triton(query, cache, lengths, *([] if pages is None else [pages])):
        return mla_decode_reference(query, cache, lengths, rank, scale, pages)
    return _mla_decode(query.detach(), cache.detach(), lengths, rank, scale, pages)


@torch.library.custom_op("minidsv3::mla_decode", mutates_args=())
def _mla_decode(query: Tensor, cache: Tensor, lengths: Tensor, rank: int, scale: float,
                pages: Tensor | None) -> Tensor:
    if not (query.numel() and cache.numel()):
        return torch.zeros(*query.shape[:3], rank, dtype=query.dtype, device=query.device)
    rows = query.shape[1] * query.shape[2]
    tiles = _tiles(query.dtype, rows)
    programs = len(query) * triton.cdiv(rows, tiles["ROWS"])
    blocks = triton.cdiv(cache.shape[1] * (1 if pages is None else pages.shape[1]), tiles["KEYS"])
    return _launch(query, cache, lengths, rank, scale, pages, tiles,
                   _splits(programs, blocks, processors(query.device)))


def _tiles(dtype: torch.dtype, rows: int) -> dict:
    """Rows and keys of a block. The output of 64 rows, 64 x 512 in FP32, takes half of the registers, and 64 queries
    with two blocks of 64 keys all of shared memory. Few rows would leave tensor cores idle, unless they are turned.
    FP32 has no tensor cores here: small tiles, in full precision."""
    if dtype == torch.float32:
        return {"ROWS": 16, "KEYS": 16, "TURNED": False, "PRECISION": "ieee", "num_warps": 8, "num_stages": 1}
    rows, warps = (64, 8) if rows > 32 else (32, 4) if rows > 16 else (16, 4)
    return {"ROWS": rows, "KEYS": 64, "TURNED": rows < 64, "PRECISION": "tf32", "num_warps": warps, "num_stages": 2}


def _splits(programs: int, blocks: int, processors: int) -> int:
    """Shares of the keys that take the least time: whole waves of one program a processor, each of which costs its
    blocks and, to begin and to end, about as much as four more."""
    return min(range(1, min(blocks, MOST_SPLITS) + 1), key=lambda splits: (
        triton.cdiv(programs * splits, processors) * (triton.cdiv(blocks, splits) + 4)))


def _launch(query: Tensor, cache: Tensor, lengths: Tensor, rank: int, scale: float, pages: Tensor | None, tiles: dict,
            splits: int) -> Tensor:
    batch, queries, heads, width = query.shape
    rows, page = queries * heads, cache.shape[1]
    query, (cache, page_rows) = _as_rows(query.flatten(0, 2)[None])[0], _as_rows(cache)
    out = torch.empty(batch, queries, heads, rank, dtype=query.dtype, device=query.device)
    parts, lse = out, None
    if splits > 1:
        parts = torch.empty(splits, batch, rows, rank, dtype=torch.float32, device=query.device)
        lse = torch.empty(splits, batch, rows, dtype=torch.float32, device=query.device)
    latent, rope = (max(triton.next_power_of_2(columns), 16) for columns in (rank, width - rank))
    sizes = queries, heads, 0 if pages is None else pages.shape[1], page, page_rows, splits, scale * LOG2_E
    if specialises(query, rank, rows):
        mla_decode_hopper.attend(query, cache, parts, lse, lengths, pages, *sizes)
    else:
        boxes = (_box(x, tiles[size], *columns) for x, size in ((query, "ROWS"), (cache, "KEYS"))
                 for columns in ((rank, latent), (width, rope)))
        _attend[triton.cdiv(rows, tiles["ROWS"]), batch, splits](
            *boxes, parts, lse, lengths, pages, *sizes, RANK=rank, LATENT=latent, ROPE=rope, PAGED=pages is not None,
            **tiles)
    if splits > 1:
        _combine[rows, batch](parts, lse, out, lengths, rows, splits, RANK=rank, LATENT=latent,
                              KEYS=tiles["KEYS"], num_warps=4)
    return out


def specialises(query: Tensor, rank: int, rows: int) -> bool:
    """Whether the kernel of mla_decode_hopper.py takes such inputs. Triton's interpreter has no Gluon."""
    hopper = query.device.type != "cuda" or torch.cuda.get_device_capability(query.device)[0] == 9
    fits = (rank, query.shape[-1]) == mla_decode_hopper.WIDTHS and rows > 32      # few rows are turned instead
    return hopper and fits and query.itemsize == 2 and not triton.knobs.runtime.interpret


def _as_rows(x: Tensor) -> tuple[Tensor, int]:
    """Pages x [P, page, width] as a matrix of all their rows, and rows from one page to the next. Those may be more
    than a page has, where a cache has room for more tokens than this pass looks at."""
    page, row, column = x.stride()
    if (column != 1 or row < x.shape[2] or row * x.itemsize % 16 or page % row or page < x.shape[1] * row
            or x.data_ptr() % 16):
        x = F.pad(x.contiguous(), (0, -x.shape[2] % (16 // x.itemsize)))
        page, row, _ = x.stride()
    return x.as_strided(((len(x) - 1) * (page // row) + x.shape[1], x.shape[2]), (row, 1)), page // row


def _box(x: Tensor, rows: int, end: int, columns: int):
    """Describes blocks of x to the tensor memory accelerator, which gives zeros for columns from `end` on."""
    from triton.tools.tensor_descriptor import TensorDescriptor
    return TensorDescriptor(x, [x.shape[0], end], list(x.stride()), [rows, columns])


_mla_decode.register_fake(lambda query, cache, lengths, rank, scale, pages: query.new_empty(*query.shape[:3], rank))
