"""The FP8 products of all experts of a layer at once: rows sorted by expert, one launch, nothing asked of the host.

    fp8_grouped_gemm    out[m] = a[m] b[expert of m]^T                          forward, dgrad
    fp8_grouped_wgrad   out[e] (+)= a[:, rows of e] b[:, rows of e]^T           a = dy^T, b = x^T, out in FP32

Codes, scales and promotion are those of fp8_gemm.py. `ends` [experts] says where each expert's rows end, and stays on
the device. Every end is a multiple of 128 (`sort_by_expert` with align=128): no tile has rows of two experts, and no
128 x 1 scale covers tokens of two (section 3.3.3). An expert may have no rows. A buffer has room for the worst case;
what is behind the last end costs nothing and comes back as zeros.
"""

import torch
from torch import Tensor

from . import fp8_gemm_hopper
from .backend import tl, triton, uses_triton
from .fp8_gemm import (BAND, aligned, blocks_of, check_codes, check_devices, check_into, check_scales, check_starts,
                       described, fp8_gemm_reference, place, programs, put, scaled_product, specialises)
from .quantize import TILE


def fp8_grouped_gemm_reference(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor) -> Tensor:
    """The definition: one expert at a time."""
    out = torch.zeros(len(a), b.shape[1], dtype=torch.bfloat16, device=a.device)
    for expert, (start, end) in enumerate(spans(ends)):
        out[start:end] = fp8_gemm_reference(a[start:end], a_scales[:, start:end], b[expert], b_scales[expert])
    return out


