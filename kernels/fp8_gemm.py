"""The FP8 product of section 3.3.2: out[m, n] = sum over blocks k of 128:  a_scale * b_scale * (sum over 128 of a b).

a [M, K] and b [N, K] are E4M3 codes as the quantisers write them, and b is a weight or whatever else is multiplied as
x W^T: Hopper's tensor cores take FP8 only with the summed axis innermost. The three products of a linear layer:

                a (1 x 128)       b                          out
    forward     x                 W            (128 x 128)   BF16
    dgrad       dy                W^T          (128 x 128)   BF16
    wgrad       dy^T              x^T          (1 x 128)     FP32, added to the gradient that is there already

Scales differ from one 128 of K to the next, so every block is a product of its own, scaled and added to an FP32 sum
outside of the tensor cores. The report wants that anyway ("promotion to CUDA cores"): the tensor cores keep about 14
bits while they add. Copies go through TMA, which fills what lies outside of a tensor with zeros.

The kernel here is the one to read: all warps of a program multiply together, then all promote. On Hopper the one in
fp8_gemm_hopper.py takes its place, which keeps the tensor cores busy during promotion and reaches half as much again.
"""

from functools import lru_cache

import torch
from torch import Tensor

from . import fp8_gemm_hopper
from .backend import processors, tl, triton, uses_triton
from .quantize import FP8, TILE, dequantize_blocks_reference


def fp8_gemm_reference(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor,
                       out_dtype: torch.dtype = torch.bfloat16, into: Tensor | None = None) -> Tensor:
    """The definition: dequantised, multiplied in FP32, rounded once. In FP32 it does not matter that blocks of K come
    first; on tensor cores that add with fewer bits it does."""
    b = dequantize_tiles(b, b_scales) if has_tiles(b, b_scales) else dequantize_blocks_reference(b, b_scales)
    product = dequantize_tiles(a, a_scales) @ b.T
    return product.to(out_dtype) if into is None else into.add_(product)


def dequantize_tiles(codes: Tensor, scales: Tensor) -> Tensor:
    """1 x 128: codes [M, K], scales [ceil(K / 128), M] -> [M, K] in FP32."""
    return codes.float() * scales.T.repeat_interleave(TILE, 1)[:, :codes.shape[1]]


def has_tiles(codes: Tensor, scales: Tensor) -> bool:
    """Whether scales are those of 1 x 128 tiles of codes [N, K], and not of 128 x 128 blocks."""
    return scales.shape == (blocks_of(codes.shape[1]), codes.shape[0])


