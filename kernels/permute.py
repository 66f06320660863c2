"""Moving tokens to their experts and back (section 2.1.2, eq. 12): experts multiply rows that are sorted by expert.

    sort_by_expert    where each choice of each token stands among the sorted rows
    permute           rows[place of (t, j)] = x[t]
    unpermute         y[t] = sum over j of weight[t, j] * rows[place of (t, j)]

A choice is a token and one of its k slots, counted as token * k + slot. No token is ever dropped. Rows of one expert
keep their tokens' order; with `align` every expert gets a multiple of so many rows, those of padding behind its own.
Each is the other's gradient:

    permute:      dx[t] = sum over j of drows[place of (t, j)]
    unpermute:    drows[place of (t, j)] = weight[t, j] dy[t]        dweight[t, j] = <rows[place of (t, j)], dy[t]>

The kernels go by token: one reads x[t] once and writes k rows, the other reads k rows and writes one. Sums are taken in
FP32, in the order of the slots, and rounded once.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import tl, triton, uses_triton
from .precision import wide

_BLOCK = 128     # choices that one program of the counting sort takes
_SHARE = 8       # rows among which one program that moves a token clears those of padding


class Permutation(NamedTuple):
    """Where N tokens with k choices each stand among R rows sorted by expert."""

    rows: Tensor       # [N, k] int32: the row of each choice
    sources: Tensor    # [R] int32: the choice, token * k + slot, that each row holds; -1 in padding
    ends: Tensor       # [experts] int32: where each expert's rows end, its padding included


def sort_by_expert_reference(experts: Tensor, load: Tensor, align: int = 1) -> Permutation:
    """The definition. experts [N, k] int64, load [experts]: how many choices each expert got, as `Routing` holds them.

    R depends on shapes alone: N k, plus align - 1 for every expert that can have a choice, rounded up to a multiple of
    align. Without any token it is 0.
    """
    experts_flat, load = experts.flatten(), load.long()
    order = experts_flat.argsort(stable=True)
    size = (load + align - 1) // align * align
    ends = size.cumsum(0)
    before = (ends - size) - (load.cumsum(0) - load)                 # rows of padding before each expert
    row = torch.arange(len(order), device=load.device) + before[experts_flat[order]]
    rows = torch.empty_like(row).scatter_(0, order, row).view(experts.shape)
    sources = torch.full((_capacity(experts, load, align),), -1, device=load.device).scatter_(0, row, order)
    return Permutation(rows.int(), sources.int(), ends.int())


def permute_reference(x: Tensor, permutation: Permutation) -> Tensor:
    """The definition. x [N, d] -> [R, d]; rows of padding are zeros."""
    source, chosen = permutation.sources, permutation.rows.shape[1]
    rows = x.index_select(0, source.clamp(min=0) // chosen)
    if len(source) == permutation.rows.numel():     # no padding
        return rows
    return torch.where(source[:, None] < 0, torch.zeros_like(rows), rows)


def permute_tiles_reference(codes: Tensor, scales: Tensor, permutation: Permutation) -> tuple[Tensor, Tensor]:
    """The definition for what `quantize_tiles` made: codes [N, d], scales [ceil(d / 128), N] -> codes [R, d], scales
    [ceil(d / 128), R]. In padding both are zeros."""
    rows = permute_reference(codes.view(torch.uint8), permutation).view(codes.dtype)
    return rows, permute_reference(scales.T, permutation).T.contiguous()


def unpermute_reference(rows: Tensor, permutation: Permutation, weights: Tensor | None = None) -> Tensor:
    """The definition, summed in at least FP32. rows [R, d], weights [N, k] (None: all 1) -> [N, d] in rows' dtype."""
    terms = wide(rows)
    weights = None if weights is None else weights.to(terms.dtype)
    return F.embedding_bag(permutation.rows, terms, mode="sum", per_sample_weights=weights).to(rows.dtype)


