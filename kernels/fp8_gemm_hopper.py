"""The FP8 products of `fp8_gemm` and `fp8_grouped_gemm` on Hopper, with warps that specialise (section 3.3.2).

    out[m, n] = sum over blocks k of 128:  (sum over 128 j: a[m, j] b[n, j]) * a_scales[k, m] * b_scales[.., k]

The inner sum runs in the tensor cores, which keep about 14 bits of it; after every block it is scaled and added to an
FP32 accumulator ("promotion to CUDA cores"). The readable version in fp8_gemm.py leaves the tensor cores idle while all
warps promote together. Here the warps of a program have parts of their own:

    producer     one warp: copies tiles of a and b, with their scales, into a ring of shared memory (TMA)
    consumers    groups of four warps, each with 64 or 128 rows of the tile: multiply (wgmma) and promote

A consumer that promotes leaves the tensor cores to the others, and the producer runs ahead, even into the next tile.
Two barriers for every stage of the ring tell when it is full and when all consumers are done with it. A program stays
on its multiprocessor and takes every n-th tile, so that loads of the next tile run under the stores of this one.

Called by the functions of fp8_gemm.py and fp8_grouped_gemm.py, which check their arguments:

    gemm(a, a_scales, b, b_scales, out, accumulate=False)                 a [M, K], b [N, K], out [M, N]
    grouped_gemm(a, a_scales, b, b_scales, ends, out)                     a [M, K], b [E, N, K], out [M, N]
    grouped_wgrad(a, a_scales, b, b_scales, ends, out, accumulate=True)   a [M, T], b [N, T], out [E, M, N]

a and b are e4m3, rows of K (T) contiguous values that start at multiples of 16 bytes; out is BF16 or FP32, its rows too
start at multiples of 16 bytes. a_scales is [ceil(K / 128), M] in FP32, rows start at multiples of 16 bytes. b_scales is
[ceil(N / 128), ceil(K / 128)] (blocks) or [ceil(K / 128), N] (tiles, like a_scales; always so for `grouped_wgrad`); with
experts [E, ceil(N / 128), ceil(K / 128)]. `accumulate` adds to an FP32 out. ends [E] int32 stays on the device; it
increases and holds multiples of 128: expert e owns rows (in `grouped_wgrad` columns) ends[e-1] to ends[e]. Rows of out
after the last end are left as they are.
"""