def blocks_of(size: int) -> int:
    return -(-size // TILE)


@triton.jit
def place(t, rows, columns, BAND: tl.constexpr):
    """Row and column of tile `t`: BAND rows of tiles are walked together, so that they share tiles of b in L2."""
    band = t // (BAND * columns) * BAND
    height = tl.minimum(rows - band, BAND)
    inside = t % (BAND * columns)
    return band + inside % height, inside // height


@triton.jit
def block_scales(AS, BS, k, last, row, column, a_line, b_line, rows, columns, TILES: tl.constexpr):
    """The scales of A's rows and of B's, or of B's one block, in block k of K; none behind the last."""
    a_scale = tl.load(AS + k * a_line + row, mask=(row < rows) & (k < last), other=0.0)
    if TILES:
        b_scale = tl.load(BS + k * b_line + column, mask=(column < columns) & (k < last), other=0.0)
    else:
        b_scale = tl.load(BS + k, mask=k < last, other=0.0)
    return a_scale, b_scale


@triton.jit
def scaled_product(A, AS, B, BS, m, n, b_row, a_line, b_line, rows, columns, first, last, TILES: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr):
    """The sum over blocks `first` to `last` of K for rows m.. of A and n.. of B, which are b_row.. of all experts'.

    Scales of A, and of B if it has TILES, are a_line and b_line apart from one block to the next; otherwise BS is the
    line of scales of these rows' blocks. They are asked for one block ahead: TMA brings codes earlier still.
    """
    row, column = m + tl.arange(0, BM), n + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    a_scale, b_scale = block_scales(AS, BS, first, last, row, column, a_line, b_line, rows, columns, TILES)
    for k in range(first, last):
        a_next, b_next = block_scales(AS, BS, k + 1, last, row, column, a_line, b_line, rows, columns, TILES)
        product = tl.dot(A.load([m, k * 128]), B.load([b_row, k * 128]).T)
        if TILES:
            total += product * (a_scale[:, None] * b_scale[None, :])
        else:
            total += product * (a_scale * b_scale)[:, None]
        a_scale, b_scale = a_next, b_next
    return total


@triton.jit
def put(OUT, matrix, m, n, total, ADD: tl.constexpr):
    """Writes a tile of one of OUT's matrices, or adds to it."""
    shape: tl.constexpr = [1, total.shape[0], total.shape[1]]
    if ADD:
        total += OUT.load([matrix, m, n]).reshape(total.shape)
    OUT.store([matrix, m, n], total.to(OUT.dtype).reshape(shape))


@triton.jit
def _gemm(A, AS, B, BS, OUT, M, N, K, a_line, b_line, TILES: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr,
          BN: tl.constexpr, BAND: tl.constexpr):
    """Every program takes every n-th tile of OUT."""
    rows, columns, blocks = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.cdiv(K, 128)
    for t in range(tl.program_id(0), rows * columns, tl.num_programs(0)):
        i, j = place(t, rows, columns, BAND)
        m, n = i * BM, j * BN
        line = BS if TILES else BS + n // 128 * blocks
        total = scaled_product(A, AS, B, line, m, n, n, a_line, b_line, M, N, 0, blocks, TILES, BM, BN)
        put(OUT, 0, m, n, total, ADD)


def fp8_gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out_dtype: torch.dtype = torch.bfloat16,
             into: Tensor | None = None) -> Tensor:
    """a b^T of E4M3 codes and their FP32 scales, in BF16 or FP32, [M, N]; or `into`, FP32, with it added.

    a [M, K] with a_scales [ceil(K / 128), M] of 1 x 128 tiles, whose lines may lie apart; b [N, K] with b_scales either
    [ceil(N / 128), ceil(K / 128)] of blocks or [ceil(K / 128), N] of tiles. K is a multiple of 16, N of 8. No gradient
    passes through. Raises ValueError for anything else.
    """
    check_codes("fp8_gemm", a=a, b=b)
    if a.dim() != 2 or b.dim() != 2 or len(b) % 8:
        raise ValueError(f"fp8_gemm got a {list(a.shape)} and b {list(b.shape)}; "
                         f"it needs [M, K] and [N, K] with N a multiple of 8")
    check_scales("fp8_gemm", a_scales=(a_scales, [blocks_of(a.shape[1]), len(a)]))
    blocks = [blocks_of(len(b)), blocks_of(b.shape[1])]
    check_scales("fp8_gemm", b_scales=(b_scales, list(b_scales.shape) if has_tiles(b, b_scales) else blocks))
    if out_dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"fp8_gemm cannot return {out_dtype}; it returns torch.bfloat16 or torch.float32")
    check_devices("fp8_gemm", a, a_scales, b, b_scales, *() if into is None else (into,))
    if into is not None:
        check_into("fp8_gemm", into, [len(a), len(b)])
    if not uses_triton(a, a_scales, b, b_scales):
        return fp8_gemm_reference(a, a_scales, b, b_scales, out_dtype, into)
    if into is None:
        return _fp8_gemm(a, a_scales, b, b_scales, out_dtype)
    _fp8_gemm_add(a, a_scales, b, b_scales, into)
    return into


def check_codes(name: str, **codes: Tensor) -> None:
    """Raises ValueError unless all are E4M3, row-major, and equally wide, by what TMA can copy."""
    width = next(iter(codes.values())).shape[-1]
    for letter, x in codes.items():
        if x.dtype != FP8 or x.dim() < 2:
            raise ValueError(f"{name} got {letter} {list(x.shape)} {x.dtype}; it needs a matrix of {FP8}")
        if x.numel() and (x.stride(-1) != 1 or x.stride(-2) % 16 or x.dim() == 3 and not x.is_contiguous()):
            raise ValueError(f"{name} got {letter} with strides {list(x.stride())}; rows must be contiguous and start "
                             f"at multiples of 16 bytes, and experts must follow one another")
        if x.shape[-1] != width or width % 16:
            raise ValueError(f"{name} got {letter} of shape {list(x.shape)}; rows must all be equally long ({width}), "
                             f"and a multiple of 16")