@triton.jit
def _count(EXPERTS, COUNTS, choices, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of each block's choices went to each expert; the last block's count is not used."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts = tl.histogram(tl.load(EXPERTS + at, mask=at < choices, other=0).to(tl.int32), BINS)
    tl.store(COUNTS + tl.program_id(0) * BINS + tl.arange(0, BINS), counts)


@triton.jit
def _accumulate(LOAD, COUNTS, ENDS, blocks, experts, ALIGN: tl.constexpr, BINS: tl.constexpr, COLUMNS: tl.constexpr,
                STEP: tl.constexpr):
    """Turns counts into the row where each block's first choice of each expert goes, for a few experts."""
    expert, mine = tl.arange(0, BINS), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    load = tl.load(LOAD + expert, mask=expert < experts, other=0.0).to(tl.int32)
    size = (load + ALIGN - 1) // ALIGN * ALIGN
    before = expert[None, :] < mine[:, None]
    start = tl.sum(tl.where(before, size[None, :], 0), 1)
    end = tl.sum(tl.where(before | (expert[None, :] == mine[:, None]), size[None, :], 0), 1)
    tl.store(ENDS + mine, end, mask=mine < experts)
    for block in range(0, blocks, STEP):
        row = block + tl.arange(0, STEP)[:, None]
        at = COUNTS + row * BINS + mine[None, :]
        count = tl.load(at, mask=row < blocks, other=0)
        tl.store(at, start[None, :] + tl.cumsum(count, 0) - count, mask=row < blocks)
        start += tl.sum(count, 0)


@triton.jit
def _place(EXPERTS, STARTS, ROWS, SOURCES, choices, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """A choice's row: where its block starts for its expert, plus the choices of that expert before it in the block."""
    first, place = tl.program_id(0) * BLOCK, tl.arange(0, BLOCK)
    inside = first + place < choices
    expert = tl.load(EXPERTS + first + place, mask=inside, other=0).to(tl.int32)
    other = tl.load(EXPERTS + first + place, mask=inside, other=0).to(tl.int32)
    same = (other[None, :] == expert[:, None]) & (place[None, :] < place[:, None])
    row = tl.load(STARTS + tl.program_id(0) * BINS + expert, mask=inside, other=0) + tl.sum(same.to(tl.int32), 1)
    tl.store(ROWS + first + place, row, mask=inside)
    tl.store(SOURCES + row, first + place, mask=inside)


@triton.jit
def _to_rows(X, ROWS, SOURCES, WEIGHTS, OUT, Y, DW, tokens, rows,
             D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr, SHARE: tl.constexpr):
    """Writes a token, times its weights if there are any, to the rows of its choices; with weights, also the token's
    products with the rows Y. Whatever its token, a program also clears the padding among SHARE rows."""
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = (column < D) & (token < tokens)
    x = tl.load(X + token * D + column, mask=inside, other=0.0)
    for j in tl.static_range(K):
        row = tl.load(ROWS + token * K + j, mask=token < tokens, other=0).to(tl.int64) * D + column
        if WEIGHTS is None:
            tl.store(OUT + row, x, mask=inside)
        else:
            slope = x.to(tl.float32)
            y = tl.load(Y + row, mask=inside, other=0.0).to(tl.float32)
            tl.store(DW + token * K + j, tl.sum(slope * y), mask=token < tokens)
            weighted = tl.load(WEIGHTS + token * K + j, mask=token < tokens, other=0.0).to(tl.float32) * slope
            tl.store(OUT + row, weighted.to(OUT.dtype.element_ty), mask=inside)
    if SHARE:
        row = token * SHARE + tl.arange(0, SHARE)
        padding = tl.load(SOURCES + row, mask=row < rows, other=0) < 0
        tl.store(OUT + row[:, None] * D + column[None, :], tl.zeros((SHARE, BLOCK), OUT.dtype.element_ty),
                 mask=padding[:, None] & (column < D)[None, :])


@triton.jit
def _from_rows(Y, ROWS, WEIGHTS, OUT, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up the rows of a token's choices, times their weights if there are any."""
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = column < D
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(K):
        row = tl.load(ROWS + token * K + j).to(tl.int64)
        y = tl.load(Y + row * D + column, mask=inside, other=0.0).to(tl.float32)
        total += y if WEIGHTS is None else tl.load(WEIGHTS + token * K + j).to(tl.float32) * y
    tl.store(OUT + token * D + column, total.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _gather_scales(SCALES, SOURCES, OUT, tokens, rows, K: tl.constexpr, BLOCK: tl.constexpr):
    """One scale of each row: scales lie token beside token."""
    line, row = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(SOURCES + row, mask=row < rows, other=-1)
    scale = tl.load(SCALES + line * tokens + source // K, mask=source >= 0, other=0.0)
    tl.store(OUT + line * rows + row, scale, mask=row < rows)


def sort_by_expert(experts: Tensor, load: Tensor, align: int = 1) -> Permutation:
    """`sort_by_expert_reference` as a counting sort; raises ValueError for experts that are not int64 [N, k]."""
    if experts.dim() != 2 or experts.dtype != torch.int64 or load.dim() != 1 or align < 1:
        raise ValueError(f"sort_by_expert got experts {list(experts.shape)} in {experts.dtype}, load "
                         f"{list(load.shape)} and align {align}; it needs [N, k] in torch.int64, [experts], 1 or more")
    if uses_triton(experts, load):
        return Permutation(*_sort_by_expert(experts, load, align))
    return sort_by_expert_reference(experts, load, align)


def permute(x: Tensor, permutation: Permutation) -> Tensor:
    """`permute_reference`; raises ValueError if x is not one row for each token of the permutation."""
    _check_rows("permute", x, len(permutation.rows), "one for each token")
    if uses_triton(x) or _behind_operator(x):
        return _permute(x, permutation.rows, permutation.sources)
    return permute_reference(x, permutation)


def permute_tiles(codes: Tensor, scales: Tensor, permutation: Permutation) -> tuple[Tensor, Tensor]:
    """`permute_tiles_reference`, without gradient; raises ValueError for codes and scales that do not fit."""
    _check_rows("permute_tiles", codes, len(permutation.rows), "one for each token")
    if scales.shape != (-(-codes.shape[1] // 128), codes.shape[0]):
        raise ValueError(f"permute_tiles got scales of shape {list(scales.shape)}; codes of shape {list(codes.shape)} "
                         f"need [{-(-codes.shape[1] // 128)}, {codes.shape[0]}]")
    if uses_triton(codes, scales):
        rows = _permute(codes.view(torch.uint8), permutation.rows, permutation.sources).view(codes.dtype)
        return rows, _permute_scales(scales, permutation.sources, permutation.rows.shape[1])
    return permute_tiles_reference(codes, scales, permutation)


def unpermute(rows: Tensor, permutation: Permutation, weights: Tensor | None = None) -> Tensor:
    """`unpermute_reference`; raises ValueError for rows or weights that do not fit the permutation."""
    _check_rows("unpermute", rows, len(permutation.sources), "one for each row of the permutation")
    if weights is not None and weights.shape != permutation.rows.shape:
        raise ValueError(f"unpermute got weights of shape {list(weights.shape)}; "
                         f"it needs {list(permutation.rows.shape)}")
    if uses_triton(rows, *() if weights is None else (weights,)) or weights is None and _behind_operator(rows):
        return _unpermute(rows, permutation.rows, permutation.sources, weights)
    return unpermute_reference(rows, permutation, weights)


def _behind_operator(x: Tensor) -> bool:
    """Whether the definition runs inside the operator and so has its gradient: on a CPU, where torch's own for indices
    adds row after row to zeros. A compiler takes the definition apart."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_rows(name: str, x: Tensor, count: int, why: str) -> None:
    if x.dim() != 2 or len(x) != count:
        raise ValueError(f"{name} got a tensor of shape {list(x.shape)}; it needs {count} rows, {why}")


def _capacity(experts: Tensor, load: Tensor, align: int) -> int:
    return -(-(experts.numel() + min(len(load), experts.numel()) * (align - 1)) // align) * align


@torch.library.custom_op("minidsv3::sort_by_expert", mutates_args=())
def _sort_by_expert(experts: Tensor, load: Tensor, align: int) -> tuple[Tensor, Tensor, Tensor]:
    """A `Permutation`."""
    experts, load, device = experts.contiguous(), load.contiguous(), experts.device
    choices, blocks = experts.numel(), triton.cdiv(experts.numel(), _BLOCK)
    bins = triton.next_power_of_2(len(load))
    counts = torch.empty(blocks, bins, dtype=torch.int32, device=device)
    rows = torch.empty(experts.shape, dtype=torch.int32, device=device)
    sources = torch.empty(_capacity(experts, load, align), dtype=torch.int32, device=device)
    ends = torch.empty(len(load), dtype=torch.int32, device=device)
    if align > 1:
        sources.fill_(-1)
    if blocks:
        _count[(blocks,)](experts, counts, choices, bins, _BLOCK, num_warps=1)
    columns = min(bins, 4)
    _accumulate[(bins // columns,)](load, counts, ends, blocks, len(load), align, bins, columns, 1024)
    if blocks:
        _place[(blocks,)](experts, counts, rows, sources, choices, bins, _BLOCK, num_warps=1)
    return rows, sources, ends


@torch.library.custom_op("minidsv3::permute", mutates_args=())
def _permute(x: Tensor, rows: Tensor, sources: Tensor) -> Tensor:
    """x [N, d] -> [R, d]."""
    if not uses_triton(rows):
        return permute_reference(x, Permutation(rows, sources, None))
    return _spread(x, rows, sources)[0]


@torch.library.custom_op("minidsv3::unpermute", mutates_args=())
def _unpermute(y: Tensor, rows: Tensor, sources: Tensor, weights: Tensor | None) -> Tensor:
    """y [R, d] -> [N, d]."""
    if not uses_triton(rows):
        return unpermute_reference(y, Permutation(rows, sources, None), weights)
    y, weights, width = y.contiguous(), None if weights is None else weights.contiguous(), y.shape[1]
    out = torch.empty(len(rows), width, dtype=y.dtype, device=y.device)
    if out.numel():
        _from_rows[(len(rows),)](y, rows, weights, out, width, rows.shape[1], **_whole(width))
    return out


@torch.library.custom_op("minidsv3::unpermute_backward", mutates_args=())
def _unpermute_backward(slope: Tensor, y: Tensor, rows: Tensor, sources: Tensor,
                        weights: Tensor) -> tuple[Tensor, Tensor]:
    """drows [R, d] and dweights [N, k] from dy = `slope` [N, d]."""
    return _spread(slope, rows, sources, y.contiguous(), weights.contiguous())


@torch.library.custom_op("minidsv3::permute_scales", mutates_args=())
def _permute_scales(scales: Tensor, sources: Tensor, chosen: int) -> Tensor:
    """scales [lines, N] -> [lines, R]."""
    scales, (lines, tokens), rows, block = scales.contiguous(), scales.shape, len(sources), 1024
    out = torch.empty(lines, rows, dtype=scales.dtype, device=scales.device)
    if out.numel():
        _gather_scales[(triton.cdiv(rows, block), lines)](scales, sources, out, tokens, rows, chosen, block)
    return out


def _spread(x: Tensor, rows: Tensor, sources: Tensor, y: Tensor | None = None,
            weights: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """x [N, d], weighted, on the rows of its choices; zeros on all others; and its products with y [R, d], [N, k]."""
    x, width = x.contiguous(), x.shape[1]
    out = torch.empty(len(sources), width, dtype=x.dtype, device=x.device)
    products = None if weights is None else torch.empty(weights.shape, dtype=weights.dtype, device=x.device)
    share = _SHARE if _padded(rows, sources) else 0
    programs = max(len(rows), triton.cdiv(len(sources), share)) if share else len(rows)
    if x.numel():
        _to_rows[(programs,)](x, rows, sources, weights, out, y, products, len(rows), len(sources), width,
                              rows.shape[1], SHARE=share, **_whole(width))
    return out, products


def _padded(rows: Tensor, sources: Tensor) -> bool:
    """Whether there may be rows that hold no choice."""
    return len(sources) > rows.numel()


def _whole(width: int) -> dict:
    """A program takes a whole row."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 1024, 1), 16)}


@_sort_by_expert.register_fake
def _(experts, load, align):
    return (experts.new_empty(experts.shape, dtype=torch.int32),
            experts.new_empty(_capacity(experts, load, align), dtype=torch.int32),
            experts.new_empty(load.shape, dtype=torch.int32))


_permute.register_fake(lambda x, rows, sources: x.new_empty(len(sources), x.shape[1]))
_unpermute.register_fake(lambda y, rows, sources, weights: y.new_empty(len(rows), y.shape[1]))
_unpermute_backward.register_fake(
    lambda slope, y, rows, sources, weights: (y.new_empty(y.shape), weights.new_empty(weights.shape)))
_permute_scales.register_fake(lambda scales, sources, chosen: scales.new_empty(scales.shape[0], len(sources)))


def _keep_places(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:3])


def _keep(ctx, inputs, output) -> None:
    y, rows, sources, weights = inputs
    ctx.save_for_backward(*(rows, sources) if weights is None else (y, rows, sources, weights))


def _unpermute_gradient(ctx, slope: Tensor) -> tuple:
    if len(ctx.saved_tensors) == 2:
        return _permute(slope, *ctx.saved_tensors), None, None, None
    drows, dweights = _unpermute_backward(slope, *ctx.saved_tensors)
    return drows, None, None, dweights


_permute.register_autograd(lambda ctx, slope: (_unpermute(slope, *ctx.saved_tensors, None), None, None),
                           setup_context=_keep_places)
_unpermute.register_autograd(_unpermute_gradient, setup_context=_keep)