def fp8_grouped_wgrad_reference(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor,
                                into: Tensor | None = None) -> Tensor:
    """The definition: one expert at a time."""
    out = torch.zeros(len(ends), len(a), len(b), device=a.device) if into is None else into
    for expert, (start, end) in enumerate(spans(ends)):
        line = slice(start // TILE, end // TILE)
        fp8_gemm_reference(a[:, start:end], a_scales[line], b[:, start:end], b_scales[line], into=out[expert])
    return out


def spans(ends: Tensor) -> list[tuple[int, int]]:
    """Start and end of each expert's rows."""
    return list(zip([0, *ends.tolist()], ends.tolist()))


@triton.jit
def _gemm(A, AS, B, BS, OUT, ENDS, N, K, a_line, EXPERTS: tl.constexpr, BINS: tl.constexpr, BM: tl.constexpr,
          BN: tl.constexpr, BAND: tl.constexpr):
    """As in fp8_gemm.py. The expert of a tile is the number of experts that end before it."""
    expert = tl.arange(0, BINS)
    ends = tl.load(ENDS + expert, mask=expert < EXPERTS, other=2**31 - 1)
    rows, columns, blocks = tl.load(ENDS + EXPERTS - 1) // BM, tl.cdiv(N, BN), tl.cdiv(K, 128)
    for t in range(tl.program_id(0), rows * columns, tl.num_programs(0)):
        i, j = place(t, rows, columns, BAND)
        m, n = i * BM, j * BN
        mine = tl.sum((ends <= m).to(tl.int32))
        line = BS + (mine * tl.cdiv(N, 128) + n // 128) * blocks
        total = scaled_product(A, AS, B, line, m, n, mine * N + n, a_line, 0, rows * BM, N, 0, blocks, False, BM, BN)
        put(OUT, 0, m, n, total, False)


@triton.jit
def _wgrad(A, AS, B, BS, OUT, ENDS, M, N, a_line, b_line, EXPERTS: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr,
           BN: tl.constexpr, BAND: tl.constexpr):
    """As in fp8_gemm.py, with a share of K for every expert."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for t in range(tl.program_id(0), rows * columns * EXPERTS, tl.num_programs(0)):
        expert = t // (rows * columns)
        i, j = place(t % (rows * columns), rows, columns, BAND)
        m, n = i * BM, j * BN
        first = tl.load(ENDS + expert - 1, mask=expert > 0, other=0) // 128
        last = tl.load(ENDS + expert) // 128
        total = scaled_product(A, AS, B, BS, m, n, n, a_line, b_line, M, N, first, last, True, BM, BN)
        if not ADD or first < last:
            put(OUT, expert, m, n, total, ADD)


@triton.jit
def _clear(OUT, ENDS, rows, N, EXPERTS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Zeros in the rows that belong to no expert."""
    end = tl.load(ENDS + EXPERTS - 1)
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    if tl.program_id(0) * BM + BM > end:
        for n in range(0, N, BN):
            column = n + tl.arange(0, BN)
            inside = ((row >= end) & (row < rows))[:, None] & (column < N)[None, :]
            tl.store(OUT + row[:, None] * N + column[None, :], tl.zeros((BM, BN), OUT.dtype.element_ty), mask=inside)


def fp8_grouped_gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor) -> Tensor:
    """a's rows times their experts' weights, [M, N] in BF16; rows behind the last end are zeros.

    a [M, K] with a_scales [ceil(K / 128), M]; b [experts, N, K] with b_scales [experts, ceil(N / 128), ceil(K / 128)];
    ends [experts] int32, increasing multiples of 128. K is a multiple of 16, N of 8. No gradient passes through. Raises
    ValueError for other shapes and dtypes; what `ends` holds is not looked at.
    """
    check_codes("fp8_grouped_gemm", a=a, b=b)
    if a.dim() != 2 or b.dim() != 3 or b.shape[1] % 8:
        raise ValueError(f"fp8_grouped_gemm got a {list(a.shape)} and b {list(b.shape)}; "
                         f"it needs [M, K] and [experts, N, K] with N a multiple of 8")
    blocks = [len(b), blocks_of(b.shape[1]), blocks_of(b.shape[2])]
    check_scales("fp8_grouped_gemm", a_scales=(a_scales, [blocks_of(a.shape[1]), len(a)]), b_scales=(b_scales, blocks))
    check_ends("fp8_grouped_gemm", ends, len(b))
    check_devices("fp8_grouped_gemm", a, a_scales, b, b_scales, ends)
    run = _fp8_grouped_gemm if uses_triton(a, a_scales, b, b_scales, ends) else fp8_grouped_gemm_reference
    return run(a, a_scales, b, b_scales, ends)


def fp8_grouped_wgrad(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor,
                      into: Tensor | None = None) -> Tensor:
    """The weight gradients of all experts, [experts, M, N] in FP32; or `into`, with them added to it.

    a [M, T] with a_scales [ceil(T / 128), M] and b [N, T] with b_scales [ceil(T / 128), N]: 1 x 128 tiles along the
    tokens. ends [experts] int32, increasing multiples of 128. M is anything, N a multiple of 8, T of 16. Raises
    ValueError for other shapes and dtypes; what `ends` holds is not looked at.
    """
    check_codes("fp8_grouped_wgrad", a=a, b=b)
    if a.dim() != 2 or b.dim() != 2 or len(b) % 8:
        raise ValueError(f"fp8_grouped_wgrad got a {list(a.shape)} and b {list(b.shape)}; "
                         f"it needs [M, T] and [N, T] with N a multiple of 8")
    lines = blocks_of(a.shape[1])
    check_scales("fp8_grouped_wgrad", a_scales=(a_scales, [lines, len(a)]), b_scales=(b_scales, [lines, len(b)]))
    check_ends("fp8_grouped_wgrad", ends, None)
    check_devices("fp8_grouped_wgrad", a, a_scales, b, b_scales, ends, *() if into is None else (into,))
    if into is not None:
        check_into("fp8_grouped_wgrad", into, [len(ends), len(a), len(b)])
    if not uses_triton(a, a_scales, b, b_scales, ends):
        return fp8_grouped_wgrad_reference(a, a_scales, b, b_scales, ends, into)
    if into is None:
        return _fp8_grouped_wgrad(a, a_scales, b, b_scales, ends)
    _fp8_grouped_wgrad_add(a, a_scales, b, b_scales, ends, into)
    return into


def check_ends(name: str, ends: Tensor, experts: int | None) -> None:
    if ends.dtype != torch.int32 or ends.dim() != 1 or experts not in (None, len(ends)):
        raise ValueError(f"{name} got ends {list(ends.shape)} {ends.dtype}; "
                         f"it needs [{'experts' if experts is None else experts}] in torch.int32")


@torch.library.custom_op("minidsv3::fp8_grouped_gemm", mutates_args=())
def _fp8_grouped_gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor) -> Tensor:
    (M, K), (experts, N, _) = a.shape, b.shape
    b_scales, ends = b_scales.contiguous(), ends.contiguous()
    out = torch.empty(M, N, dtype=torch.bfloat16, device=a.device)
    if not out.numel() or not b.numel():
        return out.zero_()
    check_starts(a, b)
    if specialises(a.device):
        fp8_gemm_hopper.grouped_gemm(a, aligned(a_scales), b, b_scales, ends, out)
    else:
        _gemm[(programs(blocks_of(M) * blocks_of(N), a.device),)](
            described(a, TILE, TILE), a_scales, described(b.view(-1, K), TILE, TILE), b_scales,
            described(out.view(1, M, N), 1, TILE, TILE), ends, N, K, a_scales.stride(0), experts,
            triton.next_power_of_2(experts), TILE, TILE, BAND, num_warps=8, num_stages=4)
    clear_behind(out, ends)
    return out