def check_scales(name: str, **scales: tuple[Tensor, list[int]]) -> None:
    """Raises ValueError unless each has its shape, in FP32."""
    for letter, (x, shape) in scales.items():
        if x.dtype != torch.float32 or list(x.shape) != shape or x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():
            raise ValueError(f"{name} got {letter} {list(x.shape)} {x.dtype} with strides {list(x.stride())}; "
                             f"it needs {shape} in torch.float32 with contiguous rows")


def check_devices(name: str, *tensors: Tensor) -> None:
    if len({x.device for x in tensors}) > 1:
        given = ", ".join(str(x.device) for x in tensors)
        raise ValueError(f"{name} got tensors on {given}; they must be on one device")


def check_into(name: str, into: Tensor, shape: list[int]) -> None:
    if into.dtype != torch.float32 or list(into.shape) != shape or not into.is_contiguous():
        raise ValueError(f"{name} got into {list(into.shape)} {into.dtype}; "
                         f"it needs {shape} in torch.float32, contiguous")


@torch.library.custom_op("minidsv3::fp8_gemm", mutates_args=())
def _fp8_gemm(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out_dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(a), len(b), dtype=out_dtype, device=a.device)
    _multiply(a, a_scales, b, b_scales, out, add=False)
    return out


@torch.library.custom_op("minidsv3::fp8_gemm_add", mutates_args=("into",))
def _fp8_gemm_add(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, into: Tensor) -> None:
    _multiply(a, a_scales, b, b_scales, into, add=True)


def _multiply(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, out: Tensor, add: bool) -> None:
    if not out.numel() or not a.shape[1]:
        return None if add else out.zero_()
    check_starts(a, b, out)
    (M, K), N, tiles = a.shape, len(b), has_tiles(b, b_scales)
    b_scales = aligned(b_scales) if tiles else b_scales.contiguous()
    if specialises(a.device):
        return fp8_gemm_hopper.gemm(a, aligned(a_scales), b, b_scales, out, accumulate=add)
    rows, warps = (64, 4) if M <= 64 else (128, 8)
    _gemm[(programs(triton.cdiv(M, rows) * blocks_of(N), a.device),)](
        described(a, rows, TILE), a_scales, described(b, TILE, TILE), b_scales,
        described(out.view(1, M, N), 1, rows, TILE), M, N, K, a_scales.stride(0), b_scales.stride(0), tiles, add, rows,
        TILE, BAND, num_warps=warps, num_stages=4)


BAND = 8            # rows of tiles that are walked together


def programs(tiles: int, device: torch.device) -> int:
    """One for every multiprocessor, if there are tiles for so many."""
    return min(tiles, processors(device))


@lru_cache
def specialises(device: torch.device) -> bool:
    """Whether the kernels of fp8_gemm_hopper.py run: on Hopper, and not in Triton's interpreter, which has no Gluon. As
    elsewhere a CPU stands for an H200."""
    hopper = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 9
    return hopper and not triton.knobs.runtime.interpret


def described(x: Tensor, *block: int):
    """What TMA needs to copy blocks of x."""
    from triton.tools.tensor_descriptor import TensorDescriptor
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def check_starts(*tensors: Tensor) -> None:
    """Raises ValueError unless TMA can address all of them."""
    for x in tensors:
        if x.data_ptr() % 16:
            raise ValueError(f"a product got a tensor {list(x.shape)} {x.dtype} that starts {x.data_ptr() % 16} bytes "
                             f"after a multiple of 16 bytes; TMA needs it to start at one")


def aligned(scales: Tensor) -> Tensor:
    """Scales whose lines TMA can copy: they start at multiples of 16 bytes."""
    if scales.stride(0) % 4 == 0 and scales.data_ptr() % 16 == 0:
        return scales
    lines, width = scales.shape
    return torch.empty(lines, -(-width // 4) * 4, device=scales.device)[:, :width].copy_(scales)


_fp8_gemm.register_fake(lambda a, a_scales, b, b_scales, out_dtype: a.new_empty(len(a), len(b), dtype=out_dtype))
_fp8_gemm_add.register_fake(lambda a, a_scales, b, b_scales, into: None)
