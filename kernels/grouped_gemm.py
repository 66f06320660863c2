"""The products of all experts of a layer in one launch: y[m] = x[m] W[expert of m]^T (section 2.1.2), in BF16.

    dx[m] = dy[m] W[expert of m]            dW[e] = sum over the rows m of e:  dy[m]^T x[m]

Rows are sorted by expert; `ends` [experts] says where each expert's rows end, anywhere, and stays on the device: no
host waits for it. A tile of rows belongs to one expert, and begins where the expert does, so that only the last one of
each is not full. Which expert a tile has is found by counting, in every program.
"""

import torch
from torch import Tensor

from .backend import tl, triton, uses_triton
from .fp8_gemm import BAND, check_starts, described, place, programs
from .fp8_grouped_gemm import check_ends, clear_behind, spans
from .precision import wide


def grouped_gemm_reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The definition, one expert at a time, summed in at least FP32. Rows behind the last end are zeros."""
    pieces = [wide(x[start:end]) @ wide(weight[expert]).T for expert, (start, end) in enumerate(spans(ends))]
    behind = len(x) - sum(len(piece) for piece in pieces)
    return torch.cat([*pieces, pieces[0].new_zeros(behind, weight.shape[1])]).to(x.dtype)


def grouped_gemm_wgrad_reference(slope: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """The definition of dW, likewise: dy = `slope` [M, N] and x [M, K] -> [experts, N, K]."""
    return torch.stack([wide(slope[start:end]).T @ wide(x[start:end]) for start, end in spans(ends)]).to(x.dtype)


@triton.jit
def _multiply(X, W, OUT, ENDS, N, K, EXPERTS: tl.constexpr, BINS: tl.constexpr, ALONG_ROWS: tl.constexpr,
              BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr):
    """OUT [.., N] = X [.., K] times each expert's matrix, whose rows are summed over (ALONG_ROWS) or its columns."""
    expert = tl.arange(0, BINS)
    end = tl.load(ENDS + expert, mask=expert < EXPERTS, other=0)
    start = tl.load(ENDS + expert - 1, mask=(expert > 0) & (expert < EXPERTS), other=0)
    tiles = tl.cumsum(tl.where(expert < EXPERTS, tl.cdiv(end - start, BM), 0), 0)
    rows, columns = tl.max(tiles, 0), tl.cdiv(N, BN)
    for t in range(tl.program_id(0), rows * columns, tl.num_programs(0)):
        i, j = place(t, rows, columns, BAND)
        mine = tl.sum((tiles <= i).to(tl.int32), 0)
        before = tl.max(tl.where(tiles <= i, tiles, 0), 0)
        m = tl.load(ENDS + mine - 1, mask=mine > 0, other=0) + (i - before) * BM
        n = j * BN
        total = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            if ALONG_ROWS:
                w = W.load([mine, k, n]).reshape([BK, BN])
            else:
                w = W.load([mine, n, k]).reshape([BN, BK]).T
            total = tl.dot(X.load([m, k]), w, total)
        row, column = m.to(tl.int64) + tl.arange(0, BM), n + tl.arange(0, BN)
        inside = (row < tl.load(ENDS + mine))[:, None] & (column < N)[None, :]
        tl.store(OUT + row[:, None] * N + column[None, :], total.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def _wgrad(DY, X, DW, ENDS, N, K, EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
           BAND: tl.constexpr):
    """Tiles of DW [experts, N, K]; only the last rows of an expert need a mask."""
    rows, columns = tl.cdiv(N, BM), tl.cdiv(K, BN)
    for t in range(tl.program_id(0), rows * columns * EXPERTS, tl.num_programs(0)):
        expert = t // (rows * columns)
        i, j = place(t % (rows * columns), rows, columns, BAND)
        n, k = i * BM, j * BN
        start, end = tl.load(ENDS + expert - 1, mask=expert > 0, other=0), tl.load(ENDS + expert)
        rest = start + (end - start) // BK * BK
        total = tl.zeros((BM, BN), tl.float32)
        for m in range(start, rest, BK):
            total = tl.dot(DY.load([m, n]).T, X.load([m, k]), total)
        if rest < end:
            inside = (rest + tl.arange(0, BK) < end)[:, None]
            dy, x = tl.where(inside, DY.load([rest, n]), 0.0), tl.where(inside, X.load([rest, k]), 0.0)
            total = tl.dot(dy.T, x, total)
        DW.store([expert, n, k], total.to(DW.dtype).reshape([1, BM, BN]))


def grouped_gemm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`grouped_gemm_reference`: x [M, K], weight [experts, N, K], ends [experts] int32, increasing -> [M, N].

    The kernel computes in BF16 alone, and the definition in other dtypes. Raises ValueError for shapes and dtypes that
    do not fit; for the kernel, N and K must be multiples of 8. What `ends` holds is not looked at.
    """
    if x.dim() != 2 or weight.dim() != 3 or x.shape[1] != weight.shape[2] or x.dtype != weight.dtype:
        raise ValueError(f"grouped_gemm got x {list(x.shape)} {x.dtype} and weight {list(weight.shape)} "
                         f"{weight.dtype}; it needs [M, K] and [experts, N, K] in one dtype")
    check_ends("grouped_gemm", ends, len(weight))
    if not uses_triton(x, weight, ends) or x.dtype != torch.bfloat16:
        return grouped_gemm_reference(x, weight, ends)
    if weight.shape[1] % 8 or weight.shape[2] % 8:
        raise ValueError(f"grouped_gemm got weight {list(weight.shape)}; rows and columns must be multiples of 8")
    return _grouped_gemm(x, weight, ends)


@torch.library.custom_op("minidsv3::grouped_gemm", mutates_args=())
def _grouped_gemm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [M, K], weight [experts, N, K] -> [M, N]."""
    return _by_expert(x, weight, ends, along_rows=False)


@torch.library.custom_op("minidsv3::grouped_gemm_dgrad", mutates_args=())
def _dgrad(slope: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """dy = `slope` [M, N], weight [experts, N, K] -> dx [M, K]."""
    return _by_expert(slope, weight, ends, along_rows=True)


@torch.library.custom_op("minidsv3::grouped_gemm_wgrad", mutates_args=())
def _weight_gradient(slope: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """dy = `slope` [M, N], x [M, K] -> dW [experts, N, K]."""
    slope, x, N, K, experts = slope.contiguous(), x.contiguous(), slope.shape[1], x.shape[1], len(ends)
    out = torch.empty(experts, N, K, dtype=x.dtype, device=x.device)
    if not out.numel() or not len(x):
        return out.zero_()
    check_starts(slope, x)
    tiles = triton.cdiv(N, BM) * triton.cdiv(K, BN) * experts
    _wgrad[(programs(tiles, x.device),)](
        described(slope, BK, BM), described(x, BK, BN), described(out, 1, BM, BN), ends.contiguous(), N, K, experts,
        BM, BN, BK, BAND, **OPTIONS)
    return out


def _by_expert(x: Tensor, weight: Tensor, ends: Tensor, along_rows: bool) -> Tensor:
    x, weight, ends, (M, K), experts = x.contiguous(), weight.contiguous(), ends.contiguous(), x.shape, len(weight)
    N = weight.shape[2 if along_rows else 1]
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if not out.numel() or not K:
        return out.zero_()
    check_starts(x, weight)
    tiles = (triton.cdiv(M, BM) + experts) * triton.cdiv(N, BN)
    _multiply[(programs(tiles, x.device),)](
        described(x, BM, BK), described(weight, 1, *((BK, BN) if along_rows else (BN, BK))), out, ends, N, K, experts,
        triton.next_power_of_2(experts), along_rows, BM, BN, BK, BAND, **OPTIONS)
    clear_behind(out, ends)
    return out


BM, BN, BK = 128, 256, 64                       # a tile of the result, and a step of the sum
OPTIONS = {"num_warps": 8, "num_stages": 3}

_grouped_gemm.register_fake(lambda x, weight, ends: x.new_empty(len(x), weight.shape[1]))
_dgrad.register_fake(lambda slope, weight, ends: slope.new_empty(len(slope), weight.shape[2]))
_weight_gradient.register_fake(lambda slope, x, ends: x.new_empty(len(ends), slope.shape[1], x.shape[1]))


def _gradients(ctx, slope: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    return (_dgrad(slope, weight, ends) if ctx.needs_input_grad[0] else None,
            _weight_gradient(slope, x, ends) if ctx.needs_input_grad[1] else None, None)


_grouped_gemm.register_autograd(_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