@torch.library.custom_op("minidsv3::fp8_grouped_wgrad", mutates_args=())
def _fp8_grouped_wgrad(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor) -> Tensor:
    out = torch.empty(len(ends), len(a), len(b), device=a.device)
    _weight_gradients(a, a_scales, b, b_scales, ends, out, add=False)
    return out


@torch.library.custom_op("minidsv3::fp8_grouped_wgrad_add", mutates_args=("into",))
def _fp8_grouped_wgrad_add(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor,
                           into: Tensor) -> None:
    _weight_gradients(a, a_scales, b, b_scales, ends, into, add=True)


def _weight_gradients(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor, out: Tensor,
                      add: bool) -> None:
    (M, T), N, experts, ends = a.shape, len(b), len(ends), ends.contiguous()
    if not out.numel() or not T:
        return None if add else out.zero_()
    check_starts(a, b, out)
    if specialises(a.device) and M % 64 == 0:    # so that no tile of out has rows of two experts
        return fp8_gemm_hopper.grouped_wgrad(a, aligned(a_scales), b, aligned(b_scales), ends, out, accumulate=add)
    _wgrad[(programs(experts * blocks_of(M) * blocks_of(N), a.device),)](
        described(a, TILE, TILE), a_scales, described(b, TILE, TILE), b_scales, described(out, 1, TILE, TILE), ends,
        M, N, a_scales.stride(0), b_scales.stride(0), experts, add, TILE, TILE, BAND, num_warps=8, num_stages=4)


def clear_behind(out: Tensor, ends: Tensor) -> None:
    """Zeros in the rows of out [M, N] behind the last end."""
    _clear[(blocks_of(len(out)),)](out, ends, *out.shape, len(ends), TILE, TILE)


@_fp8_grouped_gemm.register_fake
def _(a, a_scales, b, b_scales, ends):
    return a.new_empty(len(a), b.shape[1], dtype=torch.bfloat16)


@_fp8_grouped_wgrad.register_fake
def _(a, a_scales, b, b_scales, ends):
    return a.new_empty(len(ends), len(a), len(b), dtype=torch.float32)


_fp8_grouped_wgrad_add.register_fake(lambda a, a_scales, b, b_scales, ends, into: None)
